"""Every bad argument raises at once, in one sentence: which it is, what was got and what is expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxent

LOGITS = jnp.zeros((2, 3))
LABELS = jnp.array([0, 2])
PROBABILITIES = jnp.full((2, 3), 1 / 3)
HIDDEN, KERNEL = jnp.zeros((2, 4)), jnp.zeros((4, 3))


def cross_entropy(**bad):
    arguments = {"logits": LOGITS, "labels": LABELS} | bad
    return lambda: jaxent.cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def nll(**bad):
    arguments = {"log_probs": LOGITS, "labels": LABELS} | bad
    return lambda: jaxent.nll(arguments.pop("log_probs"), arguments.pop("labels"), **arguments)


def linear_cross_entropy(**bad):
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS} | bad
    positional = [arguments.pop(name) for name in ("hidden", "kernel", "labels")]
    return lambda: jaxent.linear_cross_entropy(*positional, **arguments)


def softmax(**bad):
    arguments = {"logits": LOGITS} | bad
    return lambda: jaxent.softmax(arguments.pop("logits"), **arguments)


def log_softmax(**bad):
    arguments = {"logits": LOGITS} | bad
    return lambda: jaxent.log_softmax(arguments.pop("logits"), **arguments)


COMPLEX, INTEGER, BOOLEAN = (jnp.zeros((2, 3), dtype) for dtype in (complex, int, bool))
AXIS_NAMES = [  # a bad argument, its error, and what the message must hold: its name first
    ({"axis_name": "model"}, ValueError, ("axis_name", "'model'", "jax.shard_map")),
    ({"axis_name": ("model", "data")}, ValueError, ("axis_name", "'model'", "jax.shard_map")),
    ({"axis_name": 1}, ValueError, ("axis_name", "1", "jax.shard_map")),
]
SHARED = [
    *AXIS_NAMES,
    ({"axis": 2}, ValueError, ("axis", "2")),
    ({"axis": -3}, ValueError, ("axis", "-3")),
    ({"axis": 1.0}, TypeError, ("axis", "1.0")),
    ({"axis": ()}, ValueError, ("axis", "()")),
    ({"axis": (1, -1)}, ValueError, ("axis", "different", "(1, -1)")),
    ({"axis": (1, 2)}, ValueError, ("axis", "2")),
    ({"axis": (0, 1), "axis_name": "model"}, ValueError, ("axis_name", "single", "(0, 1)")),
]
OPTIONS = [
    ({"reduction": "average"}, ValueError, ("reduction", "'average'", "none", "mean", "sum")),
    ({"reduction": None}, ValueError, ("reduction", "None", "none", "mean", "sum")),
    ({"labels": jnp.zeros(3, int)}, ValueError, ("labels", "(3,)", "(2,)")),
    ({"labels": jnp.zeros((2, 1), int)}, ValueError, ("labels", "(2, 1)", "(2,)")),
    ({"labels": jnp.array(0)}, ValueError, ("labels", "()", "(2,)")),
    ({"labels": jnp.array([True, False])}, TypeError, ("labels", "bool", "integer")),
    ({"labels": jnp.zeros((2,), complex)}, TypeError, ("labels", "complex64", "integer")),
    ({"weight": jnp.ones(2)}, ValueError, ("weight", "(2,)", "(3,)")),
    ({"weight": jnp.ones((1, 3))}, ValueError, ("weight", "(1, 3)", "(3,)")),
    ({"weight": jnp.array(1.0)}, ValueError, ("weight", "()", "(3,)")),
    ({"weight": jnp.ones(3, complex)}, TypeError, ("weight", "complex64", "float")),
    ({"weight": jnp.ones(3, bool)}, TypeError, ("weight", "bool", "float")),
    ({"ignore_index": 1.0}, TypeError, ("ignore_index", "1.0")),
]
LOSSES = [*SHARED, *OPTIONS]
MASKS = [
    ({"where": jnp.ones((2, 3))}, TypeError, ("where", "float32", "bool")),
    ({"where": jnp.ones((2, 2), bool)}, ValueError, ("where", "(2, 2)", "(2, 3)")),
    ({"where": jnp.ones((1, 2, 3), bool)}, ValueError, ("where", "(1, 2, 3)", "(2, 3)")),
]
SOFTMAXES = (softmax, log_softmax)
ON_LOGITS = (*SOFTMAXES, cross_entropy)
CASES = [
    *[(cross_entropy, *case) for case in LOSSES + MASKS],
    *[(nll, *case) for case in LOSSES],
    *[(function, *case) for case in SHARED + MASKS for function in SOFTMAXES],
    *[(function, {"logits": COMPLEX}, TypeError, ("logits", "complex64", "float")) for function in ON_LOGITS],
    *[(function, {"logits": BOOLEAN}, TypeError, ("logits", "bool", "float")) for function in ON_LOGITS],
    *[(function, {"logits": jnp.array(1.0)}, ValueError, ("logits", "()")) for function in ON_LOGITS],
    *[(function, {"dtype": "int32"}, TypeError, ("dtype", "int32", "float")) for function in SOFTMAXES],
    (cross_entropy, {"logits": INTEGER}, TypeError, ("logits", "int32", "float")),
    (nll, {"log_probs": COMPLEX}, TypeError, ("log_probs", "complex64", "float")),
    (nll, {"log_probs": INTEGER}, TypeError, ("log_probs", "int32", "float")),
    (nll, {"log_probs": jnp.array(1.0)}, ValueError, ("log_probs", "()")),
    (nll, {"labels": PROBABILITIES[0]}, ValueError, ("labels", "(3,)", "(2, 3)")),
    *[
        (function, *case)
        for function in (cross_entropy, linear_cross_entropy)
        for case in [
            ({"labels": PROBABILITIES[:, :2]}, ValueError, ("labels", "(2, 2)", "(2, 3)")),
            ({"labels": PROBABILITIES[0]}, ValueError, ("labels", "(3,)", "(2, 3)")),
            ({"labels": PROBABILITIES, "ignore_index": 1}, ValueError, ("ignore_index", "1", "prob")),
            ({"labels": PROBABILITIES, "ignore_index": 0}, ValueError, ("ignore_index", "0", "prob")),
            ({"label_smoothing": -0.1}, ValueError, ("label_smoothing", "-0.1", "0", "1")),
            ({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "1.5", "0", "1")),
            ({"label_smoothing": float("nan")}, ValueError, ("label_smoothing", "nan", "0", "1")),
            ({"label_smoothing": "a"}, TypeError, ("label_smoothing", "'a'")),
            ({"z_loss": "a"}, TypeError, ("z_loss", "'a'")),
        ]
    ],
    *[(linear_cross_entropy, *case) for case in AXIS_NAMES + OPTIONS],
    (linear_cross_entropy, {"hidden": jnp.array(1.0)}, ValueError, ("hidden", "()")),
    (linear_cross_entropy, {"hidden": jnp.zeros((2, 4), int)}, TypeError, ("hidden", "int32", "float")),
    (linear_cross_entropy, {"kernel": KERNEL.T}, ValueError, ("kernel", "(4, classes)", "(2, 4)", "(3, 4)")),
    (linear_cross_entropy, {"kernel": KERNEL[0]}, ValueError, ("kernel", "(4, classes)", "(3,)")),
    (linear_cross_entropy, {"kernel": KERNEL[None]}, ValueError, ("kernel", "(4, classes)", "(1, 4, 3)")),
    (linear_cross_entropy, {"kernel": KERNEL > 0}, TypeError, ("kernel", "bool", "float")),
    (linear_cross_entropy, {"kernel": None}, TypeError, ("kernel", "NoneType", "array")),
    (linear_cross_entropy, {"bias": jnp.zeros(4)}, ValueError, ("bias", "(3,)", "(4,)")),
    (linear_cross_entropy, {"bias": jnp.zeros((1, 3))}, ValueError, ("bias", "(3,)", "(1, 3)")),
    (linear_cross_entropy, {"bias": jnp.zeros(3, int)}, TypeError, ("bias", "int32", "float")),
    (linear_cross_entropy, {"bias": True}, TypeError, ("bias", "bool", "array")),
    (linear_cross_entropy, {"where": np.ones(4, bool)}, ValueError, ("where", "(3,)", "(4,)")),
    (linear_cross_entropy, {"where": np.ones(3)}, TypeError, ("where", "boolean", "float64")),
    (linear_cross_entropy, {"logit_scale": "a"}, TypeError, ("logit_scale", "'a'")),
    (linear_cross_entropy, {"logit_scale": np.ones(3)}, ValueError, ("logit_scale", "scalar", "(3,)")),
    (linear_cross_entropy, {"logit_scale": np.ones((), int)}, TypeError, ("logit_scale", "int64")),
    (linear_cross_entropy, {"softcap": 0.0}, ValueError, ("softcap", "0.0", "positive")),
    (linear_cross_entropy, {"softcap": -1}, ValueError, ("softcap", "-1", "positive")),
    (linear_cross_entropy, {"softcap": float("nan")}, ValueError, ("softcap", "nan", "positive")),
    (linear_cross_entropy, {"softcap": float("inf")}, ValueError, ("softcap", "inf", "finite")),
    (linear_cross_entropy, {"softcap": "a"}, TypeError, ("softcap", "'a'")),
    (linear_cross_entropy, {"chunk_size": 0}, ValueError, ("chunk_size", "0", "at least 1")),
    (linear_cross_entropy, {"chunk_size": -1}, ValueError, ("chunk_size", "-1", "at least 1")),
    (linear_cross_entropy, {"chunk_size": 1.5}, TypeError, ("chunk_size", "1.5", "integer")),
]


def _name(case):
    function, bad, *_ = case
    spelled = [f"{k}={v.dtype}{v.shape}" if hasattr(v, "shape") else f"{k}={v!r}" for k, v in bad.items()]
    return f"{function.__name__}({', '.join(spelled)})"


@pytest.mark.parametrize(("function", "bad", "error", "parts"), CASES, ids=map(_name, CASES))
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_message(function, bad, error, parts, traced):
    call = function(**bad)
    with pytest.raises(error) as caught:
        jax.jit(call)() if traced else call()
    message = str(caught.value)
    assert message.startswith(parts[0]) or f" {parts[0]} " in message
    for part in parts:
        assert re.search(rf"(?<![\w.]){re.escape(part)}", message), f"{part} is not in: {message}"
    assert "\n" not in message


ARRAYS = [  # every argument that is an array
    *[(function, {"logits": np.zeros((2, 3), np.float32)}) for function in ON_LOGITS],
    *[(function, {"where": np.ones((2, 3), bool)}) for function in ON_LOGITS],
    (nll, {"log_probs": np.zeros((2, 3), np.float32)}),
    (linear_cross_entropy, {"hidden": np.zeros((2, 4), np.float32)}),
    (linear_cross_entropy, {"kernel": np.zeros((4, 3), np.float32)}),
    (linear_cross_entropy, {"bias": np.zeros(3, np.float32)}),
    *[
        (function, argument)
        for function in (cross_entropy, nll, linear_cross_entropy)
        for argument in [
            {"labels": np.array([0, 2])},
            {"labels": np.full((2, 3), 1 / 3)},
            {"weight": np.ones(3)},
            {"sample_weight": np.ones(2)},
        ]
    ],
]


class Tensor:
    """Of another library, whose dtypes numpy cannot read."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, object()


