"""linear_cross_entropy is cross_entropy of `hidden @ kernel + bias`: values, derivatives, transforms, costs.

PyTorch in float64 is the reference for values, first and second derivatives. For what PyTorch cannot differentiate
it is jaxent.cross_entropy of the logits, which test_torch.py and test_transforms.py compare with others.
test_accuracy.py has the margins, test_fuzz.py random options, test_errors.py the messages.
"""

import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from _reference import assert_linear_matches_torch, to_torch, torch_linear_cross_entropy
from jax import export, lax
from jax.experimental import checkify

import jaxent
from jaxent import linear_cross_entropy

pytestmark = pytest.mark.more(cases=1)

N, D, C = 7, 4, 5
LABELS = np.array([3, 0, 4, 1, 1, 2, 0], np.int32)
SOME = np.array([3, -100, -100, 1, -100, 2, 0], np.int32)  # with chunks of three, the second has one token left
NOBODY = np.full(N, -100, np.int32)
ALL = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 3.0}
REDUCTION = pytest.mark.parametrize("reduction", ["none", "mean"])


def draw(dtype=np.float64, lead=(N,), features=D, classes=C):
    """hidden, kernel, bias, weight, class probabilities."""
    rng = np.random.default_rng([*lead, features, classes])
    hidden, kernel = 1.5 * rng.standard_normal((*lead, features)), rng.standard_normal((features, classes))
    bias, weight = rng.standard_normal(classes), rng.uniform(0.2, 2.0, classes)
    return [x.astype(dtype) for x in (hidden, kernel, bias, weight, rng.dirichlet(np.ones(classes), lead))]


HIDDEN, KERNEL, BIAS, WEIGHT, PROBABILITIES = draw()
LINEAR = (HIDDEN, KERNEL, BIAS)
TANGENTS = tuple(np.random.default_rng(1).standard_normal(x.shape) for x in LINEAR)
COTANGENT = np.random.default_rng(2).standard_normal(N)


def close(got, want):
    """Equal in float64 but for the roundings of sums of a few dozen terms, none larger than some ten."""
    tolerance = 1024 * np.finfo(np.float64).eps
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, want)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def unfused(hidden, kernel, labels, *, bias=None, softcap=None, chunk_size=None, **options):
    """What linear_cross_entropy says it computes."""
    logits = hidden @ kernel if bias is None else hidden @ kernel + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jaxent.cross_entropy(logits, labels, **options)


def scalar(loss, reduction, labels=SOME, **options):
    """A function of hidden, kernel and bias; the losses one by one are weighted by an arbitrary cotangent."""
    options = {"weight": WEIGHT, "chunk_size": 3, **ALL, **options}

    def f(hidden, kernel, bias):
        value = loss(hidden, kernel, labels, bias=bias, reduction=reduction, **options)
        return jnp.vdot(COTANGENT, value) if reduction == "none" else value

    return f


# Values and first derivatives

