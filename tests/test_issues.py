"""Reproducers of open bug reports against other implementations; here each must give the right answer."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxent

pytestmark = pytest.mark.more(cases=1)

MODES = pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])


@MODES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pytorch_113708_log_softmax_of_a_dominant_class(dtype, mode):
    """The largest entry could be 2**103 (float32) to 2**1022 (float64) times more accurate."""
    with jax.enable_x64(True):
        for smallest in (np.finfo(dtype).eps, np.finfo(dtype).smallest_normal):
            x = np.array([1 - np.log(smallest), 0], dtype)
            got = mode(jaxent.log_softmax)(x)[0]
            with mpmath.workdps(700):
                want = float(-mpmath.log1p(mpmath.exp(-mpmath.mpf(float(x[0])))))
            # Half an ulp of the margin: 88 in float32, 709 in float64.
            assert got.dtype == dtype
            if abs(want) >= np.finfo(dtype).smallest_normal:
                np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == np.float32 else 1e-12)
            else:
                assert abs(got) <= np.finfo(dtype).smallest_normal


TAIL = 5.551115123125776e-17


@MODES
def test_jax_40384_log_softmax_gradient_component(mode):
    """jax.nn.log_softmax's VJP drops the first component of a float64 gradient of 5.6e-17."""
    with jax.enable_x64(True):
        z = jnp.array([37.42994775023705, 0.0])
        got = np.asarray(mode(jax.grad(lambda z: jaxent.log_softmax(z) @ jnp.array([1.0, 0.0])))(z))
    np.testing.assert_allclose(got, [TAIL, -TAIL], rtol=1e-14)
    assert got[0] + got[1] == 0


@MODES
def test_jax_40386_softmax_gradient_component(mode):
    """The same of jax.nn.softmax."""
    with jax.enable_x64(True):
        z = jnp.array([37.42994775023705, 0.0])
        got = np.asarray(mode(jax.grad(lambda z: jaxent.softmax(z) @ jnp.array([1.0, 0.0])))(z))
    np.testing.assert_allclose(got, [TAIL, -TAIL], rtol=1e-14)
    assert got[0] + got[1] == 0


@MODES
@pytest.mark.parametrize("direction", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize(
    ("function", "sign"),
    [
        (lambda x: jaxent.softmax(x)[0], 1),
        (lambda x: -jaxent.log_softmax(x)[0], -1),
        (lambda x: jaxent.cross_entropy(x, jnp.array(0)), -1),
    ],
    ids=["softmax", "log_softmax", "cross_entropy"],
)
def test_jax_40344_gradients_respect_translation(function, sign, direction, mode):
    """A common shift changes nothing, so gradients sum to zero; jax.nn.softmax's sum to -4.2e-18."""
    with jax.enable_x64(True):
        got = np.asarray(mode(direction(function))(jnp.array([40.0, 0.0])))
    tail = sign * math.exp(-40.0) / (1.0 + math.exp(-40.0)) ** 2
    np.testing.assert_allclose(got, [tail, -tail], rtol=1e-14)
    assert got[0] + got[1] == 0


@MODES
@pytest.mark.parametrize("size", [2**16, 2**17])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_jax_40409_float16_log_softmax_gradient(dtype, size, mode):
    """Rows of 2**16 float16 entries give all-NaN gradients, though the true ones lie in [-14, 1]."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)
    got = mode(jax.grad(lambda x: jaxent.log_softmax(x).astype(jnp.float32).sum()))(x)
    powers = np.exp(np.float64(x))
    want = 1 - size * powers / powers.sum()
    assert got.dtype == dtype
    # The gradient is a difference with terms up to its largest entry: one ulp of the dtype at that entry.
    np.testing.assert_allclose(np.float64(got), want, atol=float(jnp.finfo(dtype).eps) * np.abs(want).max())


@MODES
def test_jax_40409_float16_sum_in_its_own_dtype(mode):
    """As reported, the sum itself in float16: it overflows, its gradient must not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=2**16), jnp.float16)
    got = mode(jax.grad(lambda x: jaxent.log_softmax(x).sum()))(x)
    assert jnp.all(jnp.isfinite(got))


@MODES
def test_jax_13529_equal_logits_give_no_gradient_to_a_uniform_cotangent(mode):
    """All logits equal: the gradient of the summed log-probabilities is 0, jax.nn's was rounding noise."""
    got = mode(jax.grad(lambda x: jaxent.log_softmax(x).sum()))(jnp.zeros(1024))
    assert jnp.max(jnp.abs(got)) <= 1024 * jnp.finfo(jnp.float32).eps


def test_optax_1185_label_out_of_range():
    """A label beyond the classes gave a silent NaN; concrete ones raise, naming the position and the value."""
    logits = jnp.array([[0.2, 0.1, 0.4, 0.6]])
    with pytest.raises(ValueError, match="4"):
        jaxent.cross_entropy(logits, jnp.array([4]))
    assert jnp.isnan(jax.jit(jaxent.cross_entropy)(logits, jnp.array([4])))
