"""Negative log-likelihood, and what labels, class weights and reductions mean in it (as in PyTorch)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._check import (
    AxisName,
    FloatArray,
    LabelArray,
    Reduction,
    check_axis_name,
    check_floating,
    check_ignore_index,
    check_labels,
    check_reduction,
    check_weight,
    normalize_axis,
)
from ._class_axis import ClassAxis, class_axis, one_hot
from ._softmax import converted_apart, to_compute_dtype


def nll(
    log_probs: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    weight: FloatArray | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Negative log-likelihood of labels under given log-probabilities.

    $$\ell_i = -w_{y_i} \log p_{i, y_i}, \qquad \text{mean} = \frac{\sum_i \ell_i}{\sum_i w_{y_i}}$$

    over the examples whose label is not `ignore_index`. With class probabilities $q$ for labels,
    $\ell_i = -\sum_k w_k q_{ik} \log p_{ik}$, and the mean divides by the number of examples.

    Args:
        log_probs: log-probabilities, for instance from `log_softmax`; a floating dtype, any shape.
        labels: class indices (an integer dtype, the shape of `log_probs` without `axis`) or class probabilities
            (a floating dtype, the shape of `log_probs`).
        axis: the class axis.
        weight: one weight per class, shape `(classes,)`.
        ignore_index: examples with this label add nothing; None ignores none.
        reduction: `"none"`, `"mean"` or `"sum"`.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `log_probs`, `weight` and class probabilities are then this device's part, class indices
            still count all classes, and the loss is the same on all devices that hold parts of an example.

    Returns:
        A scalar, or one loss per example for `reduction="none"`; float32, or float64 for float64 input.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an axis or the reduction does not fit, or a label lies outside `[0, classes)`. Where
            labels are traced their values cannot be checked: such an example's loss and gradient are NaN,
            and (without sharded classes) `checkify` with its `index_checks` reports it.

    Examples:
        >>> import jax.numpy as jnp, jaxent
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
        >>> print(jaxent.nll(log_probs, jnp.array([0, 1]), reduction="none").round(4))
        [0.6931 0.2877]

    References:
        [torch.nn.functional.nll_loss](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.nll_loss.html),
        also spelled `jaxent.nll_loss`. `cross_entropy` is this after `log_softmax`, in one step.
    """
    check_floating("log_probs", log_probs)
    classes = class_axis(normalize_axis("log_probs", log_probs.shape, axis), check_axis_name(axis_name))
    ignore_index = check_ignore_index(ignore_index)
    check_reduction(reduction)
    check_weight(weight, log_probs.shape[classes.index])
    check_labels("log_probs", log_probs.shape, labels, classes, ignore_index)
    return _nll(log_probs, labels, weight, classes, ignore_index, reduction)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _nll(
    log_probs: FloatArray,
    labels: LabelArray,
    weight: FloatArray | None,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
) -> Float[Array, "..."]:
    log_p = to_compute_dtype(log_probs)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        loss = expected_nll(log_p, scale_classes(jnp.asarray(labels, log_p.dtype), weight, axis), axis)
        return reduce_mean_of_all(loss, axis.size(log_p), reduction)
    target = read_labels(labels, axis.size(log_p), weight, ignore_index, log_p.dtype, axis.names)
    return reduce_weighted(-_pick(log_p, target.label, axis), target, reduction)


class Target(NamedTuple):
    """What labels say about each example."""

    label: Integer[Array, "..."]  # at least 0, and 0 for an ignored example; too large if out of range
    counts: Bool[Array, "..."] | None  # None if every example counts
    weight: Float[Array, "..."] | None  # the weight of each example's class


def read_labels(
    labels: LabelArray,
    classes: int,
    weight: FloatArray | None,
    ignore_index: int | None,
    dtype: jnp.dtype,
    axis_names: tuple[str, ...] = (),
) -> Target:
    """Class indices, and which of them count."""
    labels = jnp.asarray(labels)
    if labels.dtype.itemsize < 4:  # so that `classes` and `ignore_index` fit the dtype they are compared in
        labels = labels.astype(jnp.int32)
    counts = counting(labels, ignore_index)
    if counts is not None:
        labels = jnp.where(counts, labels, 0)
    # A label too large stays as it is for `checkify.index_checks` to report; a negative one must not wrap around.
    largest = jnp.iinfo(jnp.int32).max
    index = jnp.where(labels < 0, max(classes, 1), jnp.minimum(labels, largest)).astype(jnp.int32)
    of_label = None if weight is None else _weight_of(index, jnp.asarray(weight, dtype), ClassAxis(0, axis_names))
    if of_label is not None and counts is not None:
        of_label = jnp.where(counts, of_label, 0.0)
    return Target(index, counts, of_label)


