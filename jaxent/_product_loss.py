r"""The loss of class indices whose logits are a matrix product, and its gradient, without the logits in memory.

With any number $r$ near a row's largest logit, $e_k = \exp(x_k - r)$ and their sum are all that is needed, and both
can be made where the product leaves its accumulator: no pass over logits waits for their maximum. The exponentials
stay in the dtype in which the gradient goes into its own products.

A good $r$ is known beforehand: the mean of the row's logits without bias, weighted by the softmax of the bias, and
$\log \sum_k \exp b_k - \log C$ more, rounded to an integer. By Jensen's inequality then $\sum_k e_k \ge C / \sqrt e$,
so nothing that counts underflows. It would overflow where a logit is some 60 above $r$, and then all is made once
more, relative to the maximum.
"""

from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from ._chunks import everywhere, unseen_parts
from ._class_axis import ClassAxis, vary
from ._kernels import compute_dtype
from ._kernels.label_sums import LabelSums, label_gradient, label_rows
from ._kernels.product import Layer, Sums, dot, product_maxima, product_sums, sums_of_logits

Row = Float[Array, " tokens"]
_ROOM = 1e12  # for factors, for reciprocals, which are no normal numbers before sums are infinite, and for rounding


class Center(NamedTuple):
    """What makes a number near the largest logit of hidden states."""

    kernel: Float[Array, " features"]
    bias: Float[Array, ""]
    apart: bool  # whether the largest logit itself, should it be needed, is a product of its own

    def of(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens 1"]:
        """It, for each of them; an integer, which is mostly subtracted from logits without rounding."""
        return jnp.round(jnp.sum(x.astype(self.kernel.dtype) * self.kernel[None], 1, keepdims=True) + self.bias)


def lies_by_class(features: Any, classes: Any) -> bool:
    """Whether TPUs lay a (features, classes) array out class by class: it takes less room in their tiles of 8 x 128.

    A loop would get a copy in the order of the axes, a quarter of the float32 logits of twice as many tokens as
    features.
    """
    if not isinstance(features, int) or not isinstance(classes, int):
        return False

    def room(outer: int, inner: int) -> int:
        return -(-outer // 8) * 8 * -(-inner // 128) * 128

    return room(classes, features) < room(features, classes)


def center(layer: Layer, axis: ClassAxis, *, apart: bool) -> Center:
    """The mean over the classes, weighted by the bias."""
    kernel = layer.kernel.astype(compute_dtype(layer.kernel.dtype))
    classes = axis.size(kernel)
    if layer.bias is None:
        mean = axis.total(jnp.sum(kernel, 1)) / classes
        return Center(layer.scaled(mean), jnp.zeros((), kernel.dtype), apart)
    b = layer.scaled(layer.bias.astype(kernel.dtype)[None])
    m = axis.max(b)
    q = jnp.exp(b - m)
    total = axis.sum(q)
    mean = axis.total(jnp.sum(kernel * q, 1)) / total[0]
    return Center(layer.scaled(mean), (m + jnp.log(total / classes))[0, 0], apart)


def product_losses(
    layer: Layer, near: Center, x: Float[Array, "tokens features"], y: Integer[Array, " tokens"], axis: ClassAxis
) -> tuple[Row, Row, Row]:
    """`label_loss` of their logits."""
    sums, _ = _sums(layer, near, x, y, axis, None)
    return label_rows(_from_label(sums), y, axis=axis)


class Rows(NamedTuple):
    """Rows of logits, and for each a number that they are yet to be multiplied by."""

    rows: Float[Array, "tokens classes"]
    scale: Float[Array, "tokens 1"] | None = None

    def scaled(self, x: Float[Array, "tokens ..."]) -> Float[Array, "tokens ..."]:
        """`x` multiplied by these numbers, without the NaNs of what does not count."""
        return x if self.scale is None else jnp.where(self.scale == 0.0, 0.0, self.scale * x.astype(self.scale.dtype))


class Gradient(NamedTuple):
    """Of losses with respect to logits, as the products for two gradients take it: not always the same.

    What both take, some TPUs' compilers write out. What each makes of exponentials in its own way they do not.
    """

    for_hidden: Rows
    for_kernel: Rows


def gradient_of(rows: Float[Array, "tokens classes"]) -> Gradient:
    """The same for both, and as it is."""
    return Gradient(Rows(rows), Rows(rows))


def product_losses_and_gradient(
    layer: Layer,
    near: Center,
    x: Float[Array, "tokens features"],
    y: Integer[Array, " tokens"],
    factors: tuple[Row | None, ...],
    axis: ClassAxis,
    stored: DTypeLike,
    *,
    scaled: bool,
) -> tuple[tuple[Row, Row, Row], Gradient]:
    """`label_loss_and_gradient` of their logits; the gradient is as precise as exponentials that are `stored` so.

    It can be `scaled` without the mean over all classes, whose part of a gradient is no multiple of a probability:
    its rows are then the exponentials, but for the label's, and each is rounded once.
    """
    sums, e = _sums(layer, near, x, y, axis, stored, _counting(y, factors) if scaled and near.apart else None)
    assert e is not None
    label, parts = axis.one_hot(y, e), label_rows(_from_label(sums), y, axis=axis)
    if not scaled:
        return parts, gradient_of(label_gradient(sums, label, e.astype(sums.others.dtype), y, *factors, axis=axis))
    a, u, z = factors
    assert u is None
    counts, own, others = _counting(y, factors), axis.squeeze(jnp.exp(sums.d)), axis.squeeze(sums.others)
    a, shared = jnp.zeros_like(own) if a is None else a, jnp.zeros_like(own) if z is None else 2.0 * z * parts[2]
    least = jnp.finfo(a.dtype).eps * a  # about the rounding of the sum, which is divided by
    scale = jnp.where(jnp.abs(a + shared) < jnp.abs(least), least, a + shared)
    of_label = jnp.where(scale == 0.0, 0.0, (shared * own - a * others) / scale)
    scale = axis.expand(jnp.where(counts, scale / (others + own), 0.0))
    if near.apart:
        rows = Rows(_with_label(e, y, counts, of_label, axis), scale)
        return parts, Gradient(rows, rows)
    # For the product before which hidden states are scaled, they are multiplied by powers of two: that rounds none,
    # and none underflows whose gradient does not, as these powers are no smaller than its scale.
    power = jax.lax.reduce_precision(1.5 * scale, jnp.finfo(scale.dtype).nexp, 0)
    power = jnp.where((power == 0.0) | jnp.isinf(power), 1.0, power)
    of_label, counts = axis.expand(of_label), axis.expand(counts)
    bare = jnp.where(counts, jnp.where(label, of_label.astype(stored), e), 0)
    other = jnp.where(counts, power * jnp.where(label, of_label, e.astype(power.dtype)), 0.0)
    return parts, Gradient(Rows(bare, scale), Rows(other, scale / power))


def _counting(y: Integer[Array, " tokens"], factors: tuple[Row | None, ...]) -> Bool[Array, " tokens"]:
    """Which tokens have a gradient."""
    return (y >= 0) & reduce(or_, (row != 0.0 for row in factors if row is not None))


def _with_label(
    e: Float[Array, "tokens classes"],
    y: Integer[Array, " tokens"],
    counts: Bool[Array, " tokens"],
    x: Row,
    axis: ClassAxis,
) -> Float[Array, "tokens classes"]:
    """`e` with `x` for the label, written where it lies: a GPU's compiler would make another array of a selection."""
    first = axis.start(e)
    here = counts & (y >= first) & (y < first + e.shape[1])
    place = jnp.arange(len(y)), jnp.where(here, y - first, 0)
    return e.at[place].set(jnp.where(here, x.astype(e.dtype), e[place]), unique_indices=True)


def product_losses_and_gradients(
    layer: Layer,
    near: Center,
    x: Float[Array, "tokens features"],
    y: Integer[Array, " tokens"],
    factors: tuple[Row | None, ...],
    axis: ClassAxis,
    wanted: tuple[bool, ...],
    block: int,
) -> tuple[tuple[Row, Row, Row], tuple[Array | None, ...]]:
    """`label_loss` of their logits, and what their gradient is of hidden states, kernel and bias, in two walks.

    One over all classes for the sums, and one in blocks of them, each of which completes a part of the kernel's
    gradient: a further product, and no sum of chunks, which few tokens would wait for.
    """
    sums, _ = _sums(layer, near, x, y, axis, None)
    dtype, classes, start = sums.others.dtype, layer.weight.shape[1], axis.start(layer.shape(x))

    def step(j: Any, gradients: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        begin = jnp.minimum(j * block, classes - block)
        fresh = (begin + jnp.arange(block) >= j * block)[None]  # the last block may overlap the one before
        part = layer.classes(begin, block)
        e = jnp.exp(part.logits(x) - sums.reference)
        label = y[:, None] == start + begin + jnp.arange(block)[None]
        g = label_gradient(sums, label, e, y, *factors, axis=axis, classes=axis.size(layer.shape(x)))
        g = jnp.where(fresh, layer.scaled(g), 0.0)
        of_hidden, of_kernel, of_bias = gradients
        narrow = g.astype(layer.weight.dtype)
        if of_hidden is not None:
            of_hidden += dot(narrow, part.weight, 1, 1, dtype)
        of_kernel = added(of_kernel, dot(x, narrow, 0, 0, dtype), begin)
        return of_hidden, of_kernel, added(of_bias, jnp.sum(g, 0), begin)

    def added(total: Array | None, term: Array, begin: Any) -> Array | None:
        if total is None:
            return None
        last = total.ndim - 1
        if classes % block:
            term += jax.lax.dynamic_slice_in_dim(total, begin, block, last)
        return jax.lax.dynamic_update_slice_in_dim(total, term.astype(total.dtype), begin, last)

    zero = vary(jnp.zeros((), dtype), x, y, *jax.tree.leaves((factors, layer)))
    shapes = (x.shape, dtype), (layer.weight.shape, layer.weight.dtype), ((classes,), dtype)
    nothing = (jnp.broadcast_to(zero.astype(kind), shape) for shape, kind in shapes)
    found = tuple(x if want else None for x, want in zip(nothing, wanted, strict=False))
    found = jax.lax.fori_loop(0, -(-classes // block), step, found)
    return label_rows(_from_label(sums), y, axis=axis), found


def dtype_of_exponentials(hidden: DTypeLike, summed: DTypeLike | None) -> jnp.dtype:
    """In which they wait for products with arrays like `hidden`, or for being `summed` as the gradient of a bias."""
    wide = compute_dtype(hidden)
    narrow = jnp.finfo(hidden).maxexp == jnp.finfo(wide).maxexp  # float16 has not the range
    sums_wide = summed is not None and jnp.dtype(summed).itemsize > jnp.dtype(hidden).itemsize
    return jnp.dtype(hidden) if narrow and not sums_wide else wide


def _from_label(sums: LabelSums) -> LabelSums:
    """Relative to the label's logit, unless that is far below: no small loss is a difference of logarithms."""
    d = jnp.where(sums.d > -20.0, sums.d, 0.0)
    return LabelSums(sums.reference + d, sums.d - d, sums.others * jnp.exp(-d), sums.mean - d)


class _State(NamedTuple):
    sums: LabelSums
    e: Float[Array, "tokens classes"] | None
    maximum: Row | None
    tries: Integer[Array, ""]


def _sums(
    layer: Layer,
    near: Center,
    x: Array,
    y: Integer[Array, " tokens"],
    axis: ClassAxis,
    stored: DTypeLike | None,
    counts: Bool[Array, " tokens"] | None = None,
) -> tuple[LabelSums, Float[Array, "tokens classes"] | None]:
    """Relative to the center of logits or, if one is too far away from that, to their maximum; and exponentials.

    The maximum comes with the first attempt, but for GPUs, whose compiler would read the logits once more for it; and
    there, in the second attempt, no exponential of a row that does not count is infinite or NaN.
    """

    def from_logits(reference: Array, x: Array, tries: Integer[Array, ""]) -> _State:
        logits = layer.logits(x)
        of_part = sums_of_logits(logits, reference, here, None, stored)
        return found(reference, of_part, axis.max(logits), tries)

    def from_product(reference: Array, x: Array, tries: Integer[Array, ""], counts: Array | None) -> _State:
        return found(reference, product_sums(layer, x, reference, here, counts, stored), None, tries)

    def found(reference: Array, of_part: Sums, maximum: Array | None, tries: Integer[Array, ""]) -> _State:
        own, others, total = map(axis.total, of_part[:3])
        own = jnp.where(axis.expand(y < classes), own, jnp.nan)
        return _State(LabelSums(reference, own, others, total / max(classes, 1)), of_part.e, maximum, tries + 1)

    def unsure(state: _State) -> Bool[Array, ""]:
        d = jnp.where(axis.expand(y < 0), -jnp.inf, state.sums.d)
        total = state.sums.others + jnp.where(jnp.isnan(d), 0.0, jnp.exp(d))
        fits = jnp.all((total >= 0.5) & (total <= jnp.finfo(total.dtype).max / _ROOM))
        return (state.tries == 0) | ((state.tries == 1) & ~everywhere(fits))

    # Behind barriers, or the compiler would make the logits that are the same each time once, and keep them.
    def attempt(state: _State) -> _State:
        known, reference = jax.lax.optimization_barrier((x, state.maximum))
        return from_logits(reference, known, state.tries)

    def again(state: _State) -> _State:
        known, tries = jax.lax.optimization_barrier((x, state.tries))
        known, maximum = jax.lax.optimization_barrier((known, axis.largest(product_maxima(layer, known))))
        return from_product(maximum, known, tries, counts)

    shape = layer.shape(x)
    here, classes = y - axis.start(shape), axis.size(shape)
    # A loop, which updates exponentials in place, where a condition would copy them.
    # What is infinite or NaN is too far, too.
    r, none = near.of(x), vary(jnp.int32(0), x)
    if near.apart or unseen_parts(x) > 1:  # automatic sharding cannot split what is empty
        first = from_product(r, x, none, None) if near.apart else from_logits(r, x, none)
        with jax.named_scope("again"):
            state = jax.lax.while_loop(unsure, again if near.apart else attempt, first)
    else:
        of_label, e = vary(r, y), None
        if stored is not None:
            e = jax.lax.empty((x.shape[0], layer.kernel.shape[1]), jnp.dtype(stored))
            e = vary(e, x, *jax.tree.leaves(layer))
        with jax.named_scope("attempts"):
            state = jax.lax.while_loop(unsure, attempt, _State(LabelSums(r, of_label, of_label, r), e, r, none))
    return state.sums, state.e
