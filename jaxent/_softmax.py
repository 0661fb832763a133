"""softmax and log_softmax, whose derivatives keep their relative accuracy at any margin.

Softmax does not change when a constant is added to all logits. The rules below use that freedom to measure tangents
against the dominant class, so that `1 - p` of a class with p close to 1 is never formed (docs/numerics.md). What a
gradient keeps is the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from . import _kernels as kernels
from ._check import (
    Axis,
    AxisName,
    BoolArray,
    FloatArray,
    Implementation,
    check_class_axis,
    check_dtype,
    check_floating,
    check_implementation,
    check_where,
)
from ._class_axis import ClassAxis, split_axes
from ._linear import linear


def softmax(
    logits: FloatArray,
    axis: Axis = -1,
    *,
    where: BoolArray | None = None,
    dtype: DTypeLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]:
    r"""Probabilities proportional to the exponential of the logits.

    $$p_k = \frac{\exp(x_k)}{\sum_j \exp(x_j)}$$

    Args:
        logits: scores of a floating dtype; any shape with at least one axis.
        axis: the class axis, or several that count as one.
        where: boolean mask that broadcasts to `logits`; classes where it is False get probability 0 and no
            gradient, and a row without any class left gets zeros.
        dtype: dtype of the result, that of `logits` by default. As in PyTorch, logits are cast to it first;
            half precision is computed in float32 in any case.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits` and `where` are then this device's classes, and so is the result.
        implementation: who computes it: `"xla"` is XLA from plain JAX, `"native"` the kernels for CPUs, `"pallas"`
            those for TPUs and GPUs, None the best for the machine.

    Returns:
        Array of the shape of `logits`, summing to 1 along `axis`.

    Raises:
        TypeError: `logits` or `dtype` is not floating, or `where` is not boolean.
        ValueError: `axis` is out of range, `where` does not broadcast to `logits`, or `axis_name` or
            `implementation` is unknown.

    Examples:
        >>> import jax.numpy as jnp, jaxent
        >>> print(jaxent.softmax(jnp.array([1.0, 2.0, 3.0])).round(4))
        [0.09   0.2447 0.6652]

    References:
        [torch.nn.functional.softmax](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html).
        Unlike `jax.nn.softmax`, derivatives stay accurate where one class dominates.
    """
    return _apply(kernels.softmax, logits, axis, where, dtype, axis_name, implementation)


def log_softmax(
    logits: FloatArray,
    axis: Axis = -1,
    *,
    where: BoolArray | None = None,
    dtype: DTypeLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]:
    r"""Logarithms of the softmax probabilities, without computing the probabilities first.

    $$\log p_k = x_k - \log \sum_j \exp(x_j)$$

    Args:
        logits: scores of a floating dtype; any shape with at least one axis.
        axis: the class axis, or several that count as one.
        where: boolean mask that broadcasts to `logits`; classes where it is False get -inf and no gradient.
        dtype: dtype of the result, that of `logits` by default. As in PyTorch, logits are cast to it first;
            half precision is computed in float32 in any case.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits` and `where` are then this device's classes, and so is the result.
        implementation: who computes it: `"xla"` is XLA from plain JAX, `"native"` the kernels for CPUs, `"pallas"`
            those for TPUs and GPUs, None the best for the machine.

    Returns:
        Array of the shape of `logits`.

    Raises:
        TypeError: `logits` or `dtype` is not floating, or `where` is not boolean.
        ValueError: `axis` is out of range, `where` does not broadcast to `logits`, or `axis_name` or
            `implementation` is unknown.

    Examples:
        >>> import jax.numpy as jnp, jaxent
        >>> print(jaxent.log_softmax(jnp.array([0.0, 20.0])))
        [-2.0000000e+01 -2.0611537e-09]

    References:
        [torch.nn.functional.log_softmax](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html);
        Blanchard, Higham & Higham 2021, "Accurately computing the log-sum-exp and softmax functions".
    """
    return _apply(kernels.log_softmax, logits, axis, where, dtype, axis_name, implementation)


def _apply(
    function: Callable[..., Array],
    logits: FloatArray,
    axis: Axis,
    where: BoolArray | None,
    dtype: DTypeLike | None,
    axis_name: AxisName | None,
    implementation: Implementation | None,
) -> Float[Array, "..."]:
    check_floating("logits", logits)
    check_dtype(dtype)
    check_where("logits", logits.shape, where)
    check_implementation(implementation)
    classes, merged = check_class_axis("logits", logits.shape, axis, axis_name)
    out = _of_shown(function, merged(logits), merged(where), classes, dtype, implementation)
    return split_axes(out, axis, logits.shape) if isinstance(axis, tuple) else out


@partial(jax.jit, static_argnums=(0, 3, 4, 5), inline=kernels.INLINE)
def _of_shown(
    function: Callable[..., Array],
    logits: FloatArray,
    where: BoolArray | None,
    axis: ClassAxis,
    dtype: DTypeLike | None,
    implementation: Implementation | None,
) -> Float[Array, "..."]:
    x = jnp.asarray(logits)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    if dtype != jnp.float32 or x.dtype.itemsize > 4:  # narrower logits are computed in float32 as they come
        x = x.astype(dtype)
    if where is None:
        return function(x, axis=axis, dtype=dtype, implementation=implementation)
    shown, _ = hide_classes(x, where, axis)
    out = keep_where(where, function(shown, axis=axis, dtype=dtype, implementation=implementation))
    return out if function is kernels.softmax else out + _impossible(where, dtype)


def hide_classes(
    x: Float[Array, "..."], where: BoolArray | None, axis: ClassAxis
) -> tuple[Float[Array, "..."], Bool[Array, "..."] | None]:
    """Logits with masked classes at -inf, and which rows have no class left.

    Those become zeros here, so that nothing downstream meets a NaN; callers overwrite their results.
    """
    if where is None:
        return x, None
    if jnp.finfo(x.dtype).bits < 16:  # not all of these know infinity
        x = x.astype(jnp.float32)
    empty = ~jax.lax.stop_gradient(axis.sum(jnp.broadcast_to(where, x.shape)) > 0)
    return keep_where(where, x) + _impossible(where | empty, x.dtype), axis.squeeze(empty)


def _impossible(where: BoolArray, dtype: DTypeLike) -> Float[Array, "..."]:
    """The logarithm of a truth value."""
    return jnp.where(where, jnp.zeros((), dtype), jnp.asarray(-jnp.inf, dtype))


def keep_where(where: BoolArray, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` with zeros elsewhere. Its transpose keeps the mask as the user gave it."""
    return linear(_keep, _keep, (jnp.asarray(where),), x)


