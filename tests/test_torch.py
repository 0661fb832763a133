"""Equal to PyTorch 2.13 on CPU: values and gradients over a table of samples, in the spirit of its OpInfo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _reference import (
    DTYPES,
    TORCH,
    assert_close,
    assert_matches_torch,
    jax_value_and_grads,
    to_torch,
    torch_cross_entropy,
    torch_nll,
    torch_value_and_grads,
    x64,
)
from torch.nn import functional

import jaxent

pytestmark = [pytest.mark.usefixtures("implementation"), pytest.mark.more(cases=1)]

REDUCTIONS = ("none", "mean", "sum")
IGNORE = (-100, 1, None)
HOME = ((2, 4, 3), 1)  # the shape that meets every combination of options
SHAPES = (  # with their class axis
    ((4,), -1),
    ((3, 5), -1),
    ((3, 5), 0),
    ((3, 4, 2), -2),
    ((2, 2, 5, 2), 1),
    ((3, 1), 1),
    ((2, 1024), 1),  # summed block by block
)


def product(**options):
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def samples(every, few):
    """`every` combination at `HOME` in single and half precision; a `few` in the other dtypes and shapes."""
    table = [(*HOME, dtype, options) for dtype in ("float32", "float16") for options in every]
    table += [(*HOME, dtype, options) for dtype in ("float64", "bfloat16") for options in few]
    table += [(*shape, "float32", options) for shape in SHAPES for options in few]
    return [pytest.param(*row, id=f"{row[2]}-{row[0]}-{row[1]}-{_spell(row[3])}") for row in table]


def _spell(options):
    return "-".join(f"{key}={value}" for key, value in options.items())


def random(seed, *shape):
    return np.random.default_rng([seed, *shape])


def draw_logits(shape, dtype):
    return (3 * random(0, *shape).standard_normal(shape)).astype(jnp.dtype(dtype))


def draw_weight(wanted, shape, axis, dtype):
    if not wanted:
        return None
    return random(1, *shape).uniform(0.2, 2.0, shape[axis]).astype(jnp.dtype(dtype))


def draw_labels(shape, axis, ignore_index, dtype=np.int32):
    """Class indices. Where `ignore_index` is no class, the first of several labels has it."""
    labels = random(2, *shape).integers(0, shape[axis], np.delete(shape, axis)).astype(dtype)
    if ignore_index == -100 and labels.size > 1:
        labels.flat[0] = ignore_index
    return labels


def draw_probabilities(shape, axis, dtype):
    """Class probabilities, one class of them exactly 0."""
    labels = random(3, *shape).dirichlet(np.ones(shape[axis]), np.delete(shape, axis))
    labels[..., 0] *= shape[axis] == 1
    return np.moveaxis(labels, -1, axis).astype(jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "options"),
    samples(
        product(reduction=REDUCTIONS, weighted=(False, True), ignore_index=IGNORE, label_smoothing=(0.0, 0.1)),
        product(reduction=REDUCTIONS, weighted=(True,), ignore_index=(-100,), label_smoothing=(0.0, 0.1)),
    ),
)
def test_cross_entropy_of_indices(shape, axis, dtype, options):
    options = dict(options)
    weight = draw_weight(options.pop("weighted"), shape, axis, dtype)
    labels = draw_labels(shape, axis, options["ignore_index"])
    assert_matches_torch("cross_entropy", draw_logits(shape, dtype), labels, axis=axis, weight=weight, **options)


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "options"),
    samples(
        product(reduction=REDUCTIONS, weighted=(False, True), label_smoothing=(0.0, 0.1, 1.0)),
        product(reduction=REDUCTIONS, weighted=(True,), label_smoothing=(0.1,)),
    ),
)
def test_cross_entropy_of_probabilities(shape, axis, dtype, options):
    options = dict(options)
    weight = draw_weight(options.pop("weighted"), shape, axis, dtype)
    labels = draw_probabilities(shape, axis, dtype)
    assert_matches_torch("cross_entropy", draw_logits(shape, dtype), labels, axis=axis, weight=weight, **options)


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "options"),
    samples(
        product(reduction=REDUCTIONS, weighted=(False, True), ignore_index=IGNORE),
        product(reduction=REDUCTIONS, weighted=(True,), ignore_index=(-100,)),
    ),
)
def test_nll(shape, axis, dtype, options):
    options = dict(options)
    weight = draw_weight(options.pop("weighted"), shape, axis, dtype)
    labels = draw_labels(shape, axis, options["ignore_index"])
    assert_matches_torch("nll", draw_logits(shape, dtype), labels, axis=axis, weight=weight, **options)


@pytest.mark.parametrize("result_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [HOME, *SHAPES])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_pair(name, shape, axis, dtype, result_dtype):
    if result_dtype == dtype:
        pytest.skip("the same as no dtype")
    function = getattr(jaxent, name)
    logits = draw_logits(shape, dtype)
    result_dtype = result_dtype or dtype
    cotangent = draw_logits(shape[::-1], "float32").reshape(shape).astype(jnp.dtype(result_dtype))
    with x64(dtype):
        value, pullback = jax.vjp(lambda x: function(x, axis, dtype=result_dtype), jnp.asarray(logits))
        (grad,) = pullback(jnp.asarray(cotangent))

    x = to_torch(logits).requires_grad_()
    expected = getattr(functional, name)(x, axis)
    (expected_grad,) = torch.autograd.grad(expected, x, to_torch(cotangent))

    arithmetic = "float64" if result_dtype == "float64" else "float32"
    relative = np.finfo(arithmetic).eps * (8 + shape[axis])
    mass = np.abs(cotangent.astype(np.float64)).sum(axis, keepdims=True)
    assert_close(value, expected.detach(), relative * np.ptp(logits.astype(np.float64)), result_dtype)
    assert_close(grad, expected_grad, relative * mass, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integer_labels_of_any_dtype(dtype, reduction):
    """An unsigned dtype cannot hold the default ignore_index, so nothing is ignored."""
    shape, axis = HOME
    labels = draw_labels(shape, axis, None if dtype.startswith("u") else -100, dtype)
    with x64(dtype):
        assert_matches_torch("cross_entropy", draw_logits(shape, "float32"), labels, axis=axis, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [255, 2])
def test_ignore_index_of_an_unsigned_label(ignore_index):
    labels = np.array([0, ignore_index, 1], np.uint8)
    assert_matches_torch("cross_entropy", draw_logits((3, 4), "float32"), labels, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities", "nll"])
def test_concrete_arguments(kind, reduction):
    """Called with concrete arrays and no jit around it."""
    logits, weight = draw_logits((3, 5), "float32"), draw_weight(True, (3, 5), -1, "float32")
    labels = draw_probabilities((3, 5), -1, "float32") if kind == "probabilities" else draw_labels((3, 5), -1, -100)
    ours, theirs = (jaxent.nll, torch_nll) if kind == "nll" else (jaxent.cross_entropy, torch_cross_entropy)
    got = ours(jnp.asarray(logits), jnp.asarray(labels), weight=jnp.asarray(weight), reduction=reduction)
    expected = theirs(to_torch(logits), to_torch(labels), weight=to_torch(weight), reduction=reduction)
    np.testing.assert_allclose(got, expected, rtol=20 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("options", product(reduction=REDUCTIONS, label_smoothing=(0.0, 0.1)), ids=_spell)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_second_derivative(kind, options):
    """The Hessian times a vector against torch's double backward."""
    logits, tangent = draw_logits((3, 5), "float32"), draw_logits((5, 3), "float32").T
    soft = kind == "probabilities"
    labels = draw_probabilities((3, 5), -1, "float32") if soft else draw_labels((3, 5), -1, -100)
    weight = draw_weight(True, (3, 5), -1, "float32")

    def ours(x):
        return jaxent.cross_entropy(x, labels, weight=jnp.asarray(weight), **options).sum()

    def theirs(x):
        return torch_cross_entropy(x, to_torch(labels), weight=to_torch(weight), **options).sum()

    got = jax.jvp(jax.grad(ours), (jnp.asarray(logits),), (jnp.asarray(tangent),))[1]
    _, expected = torch.autograd.functional.hvp(theirs, to_torch(logits), to_torch(tangent))
    # A row of the Hessian is p * (t - sum(p * t)) * weight: products no larger than the tangent.
    error = np.finfo(np.float32).eps * (8 + 5 + 3) * np.abs(tangent).max() * weight.max()
    assert_close(got, expected, error, "float32")


