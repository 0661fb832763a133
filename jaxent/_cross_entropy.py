"""Cross-entropy: what labels, weights, smoothing and reductions mean, in terms of losses that are easy to compute."""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from ._check import (
    Axis,
    AxisName,
    BoolArray,
    FloatArray,
    Implementation,
    LabelArray,
    Labels,
    Reduction,
    Scalar,
    WeightArray,
    check_class_axis,
    check_floating,
    check_ignore_index,
    check_implementation,
    check_labels,
    check_range,
    check_reduction,
    check_sample_weight,
    check_scalar,
    check_smoothing,
    check_weight,
    check_where,
)
from ._class_axis import ClassAxis
from ._expected_loss import Logits, expected_losses, expected_pass, expected_total
from ._kernels import INLINE, compute_dtype
from ._label_loss import Factors, How, Parts, Row, label_losses, label_pass, label_total, mixed
from ._linear import times
from ._nll import Scale, Target, read_labels, scale_classes, scale_of_all, scale_of_each
from ._softmax import add, hide_classes


class LossStats(NamedTuple):
    """What is known of each example beside its loss, as `cross_entropy(..., return_stats=True)` gives it.

    Without derivatives. An example that adds nothing, because its label is ignored or its weight is 0, has the loss
    and the logsumexp 0 and the class -1.
    """

    loss: Float[Array, "..."]
    """The loss of each example, as `reduction="none"` gives it."""
    logsumexp: Float[Array, "..."]
    """Of its logits; `z_loss` times its square is in the loss."""
    predicted: Integer[Array, "..."]
    """The class of its largest logit, the first if there are several, or -1 where the logsumexp is not a number."""


def cross_entropy(
    logits: FloatArray,
    labels: Labels,
    *,
    axis: Axis = -1,
    where: BoolArray | None = None,
    weight: FloatArray | None = None,
    sample_weight: WeightArray | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
    return_stats: bool = False,
) -> Any:
    r"""Cross-entropy between labels and the softmax of logits.

    $$\ell_i = -w_{y_i} \log \frac{\exp(x_{i, y_i})}{\sum_k \exp(x_{ik})}, \qquad
      \text{mean} = \frac{\sum_i v_i \ell_i}{\sum_i v_i w_{y_i}}$$

    over the examples whose label is not `ignore_index`, with weights $w$ of classes and $v$ of examples. With class
    probabilities $q$ for labels, $\ell_i = -\sum_k w_k q_{ik} \log p_{ik}$, and the mean divides by
    $\sum_i v_i$. Label smoothing $\varepsilon$ replaces labels by $(1 - \varepsilon) q + \varepsilon / C$.

    Args:
        logits: unnormalised scores; a floating dtype, any shape with at least one axis.
        labels: class indices (an integer dtype, the shape of `logits` without `axis`; an int for a single row) or
            class probabilities (a floating dtype, the shape of `logits`).
        axis: the class axis; PyTorch's `(N, C, d1, ...)` is `axis=1`. Or several that count as one: class indices
            count through them, the last one fastest.
        where: boolean mask that broadcasts to `logits`; the loss is as if classes where it is False did not exist.
            A label on such a class has the loss inf. A row without any class left adds nothing, as an ignored one.
        weight: one weight per class, shape `(classes,)`.
        sample_weight: one weight or truth value per example, of the shape of class indices or with 1 in place of some
            sizes. Each loss is multiplied by it. An example of weight 0 adds nothing, whatever its logits and its
            label are; the derivative by its weight is its loss all the same.
        ignore_index: examples with this label add nothing; None ignores none. Only for class indices.
        reduction: `"none"`, `"mean"` or `"sum"`.
        label_smoothing: share of the label, in [0, 1], that is spread evenly over the classes; a number, or a scalar
            of a floating dtype, as a schedule makes it.
        z_loss: factor of `logsumexp(logits) ** 2`, which is added to each example's loss to keep logits small; a
            number or a scalar likewise.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits`, `weight`, `where` and class probabilities are then this device's part, class indices
            still count all classes, and the loss is the same on all devices that hold parts of an example.
        implementation: who computes it: `"xla"` is XLA from plain JAX, `"native"` the kernels for CPUs, `"pallas"`
            those for TPUs and GPUs, None the best for the machine.
        return_stats: return also what is known of each example when its loss is, see `LossStats`: the loss, the
            logsumexp, and the predicted class. Where a kernel serves, it is the same that computes the loss. There
            are no derivatives through these.

    Returns:
        A scalar, or one loss per example for `reduction="none"`; float32, or float64 for float64 logits. With
            `return_stats` a pair of it and `LossStats`, as `jax.value_and_grad(..., has_aux=True)` wants it.

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
        >>> loss, stats = jaxent.cross_entropy(logits, labels, return_stats=True)
        >>> print(f"accuracy {jnp.mean(stats.predicted == labels):.0%}")
        accuracy 100%

    References:
        [torch.nn.functional.cross_entropy](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html);
        z-loss: Chowdhery et al. 2022, "PaLM", section 5; label smoothing: Szegedy et al. 2016.
        Equals `nll(log_softmax(logits), labels)`.
    """
    check_floating("logits", logits)
    check_where("logits", logits.shape, where)
    classes, merged = check_class_axis("logits", logits.shape, axis, axis_name)
    labels = merged(labels) if getattr(labels, "shape", None) == logits.shape else labels
    logits, where = merged(logits), merged(where)
    check_reduction(reduction)
    ignore_index = check_ignore_index(ignore_index)
    labels = check_labels("logits", logits.shape, labels, classes, ignore_index)
    check_weight(weight, logits.shape[classes.index])
    check_sample_weight(sample_weight, classes.rows(logits.shape))
    checked = check_range(labels, logits.shape[classes.index] * classes.parts(), ignore_index, sample_weight)
    check_smoothing(label_smoothing)
    check_scalar("z_loss", z_loss)
    check_implementation(implementation)
    options = loss_options(classes, ignore_index, reduction, implementation, bool(return_stats), checked)
    return _cross_entropy(logits, labels, where, weight, sample_weight, added(label_smoothing, z_loss), options)


