"""distillation_loss against torch's kl_div and, where student and teacher nearly agree, 50 digits.

Sharding is in _sharding_cases.py.
"""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch

import jaxent
from jaxent import distillation_loss

pytestmark = pytest.mark.more(cases=1)

N, C = 5, 6
RNG = np.random.default_rng(0)
STUDENT, TEACHER = 2.0 * RNG.normal(size=(2, N, C))
COTANGENT = RNG.normal(size=N)
WEIGHT = np.array([1.0, 0.0, 0.5, 2.0, 1.0])
WHERE = RNG.random((N, C)) < 0.7
WHERE[:, 0], WHERE[3] = True, False
BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def theirs(student, teacher, beta, temperature):
    """What trl's GKD trainer computes, in the formulas of Agarwal et al.: one divergence a row."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))

    def kl(log_a, log_b):
        return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta == 0.0 else kl(log_q, log_p)
    mixture = torch.logsumexp(torch.stack([log_q + np.log(1 - beta), log_p + np.log(beta)]), 0)
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def both(beta, temperature):
    """Ours and theirs as functions of the logits, to a number."""

    def ours(student, teacher):
        options = {"beta": beta, "temperature": temperature, "reduction": "none", "train_teacher": True}
        return jnp.vdot(COTANGENT, distillation_loss(student, teacher, **options))

    return ours, lambda x, t: torch.dot(torch.from_numpy(COTANGENT), theirs(x, t, beta, temperature))


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.numpy(), rtol=1e-12, atol=1e-14), got, want)


@BETAS
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_values_and_derivatives(beta, temperature, float64):
    ours, torchs = both(beta, temperature)
    tensors = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    close(ours(STUDENT, TEACHER), torchs(*tensors))
    gradients = torch.autograd.functional.jacobian(torchs, tensors)
    for derivative in (jax.grad, jax.jacfwd):
        close(jax.jit(derivative(ours, (0, 1)))(STUDENT, TEACHER), gradients)
    hessian = torch.autograd.functional.hessian(torchs, tensors)
    for order in (jax.hessian, lambda f, n: jax.jacrev(jax.grad(f, n), n)):
        close(jax.jit(order(ours, (0, 1)))(STUDENT, TEACHER), hessian)


def exactly(student, teacher, beta, gradient=False):
    """The divergence of a row, or its gradient by the student's logits, in 100 digits."""
    x, t = ([mpmath.mpf(float(v)) if not isinstance(v, mpmath.mpf) else v for v in row] for row in (student, teacher))
    q, p = ([mpmath.exp(v) for v in row] for row in (x, t))
    q, p = ([v / mpmath.fsum(row) for v in row] for row in (q, p))
    if gradient:  # a central difference that is exact to some 60 digits
        h = mpmath.mpf(10) ** -30
        moved = [[v + h * s * (j == k) for k, v in enumerate(x)] for j in range(len(x)) for s in (1, -1)]
        values = [exactly(row, t, beta) for row in moved]
        return [(values[2 * j] - values[2 * j + 1]) / (2 * h) for j in range(len(x))]
    if beta == 0.0:
        return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))
    if beta == 1.0:
        return mpmath.fsum(b * mpmath.log(b / a) for a, b in zip(p, q, strict=True))
    beta = mpmath.mpf(beta)  # which 1 - beta must fill up to 1 exactly
    r = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    terms = (
        beta * a * mpmath.log(a / m) + (1 - beta) * b * mpmath.log(b / m) for a, b, m in zip(p, q, r, strict=True)
    )
    return mpmath.fsum(terms)


def rows():
    """Teachers of margins up to 87, and students that agree but for a factor or a summand, or not at all."""
    rng = np.random.default_rng(1)
    pairs = []
    for margin in (0.0, 1.0, 5.0, 20.0, 40.0, 80.0):
        teacher = rng.uniform(-1, 1, C).astype(np.float32)
        teacher[rng.integers(C)] += np.float32(margin)
        for scale in (3.0, 0.3, 1e-2, 1e-4):
            pairs.append((teacher + np.float32(scale) * rng.standard_normal(C).astype(np.float32), teacher))
        pairs.append((pairs[-1][0] + np.float32(4.0), teacher))  # a common offset says nothing
        pairs.append((rng.permutation(teacher), teacher))
    return pairs


