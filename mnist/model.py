"""The networks: convolutions that shrink the image early, where the time goes, one after the other."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import jaxent
from mnist.config import Config


class Layer(NamedTuple):
    """A convolution, and what it makes of the image's extent."""

    channels: int
    size: int = 3  # of the kernel
    stride: int = 1
    padding: str = "SAME"  # or "VALID", without any
    pooled: bool = False  # height and width are halved


SMALL = Layer(16, 4, stride=2), Layer(32, pooled=True), Layer(64), Layer(128, 7, padding="VALID")
WIDE = Layer(32, 4, stride=2), Layer(64, pooled=True), Layer(128), Layer(128, 7, padding="VALID")
DEEP = *WIDE[:3], Layer(128, padding="VALID"), Layer(128, padding="VALID")
FINE = Layer(32, 4, stride=2), Layer(32), Layer(64, pooled=True), Layer(96), Layer(128, padding="VALID")
NETWORKS = {"small": (SMALL,), "three": (WIDE, DEEP, FINE)}  # those that learn and predict together


class Conv(nnx.Module):
    """A layer. It adds no bias: what follows normalises.

    On a CPU the convolution is one matrix product over patches, which trains several times faster than XLA's, whose
    gradients are slow there; TPUs and GPUs have units for XLA's, and would move every patch. The parameters are the
    same, those of a linear layer.
    """

    def __init__(self, inputs: int, layer: Layer, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layer = layer
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.linear = linear(layer.size**2 * inputs, layer.channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (N, H, W, inputs) to (N, rows, columns, channels)."""
        x, kernel = (array.astype(self.linear.dtype) for array in (x, self.linear.kernel[...]))
        if self.layer.padding == "SAME":
            x = padded(x, self.layer.size, self.layer.stride)
        cpu, default = partial(product, self.layer), partial(convolution, self.layer)
        x = jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)
        return max_pool(x) if self.layer.pooled else x


def product(layer: Layer, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply every patch of images (N, H, W, inputs) by the kernel (size² inputs, channels).

    As a product of two matrices, the second lying across: so it and the kernel's gradient, which lies as the matrix
    does, take a CPU the least time.
    """
    seen = patches(x, layer.size, layer.stride)
    rows = seen.reshape(-1, seen.shape[-1])
    return jnp.einsum("rk,ck->rc", rows, kernel.T).reshape(*seen.shape[:-1], -1)


def convolution(layer: Layer, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by XLA's convolution."""
    kernel = kernel.reshape(layer.size, layer.size, x.shape[-1], layer.channels)
    strides, dimensions = [layer.stride] * 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=dimensions)


def padded(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Pad images (N, H, W, C) by 0 so that a kernel of this size visits every `stride`-th pixel."""
    margins = [(extent - 1) // stride * stride + size - extent for extent in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((margin // 2, margin - margin // 2) for margin in margins), (0, 0)))


def patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Return what a convolution's kernel sees at every position, (N, rows, columns, size² C)."""
    count, height, width, channels = x.shape
    if height == width == size:
        return x.reshape(count, 1, 1, -1)
    if channels == 1:  # few enough for XLA's convolution, forward only, to be the fastest way
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated_patches(
            x, [size] * 2, [stride] * 2, "VALID", dimension_numbers=dimensions
        )
    offsets = [(i, j) for i in range(size) for j in range(size)]
    shifts = [x[:, i : i + height - size + 1 : stride, j : j + width - size + 1 : stride] for i, j in offsets]
    return jnp.concatenate(shifts, axis=-1)


def max_pool(x: jax.Array) -> jax.Array:
    """Halve height and width. On a CPU this form's gradient is five times faster than that of reduce_window."""
    top, bottom = (jnp.maximum(x[:, i::2, ::2], x[:, i::2, 1::2]) for i in (0, 1))
    return jnp.maximum(top, bottom)


class Cnn(nnx.Module):
    """Maps images (N, 28, 28, 1) of bytes to logits (N, 10), computing in `dtype` with float32 parameters.

    Batch normalisation follows every convolution. In training it takes mean and variance of the whole batch, on
    however many devices that lies, and stores them. Predictions take those that are stored; who trains averages.
    """

    def __init__(self, rngs: nnx.Rngs, layers: Sequence[Layer] = SMALL, dtype: DTypeLike = jnp.float32) -> None:
        channels = [1, *(layer.channels for layer in layers)]
        self.convs = nnx.List([Conv(n, layer, dtype, rngs) for n, layer in zip(channels, layers, strict=False)])
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.0, dtype=dtype, rngs=rngs) for n in channels[1:]])
        self.dropout = nnx.Dropout(0.3)
        (features,) = nnx.eval_shape(lambda: self.features(jnp.zeros((1, 28, 28, 1)), training=False)).shape[1:]
        self.logits = nnx.Linear(features, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the logits; with a key, as in training: with dropout, and normalised by the batch."""
        training = dropout_key is not None
        x = (images.astype(jnp.float32) / 255 - 0.13) / 0.31  # mean and deviation of the training pixels
        x = self.dropout(self.features(x, training), deterministic=not training, rngs=dropout_key)
        return self.logits(x)

    def features(self, x: jax.Array, training: bool) -> jax.Array:
        """Return what the convolutions make of images, as one row each."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=not training))
        return x.reshape(len(x), -1)


class Committee(nnx.Module):
    """Networks that learn the same from the same images, each for itself, and predict together."""

    def __init__(
        self, rngs: nnx.Rngs, members: Sequence[Sequence[Layer]] = (SMALL,), dtype: DTypeLike = jnp.float32
    ) -> None:
        self.members = nnx.List([Cnn(rngs, layers, dtype) for layers in members])

    def __call__(self, images: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the logits (N, 10) of the mean of the members' probabilities.

        With a key, as in training, return the logits of each member, (members, N, 10).
        """
        logits = jnp.stack([member(images, dropout_key) for member in self.members])
        if dropout_key is not None:
            return logits
        log_p = jaxent.log_softmax(logits.astype(jnp.float32))
        return jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))


def make_network(config: Config) -> Committee:
    """Return the network before training, as the run's configuration wants it."""
    return Committee(nnx.Rngs(config.seed), NETWORKS[config.settings.network], config.dtype)
