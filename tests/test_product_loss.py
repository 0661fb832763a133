"""linear_cross_entropy as accelerators compute it, whose logits never leave the matrix product. It runs anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from jaxent import linear_cross_entropy
from jaxent._class_axis import ClassAxis
from jaxent._kernels.xla import LabelSums, label_rows
from jaxent._product_loss import Layer, _sums, center

N, D, C = 40, 8, 50
fused = partial(linear_cross_entropy, implementation="xla")


def draw(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((N, D), (D, C)))
    return hidden, kernel, jnp.asarray(rng.integers(C, size=N))


def exact(hidden, kernel, labels):
    """Loss of each token and gradients of their sum, in NumPy's float64."""
    h, w, y = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64), np.asarray(labels)
    x = h @ w
    own = x[np.arange(N), y]
    others = logsumexp(np.where(np.arange(C) == y[:, None], -np.inf, x), 1)
    g = np.exp(log_softmax(x, 1))
    g[np.arange(N), y] = -np.exp(others - np.logaddexp(own, others))
    return np.logaddexp(0.0, others - own), g @ w.T, h.T @ g


def tries(layer, hidden, labels):
    """How often logits are made anew, relative to their maximum."""
    axis = ClassAxis(1)

    def run(layer, hidden, labels):
        counted = []
        relative = jax.lax.while_loop

        def spy(cond, body, state):
            state = relative(cond, body, state)
            counted.append(state.tries)
            return state

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "while_loop", spy)
            _sums(layer, center(layer, axis), hidden, labels, axis, None)
        return counted[0]

    return int(jax.jit(run)(layer, hidden, labels))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0, 1000.0])
def test_logits_of_any_size(scale, dtype):
    """Also beyond the range of exponentials, where they are made once more: each loss and both gradients."""
    hidden, kernel, labels = draw(dtype=dtype)
    kernel *= jnp.asarray(scale, dtype)
    labels = labels.at[::2].set(jnp.argmax(jnp.asarray(hidden, np.float32) @ kernel.astype(np.float32), 1)[::2])
    expected, *gradients = exact(hidden, kernel, labels)
    losses = fused(hidden, kernel, labels, reduction="none")
    size = np.abs(np.asarray(hidden, float) @ np.asarray(kernel, float)).max(1)
    # A logit is known to a rounding of its size, and so is a loss; but where the label leads by far, the loss is as
    # small as the others' probability, and that is known relatively.
    known = 4.0 * 2.0**-23 * (size + 1.0) * np.minimum(expected, 1.0) + 4e-7 * expected
    np.testing.assert_array_less(np.abs(losses - expected), known + 1e-37)
    rounding = 2.0**-9 if dtype == jnp.bfloat16 else 4 * 2.0**-23 * (size.max() + 1.0)
    found = jax.grad(partial(fused, reduction="sum"), (0, 1))(hidden, kernel, labels)
    for g, e in zip(found, gradients, strict=True):
        assert np.linalg.norm(np.asarray(g, float) - e) <= 2.0 * rounding * np.linalg.norm(e)


def test_when_logits_are_made_twice():
    hidden, kernel, labels = draw()
    assert tries(Layer(kernel, None), hidden, labels) == 0
    assert tries(Layer(kernel + 1000.0, None), hidden, labels) == 0  # what all logits share does not matter
    assert tries(Layer(100.0 * kernel, None), hidden, labels) == 1
    assert tries(Layer(kernel.at[:, 3].set(jnp.nan), None), hidden, labels) == 1


@pytest.mark.parametrize("hidden_bias", [-np.inf, -1e9, -1e30])
def test_a_bias_that_hides_classes_costs_nothing(hidden_bias):
    """Of a padded vocabulary, say: neither a second product, nor accuracy."""
    hidden, kernel, labels = draw()
    labels %= 40
    bias = jnp.where(jnp.arange(C) < 40, jnp.linspace(-8.0, 5.0, C), hidden_bias)
    assert tries(Layer(kernel, bias), hidden, labels) == 0
    expected = -log_softmax(np.asarray(hidden, float) @ np.asarray(kernel, float) + np.asarray(bias, float), 1)
    losses = fused(hidden, kernel, labels, bias=bias, reduction="none")
    np.testing.assert_allclose(losses, expected[np.arange(N), labels], rtol=1e-5)