@pytest.mark.parametrize(("function", "argument"), ARRAYS, ids=map(_name, ARRAYS))
def test_arrays_that_jax_does_not_read(function, argument):
    """Of each argument the name, what it is, and what to do about it."""
    [(name, array)] = argument.items()
    function(**argument)()
    what_to_do = "jnp.asarray makes one"
    with pytest.raises(TypeError, match=rf"^{name} must be a jax or numpy array, got list; {what_to_do}"):
        function(**{name: array.tolist()})()
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got {__name__}.Tensor; {what_to_do}"):
        function(**{name: Tensor(array)})()
    with pytest.raises(TypeError, match=rf"^{name} must hold numbers, got key<fry>"):
        function(**{name: jax.random.key(0)})()
    if array.dtype != bool:  # of one byte
        swapped = array.astype(array.dtype.newbyteorder())
        with pytest.raises(TypeError, match=rf"^{name} must be of native byte order, got [<>][if]\d; x\.astype\("):
            function(**{name: swapped})()
        function(**{name: swapped.astype(swapped.dtype.newbyteorder("="))})()


def test_tensors_and_dtypes_of_pytorch():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^logits must be a jax or numpy array, got torch\.Tensor; jnp\.asarray "):
        jaxent.softmax(torch.zeros(2, 3))
    jaxent.softmax(jnp.asarray(torch.zeros(2, 3)))
    with pytest.raises(TypeError, match=r"^dtype must be a floating dtype that JAX has, got torch\.float16$"):
        jaxent.softmax(LOGITS, dtype=torch.float16)


