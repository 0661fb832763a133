"""The kernels for GPUs that make logits and never write them, interpreted on the CPU: against NumPy's float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from scipy.special import log_softmax, logsumexp

from jaxent import _linear_cross_entropy, _linear_losses, _linear_sweep, linear_cross_entropy
from jaxent._kernels import gpu, gpu_product, product
from jaxent._kernels.product import Layer

pytestmark = pytest.mark.more(cases=2)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The CPU goes as a GPU does, in smaller blocks."""
    monkeypatch.setattr(gpu_product, "INTERPRET", True)
    for name, size in (("TOKENS", 16), ("CLASSES", 32), ("FEATURES", 32)):
        monkeypatch.setattr(gpu_product, name, size)
    monkeypatch.setitem(product.KERNELS, "cpu", gpu_product.__name__)
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "cuda")
    losses = _linear_losses.linear_losses.__wrapped__  # jitted anew, or what was traced before would go another way
    anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
    monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)


@pytest.fixture
def served(monkeypatch):
    """The shapes of kernels that the GPU's kernels have served, as programs are lowered."""
    shapes, serves = [], gpu_product.serves

    def spy(layer, x):
        answer = serves(layer, x)
        shapes.extend([layer.weight.shape] if answer else [])
        return answer

    monkeypatch.setattr(gpu_product, "serves", spy)
    return shapes


def draw(tokens, features, classes, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    hidden, kernel = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((tokens, features), (features, classes))
    )
    return hidden, kernel / 4, jnp.asarray(rng.integers(classes, size=tokens))


