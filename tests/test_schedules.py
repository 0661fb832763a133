"""label_smoothing and z_loss as scalars, traced or not: what a schedule makes, and what may be learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxent

pytestmark = pytest.mark.more(cases=1)

N, D, C = 6, 5, 7
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(N, D)).astype(np.float32)
KERNEL = RNG.normal(size=(D, C)).astype(np.float32)
INDICES = np.array([3, 0, -100, 6, 2, 2])
PROBABILITIES = RNG.dirichlet(np.ones(C), N).astype(np.float32)
WEIGHT = np.linspace(0.5, 2.0, C, dtype=np.float32)
KEPT = np.arange(C) != 1
SMOOTHING, Z = 0.3, 0.2


def of_logits(hidden, kernel, labels, **options):
    return jaxent.cross_entropy(hidden @ kernel, labels, **options)


FUNCTIONS = pytest.mark.parametrize("f", [of_logits, jaxent.linear_cross_entropy])
LABELS = pytest.mark.parametrize("labels", [INDICES, PROBABILITIES], ids=["indices", "probabilities"])
MORE = pytest.mark.parametrize("more", [{}, {"weight": WEIGHT}, {"where": KEPT}], ids=["", "weight", "where"])
REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean"])


def in_torch(labels, smoothing, z, reduction, weight=None):
    """The loss in float64."""
    logits = torch.tensor(HIDDEN.astype(np.float64) @ KERNEL.astype(np.float64))
    labels = torch.tensor(labels if labels.dtype == np.int64 else labels.astype(np.float64))
    weight = None if weight is None else torch.tensor(weight.astype(np.float64))
    counts = labels != -100 if labels.ndim == 1 else torch.ones(N, dtype=torch.bool)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    losses = torch.nn.functional.cross_entropy(logits, labels, **options)
    losses = losses + counts * z * torch.logsumexp(logits, 1) ** 2
    if reduction == "none":
        return losses.numpy()
    share = counts if weight is None or labels.ndim > 1 else weight[labels.clamp(min=0)] * counts
    return (losses.sum() / share.sum()).numpy()


@FUNCTIONS
@LABELS
@REDUCTION
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
def test_a_traced_scalar_is_as_good_as_a_number(f, labels, reduction, weight):
    def loss(smoothing, z):
        return f(HIDDEN, KERNEL, labels, label_smoothing=smoothing, z_loss=z, reduction=reduction, weight=weight)

    for smoothing, z in ((SMOOTHING, Z), (0.0, Z), (1.0, 0.0)):
        want = in_torch(labels, smoothing, z, reduction, weight)
        np.testing.assert_allclose(jax.jit(loss)(smoothing, z), want, rtol=1e-5)
        np.testing.assert_allclose(loss(jnp.float32(smoothing), np.float32(z)), want, rtol=1e-5)
        np.testing.assert_allclose(loss(smoothing, z), want, rtol=1e-5)


@FUNCTIONS
@LABELS
@MORE
@REDUCTION
def test_the_loss_is_linear_in_both(f, labels, more, reduction):
    """So a derivative, of a gradient too, is the difference of two losses, or of their gradients."""
    if more and more.get("where") is not None:
        labels = np.where(labels == 1, 2, labels) if labels.ndim == 1 else np.where(KEPT, labels, 0.0)

    @jax.jit
    def loss(smoothing, z, arrays):
        options = {"label_smoothing": smoothing, "z_loss": z, "reduction": reduction, **more}
        return f(*arrays, labels, **options)

    for function in (loss, jax.jit(jax.jacobian(loss, 2))):

        def at(smoothing, z, function=function):
            return function(smoothing, z, (HIDDEN, KERNEL))

        start, smoothed, with_z = at(0.0, 0.0), at(1.0, 0.0), at(0.0, 1.0)
        for differentiate in (jax.jacfwd, jax.jacrev):
            jax.tree.map(close, differentiate(at, 0)(SMOOTHING, Z), smoothed, start)
            jax.tree.map(close, differentiate(at, 1)(SMOOTHING, Z), with_z, start)


def close(got, high, low):
    np.testing.assert_allclose(got, high - low, rtol=2e-5, atol=2e-5)


@FUNCTIONS
def test_another_number_compiles_nothing(f):
    compiled = []

    def listen(event, *_, **__):
        compiled.append(event)

    kernel = np.ones((D, 41), np.float32)  # as many classes as in no other test, whose programs would serve this one

    def loss(smoothing, z):
        return f(HIDDEN, kernel, INDICES, label_smoothing=smoothing, z_loss=z)

    loss(0.1, 0.2)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loss(0.2, 0.1)
        assert not [event for event in compiled if "compile" in event]
        loss(0.0, 0.1)  # which leaves smoothing out: shows that something is heard
        assert [event for event in compiled if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@FUNCTIONS
def test_what_is_no_such_scalar_is_refused(f):
    def refused(error, words, **options):
        with pytest.raises(error, match=words):
            f(HIDDEN, KERNEL, INDICES, **options)

    refused(ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5", label_smoothing=jnp.float32(1.5))
    refused(ValueError, r"label_smoothing must lie in \[0, 1\], got nan", label_smoothing=np.float32("nan"))
    refused(ValueError, r"z_loss must be a scalar, got shape \(2,\)", z_loss=jnp.ones(2))
    refused(TypeError, "label_smoothing must have a floating dtype, got int32", label_smoothing=jnp.int32(1))
    refused(TypeError, "z_loss must be a number or a scalar of a floating dtype", z_loss="much")


@FUNCTIONS
def test_scalars_of_other_kinds(f):
    """Shares add up to 1 in float32, however narrow the scalar that says them is."""
    for narrow in (jnp.bfloat16(0.1), np.float16(0.1)):
        got = f(HIDDEN, KERNEL, INDICES, label_smoothing=narrow, z_loss=np.int64(0))
        np.testing.assert_allclose(got, in_torch(INDICES, float(narrow), 0.0, "mean"), rtol=1e-5)


def test_a_row_without_classes_says_nothing_of_smoothing():
    where = np.ones((N, C), bool)
    where[0] = False
    logits = HIDDEN @ KERNEL

    def loss(smoothing, rows=slice(None)):
        return jaxent.cross_entropy(logits[rows], INDICES[rows], where=where[rows], label_smoothing=smoothing)

    np.testing.assert_allclose(jax.grad(loss)(0.1), jax.grad(loss)(0.1, rows=slice(1, None)), rtol=1e-5)
