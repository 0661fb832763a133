"""Accuracy against 50-digit arithmetic (_exact), in float32 unless said otherwise.

The bounds are the library's promise. At margins beyond 30 the rounding of `x - max(x)` itself, half an ulp of
the margin, is most of the error: 4e-6 relative at 87.
"""

import functools

import _exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

pytestmark = [pytest.mark.usefixtures("implementation"), pytest.mark.more(cases=1)]

MARGINS = (0.0, 0.5, 2.0, 10.0, 17.0, 20.0, 30.0, 40.0, 60.0, 80.0, 87.0)
OFFSETS = (0.0, 1.0, -100.0, 1e4, -1e4)
KINDS = ("label leads", "other leads", "tie with label", "tie of others", "spread")
EPS = np.finfo(np.float32).eps


def _row(rng, classes, margin, offset, kind):
    """Logits whose leading classes stand `margin` above the rest, and a label in the lead or not."""
    spread = 4.0 if kind == "spread" else 0.25
    x = -rng.exponential(spread, classes)
    order = rng.permutation(classes)
    x[order[-1]] = 0.0
    # Below exp(-87.3) floats are subnormal, and XLA flushes them: a sum of such terms is out of its reach.
    x = np.maximum(x, margin - 87)
    leaders = order[: 2 if kind.startswith("tie") and classes > 2 else 1]
    x[leaders] = margin
    inside = kind not in ("other leads", "tie of others")
    return x + offset, int(leaders[0] if inside else order[-1])


@functools.cache
def _cases(classes, margins=MARGINS, offsets=OFFSETS, kinds=KINDS, dtype=np.float32):
    rng = np.random.default_rng(classes)
    rows = [_row(rng, classes, m, o, k) for m in margins for o in offsets for k in kinds]
    logits = np.stack([x for x, _ in rows]).astype(dtype)
    labels = np.array([y for _, y in rows], np.int32)
    return logits, labels


def _all_cases(classes):
    if classes <= 10:
        return _cases(classes)
    if classes <= 1000:
        return _cases(classes, offsets=(0.0, 1e4), kinds=("label leads", "other leads"))
    return _cases(classes, margins=(0.0, 20.0, 87.0), offsets=(1e4,), kinds=("label leads",))


@functools.cache
def _exact_losses(classes):
    logits, labels = _all_cases(classes)
    losses, gradients = zip(*map(_exact.loss_and_gradient, logits, labels), strict=True)
    return np.array(losses), np.stack(gradients)


def _entry_margins(logits):
    """How far every class is from the best of the others, above or below."""
    second, best = np.sort(np.float64(logits), axis=-1)[:, -2:].T[..., None]
    return np.where(logits == best, best - second, best - logits)


@functools.cache
def _exact_rows(classes, function):
    return np.stack([getattr(_exact, function)(x) for x in _all_cases(classes)[0]])


def _margins(logits, labels):
    return np.take_along_axis(_entry_margins(logits), labels[:, None], axis=-1)[:, 0]


def _check_values(got, want, margins):
    """16 ulp up to margin 30, 1e-5 relative at any."""
    got, near = np.asarray(got), margins <= 30
    assert np.max(_exact.ulps(got[near], want[near]), initial=0) <= 16
    assert _exact.relative_error(got, want) <= 1e-5


def _check_zero_sum(gradients, ulps=4):
    sums = np.abs(np.sum(np.float64(gradients), axis=-1))
    assert np.all(sums <= ulps * EPS * np.max(np.abs(np.float64(gradients)), axis=-1))


