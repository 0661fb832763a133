"""The entropy of a softmax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _kernels as kernels
from ._check import (
    Axis,
    AxisName,
    BoolArray,
    FloatArray,
    check_class_axis,
    check_floating,
    check_where,
)
from ._class_axis import ClassAxis
from ._linear import linear
from ._softmax import hide_classes, softmax_tangent


def entropy(
    logits: FloatArray, axis: Axis = -1, *, where: BoolArray | None = None, axis_name: AxisName | None = None
) -> Float[Array, "..."]:
    r"""Entropy of the softmax of logits, in nats.

    $$H = -\sum_k p_k \log p_k, \qquad p = \mathrm{softmax}(x), \qquad
      \frac{\partial H}{\partial x_k} = -p_k \Big(x_k - \sum_j p_j x_j\Big)$$

    where $0 \log 0$ is 0. Neither the value nor a derivative is the difference of nearly equal numbers, as
    `-sum(p * log(p))` and its gradient are for rows that are nearly uniform.

    Args:
        logits: scores of a floating dtype; any shape with at least one axis.
        axis: the class axis, or several that count as one.
        where: boolean mask that broadcasts to `logits`; classes where it is False have probability 0, and a row
            without any class left has the entropy 0.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the class axis
            is sharded. `logits` and `where` are then this device's classes, and the entropy is that of all.

    Returns:
        An entropy for each row, between 0 and the logarithm of the number of classes; the shape of `logits` without
        `axis`, float32, or float64 for float64 input.

    Raises:
        TypeError: `logits` is not floating, or `where` is not boolean.
        ValueError: `axis` is out of range, `where` does not broadcast to `logits`, or `axis_name` is unknown.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> print(jaxent.entropy(jnp.array([[0.0, 0.0], [0.0, 20.0]])))
        [6.9314718e-01 4.3284228e-08]
        >>> [f"{g:.4f}" for g in jax.grad(jaxent.entropy)(jnp.array([0.0, 1.0]))]
        ['0.1966', '-0.1966']

    References:
        [torch.distributions.Categorical.entropy](https://docs.pytorch.org/docs/stable/distributions.html#categorical);
        Shannon 1948, "A Mathematical Theory of Communication".
    """
    check_floating("logits", logits)
    check_where("logits", logits.shape, where)
    classes, merged = check_class_axis("logits", logits.shape, axis, axis_name)
    return _entropy(merged(logits), merged(where), classes)


@partial(jax.jit, static_argnums=2)
def _entropy(logits: FloatArray, where: BoolArray | None, axis: ClassAxis) -> Float[Array, "..."]:
    x, empty = hide_classes(jnp.asarray(logits), where, axis)
    h = kernels.entropy(x, axis=axis)
    return h if empty is None else jnp.where(empty, 0.0, h)


def entropies(axis: ClassAxis, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The entropy of each row."""
    return kernels.entropy(x, axis=axis)


def entropies_and_gradient(
    axis: ClassAxis, x: Float[Array, "..."], scale: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """It, and the gradient of their sum with scales; this device's part if the classes are split."""
    return entropies(axis, x), _back(axis, {}, x, scale)


@kernels.entropy.defjvp
def _entropy_jvp(primals: Any, tangents: Any, *, axis: ClassAxis, **how: Any) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    along, back = (partial(f, axis, how) for f in (_along, _back))
    # JAX knows how sums over devices are transposed.
    tangent = jax.checkpoint(along)(x, t) if axis.names else linear(along, back, (x,), t)
    return kernels.entropy(x, axis=axis, **how), axis.total(tangent)


def _along(axis: ClassAxis, how: dict[str, Any], x: Array, t: Array) -> Float[Array, "..."]:
    """This device's part of the derivative along `t`."""
    gradient = _gradient(axis, how, x)
    return jnp.sum(gradient * t.astype(gradient.dtype), axis.index)


def _back(axis: ClassAxis, how: dict[str, Any], x: Array, g: Array) -> Float[Array, "..."]:
    return (axis.expand(g) * _gradient(axis, how, x)).astype(x.dtype)


def _gradient(axis: ClassAxis, how: dict[str, Any], x: Array) -> Float[Array, "..."]:
    """That is what `softmax` loses along the logits themselves; relative to the largest, whose class may dominate."""
    own = kernels.wide(x)
    own = jnp.where(own == -jnp.inf, 0.0, own - axis.max(jax.lax.stop_gradient(own)))
    return -softmax_tangent(x, own, axis=axis, dtype=own.dtype, **how)
