"""The divergence of a student's softmax from a teacher's."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _kernels as kernels
from ._check import (
    Axis,
    AxisName,
    BoolArray,
    FloatArray,
    Reduction,
    WeightArray,
    check_class_axis,
    check_floating,
    check_number,
    check_reduction,
    check_sample_weight,
    check_where,
)
from ._class_axis import ClassAxis
from ._kernels import divergences as plain
from ._kernels import xla
from ._kernels.divergences import log_of_mixture, log_of_student
from ._linear import linear, times
from ._nll import reduced, scale_of_all
from ._softmax import add, hide_classes, log_softmax_tangent, softmax_tangent


def distillation_loss(
    logits: FloatArray,
    teacher_logits: FloatArray,
    *,
    axis: Axis = -1,
    temperature: float = 1.0,
    beta: float = 0.0,
    where: BoolArray | None = None,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
    train_teacher: bool = False,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Generalised Jensen-Shannon divergence between the softmaxes of a student's logits and of a teacher's.

    $$p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(x / T), \quad r = \beta p + (1 - \beta) q, \qquad
      \ell = \begin{cases} \mathrm{KL}(p, q) & \beta = 0 \\ \mathrm{KL}(q, p) & \beta = 1 \\
      \beta \mathrm{KL}(p, r) + (1 - \beta) \mathrm{KL}(q, r) & \text{between} \end{cases}, \qquad
      \mathrm{KL}(p, q) = \sum_k p_k \log \frac{p_k}{q_k}$$

    where $0 \log 0$ is 0. Relative accuracy is kept where student and teacher nearly agree, as they do at the end of
    a training, and at any margin.

    Args:
        logits: the student's; a floating dtype, any shape with at least one axis.
        teacher_logits: the teacher's, of the same shape.
        axis: the class axis, or several that count as one.
        temperature: what both logits are divided by. Neither the loss nor its gradient is multiplied by its square.
        beta: 0 for the forward divergence, which covers all that the teacher does; 1 for the reverse one, which seeks
            what it does most; or between. Towards the ends the divergence between goes to 0, not to these two.
        where: boolean mask that broadcasts to `logits`; classes where it is False do not exist. A row without any
            class left adds nothing.
        sample_weight: one weight or truth value per example, of the shape of `logits` without `axis` or with 1 in
            place of some sizes. An example of weight 0 adds nothing, whatever its logits are.
        reduction: `"none"`, `"mean"` over the examples, by their weights, or `"sum"`.
        train_teacher: whether the teacher's logits get gradients, too; otherwise they are constants.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits`, `teacher_logits` and `where` are then this device's classes.

    Returns:
        A scalar, or one divergence per example for `reduction="none"`; float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an axis, the reduction, `beta` or `temperature` does not fit.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> teacher = jnp.array([2.0, 1.0, 0.0])
        >>> student = teacher + jnp.array([1e-4, 0.0, 0.0])
        >>> f"{jaxent.distillation_loss(student, teacher):.4g}"  # in float32
        '1.111e-09'

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Agarwal et al. 2024, "On-Policy
        Distillation of Language Models" (GKD), equation 1;
        [torch.nn.functional.kl_div](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html).
    """
    check_floating("logits", logits)
    check_floating("teacher_logits", teacher_logits)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape {logits.shape} of logits, got shape {teacher_logits.shape}"
        )
    check_where("logits", logits.shape, where)
    classes, merged = check_class_axis("logits", logits.shape, axis, axis_name)
    logits, teacher_logits, where = map(merged, (logits, teacher_logits, where))
    check_reduction(reduction)
    check_sample_weight(sample_weight, classes.rows(logits.shape))
    options = _Options(classes, check_divergence(temperature, beta), reduction, bool(train_teacher))
    return _distillation_loss(logits, teacher_logits, where, sample_weight, options)


class Divergence(NamedTuple):
    """Which one."""

    temperature: float
    beta: float


def check_divergence(temperature: float, beta: float) -> Divergence:
    """Require numbers that make a divergence."""
    if not 0.0 < check_number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0.0 <= check_number("beta", beta) <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    return Divergence(float(temperature), float(beta))


class _Options(NamedTuple):
    """What is compiled in."""

    axis: ClassAxis
    divergence: Divergence
    reduction: Reduction
    train_teacher: bool


@partial(jax.jit, static_argnums=4)
def _distillation_loss(
    logits: FloatArray,
    teacher_logits: FloatArray,
    where: BoolArray | None,
    sample_weight: WeightArray | None,
    options: _Options,
) -> Float[Array, "..."]:
    axis = options.axis
    dtype = jnp.result_type(*(kernels.compute_dtype(y.dtype) for y in (logits, teacher_logits)))
    x, empty = hide_classes(jnp.asarray(logits), where, axis)
    teacher, _ = hide_classes(jnp.asarray(teacher_logits), where, axis)
    if not options.train_teacher:
        teacher = jax.lax.stop_gradient(teacher)
    if dtype.itemsize > 4:
        x, teacher = x.astype(dtype), teacher.astype(dtype)
    losses = divergences(axis, options.divergence, x, teacher)
    v = None if sample_weight is None else jnp.broadcast_to(jnp.asarray(sample_weight, dtype), losses.shape)
    if empty is not None:
        v = jnp.where(empty, 0.0, jnp.ones((), dtype) if v is None else v)
    scale = scale_of_all(losses.shape, axis.size(x), v, options.reduction, dtype)
    return reduced(losses if v is None else times(v, losses), scale)


def divergences(axis: ClassAxis, which: Divergence, x: Array, teacher: Array) -> Float[Array, "..."]:
    """The divergence of each row."""
    return kernels.divergence(x, teacher, axis=axis, **which._asdict())


