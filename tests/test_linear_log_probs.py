"""linear_log_probs against torch of full logits, at margins against 50 digits, and what it costs.

Its loops are those of linear_cross_entropy, whose tests have the options one by one. Sharding is in
_sharding_cases.py.
"""

import itertools

import _exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_linear_cross_entropy import multiplications

import jaxent
from jaxent import linear_log_probs

pytestmark = pytest.mark.more(cases=1)

N, D, C = 7, 4, 5
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS, SCALE = 1.5 * RNG.normal(size=(N, D)), RNG.normal(size=(D, C)), RNG.normal(size=C), 0.7
LABELS = np.array([3, 0, -100, 1, 1, 2, 0])
KEPT = np.arange(C) != 4
COTANGENTS = RNG.normal(size=(2, N))
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "where": {"where": KEPT},
    "chunks": {"chunk_size": 3},
    "all": {"softcap": 3.0, "where": KEPT, "chunk_size": 3},
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def ours(hidden, kernel, bias, scale, *, labels=LABELS, cotangents=COTANGENTS, **options):
    """Some function of both results."""
    log_probs, entropies = linear_log_probs(
        hidden, kernel, labels, bias=bias, logit_scale=scale, entropy=True, **options
    )
    return jnp.vdot(cotangents[0], jnp.sin(log_probs)) + jnp.vdot(cotangents[1], entropies**2)


def theirs(hidden, kernel, bias, scale, *, softcap=None, where=None, chunk_size=None):
    logits = scale * (hidden @ kernel + bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if where is not None:
        logits = logits[:, torch.from_numpy(where)]  # the last class goes
    counts = torch.from_numpy(LABELS >= 0)
    log_p = torch.log_softmax(logits, 1)
    log_probs, entropies = log_p[range(N), LABELS.clip(0)], -(log_p.exp() * log_p).sum(1)
    of_each = torch.from_numpy(COTANGENTS)
    terms = of_each[0] * torch.sin(log_probs) + of_each[1] * entropies**2
    return terms[counts].sum()


ARRAYS = HIDDEN, KERNEL, BIAS, np.float64(SCALE)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_derivatives(options, implementation, float64):
    def close(got, want):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-12, atol=1e-13)

    def f(*arrays):
        return ours(*arrays, **options, implementation=implementation)

    def g(*arrays):
        return theirs(*arrays, **options)

    tensors = tuple(map(torch.tensor, ARRAYS))
    close(f(*ARRAYS), g(*tensors))
    want = torch.autograd.functional.jacobian(g, tensors)
    for derivative in (jax.grad, jax.jacfwd):
        jax.tree.map(close, jax.jit(derivative(f, (0, 1, 2, 3)))(*ARRAYS), want)
    hessian = torch.autograd.functional.hessian(g, tensors)
    jax.tree.map(close, jax.jit(jax.hessian(f, (0, 1, 2, 3)))(*ARRAYS), hessian)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_in_every_order(outer, inner, float64):
    got = jax.jit(outer(inner(ours, (0, 1)), (0, 1)))(*ARRAYS)
    want = torch.autograd.functional.hessian(theirs, tuple(map(torch.tensor, ARRAYS)))
    for i, j in itertools.product(range(2), repeat=2):
        np.testing.assert_allclose(got[i][j], want[i][j].numpy(), rtol=1e-12, atol=1e-13)


def test_without_entropy_it_is_the_loss_without_its_sign():
    log_probs = linear_log_probs(HIDDEN, KERNEL, LABELS)
    losses = jaxent.linear_cross_entropy(HIDDEN, KERNEL, LABELS, reduction="none")
    np.testing.assert_array_equal(log_probs, -losses)
    np.testing.assert_array_equal(log_probs, linear_log_probs(HIDDEN, KERNEL, LABELS, entropy=True)[0])
    assert linear_log_probs(HIDDEN[0], KERNEL, 3).shape == ()
    assert [x.shape for x in linear_log_probs(HIDDEN[None, :0], KERNEL, LABELS[None, :0], entropy=True)] == [
        (1, 0)
    ] * 2


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_accurate_at_large_margins(implementation):
    """With the identity for a kernel hidden states are logits."""
    classes, margins = 6, np.arange(0, 88, 3, dtype=np.float32)
    logits = np.random.default_rng(0).uniform(-1, 1, (len(margins), classes)).astype(np.float32)
    logits[np.arange(len(margins)), np.arange(len(margins)) % classes] += margins
    labels = np.arange(len(margins)) % classes
    identity = np.eye(classes, dtype=np.float32)

    def both(x):
        return linear_log_probs(x, identity, labels, entropy=True, implementation=implementation)

    log_probs, entropies = both(logits)
    tiny = 200 * np.finfo(np.float32).tiny  # where a probability is subnormal, terms of 87 times it are missing
    exact = [_exact.loss_and_gradient(row, label) for row, label in zip(logits, labels, strict=True)]
    assert _exact.relative_error(-log_probs, np.array([loss for loss, _ in exact]), tiny) <= 1e-5
    assert _exact.relative_error(entropies, np.array([_exact.entropy(row) for row in logits]), tiny) <= 1e-5
    of_log_probs, of_entropies = (jax.grad(lambda x, i=i: jnp.sum(both(x)[i]))(logits) for i in range(2))
    assert _exact.relative_error(-of_log_probs, np.stack([gradient for _, gradient in exact]), tiny) <= 1e-5
    want = np.stack([_exact.entropy_gradient(row) for row in logits])
    size = np.maximum(np.abs(want).max(1), tiny)  # entries pass through 0
    assert np.max(np.abs(of_entropies - want).max(1) / size) <= 1e-5


