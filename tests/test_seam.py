"""The seam: who serves a row function where, told by a machine's file that exists for this test alone."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _machine import served_by_a_machine
from jax import export
from jax.extend.core import Primitive

import jaxent
from jaxent import _kernels as kernels
from jaxent._class_axis import ClassAxis
from jaxent._kernels import divergences, product, xla

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
LABELS = jnp.arange(8) % 5


@pytest.fixture
def served(monkeypatch):
    yield from served_by_a_machine(monkeypatch)


def test_a_kernel_serves_a_program_of_one_device(served):
    np.testing.assert_allclose(jaxent.softmax(X), jax.nn.softmax(X), rtol=1e-6)
    assert served == [("softmax", (8, 5))]
    jax.jit(jax.grad(jaxent.cross_entropy))(X, LABELS)
    assert served[1:] == [("label_loss_and_gradient", (8, 5))]  # and no pass for the loss alone


def test_what_it_does_not_take_takes_the_plain_form(served):
    for f in (partial(jaxent.softmax, axis=0), jaxent.log_softmax, partial(jaxent.softmax, implementation="xla")):
        assert f(X).shape == X.shape
    assert not served


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda: jaxent.softmax(X, axis=0, implementation="fake"), "the class axis is not the last"),
        (lambda: jaxent.log_softmax(X, implementation="fake"), "it has no log_softmax"),
        (
            lambda: export.export(jax.jit(partial(jaxent.softmax, implementation="fake")))(X),
            "the program is exported",
        ),
    ],
)
def test_asked_for_by_name_it_says_why_it_cannot(served, f, reason):
    with pytest.raises(ValueError, match=f"implementation='fake' cannot serve.*{reason}"):
        f()


def test_a_name_that_nobody_has():
    for f in (jaxent.softmax, jaxent.log_softmax):
        with pytest.raises(
            ValueError, match=r"implementation must be None or one of 'xla', 'native', 'pallas', got 'magic'"
        ):
            f(X, implementation="magic")
    with pytest.raises(ValueError, match="implementation"):
        jaxent.cross_entropy(X, LABELS, implementation="magic")
    with pytest.raises(ValueError, match="implementation"):
        jaxent.linear_cross_entropy(X, X.T, LABELS, implementation="magic")


def test_kernels_that_cannot_be_imported_serve_nobody(monkeypatch):
    """A later JAX may be without what they are made with; all else goes on."""
    monkeypatch.setitem(kernels.MACHINES, "cpu", kernels.Machine("jaxent._kernels.nobody", "fake"))
    monkeypatch.setitem(product.KERNELS, "cpu", "jaxent._kernels.nobody")
    x = jnp.linspace(-1.0, 1.0, 21).reshape(3, 7)  # of a shape that nothing else here has
    np.testing.assert_allclose(jaxent.softmax(x), jax.nn.softmax(x), rtol=1e-6)
    found = jax.jit(product.product_maxima)(product.Layer(x, None), x[:, :3])
    np.testing.assert_allclose(found[:, 0], (x[:, :3] @ x).max(1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"cannot serve softmax here: jaxent\._kernels\.nobody cannot be imported"):
        jaxent.softmax(x, implementation="fake")


@pytest.mark.parametrize(("capability", "old"), [("7.5", True), ("8.0", False), ("12.0", False), ("gfx942", False)])
def test_old_gpus(capability, old, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert kernels.is_old_gpu() == old


def test_export_takes_the_plain_form(served):
    exported = export.export(jax.jit(jaxent.softmax))(jax.ShapeDtypeStruct(X.shape, X.dtype))
    np.testing.assert_allclose(exported.call(X), jax.nn.softmax(X), rtol=1e-6)
    assert not served


def test_batches_of_vmap_become_rows(served):
    stack = jnp.stack([X, 2 * X, -X])
    got = jax.vmap(jaxent.softmax, in_axes=1, out_axes=1)(jnp.moveaxis(stack, 0, 1))
    np.testing.assert_allclose(jnp.moveaxis(got, 1, 0), jax.nn.softmax(stack), rtol=1e-6)
    assert served == [("softmax", (3, 8, 5))]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmax_derivative", "log_softmax_pullback"])
def test_abstract_evaluation_is_that_of_the_plain_form(name):
    axis = jaxent._class_axis.ClassAxis(1)
    arrays = (X,) if name in ("softmax", "log_softmax") else (X, X)
    plain = partial(getattr(xla, name), axis=axis, dtype=jnp.bfloat16)
    bound = partial(getattr(kernels, name), axis=axis, dtype=jnp.bfloat16)
    assert jax.eval_shape(bound, *arrays) == jax.eval_shape(plain, *arrays)


def test_primitives_are_those_of_jax():
    assert kernels.Primitive is Primitive


def test_every_plain_form_is_a_primitive():
    """A newcomer sees in two files what a kernel must compute: all of it, and no more."""
    public = {
        name
        for module in (xla, divergences)
        for name, f in vars(module).items()
        if isinstance(f, types.FunctionType) and not name.startswith("_") and f.__module__ == module.__name__
    }
    assert public - {"wide", "compute_dtype", "log_of_mixture", "log_of_student"} == {
        name for name in vars(kernels) if hasattr(getattr(kernels, name), "__wrapped__")
    }


@pytest.mark.parametrize("factors", [(0.3, -2.0), (0.3,), (0.0, 0.0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_factor_for_all_rows_is_as_one_for_each(axis, factors):
    rows = X.shape[1 - axis]
    how = {"axis": ClassAxis(axis), "dtype": X.dtype, "implementation": "xla"}
    if len(factors) > 1:
        y = jnp.arange(rows) % X.shape[axis]
        f = partial(kernels.label_loss_and_gradient, terms=(True, False, True), **how)
    else:
        y = jax.nn.softmax(X[::-1], axis)
        f = partial(kernels.expected_loss_and_gradient, **how)
    numbers = [jnp.float32(factor) for factor in factors]
    of_rows = [jnp.full(rows, factor) for factor in numbers]

    def moved(factors):
        return jax.jvp(lambda x, *factors: f(x, y, *factors), (X, *factors), (X, *factors))

    def stacked(*some):
        return jax.tree.map(lambda *x: jnp.stack(x), *some)

    several, twice = ([stacked(x, 2 * x) for x in some] for some in (numbers, of_rows))
    by_factor = jax.vmap(f, (None, None, *(0,) * len(factors)))
    by_logits = jax.vmap(f, (0, None, *(None,) * len(factors)))
    pairs = [
        (moved(numbers), moved(of_rows)),
        (by_factor(X, y, *several), stacked(*(f(X, y, *(x[i] for x in twice)) for i in range(2)))),
        (by_logits(stacked(X, -X), y, *numbers), stacked(f(X, y, *of_rows), f(-X, y, *of_rows))),
    ]
    for got, want in zip(*map(jax.tree.leaves, zip(*pairs, strict=True)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
