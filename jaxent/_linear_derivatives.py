"""Derivatives of a linear layer's losses, by loops in which logits and their gradient are made and used up.

Two functions of the arrays: the losses one by one, and their scaled sum. The sum knows its cotangent but for a
factor, so its gradients come together with the losses: three matrix products in all. The single losses wait for their
cotangents and then make the logits anew: four. Tokens that are not `live`, where that is given, are as good as
ignored: those of weight 0, unless the derivative by their weight, which is their loss, is wanted. Beside the losses
they give what else is known of each token, where that is wanted, and beside the sum the losses then, too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Integer

from ._class_axis import vary
from ._kernels.product import dot
from ._label_loss import is_perturbed, unmoved
from ._linear import inner, linear, times
from ._linear_given import (
    NOTHING,
    Arrays,
    Given,
    Gradients,
    Known,
    Live,
    Options,
    Wanted,
    beside,
    compute_dtype,
    counts_of,
    given_by,
    losses_and_gradient_of,
)
from ._linear_plan import differentiable
from ._linear_sweep import chunks_of, sweep


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def total(
    options: Options, arrays: Arrays, scale: Float[Array, ""] | Float[Array, " tokens"]
) -> tuple[Float[Array, ""], Float[Array, " tokens"] | None, Known | None]:
    """`sum(scale * losses)`."""
    losses, known = single_losses(options, arrays, _live(scale))
    return _scaled_sum(scale, losses), None if known is None else losses, known


@partial(total.defjvp, symbolic_zeros=True)
def _total_jvp(options: Options, primals: tuple[Arrays, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    arrays, scale = primals
    arrays_dot, scale_dot = tangents
    live = None if is_perturbed(scale_dot) else _live(scale)
    if _only_by_ad(arrays_dot):
        return _with_known(*_jvp_by_ad(partial(_sweep_total, options, live), primals, tangents))
    wanted, linear_dot = _wanted(arrays_dot)
    losses, known, gradients = _losses_and_gradients(
        options, wanted, arrays, jnp.broadcast_to(scale, arrays.hidden.shape[:1]), live
    )
    terms = [inner(g, t) for g, t in zip(jax.tree.leaves(gradients), linear_dot, strict=True)]
    tangent = options.classes.total(sum(terms, jnp.zeros((), losses.dtype)))
    if is_perturbed(scale_dot):
        tangent += _scaled_sum(scale_dot, losses)
    return _with_known(_scaled_sum(scale, losses), tangent, (None if known is None else losses, known))


def _with_known(out: Array, tangent: Array, known: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a rule returns."""
    return (out, *known), (tangent, *unmoved(known))


def _live(scale: Float[Array, ""] | Float[Array, " tokens"]) -> Live:
    return scale != 0.0 if scale.ndim else None


def _scaled_sum(scale: Float[Array, ""] | Float[Array, " tokens"], losses: Float[Array, " tokens"]) -> Array:
    return jnp.sum(times(scale, losses)) if scale.ndim else scale * jnp.sum(losses)


def _times(v: Float[Array, " tokens"], losses: Float[Array, "tokens ..."]) -> Array:
    return times(jnp.broadcast_to(beside(losses, v), losses.shape), losses)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted(
    options: Options, arrays: Arrays, v: Float[Array, " tokens"]
) -> tuple[Float[Array, "tokens ..."], Known | None]:
    """The loss of each token, times its weight."""
    losses, known = single_losses(options, arrays, _live(v))
    return _times(v, losses), known