OPTIONS = {
    "bias": {"bias": BIAS},
    "weight": {"weight": WEIGHT},
    "a class ignored": {"ignore_index": 1},
    "nothing ignored": {"ignore_index": None},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.02},
    "softcap": {"softcap": 3.0},
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["plain", "indices", "probabilities"])
def test_reductions(kind, reduction):
    """Without any option and with all of them, where some tokens, none or all are ignored."""
    options = {} if kind == "plain" else {"bias": BIAS, "weight": WEIGHT, **ALL}
    for labels in (PROBABILITIES,) if kind == "probabilities" else (LABELS, SOME, NOBODY):
        assert_linear_matches_torch(HIDDEN, KERNEL, labels, reduction=reduction, chunk_size=3, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name):
    reduction = ("none", "mean")[list(OPTIONS).index(name) % 2]
    assert_linear_matches_torch(HIDDEN, KERNEL, LABELS, reduction=reduction, chunk_size=3, **OPTIONS[name])


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(
    ("masked", "softcap", "reduction"),
    [(False, None, "mean"), (True, None, "none"), (True, 3.0, "mean"), (False, 3.0, "none")],
)
def test_scaled_logits_and_hidden_classes(float64, masked, softcap, kind, reduction, implementation):
    """Torch's losses of logits whose hidden classes are cut out; first and second derivatives by the scale, too."""
    where = np.array([True, True, False, True, True]) if masked else None
    shown = np.flatnonzero(np.ones(C) if where is None else where)
    labels = np.array([3, -100, 4, 1, 1, 3, 0]) if kind == "indices" else PROBABILITIES
    arrays = (*LINEAR, np.array(0.7))
    options = {"weight": WEIGHT, "label_smoothing": 0.1, "reduction": reduction}

    def ours(hidden, kernel, bias, scale):
        soft = {} if kind == "indices" or where is None else {"labels": labels * where}
        arguments = {"labels": labels, "bias": bias, "where": where, "logit_scale": scale, "softcap": softcap, **soft}
        how = {"implementation": implementation, "chunk_size": 3}
        return jnp.sum(linear_cross_entropy(hidden, kernel, **arguments, **options, **how))

    def theirs(hidden, kernel, bias, scale):
        x = scale * (hidden @ kernel + bias)
        x = (x if softcap is None else softcap * torch.tanh(x / softcap))[:, shown]
        y = np.where(labels >= 0, np.searchsorted(shown, labels), labels) if kind == "indices" else labels[:, shown]
        weight = torch.from_numpy(WEIGHT[shown])
        return torch.nn.functional.cross_entropy(x, torch.from_numpy(y), **(options | {"weight": weight})).sum()

    tensors, every = tuple(torch.tensor(x, requires_grad=True) for x in arrays), (0, 1, 2, 3)
    value = theirs(*tensors)
    got = jax.jit(jax.value_and_grad(ours, every))(*arrays)
    close(got, (value.item(), tuple(x.numpy() for x in torch.autograd.grad(value, tensors))))
    close(jax.jit(jax.grad(ours, (0, 1)))(*arrays), got[1][:2])
    if implementation is None and (masked or softcap):
        want = torch.autograd.functional.hessian(theirs, tensors)
        close(
            jax.jacfwd(jax.jacrev(ours, every), every)(*arrays), tuple(tuple(x.numpy() for x in row) for row in want)
        )


def test_without_any_class_there_is_nothing_to_add():
    where = np.zeros(C, bool)
    options = {"bias": BIAS, "where": where, "reduction": "sum"}
    value, gradients = jax.value_and_grad(linear_cross_entropy, (0, 1))(HIDDEN, KERNEL, LABELS, **options)
    assert value == 0.0
    assert not any(np.any(g) for g in gradients)
    assert linear_cross_entropy(HIDDEN, KERNEL, LABELS, where=np.arange(C) != 0, reduction="none")[1] == np.inf


@pytest.mark.parametrize("chunk_size", [1, N - 1, N, N + 5])
def test_chunk_sizes(chunk_size):
    for labels in (LABELS, SOME):
        assert_linear_matches_torch(
            HIDDEN, KERNEL, labels, bias=BIAS, reduction="none", softcap=3.0, chunk_size=chunk_size
        )


