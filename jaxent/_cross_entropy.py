"""Cross-entropy of logits, measured from the label's own class so that nothing cancels."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._check import (
    AxisName,
    BoolArray,
    FloatArray,
    LabelArray,
    Reduction,
    check_axis_name,
    check_floating,
    check_ignore_index,
    check_labels,
    check_number,
    check_reduction,
    check_smoothing,
    check_weight,
    check_where,
    normalize_axis,
)
from ._class_axis import ClassAxis, class_axis
from ._expected_loss import expected_loss
from ._nll import read_labels, reduce_mean_of_all, reduce_weighted, scale_classes
from ._softmax import (
    converted_apart,
    difference,
    each_class,
    hide_classes,
    is_half,
    log_near_one,
    logsumexp_core,
    settled,
    softmax_core,
    softmax_tangent,
    sum_exp_except,
    sum_exps,
    to_compute_dtype,
)


def cross_entropy(
    logits: FloatArray,
    labels: LabelArray,
    *,
    axis: int = -1,
    where: BoolArray | None = None,
    weight: FloatArray | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy between labels and the softmax of logits.

    $$\ell_i = -w_{y_i} \log \frac{\exp(x_{i, y_i})}{\sum_k \exp(x_{ik})}, \qquad
      \text{mean} = \frac{\sum_i \ell_i}{\sum_i w_{y_i}}$$

    over the examples whose label is not `ignore_index`. With class probabilities $q$ for labels,
    $\ell_i = -\sum_k w_k q_{ik} \log p_{ik}$, and the mean divides by the number of examples. Label smoothing
    $\varepsilon$ replaces labels by $(1 - \varepsilon) q + \varepsilon / C$.

    Args:
        logits: unnormalised scores; a floating dtype, any shape with at least one axis.
        labels: class indices (an integer dtype, the shape of `logits` without `axis`) or class probabilities
            (a floating dtype, the shape of `logits`).
        axis: the class axis. PyTorch's `(N, C, d1, ...)` is `axis=1`.
        where: boolean mask that broadcasts to `logits`; the loss is as if classes where it is False did not exist.
            A label on such a class, or a row without any class left, has the loss inf.
        weight: one weight per class, shape `(classes,)`.
        ignore_index: examples with this label add nothing; None ignores none. Only for class indices.
        reduction: `"none"`, `"mean"` or `"sum"`.
        label_smoothing: share of the label, in [0, 1], that is spread evenly over the classes.
        z_loss: factor of `logsumexp(logits) ** 2`, which is added to each example's loss to keep logits small.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits`, `weight`, `where` and class probabilities are then this device's part, class indices
            still count all classes, and the loss is the same on all devices that hold parts of an example.

    Returns:
        A scalar, or one loss per example for `reduction="none"`; float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an axis, the reduction or the smoothing does not fit, or a label lies outside
            `[0, classes)`. Where labels are traced their values cannot be checked: such an example's loss and
            gradient are NaN, and (without sharded classes) `checkify` with its `index_checks` reports it.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.0, 30.0]])
        >>> labels = jnp.array([0, 2])
        >>> losses = jaxent.cross_entropy(logits, labels, reduction="none")
        >>> [f"{loss:.4g}" for loss in losses]
        ['0.4076', '1.872e-13']
        >>> gradient = jax.grad(jaxent.cross_entropy)(logits, labels)
        >>> [f"{g:.4g}" for g in gradient[1]]  # the label's entry never rounds to zero
        ['4.679e-14', '4.679e-14', '-9.358e-14']

    References:
        [torch.nn.functional.cross_entropy](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html);
        z-loss: Chowdhery et al. 2022, "PaLM", section 5; label smoothing: Szegedy et al. 2016.
        Equals `nll(log_softmax(logits), labels)`.
    """
    check_floating("logits", logits)
    classes = class_axis(normalize_axis("logits", logits.shape, axis), check_axis_name(axis_name))
    ignore_index = check_ignore_index(ignore_index)
    check_reduction(reduction)
    label_smoothing = check_smoothing(label_smoothing)
    check_where("logits", logits.shape, where)
    check_weight(weight, logits.shape[classes.index])
    check_labels("logits", logits.shape, labels, classes, ignore_index)
    return cross_entropy_core(
        logits,
        labels,
        where,
        weight,
        classes,
        ignore_index,
        reduction,
        label_smoothing,
        check_number("z_loss", z_loss),
    )


