"""The network against PyTorch's, and its own convolutions and pooling against XLA's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

from mnist.model import Cnn, max_pool, patches


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("extent", [7, 14])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (4, 2), (5, 2)])
def test_convolutions_and_their_gradients_equal_xlas(size, stride, extent, channels):
    kernel = jax.random.normal(jax.random.key(0), (size * size * channels, 6)) / size
    x = jax.random.normal(jax.random.key(1), (3, extent, extent, channels))

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return patches(x, size, stride) @ kernel

    def xlas(x: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = kernel.reshape(size, size, channels, 6)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions)

    (got, back), (wanted, back_wanted) = jax.vjp(ours, x, kernel), jax.vjp(xlas, x, kernel)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(2), got.shape)
    for a, b in zip(back(cotangent), back_wanted(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_pooling_equals_reduce_window():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    window = partial(jax.lax.reduce_window, init_value=-jnp.inf, computation=jax.lax.max)
    wanted = window(x, window_dimensions=(1, 2, 2, 1), window_strides=(1, 2, 2, 1), padding="SAME")
    np.testing.assert_array_equal(max_pool(x), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_are_float32_and_only_dropout_is_random(dtype):
    model = Cnn(nnx.Rngs(0), 8, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.dtype(dtype))
    np.testing.assert_array_equal(logits, model(images))
    first, second = (model(images, jax.random.key(seed)) for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, model(images, jax.random.key(0)))


COUNTS = 32 * 14 * 14, 32 * 7 * 7, 32 * 7 * 7, 32  # values that each normalisation of 32 images averages


def torch_network(model):
    """Return PyTorch's layers with the parameters of a network of width 8, without dropout."""
    torch = pytest.importorskip("torch")
    layers = torch.nn
    twin = layers.Sequential(
        layers.ZeroPad2d(1),
        layers.Conv2d(1, 8, 4, 2, bias=False),
        layers.BatchNorm2d(8),
        layers.ReLU(),
        layers.Conv2d(8, 16, 3, padding=1, bias=False),
        layers.MaxPool2d(2),
        layers.BatchNorm2d(16),
        layers.ReLU(),
        layers.Conv2d(16, 32, 3, padding=1, bias=False),
        layers.BatchNorm2d(32),
        layers.ReLU(),
        layers.Flatten(),
        layers.Linear(7 * 7 * 32, 128, bias=False),
        layers.BatchNorm1d(128),
        layers.ReLU(),
        layers.Linear(128, 10),
    )
    matrices = [conv.linear.kernel[...] for conv in (model.conv1, model.conv2, model.conv3)]
    kernels = [
        jnp.moveaxis(matrix.reshape(size, size, inputs, outputs), (3, 2), (0, 1))
        for matrix, (size, inputs, outputs) in zip(matrices, [(4, 1, 8), (3, 8, 16), (3, 16, 32)], strict=True)
    ]
    dense = model.dense.kernel[...].reshape(7, 7, 32, 128)
    weights = [*kernels, jnp.moveaxis(dense, (3, 2), (0, 1)).reshape(128, -1), model.logits.kernel[...].T]
    with torch.no_grad():
        weighted = [layer for layer in twin if isinstance(layer, (layers.Conv2d, layers.Linear))]
        for layer, weight in zip(weighted, weights, strict=True):
            layer.weight.copy_(torch.tensor(np.asarray(weight)))
        twin[-1].bias.copy_(torch.tensor(np.asarray(model.logits.bias[...])))
        for layer, norm in zip([twin[i] for i in (2, 6, 9, 13)], model.norms, strict=True):
            for name, value in {"weight": norm.scale, "bias": norm.bias}.items():
                getattr(layer, name).copy_(torch.tensor(np.asarray(value[...])))
            layer.running_mean.copy_(torch.tensor(np.asarray(norm.mean[...])))
            layer.running_var.copy_(torch.tensor(np.asarray(norm.var[...])))
    return twin


def test_the_network_equals_torchs_layers():
    torch = pytest.importorskip("torch")
    model = Cnn(nnx.Rngs(0), 8)
    rng = np.random.default_rng(0)
    for norm in model.norms:
        for value, low in ((norm.scale, 0.5), (norm.bias, -1), (norm.mean, -1), (norm.var, 0.5)):
            value[...] = jnp.asarray(rng.uniform(low, 1.5, value.shape), jnp.float32)
    model.dropout = nnx.Dropout(0.0)
    twin = torch_network(model)
    images = rng.integers(0, 256, (32, 28, 28, 1), np.uint8)
    inputs = torch.tensor((images[..., 0][:, None].astype(np.float32) / 255 - 0.13) / 0.31)

    np.testing.assert_allclose(model(images), twin.eval()(inputs).detach(), rtol=1e-4, atol=1e-4)
    for layer in twin:
        layer.momentum = 1.0  # the last batch's statistics are kept, as the network does
    np.testing.assert_allclose(model(images, jax.random.key(0)), twin.train()(inputs).detach(), rtol=1e-3, atol=1e-3)
    for norm, layer, count in zip(model.norms, [twin[i] for i in (2, 6, 9, 13)], COUNTS, strict=True):
        np.testing.assert_allclose(norm.mean[...], layer.running_mean, rtol=1e-4, atol=1e-5)
        variance = layer.running_var * (count - 1) / count  # torch keeps an estimate without bias
        np.testing.assert_allclose(norm.var[...], variance, rtol=1e-4)