@pytest.mark.parametrize("entropy", [False, True])
def test_four_matrix_products_and_none_for_ignored_tokens(entropy):
    tokens, features, classes, chunk_size = 60, 48, 80, 10

    def f(hidden, kernel, labels):
        results = linear_log_probs(hidden, kernel, labels, entropy=entropy, chunk_size=chunk_size)
        return sum(jnp.sum(jnp.sin(x)) for x in (results if entropy else [results]))

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((tokens, features), (features, classes))]
    labels = jax.ShapeDtypeStruct((tokens,), np.int32)
    program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes, labels).compile().as_text()
    assert multiplications(program, tokens // chunk_size) == 4 * tokens * features * classes
    assert multiplications(program, 0) == 0


def test_memory():
    """As in linear_cross_entropy: a fraction of the logits that are never there at once."""
    tokens, features, classes = 2048, 128, 16384

    def f(hidden, kernel, labels):
        log_probs, entropies = linear_log_probs(hidden, kernel, labels, entropy=True)
        return jnp.sum(jnp.exp(log_probs)) + jnp.sum(entropies)

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((tokens, features), (features, classes))]
    labels = jax.ShapeDtypeStruct((tokens,), np.int32)
    memory = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.15 * tokens * classes * 4


@pytest.mark.parametrize("implementation", [None, pytest.param("xla", marks=pytest.mark.more)])
def test_an_ignored_token_may_hold_anything(implementation, float64):
    ignored = LABELS < 0
    broken = np.where(ignored[:, None], np.nan, HIDDEN)
    options = {"labels": LABELS, "implementation": implementation}
    for derivative in (lambda f: f, lambda f: jax.grad(f, (0, 1, 2, 3)), jax.hessian):
        f = derivative(lambda *arrays: ours(*arrays, **options))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), f(broken, *ARRAYS[1:]), f(*ARRAYS)
        )
    results = linear_log_probs(broken, KERNEL, LABELS, entropy=True)
    assert all(np.all(x[ignored] == 0.0) for x in results)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    hidden, kernel, bias = (jnp.asarray(x, dtype) for x in (HIDDEN, KERNEL, BIAS))
    wide = [x.astype(jnp.float32) for x in (hidden, kernel, bias)]
    scale = jnp.float32(SCALE)
    got, want = (jax.value_and_grad(ours, (0, 1, 2))(*arrays, scale) for arrays in ((hidden, kernel, bias), wide))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=4 * eps, atol=4 * eps)


def test_vmap_and_scan(float64):
    stacked = np.stack([HIDDEN, HIDDEN[::-1]])

    def gradient(hidden):
        return jax.grad(ours)(hidden, *ARRAYS[1:])

    want = [gradient(hidden) for hidden in stacked]
    for got in (jax.vmap(gradient)(stacked), jax.lax.map(gradient, stacked)):
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-12, atol=1e-14)


def test_what_does_not_fit_is_refused():
    def refused(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            linear_log_probs(*arguments, **options)

    probabilities = np.full((N, C), 1 / C)
    refused(TypeError, r"labels must have an integer dtype \(class indices\)", HIDDEN, KERNEL, probabilities)
    refused(ValueError, r"labels must lie in \[0, 5\) or equal ignore_index=-100", HIDDEN, KERNEL, LABELS + 3)
    refused(ValueError, r"must have the shape \(7,\)", HIDDEN, KERNEL, LABELS[:3])
    refused(ValueError, r"kernel must have shape \(4, classes\)", HIDDEN, KERNEL.T, LABELS)
    refused(ValueError, r"where must have shape \(5,\)", HIDDEN, KERNEL, LABELS, where=KEPT[:2])
    refused(ValueError, "chunk_size must be at least 1", HIDDEN, KERNEL, LABELS, chunk_size=0)
    refused(ValueError, "softcap must be positive", HIDDEN, KERNEL, LABELS, softcap=0.0)