class LossOptions(NamedTuple):
    """What is compiled in."""

    axis: ClassAxis
    ignore_index: int | None
    reduction: Reduction
    implementation: Implementation | None
    stats: bool = False
    checked: bool = False  # whether labels are known to be right


loss_options = functools.cache(LossOptions)  # one object for equal options, see class_axis


class Added(NamedTuple):
    """What is added to the label's own loss, None where nothing is: a schedule changes it without compiling anew."""

    uniform: Scalar | None  # the share of the label that is spread over the classes
    z_loss: Scalar | None


def added(label_smoothing: Scalar, z_loss: Scalar) -> Added:
    """What these two numbers add."""
    return Added(*(x if isinstance(x, jax.Array) else float(x) or None for x in (label_smoothing, z_loss)))


@partial(jax.jit, static_argnums=6, inline=INLINE)  # so that a kernel may see where logits come from
def _cross_entropy(
    logits: FloatArray,
    labels: LabelArray,
    where: BoolArray | None,
    weight: FloatArray | None,
    sample_weight: WeightArray | None,
    added: Added,
    options: LossOptions,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], LossStats]:
    axis, how = options.axis, How(options.axis, options.implementation)
    x, empty = hide_classes(jnp.asarray(logits), where, axis)
    dtype = compute_dtype(x.dtype)
    v = None if sample_weight is None else jnp.broadcast_to(jnp.asarray(sample_weight, dtype), axis.rows(x.shape))
    if empty is not None:
        v = jnp.where(empty, 0.0, jnp.ones((), dtype) if v is None else v)
    target = read_target(x, labels, weight, options, v)
    scale = scale_of(target, axis.rows(x.shape), axis.size(x), v, options.reduction, dtype)
    losses = mixture(x, labels, target, where, weight, added, axis)
    one = jnp.ones((), dtype) if v is None else v
    if scale.factor is None:
        loss, stats = losses.rows(how, x, one, options.stats)
    else:
        loss, stats = losses.total(how, x, scale.factor, one, options.stats)
        loss += scale.empty
    if stats is None:
        return loss
    return loss, told(stats, (True if target is None else target.label >= 0) & (one != 0.0))


def told(stats: LossStats, counts: Bool[Array, "..."]) -> LossStats:
    """Stats as they are returned."""
    loss, lse, predicted = jax.lax.stop_gradient(stats)
    loss, lse = (jnp.where(counts, row, 0.0) for row in (loss, lse))
    return LossStats(loss, lse, jnp.where(counts & jnp.isfinite(lse), predicted, -1))


