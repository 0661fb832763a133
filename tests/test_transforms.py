"""Every function under every JAX transform, alone and nested; derivatives against finite differences."""

import itertools
from functools import partial

import _exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PALLAS
from jax import export, lax
from jax.experimental import jet
from jax.test_util import check_grads

import jaxent

pytestmark = pytest.mark.more(cases=1)

N, C = 4, 5
_RNG = np.random.default_rng(0)
LOGITS = _RNG.normal(size=(N, C)) * 2
LABELS = np.array([0, 3, 4, 1], np.int32)
IGNORED = np.array([0, -100, 4, 1], np.int32)
WEIGHT = _RNG.uniform(0.5, 2.0, C)
TARGETS = _RNG.dirichlet(np.ones(C), N)
MASK = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]], bool)
COTANGENT = _RNG.normal(size=(N, C))


def _seen(log_probs):
    """Without the -inf of masked classes, which no finite difference survives."""
    return jnp.where(jnp.isfinite(log_probs), log_probs, 0)


# name -> function of the logits in float32 or float64; every option of every function appears.
CASES = {
    "softmax": lambda x: jaxent.softmax(x),
    "softmax of axis 0": lambda x: jaxent.softmax(x, axis=0),
    "softmax where": lambda x: jaxent.softmax(x, where=MASK),
    "log_softmax": lambda x: jaxent.log_softmax(x),
    "log_softmax of axis 0": lambda x: jaxent.log_softmax(x, axis=0),
    "log_softmax where": lambda x: _seen(jaxent.log_softmax(x, where=MASK)),
    "nll": lambda x: jaxent.nll(x, LABELS),
    "nll of log_softmax": lambda x: jaxent.nll(jaxent.log_softmax(x), LABELS),
    "nll weight ignore_index": lambda x: jaxent.nll(jaxent.log_softmax(x), IGNORED, weight=WEIGHT.astype(x.dtype)),
    "cross_entropy": lambda x: jaxent.cross_entropy(x, LABELS),
    "cross_entropy none": lambda x: jaxent.cross_entropy(x, LABELS, reduction="none"),
    "cross_entropy sum": lambda x: jaxent.cross_entropy(x, LABELS, reduction="sum"),
    "cross_entropy axis 0": lambda x: jaxent.cross_entropy(x.T, LABELS, axis=0),
    "cross_entropy ignore_index": lambda x: jaxent.cross_entropy(x, IGNORED),
    "cross_entropy weight": lambda x: jaxent.cross_entropy(x, LABELS, weight=WEIGHT.astype(x.dtype)),
    "cross_entropy label_smoothing": lambda x: jaxent.cross_entropy(x, LABELS, label_smoothing=0.1),
    "cross_entropy z_loss": lambda x: jaxent.cross_entropy(x, LABELS, z_loss=0.01),
    "cross_entropy where": lambda x: jaxent.cross_entropy(x, LABELS, where=MASK),
    "cross_entropy probabilities": lambda x: jaxent.cross_entropy(x, TARGETS.astype(x.dtype)),
    "cross_entropy probabilities with all": lambda x: jaxent.cross_entropy(
        x, TARGETS.astype(x.dtype), weight=WEIGHT.astype(x.dtype), label_smoothing=0.2, z_loss=0.1
    ),
    "cross_entropy with all": lambda x: jaxent.cross_entropy(
        x,
        IGNORED,
        where=MASK,
        weight=WEIGHT.astype(x.dtype),
        label_smoothing=0.2,
        z_loss=0.1,
    ),
}
FUNCTIONS = pytest.mark.parametrize("f", CASES.values(), ids=CASES.keys())

# One of every rule, for the tests that compile much.
_FEW = ("softmax where", "log_softmax", "nll weight ignore_index", "cross_entropy none")
_FEW += ("cross_entropy probabilities with all", "cross_entropy with all")
FEW_FUNCTIONS = pytest.mark.parametrize("f", [CASES[name] for name in _FEW], ids=_FEW)