def _keep(where: Array, x: Array) -> Array:
    return jnp.where(where, x, jnp.zeros((), x.dtype))


def add(terms: list[Array]) -> Array:
    """The sum of one or more terms."""
    return sum(terms[1:], terms[0])


# Rules. `how` is the axis and the implementation. What is linear in t says what its transpose is, so that reverse
# mode keeps the logits alone, and is differentiated along x like any function.


@kernels.softmax.defjvp
def _softmax_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return kernels.softmax(x, dtype=dtype, **how), softmax_tangent(x, t, dtype=dtype, **how)


@kernels.log_softmax.defjvp
def _log_softmax_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return kernels.log_softmax(x, dtype=dtype, **how), log_softmax_tangent(x, t, dtype=dtype, **how)


def softmax_tangent(x: Array, t: Array, *, axis: ClassAxis, dtype: DTypeLike, **how: Any) -> Float[Array, "..."]:
    """`p * (t - sum(p * t))`, its own transpose."""
    if axis.names:
        return jax.checkpoint(partial(_tangent_of_parts, times_p=True, axis=axis, dtype=dtype, **how))(x, t)
    derivative = partial(kernels.softmax_derivative, axis=axis, **how)
    return linear(partial(derivative, dtype=dtype), partial(derivative, dtype=t.dtype), (x,), t)


def log_softmax_tangent(x: Array, t: Array, *, axis: ClassAxis, dtype: DTypeLike, **how: Any) -> Float[Array, "..."]:
    """`t - sum(p * t)`, whose transpose is `log_softmax_cotangent`."""
    if axis.names:
        return jax.checkpoint(partial(_tangent_of_parts, times_p=False, axis=axis, dtype=dtype, **how))(x, t)
    forward = partial(kernels.log_softmax_derivative, axis=axis, dtype=dtype, **how)
    return linear(forward, partial(kernels.log_softmax_pullback, axis=axis, dtype=t.dtype, **how), (x,), t)