@partial(weighted.defjvp, symbolic_zeros=True)
def _weighted_jvp(options: Options, primals: tuple[Arrays, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    live = None if is_perturbed(tangents[1]) else _live(primals[1])

    def weighted(arrays: Arrays, v: Array) -> tuple[Array, tuple[Any, ...]]:
        losses, known = single_losses(options, arrays, live)
        return _times(v, losses), (known,)

    return _with_known(*_jvp_by_ad(weighted, primals, tangents))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def single_losses(options: Options, arrays: Arrays, live: Live) -> tuple[Float[Array, "tokens ..."], Known | None]:
    """The loss of each token, 0 of those that are not live."""
    return sweep(options, NOTHING, arrays, None, live)[:2]


@partial(single_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(options: Options, primals: tuple[Arrays, Live], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (arrays, live), (arrays_dot, _) = primals, tangents
    if _only_by_ad(arrays_dot):
        return _with_known(*_jvp_by_ad(partial(_sweep_losses, options, live), (arrays,), (arrays_dot,)))
    wanted, linear_dot = _wanted(arrays_dot)
    tangent = _directional(options, wanted, arrays, live is not None, linear_dot)
    losses, known = single_losses(options, arrays, live)
    return _with_known(losses, options.classes.total(tangent), (known,))


def _directional(
    options: Options, wanted: Wanted, arrays: Arrays, weighted: bool, direction: tuple[Array, ...]
) -> Float[Array, "tokens ..."]:
    """Derivative J of each loss along `direction`: `J v`, whose transpose is `_losses_and_gradients`.

    AD would transpose the loop of `J v` to one that makes a new array of the kernel's size in every step. If losses
    are `weighted`, those of no weight get cotangents of 0, and are not live there.
    """
    leaves, structure = jax.tree.flatten(arrays)
    dtypes, count = [v.dtype for v in direction], len(leaves)  # not the tracers themselves, which would leak

    def along(*values: Array) -> Array:
        known, v = values[:count], values[count:]
        return _sweep_directional(options, wanted, jax.tree.unflatten(structure, known), v)

    def transposed(*values: Array) -> tuple[Array, ...]:
        known, c = jax.tree.unflatten(structure, values[:count]), values[-1]
        # All parts of the classes have the same cotangents, but types say that they may differ.
        counts = jnp.any(c != 0.0, tuple(range(1, c.ndim))).astype(jnp.int32)
        live = options.classes.total(counts) > 0 if weighted else None
        silent = options._replace(loss=options.loss._replace(stats=False))
        gradients = _losses_and_gradients(silent, wanted, known, c, live)[-1]
        return tuple(g.astype(dtype) for g, dtype in zip(jax.tree.leaves(gradients), dtypes, strict=True))

    return linear(along, transposed, tuple(leaves), *direction)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _losses_and_gradients(
    options: Options, wanted: Wanted, arrays: Arrays, scale: Float[Array, "tokens ..."], live: Live
) -> tuple[Float[Array, "tokens ..."], Known | None, Gradients]:
    """Losses, what else is known, and gradients of `sum(scale * losses)`; of split classes this device's terms."""
    return sweep(options, wanted, arrays, scale, live)


@partial(_losses_and_gradients.defjvp, symbolic_zeros=True)
def _losses_and_gradients_jvp(options: Options, wanted: Wanted, primals: Any, tangents: Any) -> tuple[Any, Any]:
    live = None if is_perturbed(tangents[1]) else primals[2]

    def of_both(arrays: Arrays, scale: Array) -> Any:
        losses, known, gradients = sweep(options, wanted, arrays, scale, live, differentiable=True)
        return (losses, gradients), known

    (losses, gradients), (losses_dot, gradients_dot), known = _jvp_by_ad(of_both, primals[:2], tangents[:2])
    return (losses, known, gradients), (losses_dot, unmoved(known), gradients_dot)


def _sweep_losses(
    options: Options, live: Live, arrays: Arrays
) -> tuple[Float[Array, "tokens ..."], tuple[Known | None]]:
    """`single_losses` for AD."""
    losses, known, _ = sweep(options, NOTHING, arrays, None, live, differentiable=True)
    return losses, (known,)


def _sweep_total(
    options: Options, live: Live, arrays: Arrays, scale: Array
) -> tuple[Float[Array, ""], tuple[Array | None, Known | None]]:
    """`total` for AD."""
    losses, (known,) = _sweep_losses(options, live, arrays)
    return _scaled_sum(scale, losses), (None if known is None else losses, known)


def _sweep_directional(
    options: Options, wanted: Wanted, arrays: Arrays, direction: tuple[Array, ...]
) -> Float[Array, "tokens ..."]:
    """The derivative of each loss along `direction`, for AD; this device's term of it if the classes are split."""
    hidden, dtype = arrays.hidden, compute_dtype(arrays)
    size = differentiable(options, arrays).size
    chunks = chunks_of(arrays, size, counts_of(options, arrays, None), skip=False)
    given = given_by(arrays)
    operand = given.layer.kernel.dtype
    parts = iter(direction)
    hidden_dot, *other_dots = (next(parts) if want else None for want in wanted)
    hidden_dot = None if hidden_dot is None else chunks.spread(hidden_dot)
    by_token = chunks.spread(hidden), chunks.spread(arrays.labels)

    @jax.checkpoint
    def along(
        x: Array, given: Given, y: Array, counts: Array, x_dot: Array | None, other_dots: list[Array | None]
    ) -> Array:
        kernel_dot, bias_dot, scale_dot = other_dots
        logits_dot = jnp.zeros((1, 1), dtype) if bias_dot is None else bias_dot[None]
        if x_dot is not None:
            logits_dot += dot(x_dot, given.layer.kernel.astype(dtype), 1, 0, dtype)
        if kernel_dot is not None:
            logits_dot += dot(x.astype(dtype), kernel_dot, 1, 0, dtype)

        def of(unit: Array) -> Array:
            _, _, g, of_scale = losses_and_gradient_of(options, given, None, dtype, x, y, counts, unit)
            tangent = jnp.sum(g.for_hidden.rows * logits_dot, 1)
            return tangent if scale_dot is None or of_scale is None else tangent + scale_dot * of_scale

        one = jnp.ones(x.shape[0], dtype)
        if not options.entropy:
            return of(one)
        zero = jnp.zeros_like(one)
        return jnp.stack([of(jnp.stack(pair, 1)) for pair in ((one, zero), (zero, one))], 1)

    def step(tangent: Array, i: Integer[Array, ""]) -> tuple[Array, None]:
        counts = chunks.counts(i)
        x, y = (chunks.take(rows, i) for rows in by_token)
        x_dot = None if hidden_dot is None else chunks.take(hidden_dot, i)
        x = jnp.where(counts[:, None], x, 0).astype(operand)
        y = y if arrays.teacher is None else jnp.where(counts[:, None], y, 0)
        rows = along(x, given, y, counts, x_dot, other_dots)
        return chunks.put(tangent, jnp.where(beside(rows, counts), rows, 0.0), i), None

    start = vary(
        chunks.spread(jnp.zeros(options.rows(hidden.shape[0]), dtype)), *jax.tree.leaves((arrays, direction))
    )
    tangent = jax.lax.scan(step, start, jnp.arange(chunks.steps))[0] if hidden.shape[0] else start
    return chunks.gather(tangent)


def _only_by_ad(arrays_dot: Any) -> bool:
    """Whether there are tangents of what no loop of ours has the gradients of."""
    others = (arrays_dot.weight, arrays_dot.labels, arrays_dot.added, arrays_dot.teacher)
    return any(map(is_perturbed, jax.tree.leaves(others, is_leaf=lambda t: isinstance(t, SymbolicZero))))


def _wanted(arrays_dot: Any) -> tuple[Wanted, tuple[Array, ...]]:
    """Which of hidden, kernel, bias and logit_scale have tangents, and those tangents."""
    linear = (arrays_dot.hidden, arrays_dot.kernel, arrays_dot.bias, arrays_dot.logit_scale)
    wanted: Any = tuple(map(is_perturbed, linear))
    return wanted, tuple(t for t, want in zip(linear, wanted, strict=True) if want)


def _jvp_by_ad(f: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any, Any]:
    """`jax.jvp`, given zero tangents as custom_jvp gives them, of what gives something without derivatives, too."""
    leaves, structure = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    moving = [i for i, t in enumerate(dots) if is_perturbed(t)]

    def of_moving(*values: Array) -> Any:
        every = list(leaves)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return f(*jax.tree.unflatten(structure, every))

    return jax.jvp(of_moving, [leaves[i] for i in moving], [dots[i] for i in moving], has_aux=True)
