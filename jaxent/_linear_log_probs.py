"""Log-probabilities and entropies under a linear layer's outputs, of which only a chunk exists at a time."""

from functools import partial
from typing import Literal, overload

import jax
from jaxtyping import Array, Float, Integer

from ._check import (
    AnyArray,
    AxisName,
    BoolArray,
    FloatArray,
    Implementation,
    Scalar,
    check_axis_name,
    check_chunk_size,
    check_ignore_index,
    check_implementation,
    check_indices,
    check_layer,
    check_range,
)
from ._class_axis import ClassAxis, class_axis
from ._cross_entropy import added, loss_options
from ._linear_losses import Arrays, Options, linear_losses


@overload
def linear_log_probs(
    hidden: FloatArray,
    kernel: FloatArray,
    labels: Integer[AnyArray, "..."] | int,
    *,
    bias: FloatArray | None = None,
    ignore_index: int | None = -100,
    where: BoolArray | None = None,
    logit_scale: Scalar | None = None,
    softcap: float | None = None,
    entropy: Literal[False] = False,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]: ...


@overload
def linear_log_probs(
    hidden: FloatArray,
    kernel: FloatArray,
    labels: Integer[AnyArray, "..."] | int,
    *,
    bias: FloatArray | None = None,
    ignore_index: int | None = -100,
    where: BoolArray | None = None,
    logit_scale: Scalar | None = None,
    softcap: float | None = None,
    entropy: Literal[True],
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]: ...


def linear_log_probs(
    hidden: FloatArray,
    kernel: FloatArray,
    labels: Integer[AnyArray, "..."] | int,
    *,
    bias: FloatArray | None = None,
    ignore_index: int | None = -100,
    where: BoolArray | None = None,
    logit_scale: Scalar | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Log-probabilities of labels under softmax of `hidden @ kernel + bias`, holding only a chunk of these logits.

    $$x_i = h_i^\top W + b, \qquad \log p_{i, y_i} = x_{i, y_i} - \log \sum_k \exp(x_{ik}), \qquad
      H_i = -\sum_k p_{ik} \log p_{ik}$$

    What losses of preferences (DPO) and of reinforcement learning (PPO, GRPO) need of a language model. Gradients,
    for any cotangents of both results, make a chunk's logits once more: four matrix products in all.

    Args:
        hidden: inputs of the linear layer, shape `(..., features)`; a floating dtype.
        kernel: its weights, shape `(features, classes)`; a floating dtype.
        labels: class indices, of the shape of `hidden` without its last axis; an int for a single token.
        bias: shape `(classes,)`.
        ignore_index: tokens with this label, as those of a prompt or of padding, have 0 for either result, whatever
            `hidden` holds there; None ignores none. Where all tokens are on one device, no work is done for them but
            to fill up the last chunk.
        where: boolean mask of shape `(classes,)`; classes where it is False do not exist. A label on such a class has
            the log-probability -inf.
        logit_scale: multiplies the logits, bias included, before all else, as the reciprocal of a temperature; a
            number, or a scalar of a floating dtype, which is differentiable.
        softcap: replaces logits by `softcap * tanh(logits / softcap)`.
        entropy: whether to return the entropy of each token's distribution, in nats, too.
        chunk_size: how many tokens' logits to hold at once; None chooses it from the shapes.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the classes are
            sharded, see `linear_cross_entropy`.
        implementation: who computes the log-probabilities of a chunk, see `cross_entropy`.

    Returns:
        A log-probability per token, the shape of `labels`, or with `entropy` a pair of it and an entropy per token;
        float32, or float64 for float64 arguments.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an option or a sharding does not fit, or a label lies outside `[0, classes)`; see
            `cross_entropy` for labels that are traced.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> hidden = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # 2 tokens, 2 features
        >>> kernel = jnp.array([[0.5, 0.0, -1.0], [0.0, 1.0, 0.5]])  # 3 classes
        >>> log_probs, entropies = jaxent.linear_log_probs(hidden, kernel, jnp.array([1, 0]), entropy=True)
        >>> [f"{log_prob:.4f}" for log_prob in log_probs], [f"{entropy:.4f}" for entropy in entropies]
        (['-0.3064', '-0.0851'], ['0.7520', '0.3045'])

    References:
        [torch.distributions.Categorical](https://docs.pytorch.org/docs/stable/distributions.html#categorical), its
        `log_prob` and `entropy`. The loss of `linear_cross_entropy` is the negative log-probability.
    """
    check_layer(hidden, kernel, bias, where, logit_scale, softcap)
    axis = ClassAxis(hidden.ndim - 1, check_axis_name(axis_name))
    ignore_index = check_ignore_index(ignore_index)
    indices = check_indices("hidden @ kernel", (*hidden.shape[:-1], kernel.shape[1]), labels, axis, ignore_index)
    check_range(indices, kernel.shape[1] * axis.parts(), ignore_index, None)
    check_implementation(implementation)
    loss = loss_options(class_axis(1, axis.names), ignore_index, "none", implementation)
    options = Options(loss, None if softcap is None else float(softcap), check_chunk_size(chunk_size), bool(entropy))
    arrays = Arrays(hidden, kernel, bias, logit_scale, where, None, indices, added(0.0, 0.0))  # pyright: ignore[reportArgumentType]
    return _log_probs(arrays, options)


@partial(jax.jit, static_argnums=1)
def _log_probs(arrays: Arrays, options: Options) -> Array | tuple[Array, Array]:
    rows = linear_losses(arrays, None, options)
    return (0.0 - rows[..., 0], rows[..., 1]) if options.entropy else 0.0 - rows
