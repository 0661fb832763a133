"""The way of accelerators through linear_distillation_loss, on a CPU, against divergences of full logits.

What it takes on a TPU and a GPU is compiled and counted by benchmarks/compiled_linear.py. Sharding is in
_sharding_cases.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear_distillation import check_matrix_products, dense, linear

from jaxent import distillation_loss, linear_distillation_loss
from jaxent._chunks import block_of_classes
from jaxent._class_axis import ClassAxis
from jaxent._class_blocks import of_classes, row_values
from jaxent._distillation import Divergence, gradient_of_student

N, D, E, C = 9, 4, 3, 300  # three blocks of classes, of which the last overlaps the one before
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(N, D)), RNG.normal(size=(D, C)), RNG.normal(size=C)
STATES, OF_TEACHER, ITS_BIAS = RNG.normal(size=(N, E)), RNG.normal(size=(E, C)), RNG.normal(size=C)
ARRAYS = HIDDEN, KERNEL, STATES, OF_TEACHER, BIAS, ITS_BIAS
STUDENTS = (0, 1, 4)  # of these
WEIGHT = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0, 0.0, 3.0])
OPTIONS = {
    "forward": {},
    "between": {"beta": 0.4, "temperature": 1.7},
    "reverse, masked": {"beta": 1.0, "where": np.arange(C) % 3 != 2},
    "weighted": {"sample_weight": WEIGHT, "beta": 0.4},
    "single": {"reduction": "none", "beta": 0.4},
    "weighted, single": {"sample_weight": WEIGHT, "reduction": "none"},
}


AS_THEY_DO = pytest.mark.usefixtures("accelerators")


@AS_THEY_DO
@pytest.mark.more(cases=1)
@pytest.mark.parametrize("chunk_size", [None, 2])  # all tokens at once in the second walk, or four
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients(options, chunk_size):
    with jax.enable_x64(True):
        for derivative in (partial(jax.value_and_grad, argnums=STUDENTS), lambda f: f):
            got = jax.jit(derivative(partial(linear, **options, chunk_size=chunk_size)))(*ARRAYS)
            want = jax.jit(derivative(partial(dense, **options)))(*ARRAYS)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, want)


@AS_THEY_DO
def test_a_dominant_class_is_recognised_where_its_logits_are_rounded_in_another_way():
    """Products of other shapes have other last bits; where a class leads by 22, gradients are tiny."""
    n, d, c = 32, 512, 300
    rng = np.random.default_rng(1)
    kernel, labels = rng.normal(size=(d, c)) / np.sqrt(d), rng.integers(c, size=n)
    hidden = 22.0 * kernel.T[labels] + 0.05 * rng.normal(size=(n, d))
    arrays = hidden, kernel, hidden + rng.normal(size=(n, d)), kernel
    narrow = [x.astype(np.float32) for x in arrays]
    got = jax.grad(partial(linear_distillation_loss, chunk_size=8), (0, 1))(*narrow)
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in narrow]
        want = jax.grad(lambda h, k, g, v: distillation_loss(h @ k, g @ v), (0, 1))(*wide)
    for a, b in zip(got, want, strict=True):
        assert np.max(np.abs(b)) < 1e-6
        np.testing.assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b)))


@AS_THEY_DO
def test_what_has_no_weight_may_hold_anything():
    nothing = (WEIGHT == 0.0)[:, None]
    broken = np.where(nothing, np.nan, HIDDEN), KERNEL, np.where(nothing, np.inf, STATES), *ARRAYS[3:]
    f = jax.grad(partial(linear, sample_weight=WEIGHT, chunk_size=2), STUDENTS)
    with jax.enable_x64(True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), f(*broken), f(*ARRAYS))


@AS_THEY_DO
@pytest.mark.more
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)])
@pytest.mark.parametrize("small", [1.0, 1e-7])
def test_half_precision(dtype, bound, small):
    """Each gradient is rounded once before a product and once after; a small weight of all is not lost."""
    arrays = [jnp.asarray(x, dtype) for x in ARRAYS]
    wide = [x.astype(jnp.float32) for x in arrays]

    def loss(f, *arrays):
        return jnp.sum(f(*arrays, sample_weight=small * WEIGHT, reduction="sum")) / small

    got = jax.grad(partial(loss, partial(linear, chunk_size=2)), STUDENTS)(*arrays)
    want = jax.grad(partial(loss, dense), STUDENTS)(*wide)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.float32(a), b, atol=bound * float(jnp.max(jnp.abs(b))))


@AS_THEY_DO
@pytest.mark.more(cases=1)
@pytest.mark.parametrize(("reduction", "times"), [("mean", 2), ("none", 3)])
def test_matrix_products_and_none_for_tokens_without_weight(reduction, times):
    """Of a mean six."""
    check_matrix_products(reduction, times)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_gradient_of_some_classes_is_a_part_of_the_gradient(beta):
    x, t = jnp.asarray(HIDDEN @ KERNEL, jnp.float32), jnp.asarray(STATES @ OF_TEACHER, jnp.float32)
    axis, gradient = ClassAxis(1), partial(gradient_of_student, Divergence(2.0, beta))
    whole, rows = jax.jit(lambda x, t: (gradient(axis, x, t), row_values(gradient, axis, x, t)))(x, t)
    assert all(row.shape == (N, 1) for row in rows)
    part = jax.jit(lambda rows, x, t: of_classes(gradient, axis, rows, 100, C, x, t))(
        rows, x[:, 100:110], t[:, 100:110]
    )
    np.testing.assert_allclose(part, whole[:, 100:110], rtol=1e-6, atol=1e-9)


def test_blocks_are_tiles_and_a_whole_number_of_them_if_that_can_be():
    assert block_of_classes(8192, 128256, 256) == 768  # up to 2004 would do
    assert 128256 % 768 == 0
    assert block_of_classes(8192, 50257, 256) == 768  # none divides a prime
    assert block_of_classes(8192, 32768, 256) == 512
    assert block_of_classes(10, 5, 3) == 5
    assert block_of_classes(8192, 128256, 1) == 128
