"""The loss of class indices: row by row, or summed with its gradient in one pass.

Of a row, `a * -log p_y + u * mean(-log p) + z * logsumexp ** 2`: the label's own loss, the mean over all classes that
smoothing mixes in, and the z-loss, with factors that may differ from row to row. Factors that are None are 0. A
label of -1 is none, and adds nothing; nor does a row whose factors are all 0, whatever its logits are.
"""

from functools import partial, reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from . import _kernels as kernels
from ._check import Implementation
from ._class_axis import ClassAxis
from ._kernels.label_sums import ALL, OWN, Terms, all_three, of_terms, results_of
from ._linear import inner, linear, sum_times, times
from ._softmax import add, probabilities, sum_possible

Row = Float[Array, "..."]
Label = Integer[Array, "..."]
Parts = tuple[Any, ...]  # the three losses of rows, None for those that nobody wants; with stats more


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

    @property
    def terms(self) -> Terms:
        """Which of them there are."""
        return self.a is not None, self.u is not None, self.z is not None

    @property
    def given(self) -> tuple[Row, ...]:
        """Those that there are."""
        return of_terms(self, self.terms)

    def along(self, like: Label) -> "Factors":
        """A number for each row, of those that there are."""
        return Factors(*(None if x is None else jnp.broadcast_to(x, like.shape) for x in self))


# With `stats`, both functions also give the parts of each row's loss, which have no derivatives.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def label_losses(
    how: How, stats: bool, x: Float[Array, "..."], y: Label, factors: Factors
) -> tuple[Row, Parts | None]:
    """The loss of each row."""
    parts = label_parts(how, x, y, stats=stats, terms=factors.terms)
    return mixed(y, parts, factors), parts if stats else None


@partial(label_losses.defjvp, symbolic_zeros=True)
def _label_losses_jvp(how: How, stats: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, y, factors), (x_dot, _, factors_dot) = primals, tangents
    moving = _along_factors(y, label_parts(how, x, y, stats=stats, terms=factors.terms), factors_dot)
    if is_perturbed(x_dot):
        along = _linear_in_x(how, factors.terms, x, y, factors.given, x_dot)
        moving.append(how.axis.total(along))
    losses, parts = label_losses(how, stats, *primals)
    return (losses, parts), (add(moving), unmoved(parts))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def label_total(
    how: How, stats: bool, x: Float[Array, "..."], y: Label, factors: Factors
) -> tuple[Float[Array, ""], Parts | None]:
    """The sum of the losses of all rows."""
    parts = label_parts(how, x, y, stats=stats, terms=factors.terms)
    return _total(y, parts, factors), parts if stats else None


@partial(label_total.defjvp, symbolic_zeros=True)
def _label_total_jvp(how: How, stats: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, y, factors), (x_dot, _, factors_dot) = primals, tangents
    if not is_perturbed(x_dot) or is_easily_underflown(x.dtype):
        (losses, parts), (along, unmoving) = _label_losses_jvp(how, stats, primals, tangents)
        return (jnp.sum(losses), parts), (jnp.sum(along), unmoving)
    parts, gradient = label_pass(how, x.dtype, x, y, *factors.given, stats=stats, terms=factors.terms)
    moving = [jnp.sum(along) for along in _along_factors(y, parts, factors_dot)]
    along = add([*moving, how.axis.total(inner(gradient, x_dot))])
    known = parts if stats else None
    return (_total(y, parts, factors), known), (along, unmoved(known))


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
    return jnp.where(y < 0, 0.0, _weighed(y, parts, factors))


def _total(y: Label, parts: Any, factors: Factors) -> Float[Array, ""]:
    """The sum of the mixture."""
    if any(x.ndim for x in factors.given):
        return jnp.sum(mixed(y, parts, factors))
    # Of a row without a label the losses are 0, and only a factor of its own could be NaN there.
    if len(factors.given) > 1:
        return jnp.sum(_weighed(y, parts, factors))
    return sum_times(*factors.given, *_of_factors(parts, factors))


def _weighed(y: Label, parts: Any, factors: Factors) -> Row:
    return add(list(map(times, factors.along(y).given, _of_factors(parts, factors))))


def _of_factors(parts: Any, factors: Factors) -> tuple[Row, ...]:
    """What each factor that there is multiplies."""
    loss, uniform, lse = parts[:3]
    return of_terms((loss, uniform, None if factors.z is None else lse**2), factors.terms)


def _along_factors(y: Label, parts: Any, factors_dot: Factors) -> list[Row]:
    moving = Factors(*(t if is_perturbed(t) else None for t in factors_dot))
    return [mixed(y, parts, moving)] if any(t is not None for t in moving) else []


def label_parts(how: How, x: Float[Array, "..."], y: Label, *, stats: bool, terms: Terms) -> Parts:
    """The three losses of each row, None for those that are neither terms nor stats."""
    out = kernels.as_tuple(kernels.label_loss(x, y, stats=stats, terms=terms, **how._asdict()))
    losses = results_of(terms, stats)
    return *all_three(out[: sum(losses)], losses), *out[sum(losses) :]


