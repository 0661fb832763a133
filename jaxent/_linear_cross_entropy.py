"""Cross-entropy of a linear layer's outputs, of which only a chunk exists at a time."""

from typing import Any

from ._check import (
    AxisName,
    BoolArray,
    FloatArray,
    Implementation,
    Labels,
    Reduction,
    Scalar,
    WeightArray,
    check_axis_name,
    check_chunk_size,
    check_ignore_index,
    check_implementation,
    check_labels,
    check_layer,
    check_range,
    check_reduction,
    check_sample_weight,
    check_scalar,
    check_smoothing,
    check_weight,
)
from ._class_axis import ClassAxis, class_axis
from ._cross_entropy import added, loss_options
from ._linear_losses import Arrays, Options, linear_losses


def linear_cross_entropy(
    hidden: FloatArray,
    kernel: FloatArray,
    labels: Labels,
    *,
    bias: FloatArray | None = None,
    weight: FloatArray | None = None,
    sample_weight: WeightArray | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    where: BoolArray | None = None,
    logit_scale: Scalar | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
    return_stats: bool = False,
) -> Any:
    r"""Cross-entropy of `hidden @ kernel + bias`, holding only a chunk of these logits at any time.

    $$x_i = h_i^\top W + b, \qquad \ell_i = -w_{y_i} \log \frac{\exp(x_{i, y_i})}{\sum_k \exp(x_{ik})}$$

    Value and derivatives are those of `cross_entropy(hidden @ kernel + bias, labels, ...)`, whose docstring defines
    the options. The logits of a language model take `tokens * classes * 4` bytes, and its gradient and temporaries as
    much again; here a loop over chunks of tokens makes a chunk's logits, its losses and its share of the gradients,
    and then forgets them. Differentiating costs no further matrix product except for `reduction="none"`, where the
    logits are made once more, and gradients that are not asked for are not computed.

    Args:
        hidden: inputs of the linear layer, shape `(..., features)`; a floating dtype.
        kernel: its weights, shape `(features, classes)`, as Flax has them; a floating dtype. Pass the transpose of
            PyTorch's weight or of an embedding.
        labels: class indices (an integer dtype, the shape of `hidden` without its last axis; an int for a single
            token) or class probabilities (a floating dtype, shape `(..., classes)`).
        bias: shape `(classes,)`.
        weight: one weight per class, shape `(classes,)`.
        sample_weight: one weight or truth value per token, of the shape of class indices or with 1 in place of some
            sizes. Each loss is multiplied by it. A token of weight 0 is as good as ignored; the derivative by its
            weight is its loss all the same, and where that is asked for, work is done for all tokens.
        ignore_index: tokens with this label add nothing, whatever `hidden` holds there; None ignores none. Where all
            tokens are on one device, no work is done for them but to fill up the last chunk.
        reduction: `"none"`, `"mean"` or `"sum"`.
        label_smoothing: share of the label, in [0, 1], that is spread evenly over the classes; a number, or a scalar
            of a floating dtype, as a schedule makes it.
        z_loss: factor of `logsumexp(logits) ** 2`, which is added to each token's loss; a number or a scalar
            likewise.
        where: boolean mask of shape `(classes,)`; the loss is as if classes where it is False did not exist, as those
            that fill up a vocabulary. A label on such a class has the loss inf.
        logit_scale: multiplies the logits, bias included, before all else; a number, or a scalar of a floating dtype,
            which is differentiable.
        softcap: replaces logits by `softcap * tanh(logits / softcap)`.
        chunk_size: how many tokens' logits to hold at once; None chooses it from the shapes.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the classes are
            sharded. `kernel`, `bias`, `weight` and class probabilities are then this device's classes, while class
            indices count through all of them; the reduction is over this device's tokens.
        implementation: who computes the losses of a chunk, see `cross_entropy`.
        return_stats: return also what is known of each token when its logits have been seen, at the price of no
            matrix product, see `LossStats`: its loss, its logsumexp, and the class that it predicts. There are no
            derivatives through these.

    Returns:
        A scalar, or one loss per token for `reduction="none"`; float32, or float64 for float64 arguments. Logits and
            gradients of half-precision arguments are accumulated in float32, too. With `return_stats` a pair of it
            and `LossStats`, as `jax.value_and_grad(..., has_aux=True)` wants it.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an option or a sharding does not fit, or a label lies outside `[0, classes)`; see
            `cross_entropy` for labels that are traced.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> hidden = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # 2 tokens, 2 features
        >>> kernel = jnp.array([[0.5, 0.0, -1.0], [0.0, 1.0, 0.5]])  # 3 classes
        >>> labels = jnp.array([1, 0])
        >>> loss, gradients = jax.value_and_grad(jaxent.linear_cross_entropy, argnums=(0, 1))(hidden, kernel, labels)
        >>> print(f"{loss:.4f}", f"{jaxent.cross_entropy(hidden @ kernel, labels):.4f}")
        0.1957 0.1957
        >>> [gradient.shape for gradient in gradients]
        [(2, 2), (2, 3)]

    References:
        [torch.nn.functional.linear_cross_entropy](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear_cross_entropy.html);
        Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models";
        Hsu et al. 2024, "Liger Kernel"; softcap: Gemma Team 2024, "Gemma 2".
    """
    check_layer(hidden, kernel, bias, where, logit_scale, softcap)
    axis = ClassAxis(hidden.ndim - 1, check_axis_name(axis_name))
    ignore_index = check_ignore_index(ignore_index)
    check_reduction(reduction)
    shape = (*hidden.shape[:-1], kernel.shape[1])
    labels = check_labels("hidden @ kernel", shape, labels, axis, ignore_index, movable=False)
    check_weight(weight, kernel.shape[1])
    check_sample_weight(sample_weight, hidden.shape[:-1])
    check_range(labels, kernel.shape[1] * axis.parts(), ignore_index, sample_weight)
    check_smoothing(label_smoothing)
    check_scalar("z_loss", z_loss)
    check_implementation(implementation)
    loss = loss_options(class_axis(1, axis.names), ignore_index, reduction, implementation, bool(return_stats))
    options = Options(loss, None if softcap is None else float(softcap), check_chunk_size(chunk_size))
    of_losses = where, weight, labels, added(label_smoothing, z_loss)
    arrays = Arrays(hidden, kernel, bias, logit_scale, *of_losses)  # pyright: ignore[reportArgumentType]
    return linear_losses(arrays, sample_weight, options)