@partial(jax.jit, static_argnums=(4, 5, 6, 7, 8, 9))
def cross_entropy_core(
    logits: FloatArray,
    labels: LabelArray,
    where: BoolArray | None,
    weight: FloatArray | None,
    axis: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
    label_smoothing: float,
    z_loss: float,
    in_place: bool = False,
) -> Float[Array, "..."]:
    """`cross_entropy` of checked arguments; `in_place` if the gradient is to overwrite the logits."""
    narrow, keep, empty = hide_classes(settled(jnp.asarray(logits)), where, axis)
    x = to_compute_dtype(narrow)
    narrow = x if z_loss else narrow  # then too many would convert it apart
    loss_of_all = z_loss * logsumexp_core(x, axis) ** 2 if z_loss else None  # what no class weight touches
    by_label = weight is None and where is None and jnp.issubdtype(labels.dtype, jnp.integer)
    how = _How(label_smoothing if by_label else 0.0, in_place or z_loss > 0.0)
    uniform = _uniform(label_smoothing, x, keep, axis) if label_smoothing and not by_label else None

    if jnp.issubdtype(labels.dtype, jnp.floating):
        q = settled(jnp.asarray(labels))
        if not is_half(q) or uniform is not None or weight is not None or x.dtype != jnp.float32:
            q = q.astype(x.dtype)  # and otherwise later, by each user apart
        q = q if uniform is None else (1.0 - label_smoothing) * q + uniform
        loss = expected_loss(narrow, scale_classes(q, weight, axis), axis)
        loss = loss if loss_of_all is None else loss + loss_of_all
        loss = loss if empty is None else jnp.where(empty, jnp.inf, loss)
        return reduce_mean_of_all(loss, axis.size(x), reduction)

    target = read_labels(labels, axis.size(x), weight, ignore_index, x.dtype, axis.names)
    loss = _label_loss(narrow, target.label, axis, how)
    if uniform is not None:
        loss = (1.0 - label_smoothing) * loss
        smooth = expected_loss(narrow, scale_classes(uniform, weight, axis), axis)
        loss_of_all = smooth if loss_of_all is None else smooth + loss_of_all
    if empty is not None:
        loss = jnp.where(empty, jnp.inf, loss)
    return reduce_weighted(loss, target, reduction, loss_of_all)


def _uniform(
    mass: float, x: Float[Array, "..."], keep: Bool[Array, "..."] | None, axis: ClassAxis
) -> Float[Array, "..."]:
    """`mass` spread evenly over the classes that are kept."""
    if keep is None:
        return jnp.full_like(x, mass / max(axis.size(x), 1))
    return jnp.where(keep, mass / axis.sum(keep, keepdims=True).astype(x.dtype), 0.0)


# With the largest logit m, d = x_y - m and S = sum of exp(x_k - m) over the classes k other than the label y, the
# loss is log(S + exp(d)) - d. Where the label is the largest class (d = 0) that is log1p(S), however small S is.
# The gradient is p_k for the others and -S / (S + exp(d)) for the label: minus their sum, and never p_y - 1.
#
# Smoothing mixes in the mean of -log p_k over all classes. That is log(S + exp(d)) plus the mean of m - x_k, whose
# terms have one sign, so nothing cancels there either.


class _How(NamedTuple):
    """Which loss, and what its gradient may cost."""

    smoothing: float  # the share of the loss that is the mean over all classes
    in_place: bool  # whether the gradient does without another array of its size


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _label_loss(x: Float[Array, "..."], y: Integer[Array, "..."], axis: ClassAxis, how: _How) -> Float[Array, "..."]:
    """`-log p_y` of each example, or what smoothing makes of it."""
    m = axis.max(converted_apart(x))
    return _loss_of_parts(x, _parts(x, y, m, sum_exp_except(x, m, y, axis, how.in_place), axis), axis, how.smoothing)