def divergences_and_gradient(
    axis: ClassAxis, which: Divergence, x: Array, teacher: Array, scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """It, and the gradient of their sum with scales; this device's part if the classes are split."""
    return divergences(axis, which, x, teacher), axis.expand(scale) * _of_student(axis, *which, x, teacher)


def gradient_of_student(which: Divergence, axis: ClassAxis, x: Array, teacher: Array) -> Float[Array, "..."]:
    """The gradient of each divergence in plain JAX, for any object that reduces as `axis` does."""
    return _of_student(axis, *which, x, teacher, functions=_Functions(plain, xla.softmax_derivative))


# Rules. A gradient is written with the ratio of both probabilities, and moves as that does.

Gradient = Callable[[Array, Array], Array]


class _Functions(NamedTuple):
    """What gradients are made of: as plain JAX, or as primitives, which have derivatives."""

    ratios: Any  # has `difference` and `log_ratio`
    softmax_tangent: Callable[..., Array]


_DIFFERENTIABLE = _Functions(kernels, softmax_tangent)


@kernels.divergence.defjvp
def _divergence_jvp(
    primals: Any, tangents: Any, *, axis: ClassAxis, temperature: float, beta: float, **how: Any
) -> tuple[Array, Array]:
    terms: list[Array] = []
    for of, t in zip((_of_student, _of_teacher), tangents, strict=True):
        if t is None:
            continue
        gradient = partial(of, axis, temperature, beta)
        along, back = partial(_along, axis, gradient), partial(_back, axis, gradient, t.dtype)
        # JAX knows how sums over devices are transposed.
        tangent = jax.checkpoint(along)(*primals, t) if axis.names else linear(along, back, primals, t)
        terms.append(axis.total(tangent))
    return kernels.divergence(*primals, axis=axis, temperature=temperature, beta=beta, **how), add(terms)


def _along(axis: ClassAxis, gradient: Gradient, x: Array, teacher: Array, t: Array) -> Float[Array, "..."]:
    """This device's part of the derivative along `t`."""
    g = gradient(x, teacher)
    return jnp.sum(g * t.astype(g.dtype), axis.index)


def _back(axis: ClassAxis, gradient: Gradient, dtype: Any, x: Array, teacher: Array, g: Array) -> Float[Array, "..."]:
    """Its transpose, where a row whose cotangent is 0 may hold anything."""
    g = axis.expand(g)
    senseless = jnp.isnan(x) | jnp.isnan(teacher) | (x == jnp.inf) | (teacher == jnp.inf)
    senseless |= (x == -jnp.inf) != (teacher == -jnp.inf)  # may be infinitely far from each other
    senseless |= (axis.max(x) == -jnp.inf) | (axis.max(teacher) == -jnp.inf)
    hidden = (g == 0.0) & (axis.sum(senseless) > 0)
    x, teacher = (jnp.where(hidden, jnp.zeros((), y.dtype), y) for y in (x, teacher))
    return (g * gradient(x, teacher)).astype(dtype)


def _of_student(
    axis: ClassAxis,
    temperature: float,
    beta: float,
    x: Array,
    teacher: Array,
    functions: _Functions = _DIFFERENTIABLE,
) -> Float[Array, "..."]:
    """The gradient by the student's logits."""
    if beta == 0.0:
        return functions.ratios.difference(x, teacher, axis=axis, temperature=temperature) / temperature
    v = functions.ratios.log_ratio(x, teacher, axis=axis, temperature=temperature)
    by_probability = v if beta == 1.0 else (1.0 - beta) * log_of_student(v, beta)
    return _pulled(axis, temperature, x, by_probability, functions)


def _of_teacher(axis: ClassAxis, temperature: float, beta: float, x: Array, teacher: Array) -> Float[Array, "..."]:
    """The gradient by the teacher's."""
    if beta == 1.0:
        return -kernels.difference(x, teacher, axis=axis, temperature=temperature) / temperature
    v = kernels.log_ratio(x, teacher, axis=axis, temperature=temperature)
    return _pulled(axis, temperature, teacher, -v if beta == 0.0 else -beta * log_of_mixture(v, beta))


def _pulled(
    axis: ClassAxis, temperature: float, x: Array, by_probability: Array, functions: _Functions = _DIFFERENTIABLE
) -> Float[Array, "..."]:
    """A gradient by probabilities as one by the logits that make them."""
    by_probability = jnp.where(x == -jnp.inf, 0.0, by_probability)
    wide = kernels.wide(x) / temperature
    return functions.softmax_tangent(wide, by_probability, axis=axis, dtype=wide.dtype) / temperature


@kernels.log_ratio.defjvp
def _log_ratio_jvp(primals: Any, tangents: Any, **options: Any) -> tuple[Array, Array]:
    return kernels.log_ratio(*primals, **options), _moved(log_softmax_tangent, primals, tangents, **options)


@kernels.difference.defjvp
def _difference_jvp(primals: Any, tangents: Any, **options: Any) -> tuple[Array, Array]:
    return kernels.difference(*primals, **options), _moved(softmax_tangent, primals, tangents, **options)


def _moved(
    rule: Callable[..., Array], primals: Any, tangents: Any, *, axis: ClassAxis, temperature: float, **_: Any
) -> Array:
    """What the student's tangent moves, less what the teacher's does."""
    terms: list[Array] = []
    for x, t, sign in zip(primals, tangents, (1.0, -1.0), strict=True):
        if t is not None:
            wide = kernels.wide(x) / temperature
            terms.append(rule(wide, t.astype(wide.dtype) * (sign / temperature), axis=axis, dtype=wide.dtype))
    return add(terms)