def log_softmax_cotangent(
    x: Array, g: Array, *, axis: ClassAxis, dtype: DTypeLike, **how: Any
) -> Float[Array, "..."]:
    """`g - p * sum(g)`, for classes that are whole."""
    backward = partial(kernels.log_softmax_pullback, axis=axis, dtype=dtype, **how)
    return linear(backward, partial(kernels.log_softmax_derivative, axis=axis, dtype=g.dtype, **how), (x,), g)


@kernels.softmax_derivative.defjvp
def _softmax_derivative_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Array, Array]:
    (x, t), (x_dot, t_dot) = primals, tangents
    terms, axis = [], how["axis"]
    if t_dot is not None:
        terms.append(softmax_tangent(x, t_dot, dtype=dtype, **how))
    if x_dot is not None:
        p, dp = probabilities(x, x_dot, **how)
        u = _relative(p, t.astype(p.dtype), axis)
        terms.append(linear(partial(_curve, axis), partial(_curve_back, axis), (p, u), dp).astype(dtype))
    return kernels.softmax_derivative(x, t, dtype=dtype, **how), add(terms)


@kernels.log_softmax_derivative.defjvp
def _log_softmax_derivative_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Array, Array]:
    (x, t), (x_dot, t_dot) = primals, tangents
    terms, axis = [], how["axis"]
    if t_dot is not None:
        terms.append(log_softmax_tangent(x, t_dot, dtype=dtype, **how))
    if x_dot is not None:
        p, dp = probabilities(x, x_dot, **how)
        of_row = sum_possible(p, dp * _relative(p, t.astype(p.dtype), axis), axis)
        terms.append(jnp.broadcast_to(-of_row, x.shape).astype(dtype))
    return kernels.log_softmax_derivative(x, t, dtype=dtype, **how), add(terms)


@kernels.log_softmax_pullback.defjvp
def _log_softmax_pullback_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Array, Array]:
    (x, g), (x_dot, g_dot) = primals, tangents
    terms = []
    if g_dot is not None:
        terms.append(log_softmax_cotangent(x, g_dot, dtype=dtype, **how))
    if x_dot is not None:
        _, dp = probabilities(x, x_dot, **how)
        terms.append((-dp * how["axis"].sum(g.astype(dp.dtype))).astype(dtype))
    return kernels.log_softmax_pullback(x, g, dtype=dtype, **how), add(terms)


def probabilities(x: Array, x_dot: Array, **how: Any) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Those of all classes and their tangent, in the dtype that is computed in."""
    dtype = kernels.compute_dtype(x.dtype)
    return kernels.softmax(x, dtype=dtype, **how), softmax_tangent(x, x_dot, dtype=dtype, **how)


def sum_possible(p: Float[Array, "..."], terms: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """The sum of each row's terms, of which those of a class without probability are 0, whatever they are.

    Without the select, XLA's CPU backend of JAX 0.10 gets `sum(a * b) * c` wrong where `vmap` has a batch of b alone.
    """
    return axis.sum(jnp.where(p > 0.0, terms, 0.0))


def _curve(axis: ClassAxis, p: Array, u: Array, dp: Array) -> Float[Array, "..."]:
    """How `p * (u - sum(p * u))` moves with p."""
    return dp * (u - sum_possible(p, p * u, axis)) - p * sum_possible(p, dp * u, axis)


def _curve_back(axis: ClassAxis, p: Array, u: Array, h: Array) -> Float[Array, "..."]:
    """The transpose."""
    return h * (u - sum_possible(p, p * u, axis)) - u * sum_possible(p, p * h, axis)


def _relative(p: Float[Array, "..."], t: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """Tangents relative to that of the class with more than half of the probability, whose own is an exact zero.

    With `t - t` there instead, the transpose would add 1 and subtract it again, and round the small remainder away.
    """
    dominant = p > 0.5
    return jnp.where(dominant, 0.0, t - axis.sum(jnp.where(dominant, t, 0.0)))


def _tangent_of_parts(
    x: Array, t: Array, *, times_p: bool, axis: ClassAxis, dtype: DTypeLike, **how: Any
) -> Float[Array, "..."]:
    """Tangents where the classes are in parts: JAX knows how sums over devices are transposed."""
    p = kernels.softmax(x, axis=axis, dtype=kernels.compute_dtype(x.dtype), **how)
    u = _relative(p, t.astype(p.dtype), axis)
    u = u - sum_possible(p, p * u, axis)
    return (p * u if times_p else u).astype(dtype)
