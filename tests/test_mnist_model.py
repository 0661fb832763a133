"""The network's own convolutions and pooling against XLA's."""

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