def _close(got, want, rtol=2e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=rtol), got, want)


@pytest.fixture
def x():
    return jnp.asarray(LOGITS, jnp.float32)


@FUNCTIONS
def test_check_grads_to_second_order(f):
    with jax.enable_x64(True):
        check_grads(jax.jit(f), (jnp.asarray(LOGITS),), order=2, modes=("fwd", "rev"))


def test_check_grads_of_probability_targets():
    with jax.enable_x64(True):
        f = partial(jaxent.cross_entropy, weight=WEIGHT, label_smoothing=0.1)
        check_grads(f, (jnp.asarray(LOGITS), jnp.asarray(TARGETS)), order=2, modes=("fwd", "rev"))


@pytest.mark.more
def test_check_grads_of_class_weights():
    with jax.enable_x64(True):
        x, w = jnp.asarray(LOGITS), jnp.asarray(WEIGHT)
        check_grads(lambda x, w: jaxent.cross_entropy(x, IGNORED, weight=w), (x, w), 2, ("fwd", "rev"))
        check_grads(lambda x, w: jaxent.nll(x, LABELS, weight=w), (x, w), 2, ("fwd", "rev"))


@FUNCTIONS
def test_jit_and_nested_jit(f, x):
    want = f(x)
    _close(jax.jit(f)(x), want)
    _close(jax.jit(lambda x: jax.jit(f)(x * 1.0))(x), want)


@FEW_FUNCTIONS
def test_forward_and_reverse_agree(f, x):
    reverse = jax.jacrev(f)(x)
    _close(jax.jit(jax.jacfwd(f))(x), reverse)
    tangent = jnp.asarray(COTANGENT, x.dtype)
    _, pushed = jax.jvp(f, (x,), (tangent,))
    _close(pushed, jnp.tensordot(reverse, tangent, axes=2), rtol=1e-5)
    linear_out, linear = jax.linearize(f, x)
    _close(linear_out, f(x))
    _close(linear(tangent), pushed, rtol=1e-5)


@FEW_FUNCTIONS
def test_hessians_agree_in_every_mode(f, x):
    modes = (jax.jacfwd, jax.jacrev)
    want = jax.hessian(f)(x)
    for outer, inner in itertools.product(modes, modes):
        _close(jax.jit(outer(inner(f)))(x), want, rtol=1e-5)


@FEW_FUNCTIONS
def test_vmap(f, x):
    stack = jnp.stack([x, 2 * x, -x])
    want = jnp.stack([f(row) for row in stack])
    _close(jax.vmap(f)(stack), want)
    for axis in (1, 2):
        _close(jax.vmap(f, in_axes=axis)(jnp.moveaxis(stack, 0, axis)), want)
    _close(jnp.moveaxis(jax.vmap(f, out_axes=-1)(stack), -1, 0), want)
    nested = jnp.stack([stack, stack + 1])
    _close(jax.vmap(jax.vmap(f))(nested)[1], jnp.stack([f(row) for row in stack + 1]))
    _close(jax.vmap(jax.vmap(f), in_axes=3)(jnp.moveaxis(nested, 0, 3)), jax.vmap(jax.vmap(f))(nested))
    _close(jax.vmap(jax.jacrev(f))(stack), jnp.stack([jax.jacrev(f)(row) for row in stack]), rtol=1e-5)


def test_vmap_of_logits_and_labels(x):
    want = jaxent.cross_entropy(x, LABELS, reduction="none")
    _close(jax.vmap(jaxent.cross_entropy)(x, jnp.asarray(LABELS)), want)
    _close(jax.vmap(jaxent.cross_entropy, in_axes=(1, 0))(x.T, jnp.asarray(LABELS)), want)
    _close(jax.vmap(jaxent.cross_entropy, in_axes=(None, 0))(x[0], jnp.arange(C)), -jaxent.log_softmax(x[0]))
    _close(
        jax.vmap(lambda x, y: jaxent.nll(x, y), in_axes=(1, 0))(x.T, jnp.asarray(LABELS)),
        jaxent.nll(x, LABELS, reduction="none"),
    )
    weights = jnp.stack([jnp.ones(C), jnp.arange(1.0, C + 1)])
    got = jax.vmap(lambda w: jaxent.cross_entropy(x, LABELS, weight=w))(weights)
    _close(got, jnp.stack([jaxent.cross_entropy(x, LABELS, weight=w) for w in weights]))


