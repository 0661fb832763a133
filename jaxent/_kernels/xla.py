r"""The plain form of every row function, for any machine: what a kernel must compute.

Each takes logits $x$ whose classes lie along `axis`, and arrays of their shape or of that of their rows, which is
without `axis`; a factor may be one number for all rows. Half precision is computed in float32. With the largest logit
$m$, $e_k = \exp(x_k - m)$ and $T = \sum_k e_k$. Where a class dominates, $1 - p$ of it would be the difference of two
nearly equal numbers, and the sum over all others is not: docs/numerics.md derives the formulas.

Written for the compilers of TPUs and GPUs, which make one pass of sums that wait for nothing but the same maximum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from .._class_axis import ClassAxis
from .label_sums import ALL, LabelSums, Terms, all_three, label_gradient, label_rows, of_terms, results_of

Logits = Float[Array, "..."]
Row = Float[Array, "..."]


def softmax(x: Logits, *, axis: ClassAxis, dtype: DTypeLike) -> Logits:
    """$e_k / T$. One reduction over the exponentials: XLA makes one kernel of it for rows that fit fast memory."""
    e = _exponentials(x, axis).e
    return (e / axis.sum(e)).astype(dtype)


def log_softmax(x: Logits, *, axis: ClassAxis, dtype: DTypeLike) -> Logits:
    r"""$x_k - m - \log T$."""
    r = _exponentials(x, axis)
    return (r.d - _log_total(*_sums(r, axis))).astype(dtype)


def softmax_derivative(x: Logits, t: Logits, *, axis: ClassAxis, dtype: DTypeLike) -> Logits:
    r"""$p_k (t_k - \sum_j p_j t_j)$: the derivative of `softmax` along $t$, and its transpose."""
    r = _exponentials(x, axis)
    t = wide(t).astype(r.e.dtype)
    total, others = _sums(r, axis)
    dominant, own, mean = _mean(r, t, total, others, axis)
    return (r.e / total * (jnp.where(dominant, 0.0, t - own) - mean)).astype(dtype)


def log_softmax_derivative(x: Logits, t: Logits, *, axis: ClassAxis, dtype: DTypeLike) -> Logits:
    r"""$t_k - \sum_j p_j t_j$: the derivative of `log_softmax` along $t$."""
    r = _exponentials(x, axis)
    t = wide(t).astype(r.e.dtype)
    dominant, own, mean = _mean(r, t, *_sums(r, axis), axis)
    return (jnp.where(dominant, 0.0, t - own) - mean).astype(dtype)


def log_softmax_pullback(x: Logits, g: Logits, *, axis: ClassAxis, dtype: DTypeLike) -> Logits:
    r"""$g_k - p_k \sum_j g_j$: the transpose of `log_softmax_derivative`."""
    r = _exponentials(x, axis)
    g = wide(g).astype(r.e.dtype)
    total, others = _sums(r, axis)
    of_largest, of_others = axis.sum(jnp.where(r.largest, g, 0.0)), axis.sum(jnp.where(r.largest, 0.0, g))
    of_dominant = (of_largest * others - of_others) / total
    every = g - r.e * ((of_largest + of_others) / total)
    return jnp.where(r.e > _threshold(total), of_dominant, every).astype(dtype)


def label_loss(
    x: Logits, y: Integer[Array, "..."], *, axis: ClassAxis, stats: bool = False, terms: Terms = ALL
) -> tuple[Row, ...]:
    r"""Of each row $-\log p_y$, the mean of $-\log p_k$ over all classes, and $\log \sum_k \exp x_k$.

    Those of `terms`. A label below 0 stands for none: zeros. One that is too large gives NaN. With `stats` the first
    and the last are results, and so is the first class whose logit is $m$, or any number if there is none.
    """
    sums, _, _, largest = _label_sums(x, y, axis)
    losses = of_terms(label_rows(sums, y, axis=axis), results_of(terms, stats))
    return *losses, *((_first(largest, axis),) if stats else ())


def label_loss_and_gradient(
    x: Logits,
    y: Integer[Array, "..."],
    *factors: Row,
    axis: ClassAxis,
    dtype: DTypeLike,
    stats: bool = False,
    terms: Terms = ALL,
) -> tuple[Array, ...]:
    r"""`label_loss`, $(l, \bar l, s)$, and the gradient of $a l + u \bar l + z s^2$; then its `stats`.

    That is $(a + u + 2 z s) p_k - u / C$ for all classes but the label, which has $-a$ more: together $-a$ times the
    probability of the others. It is 0 where all of $a$, $u$ and $z$ are, whatever the logits. There is a factor for
    each of `terms`; the others are 0.
    """
    sums, label, e, largest = _label_sums(x, y, axis)
    gradient = label_gradient(sums, label, e, y, *all_three(factors, terms), axis=axis)
    losses = of_terms(label_rows(sums, y, axis=axis), results_of(terms, stats))
    return *losses, gradient.astype(dtype), *((_first(largest, axis),) if stats else ())


def expected_loss(x: Logits, q: Logits, *, axis: ClassAxis, stats: bool = False) -> tuple[Row, ...]:
    r"""$-\sum_k q_k \log p_k$ of each row, where 0 times infinity is 0.

    With `stats` also $\log \sum_k \exp x_k$ and the first class whose logit is $m$, as in `label_loss`.
    """
    r = _exponentials(x, axis)
    q = wide(q).astype(r.e.dtype)
    gaps, log_total = axis.sum(jnp.where(q == 0.0, 0.0, -q * r.d)), _log_total(*_sums(r, axis))
    loss = axis.squeeze(gaps + axis.sum(q) * log_total)
    return loss, *((axis.squeeze(r.m + log_total), _first(r.largest, axis)) if stats else ())


def expected_loss_and_gradient(
    x: Logits, q: Logits, a: Row, *, axis: ClassAxis, dtype: DTypeLike, stats: bool = False
) -> tuple[Array, ...]:
    r"""`expected_loss`, and $a$ times its gradient $p_k \sum_j q_j - q_k$, which is 0 where $a$ is; then `stats`."""
    r = _exponentials(x, axis)
    wide_q = wide(q).astype(r.e.dtype)
    total, others = _sums(r, axis)
    mass, of_others = axis.sum(wide_q), axis.sum(jnp.where(r.largest, 0.0, wide_q))
    gradient = jnp.where(r.e > _threshold(total), of_others - mass * others / total, mass / total * r.e - wide_q)
    a = axis.expand(a)
    loss, *known = expected_loss(x, q, axis=axis, stats=stats)
    return loss, jnp.where(a == 0.0, 0.0, a * gradient).astype(dtype), *known


def entropy(x: Logits, *, axis: ClassAxis) -> Row:
    r"""$-\sum_k p_k \log p_k$ of each row: $\log T - \sum_k e_k (x_k - m) / T$, of which both terms add."""
    r = _exponentials(x, axis)
    total, others = _sums(r, axis)
    mean = axis.sum(jnp.where(r.e > 0.0, r.e * r.d, 0.0)) / jnp.maximum(total, 1.0)  # 0 without classes
    return axis.squeeze(_log_total(total, others) - mean)


def pick(log_p: Logits, y: Integer[Array, "..."], *, axis: ClassAxis) -> Row:
    r"""$-\log p_y$ of rows whose log-probabilities are given, for labels as in `label_loss`.

    It is 0 where y is not among this device's classes.
    """
    entry = jnp.sum(jnp.where(axis.one_hot(y, log_p), wide(log_p), 0.0), axis.index)
    return jnp.where(y < axis.size(log_p), -entry, jnp.nan)


def place(g: Row, y: Integer[Array, "..."], *, axis: ClassAxis, classes: int, dtype: DTypeLike) -> Logits:
    """The transpose of `pick` for so many classes on this device: $-g$ at the label, and 0 elsewhere."""
    like = jax.ShapeDtypeStruct((*y.shape[: axis.index], classes, *y.shape[axis.index :]), dtype)
    g = axis.expand(jnp.where(y < 0, 0.0, jnp.where(y < axis.size(like), -g, jnp.nan)))
    return jnp.where(axis.one_hot(y, like) | jnp.isnan(g), g, 0.0).astype(dtype)


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """In which logits of `dtype` are computed: at least float32."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in at least float32, in which all arithmetic is done.

    Where the caller's jit makes half-precision numbers, XLA leaves out their rounding for some of the users that
    convert them back and not for others: what one takes for the maximum, another would not find. Behind a barrier all
    see the same numbers, which costs nothing where they are in memory anyway, as those of a matrix product are.
    """
    dtype = compute_dtype(x.dtype)
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x).astype(dtype)


class _Exponentials(NamedTuple):
    largest: Bool[Array, "..."]  # x_k = m
    d: Logits  # x_k - m
    e: Logits  # exp(x_k - m)
    m: Row  # keeps the axis


def _exponentials(x: Logits, axis: ClassAxis) -> _Exponentials:
    x = wide(x)
    m = axis.max(x)
    # The largest class's difference is written down, not computed: where the caller's jit makes x as a product, a
    # compiler may contract that and the subtraction to one fma, whose result is the rounding error of the product.
    # Times 0, so that infinities and what is beside them become NaN: nothing is known of such a row.
    largest = x == m
    d = jnp.where(largest, x * 0.0, x - m)
    return _Exponentials(largest, d, jnp.exp(d), m)


def _sums(r: _Exponentials, axis: ClassAxis) -> tuple[Row, Row]:
    """T, and what it is without the largest class where that leads by far."""
    return axis.sum(r.e), axis.sum(jnp.where(r.largest, 0.0, r.e))


# Below this sum one class holds two thirds of the probability: there is no second one that is as large.
_DOMINATED = 1.5


def _log_total(total: Row, others: Row) -> Row:
    return jnp.where(total < _DOMINATED, jnp.log1p(others), jnp.log(total))


def _threshold(total: Row) -> Row:
    """What only a dominant class's exponential exceeds."""
    return jnp.where(total < _DOMINATED, 0.75, 2.0)


