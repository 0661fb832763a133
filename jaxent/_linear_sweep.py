"""Losses of all tokens and gradients of their scaled sum, with only a chunk's logits at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ._chunks import Chunks, chunk_size_for_memory, everywhere, packed_chunks, strided_chunks, unseen_parts
from ._class_axis import vary
from ._distillation import Divergence
from ._kernels.product import dot, fit
from ._label_loss import is_easily_underflown, mixed
from ._linear_given import (
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
    losses_of,
)
from ._linear_plan import Machine, Plan, can_cut_classes, plan_for
from ._linear_plan import differentiable as differentiable_plan
from ._product_divergence import Pair, Tokens, product_divergences_and_gradients
from ._product_loss import Center, center, product_losses_and_gradients

# Whose way a platform goes, as JAX calls it when it lowers; "xla" stands for all others, and for plain JAX.
MACHINE_OF: dict[str, Machine] = {"cpu": "cpu", "cuda": "cuda", "rocm": "rocm", "xla": "tpu"}
_SHARE_OF_PAIRS = 0.05  # of one model's logits, what is held of both models' at most
_Scale = Float[Array, "tokens ..."] | None
_Swept = tuple[Float[Array, "tokens ..."], Known | None, Gradients]


def sweep(
    options: Options,
    wanted: Wanted,
    arrays: Arrays,
    scale: _Scale,
    live: Live,
    *,
    differentiable: bool = False,
) -> _Swept:
    """One loop over chunks of tokens: losses, what else is known, and wanted gradients of `sum(scale * losses)`.

    With `differentiable` every operation is one that AD can differentiate in both directions, recomputing each chunk,
    at the price of one more array of the kernel's size. Otherwise gradients are updated in place, and the machine
    decides how: a CPU multiplies apart and has a kernel for what is left, others have what is made of logits in the
    product itself.
    """
    counts = counts_of(options, arrays, live)
    if differentiable:
        plan = differentiable_plan(options, arrays)
        return loop(options, plan, chunks_of(arrays, plan.size, counts, skip=False), wanted, arrays, scale)

    def by(platform: str) -> Callable[..., _Swept]:
        return partial(_by_machine, MACHINE_OF[platform], options, wanted)

    if options.loss.implementation == "xla":
        return by("xla")(arrays, scale, counts)
    rocm = by("rocm")
    cuda = by("cuda") if fit(arrays.hidden, arrays.kernel) else rocm  # one trace where it can be
    return jax.lax.platform_dependent(arrays, scale, counts, cpu=by("cpu"), cuda=cuda, rocm=rocm, default=by("xla"))


def _by_machine(
    machine: Machine, options: Options, wanted: Wanted, arrays: Arrays, scale: _Scale, counts: Live
) -> _Swept:
    which = options.divergence
    if machine != "cpu" and which is not None and can_cut_classes(arrays):
        return _walk_twice(options, which, wanted, arrays, scale, counts, holds_logits=machine != "tpu")
    plan, tokens = plan_for(machine, options, wanted, arrays, all_count=counts is None), arrays.hidden.shape[0]

    def in_chunks() -> _Swept:
        return loop(options, plan, chunks, wanted, arrays, scale)

    def at_once() -> _Swept:
        if plan.block is not None:
            return walk_along_classes(options, wanted, arrays, scale, counts, plan.block)
        return loop(options, plan, strided_chunks(tokens, tokens, counts), wanted, arrays, scale)

    if plan.at_once == "always":
        return at_once()
    chunks = chunks_of(arrays, plan.size, counts, skip=True)
    if plan.at_once == "never":
        return in_chunks()

    def barred(way: Callable[[], _Swept]) -> _Swept:
        # Or gradients would be converted after the branches, which would return them wide. Of one barrier for all,
        # all would vary over the same axes of a mesh.
        return jax.tree.map(jax.lax.optimization_barrier, way())

    none_is_skipped = everywhere(chunks.steps == -(-tokens // chunks.size))
    with jax.named_scope("at_once"):
        return jax.lax.cond(none_is_skipped, partial(barred, at_once), partial(barred, in_chunks))


def _walk_twice(
    options: Options,
    which: Divergence,
    wanted: Wanted,
    arrays: Arrays,
    scale: _Scale,
    counts: Live,
    *,
    holds_logits: bool,
) -> _Swept:
    """Divergences and gradients of `sum(scale * divergences)`, see _product_divergence.py."""
    given = given_by(arrays)
    assert given.teacher is not None
    operand, of_teacher = given.layer.kernel.dtype, given.teacher.kernel.dtype
    # The memory that a chunk takes, in arrays of one model's logits, as compilers were seen to need it.
    held = 2.0 if not holds_logits else 3.0 if which.beta == 1.0 else 5.0
    count, features = arrays.hidden.shape
    size = options.chunk_size or chunk_size_for_memory(count, features, (held,), share=_SHARE_OF_PAIRS)
    ones = jnp.ones(count, compute_dtype(arrays))
    scale, largest = in_range(ones if scale is None else scale, operand)
    pair = Pair(given.layer, given.teacher, given.where)
    tokens = Tokens(arrays.hidden.astype(operand), arrays.labels.astype(of_teacher), scale, counts)
    losses, found = product_divergences_and_gradients(
        options.classes, which, pair, tokens, wanted[:3], size, tpu=not holds_logits
    )

    hidden, kernel, bias = (_scaled_back(g, largest, x) for g, x in zip(found, arrays[:3], strict=True))
    return losses, None, Gradients(hidden, kernel, bias, None)


def walk_along_classes(
    options: Options,
    wanted: Wanted,
    arrays: Arrays,
    scale: _Scale,
    counts: Live,
    block: int,
) -> _Swept:
    """All tokens at once, and so many classes at a time, see `product_losses_and_gradients`."""
    given, x = given_by(arrays), arrays.hidden
    counts = jnp.ones(x.shape[0], bool) if counts is None else counts
    x = jnp.where(counts[:, None], x, 0).astype(given.layer.weight.dtype)  # no NaN of what does not count may spread
    near = center(given.layer, options.classes, apart=False)
    losses = given.mixture(options, arrays.labels, x)
    assert losses.label is not None
    label = jnp.where(counts, losses.label, -1)
    scale = jnp.where(counts, 1.0 if scale is None else scale, jnp.zeros((), compute_dtype(arrays)))
    rows, gradients = product_losses_and_gradients(
        given.layer, near, x, label, losses.factors.times(scale).along(label), options.classes, wanted, block
    )
    hidden, kernel, bias = (_scaled_back(g, None, x) for g, x in zip(gradients, arrays[:3], strict=True))
    loss = jnp.where(counts, mixed(label, rows, losses.factors), 0.0)
    return loss, None, Gradients(hidden, kernel, bias, None)


def loop(options: Options, plan: Plan, chunks: Chunks, wanted: Wanted, arrays: Arrays, scale: _Scale) -> _Swept:
    """Chunks of tokens one after the other."""
    dtype, way, tokens = compute_dtype(arrays), plan.way, arrays.hidden.shape[0]
    given = given_by(arrays, by_class=plan.by_class, filled=plan.filled)
    operand = given.layer.kernel.dtype
    near = center(given.layer, options.classes, apart=plan.apart) if way in ("fused", "scaled") else None
    scale, largest = (None, None) if scale is None else in_range(scale, operand)
    scale = jnp.ones(options.rows(tokens), dtype) if scale is None else scale
    by_token = jax.tree.map(chunks.spread, (arrays.hidden, arrays.labels, scale))
    # The first step apart is a second program, of which a GPU's compiler makes no more than a few kernels.
    once = near is not None and isinstance(chunks.steps, int) and chunks.steps == 1
    apart_first = once or (way == "scaled" and plan.apart and bool(tokens))
    of_chunk = partial(_of_chunk, options, plan, wanted, near)
    if way == "differentiable":
        of_chunk = jax.checkpoint(of_chunk)
    elif apart_first and not once:
        of_chunk = jax.jit(of_chunk)  # is traced once

    def step(i: Any, carry: tuple[Any, Gradients]) -> tuple[Any, Gradients]:
        of_tokens, gradients = carry
        counts = chunks.counts(i)
        x, y, s = (chunks.take(rows, i) for rows in by_token)
        x = jnp.where(counts[:, None], x, 0).astype(operand)  # NaNs of a row that does not count must not spread
        y = y if arrays.teacher is None else jnp.where(counts[:, None], y, 0)
        s = jnp.where(beside(s, counts), s, 0.0)
        loss, known, terms = of_chunk(given, x, y, counts, s)

        def put(rows: Array, some: Array) -> Array:
            return chunks.put(rows, jnp.where(beside(some, counts), some, jnp.zeros((), some.dtype)), i)

        of_tokens = jax.tree.map(put, of_tokens, (loss, jax.lax.stop_gradient(known)))
        return of_tokens, _with_chunk(plan, chunks, i, x, gradients, terms)

    zero = vary(jnp.zeros((), dtype), *jax.tree.leaves((arrays, scale)))
    losses = chunks.spread(jnp.broadcast_to(options.classes.total(zero), options.rows(tokens)))
    of_tokens = losses, Known(losses, losses.astype(jnp.int32)) if options.loss.stats else None
    begun = of_tokens, _nothing(plan, chunks, wanted, arrays, zero, has_first=apart_first)
    if apart_first:
        begun = step(0, begun)
    if tokens and not once:  # Without tokens nothing can be indexed, even in a loop of no steps.
        begun = jax.lax.fori_loop(int(apart_first), chunks.steps, step, begun)
    of_tokens, (of_hidden, of_kernel, of_bias, of_scale) = begun
    if of_hidden is not None:
        of_hidden = chunks.gather(of_hidden)
    if of_kernel is not None and plan.unset and not apart_first:
        of_kernel = jnp.where(chunks.steps > 0, of_kernel, 0.0)
    if plan.filled:
        of_kernel, of_bias = (None if g is None else g[..., : arrays.kernel.shape[1]] for g in (of_kernel, of_bias))
    found = zip((of_hidden, of_kernel, of_bias, of_scale), arrays[:4], strict=True)
    losses, known = jax.tree.map(chunks.gather, of_tokens)
    return losses, known, Gradients(*(_scaled_back(g, largest, x) for g, x in found))


def _of_chunk(
    options: Options,
    plan: Plan,
    wanted: Wanted,
    near: Center | None,
    given: Given,
    x: Float[Array, "size features"],
    labels: Array,
    counts: Bool[Array, " size"],
    scale: Float[Array, "size ..."],
) -> tuple[Float[Array, "size ..."], Known | None, Gradients]:
    """The losses of some tokens, what else is known of these, and what they add to wanted gradients.

    To the kernel's with tiles, the gradient of logits, which is yet to be multiplied.
    """
    if not any(wanted):
        return *losses_of(options, given, near, x, labels), Gradients(None, None, None, None)
    loss, known, g, of_scale = losses_and_gradient_of(
        options, given, near, plan.stored, x, labels, counts, scale, scaled=plan.way == "scaled"
    )
    kernel, dtype, tiles = given.layer.kernel, loss.dtype, plan.way == "tiles"
    rows = g.for_hidden.rows.astype(kernel.dtype)
    of_hidden = of_kernel = None
    if wanted[0]:  # in the other order faster on CPUs
        of_hidden = dot(kernel, rows, 1, 1, dtype).T if tiles else dot(rows, kernel, 1, 1, dtype)
        of_hidden = g.for_hidden.scaled(of_hidden)
    if wanted[1] and tiles:
        of_kernel = rows
    elif wanted[1]:
        x, of_logits = (some.astype(kernel.dtype) for some in (g.for_kernel.scaled(x), g.for_kernel.rows))
        of_kernel = dot(x, of_logits, 0, 0, dtype)
    of_bias = jnp.sum(g.for_hidden.scaled(g.for_hidden.rows), 0) if wanted[2] else None
    of_scale = jnp.sum(of_scale) if wanted[3] and of_scale is not None else None
    return loss, known, Gradients(of_hidden, of_kernel, of_bias, of_scale)


def _nothing(
    plan: Plan, chunks: Chunks, wanted: Wanted, arrays: Arrays, zero: Array, *, has_first: bool
) -> Gradients:
    """Gradients before the first chunk, which is that of the kernel itself if it `has_first`."""
    classes = arrays.kernel.shape[1] + plan.filled
    size, of_hidden, of_kernel = (arrays.kernel.shape[0], classes), None, None
    if wanted[0]:
        of_hidden = chunks.spread(jnp.broadcast_to(kept_as(zero, arrays.hidden.dtype), arrays.hidden.shape))
    if wanted[1] and not has_first:
        of_kernel = vary(jax.lax.empty(size, zero.dtype), zero) if plan.unset else jnp.broadcast_to(zero, size)
    of_bias = jnp.broadcast_to(zero, classes) if wanted[2] else None
    return Gradients(of_hidden, of_kernel, of_bias, zero if wanted[3] else None)


def _with_chunk(plan: Plan, chunks: Chunks, i: Any, x: Array, so_far: Gradients, terms: Gradients) -> Gradients:
    """Gradients with those of one chunk more."""
    of_hidden, of_kernel, of_bias, of_scale = so_far
    if of_hidden is not None and terms.hidden is not None:
        of_hidden = chunks.put(of_hidden, kept_as(terms.hidden, of_hidden.dtype), i)
    if of_kernel is None or terms.kernel is None:
        of_kernel = terms.kernel
    elif plan.way == "tiles":
        of_kernel = _add_product(of_kernel, x, terms.kernel, by_class=unseen_parts(x) == 1)
    else:
        of_kernel = (jnp.where(i > 0, of_kernel, 0.0) if plan.unset else of_kernel) + terms.kernel
    if of_bias is not None and terms.bias is not None:
        of_bias = of_bias + terms.bias
    if of_scale is not None and terms.logit_scale is not None:
        of_scale = of_scale + terms.logit_scale
    return Gradients(of_hidden, of_kernel, of_bias, of_scale)


def _scaled_back(g: Array | None, largest: Array | None, x: Array | None) -> Array | None:
    """A gradient times what its factors were divided by, as it waits."""
    return None if g is None or x is None else kept_as(g if largest is None else g * largest, x.dtype)


def in_range(scale: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """Factors of gradients in `dtype`, and what is left to multiply these by where its range is small."""
    if not is_easily_underflown(dtype):
        return scale, None
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(scale), initial=0.0))
    largest = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
    return scale / largest, largest


def kept_as(gradient: Array, dtype: DTypeLike) -> Array:
    """The gradient as it waits for its cotangent: in the dtype of what it is of, if that has the range."""
    return gradient if is_easily_underflown(dtype) else gradient.astype(dtype)


def _add_product(
    total: Float[Array, "features classes"], x: Array, g: Array, *, by_class: bool
) -> Float[Array, "features classes"]:
    """`total + x.T @ g`, in place, a tile at a time: the whole product would be a second array of that size.

    Tiles of some classes are the faster ones. Tiles of some features move nothing where the classes are split.
    """
    axis = int(by_class)
    size: Any = total.shape[axis]
    if not isinstance(size, int):  # of a size that is known when it runs: no tiles
        return total + dot(x, g, 0, 0, total.dtype)
    tile = min(1024 if by_class else max(x.shape[0] // 8, 8), size)

    def step(i: Any, total: Array) -> Array:
        start = jnp.minimum(i * tile, size - tile)  # the last tile may overlap the one before
        some = jax.lax.dynamic_slice_in_dim(g if by_class else x, start, tile, 1)
        some = jnp.where(start + jnp.arange(tile) >= i * tile, some, 0)
        part = dot(x, some, 0, 0, total.dtype) if by_class else dot(some, g, 0, 0, total.dtype)
        part += jax.lax.dynamic_slice_in_dim(total, start, tile, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis)

    return jax.lax.fori_loop(0, math.ceil(size / max(tile, 1)), step, total)


def chunks_of(arrays: Arrays, size: int, counts: Live, *, skip: bool) -> Chunks:
    """So many tokens at a time."""
    # Under automatic sharding nobody knows yet how the tokens will be split.
    if unseen_parts(arrays.hidden) > 1:
        return strided_chunks(arrays.hidden.shape[0], size, counts)
    return packed_chunks(arrays.hidden.shape[0], size, counts, skip=skip)