@pytest.mark.parametrize("shape", [(16, 16, 32), (40, 24, 104), (7, 8, 8), (33, 40, 200)], ids=str)
@pytest.mark.parametrize("more", [False, True], ids=["", "bias, scale"])
@pytest.mark.parametrize("stored", [None, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_sums_maxima_and_exponentials(shape, more, stored, dtype):
    hidden, kernel, y = draw(*shape, dtype=dtype)
    rng = np.random.default_rng(1)
    bias, scale = (rng.standard_normal(shape[2]).astype(np.float32), np.float32(-0.7)) if more else (None, None)
    layer = Layer(kernel, bias, scale)
    y = y.at[:4].set(jnp.array([-1, shape[2], shape[2] + 3, -100]))  # classes that there are not
    reference = rng.standard_normal((shape[0], 1)).astype(np.float32)
    counts = rng.random(shape[0]) < 0.7
    x = np.asarray(hidden, float) @ np.asarray(kernel, float)
    x = (x + bias) * scale if more else x
    d, label = x - reference, np.arange(shape[2]) == np.asarray(y)[:, None]
    rows = (label * d).sum(1), np.where(label, 0.0, np.exp(d)).sum(1), d.sum(1)
    for some in (None, counts):
        found = jax.jit(partial(gpu_product.sums, stored=stored))(layer, hidden, reference, y, some)
        for a, b in zip(found[:3], rows, strict=True):
            np.testing.assert_allclose(a[:, 0], b, rtol=1e-5, atol=1e-5 * np.abs(d).sum(1).max())
        if stored is None:
            assert found.e is None
        else:
            e = np.where(True if some is None else some[:, None], np.exp(d), 0.0)
            assert found.e.dtype == stored
            np.testing.assert_allclose(
                np.asarray(found.e, float), e, rtol=2.0**-8 if stored == jnp.bfloat16 else 1e-5
            )
    np.testing.assert_allclose(jax.jit(gpu_product.maxima)(layer, hidden)[:, 0], x.max(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [104, 101], ids=["whole words", "a last one in part"])
@pytest.mark.parametrize("size", [1.0, 100.0], ids=["", "large logits"])  # are made once more
@pytest.mark.parametrize("chunk_size", [None, 20])
@pytest.mark.parametrize("extra", ["", "bias", "weight", "z_loss", "logit_scale", "bias and weight", "smoothing"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_the_loss_and_its_gradients(classes, size, chunk_size, extra, dtype, served):
    tokens, features = 50, 24
    hidden, kernel, labels = draw(tokens, features, classes, dtype=dtype)
    kernel *= size
    labels = labels.at[jnp.array([3, 10, 11])].set(-100)
    hidden = hidden.at[3].set(jnp.nan)  # of what does not count
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(classes).astype(dtype) if "bias" in extra else None
    weight = rng.random(classes).astype(np.float32) if "weight" in extra else None
    z, scale, mass = 0.01 if "z" in extra else 0.0, -0.5 if "scale" in extra else None, 0.1 * ("smooth" in extra)

    def loss(hidden, kernel, bias):
        more = {"z_loss": z, "logit_scale": scale, "weight": weight, "label_smoothing": mass}
        more |= {"chunk_size": chunk_size, "reduction": "sum"}
        return linear_cross_entropy(hidden, kernel, labels, bias=bias, **more)

    wanted = (0, 1) if bias is None else (0, 1, 2)
    value, found = jax.jit(jax.value_and_grad(loss, wanted))(hidden, kernel, bias)
    # Classes that fill the last word of bfloat16 no bias hides from a scale, which may be negative, or from a mean of
    # all.
    wide = dtype == np.float32
    assert bool(served) == (wide or classes % 8 == 0 or (scale is None and not mass))
    assert all(shape[1] == (classes if wide else 104) for shape in served)

    kept = np.asarray(labels) >= 0
    h, w, y = np.asarray(hidden, float)[kept], np.asarray(kernel, float), np.asarray(labels)[kept]
    x = (h @ w + (0.0 if bias is None else np.asarray(bias, float))) * (scale or 1.0)
    v = 1.0 if weight is None else weight[y].astype(float)
    lse, log_p = logsumexp(x, 1), log_softmax(x, 1)
    losses = -v * (1.0 - mass) * log_p[np.arange(len(y)), y] - mass * log_p.mean(1) + z * lse**2
    np.testing.assert_allclose(value, losses.sum(), rtol=2e-5)
    p = np.exp(log_p)
    g = (v + 2 * z * lse)[:, None] * p if np.ndim(v + 2 * z * lse) else (v + 2 * z * lse) * p
    g[np.arange(len(y)), y] -= v * (1.0 - mass)
    g -= mass / classes
    g *= scale or 1.0
    of_hidden = np.zeros((tokens, features))
    of_hidden[kept] = g @ w.T
    for a, b in zip(found, (of_hidden, h.T @ g, g.sum(0)), strict=False):
        assert np.linalg.norm(np.asarray(a, float) - b) <= (1e-5 if wide else 0.01) * np.linalg.norm(b)


def test_a_class_that_there_is_not_makes_nan(served):
    hidden, kernel, labels = draw(20, 8, 13)
    labels = labels.at[:3].set(jnp.array([13, 15, 16]))
    losses = jax.jit(partial(linear_cross_entropy, reduction="none"))(hidden, kernel, labels)
    assert served
    np.testing.assert_array_equal(np.isnan(losses), np.arange(20) < 3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
@pytest.mark.parametrize("ignore_index", [-100, 250, 252])
def test_labels_that_classes_to_fill_up_might_be_mistaken_for(dtype, ignore_index, served):
    """250 classes, and six more that are none."""
    hidden, kernel, _ = draw(20, 8, 250)
    numbers = [3, 100, 127] if dtype == np.int8 else [3, 100, 127, 249, 250, 251, 252, 253, 255]
    labels = jnp.resize(jnp.array(numbers, dtype), 20)
    loss = partial(linear_cross_entropy, ignore_index=ignore_index, reduction="none")
    found, expected = jax.jit(loss)(hidden, kernel, labels), jax.jit(partial(loss, implementation="xla"))
    assert served
    np.testing.assert_allclose(found, expected(hidden, kernel, labels), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_no_token_counts(value, chunk_size):
    hidden, kernel, labels = draw(40, 8, 16)
    loss = partial(linear_cross_entropy, chunk_size=chunk_size, reduction="sum")
    arrays = hidden, kernel.at[2, 3].set(value), jnp.full_like(labels, -100)
    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(np.asarray(x, float), 0.0)


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, 0), (None, 0, None)], ids=str)
def test_below_vmap(in_axes, served):
    both = [draw(20, 8, 16, seed) for seed in range(3)]
    arrays = [both[0][i] if axis is None else jnp.stack([some[i] for some in both]) for i, axis in enumerate(in_axes)]
    f = jax.value_and_grad(linear_cross_entropy, (0, 1))
    found = jax.jit(jax.vmap(f, in_axes))(*arrays)
    assert served
    for i in range(3):
        each = f(*(x if axis is None else x[i] for x, axis in zip(arrays, in_axes, strict=True)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(each), strict=True):
            np.testing.assert_allclose(np.asarray(a[i], float), np.asarray(b, float), rtol=2e-2, atol=1e-4)


def test_second_derivatives_are_those_of_the_plain_form():
    hidden, kernel, labels = draw(20, 8, 16)
    direction = draw(20, 8, 16, seed=1)[1]

    def curvature(**options):
        def loss(w):
            return linear_cross_entropy(hidden, w, labels, **options)

        return jax.jvp(jax.grad(loss), (kernel,), (direction,))[1]

    a, b = (np.asarray(curvature(**options), float) for options in ({}, {"implementation": "xla"}))
    assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_second_derivatives_in_a_loop(checkpoint):
    """Where a first derivative forgets the rules of functions, and differentiates what they have done."""
    hidden, kernel, labels = draw(20, 8, 16)
    direction = draw(20, 8, 16, seed=1)[1]

    def curvature(**options):
        def loss(w):
            def step(total, some):
                return total + linear_cross_entropy(some[0], w, some[1], **options), None

            some = hidden.reshape(2, 10, 8), labels.reshape(2, 10)
            return jax.lax.scan(jax.checkpoint(step) if checkpoint else step, 0.0, some)[0]

        return jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (direction,))[1])(kernel)

    a, b = (np.asarray(curvature(**options), float) for options in ({}, {"implementation": "xla"}))
    assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)


def lowered(dtype, classes=104, precision=None, **options):
    """For a GPU, as text; products are only traced with this precision."""
    shapes = [((64, 8), dtype), ((8, classes), dtype), ((64,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    run = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, **options), (0, 1)))
    with jax.default_matmul_precision(precision):
        traced = run.trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_who_is_served_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_product, "INTERPRET", False)
    for dtype, classes in itertools.product(("bfloat16", "float32"), (104, 101)):
        assert ("jaxent_product_sums" in lowered(dtype, classes)) == (gpu.unavailable() is None)
    # Products of float32 would be rounded where more is asked for, float16 has not the range, and what more is wanted
    # needs logits.
    for dtype, options in [
        ("float32", {"precision": "highest"}),
        ("float16", {}),
        ("bfloat16", {"softcap": 30.0}),
        ("bfloat16", {"implementation": "xla"}),
    ]:
        assert "jaxent_product" not in lowered(dtype, **options)


def test_no_kernel_is_exported():
    hidden, kernel, labels = draw(20, 8, 16)
    f = jax.jit(jax.grad(linear_cross_entropy))
    exported = export.export(f, platforms=["cuda"])(hidden, kernel, labels)
    assert "jaxent_product" not in exported.mlir_module()