@pytest.mark.parametrize("loss", [jaxent.cross_entropy, jaxent.nll])
@pytest.mark.parametrize("options", [{}, {"weight": jnp.ones(3)}, {"sample_weight": jnp.ones((2, 4))}], ids=str)
def test_pytorchs_class_axis_is_named_where_it_fits(loss, options):
    scores, labels = jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), int)
    assert np.isfinite(loss(scores, labels, axis=1, **options))
    with pytest.raises(ValueError, match=r"^labels .* got shape \(2, 4\), which fits axis=1$"):
        loss(scores, labels, **options)
    for shape, other in (((2, 3, 4), (3, 4)), ((2, 3, 4), (2,)), ((3,), (3,))):
        with pytest.raises(ValueError, match=r"^labels .* got shape \([\d, ]+\)$"):
            loss(jnp.zeros(shape), jnp.zeros(other, int))


def test_no_axis_is_named_to_who_cannot_choose_it():
    with pytest.raises(ValueError, match=r"^labels .* got shape \(2, 5\)$"):
        jaxent.linear_cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((4, 5)), jnp.zeros((2, 5), int))


@pytest.mark.parametrize("function", [cross_entropy, nll, linear_cross_entropy])
@pytest.mark.parametrize("label", [True, np.True_, 1.0, 2**70])
def test_numbers_that_are_no_labels_of_a_row(function, label):
    row = {"hidden": HIDDEN[0]} if function is linear_cross_entropy else {"log_probs": LOGITS[0]}
    row = {"logits": LOGITS[0]} if function is cross_entropy else row
    with pytest.raises(TypeError, match=r"^labels must .*, got (bool|float|object)(;|$)"):
        function(labels=label, **row)()


