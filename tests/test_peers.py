"""Equal to optax and jax.nn where these offer the same thing: margins small enough that they are accurate too."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxent

pytestmark = pytest.mark.more(cases=1)

EPS = np.finfo(np.float32).eps
SHAPES = [((4,), -1), ((3, 5), -1), ((3, 5), 0), ((2, 3, 4), 1), ((2, 130), -1)]


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def assert_same(ours, theirs, x, terms):
    """Value, gradient and, forward over reverse, second derivative."""
    cotangent = draw(jax.eval_shape(theirs, x).shape, seed=1)
    tangent = draw(x.shape, seed=2)

    def results(f):
        def run(x):
            value, pullback = jax.vjp(f, x)
            return value, *pullback(cotangent)

        return jax.jit(lambda x: jax.jvp(run, (x,), (tangent,)))(x)

    for got, expected in zip(jax.tree.leaves(results(ours)), jax.tree.leaves(results(theirs)), strict=True):
        # Sums of `terms` products, each no larger than this.
        largest = (1 + jnp.abs(x).max()) * (1 + jnp.abs(cotangent).max()) * (1 + jnp.abs(tangent).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=4 * terms * EPS * largest)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_nn(name, shape, axis, masked):
    where = jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 3 != 1) if masked else None

    def run(module):
        # jax.nn leaves the entries it masks out of the gradient by the same `where`.
        return lambda x: jnp.where(True if where is None else where, getattr(module, name)(x, axis, where=where), 0.0)

    assert_same(run(jaxent), run(jax.nn), draw(shape), shape[axis])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_nn_masked_values(name):
    where = jnp.array([[True, False, True], [False, True, True]])
    got, expected = (getattr(module, name)(draw((2, 3)), where=where) for module in (jaxent, jax.nn))
    np.testing.assert_array_equal(got[~where], expected[~where])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_optax_integer_labels(shape, axis):
    labels = jnp.asarray(np.random.default_rng(3).integers(0, shape[axis], np.delete(shape, axis)))
    assert_same(
        lambda x: jaxent.cross_entropy(x, labels, axis=axis, reduction="none"),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels, axis=axis),
        draw(shape),
        shape[axis],
    )


@pytest.mark.parametrize("axis", [(1, 2), (2, 0), (-1,)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "indices", "probabilities", "nll"])
def test_several_axes(name, axis):
    """Count as one, in the order in which they are given."""
    shape, rng, none = (2, 3, 4), np.random.default_rng(1), {"axis": axis, "reduction": "none"}
    x, classes = draw(shape), int(np.prod([shape[i] for i in axis]))
    where = jnp.asarray(rng.random((2, 1, 4)) < 0.8).at[:, :, 0].set(True)
    probabilities = jnp.asarray(rng.random(shape), jnp.float32)
    y = jnp.asarray(
        rng.integers(0, classes, [size for i, size in enumerate(shape) if i not in (axis[0], axis[-1] % 3)])
    )
    ours, theirs = {
        "softmax": (lambda x: jaxent.softmax(x, axis, where=where), lambda x: jax.nn.softmax(x, axis, where=where)),
        "log_softmax": (lambda x: jaxent.log_softmax(x, axis), lambda x: jax.nn.log_softmax(x, axis)),
        "indices": (
            lambda x: jaxent.cross_entropy(x, y, **none),
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, y, axis=axis),
        ),
        "probabilities": (
            lambda x: jaxent.cross_entropy(x, probabilities, **none),
            lambda x: optax.softmax_cross_entropy(x, probabilities, axis=axis),
        ),
        "nll": (
            lambda x: jaxent.nll(jaxent.log_softmax(x, axis), y, **none),
            lambda x: optax.softmax_cross_entropy_with_integer_labels(x, y, axis=axis),
        ),
    }[name]
    assert_same(ours, theirs, x, classes)


@pytest.mark.parametrize("where", [None, (True, False, True, True, False)], ids=["all", "masked"])
@pytest.mark.parametrize("mass", [1.0, 0.5, 2.0])
def test_optax_probabilities(mass, where):
    """Targets that sum to `mass`."""
    mask = None if where is None else jnp.broadcast_to(jnp.array(where), (3, 5))
    labels = mass * jax.nn.softmax(draw((3, 5), seed=4), where=mask)
    assert_same(
        lambda x: jaxent.cross_entropy(x, labels, where=mask, reduction="none"),
        lambda x: optax.softmax_cross_entropy(x, labels, where=mask),
        draw((3, 5)),
        5,
    )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_optax_masked_rows(kind):
    """optax's `where` of one entry an example is `sample_weight`."""
    theirs, labels = {
        "indices": (optax.softmax_cross_entropy_with_integer_labels, jnp.array([0, 4, 2])),
        "probabilities": (optax.softmax_cross_entropy, jax.nn.softmax(draw((3, 5), seed=4))),
    }[kind]
    kept = jnp.array([True, False, True])
    assert_same(
        lambda x: jaxent.cross_entropy(x, labels, sample_weight=kept, reduction="none"),
        lambda x: theirs(x, labels, where=kept),
        draw((3, 5)),
        5,
    )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_optax_masked_classes(kind):
    """Each row has other ones, and the last has none. optax leaves out what probability the others have."""
    mask = jnp.array([[True, False, True, True, False], [False, True, True, False, True], [False] * 5])
    q = jax.nn.softmax(draw((3, 5), seed=4))
    theirs, labels, kept_labels = {
        "indices": (optax.softmax_cross_entropy_with_integer_labels, y := jnp.array([3, 1, 2]), y),
        "probabilities": (optax.softmax_cross_entropy, q, jnp.where(mask, q, 0.0)),
    }[kind]
    assert_same(
        lambda x: jaxent.cross_entropy(x, kept_labels, where=mask, reduction="none"),
        lambda x: theirs(x, labels, where=mask),
        draw((3, 5)),
        5,
    )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_label_on_a_masked_class(kind):
    """Unlike optax, which has a loss below 0 or leaves the label out."""
    where, label = jnp.array([True, True, False]), jnp.array(2)
    theirs, labels, loss = {
        "indices": (optax.softmax_cross_entropy_with_integer_labels, label, np.log1p(np.exp(1.0)) - 2),
        "probabilities": (optax.softmax_cross_entropy, jax.nn.one_hot(label, 3), 0.0),
    }[kind]
    x = jnp.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(theirs(x, labels, where=where), loss, atol=4 * EPS)
    assert jaxent.cross_entropy(x, labels, where=where) == np.inf