def test_vmap_of_traced_bad_labels_spoils_one_example_only(x):
    labels = jnp.array([0, C, 4, 1])
    loss, gradient = jax.vmap(jax.value_and_grad(jaxent.cross_entropy))(x, labels)
    assert np.array_equal(np.isnan(loss), [False, True, False, False])
    assert np.array_equal(np.isnan(gradient).all(-1), [False, True, False, False])
    assert np.array_equal(np.isnan(gradient).any(-1), [False, True, False, False])


@FEW_FUNCTIONS
def test_checkpoint(f, x):
    def loss(x):
        return jnp.sum(jnp.sin(f(x * x)))

    _close(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), rtol=1e-5)
    _close(jax.jit(jax.grad(jax.checkpoint(f_sum := lambda x: f(x).sum())))(x), jax.grad(f_sum)(x), rtol=1e-5)


@FEW_FUNCTIONS
def test_scan(f, x):
    def body(total, scale):
        value = jnp.sum(f(x * scale))
        return total + value, value

    scales = jnp.array([0.5, 1.0, 1.5])
    values = jnp.stack([jnp.sum(f(x * s)) for s in scales])
    got, each = lax.scan(body, jnp.zeros(()), scales)
    _close(each, values)
    _close(got, values.sum(), rtol=1e-5)

    def scanned(x):
        return lax.scan(lambda c, s: (c + jnp.sum(f(x * s)), None), jnp.zeros(()), scales)[0]

    want = jax.grad(lambda x: sum(jnp.sum(f(x * s)) for s in scales))(x)
    _close(jax.grad(scanned)(x), want, rtol=1e-5)
    _close(jax.jacfwd(scanned)(x), want, rtol=1e-5)


def test_scan_over_labels(x):
    def body(total, example):
        return total + jaxent.cross_entropy(*example), None

    total, _ = lax.scan(body, jnp.zeros(()), (x, jnp.asarray(LABELS)))
    _close(total, jaxent.cross_entropy(x, LABELS, reduction="sum"))


def test_other_control_flow(x):
    want = jaxent.cross_entropy(x, LABELS)
    _close(lax.cond(True, lambda x: jaxent.cross_entropy(x, LABELS), jnp.sum, x), want)
    _close(lax.fori_loop(0, 3, lambda _, t: t + jaxent.cross_entropy(x, LABELS), jnp.zeros(())), 3 * want)
    got = lax.map(lambda e: jaxent.cross_entropy(*e), (x, jnp.asarray(LABELS)))
    _close(got, jaxent.cross_entropy(x, LABELS, reduction="none"))
    batches = lax.map(lambda e: jaxent.cross_entropy(*e), (x, jnp.asarray(LABELS)), batch_size=2)
    _close(batches, got)


def test_user_jits(x):
    # Labels as an argument, as a closed-over constant and with static options; donated logits; a jit inside grad.
    want, gradient = jax.value_and_grad(jaxent.cross_entropy)(x, jnp.asarray(LABELS))
    labels = jnp.asarray(LABELS)
    closed = jax.jit(lambda x: jaxent.cross_entropy(x, labels))
    static = jax.jit(jaxent.cross_entropy, static_argnames=("axis", "reduction", "ignore_index"))
    _close(closed(x), want)
    _close(static(x, labels, axis=-1, reduction="mean", ignore_index=None), want)
    _close(jax.jit(jax.value_and_grad(closed))(x), (want, gradient))
    _close(jax.grad(jax.jit(closed))(x), gradient)
    _close(jax.jit(jaxent.cross_entropy).lower(x, labels).compile()(x, labels), want)
    _close(jax.eval_shape(jaxent.cross_entropy, x, labels).shape, want.shape)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e10, 1e30])
