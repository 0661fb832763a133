"""The divergence of a student from a teacher, of whose logits only a chunk exists at a time."""

import jax
from jaxtyping import Array, Float

from ._check import (
    AxisName,
    BoolArray,
    FloatArray,
    Reduction,
    WeightArray,
    check_axis_name,
    check_chunk_size,
    check_layer,
    check_product,
    check_reduction,
    check_sample_weight,
)
from ._class_axis import class_axis
from ._cross_entropy import added, loss_options
from ._distillation import check_divergence
from ._linear_losses import Arrays, Options, Teacher, linear_losses


def linear_distillation_loss(
    hidden: FloatArray,
    kernel: FloatArray,
    teacher_hidden: FloatArray,
    teacher_kernel: FloatArray,
    *,
    bias: FloatArray | None = None,
    teacher_bias: FloatArray | None = None,
    temperature: float = 1.0,
    beta: float = 0.0,
    where: BoolArray | None = None,
    sample_weight: WeightArray | None = None,
    reduction: Reduction = "mean",
    train_teacher: bool = False,
    chunk_size: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""`distillation_loss` of two linear layers' outputs, holding only a chunk of either's logits at any time.

    $$x_i = h_i^\top W + b, \qquad t_i = g_i^\top V + c$$

    Value and derivatives are those of `distillation_loss(hidden @ kernel + bias, teacher_hidden @ teacher_kernel +
    teacher_bias, ...)`, whose docstring has the formulas. A loop over chunks of tokens makes a chunk's logits of
    both, its divergences and its share of the student's gradients, as `linear_cross_entropy` does: four matrix
    products, and six for `reduction="none"`, where both logits are made once more. On TPUs and GPUs it is two each
    more, for a smaller part of the memory, unless the compiler may split arrays over several of these: the gradients
    are made in a loop of their own, over chunks of classes.

    Args:
        hidden: inputs of the student's last layer, shape `(..., features)`; a floating dtype.
        kernel: its weights, shape `(features, classes)`; a floating dtype.
        teacher_hidden: inputs of the teacher's, shape `(..., teacher_features)`, of the same tokens.
        teacher_kernel: shape `(teacher_features, classes)`.
        bias: shape `(classes,)`.
        teacher_bias: shape `(classes,)`.
        temperature: what both logits are divided by.
        beta: 0 for the forward divergence, 1 for the reverse one, or between.
        where: boolean mask of shape `(classes,)`; classes where it is False do not exist.
        sample_weight: one weight or truth value per token, of the shape of `hidden` without its last axis or with 1
            in place of some sizes. Where all tokens are on one device, no work is done for those of weight 0, as
            padding has, but to fill up the last chunk.
        reduction: `"none"`, `"mean"` over the tokens, by their weights, or `"sum"`.
        train_teacher: whether the teacher's arrays get gradients, too, at the price of an array like each kernel.
        chunk_size: how many tokens' logits to hold at once; None chooses it from the shapes.
        axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them, major first) over which the classes are
            sharded, of both kernels, of both biases and of `where`; the reduction is over this device's tokens.

    Returns:
        A scalar, or one divergence per token for `reduction="none"`; float32, or float64 for float64 arguments.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, an option or a sharding does not fit.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxent
        >>> hidden = jnp.array([[1.0, 2.0], [3.0, -1.0]])  # 2 tokens, 2 features
        >>> kernel = jnp.array([[0.5, 0.0, -1.0], [0.0, 1.0, 0.5]])  # 3 classes
        >>> teacher_hidden, teacher_kernel = jnp.array([[1.0], [-1.0]]), jnp.array([[2.0, 0.0, 1.0]])
        >>> arrays = hidden, kernel, teacher_hidden, teacher_kernel
        >>> loss, gradients = jax.value_and_grad(jaxent.linear_distillation_loss, argnums=(0, 1))(*arrays)
        >>> print(f"{loss:.4f}", f"{jaxent.distillation_loss(hidden @ kernel, teacher_hidden @ teacher_kernel):.4f}")
        1.5504 1.5504

    References:
        Agarwal et al. 2024, "On-Policy Distillation of Language Models"; Hsu et al. 2024, "Liger Kernel".
    """
    check_layer(hidden, kernel, bias, where, None, None)
    check_product(teacher_hidden, teacher_kernel, teacher_bias, "teacher_")
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must be of the same tokens as hidden of shape {hidden.shape}, "
            f"got shape {teacher_hidden.shape}"
        )
    if teacher_kernel.shape[1] != kernel.shape[1]:
        raise ValueError(
            f"teacher_kernel must have the {kernel.shape[1]} classes of kernel, got shape {teacher_kernel.shape}"
        )
    check_reduction(reduction)
    check_sample_weight(sample_weight, hidden.shape[:-1])
    loss = loss_options(class_axis(1, check_axis_name(axis_name)), None, reduction, None)
    options = Options(loss, None, check_chunk_size(chunk_size), divergence=check_divergence(temperature, beta))
    of_teacher = (teacher_hidden, Teacher(teacher_kernel, teacher_bias))  # pyright: ignore[reportArgumentType]
    if not train_teacher:
        of_teacher = jax.lax.stop_gradient(of_teacher)
    states, teacher = of_teacher
    arrays = Arrays(hidden, kernel, bias, None, where, None, states, added(0.0, 0.0), teacher)  # pyright: ignore[reportArgumentType]
    return linear_losses(arrays, sample_weight, options)