def _weight_of(
    index: Integer[Array, "..."], weight: Float[Array, " classes"], axis: ClassAxis
) -> Float[Array, "..."]:
    """The weight of each class `index`; NaN if there is no such class."""
    if axis.names:
        local = axis.local(index, weight)
        inside = (local >= 0) & (local < weight.size)
        of_part = jnp.where(inside, weight.at[local].get(mode="clip"), 0.0)
    elif any(jax.typeof(index).sharding.spec) or axis.is_sharded(weight):
        of_part = jnp.where(one_hot(index, (*index.shape, weight.size), index.ndim), weight, 0.0).sum(-1)
    else:
        return weight.at[index].get(mode="fill")
    return jnp.where(index < axis.size(weight), axis.total(of_part), jnp.nan)


def counting(labels: LabelArray, ignore_index: int | None) -> Bool[Array, "..."] | None:
    """Which examples count; None if all of them do."""
    if ignore_index is None or jnp.issubdtype(labels.dtype, jnp.floating):
        return None
    info = jnp.iinfo(labels.dtype)
    return jnp.asarray(labels != ignore_index) if info.min <= ignore_index <= info.max else None


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pick(x: Float[Array, "..."], index: Integer[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Entry `index` along `axis`; NaN if the index is out of range."""
    return axis.take(x, index)


@_pick.defjvp
def _pick_jvp(axis: ClassAxis, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # A mask instead of the scatter that AD would write: one vectorised pass, and a whole row of NaN for a bad index.
    x, index = primals
    outside = jnp.expand_dims(index >= axis.size(x), axis.index)
    t = tangents[0] * jnp.where(outside, jnp.nan, jnp.ones((), x.dtype))
    return _pick(x, index, axis), axis.sum(jnp.where(axis.one_hot(index, x) | outside, t, 0.0))


def scale_classes(x: Float[Array, "..."], weight: FloatArray | None, axis: ClassAxis) -> Float[Array, "..."]:
    """`x` times the weight of each class."""
    if weight is None:
        return x
    return x * jnp.asarray(weight, x.dtype).reshape((-1,) + (1,) * (x.ndim - axis.index - 1))


def expected_nll(log_p: Float[Array, "..."], q: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """`-sum(q * log_p)` along `axis`, where 0 * -inf counts as 0."""
    return -axis.sum(converted_apart(q) * known_terms(log_p, q))


def known_terms(log_p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log_p` with 0 for what is impossible and does not happen."""
    return jnp.where((q == 0) & (log_p == -jnp.inf), 0.0, log_p)


def reduce_mean_of_all(loss: Float[Array, "..."], classes: int, reduction: Reduction) -> Float[Array, "..."]:
    """Reduce losses where the mean is over all examples; NaN if there are none, or no classes."""
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    return total if reduction == "sum" else total / jnp.asarray(loss.size if classes else jnp.nan, loss.dtype)


def reduce_weighted(
    loss: Float[Array, "..."], target: Target, reduction: Reduction, extra: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Weigh, drop what is ignored, and reduce; the mean divides by the summed weights, and is NaN if they are 0.

    `extra` is added per example after weighing.
    """
    if target.weight is not None:
        loss = loss * target.weight
    if extra is not None:
        loss = loss + extra
    if target.counts is not None:
        loss = jnp.where(target.counts, loss, 0.0)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    return total if reduction == "sum" else total / mean_divisor(target, loss.dtype)


def mean_divisor(target: Target, dtype: jnp.dtype) -> Float[Array, ""]:
    """The summed weights of the examples that count; NaN if that is 0."""
    if target.weight is not None:
        divisor = jnp.sum(target.weight)
    else:
        divisor = jnp.asarray(target.label.size if target.counts is None else jnp.sum(target.counts), dtype)
    return jnp.where(divisor == 0.0, jnp.nan, divisor)