@pytest.mark.parametrize("loss", [jaxent.cross_entropy, jaxent.nll, jaxent.nll_loss])
@pytest.mark.parametrize(
    ("shape", "labels", "position", "value"),
    [
        ((3, 4), [0, 4, 5], "labels[1]", "4"),
        ((3, 4), [3, -100, -1], "labels[2]", "-1"),
        ((3, 4), [-5, 9, 0], "labels[0]", "-5"),
        ((4,), 7, "labels", "7"),
        ((2, 2, 4), [[0, 1], [2, 4]], "labels[1, 1]", "4"),
        ((1, 4), [2**31 - 1], "labels[0]", "2147483647"),
    ],
)
def test_concrete_label_out_of_range(loss, shape, labels, position, value):
    with pytest.raises(ValueError, match="labels") as caught:
        loss(jnp.zeros(shape), jnp.array(labels))
    message = str(caught.value)
    assert message.endswith(f"got {position} = {value}")
    assert "[0, 4)" in message
    assert "ignore_index=-100" in message


@pytest.mark.parametrize(
    ("lead", "labels", "position", "value"),
    [
        ((), 3, "labels", "3"),
        ((3,), [0, -100, -1], "labels[2]", "-1"),
        ((2, 2), [[0, 1], [2, 3]], "labels[1, 1]", "3"),
    ],
)
def test_concrete_label_out_of_range_of_the_kernel(lead, labels, position, value):
    """A position in the labels as they were given, not in a row of tokens."""
    with pytest.raises(ValueError, match="labels") as caught:
        jaxent.linear_cross_entropy(jnp.zeros((*lead, 4)), KERNEL, np.array(labels))
    message = str(caught.value)
    assert message.endswith(f"got {position} = {value}")
    assert "[0, 3) or equal ignore_index=-100" in message


def test_ignored_labels_are_in_range():
    """Out of range only where it is not the ignore_index in use, and never without one."""
    labels = jnp.array([0, -100])
    assert np.isfinite(jaxent.cross_entropy(LOGITS, labels))
    assert np.isfinite(jaxent.cross_entropy(LOGITS, jnp.array([0, 7]), ignore_index=7))
    for ignore_index in (None, -1):
        with pytest.raises(ValueError, match="-100"):
            jaxent.cross_entropy(LOGITS, labels, ignore_index=ignore_index)


