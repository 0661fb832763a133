"""linear_distillation_loss is distillation_loss of full logits, which test_distillation.py compares with torch.

Its loops are those of linear_cross_entropy. Sharding is in _sharding_cases.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear_cross_entropy import multiplications

from jaxent import distillation_loss, linear_distillation_loss

pytestmark = pytest.mark.more(cases=1)

N, D, E, C = 7, 4, 3, 5
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = 1.5 * RNG.normal(size=(N, D)), RNG.normal(size=(D, C)), RNG.normal(size=C)
STATES, OF_TEACHER, ITS_BIAS = RNG.normal(size=(N, E)), RNG.normal(size=(E, C)), RNG.normal(size=C)
ARRAYS = HIDDEN, KERNEL, STATES, OF_TEACHER, BIAS, ITS_BIAS
STUDENTS = (0, 1, 4)  # of these
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0])
OPTIONS = {
    "forward": {},
    "between": {"beta": 0.4, "temperature": 1.7},
    "reverse, masked": {"beta": 1.0, "where": np.arange(C) != 2},
    "weighted": {"sample_weight": WEIGHT, "beta": 0.4},
    "single": {"reduction": "none"},
    "weighted, single": {"sample_weight": WEIGHT, "reduction": "none"},
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def linear(hidden, kernel, states, of_teacher, bias, its_bias, **options):
    arrays = hidden, kernel, states, of_teacher
    return jnp.sum(jnp.sin(linear_distillation_loss(*arrays, bias=bias, teacher_bias=its_bias, **options)))


def dense(hidden, kernel, states, of_teacher, bias, its_bias, **options):
    return jnp.sum(jnp.sin(distillation_loss(hidden @ kernel + bias, states @ of_teacher + its_bias, **options)))


@pytest.mark.parametrize("train_teacher", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_derivatives(options, train_teacher, float64):
    of = range(6) if train_teacher else STUDENTS
    options = options | {"train_teacher": train_teacher}
    ours, theirs = partial(linear, **options, chunk_size=3), partial(dense, **options)
    for derivative in (
        lambda f: f,
        lambda f: jax.grad(f, of),
        lambda f: jax.jacfwd(f, of),
        lambda f: jax.hessian(f, (0, 1)),
        lambda f: jax.jacrev(jax.grad(f, (0, 1)), (0, 1)),
    ):
        got, want = (jax.jit(derivative(f))(*ARRAYS) for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, want)


def test_the_teacher_gets_no_gradient(float64):
    gradients = jax.grad(linear, range(6))(*ARRAYS)
    assert [bool(np.any(g)) for g in gradients] == [i in STUDENTS for i in range(6)]


@pytest.mark.more
def test_what_has_no_weight_may_hold_anything(float64):
    nothing = (WEIGHT == 0.0)[:, None]
    broken = np.where(nothing, np.nan, HIDDEN), KERNEL, np.where(nothing, np.inf, STATES), *ARRAYS[3:]
    cotangent = RNG.normal(size=N)
    for reduction in ("mean", "none"):

        def f(hidden, kernel, states, of_teacher, bias, its_bias, reduction=reduction):
            options = {"bias": bias, "teacher_bias": its_bias, "sample_weight": WEIGHT, "reduction": reduction}
            return jnp.sum(cotangent * linear_distillation_loss(hidden, kernel, states, of_teacher, **options))

        for derivative in (f, jax.grad(f, STUDENTS), jax.hessian(f, (1,))):
            got, want = derivative(*broken), derivative(*ARRAYS)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, want)


@pytest.mark.parametrize(("reduction", "times"), [("mean", 1), ("none", 2)])
def test_matrix_products_and_none_for_tokens_without_weight(reduction, times):
    """Of a mean four: two for logits, one for either gradient; single losses make both logits twice."""
    check_matrix_products(reduction, times)


def check_matrix_products(reduction, times):
    """One for either gradient, and so many times those that make the logits of both."""
    tokens, features, its_features, classes, chunk_size = 60, 48, 32, 80, 10

    def f(hidden, kernel, states, of_teacher, weight):
        arrays = hidden, kernel, states, of_teacher
        options = {"sample_weight": weight, "reduction": reduction, "chunk_size": chunk_size}
        return jnp.sum(jnp.sin(linear_distillation_loss(*arrays, **options)))

    sizes = ((tokens, features), (features, classes), (tokens, its_features), (its_features, classes), (tokens,))
    shapes = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
    program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile().as_text()
    logits = times * (features + its_features)
    assert multiplications(program, tokens // chunk_size) == (logits + 2 * features) * tokens * classes
    assert multiplications(program, 0) == 0


def test_memory():
    """At most 6 % of one model's logits, of which there are 4 GiB."""
    tokens, features, classes = 8192, 1024, 128256
    sizes = ((tokens, features), (features, classes), (tokens, features), (features, classes))
    shapes = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
    gradient = jax.value_and_grad(partial(linear_distillation_loss, beta=0.5), (0, 1))
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.06 * tokens * classes * 4


def test_a_teacher_of_a_wider_dtype(float64):
    narrow = [x.astype(np.float32) for x in (HIDDEN, KERNEL)]

    def loss(hidden, kernel, bias):
        arrays = hidden, kernel, STATES, OF_TEACHER
        return linear_distillation_loss(*arrays, bias=bias, train_teacher=True, chunk_size=2)

    bias = BIAS.astype(np.float32)
    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*narrow, bias)
    want, wanted = jax.value_and_grad(loss, (0, 1, 2))(*(x.astype(np.float64) for x in (*narrow, bias)))
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, want, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), gradients, wanted)
    jax.hessian(loss)(*narrow, bias)


def test_half_precision_is_computed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in ARRAYS[:4]]
    wide = [x.astype(jnp.float32) for x in arrays]
    value, gradient = jax.value_and_grad(linear_distillation_loss)(*arrays)
    want, exact = jax.value_and_grad(linear_distillation_loss)(*wide)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=0.02, atol=2e-3)


def test_what_does_not_fit_is_refused():
    def refused(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            linear_distillation_loss(*arguments, **options)

    four = ARRAYS[:4]
    refused(ValueError, r"teacher_kernel must have shape \(3, classes\) to fit teacher_hidden", *four[:3], KERNEL)
    refused(ValueError, "teacher_kernel must have the 5 classes of kernel", *four[:3], OF_TEACHER[:, :4])
    refused(ValueError, "teacher_hidden must be of the same tokens as hidden", *four[:2], STATES[:3], OF_TEACHER)
    refused(ValueError, r"teacher_bias must have shape \(5,\)", *four, teacher_bias=BIAS[:2])
    refused(TypeError, "teacher_hidden must have a floating dtype", *four[:2], np.ones((N, E), int), OF_TEACHER)
    refused(ValueError, r"beta must lie in \[0, 1\]", *four, beta=-0.1)