@REDUCTION
def test_several_chunks_by_default(reduction):
    hidden, kernel, *_ = draw(lead=(601,), features=500, classes=2100)  # two tiles of the kernel and a rest
    labels = np.random.default_rng(0).integers(-1, 2100, 601, np.int32)
    assert_linear_matches_torch(hidden, kernel, labels, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize(
    ("lead", "features", "classes"),
    [((), D, C), ((2, 1, 3), D, C), ((0,), D, C), ((2, 0), D, C), ((3,), D, 1), ((3,), 1, C)],
    ids=str,
)
def test_shapes(lead, features, classes):
    hidden, kernel, bias, weight, soft = draw(lead=lead, features=features, classes=classes)
    labels = np.random.default_rng(0).integers(0, classes, lead, np.int32)
    reduction = "mean" if lead == (0,) else "none"
    assert_linear_matches_torch(hidden, kernel, labels, bias=bias, weight=weight, reduction=reduction, chunk_size=2)
    if len(lead) == 3:
        assert_linear_matches_torch(hidden, kernel, soft, weight=weight, chunk_size=2)


HALF, BRAIN, SINGLE, DOUBLE = "float16", "bfloat16", "float32", "float64"


@pytest.mark.parametrize(
    ("hidden_dtype", "kernel_dtype", "bias_dtype"),
    [
        (HALF, HALF, SINGLE),
        (BRAIN, BRAIN, BRAIN),
        (SINGLE, SINGLE, HALF),
        (BRAIN, SINGLE, SINGLE),
        (SINGLE, BRAIN, BRAIN),
        (HALF, BRAIN, HALF),
        (SINGLE, DOUBLE, SINGLE),
        (DOUBLE, HALF, SINGLE),
    ],
)
def test_dtypes(hidden_dtype, kernel_dtype, bias_dtype):
    """The loss in float32 or wider, every gradient in its array's dtype."""
    hidden, kernel = draw(jnp.dtype(hidden_dtype))[0], draw(jnp.dtype(kernel_dtype))[1]
    bias, weight = draw(jnp.dtype(bias_dtype))[2:4]
    reduction = "none" if hidden_dtype == kernel_dtype else "mean"
    assert_linear_matches_torch(
        hidden, kernel, SOME, bias=bias, weight=weight, reduction=reduction, chunk_size=3, **ALL
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64"])
def test_integer_labels_of_any_dtype(dtype, float64):
    """An unsigned dtype cannot hold the default ignore_index, so nothing is ignored."""
    hidden, kernel, *_ = draw(features=2, classes=300)
    labels = (LABELS if dtype == "uint8" else SOME).astype(dtype)
    assert_linear_matches_torch(hidden, kernel, labels, chunk_size=3)


@REDUCTION
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_a_small_share_in_the_mean_of_many_tokens(dtype, reduction):
    """Half of the classes have a gradient of 2e-4 / 8192 in every token: float16 has no such number."""
    tokens, classes = 8192, 16
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.integers(1, 3, (tokens, 2)), dtype)
    bias = jnp.where(jnp.arange(classes) < 8, 0.0, -6.5)
    kernel = jnp.asarray(rng.uniform(-0.1, 0.1, (2, classes)), dtype)
    labels = jnp.asarray(rng.integers(0, 8, tokens))

    @partial(jax.jit, static_argnums=0)
    def run(loss, hidden, kernel):
        def f(hidden, kernel):
            value = loss(hidden, kernel, labels, bias=bias, reduction=reduction)
            return jnp.mean(value)

        return jax.grad(f, argnums=(0, 1))(hidden, kernel)

    of_hidden, of_kernel = jax.tree.map(np.float64, run(linear_cross_entropy, hidden, kernel))
    want = jax.tree.map(np.float64, run(unfused, *(x.astype(jnp.float32) for x in (hidden, kernel))))
    info = jnp.finfo(dtype)
    # Each term is rounded once to half precision, and the positive terms of the rare classes cannot cancel.
    error = 2 * float(info.eps)
    np.testing.assert_allclose(of_kernel[:, 8:], want[1][:, 8:], rtol=error)
    np.testing.assert_allclose(of_hidden, want[0], rtol=error, atol=2 * error * np.abs(kernel).max() / tokens)


# Second derivatives


def torch_loss_and_gradients(reduction, labels=SOME):
    """Of `scalar`, with what they are the gradients of."""
    inputs = [to_torch(x).requires_grad_() for x in LINEAR]
    options = {"weight": to_torch(WEIGHT), "reduction": reduction, **ALL}
    loss = torch_linear_cross_entropy(*inputs[:2], to_torch(labels), inputs[2], **options)
    loss = torch.dot(loss, to_torch(COTANGENT)) if reduction == "none" else loss
    return inputs, torch.autograd.grad(loss, inputs, create_graph=True)


def torch_gradients(reduction):
    return [g.detach() for g in torch_loss_and_gradients(reduction)[1]]


def torch_hessian_times(tangents, reduction, labels=SOME):
    inputs, gradients = torch_loss_and_gradients(reduction, labels)
    slope = sum((g * to_torch(t)).sum() for g, t in zip(gradients, tangents, strict=True))
    return torch.autograd.grad(slope, inputs)


EVERY = (0, 1, 2)
HESSIAN_TIMES = {
    "forward over reverse": lambda f, x, t: jax.jvp(jax.grad(f, EVERY), x, t)[1],
    "reverse over forward": lambda f, x, t: jax.grad(lambda *x: jax.jvp(f, x, t)[1], EVERY)(*x),
    "reverse over reverse": lambda f, x, t: jax.vjp(jax.grad(f, EVERY), *x)[1](t),
}


@pytest.mark.parametrize("mode", HESSIAN_TIMES)
@REDUCTION
def test_second_derivatives(reduction, mode, float64):
    got = jax.jit(partial(HESSIAN_TIMES[mode], scalar(linear_cross_entropy, reduction)))(LINEAR, TANGENTS)
    close(got, torch_hessian_times(TANGENTS, reduction))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivatives_with_probabilities(reduction, float64):
    f = scalar(linear_cross_entropy, reduction, PROBABILITIES)
    got = jax.jit(partial(HESSIAN_TIMES["forward over reverse"], f))(LINEAR, TANGENTS)
    close(got, torch_hessian_times(TANGENTS, reduction, PROBABILITIES))


@pytest.mark.parametrize(("of", "along"), list(itertools.permutations(EVERY, 2)))
def test_block_of_the_hessian(of, along, float64):
    """The gradient of one array, moved by another: nothing else has a tangent."""
    reduction = "none" if of < along else "mean"
    f = scalar(linear_cross_entropy, reduction)

    def gradient(moving):
        return jax.grad(f, of)(*(moving if i == along else x for i, x in enumerate(LINEAR)))

    got, moved = jax.jit(partial(jax.jvp, gradient))((LINEAR[along],), (TANGENTS[along],))
    close(got, torch_gradients(reduction)[of])
    only = [t if i == along else np.zeros_like(t) for i, t in enumerate(TANGENTS)]
    close(moved, torch_hessian_times(only, reduction)[of])


@REDUCTION
def test_second_derivatives_in_half_precision(reduction):
    """In the dtypes of the arrays, and rounded to them nowhere but in the logits' gradient and at the end."""
    linear, tangents = (jax.tree.map(lambda x: jnp.asarray(x, BRAIN), x) for x in (LINEAR, TANGENTS))
    run = jax.jit(HESSIAN_TIMES["forward over reverse"], static_argnums=0)
    weight = np.float32(WEIGHT)
    got = run(scalar(linear_cross_entropy, reduction, weight=weight), linear, tangents)
    assert [x.dtype for x in got] == [BRAIN] * 3
    linear, tangents = (jax.tree.map(np.float32, x) for x in (linear, tangents))
    want = run(scalar(unfused, reduction, weight=weight), linear, tangents)
    # A product of two factors, each with a rounding, in every one of at most N sums' terms, and the last rounding.
    error = 4 * float(jnp.finfo(BRAIN).eps)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(np.float32(x), y, rtol=error, atol=error * np.abs(y).max())


# By jaxent.cross_entropy


def check(transform, reduction, *arguments, **options):
    """`transform` of the fused and of the unfused loss are the same function."""
    got, want = (
        jax.jit(transform(scalar(loss, reduction, **options)))(*arguments) for loss in (linear_cross_entropy, unfused)
    )
    close(got, want)


def test_third_derivatives(float64):
    def third(f):
        second = partial(HESSIAN_TIMES["forward over reverse"], f, t=TANGENTS)
        return lambda *x: jax.jvp(lambda *x: second(x), x, TANGENTS)[1]

    check(third, "none", *LINEAR)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_jacobians(jacobian, float64):
    def losses(loss, options):
        return lambda hidden, kernel, bias: loss(hidden, kernel, SOME, bias=bias, reduction="none", **ALL, **options)

    got = jax.jit(jacobian(losses(linear_cross_entropy, {"chunk_size": 3}), EVERY))(*LINEAR)
    close(got, jax.jit(jacobian(losses(unfused, {}), EVERY))(*LINEAR))


@REDUCTION
def test_derivatives_by_weight_and_probabilities(reduction, float64):
    """Together with all others, first and second; and the gradient of hidden moved by the weight alone."""
    arrays = (*LINEAR, WEIGHT, PROBABILITIES)
    tangents = (*TANGENTS, TANGENTS[2], np.random.default_rng(4).standard_normal(PROBABILITIES.shape))

    @partial(jax.jit, static_argnums=0)
    def run(loss, arrays, tangents):
        def f(hidden, kernel, bias, weight, soft, labels=None):
            g = scalar(loss, reduction, soft if labels is None else labels, weight=weight)
            return g(hidden, kernel, bias)

        by_all = jax.jvp(jax.grad(f, range(5)), arrays, tangents)
        by_weight = jax.jvp(lambda w: jax.grad(f)(*arrays[:3], w, None, LABELS), arrays[3:4], tangents[3:4])
        return by_all, by_weight

    close(run(linear_cross_entropy, arrays, tangents), run(unfused, arrays, tangents))


# Transforms

STACK = [np.stack([x, 0.5 * x[::-1], -x]) for x in LINEAR]
LABEL_STACK = np.stack([LABELS, SOME, NOBODY])


@pytest.mark.parametrize(
    ("reduction", "moving"),
    [("none", "hkby"), ("mean", "hy"), ("none", "k"), ("sum", "y")],
)
def test_vmap(reduction, moving, float64):
    """Over arrays alone and together; how many tokens count differs from example to example."""
    stacks = zip("hkby", [*STACK, LABEL_STACK], strict=True)
    arrays = [stack if name in moving else stack[0] for name, stack in stacks]
    axes = [0 if name in moving else None for name in "hkby"]

    @partial(jax.jit, static_argnums=0)
    def run(loss, *arrays):
        def each(hidden, kernel, bias, labels):
            return jax.value_and_grad(scalar(loss, reduction, labels), EVERY)(hidden, kernel, bias)

        return jax.vmap(each, axes)(*arrays)

    close(run(linear_cross_entropy, *arrays), run(unfused, *arrays))


def test_vmap_of_second_derivatives(float64):
    def transform(f):
        return jax.vmap(partial(HESSIAN_TIMES["reverse over reverse"], f), (0, None))

    check(transform, "none", tuple(STACK), TANGENTS)


def in_scan(f):
    """A loop over checkpointed losses."""
    step = jax.checkpoint(lambda scale, *linear: jnp.sin(f(*(scale * x for x in linear))))

    def scanned(*linear):
        return lax.scan(lambda total, scale: (total + step(scale, *linear), None), 0.0, np.array([0.5, 1.0]))[0]

    return scanned


def linearized(f):
    """The value, its derivative along the tangents, and the transpose of that."""

    def run(*linear):
        value, push = jax.linearize(f, *linear)
        return value, push(*TANGENTS), jax.linear_transpose(push, *linear)(2.0)

    return run


TRANSFORMS = {
    "reverse through scan of checkpoint": ("none", lambda f: jax.grad(in_scan(f), EVERY)),
    "forward through scan of checkpoint": ("mean", lambda f: jax.jacfwd(in_scan(f), 2)),
    "both through scan of checkpoint": (
        "mean", lambda f: lambda *x: HESSIAN_TIMES["forward over reverse"](in_scan(f), x, TANGENTS)
    ),
    "linearize a sum": ("sum", linearized),
    "linearize single losses": ("none", linearized),
    "cond": (
        "none", lambda f: jax.grad(lambda *x: lax.cond(x[0][0, 0] < 9.0, f, lambda *x: jnp.sum(x[0]), *x), EVERY)
    ),
    "jit in grad in jit": ("mean", lambda f: jax.grad(jax.jit(lambda *x: 2.0 * jax.jit(f)(*x)), EVERY)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, float64):
    reduction, transform = TRANSFORMS[name]
    check(transform, reduction, *LINEAR)


def test_part_of_a_larger_loss(float64):
    """Tied embeddings and several losses, each with a factor: every cotangent is other than one."""
    rng = np.random.default_rng(0)
    embedding, layer = rng.standard_normal((C, D)), rng.standard_normal((D, D))

    @partial(jax.jit, static_argnums=0)
    def run(loss, options, embedding, layer, factor):
        def f(embedding, layer):
            hidden = jnp.tanh(embedding[LABELS] @ layer)
            mean = loss(hidden, embedding.T, SOME, **options)
            total = loss(2.0 * hidden, embedding.T, LABELS, reduction="sum", z_loss=0.1, **options)
            single = loss(hidden, layer.T, LABELS % D, reduction="none", **options)
            return factor * mean - 0.5 * mean * total + jnp.vdot(COTANGENT, single**2) + jnp.sum(hidden**2)

        return jax.value_and_grad(f, argnums=(0, 1))(embedding, layer)

    close(*(run(loss, {}, embedding, layer, 3.0) for loss in (linear_cross_entropy, unfused)))


def test_constants_get_no_gradient():
    """numpy arrays and stop_gradient, with no jit around."""
    hidden, kernel, *_ = draw(np.float32)
    alone = jax.grad(lambda kernel: linear_cross_entropy(hidden, kernel, SOME))(kernel)
    stopped = jax.grad(lambda *x: linear_cross_entropy(lax.stop_gradient(x[0]), x[1], SOME), (0, 1))(hidden, kernel)
    np.testing.assert_array_equal(stopped[0], np.zeros_like(hidden))
    np.testing.assert_array_equal(stopped[1], alone)
    np.testing.assert_allclose(alone, jax.grad(unfused, 1)(hidden, kernel, SOME), rtol=1e-5, atol=1e-6)


@REDUCTION
def test_export(reduction):
    """For every platform, from this one; first and second derivatives."""
    linear, tangents = jax.tree.map(np.float32, (LINEAR, TANGENTS))
    f = scalar(linear_cross_entropy, reduction)

    def run(linear, tangents):
        return jax.jvp(jax.value_and_grad(f, EVERY), linear, tangents)

    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(run), platforms=platforms)(linear, tangents)
    assert exported.platforms == platforms


@pytest.mark.parametrize(("dtype", "reduction"), [(SINGLE, "none"), (BRAIN, "mean")])
def test_export_of_a_language_model(dtype, reduction):
    """Other code paths than a handful of classes: blocks, tiles of the kernel, several chunks."""
    hidden, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4096, 512), (512, 128_256)))
    labels = jax.ShapeDtypeStruct((4096,), np.int32)

    def run(hidden, kernel, labels):
        loss = partial(linear_cross_entropy, labels=labels, reduction=reduction)
        return jax.grad(lambda *linear: jnp.mean(loss(*linear)), (0, 1))(hidden, kernel)

    exported = export.export(jax.jit(run), platforms=["cuda", "tpu"])(hidden, kernel, labels)
    assert [x.dtype for x in exported.out_avals] == [dtype, dtype]