def test_second_derivative_of_log_softmax():
    logits, tangent, cotangent = np.moveaxis(draw_logits((3, 5, 3), "float32"), 2, 0)

    def ours(x):
        return jnp.vdot(jaxent.log_softmax(x), cotangent)

    def theirs(x):
        return (functional.log_softmax(x, -1) * to_torch(cotangent)).sum()

    got = jax.jvp(jax.grad(ours), (jnp.asarray(logits),), (jnp.asarray(tangent),))[1]
    _, expected = torch.autograd.functional.hvp(theirs, to_torch(logits), to_torch(tangent))
    error = np.finfo(np.float32).eps * 16 * np.abs(tangent).max() * np.abs(cotangent).sum(-1).max()
    assert_close(got, expected, error, "float32")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        pytest.param((0, 3), np.zeros(0, np.int32), id="no examples"),
        pytest.param((2, 3, 0), np.zeros((2, 0), np.int32), id="an empty extra axis"),
        pytest.param((0, 0), np.zeros(0, np.int32), id="no examples and no classes"),
        pytest.param((2, 0), np.full(2, -100, np.int32), id="no classes, all ignored"),
        pytest.param((0, 3), np.zeros((0, 3), np.float32), id="probabilities, no examples"),
        pytest.param((2, 0), np.zeros((2, 0), np.float32), id="probabilities, no classes"),
        pytest.param((2, 3, 0), np.zeros((2, 3, 0), np.float32), id="probabilities, an empty extra axis"),
        pytest.param((2, 3), np.full(2, -100, np.int32), id="all ignored"),
        pytest.param((3,), np.full((), -100, np.int32), id="the only one ignored"),
    ],
)
def test_nothing_to_average(shape, labels, reduction):
    logits = np.zeros(shape, np.float32)
    axis = min(1, len(shape) - 1)
    assert_matches_torch("cross_entropy", logits, labels, axis=axis, reduction=reduction)
    if np.issubdtype(labels.dtype, np.integer):
        assert_matches_torch("nll", logits, labels, axis=axis, reduction=reduction)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_pair_of_nothing(name, shape):
    for axis in range(len(shape)):
        got = getattr(jaxent, name)(jnp.zeros(shape), axis)
        assert got.shape == getattr(functional, name)(torch.zeros(shape), axis).shape == shape


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_of_no_weight(reduction, label_smoothing):
    """The mean divides by the weights that count: by zero here."""
    weight = np.array([1, 0, 1], np.float32)
    logits, labels = draw_logits((2, 3), "float32"), np.array([1, 1], np.int32)
    got = jaxent.cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), weight=jnp.asarray(weight), reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    expected = torch_cross_entropy(
        to_torch(logits),
        to_torch(labels),
        weight=to_torch(weight),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    np.testing.assert_allclose(got, expected, rtol=20 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [0, 1])
def test_a_class_that_cannot_be(label, label_smoothing, reduction):
    """A logit of -inf: infinite loss where the target has mass on it, and a finite gradient everywhere."""
    logits = np.array([[0, -np.inf, 1], [1, 2, 3]], np.float32)
    labels = np.array([label, 2], np.int32)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    assert_matches_torch("cross_entropy", logits, labels, **options)


@pytest.mark.parametrize("row", [(np.nan, 0.0, 1.0), (np.inf, 0.0, 1.0), (np.inf, np.inf, 0.0)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_that_are_not_finite(name, row):
    logits = np.array([row, (1, 2, 3)], np.float32)
    got = getattr(jaxent, name)(jnp.asarray(logits))
    expected = getattr(functional, name)(torch.tensor(logits), -1)
    np.testing.assert_array_equal(np.isnan(got), expected.isnan().numpy())


@pytest.mark.parametrize("row", [(np.nan, 0.0, 1.0), (np.inf, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize(
    "labels", [np.array([1, 2], np.int32), np.full((2, 3), 0.3, np.float32)], ids=["hard", "soft"]
)
def test_loss_of_rows_that_are_not_finite(row, labels):
    """A NaN among the logits is never hidden, and stays in its own row."""
    logits = np.array([row, (1, 2, 3)], np.float32)
    got = jaxent.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), reduction="none")
    expected = functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels).long() if labels.ndim == 1 else torch.tensor(labels),
        reduction="none",
    )
    np.testing.assert_allclose(got, expected, rtol=20 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("options", product(reduction=REDUCTIONS, label_smoothing=(0.0, 0.1)), ids=_spell)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_where_deletes_classes(soft, options):
    """As if the masked classes were not there. Their logits may be anything, NaN too."""
    keep = np.array([True, False, True, True, False])
    logits, weight = draw_logits((3, 5), "float32"), draw_weight(True, (3, 5), -1, "float32")
    if soft:
        labels = draw_probabilities((3, 5), -1, "float32") * keep
        kept_labels = labels[:, keep]
    else:
        labels = np.array([0, 3, -100], np.int32)
        kept_labels = np.array([0, 2, -100], np.int32)

    def ours(x):
        masked = jnp.where(keep, x, jnp.nan)
        return jaxent.cross_entropy(masked, labels, where=jnp.asarray(keep), weight=jnp.asarray(weight), **options)

    value, pullback = jax.vjp(ours, jnp.asarray(logits))
    (grad,) = pullback(jnp.ones_like(value))
    x = to_torch(logits[:, keep]).requires_grad_()
    expected = torch_cross_entropy(x, to_torch(kept_labels), weight=to_torch(weight[keep]), **options)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    error = np.finfo(np.float32).eps * 16 * weight.max() * np.ptp(logits)
    assert_close(value, expected.detach(), 3 * error, "float32")
    assert_close(grad[:, keep], expected_grad, error, "float32")
    np.testing.assert_array_equal(grad[:, ~keep], 0)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_where_deletes_classes_of(name):
    keep = np.array([True, False, True, True, False])
    logits, cotangent = draw_logits((3, 5), "float32"), draw_logits((5, 3), "float32").T
    value, pullback = jax.vjp(lambda x: getattr(jaxent, name)(x, where=jnp.asarray(keep)), jnp.asarray(logits))
    (grad,) = pullback(jnp.asarray(cotangent))
    x = to_torch(logits[:, keep]).requires_grad_()
    expected = getattr(functional, name)(x, -1)
    (expected_grad,) = torch.autograd.grad(expected, x, to_torch(cotangent[:, keep]))
    error = np.finfo(np.float32).eps * 16
    assert_close(value[:, keep], expected.detach(), error * np.ptp(logits), "float32")
    assert_close(grad[:, keep], expected_grad, error * np.abs(cotangent).sum(-1).max(), "float32")
    np.testing.assert_array_equal(value[:, ~keep], 0 if name == "softmax" else -np.inf)
    np.testing.assert_array_equal(grad[:, ~keep], 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_z_loss(soft, reduction):
    """Torch has none: the square of torch's logsumexp, ignored and averaged like the loss it is added to."""
    logits, weight = draw_logits((4, 5), "float32"), draw_weight(True, (4, 5), -1, "float32")
    labels = draw_probabilities((4, 5), -1, "float32") if soft else draw_labels((4, 5), -1, -100)

    def ours(x):
        return jaxent.cross_entropy(x, labels, weight=jnp.asarray(weight), z_loss=0.25, reduction=reduction)

    def theirs(x):
        loss = torch_cross_entropy(x, to_torch(labels), weight=to_torch(weight), reduction="none")
        kept = torch.ones(4) if soft else to_torch(labels) != -100
        loss = loss + 0.25 * torch.logsumexp(x, -1) ** 2 * kept
        total = 4 if soft else weight[labels[labels != -100]].astype(np.float64).sum()
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[reduction]

    value, pullback = jax.vjp(ours, jnp.asarray(logits))
    (grad,) = pullback(jnp.ones_like(value))
    x = to_torch(logits).requires_grad_()
    expected = theirs(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    largest = np.abs(logits).max() + np.log(5)
    error = np.finfo(np.float32).eps * 16 * (weight.max() * largest + 0.25 * largest**2)
    assert_close(value, expected.detach(), 4 * error, "float32")
    assert_close(grad, expected_grad, error, "float32")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weighted": True}], ids=_spell)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("classes", [1, 2, 5, 300])
def test_a_label_whose_logit_is_infinite(classes, dtype, options):
    """A model that has diverged must not look perfect: NaN, where the loss was 0 and the gradient, too."""
    options = dict(options)
    weight = np.linspace(0.5, 2.0, classes, dtype=np.float32) if options.pop("weighted", False) else None
    logits = np.zeros((2, classes), dtype)
    logits[0, classes // 2] = np.inf
    labels = np.array([classes // 2, 0], np.int32)
    cotangent = np.ones(2, np.float32)
    arguments = ("cross_entropy", logits, labels, weight, cotangent, tuple({"reduction": "none", **options}.items()))
    value, (grad,) = jax_value_and_grads(*arguments)
    expected, (expected_grad,) = torch_value_and_grads(*arguments)
    np.testing.assert_array_equal(np.isnan(value), expected.isnan().numpy())
    np.testing.assert_array_equal(np.isnan(grad), expected_grad.isnan().numpy())
    assert np.isnan(value[0])
    assert np.isnan(grad[0]).all()
    composed = jaxent.nll(jaxent.log_softmax(jnp.asarray(logits)), labels, reduction="none")
    assert np.isnan(composed[0])
    hessian = jax.hessian(lambda x: jaxent.cross_entropy(x, labels[0]))(jnp.asarray(logits[0]))
    assert np.isnan(hessian).all()
    eye = jnp.eye(2, dtype=dtype)
    fused, gradient = jax.value_and_grad(jaxent.linear_cross_entropy)(eye, jnp.asarray(logits), labels, chunk_size=1)
    assert np.isnan(fused)
    assert np.isnan(gradient[0]).any()


def test_a_single_class_that_cannot_be():
    for f in (
        jaxent.softmax,
        jaxent.log_softmax,
        lambda x: jaxent.cross_entropy(x, jnp.array([0]), reduction="none"),
    ):
        assert np.isnan(f(jnp.full((1, 1), -jnp.inf))).all()


def test_float16_logits_that_overflow_on_the_way():
    loss = jax.jit(lambda x: jaxent.cross_entropy(x * jnp.float16(400.0), jnp.array([0])))
    assert np.isnan(loss(jnp.array([[300.0, 1.0]], jnp.float16)))


@pytest.mark.parametrize("labels", [np.full(2, -100, np.int32), np.zeros(0, np.int32), np.zeros((0, 3), np.float32)])
@pytest.mark.parametrize("name", ["cross_entropy", "nll", "linear_cross_entropy"])
def test_derivatives_of_a_mean_over_nothing(name, labels):
    """The mean is NaN and its derivatives are 0, in both modes, as PyTorch's gradient is."""
    x = jnp.ones((len(labels), 3))
    arguments = (x, jnp.eye(3), labels) if name == "linear_cross_entropy" else (x, labels)
    loss = getattr(jaxent, name)

    def f(x):
        return loss(x, *arguments[1:])

    value, pushed = jax.jvp(f, (x,), (jnp.ones_like(x),))
    assert np.isnan(value)
    assert pushed == 0
    np.testing.assert_array_equal(jax.grad(f)(x), jnp.zeros_like(x))
    np.testing.assert_array_equal(jax.jacfwd(f)(x), jnp.zeros_like(x))
    if name in TORCH and labels.dtype == np.int32:
        z = torch.ones((len(labels), 3), requires_grad=True)
        TORCH[name](z, to_torch(labels)).backward()
        np.testing.assert_array_equal(z.grad, np.zeros_like(z.grad))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn"])
def test_narrower_floats_are_computed_in_float32(dtype):
    logits = (draw_logits((4, 6), "float32") / 2).astype(jnp.dtype(dtype))
    labels = jnp.array([0, 1, 5, 2])
    wide = jnp.asarray(logits.astype(np.float32))
    for f in (
        lambda x: jaxent.cross_entropy(x, labels, reduction="none"),
        lambda x: jaxent.cross_entropy(x, labels, label_smoothing=0.1, z_loss=0.1),
        lambda x: jaxent.softmax(x, dtype=jnp.float32),
        lambda x: jaxent.log_softmax(x, dtype=jnp.float32),
    ):
        np.testing.assert_allclose(jax.jit(f)(jnp.asarray(logits)), f(wide), rtol=1e-6)
    assert jaxent.softmax(jnp.asarray(logits)).dtype == logits.dtype
    grad = jax.grad(lambda x: jaxent.cross_entropy(x, labels, reduction="sum"))(jnp.asarray(logits))
    want = jax.grad(lambda x: jaxent.cross_entropy(x, labels, reduction="sum"))(wide)
    assert grad.dtype == logits.dtype
    info = jnp.finfo(dtype)
    np.testing.assert_allclose(np.float32(grad), want, rtol=float(info.eps), atol=float(info.smallest_subnormal))