def test_jit_with_a_product_before(scale):
    # XLA may contract x * scale - max(x * scale) to one fma, whose result at the maximum is a rounding error of
    # the product, not 0: beyond 2**31 its exp overflows.
    x = jnp.asarray(_RNG.normal(size=(64, 32)), jnp.float32)
    labels = jnp.asarray(_RNG.integers(0, 32, 64))

    def loss(x):
        return jaxent.cross_entropy(x * (scale / 3), labels)

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(jax.jit(lambda x: jaxent.softmax(x * (scale / 3)))(x)))
    assert np.all(np.isfinite(jax.jit(lambda x: jaxent.log_softmax(x * (scale / 3)))(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 100), (0, 1000), (3, 0, 1000)])
def test_no_rows(shape, dtype):
    x, labels = jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.int32)
    for f, size in (
        (jaxent.softmax, shape),
        (jaxent.log_softmax, shape),
        (lambda x: jaxent.cross_entropy(x, labels, reduction="none"), shape[:-1]),
        (lambda x: jaxent.cross_entropy(x, labels, reduction="none", label_smoothing=0.1), shape[:-1]),
        (lambda x: jaxent.cross_entropy(x, x, reduction="none"), shape[:-1]),
    ):
        out, pull = jax.vjp(f, x)
        assert out.shape == size
        assert pull(jnp.ones_like(out))[0].shape == shape


@pytest.mark.parametrize("classes", [5, 100, 1000])
def test_float32_is_computed_in_float32_under_x64(classes):
    with jax.enable_x64(True):
        x = jnp.asarray(_RNG.normal(size=(3, classes)), jnp.float32)
        labels, w = jnp.arange(3), jnp.ones(classes, jnp.float32)
        for f in (
            jaxent.softmax,
            jaxent.log_softmax,
            lambda x: jaxent.nll(jaxent.log_softmax(x), labels),
            lambda x: jaxent.cross_entropy(x, labels),
            lambda x: jaxent.cross_entropy(x, labels, weight=w, label_smoothing=0.1, where=w > 0, z_loss=1e-4),
            lambda x: jaxent.cross_entropy(x, jax.nn.softmax(x), label_smoothing=0.1),
        ):
            jaxpr = str(jax.make_jaxpr(jax.value_and_grad(lambda x, f=f: f(x).sum()))(x))
            assert "f32[3" in jaxpr
            assert "f64[3" not in jaxpr  # scalars aside, which Python's numbers are at first


@pytest.mark.more
def test_third_derivatives():
    # Directly against exact arithmetic, at a margin where 1 - p is far below the float's resolution of p.
    for logits in ([20.0, 0.0, 1.0], [0.3, -1.0, 2.0]):
        x = np.array(logits, np.float32)
        want = _exact.third_derivative(x)
        for label in range(3):
            for modes in itertools.product((jax.jacfwd, jax.jacrev), repeat=3):
                f = partial(jaxent.cross_entropy, labels=jnp.array(label))
                for mode in modes:
                    f = mode(f)
                assert _exact.relative_error(jax.jit(f)(jnp.asarray(x)), want) <= 1e-4, (logits, label, modes)


