"""Drawn arguments against torch: 220 cases by default, 2,200 with HYPOTHESIS_PROFILE=nightly.

The shapes come from a short list, so that compiled code is reused.
"""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from _reference import DTYPES, assert_close, assert_linear_matches_torch, assert_matches_torch, to_torch, x64
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import jaxent

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = ((1,), (4,), (3, 5), (5, 3), (0, 3), (3, 1), (2, 4, 3), (2, 1024))
WEIGHTS = (0.0, 0.25, 1.0, 2.5)
REDUCTIONS = st.sampled_from(["none", "mean", "sum"])
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])


@st.composite
def scores_of(draw, dtype, impossible):
    """Logits of every kind in one array: ordinary, tied, huge, tiny, and -inf if `impossible`."""
    shape = draw(st.sampled_from(SHAPES))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    huge = {"float16": 3e4, "float64": 1e280}.get(dtype, 1e35)
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 10.0, 90.0, 1e4, huge]))
    scores = scale * rng.uniform(-1, 1, shape)
    scores += draw(st.sampled_from([0.0, 0.0, 1.0, -100.0, 1e4]))
    if draw(st.booleans()):  # ties
        scores = np.where(rng.random(shape) < 0.5, np.max(scores, initial=0), scores)
    outlier = draw(st.sampled_from([None, -huge, huge, -np.inf if impossible else None]))
    if outlier is not None and shape[axis] > 1:
        hit = rng.random(shape) < 0.3
        np.moveaxis(hit, axis, 0)[0] = False  # no row is left without a possible class
        scores[hit] = outlier
    limit = float(ml_dtypes.finfo(dtype).max)
    scores = np.where(np.isfinite(scores), np.clip(scores, -limit / 2, limit / 2), scores)
    return scores.astype(jnp.dtype(dtype)), axis, rng


def draw_weight(draw, scores, axis, choices):
    if not draw(st.booleans()):
        return None
    weights = draw(st.lists(st.sampled_from(choices), min_size=4, max_size=4))
    return np.resize(np.array(weights), scores.shape[axis]).astype(scores.dtype)


def draw_indices(draw, rng, scores, axis):
    """Class indices and what is ignored of them: nothing, a value that is no class, or one that is."""
    classes = scores.shape[axis]
    assume(classes)  # without classes no label is in range
    labels = rng.integers(0, classes, np.delete(scores.shape, axis), dtype=np.int32)
    ignore_index = draw(st.sampled_from([-100, None, 0]))
    if ignore_index is not None:
        labels = np.where(rng.random(labels.shape) < draw(st.sampled_from([0.0, 0.4, 1.0])), ignore_index, labels)
    return labels.astype(np.int32), ignore_index


def draw_probabilities(draw, rng, scores, axis):
    """Targets that sum to one, to less, to more, or to nothing; some of them zero."""
    labels = rng.dirichlet(np.ones(scores.shape[axis]), np.delete(scores.shape, axis))
    labels = np.moveaxis(labels, -1, axis) * draw(st.sampled_from([1.0, 0.0, 0.3, 3.0]))
    labels[rng.random(labels.shape) < draw(st.sampled_from([0.0, 0.5]))] = 0
    return labels.astype(scores.dtype)


@given(data=st.data())
def test_cross_entropy_of_indices(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(DTYPES))
    impossible = draw(st.booleans())
    scores, axis, rng = draw(scores_of(dtype, impossible))
    # 0 * inf is NaN for a label of no weight on an impossible class: test_differences.py has it.
    weight = draw_weight(draw, scores, axis, WEIGHTS[1:] if impossible else WEIGHTS)
    labels, ignore_index = draw_indices(draw, rng, scores, axis)
    options = {
        "reduction": draw(REDUCTIONS),
        "label_smoothing": draw(SMOOTHING),
        "ignore_index": ignore_index,
    }
    assert_matches_torch("cross_entropy", scores, labels, axis=axis, weight=weight, **options)