def read_target(
    x: Array | jax.ShapeDtypeStruct,
    labels: LabelArray,
    weight: FloatArray | None,
    options: LossOptions,
    sample_weight: Float[Array, "..."] | None = None,
) -> Target | None:
    """What class indices say about logits `x`; None for class probabilities."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return None
    dtype = compute_dtype(x.dtype)
    axis, ignored, checked = options.axis, options.ignore_index, options.checked
    return read_labels(labels, axis.size(x), weight, ignored, dtype, axis.names, sample_weight, checked)


def scale_of(
    target: Target | None,
    rows: tuple[int, ...],
    classes: int,
    sample_weight: Float[Array, "..."] | None,
    reduction: Reduction,
    dtype: DTypeLike,
) -> Scale:
    """What reduces the losses of so many examples, with class indices for a target or without."""
    if target is None:
        return scale_of_all(rows, classes, sample_weight, reduction, dtype)
    return scale_of_each(target, sample_weight, reduction, dtype)


class Mixture(NamedTuple):
    """The loss of each row, as the sum of one of a class index and one of class probabilities."""

    label: Integer[Array, "..."] | None
    factors: Factors
    q: Float[Array, "..."] | None
    counts: Bool[Array, "..."] | None  # which rows have the latter; None if all do

    def rows(self, how: How, x: Logits, v: Row, stats: bool) -> tuple[Row, LossStats | None]:
        """The losses one by one, each times its weight; and stats, if they are wanted."""
        return self._added(label_losses, expected_losses, how, x, v, v, stats)

    def total(
        self, how: How, x: Logits, factor: Float[Array, ""], v: Row, stats: bool
    ) -> tuple[Float[Array, ""], LossStats | None]:
        """Their sum times a factor, whose gradient comes in the same pass."""
        return self._added(label_total, expected_total, how, x, factor * v, v, stats)

    def rows_and_gradient(self, how: How, x: Logits, scale: Row, stats: bool) -> tuple[Row, LossStats | None, Logits]:
        """The losses as they are, stats, and the gradient of the losses' sum with scales."""
        gradients, of_label, of_q = [], None, None
        if self.label is not None:
            factors = self.factors.times(scale)
            of_label, gradient = label_pass(
                how, x.dtype, x, self.label, *factors.given, stats=stats, terms=factors.terms
            )
            gradients.append(gradient)
        if self.q is not None:
            s = self._of_probabilities(scale)
            of_q, gradient = expected_pass(how, x.dtype, x, self.q, s, stats=stats)
            gradients.append(gradient)
        losses = self._losses(of_label, of_q, jnp.ones((), scale.dtype))
        return losses, self._stats(losses, of_label, of_q) if stats else None, add(gradients)

    def _added(
        self, of_labels: Any, of_probabilities: Any, how: How, x: Logits, scale: Row, v: Row, stats: bool
    ) -> tuple[Array, LossStats | None]:
        terms, of_label, of_q = [], None, None
        if self.label is not None:
            term, of_label = of_labels(how, stats, x, self.label, self.factors.times(scale))
            terms.append(term)
        if self.q is not None:
            term, of_q = of_probabilities(how, stats, x, self.q, self._of_probabilities(scale))
            terms.append(term)
        if not stats:
            return add(terms), None
        return add(terms), self._stats(self._losses(of_label, of_q, v), of_label, of_q)

    def _losses(self, of_label: Parts | None, of_q: Parts | None, v: Row) -> Row:
        """The losses, from what kernels give, each times its weight."""
        terms = []
        if self.label is not None and of_label is not None:
            terms.append(mixed(self.label, of_label, self.factors.times(v)))
        if of_q is not None:
            terms.append(times(jnp.broadcast_to(self._of_probabilities(v), of_q[0].shape), of_q[0]))
        return add(terms)

    def _stats(self, losses: Row, of_label: Parts | None, of_q: Parts | None) -> LossStats:
        parts = of_q or of_label
        assert parts is not None
        return LossStats(losses, *parts[-2:])

    def _of_probabilities(self, scale: Row) -> Row:
        return scale if self.counts is None else jnp.where(self.counts, scale, 0.0)


def mixture(
    x: Array | jax.ShapeDtypeStruct,
    labels: LabelArray,
    target: Target | None,
    where: BoolArray | None,
    weight: FloatArray | None,
    added: Added,
    axis: ClassAxis,
) -> Mixture:
    """Which losses make up cross-entropy with these labels and what is added to them."""
    dtype = compute_dtype(x.dtype)
    mass, z = (None if value is None else jnp.asarray(value, dtype) for value in added)
    if target is None:
        q = jnp.asarray(labels)
        q = q if q.dtype.itemsize < dtype.itemsize else q.astype(dtype)  # narrower ones stay as they are
        if mass is not None:
            q = (1.0 - mass) * q.astype(dtype) + _uniform(mass, x, where, axis)
        rows = axis.rows(x.shape)
        nobody = None if z is None else jnp.zeros(rows, jnp.int32)
        return Mixture(nobody, Factors(None, None, z), scale_classes(q, weight, axis), None)
    a = jnp.ones((), dtype) if mass is None else 1.0 - mass
    a = a if target.weight is None else a * target.weight
    if mass is None or (weight is None and where is None):
        return Mixture(target.label, Factors(a, mass, z), None, None)
    uniform = _uniform(mass, x, where, axis)
    q = scale_classes(uniform if uniform.ndim else jnp.full_like(x, uniform, dtype), weight, axis)
    return Mixture(target.label, Factors(a, None, z), q, target.label >= 0)


def _uniform(
    mass: Float[Array, ""], x: Array | jax.ShapeDtypeStruct, where: BoolArray | None, axis: ClassAxis
) -> Float[Array, "..."]:
    """`mass` spread evenly over the classes that are kept."""
    if where is None:
        return mass / max(axis.size(x), 1)
    keep = jnp.broadcast_to(where, x.shape)
    return jnp.where(keep, mass / jnp.maximum(axis.sum(keep), 1).astype(mass.dtype), 0.0)
