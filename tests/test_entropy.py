"""The entropy of a softmax, against 50 digits and torch. Sharding is in _sharding_cases.py."""

import _exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_accuracy import _cases

import jaxent

pytestmark = pytest.mark.more(cases=1)

# Where a probability is subnormal, and so 0 to XLA, terms of 87 times it are missing.
TINY = 200 * np.finfo(np.float32).tiny


def rows(classes):
    """Margins from 0 to 87, ties, offsets; and rows that are nearly uniform."""
    logits = _cases(classes)[0][:: max(classes // 2, 1)]
    small = np.random.default_rng(classes).standard_normal((4, classes))
    return np.concatenate([logits, small * [[1e-1], [1e-3], [1e-5], [0.0]]]).astype(np.float32)


def error(got, want):
    """Relative to each row's largest entry: entries themselves pass through 0."""
    difference, size = (np.abs(x).reshape(len(x), -1).max(1) for x in (np.float64(got) - want, want))
    return np.max(np.where(size > TINY, difference / np.maximum(size, TINY), 0.0))


@pytest.mark.parametrize("classes", [2, 5, 10, 100])
def test_value_and_gradient(classes):
    x = rows(classes)
    value, gradient = jax.vmap(jax.value_and_grad(jaxent.entropy))(x)
    assert _exact.relative_error(value, np.array([_exact.entropy(row) for row in x]), TINY) <= 4e-6
    assert error(gradient, np.stack([_exact.entropy_gradient(row) for row in x])) <= 1e-5


@pytest.mark.parametrize(
    "mode", [jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_hessian(classes, mode):
    x = rows(classes)
    got = jax.jit(jax.vmap(mode(jaxent.entropy)))(x)
    assert error(got, np.stack([_exact.entropy_hessian(row) for row in x])) <= 1e-5


@pytest.mark.more
def test_third_derivatives_and_loops():
    """Of torch's `Categorical`; rules are not forgotten in the loops of a first derivative."""
    x = np.random.default_rng(0).standard_normal((3, 4))

    def theirs(x):
        return torch.distributions.Categorical(logits=x).entropy().sum()

    def in_loop(x):
        return jax.lax.scan(jax.checkpoint(lambda h, row: (h + jaxent.entropy(row), None)), 0.0, x)[0]

    with jax.enable_x64(True):
        for ours in (lambda x: jnp.sum(jaxent.entropy(x)), in_loop):
            want = torch.autograd.functional.hessian(theirs, torch.from_numpy(x))
            np.testing.assert_allclose(jax.jacrev(jax.grad(ours))(x), want, rtol=1e-12, atol=1e-15)
            row = torch.from_numpy(x[0])
            of_hessian = torch.autograd.functional.jacobian(
                lambda row: torch.autograd.functional.hessian(theirs, row, create_graph=True), row
            )
            third = jax.jacfwd(jax.hessian(lambda row, f=ours: f(row[None])))(x[0])
            np.testing.assert_allclose(third, of_hessian, rtol=1e-12, atol=1e-14)


def test_hidden_classes_have_no_probability():
    x = np.random.default_rng(0).standard_normal((5, 3, 6)).astype(np.float32)
    where = np.random.default_rng(1).random((5, 1, 6)) < 0.5
    where[0] = False

    def plain(x):
        p = jax.nn.softmax(x, axis=0, where=where)
        return jnp.sum(jax.scipy.special.entr(p), 0)

    got, pull = jax.vjp(lambda x: jaxent.entropy(x, 0, where=where), np.where(where, x, np.nan))
    want, pull_plain = jax.vjp(plain, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(*(np.nan_to_num(f(jnp.ones_like(want))[0]) for f in (pull, pull_plain)), atol=1e-6)
    nothing = np.zeros_like(where)
    assert not np.any(jaxent.entropy(x, 0, where=nothing))
    assert not np.any(jax.grad(lambda x: jnp.sum(jaxent.entropy(x, 0, where=nothing)))(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_half_precision_is_computed_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9)), dtype)
    f = jax.value_and_grad(lambda x: jnp.sum(jaxent.entropy(x)))
    value, gradient = f(x)
    want, exact = f(x.astype(jnp.float32))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(gradient, exact.astype(dtype))


def test_reverse_mode_keeps_the_logits_alone():
    x = jnp.ones((4, 9), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(jaxent.entropy, x)[1])
    assert [(k.shape, k.dtype) for k in kept if k.ndim] == [(x.shape, x.dtype)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, 2.0],), {}, TypeError, "logits"),
        ((np.ones((2, 3)),), {"axis": 2}, ValueError, r"axis must lie in \[-2, 1\]"),
        ((np.ones((2, 3)),), {"where": np.ones((2, 4), bool)}, ValueError, "where must broadcast"),
        ((np.ones((2, 3)),), {"axis_name": "class"}, ValueError, "axis_name must name mesh axes"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jaxent.entropy(*arguments, **options)
