"""Negative log-likelihood, and what labels, class weights and reductions mean in it (as in PyTorch)."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from . import _kernels as kernels
from ._check import (
    Axis,
    AxisName,
    FloatArray,
    LabelArray,
    Labels,
    Reduction,
    WeightArray,
    check_class_axis,
    check_floating,
    check_ignore_index,
    check_labels,
    check_range,
    check_reduction,
    check_sample_weight,
    check_weight,
)
from ._class_axis import ClassAxis
from ._kernels import INLINE, compute_dtype, wide
from ._linear import linear, times


def nll(
    log_probs: FloatArray,
    labels: Labels,
    *,
    axis: Axis = -1,
    weight: FloatArray | None = None,
    sample_weight: WeightArray | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Negative log-likelihood of labels under given log-probabilities.

    $$\ell_i = -w_{y_i} \log p_{i, y_i}, \qquad
      \text{mean} = \frac{\sum_i v_i \ell_i}{\sum_i v_i w_{y_i}}$$

    over the examples whose label is not `ignore_index`, with weights $w$ of classes and $v$ of examples. With class
    probabilities $q$ for labels, $\ell_i = -\sum_k w_k q_{ik} \log p_{ik}$, and the mean divides by
    $\sum_i v_i$.

    Args:
        log_probs: log-probabilities, for instance from `log_softmax`; a floating dtype, any shape.
        labels: class indices (an integer dtype, the shape of `log_probs` without `axis`; an int for a single row) or
            class probabilities (a floating dtype, the shape of `log_probs`).
        axis: the class axis, or several that count as one: class indices count through them, the last one fastest.
        weight: one weight per class, shape `(classes,)`.
        sample_weight: one weight or truth value per example, of the shape of class indices or with 1 in place of some
            sizes. Each loss is multiplied by it. An example of weight 0 adds nothing, whatever its scores and its
            label are.
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
    classes, merged = check_class_axis("log_probs", log_probs.shape, axis, axis_name)
    labels = merged(labels) if getattr(labels, "shape", None) == log_probs.shape else labels
    log_probs = merged(log_probs)
    ignore_index = check_ignore_index(ignore_index)
    check_reduction(reduction)
    labels = check_labels("log_probs", log_probs.shape, labels, classes, ignore_index)
    check_weight(weight, log_probs.shape[classes.index])
    check_sample_weight(sample_weight, classes.rows(log_probs.shape))
    checked = check_range(labels, log_probs.shape[classes.index] * classes.parts(), ignore_index, sample_weight)
    return _nll(log_probs, labels, weight, sample_weight, classes, ignore_index, reduction, checked)


@partial(jax.jit, static_argnums=(4, 5, 6, 7), inline=INLINE)  # so that a kernel may see where log_probs come from
def _nll(
    log_probs: FloatArray,
    labels: LabelArray,
    weight: FloatArray | None,
    sample_weight: WeightArray | None,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
    checked: bool,
) -> Float[Array, "..."]:
    log_p = jnp.asarray(log_probs)
    dtype, rows = compute_dtype(log_p.dtype), axis.rows(log_p.shape)
    v = None if sample_weight is None else jnp.broadcast_to(jnp.asarray(sample_weight, dtype), rows)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        q = scale_classes(jnp.asarray(labels, dtype), weight, axis)
        loss = expected_nll(log_p, q, axis)
        scale = scale_of_all(rows, axis.size(log_p), v, reduction, dtype)
        return reduced(loss if v is None else times(v, loss), scale)
    target = read_labels(labels, axis.size(log_p), weight, ignore_index, dtype, axis.names, v, checked)
    place = partial(_place, axis, log_p.shape[axis.index], log_p.dtype)
    loss = axis.total(linear(partial(_pick, axis), place, (target.label,), log_p))
    loss = loss if target.weight is None else loss * target.weight
    return reduced(loss if v is None else times(v, loss), scale_of_each(target, v, reduction, dtype))


def expected_nll(log_p: Float[Array, "..."], q: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """`-sum(q * log_p)` along `axis`, where 0 * -inf counts as 0."""
    return axis.total(linear(partial(_expect, axis), partial(_spread, axis, log_p.dtype), (q,), log_p))


# Negative log-likelihoods of this device's classes, and their transposes.


def _pick(axis: ClassAxis, label: Integer[Array, "..."], log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    return kernels.pick(log_p, label, axis=axis)


def _place(
    axis: ClassAxis, classes: Any, dtype: DTypeLike, label: Integer[Array, "..."], g: Float[Array, "..."]
) -> Float[Array, "..."]:
    return kernels.place(g, label, axis=axis, classes=classes, dtype=dtype)


def _expect(axis: ClassAxis, q: Float[Array, "..."], log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    log_p = wide(log_p)
    return -jnp.sum(q * jnp.where((q == 0.0) & (log_p == -jnp.inf), 0.0, log_p), axis.index)


def _spread(axis: ClassAxis, dtype: DTypeLike, q: Float[Array, "..."], g: Float[Array, "..."]) -> Float[Array, "..."]:
    return (-q * axis.expand(g)).astype(dtype)


class Target(NamedTuple):
    """What labels say about each example."""

    label: Integer[Array, "..."]  # -1 for an ignored example; too large if out of range
    weight: Float[Array, "..."] | None  # the weight of each example's class, 0 for an ignored one


def read_labels(
    labels: LabelArray,
    classes: int,
    weight: FloatArray | None,
    ignore_index: int | None,
    dtype: DTypeLike,
    axis_names: tuple[str, ...] = (),
    sample_weight: Float[Array, "..."] | None = None,
    checked: bool = False,
) -> Target:
    """Class indices, and which of them count. Of an example without weight the label may be out of range."""
    labels = jnp.asarray(labels)
    if labels.dtype.itemsize < 4:  # so that `classes` and `ignore_index` fit the dtype they are compared in
        labels = labels.astype(jnp.int32)
    largest = jnp.iinfo(jnp.int32).max
    label = jnp.minimum(labels, largest).astype(jnp.int32)
    if not checked:
        label = jnp.where(labels < 0, largest, label)
    counts = counting(labels, ignore_index)
    if counts is not None:
        label = jnp.where(counts, label, -1)
    if sample_weight is not None:
        label = jnp.where((sample_weight == 0.0) & (label >= classes), -1, label)
    if not (checked or axis_names or any(jax.typeof(label).sharding.spec)):
        # Adds 0, looked up so that `checkify.index_checks` reports what is out of range; XLA makes nothing of it.
        label += jnp.zeros(1, jnp.int32).at[(label >= classes).astype(jnp.uint32)].get(mode="clip")
    return Target(label, None if weight is None else _weight_of(label, jnp.asarray(weight, dtype), axis_names))


def _weight_of(
    label: Integer[Array, "..."], weight: Float[Array, " classes"], axis_names: tuple[str, ...]
) -> Float[Array, "..."]:
    """The weight of each class; NaN if there is no such class."""
    axis = ClassAxis(label.ndim, axis_names)
    if axis_names or any(jax.typeof(label).sharding.spec) or any(jax.typeof(weight).sharding.spec):
        mask = axis.one_hot(label, jax.ShapeDtypeStruct((*label.shape, weight.size), weight.dtype))
        row = weight.reshape((1,) * label.ndim + weight.shape)
        found = axis.squeeze(axis.sum(jnp.where(mask, row, 0.0)))
        return jnp.where(label < weight.size * axis.parts(), found, jnp.nan)
    found = weight.at[label].get(mode="fill") if weight.size else jnp.nan
    return jnp.where(label < 0, jnp.zeros((), weight.dtype), found)


def counting(labels: LabelArray, ignore_index: int | None) -> Bool[Array, "..."] | None:
    """Which examples count; None if all of them do."""
    if ignore_index is None or jnp.issubdtype(labels.dtype, jnp.floating):
        return None
    info = jnp.iinfo(labels.dtype)
    return jnp.asarray(labels != ignore_index) if info.min <= ignore_index <= info.max else None


def scale_classes(x: Float[Array, "..."], weight: FloatArray | None, axis: ClassAxis) -> Float[Array, "..."]:
    """`x` times the weight of each class."""
    if weight is None:
        return x
    dtype = compute_dtype(x.dtype)
    shape = [1] * x.ndim
    shape[axis.index] = x.shape[axis.index]
    return x.astype(dtype) * jnp.asarray(weight, dtype).reshape(shape)


class Scale(NamedTuple):
    """What reduces losses, and is known before they are."""

    factor: Float[Array, ""] | None  # of the sum; None to sum nothing
    empty: Float[Array, ""] | float = 0.0  # NaN if the mean is over nothing: added, so that derivatives are 0


def scale_of_each(
    target: Target, sample_weight: Float[Array, "..."] | None, reduction: Reduction, dtype: DTypeLike
) -> Scale:
    """For class indices: the mean divides by the summed weights of what counts."""
    if reduction != "mean":
        return Scale(None if reduction == "none" else jnp.ones((), dtype))
    counts, weight = (target.label >= 0).astype(dtype), target.weight
    if sample_weight is not None:
        weight = times(sample_weight, counts if weight is None else weight)
        counts = jnp.where(sample_weight == 0.0, 0.0, counts)
    counted = jnp.sum(counts)
    return _mean(counted if weight is None else jnp.sum(weight), counted)


def scale_of_all(
    rows: tuple[Any, ...],
    classes: int,
    sample_weight: Float[Array, "..."] | None,
    reduction: Reduction,
    dtype: DTypeLike,
) -> Scale:
    """For class probabilities: the mean is over all examples."""
    if reduction != "mean":
        return Scale(None if reduction == "none" else jnp.ones((), dtype))
    if sample_weight is None:
        divisor = counted = jnp.asarray(math.prod(rows), dtype)
    else:
        divisor, counted = jnp.sum(sample_weight), jnp.sum(sample_weight != 0.0, dtype=dtype)
    return _mean(divisor, counted * jnp.asarray(classes, dtype))


def _mean(divisor: Float[Array, ""], counted: Float[Array, ""]) -> Scale:
    """NaN over nothing."""
    nothing = counted == 0.0
    empty = jnp.where(nothing | (divisor == 0.0), jnp.nan, jnp.zeros((), divisor.dtype))
    return Scale(jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, divisor + empty)), empty)


def reduced(loss: Float[Array, "..."], scale: Scale) -> Float[Array, "..."]:
    """The losses one by one, or the scaled sum."""
    return loss if scale.factor is None else jnp.sum(loss) * scale.factor + scale.empty
