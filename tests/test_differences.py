"""Deliberate differences from torch: one test for each row of docs/differences.md, showing both sides."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import jaxent

torch.set_num_threads(1)

EPS = np.finfo(np.float32).eps
IMPOSSIBLE = [[0.0, -np.inf, 1.0]]  # the second class has probability 0


def test_every_row_has_its_test():
    page = Path(__file__).parent.parent / "docs" / "differences.md"
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named == {name for name in globals() if name.startswith("test_")} - {"test_every_row_has_its_test"}


@pytest.mark.parametrize("margin", [18.0, 20.0, 40.0, 80.0])
def test_large_margins(margin):
    x = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = functional.cross_entropy(x, torch.tensor([0]))
    loss.backward()
    assert loss == 0
    assert x.grad[0, 0] == 0

    loss, grad = jax.value_and_grad(jaxent.cross_entropy)(jnp.array([[margin, 0.0]]), jnp.array([0]))
    true = np.exp(-margin)  # log1p and the sigmoid differ from it by its square only
    np.testing.assert_allclose(loss, true, rtol=8 * EPS)
    np.testing.assert_allclose(grad, [[-true, true]], rtol=8 * EPS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 0.0]])
    half = getattr(torch, dtype)
    assert functional.cross_entropy(logits.to(half), torch.tensor([0, 1])).dtype == half

    x = jnp.array(logits.numpy(), dtype)
    loss, grad = jax.value_and_grad(jaxent.cross_entropy)(x, jnp.array([0, 1]))
    assert loss.dtype == "float32"
    assert grad.dtype == dtype
    # These logits are exact in half precision, so the loss has float32's accuracy, not the half's.
    np.testing.assert_allclose(loss, functional.cross_entropy(logits, torch.tensor([0, 1])), rtol=8 * EPS)
    log_probs = jaxent.log_softmax(x)
    assert log_probs.dtype == dtype
    assert jaxent.nll(log_probs, jnp.array([0, 1])).dtype == "float32"


def test_half_precision_does_not_overflow():
    logits = [[3e4, -3e4]] * 2
    loss = functional.cross_entropy(torch.tensor(logits).half(), torch.tensor([1, 1]), reduction="sum")
    assert loss == np.inf
    x = jnp.array(logits, jnp.float16)
    expected = 2 * (float(x[0, 0]) - float(x[0, 1]))
    assert jaxent.cross_entropy(x, jnp.array([1, 1]), reduction="sum") == expected


def test_zero_probability_of_an_impossible_class():
    labels = [[0.5, 0.0, 0.5]]
    x, q = torch.tensor(IMPOSSIBLE, requires_grad=True), torch.tensor(labels, requires_grad=True)
    loss = functional.cross_entropy(x, q)
    loss.backward()
    assert loss.isnan()
    assert q.grad[0, 1] == np.inf

    gradients = jax.value_and_grad(jaxent.cross_entropy, argnums=(0, 1))
    loss, (grad, label_grad) = gradients(jnp.array(IMPOSSIBLE), jnp.array(labels))
    without, (grad_without, label_grad_without) = gradients(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.5]]))
    np.testing.assert_allclose(loss, without, rtol=8 * EPS)
    np.testing.assert_allclose(grad[0], np.insert(grad_without[0], 1, 0), rtol=8 * EPS)
    np.testing.assert_allclose(label_grad[0], np.insert(label_grad_without[0], 1, 0), rtol=8 * EPS)


def test_smoothing_of_a_weightless_impossible_class():
    weight = [1.0, 0.0, 1.0]
    loss = functional.cross_entropy(
        torch.tensor(IMPOSSIBLE), torch.tensor([0]), weight=torch.tensor(weight), label_smoothing=0.3
    )
    assert loss.isnan()

    loss, grad = jax.value_and_grad(jaxent.cross_entropy)(
        jnp.array(IMPOSSIBLE), jnp.array([0]), weight=jnp.array(weight), label_smoothing=0.3
    )
    log_p = np.log([1, np.e]) - np.log(1 + np.e)
    np.testing.assert_allclose(loss, -(0.8 * log_p[0] + 0.1 * log_p[1]), rtol=8 * EPS)
    assert np.isfinite(grad).all()
    assert grad[0, 1] == 0


def test_label_out_of_range():
    with pytest.raises(IndexError):
        functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels\[1\] = 3"):
        jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 3]))
    loss = jax.jit(lambda labels: jaxent.cross_entropy(jnp.zeros((2, 3)), labels, reduction="none"))
    np.testing.assert_array_equal(np.isnan(loss(jnp.array([0, 3]))), [False, True])


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint16", "uint32"])
def test_integer_labels(dtype):
    with pytest.raises(RuntimeError):
        functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1], dtype=getattr(torch, dtype)))
    loss = jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1], dtype))
    np.testing.assert_allclose(loss, np.log(3), rtol=8 * EPS)


@pytest.mark.parametrize("label", [2, np.int64(2), np.uint8(2), -100], ids=repr)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_integer_as_the_label_of_a_row(transform, label):
    rng = np.random.default_rng(0)
    row, hidden, kernel = (rng.normal(size=size).astype(np.float32) for size in ((3,), (4,), (4, 3)))
    log_probs = np.asarray(jaxent.log_softmax(row))
    cases = [
        (jaxent.cross_entropy, functional.cross_entropy, (row,)),
        (jaxent.nll, functional.nll_loss, (log_probs,)),
        (
            jaxent.linear_cross_entropy,
            lambda h, w, label, **how: functional.cross_entropy(h @ w, label, **how),
            (hidden, kernel),
        ),
    ]
    for ours, theirs, arrays in cases:
        with pytest.raises(TypeError):
            theirs(*map(torch.tensor, arrays), int(label))
        tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
        wanted = theirs(*tensors, torch.tensor(int(label)), reduction="sum")
        wanted.backward()
        f = jax.value_and_grad(lambda *x, loss=ours: loss(*x, label, reduction="sum"), range(len(arrays)))
        loss, gradients = transform(f)(*arrays)
        np.testing.assert_allclose(loss, wanted.item(), rtol=8 * EPS)
        for got, x in zip(gradients, tensors, strict=True):
            np.testing.assert_allclose(got, x.grad, rtol=1e-5, atol=8 * EPS)


def test_ignore_nothing():
    with pytest.raises(TypeError):
        functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), ignore_index=None)
    loss = jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1]), ignore_index=None)
    np.testing.assert_allclose(loss, np.log(3), rtol=8 * EPS)


def test_weight_of_another_dtype():
    with pytest.raises(RuntimeError):
        functional.cross_entropy(torch.zeros(2, 3).half(), torch.tensor([0, 1]), weight=torch.ones(3))
    logits = jnp.zeros((2, 3), jnp.float16)
    loss = jaxent.cross_entropy(logits, jnp.array([0, 1]), weight=jnp.full(3, 1 / 3), reduction="sum")
    np.testing.assert_allclose(loss, 2 / 3 * np.log(3), rtol=8 * EPS)


def test_nll_of_probabilities():
    log_probs, labels = [[-1.0, -2.0], [-3.0, -4.0]], [[0.5, 0.5], [0.25, 0.5]]
    with pytest.raises(RuntimeError):
        functional.nll_loss(torch.tensor(log_probs), torch.tensor(labels))
    assert jaxent.nll(jnp.array(log_probs), jnp.array(labels)) == (1.5 + 2.75) / 2


def test_default_axis():
    logits = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    labels = np.array([[0, 1, 2], [2, 1, 0]])
    theirs = functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    last = functional.cross_entropy(torch.tensor(logits).movedim(-1, 1), torch.tensor(labels))
    assert abs(theirs - last) > 1000 * EPS
    x, y = jnp.array(logits), jnp.array(labels)
    np.testing.assert_allclose(jaxent.cross_entropy(x, y, axis=1), theirs, rtol=8 * EPS)
    np.testing.assert_allclose(jaxent.cross_entropy(x, y), last, rtol=8 * EPS)


@pytest.mark.parametrize(("name", "value"), [("softmax", 1.0), ("log_softmax", 0.0)])
def test_scalars(name, value):
    assert getattr(functional, name)(torch.tensor(3.0), 0) == value
    with pytest.raises(ValueError, match="logits"):
        getattr(jaxent, name)(jnp.array(3.0))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_integer_logits(name):
    assert getattr(functional, name)(torch.tensor([1, 2]), 0, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(TypeError, match="logits"):
        getattr(jaxent, name)(jnp.array([1, 2]), dtype="float32")


def test_orientation_of_the_kernel():
    hidden, kernel = np.eye(2, 3, dtype=np.float32), np.arange(12, dtype=np.float32).reshape(3, 4)
    labels = np.array([0, 3])
    loss = functional.linear_cross_entropy(torch.tensor(hidden), torch.tensor(kernel.T), torch.tensor(labels))
    np.testing.assert_allclose(jaxent.linear_cross_entropy(hidden, kernel, labels), loss, rtol=8 * EPS)


@pytest.mark.parametrize("scores", [[np.nan, 0.0], [-np.inf, 0.0]])
def test_loss_of_a_weightless_class(scores):
    logits, labels, weight = np.array([scores, [0.0, 1.0]], np.float32), np.array([0, 1]), np.float32([0.0, 1.0])
    assert functional.cross_entropy(*map(torch.tensor, (logits, labels, weight))).isnan()
    loss, gradient = jax.value_and_grad(partial(jaxent.cross_entropy, labels=labels, weight=weight))(logits)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1.0)), rtol=8 * EPS)
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_nan_in_an_ignored_token():
    hidden, kernel = np.array([[1.0], [np.nan]], np.float32), np.array([[1.0, 2.0]], np.float32)
    labels = np.array([0, -100])
    weight = torch.tensor(kernel.T, requires_grad=True)
    functional.linear_cross_entropy(torch.tensor(hidden), weight, torch.tensor(labels)).backward()
    assert weight.grad.isnan().all()

    gradients = jax.grad(jaxent.linear_cross_entropy, (0, 1))(hidden, kernel, labels)
    p = 1 / (1 + np.exp(-1.0))  # of the second class
    np.testing.assert_allclose(gradients[0], [[p], [0.0]], rtol=8 * EPS)
    np.testing.assert_allclose(gradients[1], [[-p, p]], rtol=8 * EPS)