@pytest.mark.parametrize("classes", [33, 256, 400, 1024, 1536, 4096, 16_384])
def test_many_small_terms_beside_a_large_one_are_not_rounded_away(classes):
    """The order in which a long sum is added matters here, and with it how many blocks it is cut into."""
    rng = np.random.default_rng(classes)
    logits = rng.uniform(0.0, 1.0, (32, classes)).astype(np.float32)
    logits[:, classes // 3] = np.linspace(8.0, 22.0, 32)
    labels = np.full(32, 5)
    got = jax.grad(lambda x: jaxent.cross_entropy(x, labels, reduction="sum"))(logits)
    exponentials = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    p = exponentials / np.sum(exponentials, axis=-1, keepdims=True)
    p[:, 5] = -np.sum(np.delete(p, 5, axis=-1), axis=-1)
    np.testing.assert_allclose(got, p, rtol=2e-6)
    _check_zero_sum(got, ulps=6)  # one long sum makes up to 4, sums of 32 blocks 9


def _losses(logits, labels):
    return jaxent.cross_entropy(logits, labels, reduction="none")


def _gradients(logits, labels):
    return jax.grad(lambda x: jaxent.cross_entropy(x, labels, reduction="sum"))(logits)


def _composed(logits, labels):
    return jaxent.nll(jaxent.log_softmax(logits), labels, reduction="none")


def _composed_gradients(logits, labels):
    return jax.grad(lambda x: jaxent.nll(jaxent.log_softmax(x), labels, reduction="sum"))(logits)


MODES = pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])
CLASSES = pytest.mark.parametrize("classes", [2, 3, 10, 1000, 128_256])


@MODES
@CLASSES
def test_cross_entropy(classes, mode):
    logits, labels = _all_cases(classes)
    _check_values(mode(_losses)(logits, labels), _exact_losses(classes)[0], _margins(logits, labels))


@MODES
@CLASSES
def test_cross_entropy_gradient(classes, mode):
    logits, labels = _all_cases(classes)
    got = np.asarray(mode(_gradients)(logits, labels))
    assert _exact.relative_error(got, _exact_losses(classes)[1]) <= 1e-5
    _check_zero_sum(got)


@MODES
@CLASSES
def test_nll_of_log_softmax(classes, mode):
    logits, labels = _all_cases(classes)
    _check_values(mode(_composed)(logits, labels), _exact_losses(classes)[0], _margins(logits, labels))


@MODES
@CLASSES
def test_nll_of_log_softmax_gradient(classes, mode):
    logits, labels = _all_cases(classes)
    got = np.asarray(mode(_composed_gradients)(logits, labels))
    assert _exact.relative_error(got, _exact_losses(classes)[1]) <= 1e-4
    _check_zero_sum(got)


@MODES
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@CLASSES
def test_softmax_and_log_softmax(classes, function, mode):
    logits = _all_cases(classes)[0]
    got, want = np.asarray(mode(getattr(jaxent, function))(logits)), _exact_rows(classes, function)
    if function == "log_softmax":
        _check_values(got, want, _entry_margins(logits))
    assert _exact.relative_error(got, want) <= 1e-5  # of a probability, what the rounding of x - max leaves


@MODES
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_jacobians(classes, function, mode):
    logits = _cases(classes, margins=(0.0, 2.0, 20.0, 40.0, 80.0), offsets=(0.0, 1e4))[0]
    want = np.stack([getattr(_exact, f"{function}_jacobian")(x) for x in logits])
    for jacobian in (jax.jacrev, jax.jacfwd):
        got = np.asarray(mode(jax.vmap(jacobian(getattr(jaxent, function))))(logits))
        assert _exact.relative_error(got, want) <= 1e-5, jacobian
        _check_zero_sum(got)


def test_log_softmax_gradient_of_many_equal_classes():
    # Only here is the largest class's own probability small: its entry is -p, not a difference of large sums.
    logits = jnp.zeros(32_768)
    got = jax.grad(lambda x: jaxent.log_softmax(x)[5])(logits)
    want = -np.ones(32_768) / 32_768
    want[5] += 1
    assert _exact.relative_error(got, want) <= 1e-5


SECOND = pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.jacfwd(jax.jacrev(f)),
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
    ],
    ids=["forward-over-reverse", "reverse-over-reverse", "reverse-over-forward", "forward-over-forward"],
)


@functools.cache
def _hessian_cases(classes):
    logits, labels = _cases(classes, margins=(0.0, 2.0, 20.0, 40.0, 80.0), offsets=(0.0, 1e4))
    return logits, labels, np.stack([_exact.hessian(x) for x in logits])