@BETAS
def test_accurate_where_both_agree_and_at_large_margins(beta):
    """To some roundings of the differences between both, which a common offset makes larger than what is left."""
    students, teachers = map(np.stack, zip(*rows(), strict=True))
    with mpmath.workdps(100):
        values = np.array([float(exactly(*pair, beta)) for pair in rows()])
        gradients = np.array([[float(v) for v in exactly(*pair, beta, gradient=True)] for pair in rows()])
    ours = jax.jit(jax.vmap(jax.value_and_grad(lambda x, t: distillation_loss(x, t, beta=beta))))
    got, gradient = map(np.float64, ours(students, teachers))
    differences = np.float64(students) - teachers
    spread = differences.max(1) - differences.min(1)
    tolerance = 5e-6 + 4.0 * np.finfo(np.float32).eps * np.abs(differences).max(1) / spread
    normal = values > 1e-33  # what is small against the smallest normal number may be flushed
    assert np.sum(values[normal] < 1e-20) > 2
    assert np.all(got[~normal] < 1e-32)
    assert np.all(np.abs(got - values)[normal] <= (tolerance * values)[normal])
    assert np.all(np.abs(gradient - gradients).max(1)[normal] <= (tolerance * np.abs(gradients).max(1))[normal])


def test_the_usual_form_is_not():
    """So that the test above shows something."""
    student, teacher = rows()[3]
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    usual = float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    assert abs(usual / float(exactly(student, teacher, 0.0)) - 1.0) > 1e-2


@BETAS
def test_equal_logits_have_no_divergence_and_no_gradient(beta):
    x = TEACHER.astype(np.float32)
    value, gradient = jax.value_and_grad(lambda x, t: distillation_loss(x, t, beta=beta))(x, x)
    assert value == 0.0
    assert not np.any(gradient)
    hessian = jax.hessian(lambda x: distillation_loss(x, TEACHER[0], beta=beta))(x[0])
    p = np.asarray(jax.nn.softmax(x[0]), np.float64)
    curvature = (beta * (1 - beta) or 1.0) * (np.diag(p) - np.outer(p, p))  # f'' at 1
    np.testing.assert_allclose(hessian, curvature, atol=1e-6)


@BETAS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weights_and_masks(beta, reduction, float64):
    """As if masked classes and examples without weight were not there, whatever they hold."""
    students = np.where(WHERE, STUDENT, np.nan)
    students[1] = np.nan

    def ours(x):
        return distillation_loss(x, TEACHER, beta=beta, where=WHERE, sample_weight=WEIGHT, reduction=reduction)

    def alone(x):
        rows = []
        for i in range(N):
            kept = torch.from_numpy(WHERE[i])
            there = WEIGHT[i] > 0 and WHERE[i].any()
            row = theirs(x[i][kept], torch.from_numpy(TEACHER)[i][kept], beta, 1.0) if there else x[i].sum() * 0.0
            rows.append(WEIGHT[i] * row)
        rows = torch.stack(rows)
        return rows if reduction == "none" else rows.sum() / (WEIGHT[[0, 2, 4]].sum() if reduction == "mean" else 1.0)

    tensor = torch.from_numpy(STUDENT)
    np.testing.assert_allclose(ours(students), alone(tensor).numpy(), rtol=1e-12)
    want = torch.autograd.functional.jacobian(alone, tensor).numpy()
    np.testing.assert_allclose(jax.jacrev(ours)(students), want, rtol=1e-12, atol=1e-15)


@BETAS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_example_of_weight_0_may_hold_anything(beta, bad):
    weight = np.arange(N) != 2
    for which, columns in ((0, slice(0, 1)), (1, slice(0, 1)), (0, slice(None))):
        pair = [STUDENT.copy(), TEACHER.copy()]
        pair[which][2, columns] = bad

        def loss(x, t):
            return distillation_loss(x, t, beta=beta, sample_weight=weight, train_teacher=True)

        value, gradients = jax.value_and_grad(loss, (0, 1))(*pair)
        want, wanted = jax.value_and_grad(loss, (0, 1))(STUDENT, TEACHER)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients, wanted)