def label_pass(
    how: How,
    dtype: DTypeLike,
    x: Float[Array, "..."],
    y: Label,
    *factors: Row,
    stats: bool = False,
    terms: Terms,
) -> tuple[Parts, Float[Array, "..."]]:
    """The losses as of `label_parts`, and the gradient of their mixture in `dtype`, with a factor for each term."""
    out = kernels.label_loss_and_gradient(x, y, *factors, dtype=dtype, stats=stats, terms=terms, **how._asdict())
    losses = results_of(terms, stats)
    some, (gradient, *known) = out[: sum(losses)], out[sum(losses) :]
    return (*all_three(some, losses), *known), gradient


def _linear_in_x(how: How, terms: Terms, x: Array, y: Label, factors: tuple[Row, ...], t: Array) -> Row:
    """The derivative of the mixture along `t`: this device's part."""
    return linear(partial(_along, how, terms), partial(_gradient, how, terms, x.dtype), (x, y, *factors), t)


def _along(how: How, terms: Terms, x: Array, y: Label, *factors_and_t: Array) -> Row:
    *factors, t = factors_and_t
    dtype = factors[0].dtype
    _, gradient = label_pass(how, dtype, x, y, *factors, terms=terms)
    return jnp.sum(gradient * t.astype(dtype), how.axis.index)


def _gradient(how: How, terms: Terms, dtype: DTypeLike, x: Array, y: Label, *factors_and_g: Array) -> Array:
    """Its transpose."""
    *factors, g = factors_and_g
    return label_pass(how, dtype, x, y, *(g * factor for factor in factors), terms=terms)[1]


@kernels.label_loss.defjvp
def _label_loss_jvp(
    primals: Any, tangents: Any, *, stats: bool = False, terms: Terms = ALL, **how: Any
) -> tuple[Any, Any]:
    (x, y), (x_dot, _) = primals, tangents
    losses = results_of(terms, stats)
    along = of_terms(_along_rows(How(**how), x, y, x_dot, losses), losses)
    return kernels.label_loss(x, y, stats=stats, terms=terms, **how), along


def _along_rows(how: How, x: Array, y: Label, t: Array, losses: Terms) -> tuple[Row | None, Row | None, Row | None]:
    """The derivatives of these losses."""
    axis, dtype, counts = how.axis, kernels.compute_dtype(x.dtype), y >= 0
    of_loss = axis.total(_linear_in_x(how, OWN, x, y, (jnp.ones((), dtype),), t)) if losses[0] else None
    if not (losses[1] or losses[2]):
        return of_loss, None, None
    t = t.astype(dtype)
    p = kernels.softmax(_shown(x, y, axis), dtype=dtype, **how._asdict())
    of_lse = axis.total(linear(partial(_mean, axis), _spread, (p,), t))
    of_uniform = of_lse - axis.sum(t) / max(axis.size(x), 1)
    of_uniform, of_lse = (jnp.where(counts, axis.squeeze(row), 0.0) for row in (of_uniform, of_lse))
    return of_loss, of_uniform, of_lse


def _mean(axis: ClassAxis, p: Array, t: Array) -> Float[Array, "..."]:
    return jnp.sum(jnp.where(p > 0.0, p * t, 0.0), axis.index, keepdims=True)


def _spread(p: Array, g: Array) -> Float[Array, "..."]:
    """The transpose, where a row whose cotangent is 0 may be NaN."""
    return jnp.where(g == 0.0, 0.0, g * p)


@kernels.label_loss_and_gradient.defjvp
def _label_pass_jvp(
    primals: Any, tangents: Any, *, dtype: DTypeLike, stats: bool = False, terms: Terms = ALL, **how: Any
) -> tuple[Any, Any]:
    (x, y, *factors), (x_dot, _, *factors_dot) = primals, tangents
    axis, losses = how["axis"], results_of(terms, stats)
    out = kernels.label_loss_and_gradient(*primals, dtype=dtype, stats=stats, terms=terms, **how)
    one = jnp.ones((), factors[0].dtype)
    moved = (jnp.zeros(y.shape, one.dtype),) * sum(losses)
    counted = jnp.where(reduce(and_, (factor == 0.0 for factor in factors)), -1, y)  # as in the gradient
    moving = []
    for i, factor_dot in enumerate(all_three(factors_dot, terms)):  # the gradient is linear in the factors
        if factor_dot is not None:
            only = i == 0, i == 1, i == 2
            unit = label_pass(How(**how), one.dtype, x, y, one, terms=only)[1]
            moving.append(times(jnp.broadcast_to(axis.expand(factor_dot), x.shape), unit).astype(dtype))
    if x_dot is not None:
        # Labels are constant, smoothed or not, so the gradient moves as softmax does; the z-loss curves it, too.
        moved = of_terms(_along_rows(How(**how), x, y, x_dot, losses), losses)
        p, dp = probabilities(_shown(x, counted, axis), x_dot, **how)
        a, u, z = all_three(factors, terms)
        of_z = None if z is None else 2.0 * z * all_three(out[: sum(losses)], losses)[2]
        curved = axis.expand(add([factor for factor in (a, u, of_z) if factor is not None])) * dp
        if z is not None:
            curved += axis.expand(2.0 * z) * _square(axis, p, x_dot.astype(p.dtype))
        moving.append(jnp.where(axis.expand(counted >= 0), curved, 0.0).astype(dtype))
    return out, (*moved, add(moving))


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