@SECOND
@MODES
@pytest.mark.parametrize("function", [_losses, _composed], ids=["cross_entropy", "nll(log_softmax)"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_hessian(classes, function, mode, derivative):
    logits, labels, want = _hessian_cases(classes)

    def hessians(logits, labels):
        return jax.vmap(lambda x, y: derivative(lambda x: function(x, y))(x))(logits, labels)

    assert _exact.relative_error(mode(hessians)(logits, labels), want) <= 1e-4


@SECOND
@pytest.mark.parametrize("classes", [2, 5])
def test_log_softmax_second_derivatives(classes, derivative):
    # The normaliser is the only curved part, so every output has the same: minus the cross-entropy's Hessian.
    logits, _ = _cases(classes, margins=(0.0, 2.0, 20.0, 40.0, 80.0), offsets=(0.0,))
    want = np.stack([-_exact.hessian(x) for x in logits])
    got = jax.vmap(derivative(jaxent.log_softmax))(logits)
    assert _exact.relative_error(got, np.broadcast_to(want[:, None], got.shape)) <= 1e-4


@SECOND
@pytest.mark.parametrize("classes", [2, 5])
def test_softmax_second_derivatives(classes, derivative):
    # From margin 2 and without ties: p (1 - p) (1 - 2p) is zero at 1/2, where no relative error is defined.
    kinds = ("label leads",)
    logits, _ = _cases(classes, margins=(2.0, 5.0, 20.0, 40.0, 80.0), offsets=(0.0, 1e4), kinds=kinds)
    want = np.stack([_exact.softmax_hessian(x) for x in logits])
    assert _exact.relative_error(jax.vmap(derivative(jaxent.softmax))(logits), want) <= 1e-4


def test_random_logits_densely():
    # Thousands of ordinary rows: the margins above are few points, and an exp can be bad between them.
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=(2000, 5)) * rng.uniform(0.1, 10, (2000, 1))).astype(np.float32)
    labels = rng.integers(0, 5, 2000)
    losses, gradients = zip(*map(_exact.loss_and_gradient, logits, labels), strict=True)
    _check_values(_losses(logits, labels), np.array(losses), _margins(logits, labels))
    got = np.asarray(_gradients(logits, labels))
    assert _exact.relative_error(got, np.stack(gradients)) <= 1e-5
    _check_zero_sum(got)


def test_every_margin_densely():
    # A sweep of the margin itself in steps that no float32 exp or log1p can hide between.
    margins = np.linspace(0, 87, 4000, dtype=np.float32)
    logits, labels = np.stack([margins, np.zeros_like(margins)], axis=-1), np.zeros(4000, np.int32)
    losses, gradients = zip(*map(_exact.loss_and_gradient, logits, labels), strict=True)
    _check_values(_losses(logits, labels), np.array(losses), margins)
    assert _exact.relative_error(_gradients(logits, labels), np.stack(gradients)) <= 1e-5
    _check_values(_composed(logits, labels), np.array(losses), margins)


def test_op_by_op():
    # Without any jit at all, the library's own included: no fusion decides the accuracy.
    logits, labels = _cases(3, offsets=(0.0,))
    losses, gradients = zip(*map(_exact.loss_and_gradient, logits, labels), strict=True)
    with jax.disable_jit():
        got, grads = np.asarray(_losses(logits, labels)), _gradients(logits, labels)
    _check_values(got, np.array(losses), _margins(logits, labels))
    assert _exact.relative_error(grads, np.stack(gradients)) <= 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_any_class_axis(axis):
    # Reductions over another axis compile to other code.
    logits, labels = _cases(10)
    want, gradients = _exact_losses(10)
    moved = np.moveaxis(logits, -1, axis)[..., None] if axis else np.ascontiguousarray(logits.T)
    y = labels[:, None] if axis else labels

    def loss(x):
        return jaxent.cross_entropy(x, y, axis=axis, reduction="none")

    got = np.asarray(loss(moved)).reshape(-1)
    _check_values(got, want, _margins(logits, labels))
    grads = np.asarray(jax.grad(lambda x: loss(x).sum())(moved))
    grads = grads[..., 0] if axis else grads.T
    assert _exact.relative_error(grads, gradients) <= 1e-5


def test_where():
    # Masking out the leader, 80 above the rest, must leave exactly the row without it.
    logits, labels = _cases(3)
    widened = np.concatenate([logits[:, :1], np.max(logits, axis=-1, keepdims=True) + 80, logits[:, 1:]], axis=-1)
    moved = np.where(labels > 0, labels + 1, labels)
    where = np.array([True, False, True, True])

    def loss(x):
        return jaxent.cross_entropy(x, moved, where=where, reduction="none")

    want, gradients = _exact_losses(3)
    _check_values(loss(widened), want, _margins(logits, labels))
    grads = np.asarray(jax.grad(lambda x: loss(x).sum())(widened))
    assert np.all(grads[:, 1] == 0)
    assert _exact.relative_error(np.delete(grads, 1, axis=-1), gradients) <= 1e-5


