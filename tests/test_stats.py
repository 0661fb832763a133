"""What `return_stats` gives beside a loss, against torch; that it costs no further kernel, and moves no derivative.

Sharding is in _sharding_cases.py, the kernels' share in test_native.py and test_pallas.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _machine import served_by_a_machine
from test_linear_cross_entropy import multiplications

import jaxent
from jaxent._class_axis import ClassAxis

pytestmark = pytest.mark.more(cases=1)

N, D, C = 9, 4, 6
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, WEIGHT = RNG.normal(size=(N, D)), 2.0 * RNG.normal(size=(D, C)), RNG.uniform(0.5, 2.0, C)
INDICES = np.array([0, 3, -100, 2, 2, 5, 1, 4, 0])
LABELS = {"indices": INDICES, "probabilities": RNG.dirichlet(np.ones(C), N)}
SAMPLE_WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 3.0, 0.0, 1.0])
BY_LABELS = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
BY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
OPTIONS = {
    "plain": {},
    "weights": {"weight": WEIGHT, "label_smoothing": 0.1, "sample_weight": SAMPLE_WEIGHT},
    "z_loss": {"z_loss": 0.01, "sample_weight": SAMPLE_WEIGHT},
}
BY_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
WAYS = {
    "cross_entropy": lambda hidden, *args, **options: jaxent.cross_entropy(hidden @ KERNEL, *args, **options),
    "linear_cross_entropy": lambda hidden, *args, **options: jaxent.linear_cross_entropy(
        hidden, KERNEL, *args, chunk_size=4, **options
    ),
    "linear_cross_entropy by XLA": lambda hidden, *args, **options: jaxent.linear_cross_entropy(
        hidden, KERNEL, *args, implementation="xla", **options
    ),
}
BY_WAY = pytest.mark.parametrize("f", WAYS.values(), ids=WAYS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.more(cases=9)
@BY_WAY
@BY_LABELS
@BY_OPTIONS
@BY_REDUCTION
def test_against_torch(f, labels, options, reduction, float64):
    loss, stats = f(HIDDEN, labels, **options, reduction=reduction, return_stats=True)
    np.testing.assert_allclose(loss, f(HIDDEN, labels, **options, reduction=reduction), rtol=1e-14)
    logits, v = torch.from_numpy(HIDDEN @ KERNEL), options.get("sample_weight", np.ones(N))
    lse = torch.logsumexp(logits, 1).numpy()
    losses = torch.nn.functional.cross_entropy(
        logits,
        torch.from_numpy(labels),
        torch.from_numpy(WEIGHT) if "weight" in options else None,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="none",
    )
    counts = (v > 0.0) & (labels != -100 if labels.ndim == 1 else True)
    losses = np.where(counts, v * (losses.numpy() + options.get("z_loss", 0.0) * lse**2), 0.0)
    np.testing.assert_allclose(stats.loss, losses, rtol=1e-13)
    np.testing.assert_allclose(stats.logsumexp, np.where(counts, lse, 0.0), rtol=1e-13)
    np.testing.assert_array_equal(stats.predicted, np.where(counts, logits.argmax(1).numpy(), -1))
    assert stats.predicted.dtype == jnp.int32


@BY_WAY
@BY_LABELS
@BY_REDUCTION
def test_derivatives_are_those_of_the_loss(f, labels, reduction, float64):
    options = OPTIONS["weights"] | {"reduction": reduction}

    def alone(hidden, sample_weight):
        loss = f(hidden, labels, **options | {"sample_weight": sample_weight})
        return jnp.sum(jnp.sin(loss))

    def beside(hidden, sample_weight):
        loss, stats = f(hidden, labels, **options | {"sample_weight": sample_weight}, return_stats=True)
        return jnp.sum(jnp.sin(loss)) + jnp.sum(stats.loss) + jnp.sum(stats.logsumexp), stats

    args = HIDDEN, SAMPLE_WEIGHT
    got, want = jax.grad(beside, (0, 1), has_aux=True)(*args)[0], jax.grad(alone, (0, 1))(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want)
    got, want = jax.hessian(beside, has_aux=True)(*args)[0], jax.hessian(alone)(*args)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


@BY_WAY
def test_the_first_of_equals_and_none_of_what_is_no_number(f):
    hidden = HIDDEN.astype(np.float32).copy()
    hidden[1] = 0.0  # all logits are equal
    hidden[4] = np.nan
    _, stats = jax.jit(functools.partial(f, return_stats=True))(hidden, INDICES)
    want = np.argmax(hidden @ KERNEL.astype(np.float32), 1)
    want[[1, 2, 4]] = 0, -1, -1
    np.testing.assert_array_equal(stats.predicted, want)
    assert np.isnan(stats.logsumexp[4])
    assert np.isfinite(np.delete(stats.logsumexp, 4)).all()


@pytest.mark.parametrize("axis", [0, 1, (1, 2)], ids=str)
def test_axes_and_masks(axis):
    logits = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32)
    where = jnp.asarray(RNG.random((3, 4, 5)) < 0.6).at[1].set(False)
    labels = jnp.zeros([n for i, n in enumerate(logits.shape) if i not in np.atleast_1d(axis)], jnp.int32)
    _, stats = jaxent.cross_entropy(logits, labels, axis=axis, where=where, return_stats=True)
    shown = np.where(where, logits, -np.inf)
    shown, axis = (shown.reshape(3, 20), 1) if axis == (1, 2) else (shown, axis)
    seen = np.isfinite(shown).any(axis)
    assert not seen.all() or axis == 0
    np.testing.assert_array_equal(stats.predicted, np.where(seen, np.argmax(shown, axis), -1))
    np.testing.assert_allclose(
        stats.logsumexp, np.where(seen, jax.nn.logsumexp(shown, axis), 0.0), rtol=1e-5, atol=1e-6
    )


@BY_WAY
def test_vmap_scan_and_value_and_grad(f):
    def step(hidden):
        return jax.value_and_grad(functools.partial(f, return_stats=True), has_aux=True)(hidden, INDICES)

    stacked = jnp.stack([jnp.asarray(HIDDEN, jnp.float32), -jnp.asarray(HIDDEN, jnp.float32)])
    want = jax.tree.map(lambda *rows: jnp.stack(rows), *map(step, stacked))
    for got in (jax.vmap(step)(stacked), jax.lax.map(step, stacked)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


@pytest.fixture
def served(monkeypatch):
    yield from served_by_a_machine(monkeypatch)


def test_one_kernel_gives_all(served):
    x, y = jnp.ones((4, 5)), jnp.arange(4)
    f = jax.jit(jax.value_and_grad(functools.partial(jaxent.cross_entropy, return_stats=True), has_aux=True))
    (_, stats), _ = f(x, y)
    assert stats.predicted.tolist() == [0] * 4
    assert served == [("label_loss_and_gradient", (4, 5))]
    jax.jit(functools.partial(jaxent.cross_entropy, return_stats=True))(x, y)
    assert served[1:] == [("label_loss", (4, 5))]


def test_one_pass_for_probabilities_too():
    def f(logits, q):
        return jaxent.cross_entropy(logits, q, return_stats=True)

    x = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    for function, kernel in (
        (f, "expected_loss"),
        (jax.value_and_grad(f, has_aux=True), "expected_loss_and_gradient"),
    ):
        assert [*_of_logits(jax.make_jaxpr(function)(x, x).jaxpr)] == [f"jaxent_{kernel}"]


def _of_logits(jaxpr):
    """The names of row functions in a program."""
    for equation in jaxpr.eqns:
        if re.match("jaxent_(?!linear)", equation.primitive.name):
            yield equation.primitive.name
        for inner in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _of_logits(inner)


@pytest.mark.parametrize(
    ("implementation", "reduction", "products"), [(None, "mean", 3), (None, "none", 4), ("xla", "mean", 3)]
)
def test_no_further_matrix_product(implementation, reduction, products):
    tokens, features, classes, chunk_size = 64, 16, 256, 16
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((tokens, features), (features, classes))]
    labels = jax.ShapeDtypeStruct((tokens,), np.int32)

    def f(hidden, kernel, labels):
        options = {"reduction": reduction, "implementation": implementation, "chunk_size": chunk_size}
        loss, stats = jaxent.linear_cross_entropy(hidden, kernel, labels, **options, return_stats=True)
        return jnp.sum(jnp.sin(loss)), stats

    program = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(*shapes, labels).compile()
    count = multiplications(program.as_text(), tokens // chunk_size) / (tokens * features * classes)
    assert count == products  # as without stats


@pytest.mark.parametrize("classes", [5, 2**24, 2**24 + 4])
def test_the_first_class_of_any_number(classes):
    """Above 2**24 not every number is a float32."""
    mask = np.zeros((2, classes), bool)
    mask[0, -1:] = mask[1, 3:] = True
    first = jax.jit(ClassAxis(1).first)(mask)
    np.testing.assert_array_equal(first, [[classes - 1], [3]])