@given(st.integers(0, 2**31), st.floats(-3, 1.2), st.floats(-3, 1.2), st.integers(1, C))
def test_exponentials_never_underflow(seed, kernel_size, bias_size, shown):
    """Their sum is at least the number of classes, by Jensen's inequality."""
    rng = np.random.default_rng(seed)
    hidden, kernel, bias = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((N, D), (D, C), C))
    bias = jnp.where(jnp.arange(C) < shown, bias * 10**bias_size, -jnp.inf)
    layer, axis = Layer(kernel * 10**kernel_size, bias), ClassAxis(1)
    near = center(layer, axis).of(hidden)
    excess = logsumexp(np.asarray(layer.logits(hidden), float) - np.asarray(near, float), axis=1) - np.log(C)
    assert (excess >= -1e-4 * (1.0 + np.abs(near[:, 0]))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["hidden", "kernel", "bias"])
def test_what_is_not_finite(value, where):
    """As PyTorch's value is, or NaN where infinities of both signs meet: of these tokens and no others."""
    hidden, kernel, labels = draw()
    bias = jnp.zeros(C)
    if where == "hidden":
        hidden = hidden.at[3, 2].set(value)
    elif where == "kernel":
        kernel = kernel.at[2, 3].set(value)
    else:
        bias = bias.at[3].set(value)
    labels = jnp.where(labels == 3, 4, labels)
    h, w, b = (torch.tensor(np.asarray(x)) for x in (hidden, kernel, bias))
    expected = torch.nn.functional.cross_entropy(
        h @ w + b, torch.tensor(np.asarray(labels), dtype=torch.int64), reduction="none"
    )
    losses = fused(hidden, kernel, labels, bias=bias, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_sums_are_relative_to_any_number():
    """What the loss is made of does not depend on the reference."""
    hidden, kernel, labels = draw()
    axis = ClassAxis(1)
    sums, _ = _sums(Layer(kernel, None), center(Layer(kernel, None), axis), hidden, labels, axis, None)
    assert isinstance(sums, LabelSums)
    shift = 10.0 * np.random.default_rng(1).standard_normal((N, 1))
    logits = np.asarray(hidden, float) @ np.asarray(kernel, float)
    total = np.exp(sums.d) + sums.others
    np.testing.assert_allclose(np.log(total) + sums.reference, logsumexp(logits, 1, keepdims=True), rtol=1e-6)
    factor = np.exp(shift).astype(np.float32)
    moved = LabelSums(sums.reference - shift, sums.d + shift, sums.others * factor, sums.mean + shift)
    for a, b in zip(label_rows(sums, labels, axis=axis), label_rows(moved, labels, axis=axis), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_at_once_and_in_chunks(dtype, ignore_index):
    """Few tokens of many features are one chunk if none can be ignored. Value and gradients are the same."""
    rng = np.random.default_rng(2)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((64, 96), (96, 70)))
    kernel /= jnp.asarray(8.0, dtype)  # logits of size 1
    labels = jnp.asarray(rng.integers(70, size=64))
    run = [
        jax.value_and_grad(partial(fused, ignore_index=ignore_index, chunk_size=size), (0, 1))
        for size in (None, 64, 10)
    ]
    value, gradients = run[0](hidden, kernel, labels)
    for f in run[1:]:
        other, others = f(hidden, kernel, labels)
        np.testing.assert_allclose(value, other, rtol=1e-6)
        for a, b in zip(gradients, others, strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            assert np.linalg.norm(a - b) <= 4 * jnp.finfo(dtype).eps * np.linalg.norm(b)