def _mean(
    r: _Exponentials, t: Logits, total: Row, others: Row, axis: ClassAxis
) -> tuple[Bool[Array, "..."], Row, Row]:
    """Which class dominates, its tangent (0 if none does), and the mean of all tangents relative to that."""
    of_largest, of_others = axis.sum(jnp.where(r.largest, t, 0.0)), axis.sum(jnp.where(r.largest, 0.0, r.e) * t)
    dominated = total < _DOMINATED
    own = jnp.where(dominated, of_largest, 0.0)
    mean = jnp.where(dominated, of_others - others * of_largest, of_others + of_largest) / total
    return r.e > _threshold(total), own, mean


def _first(largest: Bool[Array, "..."], axis: ClassAxis) -> Integer[Array, "..."]:
    return axis.squeeze(axis.first(largest))


def _label_sums(
    x: Logits, y: Integer[Array, "..."], axis: ClassAxis
) -> tuple[LabelSums, Bool[Array, "..."], Logits, Bool[Array, "..."]]:
    """Relative to the largest logit; where the label is; the exponentials, its own left out; where the largest is."""
    r, label = _exponentials(x, axis), axis.one_hot(y, x)
    e = jnp.where(label, 0.0, r.e)
    others, of_label, classes = axis.sum(e), axis.sum(jnp.where(label, wide(x), 0.0)), axis.size(x)
    d = jnp.where(of_label == r.m, of_label * 0.0, of_label - r.m)
    d = jnp.where(axis.expand(y < classes), d, jnp.nan)
    return LabelSums(r.m, d, others, axis.sum(r.d) / max(classes, 1)), label, e, r.largest