def test_optax_safe():
    """Classes that cannot be, and are not expected."""
    impossible = jnp.array([[True, False, True, False, False], [False] * 5, [True, True, True, False, True]])
    labels = jnp.where(impossible, 0.0, jax.nn.softmax(draw((3, 5), seed=4)))

    def run(loss):
        return lambda x: loss(jnp.where(impossible, -jnp.inf, x), labels)

    ours = jax.tree_util.Partial(jaxent.cross_entropy, reduction="none")
    assert_same(run(ours), run(optax.safe_softmax_cross_entropy), draw((3, 5)), 5)


def test_optax_ranking():
    """A list's items are classes, of any relevance; the mean is over lists that have items."""
    items = jnp.array([[True, False, True, True, True], [False] * 5, [True, True, False, False, True]])
    relevance = jnp.array([[2.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0]])
    assert_same(
        lambda x: jaxent.cross_entropy(x, jnp.where(items, relevance, 0.0), where=items),
        lambda x: optax.losses.ranking_softmax_loss(x, relevance, where=items),
        draw((3, 5)),
        5,
    )


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_optax_smoothing(label_smoothing):
    labels = jnp.array([0, 4, 2])
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 5), label_smoothing)
    assert_same(
        lambda x: jaxent.cross_entropy(x, labels, label_smoothing=label_smoothing, reduction="none"),
        lambda x: optax.softmax_cross_entropy(x, smooth),
        draw((3, 5)),
        5,
    )


def test_optax_ragged_batch():
    """`ignore_index` is a weight of zero on the example."""
    labels = jnp.array([0, -100, 2])
    kept = labels != -100
    assert_same(
        jax.tree_util.Partial(jaxent.cross_entropy, labels=labels),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels * kept).mean(where=kept),
        draw((3, 5)),
        5,
    )


def test_the_pieces_of_the_whole():
    """`cross_entropy` is `nll` after `log_softmax`."""
    labels, weight = jnp.array([0, -100, 2]), jnp.array([1.0, 2.0, 0.5, 1.0, 3.0])
    assert_same(
        lambda x: jaxent.cross_entropy(x, labels, weight=weight, reduction="none"),
        lambda x: jaxent.nll_loss(jaxent.log_softmax(x), labels, weight=weight, reduction="none"),
        draw((3, 5)),
        5,
    )


@pytest.mark.more
def test_what_docs_say_that_our_fused_loss_can_do(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    fused_losses = importlib.import_module("fused_losses")
    ours = fused_losses.contestants()["jaxent"]
    assert {name: fused_losses.tried(ours, *what) for name, what in fused_losses.TRIED.items()} == dict.fromkeys(
        fused_losses.TRIED, "yes"
    )
    assert fused_losses.tried(lambda *arrays: 1.01 * ours(*arrays), fused_losses.both, {}) == "wrong"