def test_weight():
    # Only up to 80: a weight above 1 can lift a flushed subnormal's true value back among the normal floats.
    keep = np.repeat(MARGINS, len(OFFSETS) * len(KINDS)) <= 80
    logits, labels = (a[keep] for a in _cases(3))
    weight = np.array([0.5, 2.0, 3.0], np.float32)
    want, gradients = (a[keep] for a in _exact_losses(3))
    scale = np.float64(weight)[labels]

    def loss(x):
        return jaxent.cross_entropy(x, labels, weight=weight, reduction="none")

    _check_values(loss(logits), want * scale, _margins(logits, labels))
    grads = jax.grad(lambda x: loss(x).sum())(logits)
    assert _exact.relative_error(grads, gradients * scale[:, None]) <= 1e-5


def test_mean():
    logits, labels = _cases(10)
    want, gradients = _exact_losses(10)
    loss, grads = jax.value_and_grad(jaxent.cross_entropy)(jnp.asarray(logits), labels)
    assert _exact.ulps(loss, np.mean(want)) <= 16
    # Where the division by the batch size carries a gradient below the normal floats, it only underflows.
    assert _exact.relative_error(grads, gradients / len(labels)) <= 1e-5


def _linear(factor, reduction):
    """linear_cross_entropy of exact logits: one factor holds them, the other is the identity, or both are zero."""
    loss = functools.partial(jaxent.linear_cross_entropy, reduction=reduction, chunk_size=64)
    if factor == "hidden":
        return lambda x, labels: loss(x, jnp.eye(x.shape[-1]), labels)
    if factor == "kernel":
        return lambda x, labels: loss(jnp.eye(x.shape[0]), x, labels)
    # All tokens share the bias, so every row has a loss to itself.
    return jax.vmap(lambda x, label: loss(jnp.zeros(1), jnp.zeros((1, x.size)), label, bias=x))


@pytest.mark.parametrize("mode", ["value", "value_and_grad"])
@pytest.mark.parametrize("kind", ["indices", "smoothing", "z_loss", "probabilities"])
def test_the_mean_of_losses_whose_sum_overflows(kind, mode):
    lowest = float(np.finfo(np.float32).min)  # as some mask classes
    x = np.zeros((8, 3), np.float32)
    x[:, 0] = 1e19 if kind == "z_loss" else lowest
    y = np.full(8, int(kind == "smoothing"))
    q = np.full((8, 3), 1 / 3) if kind == "probabilities" else np.eye(3)[y]
    smoothing, z_loss = 0.1 * (kind == "smoothing"), 1e-4 * (kind == "z_loss")

    def loss(x):
        labels = jnp.float32(q) if kind == "probabilities" else y
        return jaxent.cross_entropy(x, labels, label_smoothing=smoothing, z_loss=z_loss)

    got = loss(x) if mode == "value" else jax.value_and_grad(loss)(x)[0]
    wide = x.astype(np.float64)
    lse = np.logaddexp.reduce(wide, 1, keepdims=True)
    want = np.sum(((1 - smoothing) * q + smoothing / 3) * (lse - wide), 1) + z_loss * lse[:, 0] ** 2
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("factor", ["hidden", "kernel", "bias"])
def test_linear_cross_entropy(factor, reduction):
    logits, labels = _cases(10)
    want, gradients = _exact_losses(10)

    @jax.jit
    def run(x):
        losses, pullback = jax.vjp(lambda x: _linear(factor, reduction)(x, labels), x)
        return losses, *pullback(jnp.ones_like(losses))

    losses, got = run(logits)
    if losses.ndim:
        _check_values(losses, want, _margins(logits, labels))
    else:
        assert _exact.ulps(losses, np.sum(want)) <= 16
    assert _exact.relative_error(got, gradients) <= 1e-5
    _check_zero_sum(got)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_linear_cross_entropy_hessian(outer):
    logits, labels, want = _hessian_cases(3)
    hessian = outer(jax.jacrev(_linear("hidden", "none")))
    assert _exact.relative_error(jax.jit(jax.vmap(hessian))(logits, labels), want) <= 1e-4


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    # The loss comes in float32, as accurate as for float32 logits; the gradient within one ulp of its dtype.
    logits, labels = _cases(10, margins=MARGINS[:-2], offsets=(0.0,))
    logits = jnp.asarray(logits, dtype)
    rows = np.asarray(logits, np.float32)
    losses, gradients = map(np.stack, zip(*map(_exact.loss_and_gradient, rows, labels), strict=True))
    got = jaxent.cross_entropy(logits, labels, reduction="none")
    assert got.dtype == jnp.float32
    _check_values(got, losses, _margins(rows, labels))
    grads = _gradients(logits, labels)
    assert grads.dtype == dtype
    tiny = float(jnp.finfo(dtype).tiny)
    assert _exact.relative_error(grads, gradients, tiny) <= float(jnp.finfo(dtype).eps)