# Rows that do not count, and labels that do not exist


@REDUCTION
def test_an_ignored_row_may_hold_anything(reduction, float64):
    """Neither the loss nor any derivative sees it, and its own gradient is zero."""
    ignored = SOME == -100
    spoiled = HIDDEN.copy()
    spoiled[ignored] = np.array([np.nan, np.inf, -np.inf])[:, None]

    @jax.jit
    def run(hidden):
        f = jax.value_and_grad(scalar(linear_cross_entropy, reduction), EVERY)
        return jax.jvp(f, (hidden, KERNEL, BIAS), TANGENTS)

    got = run(spoiled)
    close(got, run(HIDDEN))
    for _, (of_hidden, *_) in got:
        assert not np.any(of_hidden[ignored])


def test_a_row_that_counts_is_never_hidden():
    hidden, kernel, *_ = draw(np.float32)
    hidden[3, 0] = np.inf
    loss, grads = jax.value_and_grad(linear_cross_entropy, (0, 1))(hidden, kernel, SOME)
    losses = linear_cross_entropy(hidden, kernel, SOME, reduction="none", chunk_size=3)
    assert np.isnan(loss)
    assert np.isnan(grads[0][3]).all()
    assert np.isnan(grads[1]).any()
    np.testing.assert_array_equal(np.isnan(losses), np.arange(N) == 3)


