"""The loss of class indices: row by row, or summed with its gradient in one pass.

Of a row, `a * -log p_y + u * mean(-log p) + z * logsumexp ** 2`: the label's own loss, the mean over all classes that
smoothing mixes in, and the z-loss, with factors that may differ from row to row. Factors that are None are 0. A
label of -1 is none, and adds nothing; nor does a row whose factors are all 0, whatever its logits are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from . import _kernels as kernels
from ._check import Implementation
from ._class_axis import ClassAxis
from ._linear import inner, linear, times
from ._softmax import add, probabilities, sum_possible

Row = Float[Array, "..."]
Label = Integer[Array, "..."]
Parts = tuple[Any, ...]  # of the losses of rows, as kernels give them: with stats or without


class How(NamedTuple):
    """What is compiled in."""

    axis: ClassAxis
    implementation: Implementation | None


class Factors(NamedTuple):
    """Of the three losses of each row."""

    a: Row | None
    u: Row | None
    z: Row | None

    def times(self, scale: Row) -> "Factors":
        """All of them scaled, by a number or by one for each row."""
        if not scale.ndim:
            return Factors(*(None if x is None else scale * x for x in self))
        return Factors(*(None if x is None else times(scale, jnp.broadcast_to(x, scale.shape)) for x in self))

    def rows(self, like: Label) -> tuple[Row, ...]:
        """As kernels want them: a number for each row."""
        dtype = next(x.dtype for x in self if x is not None)
        return tuple(jnp.zeros_like(like, dtype) if x is None else jnp.broadcast_to(x, like.shape) for x in self)


# With `stats`, both functions also give the parts of each row's loss, which have no derivatives.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def label_losses(
    how: How, stats: bool, x: Float[Array, "..."], y: Label, factors: Factors
) -> tuple[Row, Parts | None]:
    """The loss of each row."""
    parts = kernels.label_loss(x, y, stats=stats, **how._asdict())
    return mixed(y, parts, factors), parts if stats else None


@partial(label_losses.defjvp, symbolic_zeros=True)
def _label_losses_jvp(how: How, stats: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, y, factors), (x_dot, _, factors_dot) = primals, tangents
    terms = _along_factors(y, kernels.label_loss(x, y, stats=stats, **how._asdict()), factors_dot)
    if is_perturbed(x_dot):
        along = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, y, *factors.rows(y)), x_dot)
        terms.append(how.axis.total(along))
    losses, parts = label_losses(how, stats, *primals)
    return (losses, parts), (add(terms), unmoved(parts))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def label_total(
    how: How, stats: bool, x: Float[Array, "..."], y: Label, factors: Factors
) -> tuple[Float[Array, ""], Parts | None]:
    """The sum of the losses of all rows."""
    losses, parts = label_losses(how, stats, x, y, factors)
    return jnp.sum(losses), parts


@partial(label_total.defjvp, symbolic_zeros=True)
def _label_total_jvp(how: How, stats: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, y, factors), (x_dot, _, factors_dot) = primals, tangents
    if not is_perturbed(x_dot) or is_easily_underflown(x.dtype):
        (losses, parts), (along, unmoving) = _label_losses_jvp(how, stats, primals, tangents)
        return (jnp.sum(losses), parts), (jnp.sum(along), unmoving)
    parts, gradient = label_pass(how, x.dtype, x, y, *factors.rows(y), stats=stats)
    terms = [jnp.sum(term) for term in _along_factors(y, parts, factors_dot)]
    along = add([*terms, how.axis.total(inner(gradient, x_dot))])
    known = parts if stats else None
    return (jnp.sum(mixed(y, parts, factors)), known), (along, unmoved(known))


def unmoved(known: Any) -> Any:
    """The tangents of what has no derivatives."""

    def zero(x: Array) -> SymbolicZero:
        return SymbolicZero(jax.typeof(x).to_tangent_aval())

    return jax.tree.map(zero, known)


def is_perturbed(tangent: Any) -> bool:
    """Whether a rule with symbolic zeros is given a tangent."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def is_easily_underflown(dtype: DTypeLike) -> bool:
    """Whether a gradient that is divided by the number of examples might leave the range of `dtype`.

    It waits for the cotangent then, a loss scale for instance, and both are multiplied in float32.
    """
    return bool(jnp.finfo(dtype).tiny > jnp.finfo(jnp.float32).tiny)


def mixed(y: Label, parts: Any, factors: Factors) -> Row:
    """The mixture of the three losses of each row."""
    loss, uniform, lse = parts[:3]
    a, u, z = (None if x is None else jnp.broadcast_to(x, y.shape) for x in factors)
    terms = [] if a is None else [times(a, loss)]
    if u is not None:
        terms.append(times(u, uniform))
    if z is not None:
        terms.append(times(z, lse**2))
    return jnp.where(y < 0, 0.0, add(terms))


def _along_factors(y: Label, parts: Any, factors_dot: Factors) -> list[Row]:
    moving = Factors(*(t if is_perturbed(t) else None for t in factors_dot))
    return [mixed(y, parts, moving)] if any(t is not None for t in moving) else []