@given(data=st.data())
def test_cross_entropy_of_probabilities(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(DTYPES))
    scores, axis, rng = draw(scores_of(dtype, draw(st.booleans())))
    weight = draw_weight(draw, scores, axis, WEIGHTS)
    labels = draw_probabilities(draw, rng, scores, axis)
    options = {"reduction": draw(REDUCTIONS), "label_smoothing": draw(SMOOTHING)}
    assert_matches_torch("cross_entropy", scores, labels, axis=axis, weight=weight, **options)


LINEAR_SHAPES = (((), 3, 4), ((5,), 2, 3), ((2, 3), 3, 40), ((33,), 1, 1))  # of tokens, features, classes


@given(data=st.data())
@settings(max_examples=settings.default.max_examples * 2 // 5)  # nearly every one compiles
def test_linear_cross_entropy(data):
    draw, dtypes = data.draw, st.sampled_from(DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead, features, classes = draw(st.sampled_from(LINEAR_SHAPES))

    def array(dtype, *shape):
        return (draw(st.sampled_from([1e-3, 1.0, 4.0])) * rng.uniform(-1, 1, shape)).astype(jnp.dtype(dtype))

    hidden, kernel = (
        array(jnp.dtype(draw(dtypes)), *lead, features),
        array(jnp.dtype(draw(dtypes)), features, classes),
    )
    bias = array(kernel.dtype, classes) if draw(st.booleans()) else None
    logits = np.zeros((*lead, classes), kernel.dtype)
    weight = draw_weight(draw, logits, -1, WEIGHTS)
    options = {
        "reduction": draw(REDUCTIONS),
        "label_smoothing": draw(SMOOTHING),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "chunk_size": draw(st.sampled_from([None, 1, 4])),
    }
    if draw(st.booleans()):
        labels = draw_probabilities(draw, rng, logits, -1)
    else:
        labels, options["ignore_index"] = draw_indices(draw, rng, logits, -1)
    assert_linear_matches_torch(hidden, kernel, labels, bias=bias, weight=weight, **options)


@given(data=st.data())
def test_nll(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(DTYPES))
    scores, axis, rng = draw(scores_of(dtype, draw(st.booleans())))
    weight = draw_weight(draw, scores, axis, WEIGHTS)
    labels, ignore_index = draw_indices(draw, rng, scores, axis)
    options = {"reduction": draw(REDUCTIONS), "ignore_index": ignore_index}
    assert_matches_torch("nll", scores, labels, axis=axis, weight=weight, **options)


@given(data=st.data())
def test_softmax_pair(data):
    draw, dtype = data.draw, data.draw(st.sampled_from(DTYPES))
    name = draw(st.sampled_from(["softmax", "log_softmax"]))
    scores, axis, rng = draw(scores_of(dtype, draw(st.booleans())))
    cotangent = rng.uniform(-1, 1, scores.shape).astype(scores.dtype)
    with x64(dtype):
        value, grad = value_and_grad(name, axis, scores, cotangent)
    x = to_torch(scores).requires_grad_()
    expected = getattr(functional, name)(x, axis)
    (expected_grad,) = torch.autograd.grad(expected, x, to_torch(cotangent))

    expected = expected.detach().numpy()
    relative = np.finfo("float64" if dtype == "float64" else "float32").eps * (8 + scores.shape[axis])
    size = 1 + np.abs(np.where(np.isfinite(expected), expected, 0))
    mass = np.abs(cotangent.astype(np.float64)).sum(axis, keepdims=True)
    assert_close(value, expected, relative * size, dtype)
    assert_close(grad, expected_grad, relative * mass, dtype)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_grad(name, axis, scores, cotangent):
    value, pullback = jax.vjp(lambda x: getattr(jaxent, name)(x, axis), scores)
    return value, *pullback(cotangent)