@pytest.mark.parametrize("options", [{}, {"ignore_index": None}, {"bias": BIAS, "weight": WEIGHT, **ALL}], ids=len)
def test_traced_label_out_of_range(options):
    """NaN for that token alone, in its loss and its gradient; never a class wrapped or clamped."""
    hidden, kernel, *_ = draw(np.float32)
    options = {name: np.float32(value) if np.ndim(value) else value for name, value in options.items()}

    @jax.jit
    def run(labels):
        loss = partial(linear_cross_entropy, labels=labels, reduction="none", chunk_size=3, **options)
        value, pullback = jax.vjp(loss, hidden, kernel)
        return value, *pullback(jnp.ones(N))

    good, good_grad, _ = run(LABELS)
    others = np.arange(N) != 2
    for bad in (C, -1, 2**31 - 1, -(2**31)):
        loss, grad, of_kernel = run(np.where(others, LABELS, bad))
        assert np.isnan(loss[2])
        assert np.isnan(grad[2]).all()
        assert np.isnan(of_kernel).any()
        np.testing.assert_array_equal(loss[others], good[others])
        np.testing.assert_array_equal(grad[others], good_grad[others])


@pytest.mark.parametrize("differentiate", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_checkify(differentiate):
    """Under checkify's `index_checks` a traced label out of range is an error, and good ones are none."""
    hidden, kernel, *_ = draw(np.float32)
    f = differentiate(lambda hidden, labels: linear_cross_entropy(hidden, kernel, labels, chunk_size=3))
    checked = jax.jit(checkify.checkify(f, errors=checkify.index_checks))
    checked(hidden, SOME)[0].throw()
    error, _ = checked(hidden, np.where(LABELS == 4, C, LABELS))
    with pytest.raises(checkify.JaxRuntimeError, match="out-of-bounds"):
        error.throw()


# Costs, as compiled: nothing of these sizes is run


@pytest.mark.parametrize(("tokens", "features", "classes", "limit"), [
    (8192, 1024, 128_256, 0.05), (2048, 512, 32_768, 0.15),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["none", "part of a larger loss"])
def test_memory(kind, tokens, features, classes, limit):
    """Temporaries of the gradients as a share of the logits: one array of the kernel's size would be too much."""

    def gradients(hidden, kernel, labels, cotangent):
        def loss(hidden, kernel):
            if kind == "none":
                return jnp.vdot(cotangent, linear_cross_entropy(hidden, kernel, labels, reduction="none"))
            return jnp.sin(linear_cross_entropy(hidden, kernel, labels)) * cotangent[0] + jnp.vdot(hidden, hidden)

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((tokens, features), (features, classes))]
    shapes += [jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (np.int32, np.float32)]
    memory = jax.jit(gradients).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= limit * tokens * classes * 4


def multiplications(program, steps):
    """In the matrix products of compiled HLO, where a loop whose length depends on data takes `steps` steps."""
    computations = {}
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*{$", line):
            lines = computations["ENTRY" if header[1] else header[2]] = []
        elif computations:
            lines.append(line)

    def count(name):
        total, shapes = 0, {}
        for line in computations[name]:
            if result := re.match(r" *(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]", line):
                shapes[result[1]] = [int(n) for n in result[2].split(",") if n]
            if dot := re.search(r" dot\((?:\w+\[\S+ )?%?([\w.-]+),.*lhs_contracting_dims={(\d+)}", line):
                total += math.prod(shapes[result[1]]) * shapes[dot[1]][int(dot[2])]
            times = 1
            if " while(" in line:
                known = re.search(r'known_trip_count":{"n":"(\d+)"', line)
                times = int(known[1]) if known else steps
            total += times * sum(map(count, re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line)))
        return total

    return count("ENTRY")


@REDUCTION
@pytest.mark.parametrize("trained", [(), (0,), (1,), (0, 1, 2)], ids=["nothing", "hidden", "kernel", "all"])
def test_matrix_products(trained, reduction):
    """One for the losses, one for either gradient, and one more to make the logits again where losses are single.

    All of them are in loops over the tokens that count.
    """
    tokens, features, classes, chunk_size = 60, 48, 80, 10
    arrays = draw(np.float32, (tokens,), features, classes)[:3]

    def f(*arrays):
        hidden, kernel, bias, labels = arrays
        loss = linear_cross_entropy(hidden, kernel, labels, bias=bias, reduction=reduction, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(loss))

    run = jax.jit(jax.value_and_grad(f, trained) if trained else f)
    program = run.lower(*arrays, np.zeros(tokens, np.int32)).compile().as_text()
    expected = 1 + (0 in trained) + (1 in trained) + (reduction == "none" and trained != ())
    assert multiplications(program, tokens // chunk_size) == expected * tokens * features * classes
    assert multiplications(program, 0) == 0


@pytest.mark.parametrize("weighted", [False, True], ids=["ignored", "without weight"])
@REDUCTION
def test_work_for_tokens_that_count_only(monkeypatch, weighted, reduction):
    """Counted as it runs: half the tokens make half the products, none make none."""
    run, dot_general = [], lax.dot_general

    def counting(a, b, dimensions, **options):
        product = dot_general(a, b, dimensions, **options)
        (contracted,), _ = dimensions[0]
        jax.debug.callback(run.append, product.size * a.shape[contracted])
        return product

    monkeypatch.setattr(lax, "dot_general", counting)
    tokens, features, classes = 66, 40, 72 + weighted  # met in no other test, whose compiled loss would be used again
    hidden, kernel, *_ = draw(np.float32, (tokens,), features, classes)
    products = 3 if reduction == "mean" else 4

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, kernel, live):
        counts = {"sample_weight": live} if weighted else {}
        labels = jnp.ones(tokens, jnp.int32) if weighted else jnp.where(live, 1, -100)
        loss = linear_cross_entropy(hidden, kernel, labels, **counts, reduction=reduction, chunk_size=10)
        return jnp.sum(jnp.sin(loss))

    for live, steps in ((66, 7), (33, 4), (20, 2), (1, 1), (0, 0)):
        run.clear()
        which = np.random.default_rng(live).permutation(np.arange(tokens) < live)
        jax.block_until_ready(gradients(hidden, kernel, which))
        jax.effects_barrier()
        assert sum(run) == products * steps * 10 * features * classes