def label_pass(
    how: How, dtype: DTypeLike, x: Float[Array, "..."], y: Label, *factors: Row, stats: bool = False
) -> tuple[Parts, Float[Array, "..."]]:
    """The three losses of each row, and the gradient of their mixture in `dtype`."""
    out = kernels.label_loss_and_gradient(x, y, *factors, dtype=dtype, stats=stats, **how._asdict())
    return (*out[:3], *out[4:]), out[3]


def _along(how: How, x: Array, y: Label, a: Row, u: Row, z: Row, t: Array) -> Row:
    """This device's part of the derivative of the mixture along `t`."""
    _, gradient = label_pass(how, a.dtype, x, y, a, u, z)
    return jnp.sum(gradient * t.astype(a.dtype), how.axis.index)


def _gradient(how: How, dtype: DTypeLike, x: Array, y: Label, a: Row, u: Row, z: Row, g: Row) -> Array:
    """Its transpose."""
    return label_pass(how, dtype, x, y, g * a, g * u, g * z)[1]


@kernels.label_loss.defjvp
def _label_loss_jvp(primals: Any, tangents: Any, *, stats: bool = False, **how: Any) -> tuple[Any, Any]:
    (x, y), (x_dot, _) = primals, tangents
    return kernels.label_loss(x, y, stats=stats, **how), _along_rows(How(**how), x, y, x_dot)


def _along_rows(how: How, x: Array, y: Label, t: Array) -> tuple[Row, Row, Row]:
    """The derivatives of the three losses."""
    axis, dtype, counts = how.axis, kernels.compute_dtype(x.dtype), y >= 0
    one, zero = jnp.ones(y.shape, dtype), jnp.zeros(y.shape, dtype)
    of_loss = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, y, one, zero, zero), t)
    t = t.astype(dtype)
    p = kernels.softmax(_shown(x, y, axis), dtype=dtype, **how._asdict())
    of_lse = axis.total(linear(partial(_mean, axis), _spread, (p,), t))
    of_uniform = of_lse - axis.sum(t) / max(axis.size(x), 1)
    of_uniform, of_lse = (jnp.where(counts, axis.squeeze(row), 0.0) for row in (of_uniform, of_lse))
    return axis.total(of_loss), of_uniform, of_lse


def _mean(axis: ClassAxis, p: Array, t: Array) -> Float[Array, "..."]:
    return jnp.sum(jnp.where(p > 0.0, p * t, 0.0), axis.index, keepdims=True)


def _spread(p: Array, g: Array) -> Float[Array, "..."]:
    """The transpose, where a row whose cotangent is 0 may be NaN."""
    return jnp.where(g == 0.0, 0.0, g * p)


@kernels.label_loss_and_gradient.defjvp
def _label_pass_jvp(
    primals: Any, tangents: Any, *, dtype: DTypeLike, stats: bool = False, **how: Any
) -> tuple[Any, Any]:
    (x, y, a, u, z), (x_dot, _, *factors_dot) = primals, tangents
    axis, out = how["axis"], kernels.label_loss_and_gradient(*primals, dtype=dtype, stats=stats, **how)
    counted = jnp.where((a == 0.0) & (u == 0.0) & (z == 0.0), -1, y)  # as in the gradient
    one, zero = jnp.ones_like(a), jnp.zeros_like(a)
    moved, terms = (zero, zero, zero), []
    for i, factor_dot in enumerate(factors_dot):  # the gradient is linear in the factors
        if factor_dot is not None:
            unit = label_pass(How(**how), a.dtype, x, y, *(one if i == j else zero for j in range(3)))[1]
            terms.append(times(jnp.broadcast_to(axis.expand(factor_dot), x.shape), unit).astype(dtype))
    if x_dot is not None:
        # Labels are constant, smoothed or not, so the gradient moves as softmax does; the z-loss curves it, too.
        moved = _along_rows(How(**how), x, y, x_dot)
        p, dp = probabilities(_shown(x, counted, axis), x_dot, **how)
        curved = axis.expand(a + u + 2.0 * z * out[2]) * dp + axis.expand(2.0 * z) * _square(
            axis, p, x_dot.astype(p.dtype)
        )
        terms.append(jnp.where(axis.expand(counted >= 0), curved, 0.0).astype(dtype))
    return out, (*moved, add(terms))


def _shown(x: Array, y: Label, axis: ClassAxis) -> Float[Array, "..."]:
    """Logits of which those of an ignored row are 0: NaN there must not come back from a transpose."""
    return jnp.where(axis.expand(y >= 0), x, jnp.zeros((), x.dtype))


def _square(axis: ClassAxis, p: Array, t: Array) -> Float[Array, "..."]:
    """`p * sum(p * t)`, its own transpose where the classes are whole."""
    if axis.names:
        return _times_mean(axis, p, t)
    return linear(partial(_times_mean, axis), partial(_times_mean, axis), (p,), t)


def _times_mean(axis: ClassAxis, p: Array, t: Array) -> Float[Array, "..."]:
    return p * sum_possible(p, p * t, axis)