def test_the_derivative_by_a_weight_of_0_is_the_divergence(float64):
    def loss(weight, x):
        return distillation_loss(x, TEACHER, sample_weight=weight, reduction="sum")

    nothing = np.zeros(N)
    rows = distillation_loss(STUDENT, TEACHER, reduction="none")
    np.testing.assert_allclose(jax.grad(loss)(nothing, STUDENT), rows, rtol=1e-12)
    mixed = jax.jacfwd(jax.grad(loss, 1))(nothing, STUDENT)  # of each row's gradient by each weight
    gradient = jax.grad(loss, 1)(np.ones(N), STUDENT)
    np.testing.assert_allclose(np.einsum("nkn->nk", mixed), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, np.inf), (0.5, None), (1.0, None)])
def test_a_student_that_excludes_a_class(beta, expected, float64):
    """Is infinitely far from a teacher that does not, in the forward direction alone."""
    student = np.where(np.arange(C) == 2, -np.inf, STUDENT[0])
    value, gradient = jax.value_and_grad(lambda x: distillation_loss(x, TEACHER[0], beta=beta))(student)
    want = theirs(
        torch.from_numpy(np.where(np.arange(C) == 2, -1e3, STUDENT[0])), torch.from_numpy(TEACHER[0]), beta, 1.0
    )
    np.testing.assert_allclose(value, expected or want.item(), rtol=1e-12)
    assert np.all(np.isfinite(gradient))
    swapped = distillation_loss(TEACHER[0], student, beta=1.0 - beta)
    np.testing.assert_allclose(swapped, value, rtol=1e-12)


def test_the_teacher_is_a_constant_unless_asked_for(float64):
    gradients = [
        jax.grad(lambda t, asked=asked: distillation_loss(STUDENT, t, train_teacher=asked))(TEACHER)
        for asked in (False, True)
    ]
    assert not np.any(gradients[0])
    assert np.all(gradients[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (jnp.asarray(x, dtype) for x in (STUDENT, TEACHER))
    value, gradient = jax.value_and_grad(distillation_loss)(student, teacher)
    want, exact = jax.value_and_grad(distillation_loss)(student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert (value.dtype, gradient.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-7)


def test_axes_vmap_and_scan(float64):
    images = RNG.normal(size=(2, 3, C, 4))
    want = distillation_loss(images[0], images[1], axis=1, reduction="none")
    assert want.shape == (3, 4)
    moved = np.moveaxis(images, 2, -1)
    np.testing.assert_allclose(distillation_loss(moved[0], moved[1], reduction="none"), want, rtol=1e-12)
    over = jax.vmap(lambda x, t: distillation_loss(x, t, axis=0, reduction="none"))
    np.testing.assert_allclose(over(images[0], images[1]), want, rtol=1e-12)
    both_axes = distillation_loss(images[0], images[1], axis=(1, 2), reduction="none")
    flat = images.reshape(2, 3, -1)
    np.testing.assert_allclose(both_axes, distillation_loss(flat[0], flat[1], reduction="none"), rtol=1e-12)

    def scanned(x):
        return jax.lax.scan(lambda total, row: (total + distillation_loss(*row), None), 0.0, (x, TEACHER))[0]

    hessian = jax.hessian(lambda x: jnp.sum(distillation_loss(x, TEACHER, reduction="none")))(STUDENT)
    np.testing.assert_allclose(jax.hessian(scanned)(STUDENT), hessian, rtol=1e-10, atol=1e-14)


def test_what_does_not_fit_is_refused():
    def refused(error, words, *arguments, **options):
        with pytest.raises(error, match=words):
            jaxent.distillation_loss(*arguments, **options)

    refused(ValueError, r"teacher_logits must have the shape \(5, 6\) of logits", STUDENT, TEACHER[:3])
    refused(TypeError, "teacher_logits must have a floating dtype", STUDENT, np.zeros((N, C), int))
    refused(ValueError, r"beta must lie in \[0, 1\], got 2", STUDENT, TEACHER, beta=2)
    refused(ValueError, "temperature must be positive and finite, got 0", STUDENT, TEACHER, temperature=0)
    refused(TypeError, "beta must be a number known at compile time", STUDENT, TEACHER, beta="half")
    refused(ValueError, r"sample_weight must have the shape \(5,\)", STUDENT, TEACHER, sample_weight=np.ones(3))