def test_float64():
    with jax.enable_x64(True):
        logits, labels = _cases(10, dtype=np.float64)
        losses, gradients = map(np.stack, zip(*map(_exact.loss_and_gradient, logits, labels), strict=True))
        got, grads = _losses(logits, labels), _gradients(logits, labels)
        composed = _composed_gradients(logits, labels)
    assert got.dtype == grads.dtype == np.float64
    # Half an ulp of the margin 87 is 7e-15.
    assert _exact.relative_error(got, losses) <= 1e-13
    assert _exact.relative_error(grads, gradients) <= 1e-13
    assert _exact.relative_error(composed, gradients) <= 1e-12


@pytest.mark.more
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("classes", [10, 300, 40_000])
def test_half_precision_logits_made_in_the_same_jit(classes, dtype):
    """XLA leaves out the rounding to half precision where it can; all uses must see the same logits nevertheless."""
    rng = np.random.default_rng(6)
    x = 50 * rng.normal(size=(130, classes))
    x[:65, 3] += 150  # dominant
    x, scale = jnp.asarray(x, dtype), jnp.asarray(0.37, dtype)
    labels, cotangent = jnp.argmax(x, 1), jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    one_hot = jax.nn.one_hot(labels, classes, dtype=dtype)
    functions = (
        lambda z: jaxent.softmax(z, dtype=jnp.float32),
        lambda z: jaxent.log_softmax(z, dtype=jnp.float32),
        lambda z: jaxent.nll(jaxent.log_softmax(z, dtype=jnp.float32), labels, reduction="none"),
        lambda z: jaxent.cross_entropy(z, labels, reduction="none"),
        lambda z: jaxent.cross_entropy(z, labels, label_smoothing=0.1, reduction="none"),
        lambda z: jaxent.cross_entropy(z, one_hot, reduction="none"),
    )
    logits = jax.jit(lambda x: x * scale)(x)
    for f in functions:

        def both(z, f=f):
            out, pull = jax.vjp(f, z)
            return out, pull(cotangent if out.ndim == 2 else jnp.ones_like(out))[0]

        for g in (f, both):
            got, want = jax.jit(lambda x, g=g: g(x * scale))(x), jax.jit(g)(logits)
            jax.tree.map(_equal_but_for_the_last_bits, got, want)


def _equal_but_for_the_last_bits(got, want):
    assert got.dtype == want.dtype
    info = jnp.finfo(want.dtype)
    rtol = 1e-5 if want.dtype == jnp.float32 else 2 * float(info.eps)
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (got, want)), rtol, float(info.tiny))


@pytest.mark.parametrize("loss", [_losses, _composed], ids=["cross_entropy", "nll(log_softmax)"])
def test_logits_scaled_in_the_same_jit(loss):
    # A compiler that fuses the caller's product may contract `x * scale - max` to one fma: at the maximum that is
    # the product's rounding error instead of 0, and swamps the loss of a dominant label.
    rng, scale = np.random.default_rng(5), np.float32(3.3)
    x = rng.uniform(0, 1, (64, 10)).astype(np.float32)
    x[:, 0] += 12
    labels = np.zeros(64, np.int32)
    want, gradients = map(np.stack, zip(*map(_exact.loss_and_gradient, x * scale, labels), strict=True))
    got, pull = jax.jit(lambda x: jax.vjp(lambda x: loss(x * scale, labels), x))(x)
    assert _exact.relative_error(got, want) <= 1e-5
    assert _exact.relative_error(pull(jnp.ones(64))[0], gradients * np.float64(scale)) <= 1e-4
