"""Weights of examples: values and derivatives are torch's of `sum(v * losses)`, and what has none adds nothing.

That no work is done for them is in test_linear_cross_entropy.py, sharding in _sharding_cases.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _reference import torch_cross_entropy, torch_linear_cross_entropy, torch_nll

import jaxent

pytestmark = pytest.mark.more(cases=1)

N, D, C = 7, 3, 5
RNG = np.random.default_rng(0)
LOGITS, HIDDEN, KERNEL = (RNG.standard_normal(shape) for shape in ((N, C), (N, D), (D, C)))
INDICES = np.array([3, -100, 4, 1, -100, 2, 0])
PROBABILITIES = RNG.dirichlet(np.ones(C), N)
CLASS_WEIGHT = RNG.uniform(0.5, 2.0, C)
V = np.array([0.5, 2.0, 0.0, 1.0, 0.0, -0.25, 3.0])  # examples without weight are ignored or not
COTANGENT = RNG.standard_normal(N)
OURS = {"nll": jaxent.nll, "cross_entropy": jaxent.cross_entropy, "linear_cross_entropy": jaxent.linear_cross_entropy}


def their_nll(log_probs, labels, *, weight=None, reduction="none"):
    """torch's takes no probabilities."""
    if not labels.is_floating_point():
        return torch_nll(log_probs, labels, weight=weight, reduction=reduction)
    return -((1.0 if weight is None else weight) * labels * log_probs).sum(-1)


