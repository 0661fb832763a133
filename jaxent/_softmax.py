"""softmax and log_softmax, whose derivatives keep their relative accuracy at any margin.

Softmax does not change when a constant is added to all logits. Each rule below uses that freedom to measure
against the dominant class, so that `1 - p` of a class with p close to 1 is never formed.
"""

from functools import partial
from math import log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from ._check import (
    AxisName,
    BoolArray,
    FloatArray,
    check_axis_name,
    check_dtype,
    check_floating,
    check_where,
    normalize_axis,
)
from ._class_axis import ClassAxis, class_axis, one_hot

# A class that leaves less than this to the others is certainly the only largest, though rounding moved the shares of
# several by a little. One that leaves more does without the care that a dominant class needs.
ALMOST_HALF = 0.4


def softmax(
    logits: FloatArray,
    axis: int = -1,
    *,
    where: BoolArray | None = None,
    dtype: DTypeLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Probabilities proportional to the exponential of the logits.

    $$p_k = \frac{\exp(x_k)}{\sum_j \exp(x_j)}$$

    Args:
        logits: scores of a floating dtype; any shape with at least one axis.
        axis: the class axis.
        where: boolean mask that broadcasts to `logits`; classes where it is False get probability 0 and no
            gradient, and a row without any class left gets zeros.
        dtype: dtype of the result, that of `logits` by default. As in PyTorch, logits are cast to it first;
            half precision is computed in float32 in any case.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits` and `where` are then this device's classes, and so is the result.

    Returns:
        Array of the shape of `logits`, summing to 1 along `axis`.

    Raises:
        TypeError: `logits` or `dtype` is not floating, or `where` is not boolean.
        ValueError: `axis` is out of range, `where` does not broadcast to `logits`, or `axis_name` is unknown.

    Examples:
        >>> import jax.numpy as jnp, jaxent
        >>> print(jaxent.softmax(jnp.array([1.0, 2.0, 3.0])).round(4))
        [0.09   0.2447 0.6652]

    References:
        [torch.nn.functional.softmax](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html).
        Unlike `jax.nn.softmax`, derivatives stay accurate where one class dominates.
    """
    return _softmax(logits, where, _check(logits, axis, where, dtype, axis_name), dtype)


def log_softmax(
    logits: FloatArray,
    axis: int = -1,
    *,
    where: BoolArray | None = None,
    dtype: DTypeLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Logarithms of the softmax probabilities, without computing the probabilities first.

    $$\log p_k = x_k - \log \sum_j \exp(x_j)$$

    Args:
        logits: scores of a floating dtype; any shape with at least one axis.
        axis: the class axis.
        where: boolean mask that broadcasts to `logits`; classes where it is False get -inf and no gradient.
        dtype: dtype of the result, that of `logits` by default. As in PyTorch, logits are cast to it first;
            half precision is computed in float32 in any case.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits` and `where` are then this device's classes, and so is the result.

    Returns:
        Array of the shape of `logits`.

    Raises:
        TypeError: `logits` or `dtype` is not floating, or `where` is not boolean.
        ValueError: `axis` is out of range, `where` does not broadcast to `logits`, or `axis_name` is unknown.

    Examples:
        >>> import jax.numpy as jnp, jaxent
        >>> print(jaxent.log_softmax(jnp.array([0.0, 20.0])))
        [-2.0000000e+01 -2.0611537e-09]

    References:
        [torch.nn.functional.log_softmax](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html);
        Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp and softmax functions".
    """
    return _log_softmax(logits, where, _check(logits, axis, where, dtype, axis_name), dtype)


def _check(
    logits: FloatArray,
    axis: int,
    where: BoolArray | None,
    dtype: DTypeLike | None,
    axis_name: AxisName | None,
) -> ClassAxis:
    check_floating("logits", logits)
    check_dtype(dtype)
    check_where("logits", logits.shape, where)
    return class_axis(normalize_axis("logits", logits.shape, axis), check_axis_name(axis_name))


@partial(jax.jit, static_argnums=(2, 3))
def _softmax(
    logits: FloatArray, where: BoolArray | None, axis: ClassAxis, dtype: DTypeLike | None
) -> Float[Array, "..."]:
    x, dtype = _cast(logits, dtype)
    shown, keep, _ = hide_classes(settled(x), where, axis)
    p = softmax_core(shown, axis)
    return (p if keep is None else jnp.where(keep, p, 0.0)).astype(dtype)


def _cast(logits: FloatArray, dtype: DTypeLike | None) -> tuple[Float[Array, "..."], DTypeLike]:
    """Logits in `dtype`, and what that is; half precision as it comes if it will be computed in `dtype`."""
    x = jnp.asarray(logits)
    if dtype is not None and is_half(x) and jnp.dtype(dtype) == jnp.float32:
        return x, dtype
    x = jnp.asarray(x, dtype)
    return x, x.dtype


@partial(jax.jit, static_argnums=(2, 3))
def _log_softmax(
    logits: FloatArray, where: BoolArray | None, axis: ClassAxis, dtype: DTypeLike | None
) -> Float[Array, "..."]:
    x, dtype = _cast(logits, dtype)
    shown, keep, _ = hide_classes(settled(x), where, axis)
    log_p = log_softmax_core(shown, axis)
    return (log_p if keep is None else jnp.where(keep, log_p, -jnp.inf)).astype(dtype)


def is_perturbed(tangent: Any) -> bool:
    """Whether a rule with symbolic zeros is given a tangent."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def to_compute_dtype(x: FloatArray) -> Float[Array, "..."]:
    """`x` in at least float32, in which all arithmetic is done."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def is_half(x: Array) -> bool:
    """Whether `to_compute_dtype` changes the dtype of `x`."""
    return x.dtype.itemsize < 4


def settled(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, the same for all of its users.

    Where the caller's jit makes half-precision logits, XLA leaves out the rounding to half precision for some of the
    conversions to float32 and not for others, and what one user takes for the maximum, another does not find.
    """
    return jax.lax.optimization_barrier(x) if is_half(x) else x


def converted_apart(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`to_compute_dtype(x)` for one use. XLA's CPU backend would write out a conversion that several share."""
    return to_compute_dtype(jax.lax.optimization_barrier(x)) if is_half(x) else x


def hide_classes(
    x: Float[Array, "..."], where: BoolArray | None, axis: ClassAxis
) -> tuple[Float[Array, "..."], Bool[Array, "..."] | None, Bool[Array, "..."] | None]:
    """Logits with masked classes at -inf, the mask in full shape, and which rows have no class left.

    Masked logits are in the dtype that is computed in, others as they come. Empty rows become zeros here, so that
    nothing downstream meets a NaN; callers overwrite their results.
    """
    if where is None:
        return x, None, None
    x, keep = to_compute_dtype(x), jnp.broadcast_to(jnp.asarray(where), x.shape)
    empty = axis.sum(keep) == 0
    fill = jnp.where(jnp.expand_dims(empty, axis.index), jnp.zeros((), x.dtype), -jnp.inf)
    return jnp.where(keep, x, fill), keep, empty


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def softmax_core(x: Float[Array, "..."], axis: ClassAxis, written: bool = True) -> Float[Array, "..."]:
    """Softmax in the dtype that is computed in; `written` if an array of it is needed in any case."""
    m = axis.max(converted_apart(x))
    total = _sum_exp(x, m, axis, written)
    x = to_compute_dtype(x)
    d = difference(x, m)
    # Half an ulp of a difference of 80 is 4e-6, a relative error of that size in its exponential. Two-sum recovers
    # what was lost. Far down, where exp is 0 anyway, d and x are held so that no infinities meet.
    floor = jnp.maximum(m - 1000.0 - 0.01 * jnp.abs(m), jnp.finfo(x.dtype).min)
    near, x = jnp.maximum(d, -1000.0), jnp.maximum(x, floor)
    back = near - x
    lost = (x - (near - back)) - (m + back)
    # As a quotient, or XLA would write out the exponentials as well, and compute what is left to do twice.
    return jnp.exp(d) / (total * (1.0 - lost))


@softmax_core.defjvp
def _softmax_jvp(
    axis: ClassAxis, written: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    x, t = map(to_compute_dtype, (primals[0], tangents[0]))
    p = softmax_core(x, axis, written)
    return p, softmax_tangent(p, t, axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax_core(x: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Log-softmax in the dtype that is computed in."""
    return log_softmax_parts(x, axis, False).log_p


@log_softmax_core.defjvp
def _log_softmax_jvp(axis: ClassAxis, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    parts = log_softmax_parts(primals[0], axis, True)
    return parts.log_p, _log_softmax_tangent(primals[0], parts, to_compute_dtype(tangents[0]), axis)


class _Parts(NamedTuple):
    """What log_softmax and its derivative are made of."""

    log_p: Float[Array, "..."]
    p: Float[Array, "..."]
    rest: Float[Array, "..."]  # the probability of all classes but the first largest; keeps the class axis


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def log_softmax_parts(x: Float[Array, "..."], axis: ClassAxis, with_p: bool) -> _Parts:
    """Log-softmax and its parts; `with_p` if `p` will be used."""
    x = to_compute_dtype(x) if _is_by_index(x, axis) else x  # and otherwise later, by each user apart
    m = axis.max(converted_apart(x))
    e, others = _exps_and_sum_but_largest(x, m, axis, with_p)
    # Softmax is undefined beside +inf, and of nothing but -inf.
    others = jnp.where(jnp.isfinite(jnp.squeeze(m, axis.index)), others, jnp.nan)
    total = jax.lax.optimization_barrier(1.0 + others)
    log_total = log_near_one(total, others)
    others, total, log_total = (jnp.expand_dims(value, axis.index) for value in (others, total, log_total))
    inverse = 1.0 / total
    d = difference(to_compute_dtype(x), m)
    return _Parts(d - log_total, e * inverse, others * inverse)


@log_softmax_parts.defjvp
def _log_softmax_parts_jvp(
    axis: ClassAxis, with_p: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[_Parts, _Parts]:
    (x,), (t,) = primals, tangents
    parts, t = log_softmax_parts(x, axis, True), to_compute_dtype(t)
    dp = softmax_tangent(parts.p, t, axis)
    of_rest = axis.sum(jnp.where(dominant_class(x, parts, axis), 0.0, dp), keepdims=True)
    return parts, _Parts(_log_softmax_tangent(x, parts, t, axis), dp, of_rest)


def _log_softmax_tangent(
    x: Float[Array, "..."], parts: _Parts, t: Float[Array, "..."], axis: ClassAxis
) -> Float[Array, "..."]:
    """`t - sum(p * t)`, as in `softmax_tangent`; here the transpose sums the cotangent alone, twice at once."""
    dominant = dominant_class(x, parts, axis)
    own = axis.sum(jnp.where(dominant, t, 0.0), keepdims=True)
    # As it is; without this select, XLA would write the transpose's sum out for all classes.
    own = jnp.where(parts.rest < ALMOST_HALF, own, 0.0)
    mean = axis.sum(parts.p * jnp.where(dominant, 0.0, t), keepdims=True) - parts.rest * own  # relative to `own`
    return _relative(t, own, dominant, axis) - mean


def _relative(
    t: Float[Array, "..."], own: Float[Array, "..."], dominant: Bool[Array, "..."], axis: ClassAxis
) -> Float[Array, "..."]:
    """Tangents relative to that of the dominant class, whose own is an exact zero."""
    if not _is_by_index(t, axis):
        return jnp.where(dominant, 0.0, t - own)
    own = jnp.squeeze(own, axis.index)  # unrolled for the transpose, see `_exps_and_sum_but_largest`
    of_others = [jnp.where(is_dominant, 0.0, own) for is_dominant in each_class(dominant, axis)]
    return jnp.where(dominant, 0.0, t) - jnp.stack(of_others, axis.index)


def dominant_class(x: Float[Array, "..."], parts: _Parts, axis: ClassAxis) -> Bool[Array, "..."]:
    """Mask of the class with well over half of the probability. By its logit, since `p > 0.5` would write p out."""
    x = jax.lax.stop_gradient(x)
    if _is_by_index(x, axis):
        return axis.one_hot(jnp.argmax(to_compute_dtype(x), axis.index), x) & (parts.rest < ALMOST_HALF)
    return (to_compute_dtype(x) == axis.max(converted_apart(x))) & (parts.rest < ALMOST_HALF)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def logsumexp_core(x: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Logarithm of the summed exponentials; the shape of `x` without the class axis."""
    m = axis.max(x)
    return jnp.log(axis.sum(jnp.exp(x - m))) + jnp.squeeze(m, axis.index)


@logsumexp_core.defjvp
def _logsumexp_jvp(axis: ClassAxis, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    p = softmax_core(primals[0], axis, False)
    return logsumexp_core(primals[0], axis), axis.sum(p * tangents[0])


def softmax_tangent(p: Float[Array, "..."], t: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """`p * (t - sum(p * t))`.

    If one class holds more than half of the probability, tangents are first taken relative to its own. That class
    is masked to an exact zero: with `t - t` there instead, the transpose would add 1 and subtract it again, and
    round the small remainder away.
    """
    dominant = p > 0.5
    own = axis.sum(jnp.where(dominant, t, 0.0), keepdims=True)
    largest = axis.max(p) if axis.is_whole(p) and not axis.names else None  # which is not worth a collective
    own = own if largest is None else jnp.where(largest > 0.5, own, 0.0)  # as it is, see `_log_softmax_tangent`
    relative = _relative(t, own, dominant, axis)
    mean = axis.sum(p * relative, keepdims=True)
    mean = mean if largest is None else jnp.where(largest > 0.0, mean, 0.0)  # likewise
    # The barrier keeps the transpose's two products of p and the cotangent apart, of which one is only summed.
    return p * relative - jax.lax.optimization_barrier(p) * mean


def difference(x: Float[Array, "..."], m: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x - m`, and exactly 0 where they are equal.

    If the caller's jit computes x as a product, XLA's CPU backend may contract that and the subtraction to one fma.
    For x == m it returns the product's rounding error, which swamps the loss of a dominant class.
    """
    return jnp.where(x == m, 0.0, x - m)


def _exp_difference(x: Float[Array, "..."], m: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(difference(x, m))`, so written that XLA does not write the difference out for two users."""
    x = to_compute_dtype(x)
    return jnp.exp(jnp.where(x == m, 0.0, x + -m))


def log_near_one(total: Float[Array, "..."], excess: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log1p(excess)`, given `total = 1 + excess` as rounded; Kahan's form (XLA's log1p is a slow call on CPUs).

    The caller must not let XLA see that `total` is `1 + excess`, or it simplifies `total - 1` to `excess`.
    """
    exact = total == 1.0
    return jnp.where(exact, excess, jnp.log(total) * (excess / jnp.where(exact, 1.0, total - 1.0)))


def _sum_exp(x: Float[Array, "..."], m: Float[Array, "..."], axis: ClassAxis, written: bool) -> Float[Array, "..."]:
    """Sum of `exp(x - m)` over all classes, with the axis kept; `written` if the exponentials may be written out."""
    if written and (not is_half(x) or _fits_cache(x)):
        total = jnp.expand_dims(sum_exps(jnp.exp(difference(to_compute_dtype(x), m)), axis), axis.index)
    else:
        x, of_sum = jax.lax.optimization_barrier((x, m))  # or XLA's CPU backend would write out what others use, too
        total = _at_most(axis.sum(jnp.exp(converted_apart(x) - of_sum), keepdims=True), axis.size(x))
    # At least one, whatever fma makes of the largest class (see `difference`). Of nothing but -inf it is undefined.
    return jnp.where(m == -jnp.inf, jnp.nan, jnp.where(total < 1.0, 1.0, total))


def _at_most(total: Float[Array, "..."], bound: float) -> Float[Array, "..."]:
    """The smaller of both, or NaN, which XLA's CPU backend may lose in a minimum."""
    return jnp.where(total > bound, bound, total)


def sum_exp_except(
    x: Float[Array, "..."], m: Float[Array, "..."], index: Integer[Array, "..."], axis: ClassAxis, in_place: bool
) -> Float[Array, "..."]:
    """Sum of `exp(x - m)` over all classes but `index`, which is left out rather than subtracted."""
    # No term exceeds 1, but fma (see `difference`) may overflow logits beyond 1e9; a mask here would cost a third.
    of_part = _sum_exp_except(x, m, axis.local(index, x), axis, in_place)
    return _at_most(axis.total(of_part), axis.size(x))


def _sum_exp_except(
    x: Float[Array, "..."], m: Float[Array, "..."], index: Integer[Array, "..."], axis: ClassAxis, in_place: bool
) -> Float[Array, "..."]:
    """The same over the classes in `x` alone, with `index` counted among them; it may lie outside."""
    classes = x.shape[axis.index]
    if axis.is_short(x):
        # Unrolled, XLA makes one pass over the rows of it, where a masked sum over the axis takes two.
        largest, total = jnp.squeeze(m, axis.index), jnp.zeros(index.shape, m.dtype)
        for k, of_class in enumerate(each_class(x, axis)):
            total += jnp.where(index == k, 0.0, jnp.exp(to_compute_dtype(of_class) - largest))
        return total
    large = (in_place or not _fits_cache(x)) and axis.index == x.ndim - 1 and axis.is_whole(x)
    block = _block_size(classes)
    if large and is_half(x):
        # Blocks would not be fused with the conversion, but a product is. Positions up to 2**24 are exact.
        e = jnp.exp(to_compute_dtype(x) - m)
        position = jax.lax.broadcasted_iota(m.dtype, x.shape, axis.index)
        away = jnp.abs(position - jnp.expand_dims(index, axis.index).astype(m.dtype))
        return jnp.sum(e * jnp.minimum(away, 1.0), axis.index)
    if large and block is not None:
        blocks = _in_blocks(x, block)
        sums = jnp.sum(jnp.exp(blocks - m[..., None]), -1)
        of_index = index // block
        rest = jnp.sum(jnp.where(one_hot(of_index, sums.shape, axis.index), 0.0, sums), -1)
        own = jnp.take_along_axis(blocks, of_index[..., None, None], -2, mode="clip")[..., 0, :]
        own = jnp.sum(jnp.where(one_hot(index % block, own.shape, axis.index), 0.0, jnp.exp(own - m)), -1)
        return rest + jnp.where((index >= 0) & (index < classes), own, 0.0)
    e = jnp.exp(to_compute_dtype(x) - m)
    return jnp.sum(jnp.where(one_hot(index, x.shape, axis.index), 0.0, e), axis.index)


def _is_by_index(x: Float[Array, "..."], axis: ClassAxis) -> bool:
    """Whether to tell the largest class by its index, which unrolled sums of so few classes do best."""
    return axis.is_short(x) and 0 < x.shape[axis.index] <= 20 and axis.index == x.ndim - 1 and not axis.names


def _exps_and_sum_but_largest(
    x: Float[Array, "..."], m: Float[Array, "..."], axis: ClassAxis, written: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`exp(x - m)`, `written` if that will be used, and its sum over all classes but one of the largest."""
    if _is_by_index(x, axis):
        # Unrolled, XLA makes one pass over the rows of it, where a masked sum over the axis takes two.
        e, first = _exp_difference(x, m), jnp.argmax(to_compute_dtype(x), axis.index)
        total = jnp.zeros(first.shape, m.dtype)
        for k, e_k in enumerate(each_class(e, axis)):
            total += jnp.where(first == k, 0.0, e_k)
        return e, total
    classes = x.shape[axis.index]
    sliceable = not is_half(x) and axis.index == x.ndim - 1 and not axis.names and axis.is_whole(x)
    block = _block_size(classes) if sliceable else None
    if _fits_cache(x) and (block is None or classes < 500 or (written and x.size <= 2**20)):
        x = to_compute_dtype(x)
        e = jnp.where(x == m, 0.0, jnp.exp(x - m))  # written out for the sum, and then it can serve both
        others = axis.sum(e) + (axis.sum((x == m).astype(e.dtype)) - 1.0)
        return jnp.where(x == m, 1.0, e), others
    # A sum over all classes, less 1, will do where it is not near 1. Where it is, no class comes near the largest,
    # which then is told by its logit.
    every, others = _fused_sums(x, m, axis) if block is None else _sums_of_blocks(x, m, block)
    return _exp_difference(x, m), jnp.where(every < 1.5, others, _at_most(every, axis.size(x)) - 1.0)


def _sums_of_blocks(
    x: Float[Array, "..."], m: Float[Array, "..."], block: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Sums of `exp(x - m)` over the last axis, and without a class that is much larger than all others."""
    blocks = _in_blocks(x, block)
    sums = _at_most(jnp.sum(jnp.exp(blocks - m[..., None]), -1), block)  # see `sum_exps`
    position = jax.lax.broadcasted_iota(jnp.int32, sums.shape, sums.ndim - 1)
    is_largest = sums == jnp.max(sums, -1, keepdims=True)
    largest = jnp.min(jnp.where(is_largest, position, sums.shape[-1]), -1, keepdims=True)
    own = jnp.take_along_axis(blocks, largest[..., None], -2, mode="clip")[..., 0, :]
    others = jnp.sum(jnp.where(position == largest, 0.0, sums), -1)
    return jnp.sum(sums, -1), others + jnp.sum(jnp.where(own == m, 0.0, jnp.exp(own - m)), -1)


def _fused_sums(
    x: Float[Array, "..."], m: Float[Array, "..."], axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The same over any axis, and without any array of the size of `x`."""
    # Each sum has logits and maxima of its own, or XLA's CPU backend would write out what they share.
    x, m = jax.lax.optimization_barrier((x, m))
    every = axis.sum(jnp.exp(converted_apart(x) - m))
    x, m = jax.lax.optimization_barrier((x, m))
    t = converted_apart(x) - m
    # The exponential of the largest is 0, though t be no more than nearly 0 (see `difference`).
    return every, axis.sum(jnp.exp(jnp.minimum(t, -4000.0 * (t + 0.4))))


def each_class(x: Array, axis: ClassAxis) -> list[Array]:
    """One class after the other."""
    return [jax.lax.index_in_dim(x, k, axis.index, keepdims=False) for k in range(x.shape[axis.index])]


def sum_exps(e: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Sum of exponentials of at most 1 each, whatever fma makes of them (see `difference`)."""
    block = _block_size(e.shape[axis.index])
    if block is None or axis.index != e.ndim - 1 or not axis.is_whole(e):
        return _at_most(axis.sum(e), axis.size(e))
    sums = jnp.sum(_in_blocks(e, block), -1)
    # Without the bound, XLA would make one long sum of this one and the next, and round more.
    return axis.total(jnp.sum(_at_most(sums, block), -1))


def _fits_cache(x: Float[Array, "..."]) -> bool:
    """Whether an array of the size of `x` is quickly written out, which XLA's CPU backend does with masked terms."""
    return x.size <= 2**22


def _in_blocks(x: Float[Array, "..."], block: int) -> Float[Array, "..."]:
    """The last axis as two, of blocks and of what is in them; there may be no rows."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _block_size(classes: int) -> int | None:
    """How many classes to sum at a time, or None to sum them all at once.

    XLA's CPU backend vectorises a plain sum and not a masked one, so only the block that holds the class to leave out
    is summed again under a mask. Blocks near the square root take the least time. It adds 9 to 39 blocks one by one,
    which rounds by up to 10 units in the last place, but few do not matter and more are added in many partial sums.
    """
    divisors = [b for b in range(16, min(classes, 1025)) if classes % b == 0 and not 8 < classes // b < 40]
    whole_vectors = [b for b in divisors if b % 8 == 0]
    return (
        min(whole_vectors or divisors, key=lambda b: abs(log(b * b / classes)), default=None)
        if classes > 200
        else None
    )