@FEW_FUNCTIONS
def test_third_derivatives_by_finite_differences(f):
    with jax.enable_x64(True):
        x, direction = jnp.asarray(LOGITS), jnp.asarray(COTANGENT)
        second = jax.jit(jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)))))
        _, got = jax.jvp(second, (x,), (direction,))
        step = 1e-5
        want = (second(x + step * direction) - second(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@FUNCTIONS
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_export(f, platform, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    for function in (f, jax.value_and_grad(lambda x: jnp.sum(f(x)))):
        exported = export.export(jax.jit(function), platforms=[platform])(shape)
        assert exported.platforms == (platform,)
        if platform == "cpu":
            _close(exported.call(x), function(x), rtol=1e-5)


def test_export_for_all_platforms_and_any_batch_size(x):
    batch = export.symbolic_shape("b, 5")
    shapes = jax.ShapeDtypeStruct(batch, x.dtype), jax.ShapeDtypeStruct(batch[:1], np.int32)
    exported = export.export(jax.jit(jax.value_and_grad(jaxent.cross_entropy)), platforms=["cpu", "cuda", "tpu"])(
        *shapes
    )
    for n in (1, N):
        got = exported.call(x[:n], jnp.asarray(LABELS[:n]))
        _close(got, jax.value_and_grad(jaxent.cross_entropy)(x[:n], jnp.asarray(LABELS[:n])))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("classes", [1000, 32_000, 128_256])
def test_export_of_large_vocabularies(platform, classes):
    # These take other code paths than a handful of classes.
    shapes = jax.ShapeDtypeStruct((8, classes), jnp.bfloat16), jax.ShapeDtypeStruct((8,), np.int32)
    function = jax.jit(jax.value_and_grad(jaxent.cross_entropy))
    assert export.export(function, platforms=[platform])(*shapes).platforms == (platform,)


@pytest.mark.parametrize("of_labels", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("of_logits", ["bfloat16", "float32", "float64"])
def test_probabilities_of_any_dtype_beside_logits_of_any(of_logits, of_labels):
    """The loss is in the logits' precision, and derivatives in what they are derivatives of."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(3 * rng.standard_normal((4, 7)), of_logits)
        labels = jnp.asarray(rng.dirichlet(np.ones(7), 4), of_labels)

        def plain(x, q):
            return -(q * jax.nn.log_softmax(x)).sum(-1).mean()

        loss = jaxent.cross_entropy(logits, labels)
        assert loss.dtype == jnp.promote_types(of_logits, "float32")
        exact = logits.astype("float64"), labels.astype("float64")
        np.testing.assert_allclose(loss, plain(*exact), rtol=1e-6 if loss.dtype == "float32" else 1e-14)
        for wanted, at in (("logits", 0), ("labels", 1)):
            got = jax.grad(jaxent.cross_entropy, at)(logits, labels)
            assert got.dtype == (of_logits, of_labels)[at], wanted
            eps = max(float(jnp.finfo(dtype).eps) for dtype in (got.dtype, loss.dtype))
            expected = jax.grad(plain, at)(*exact)
            np.testing.assert_allclose(got.astype("float64"), expected, rtol=8 * eps, atol=eps / 8)
        mixed = jax.jacfwd(jax.grad(jaxent.cross_entropy), 1)(logits, labels)
        eps = float(jnp.finfo(of_logits).eps)
        expected = jax.jacfwd(jax.grad(plain), 1)(*exact)
        np.testing.assert_allclose(mixed.astype("float64"), expected, rtol=16 * eps, atol=eps)


# Batches and classes of symbolic sizes. Labels are drawn so that they fit every size that is tried.
_SYMBOLIC = {
    "softmax": lambda x, y, w: jaxent.softmax(x),
    "log_softmax": lambda x, y, w: jaxent.log_softmax(x),
    "where": lambda x, y, w: jaxent.softmax(x, where=w > 0) + jnp.exp(jaxent.log_softmax(x, where=w > 0)),
    "nll": lambda x, y, w: jaxent.nll(jaxent.log_softmax(x), y, weight=w),
    "cross_entropy": lambda x, y, w: jaxent.cross_entropy(x, y),
    "cross_entropy none": lambda x, y, w: jaxent.cross_entropy(x, y, reduction="none", label_smoothing=0.1),
    "cross_entropy with all": lambda x, y, w: jaxent.cross_entropy(
        x, y, where=w > 0, weight=w, label_smoothing=0.1, z_loss=0.1
    ),
    "probabilities": lambda x, y, w: jaxent.cross_entropy(x, jax.nn.softmax(-x), weight=w, label_smoothing=0.1),
    "linear_cross_entropy": lambda x, y, w: jaxent.linear_cross_entropy(x[:, :4], jnp.ones((4, 1)) * w, y, bias=w),
    "linear_cross_entropy none": lambda x, y, w: jaxent.linear_cross_entropy(
        x[:, :4], jnp.ones((4, 1)) * w, y, reduction="none"
    ),
    # No loop whose length is known when it runs has a second derivative.
    "linear_cross_entropy by its kernel": lambda x, y, w: jax.grad(jaxent.linear_cross_entropy, 1)(
        jax.lax.stop_gradient(x[:, :4]), jnp.ones((4, 1)) * w, y
    ),
    "linear_distillation_loss by its kernel": lambda x, y, w: jax.grad(jaxent.linear_distillation_loss, 1)(
        jax.lax.stop_gradient(x[:, :4]), jnp.ones((4, 1)) * w, x[:, 2:5], jnp.ones((3, 1)) * w**2
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _SYMBOLIC)
def test_export_of_symbolic_shapes(name, dtype):
    f = _SYMBOLIC[name]

    def run(x, y, w):
        out, pullback = jax.vjp(lambda x: f(x, y, w), x)
        return out, pullback(jnp.ones_like(out))[0]

    n, c = export.symbolic_shape("n, c", constraints=["c >= 5"])
    shapes = [((n, c), dtype), ((n,), "int32"), ((c,), dtype)]
    exported = export.export(jax.jit(run))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    for n, c in ((3, 5), (40, 70), (1, 300)):
        x = jnp.asarray(_RNG.normal(size=(n, c)), dtype)
        y, w = jnp.asarray(np.arange(n) % 5, jnp.int32), jnp.linspace(0.0, 2.0, c, dtype=dtype)
        _close(
            *(jax.tree.map(lambda a: np.asarray(a, np.float32), g(x, y, w)) for g in (exported.call, jax.jit(run))),
            1e-5 if dtype == "float32" else 2.0**-7,  # exported is the plain form, which may round to the other side
        )


def test_rank_promotion_may_raise(x):
    with jax.numpy_rank_promotion("raise"):
        for f in CASES.values():
            jax.jit(jax.value_and_grad(lambda x, f=f: f(x).sum())).lower(x)
        w = jnp.asarray(WEIGHT, x.dtype)
        for labels in (LABELS, TARGETS.astype(np.float32)):
            for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}):

                def fused(hidden, kernel, bias, labels=labels, options=options):
                    return jaxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, weight=w, **options)

                jax.jit(jax.grad(fused, (0, 1, 2))).lower(jnp.ones((N, 3)), jnp.ones((3, C)), jnp.ones(C))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_is_linear_can_be_transposed(reduction, x):
    """nll in its log-probabilities, cross_entropy in class probabilities; and both have that as their derivative."""
    q = jnp.asarray(TARGETS, jnp.float32)
    for f, at in (
        (lambda log_p: jaxent.nll(log_p, LABELS, reduction=reduction, weight=jnp.asarray(WEIGHT, jnp.float32)), x),
        (lambda log_p: jaxent.nll(log_p, q, reduction=reduction), x),
        (lambda q: jaxent.cross_entropy(x, q, reduction=reduction), q),
    ):
        out, pullback = jax.vjp(f, at)
        (want,) = pullback(jnp.ones_like(out))
        (got,) = jax.linear_transpose(f, at)(jnp.ones_like(out))
        _close(got, want)
        _close(jax.jvp(f, (at,), (at,)), (out, out))
        _close(jnp.sum(want * at), jnp.sum(out))


@pytest.mark.parametrize("name", ["softmax", "softmax where", "log_softmax", "log_softmax where"])
def test_jet(name, x):
    """Taylor coefficients to the third order, against nested forward mode; docs/differences.md says why no loss."""
    f, direction = CASES[name], jnp.asarray(COTANGENT, x.dtype)
    _, (first, second, third) = jet.jet(f, (x,), ((direction, jnp.zeros_like(x), jnp.zeros_like(x)),))

    def along(g):
        return lambda x: jax.jvp(g, (x,), (direction,))[1]

    _close(first, along(f)(x), 1e-4)
    _close(second, along(along(f))(x), 1e-3)
    _close(third, along(along(along(f)))(x), 1e-2)


@pytest.mark.skipif(PALLAS == "tpu", reason="a CPU that interprets a kernel makes its logits inside of it")
@pytest.mark.parametrize("scale", [3e9, 1e12, 1e18])
@pytest.mark.parametrize("axis", [0, 1])
def test_z_loss_of_logits_made_as_a_product(scale, axis):
    """fma made inf of logits above 1e9; z_loss is the largest logit squared, to the last digits."""
    x = jnp.asarray(_RNG.uniform(0.1, 1, (16, 48)), jnp.float32)
    factor = np.float32(scale / 3)
    labels = jnp.zeros(x.shape[1 - axis], jnp.int32)

    def loss(x):
        return jaxent.cross_entropy(x * factor, labels, axis=axis, z_loss=1e-4, reduction="none")

    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x).sum()))(x)
    largest = np.float64(np.asarray(x) * factor).max(axis)
    own = np.float64(np.asarray(x) * factor).take(0, axis)
    np.testing.assert_allclose(value, np.sum(1e-4 * largest**2 + largest - own), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weighted": True, "z_loss": 0.1}],
    ids=str,
)
def test_an_ignored_row_adds_nothing_to_any_derivative(options, bad):
    """Whatever its logits are: derivatives are those of the other rows alone, and 0 of its own."""
    options = dict(options)
    w = jnp.asarray(WEIGHT, jnp.float32) if options.pop("weighted", False) else jnp.ones(C)
    x = jnp.concatenate([jnp.asarray(LOGITS, jnp.float32), jnp.full((1, C), bad)])
    labels = jnp.append(jnp.asarray(LABELS), -100)
    direction = jnp.ones_like(x) * jnp.arange(C)

    def derivatives(x, labels, direction):
        def loss(x, w):
            return jaxent.cross_entropy(x, labels, weight=w if options else None, **options)

        gradients = jax.grad(loss, (0, 1))
        forward = jax.jvp(lambda x: gradients(x, w), (x,), (direction,))
        _, pullback = jax.vjp(lambda x: jax.grad(loss)(x, w), x)
        return loss(x, w), forward, pullback(direction)

    got = jax.jit(derivatives)(x, labels, direction)
    want = derivatives(x[:-1], labels[:-1], direction[:-1])
    _close(jax.tree.map(lambda a: a[:N] if a.ndim == 2 else a, got), want, 1e-5)
    assert all(jnp.all(a[N] == 0) for a in jax.tree.leaves(got) if a.ndim == 2)


@pytest.mark.more
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_tracers_leak(reduction):
    with jax.checking_leaks():
        labels = jnp.array([0, 1, 2, 0])
        f = lambda h: jaxent.linear_cross_entropy(h, jnp.eye(3), labels, reduction=reduction).sum()  # noqa: E731
        jax.block_until_ready(jax.grad(f)(jnp.ones((4, 3))))
        jax.block_until_ready(jax.hessian(partial(jaxent.cross_entropy, labels=labels))(jnp.ones((4, 3))))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_masked_logits_of_a_dtype_without_infinity(dtype):
    x, where = jnp.array([1.0, 2.0, 3.0], dtype), jnp.array([True, True, False])
    want = jax.nn.softmax(jnp.array([1.0, 2.0]))
    _close(jaxent.softmax(x, where=where, dtype=jnp.float32)[:2], want)
    _close(jaxent.cross_entropy(x, jnp.array(0), where=where), -jnp.log(want[0]))


def test_no_classes_but_weights():
    x, labels, w = jnp.zeros((2, 0)), jnp.full(2, -100), jnp.zeros(0)
    for loss in (jaxent.cross_entropy, jaxent.nll):
        np.testing.assert_array_equal(loss(x, labels, weight=w, reduction="none"), [0.0, 0.0])