THEIRS = {
    "nll": their_nll,
    "cross_entropy": torch_cross_entropy,
    "linear_cross_entropy": lambda hidden, kernel, labels, *, weight, **options: torch_linear_cross_entropy(
        hidden, kernel, labels, weight=weight, **options
    ),
}
ARRAYS = {
    "nll": (np.log(RNG.dirichlet(np.ones(C), N)),),
    "cross_entropy": (LOGITS,),
    "linear_cross_entropy": (HIDDEN, KERNEL),
}
OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}}
NAMES = pytest.mark.parametrize("name", OURS)
LABELS = pytest.mark.parametrize("labels", [INDICES, PROBABILITIES], ids=["indices", "probabilities"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [None, "xla"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def scalar(name, labels, reduction, **options):
    """Our loss as a function of all arrays and of the weights; its entries are weighted by an arbitrary cotangent."""

    def loss(*arrays):
        value = OURS[name](*arrays[:-1], labels, sample_weight=arrays[-1], reduction=reduction, **options)
        return jnp.vdot(COTANGENT, value) if reduction == "none" else value

    return loss


def reference(name, labels, weight, reduction, **options):
    """The same from torch's losses one by one."""
    to_tensor = partial(torch.as_tensor, dtype=torch.float64)
    y = torch.as_tensor(labels)
    weight = None if weight is None else to_tensor(weight)

    def loss(*arrays):
        *arrays, v = arrays
        losses = v * THEIRS[name](*arrays, y, weight=weight, reduction="none", **options)
        if reduction == "none":
            return (to_tensor(COTANGENT) * losses).sum()
        if reduction == "sum":
            return losses.sum()
        if y.is_floating_point():
            return losses.sum() / v.sum()
        of_label = (y >= 0).double() if weight is None else torch.where(y >= 0, weight[y.clamp(min=0)], 0.0)
        return losses.sum() / (v * of_label).sum()

    return loss


def compare(name, labels, weight, reduction, options, implementation, *, hessian):
    ours = {} if name == "nll" else {"implementation": implementation, **({"chunk_size": 3} if "lin" in name else {})}
    given = None if weight is None else jnp.asarray(weight)
    f = scalar(name, labels, reduction, weight=given, **options, **ours)
    g = reference(name, labels, weight, reduction, **options)
    arrays = (*ARRAYS[name], V)
    tensors = tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays)
    wanted = range(len(arrays))
    value, gradients = jax.jit(jax.value_and_grad(f, tuple(wanted)))(*arrays)
    expected = g(*tensors)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(value, expected.detach())
    for got, want in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        close(got, want)
    if hessian:
        want = torch.autograd.functional.hessian(g, tensors)
        # Both orders of differentiation: the weights inside, and outside where they are constants at first.
        both = jax.jacfwd(jax.jacrev(f, tuple(wanted)), tuple(wanted))(*arrays)
        first = jax.jacrev(jax.grad(f, 0), len(arrays) - 1)(*arrays)
        jax.tree.map(close, both, tuple(tuple(x.numpy() for x in row) for row in want))
        close(first, want[0][-1])


@NAMES
@LABELS
@REDUCTIONS
@IMPLEMENTATIONS
def test_values_and_gradients(name, labels, reduction, implementation):
    """Those of the weights too, of 0 or not."""
    if name == "nll" and implementation:
        pytest.skip("nll has one form")
    compare(name, labels, CLASS_WEIGHT, reduction, {}, implementation, hessian=False)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@LABELS
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["", "classes"])
def test_hessians(name, labels, reduction, weight):
    """Of all arrays and the weights, where an example without weight has a derivative of its gradient by that."""
    compare(name, labels, weight, reduction, {"label_smoothing": 0.1}, None, hessian=True)


@NAMES
@LABELS
@REDUCTIONS
@IMPLEMENTATIONS
def test_nothing_comes_of_examples_without_weight(name, labels, reduction, implementation):
    """NaN scores and labels that do not exist: as if these rows were not there, derivatives of second order too."""
    if name == "nll" and implementation:
        pytest.skip("nll has one form")
    mask = np.array([True, True, False, True, False, True, True])
    scores, *others = ARRAYS[name]
    spoilt = np.where(mask[:, None], scores, np.nan)
    wrong = labels if labels.dtype.kind == "f" else np.where(mask, labels, 99)
    ours = {} if name == "nll" else {"implementation": implementation}
    if name == "linear_cross_entropy":
        ours["chunk_size"] = 2
    arrays = (spoilt, *others)
    wanted = tuple(range(len(arrays)))

    def loss(*arrays):
        value = OURS[name](*arrays, wrong, sample_weight=mask, reduction=reduction, **ours)
        return jnp.vdot(COTANGENT, value) if reduction == "none" else value

    def without(*arrays):
        value = OURS[name](arrays[0][mask], *arrays[1:], labels[mask], reduction=reduction, **ours)
        return jnp.vdot(COTANGENT[mask], value) if reduction == "none" else value

    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    got, want = jax.value_and_grad(loss, wanted)(*arrays), jax.value_and_grad(without, wanted)(*arrays)
    jax.tree.map(close, got, want)
    if name != "nll" and reduction != "sum":
        for f in (lambda g: jax.jacrev(g, wanted), lambda g: jax.jacfwd(g, wanted)):
            got, want = (f(jax.grad(g, wanted))(*arrays) for g in (loss, without))
            jax.tree.map(close, got, want)


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_weights_broadcast(name, shape):
    labels = RNG.integers(0, C, (2, 4))
    arrays = (
        (RNG.standard_normal((2, 4, C)),) if name == "cross_entropy" else (RNG.standard_normal((2, 4, D)), KERNEL)
    )
    v = RNG.uniform(0.5, 2.0, shape)
    losses = OURS[name](*arrays, labels, reduction="none")
    for reduction, want in (("none", v * losses), ("mean", np.average(losses, weights=np.broadcast_to(v, (2, 4))))):
        got = OURS[name](*arrays, labels, sample_weight=v, reduction=reduction)
        np.testing.assert_allclose(got, want, rtol=1e-12)


@NAMES
@LABELS
def test_a_mean_of_nothing(name, labels):
    """Is NaN, as where all labels are ignored, with derivatives of 0."""
    f = scalar(name, labels, "mean")
    arrays = (*ARRAYS[name], np.zeros(N))
    value, gradients = jax.value_and_grad(f, tuple(range(len(arrays) - 1)))(*arrays)
    assert np.isnan(value)
    assert not any(np.any(g) for g in gradients)
    assert not np.any(jax.jvp(f, arrays, (*(np.ones_like(x) for x in arrays[:-1]), np.zeros(N)))[1])


@pytest.mark.parametrize(
    ("sample_weight", "error", "message"),
    [
        (np.ones(N, int), TypeError, "sample_weight must have a floating dtype or be boolean, got int64"),
        (np.ones(N - 1), ValueError, r"sample_weight must have the shape \(7,\), .*, got shape \(6,\)"),
        (np.ones((N, 1)), ValueError, r"sample_weight must have the shape \(7,\)"),
        ([1.0] * N, TypeError, "sample_weight must be a jax or numpy array, got list"),
    ],
)
@NAMES
def test_errors(name, sample_weight, error, message):
    with pytest.raises(error, match=message):
        OURS[name](*ARRAYS[name], INDICES, sample_weight=sample_weight)


@NAMES
def test_labels_of_examples_with_weight_are_checked(name):
    labels = np.where(V == 0.0, 99, INDICES)
    OURS[name](*ARRAYS[name], labels, sample_weight=V)
    with pytest.raises(ValueError, match=r"labels\[0\] = 99"):
        OURS[name](*ARRAYS[name], np.full(N, 99), sample_weight=V)
