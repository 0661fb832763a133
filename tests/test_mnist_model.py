"""The network against PyTorch's, and its own convolutions and pooling against XLA's."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

pytest.importorskip("flax")

from flax import nnx

from mnist.model import DEEP, NETWORKS, SMALL, Cnn, Committee, Layer, convolution, max_pool, padded, product

pytestmark = pytest.mark.more(cases=1)


@pytest.mark.parametrize("layers", [layers for members in NETWORKS.values() for layers in members])
def test_networks_for_cpus_and_for_accelerators_are_the_same(layers, monkeypatch):
    """The same parameters give the same logits and gradients, whichever way the machine takes."""
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), np.uint8)
    model, params, others = nnx.split(Cnn(nnx.Rngs(0), layers), nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(model, params, others, copy=True)(images, jax.random.key(0)).astype(jnp.float32)
        return -jax.nn.log_softmax(logits)[:, 3].mean(), logits

    def accelerators(*args, cpu, default):
        del cpu
        return default(*args)

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    monkeypatch.setattr(jax.lax, "platform_dependent", accelerators)
    (_, logits_there), grads_there = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, logits_there, atol=1e-4)
    for here, there in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_there), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-4 * float(jnp.abs(there).max()))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("extent", [7, 14])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (4, 2), (5, 2)])
@pytest.mark.parametrize("way", [product, convolution])
def test_convolutions_and_their_gradients_equal_xlas(way, size, stride, extent, channels):
    kernel = jax.random.normal(jax.random.key(0), (size * size * channels, 6)) / size
    x = jax.random.normal(jax.random.key(1), (3, extent, extent, channels))

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return way(Layer(6, size, stride), padded(x, size, stride), kernel)

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
    model = Cnn(nnx.Rngs(0), SMALL, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.dtype(dtype))
    np.testing.assert_array_equal(logits, model(images))
    first, second = (model(images, jax.random.key(seed)) for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, model(images, jax.random.key(0)))


def torch_network(model, layers):
    """Return PyTorch's layers with the parameters of a network, without dropout."""
    torch = pytest.importorskip("torch")
    parts, inputs = [], 1
    for layer, conv, norm in zip(layers, model.convs, model.norms, strict=True):
        padding = (layer.size - layer.stride) // 2 if layer.padding == "SAME" else 0
        parts.append(torch.nn.Conv2d(inputs, layer.channels, layer.size, layer.stride, padding, bias=False))
        matrix = conv.linear.kernel[...].reshape(layer.size, layer.size, inputs, layer.channels)
        set_to(parts[-1].weight, jnp.moveaxis(matrix, (3, 2), (0, 1)))
        parts += [torch.nn.MaxPool2d(2)] * layer.pooled
        parts += [torch.nn.BatchNorm2d(layer.channels, momentum=1.0), torch.nn.ReLU()]  # it keeps the last batch's
        for name, value in {"weight": norm.scale, "bias": norm.bias, "running_mean": norm.mean}.items():
            set_to(getattr(parts[-2], name), value[...])
        set_to(parts[-2].running_var, norm.var[...])
        inputs = layer.channels
    features, classes = model.logits.kernel.shape
    parts += [torch.nn.Flatten(), torch.nn.Linear(features, classes)]
    side = math.isqrt(features // inputs)
    kernel = model.logits.kernel[...].reshape(side, side, inputs, classes)
    set_to(parts[-1].weight, jnp.moveaxis(kernel, (3, 2), (0, 1)).reshape(classes, -1))
    set_to(parts[-1].bias, model.logits.bias[...])
    return torch.nn.Sequential(*parts)


def set_to(tensor, array):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        tensor.copy_(torch.tensor(np.asarray(array)))


@pytest.mark.parametrize("layers", [layers for members in NETWORKS.values() for layers in members])
def test_the_network_equals_torchs_layers(layers):
    torch = pytest.importorskip("torch")
    model = Cnn(nnx.Rngs(0), layers)
    rng = np.random.default_rng(0)
    for norm in model.norms:
        for value, low in ((norm.scale, 0.5), (norm.bias, -1), (norm.mean, -1), (norm.var, 0.5)):
            value[...] = jnp.asarray(rng.uniform(low, 1.5, value.shape), jnp.float32)
    model.dropout = nnx.Dropout(0.0)
    twin = torch_network(model, layers)
    images = rng.integers(0, 256, (32, 28, 28, 1), np.uint8)
    inputs = torch.tensor((images[..., 0][:, None].astype(np.float32) / 255 - 0.13) / 0.31)

    np.testing.assert_allclose(model(images), twin.eval()(inputs).detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(images, jax.random.key(0)), twin.train()(inputs).detach(), rtol=1e-3, atol=1e-3)
    norms = [part for part in twin if isinstance(part, torch.nn.BatchNorm2d)]
    for norm, part, extent in zip(model.norms, norms, extents(layers), strict=True):
        np.testing.assert_allclose(norm.mean[...], part.running_mean, rtol=1e-4, atol=1e-5)
        count = 32 * extent**2
        variance = part.running_var * (count - 1) / count  # torch keeps an estimate without bias
        np.testing.assert_allclose(norm.var[...], variance, rtol=1e-4)


def extents(layers, extent=28):
    """Yield the images' height after each layer."""
    for layer in layers:
        extent = extent // layer.stride if layer.padding == "SAME" else extent - layer.size + 1
        extent //= 1 + layer.pooled
        yield extent


@pytest.mark.more
def test_a_committee_learns_apart_and_predicts_together():
    committee = Committee(nnx.Rngs(0), [SMALL, SMALL, DEEP])
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    each = np.stack([member(images) for member in committee.members])
    assert (each[0] != each[1]).any()
    assert (each[1] != each[2]).any()
    p = scipy.special.softmax(each.astype(np.float64), axis=-1).mean(axis=0)
    np.testing.assert_allclose(committee(images), np.log(p), rtol=1e-5, atol=1e-5)
    key = jax.random.key(0)
    each = np.stack([member(images, key) for member in committee.members])
    np.testing.assert_array_equal(committee(images, key), each)