def test_concrete_labels_closed_over_by_a_jit():
    labels = jnp.array([0, 3])
    with pytest.raises(ValueError, match="labels"):
        jax.jit(lambda x: jaxent.cross_entropy(x, labels))(LOGITS)
    with pytest.raises(ValueError, match="labels"):
        jax.grad(lambda x: jaxent.cross_entropy(x, np.array([0, 3])))(LOGITS)


@pytest.mark.parametrize("bad", [3, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"ignore_index": None}], ids=str)
def test_traced_label_out_of_range(bad, options):
    """NaN for that example alone, in the loss and in the gradient; never a class wrapped or clamped."""
    logits = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0]])

    @jax.jit
    def run(labels):
        loss, pullback = jax.vjp(lambda x: jaxent.cross_entropy(x, labels, reduction="none", **options), logits)
        return loss, *pullback(jnp.ones(3))

    loss, grad = run(jnp.array([0, bad, 2]))
    good_loss, good_grad = run(jnp.array([0, 1, 2]))
    assert np.isnan(loss[1])
    assert np.isnan(grad[1]).all()
    np.testing.assert_array_equal(loss[::2], good_loss[::2])
    np.testing.assert_array_equal(grad[::2], good_grad[::2])


@pytest.mark.parametrize("bad", [3, -1, 2**31 - 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_traced_label_out_of_range_in_nll(bad, weighted):
    log_probs = jnp.array([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]])
    weight = jnp.array([1.0, 2.0, 3.0]) if weighted else None

    @jax.jit
    def run(labels):
        loss, pullback = jax.vjp(lambda x: jaxent.nll(x, labels, weight=weight, reduction="none"), log_probs)
        return loss, *pullback(jnp.ones(2))

    loss, grad = run(jnp.array([0, bad]))
    assert np.isnan(loss[1])
    assert np.isnan(grad[1]).all()
    np.testing.assert_array_equal(loss[0], 1.0)
    np.testing.assert_array_equal(grad[0], [-1.0, 0.0, 0.0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [jaxent.cross_entropy, jaxent.nll])
def test_traced_label_out_of_range_reduced(loss, reduction):
    """One bad label spoils the reduced loss visibly."""
    value = jax.jit(lambda labels: loss(LOGITS, labels, reduction=reduction))(jnp.array([0, 3]))
    assert np.isnan(value)


def test_a_narrow_label_dtype_is_not_wrapped():
    """A uint8 label of 255 is no class of 300 - 45, and int8 cannot even spell class 200."""
    logits = jnp.zeros((1, 300))
    value = jax.jit(lambda labels: jaxent.cross_entropy(logits, labels))(jnp.array([-56], jnp.int8))
    assert np.isnan(value)
    value = jax.jit(lambda labels: jaxent.cross_entropy(logits, labels))(jnp.array([255], jnp.uint8))
    np.testing.assert_allclose(value, np.log(300), rtol=1e-6)


@pytest.mark.parametrize("loss", [jaxent.cross_entropy, jaxent.nll])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_checkify(loss, reduction):
    """Under checkify's `index_checks` a traced label out of range is an error, and good ones are none."""
    checked = jax.jit(
        checkify.checkify(
            lambda labels: loss(LOGITS, labels, reduction=reduction),
            errors=checkify.index_checks,
        )
    )
    error, _ = checked(jnp.array([0, 3]))
    with pytest.raises(checkify.JaxRuntimeError):
        error.throw()
    error, value = checked(jnp.array([0, 2]))
    error.throw()
    assert np.isfinite(value).all()
    error, _ = checked(jnp.array([0, -100]))
    error.throw()


def test_checkify_of_the_gradient():
    checked = checkify.checkify(
        jax.jit(jax.grad(lambda x, labels: jaxent.cross_entropy(x, labels))),
        errors=checkify.index_checks,
    )
    error, _ = checked(LOGITS, jnp.array([0, 3]))
    with pytest.raises(checkify.JaxRuntimeError):
        error.throw()


@pytest.mark.parametrize("dtype", ["int4", "int8", "int64"])
def test_negative_labels_of_any_integer_dtype_are_refused(dtype):
    labels = jnp.array([3, -1], dtype) if dtype == "int4" else np.array([3, -1], dtype)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 300\).*labels\[1\] = -1"):
        jaxent.cross_entropy(jnp.zeros((2, 300)), labels)  # more classes than a byte counts