@_label_loss.defjvp
def _label_loss_jvp(
    axis: ClassAxis, how: _How, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    loss, gradient = _loss_and_gradient(*primals, axis, how)
    return loss, axis.sum(gradient * to_compute_dtype(tangents[0]))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _loss_and_gradient(
    x: Float[Array, "..."], y: Integer[Array, "..."], axis: ClassAxis, how: _How
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`-log p_y` and its derivative `p - one_hot(y)`, where smoothing leaves less of the label."""
    m = axis.max(converted_apart(x))
    label = axis.one_hot(y, x)
    e = jnp.where(label, 0.0, jnp.exp(to_compute_dtype(x) - m))
    # Unless it must not be, it is written out where the gradient will be, and summed there.
    apart = how.in_place or axis.is_short(x)
    others = sum_exp_except(x, m, y, axis, how.in_place) if apart else sum_exps(e, axis)
    parts = _parts(x, y, m, others, axis)
    others, at_label, total = (
        jnp.expand_dims(value, axis.index) for value in (parts.others, parts.at_label, parts.total)
    )
    inverse = 1.0 / total
    p = e * inverse if is_half(x) else jnp.where(x == m, inverse, e * inverse)  # see `difference`
    of_label = -others * inverse
    smoothing = how.smoothing
    if smoothing:  # the share s: (1 - s) (p - 1) + s (p - 1 / C) of the label, and p - s / C of the others
        uniform = smoothing / max(axis.size(x), 1)
        of_label = (1.0 - smoothing) * of_label + (smoothing * at_label * inverse - uniform)
        p = p - uniform
    return _loss_of_parts(x, parts, axis, smoothing), jnp.where(label, of_label, p)


@_loss_and_gradient.defjvp
def _loss_and_gradient_jvp(
    axis: ClassAxis, how: _How, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    loss, gradient = _loss_and_gradient(*primals, axis, how)
    # The label is constant, smoothed or not, so the gradient moves as softmax does.
    x, t = map(to_compute_dtype, (primals[0], tangents[0]))
    p = softmax_core(x, axis)
    dp = softmax_tangent(p, t, axis)
    return (loss, gradient), (axis.sum(gradient * t), dp)


class _Parts(NamedTuple):
    """What loss and gradient are made of, for each example."""

    m: Float[Array, "..."]  # keeps the class axis
    d: Float[Array, "..."]
    others: Float[Array, "..."]  # S
    at_label: Float[Array, "..."]  # exp(d)
    total: Float[Array, "..."]  # S + exp(d)


def _parts(
    x: Float[Array, "..."],
    y: Integer[Array, "..."],
    m: Float[Array, "..."],
    others: Float[Array, "..."],
    axis: ClassAxis,
) -> _Parts:
    d = difference(to_compute_dtype(axis.take(x, y)), jnp.squeeze(m, axis.index))
    others = jnp.where(d < 0.0, jnp.maximum(others, 1.0), others)  # the largest class is among them
    at_label = jnp.exp(d)
    return _Parts(m, d, others, at_label, others + at_label)


def _loss_of_parts(x: Float[Array, "..."], parts: _Parts, axis: ClassAxis, smoothing: float) -> Float[Array, "..."]:
    largest = parts.d == 0.0
    log_total = jnp.where(largest, log_near_one(parts.total, parts.others), jnp.log(parts.total))
    loss = jnp.where(largest, log_total, log_total - parts.d)
    if not smoothing:
        return loss
    if axis.is_short(x):  # one pass over the rows, with the exponentials
        m = jnp.squeeze(parts.m, axis.index)
        gaps = axis.total(
            sum((m - to_compute_dtype(of_class) for of_class in each_class(x, axis)), jnp.zeros_like(m))
        )
    else:
        # Logits and maxima of its own, or XLA's CPU backend would write out what this sum shares with others.
        x, m = jax.lax.optimization_barrier((x, parts.m))
        gaps = axis.sum(m - converted_apart(x))
    mean = log_total + gaps / max(axis.size(x), 1)
    return (1.0 - smoothing) * loss + smoothing * mean
