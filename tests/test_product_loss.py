"""linear_cross_entropy as accelerators compute it, whose logits never leave the matrix product. It runs anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from jaxent import (
    _linear_cross_entropy,
    _linear_losses,
    _linear_plan,
    _linear_sweep,
    cross_entropy,
    linear_cross_entropy,
)
from jaxent._chunks import pays_to_walk_twice
from jaxent._class_axis import ClassAxis
from jaxent._kernels.chip import Chip
from jaxent._kernels.label_sums import LabelSums, label_rows
from jaxent._kernels.product import Layer
from jaxent._product_loss import _sums, center

pytestmark = pytest.mark.more(cases=1)

N, D, C = 40, 8, 50
fused = partial(linear_cross_entropy, implementation="xla")


@partial(jax.jit, static_argnums=2)
def on_gpus(arrays, sample_weight, options):
    """A function of its own, since what was traced does not know whose way it went."""
    return _linear_losses.linear_losses.__wrapped__(arrays, sample_weight, options)


@pytest.fixture(autouse=True, params=["tpu", "gpu"])
def machine(request, monkeypatch):
    """Whose way `fused` goes."""
    if request.param == "gpu":
        monkeypatch.setitem(_linear_sweep.MACHINE_OF, "xla", "rocm")
        monkeypatch.setattr(_linear_cross_entropy, "linear_losses", on_gpus)
    return request.param


def trace_anew(monkeypatch):
    """What was traced before would go another way."""
    losses = _linear_losses.linear_losses.__wrapped__
    anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
    monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)


def draw(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((N, D), (D, C)))
    return hidden, kernel, jnp.asarray(rng.integers(C, size=N))


def exact(hidden, kernel, labels):
    """Loss of each token and gradients of their sum, in NumPy's float64."""
    h, w, y = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64), np.asarray(labels)
    x = h @ w
    own = x[np.arange(N), y]
    others = logsumexp(np.where(np.arange(C) == y[:, None], -np.inf, x), 1)
    g = np.exp(log_softmax(x, 1))
    g[np.arange(N), y] = -np.exp(others - np.logaddexp(own, others))
    return np.logaddexp(0.0, others - own), g @ w.T, h.T @ g


def attempts(layer, hidden, labels, *, apart):
    """How often exponentials are made: once, or again relative to the maximum."""
    axis = ClassAxis(1)

    def run(layer, hidden, labels):
        counted = []
        relative = jax.lax.while_loop

        def spy(cond, body, state):
            state = relative(cond, body, state)
            counted.append(state.tries)
            return state

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "while_loop", spy)
            _sums(layer, center(layer, axis, apart=apart), hidden, labels, axis, None)
        return counted[0]

    return int(jax.jit(run)(layer, hidden, labels))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0, 10.0, 100.0, 1000.0])
def test_logits_of_any_size(scale, dtype):
    """Also beyond the range of exponentials, where they are made once more: each loss and both gradients."""
    hidden, kernel, labels = draw(dtype=dtype)
    kernel *= jnp.asarray(scale, dtype)
    labels = labels.at[::2].set(jnp.argmax(jnp.asarray(hidden, np.float32) @ kernel.astype(np.float32), 1)[::2])
    expected, *gradients = exact(hidden, kernel, labels)
    losses = fused(hidden, kernel, labels, reduction="none")
    size = np.abs(np.asarray(hidden, float) @ np.asarray(kernel, float)).max(1)
    # A logit is known to a rounding of its size, and so is a loss; but where the label leads by far, the loss is as
    # small as the others' probability, and that is known relatively.
    known = 4.0 * 2.0**-23 * (size + 1.0) * np.minimum(expected, 1.0) + 4e-7 * expected
    np.testing.assert_array_less(np.abs(losses - expected), known + 1e-37)
    rounding = {jnp.bfloat16: 2.0**-9, np.float16: 2.0**-11}.get(dtype, 0.0) + 4 * 2.0**-23 * (size.max() + 1.0)
    found = jax.grad(partial(fused, reduction="sum"), (0, 1))(hidden, kernel, labels)
    for g, e in zip(found, gradients, strict=True):
        assert np.linalg.norm(np.asarray(g, float) - e) <= 2.0 * rounding * np.linalg.norm(e)


def test_exponentials_of_float32_wait_as_a_tpu_rounds_them(machine, monkeypatch):
    """Which it does with all that it multiplies, unless somebody asks for more: no error is larger by it."""
    monkeypatch.setattr(_linear_plan, "tpu", lambda: Chip(2**27, 560.0, 6))
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "tpu" if machine == "tpu" else "rocm")
    trace_anew(monkeypatch)
    arrays = draw(seed=3)
    value, *exactly = exact(*arrays)

    def rounded(x):
        return np.asarray(np.asarray(x, np.float32).astype(jnp.bfloat16), float)

    h, w = (np.asarray(x, float) for x in arrays[:2])
    g = np.exp(log_softmax(h @ w, 1)) - (np.arange(C) == np.asarray(arrays[2])[:, None])
    allowed = [rounded(g) @ rounded(w).T, rounded(h).T @ rounded(g)]
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            found, gradients = jax.value_and_grad(partial(linear_cross_entropy, reduction="sum"), (0, 1))(*arrays)
        np.testing.assert_allclose(found, value.sum(), rtol=1e-6)
        for a, b, e in zip(gradients, allowed, exactly, strict=True):
            error = np.linalg.norm(np.asarray(a, float) - e)
            if machine == "tpu" and precision is None:
                assert 1e-5 * np.linalg.norm(e) < error < np.linalg.norm(b - e)
            else:
                assert error < 1e-6 * np.linalg.norm(e)


def test_a_smoothed_loss_near_its_minimum(machine, monkeypatch):
    """Where what is left of a gradient is a small difference, no machine rounds its terms before."""
    monkeypatch.setattr(_linear_plan, "tpu", lambda: Chip(2**27, 560.0, 6))
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "tpu" if machine == "tpu" else "rocm")
    trace_anew(monkeypatch)
    noise = 1e-3 * np.random.default_rng(0).standard_normal((N, C))
    kernel = jnp.asarray((np.log(0.902) - np.log(0.002)) * np.eye(N, C) + noise, np.float32)
    arrays = jnp.eye(N), kernel, jnp.arange(N)
    loss = partial(linear_cross_entropy, label_smoothing=0.1, reduction="sum")
    found = jax.grad(loss, (0, 1))(*arrays)
    w = np.asarray(kernel, float)
    g = np.exp(log_softmax(w, 1)) - 0.9 * np.eye(N, C) - 0.1 / C  # hidden states are the rows of the identity
    for a, b in zip(found, (g @ w.T, g), strict=True):
        assert np.linalg.norm(np.asarray(a, float) - b) < 1e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
def test_nan_of_a_row_whose_loss_is_dropped_afterwards(options):
    hidden, kernel, labels = draw()
    keep = jnp.arange(N) != 3

    def loss(hidden, kernel):
        losses = fused(hidden, kernel, labels, reduction="none", **options)
        return jnp.where(keep, losses, 0.0).sum()

    found = jax.grad(loss, 1)(hidden.at[3].set(jnp.nan), kernel)
    np.testing.assert_allclose(found, jax.grad(loss, 1)(hidden, kernel), rtol=1e-5, atol=1e-6)


def test_hidden_states_do_not_underflow_where_a_logit_leads_by_far(machine):
    """Of a loss of 60, and a factor of a millionth."""
    if machine == "gpu":
        pytest.skip("GPUs scale hidden states alone")
    kernel = jnp.zeros((2, 1001)).at[0, 0].set(60.0)
    hidden, label, scale = jnp.array([[1.0, 1e-6]]), jnp.array([1]), jnp.array([1e-6])
    found = jax.grad(lambda w: fused(hidden, w, label, sample_weight=scale, reduction="sum"))(kernel)
    np.testing.assert_allclose(found[:, 0], [1e-6, 1e-12], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], [-1e-6, -1e-12], rtol=1e-5)


def test_logits_of_any_size_below_vmap():
    """One of which takes a second attempt, which all others then take as well: as each by itself."""
    hidden, kernel, labels = draw()
    both = jnp.stack([kernel, 1000.0 * kernel])
    f = jax.value_and_grad(partial(fused, reduction="sum"), (0, 1))
    found = jax.vmap(f, (None, 0, None))(hidden, both, labels)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(f(hidden, both[i], labels)), strict=True):
            assert np.linalg.norm(a[i] - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"weight": 1000.0}], ids=["plain", "z_loss", "weight"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("top", [50.0, 60.5, 78.0, 85.0, 87.5, 88.3, 88.6, 88.7215, 90.0])
def test_where_exponentials_are_about_to_overflow(top, dtype, options):
    """Class by class: one that leads by far, as the label and not, and others far behind."""
    kernel = jnp.zeros((1, 1001), dtype).at[0, 0].set(top).at[0, 1].set(-top)
    x = np.asarray(kernel, float)[0]
    p = np.exp(log_softmax(x))
    z = 2.0 * options.get("z_loss", 0.0) * logsumexp(x)
    weight = options.get("weight", 1.0)
    options = options | ({"weight": jnp.full(1001, weight)} if "weight" in options else {})
    for label in (0, 2):
        loss = partial(fused, reduction="sum", **options)
        found = jax.jit(
            jax.grad(lambda w, label=label, loss=loss: loss(jnp.ones((1, 1), dtype), w, jnp.array([label])))
        )
        own = -p[1:].sum() if label == 0 else p[label] - 1.0
        expected = p * (weight + z)
        expected[label] = weight * own + z * p[label]
        rtol = 2.0**-6 if dtype == jnp.bfloat16 else 2e-5
        atol = 1001 * 1.2e-38 * (weight + z)  # what is no normal number may be 0
        np.testing.assert_allclose(np.asarray(found(kernel), float)[0], expected, rtol=rtol, atol=atol)


def test_the_gradient_of_a_wide_bias():
    """Of bfloat16 hidden states that all lead to one class, whose exponentials are all rounded alike."""
    hidden, kernel = jnp.ones((512, 4), jnp.bfloat16), jnp.zeros((4, 100), jnp.bfloat16)
    bias = jnp.linspace(0.0, 3.0, 100)
    labels = jnp.zeros(512, jnp.int32)
    found = jax.grad(lambda b: fused(hidden, kernel, labels, bias=b, reduction="sum"))(bias)
    expected = 512 * np.exp(log_softmax(np.asarray(bias, float)))
    expected[0] -= 512
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("chunk_size", [2, 3, None])
def test_what_fills_a_chunk_meets_no_infinity(chunk_size, implementation):
    hidden, kernel = jnp.ones((3, 2)), jnp.array([[0.3, 0.1, -jnp.inf], [0.2, 0.5, -jnp.inf]])
    loss = partial(linear_cross_entropy, chunk_size=chunk_size, implementation=implementation)
    found = jax.grad(loss, 1)(hidden, kernel, jnp.array([0, 1, 0]))
    p = np.exp(log_softmax(np.array([0.5, 0.6])))
    expected = np.tile(p - np.array([2.0, 1.0]) / 3.0, (2, 1))
    np.testing.assert_allclose(found[:, :2], expected, rtol=1e-6)
    assert (found[:, 2] == 0.0).all()


def test_an_implementation_that_is_asked_for_serves_or_says_why_not():
    hidden, kernel, labels = draw()
    f = jax.jit(partial(linear_cross_entropy, implementation="native"))
    with pytest.raises(ValueError, match="'native' cannot serve label_loss here: it has no kernels for tpu"):
        f.trace(hidden, kernel, labels).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("apart", [False, True])
def test_when_logits_are_made_twice(apart):
    hidden, kernel, labels = draw()
    assert attempts(Layer(kernel, None), hidden, labels, apart=apart) == 1
    shared = 1000.0  # what all logits have in common does not matter
    assert attempts(Layer(kernel + shared, None), hidden, labels, apart=apart) == 1
    assert attempts(Layer(100.0 * kernel, None), hidden, labels, apart=apart) == 2
    assert attempts(Layer(kernel.at[:, 3].set(jnp.nan), None), hidden, labels, apart=apart) == 2


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("hidden_bias", [-np.inf, -1e9, -1e30])
def test_a_bias_that_hides_classes_costs_nothing(hidden_bias, apart):
    """Of a padded vocabulary, say: neither a second product, nor accuracy."""
    hidden, kernel, labels = draw()
    labels %= 40
    bias = jnp.where(jnp.arange(C) < 40, jnp.linspace(-8.0, 5.0, C), hidden_bias)
    assert attempts(Layer(kernel, bias), hidden, labels, apart=apart) == 1
    expected = -log_softmax(np.asarray(hidden, float) @ np.asarray(kernel, float) + np.asarray(bias, float), 1)
    losses = fused(hidden, kernel, labels, bias=bias, reduction="none")
    np.testing.assert_allclose(losses, expected[np.arange(N), labels], rtol=1e-5)


@given(st.integers(0, 2**31), st.floats(-3, 1.2), st.floats(-3, 1.2), st.integers(1, C))
def test_exponentials_never_underflow(seed, kernel_size, bias_size, shown):
    """Their sum is at least the number of classes, by Jensen's inequality, but for the rounding to an integer."""
    rng = np.random.default_rng(seed)
    hidden, kernel, bias = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((N, D), (D, C), C))
    bias = jnp.where(jnp.arange(C) < shown, bias * 10**bias_size, -jnp.inf)
    layer, axis = Layer(kernel * 10**kernel_size, bias), ClassAxis(1)
    near = center(layer, axis, apart=False).of(hidden)
    excess = logsumexp(np.asarray(layer.logits(hidden), float) - np.asarray(near, float), axis=1) - np.log(C)
    assert (excess >= -0.5 - 1e-4 * (1.0 + np.abs(near[:, 0]))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["hidden", "kernel", "bias"])
def test_what_is_not_finite(value, where):
    """As PyTorch's value is, or NaN where infinities of both signs meet: of these tokens and no others."""
    hidden, kernel, labels = draw()
    bias = jnp.zeros(C)
    if where == "hidden":
        hidden = hidden.at[3, 2].set(value)
    elif where == "kernel":
        kernel = kernel.at[2, 3].set(value)
    else:
        bias = bias.at[3].set(value)
    labels = jnp.where(labels == 3, 4, labels)
    torch = pytest.importorskip("torch")
    h, w, b = (torch.tensor(np.asarray(x)) for x in (hidden, kernel, bias))
    expected = torch.nn.functional.cross_entropy(
        h @ w + b, torch.tensor(np.asarray(labels), dtype=torch.int64), reduction="none"
    )
    losses = fused(hidden, kernel, labels, bias=bias, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "live"), [(N, N), (N, 20), (N, 0), (0, 0)])
def test_what_memory_held_before_is_not_in_the_gradient(tokens, live, monkeypatch):
    """On TPUs a sum begins with the first chunk, if there is one."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    trace_anew(monkeypatch)
    hidden, kernel, labels = draw(dtype=jnp.bfloat16)
    hidden, labels = hidden[:tokens], jnp.where(jnp.arange(N) < live, labels, -100)[:tokens]
    loss = partial(fused, reduction="sum", chunk_size=16)
    _, found = jax.value_and_grad(loss, (0, 1))(hidden, kernel, labels)
    h, w = (np.asarray(x, np.float64) for x in (hidden, kernel))
    g = np.exp(log_softmax(h @ w, 1)) - (np.arange(C) == np.asarray(labels)[:, None])
    g[live:] = 0.0
    for a, b in zip(found, (g @ w.T, h.T @ g), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), b, rtol=0.02, atol=0.02 * np.abs(b).max(initial=0.0))


def test_sums_are_relative_to_any_number():
    """What the loss is made of does not depend on the reference."""
    hidden, kernel, labels = draw()
    axis = ClassAxis(1)
    sums, _ = _sums(Layer(kernel, None), center(Layer(kernel, None), axis, apart=False), hidden, labels, axis, None)
    assert isinstance(sums, LabelSums)
    shift = 10.0 * np.random.default_rng(1).standard_normal((N, 1))
    logits = np.asarray(hidden, float) @ np.asarray(kernel, float)
    total = np.exp(sums.d) + sums.others
    np.testing.assert_allclose(np.log(total) + sums.reference, logsumexp(logits, 1, keepdims=True), rtol=1e-6)
    factor = np.exp(shift).astype(np.float32)
    moved = LabelSums(sums.reference - shift, sums.d + shift, sums.others * factor, sums.mean + shift)
    for a, b in zip(label_rows(sums, labels, axis=axis), label_rows(moved, labels, axis=axis), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("live", "at_once"),
    [((48,), True), ((33,), True), ((32,), False), ((0,), False), ((48, 33), True), ((48, 20), False)],
)
def test_all_at_once_where_no_chunk_could_be_skipped(live, at_once, machine, monkeypatch):
    """Below vmap, too, one of the two programs runs; values and gradients are those of the tokens that count."""
    ran, loop, losses = set(), _linear_sweep.loop, _linear_losses.linear_losses.__wrapped__

    def spy(options, plan, chunks, *rest):
        jax.debug.callback(lambda: ran.add(chunks.size))
        return loop(options, plan, chunks, *rest)

    monkeypatch.setattr(_linear_sweep, "loop", spy)
    anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
    monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)
    rng = np.random.default_rng(3)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), np.float32) for shape in ((48, 96), (96, 70)))
    every = jnp.asarray(rng.integers(70, size=48))
    order = rng.permutation(48)
    labels = jnp.stack([jnp.where(order < n, every, -100) for n in live])
    found = jax.vmap(jax.value_and_grad(partial(fused, reduction="sum"), (0, 1)), (None, None, 0))
    value, gradients = jax.block_until_ready(found(hidden, kernel, labels))
    jax.effects_barrier()
    chunk = 32 if machine == "tpu" else 16  # of two and three
    assert ran == {48 if at_once else chunk}
    for i, n in enumerate(live):
        some = order < n
        rows = np.asarray(hidden, float)[some] @ np.asarray(kernel, float)
        own = np.asarray(every)[some]
        p = np.exp(log_softmax(rows, 1)) - (np.arange(70) == own[:, None])
        np.testing.assert_allclose(value[i], -log_softmax(rows, 1)[np.arange(n), own].sum(), rtol=1e-5)
        of_hidden = np.zeros((48, 96))
        of_hidden[some] = p @ np.asarray(kernel, float).T
        of_kernel = np.asarray(hidden, float)[some].T @ p
        for a, b in zip(gradients, (of_hidden, of_kernel), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("chunk_size", "steps"), [(64, 1), (100, 1), (63, None)])
def test_as_many_as_there_are_tokens_are_one_chunk(chunk_size, steps, monkeypatch):
    """Of a number of steps that is known, so that nothing is added up; that of several depends on labels."""
    seen, loop, losses = [], _linear_sweep.loop, _linear_losses.linear_losses.__wrapped__

    def spy(options, plan, chunks, *rest):
        seen.append(chunks.steps if isinstance(chunks.steps, int) else None)
        return loop(options, plan, chunks, *rest)

    monkeypatch.setattr(_linear_sweep, "loop", spy)
    anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
    monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)
    hidden, kernel, labels = jnp.ones((64, 8)), jnp.ones((8, 50)), jnp.zeros(64, jnp.int32)
    jax.grad(partial(fused, chunk_size=chunk_size))(hidden, kernel, labels)
    assert set(seen) == {steps}


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_at_once_and_in_chunks(dtype, ignore_index):
    """Few tokens of many features are one chunk. Value and gradients are the same."""
    rng = np.random.default_rng(2)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((64, 96), (96, 70)))
    kernel /= jnp.asarray(8.0, dtype)  # logits of size 1
    labels = jnp.asarray(rng.integers(70, size=64))
    run = [
        jax.value_and_grad(partial(fused, ignore_index=ignore_index, chunk_size=size), (0, 1))
        for size in (None, 64, 10)
    ]
    value, gradients = run[0](hidden, kernel, labels)
    for f in run[1:]:
        other, others = f(hidden, kernel, labels)
        np.testing.assert_allclose(value, other, rtol=1e-6)
        for a, b in zip(gradients, others, strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            assert np.linalg.norm(a - b) <= 4 * jnp.finfo(dtype).eps * np.linalg.norm(b)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}, {"weight": True, "logit_scale": 0.5}]
)
@pytest.mark.parametrize(("live", "walks"), [(96, True), (90, True), (60, False)])
@pytest.mark.parametrize("classes", [256, 300])
def test_few_tokens_walk_along_the_classes(classes, live, walks, options, machine, monkeypatch):
    """Where chunks would wait for the sum of the kernel's gradient; unless a chunk of ignored tokens is skipped."""
    taken, walk = [], _linear_sweep.walk_along_classes

    def spy(*arguments):
        jax.debug.callback(lambda: taken.append(True))
        return walk(*arguments)

    monkeypatch.setattr(_linear_sweep, "walk_along_classes", spy)
    rng = np.random.default_rng(5)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((96, 8), (8, classes)))
    labels = jnp.where(rng.permutation(96) < live, jnp.asarray(rng.integers(classes, size=96)), -100)
    bias = jnp.asarray(rng.standard_normal(classes), np.float32)
    given = {"weight": jnp.asarray(rng.random(classes), np.float32)} if "weight" in options else {}
    kept = jnp.arange(96) > 2  # what has no weight may hold anything, as what is ignored may
    hidden = jnp.where((kept & (labels >= 0))[:, None], hidden, jnp.nan)

    def loss(hidden, kernel, bias):
        return fused(hidden, kernel, labels, bias=bias, sample_weight=kept, **options | given)

    def run():
        losses = _linear_losses.linear_losses.__wrapped__
        anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
        monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)
        return jax.block_until_ready(jax.value_and_grad(loss, (0, 1, 2))(hidden, kernel, bias))

    in_chunks = run()
    monkeypatch.setattr(_linear_plan, "tpu", lambda: Chip(2**27, 560.0, 6))
    found = run()
    jax.effects_barrier()
    assert len(taken) == (machine == "tpu" and walks)

    def exact(hidden, kernel, bias):
        logits = jnp.nan_to_num(hidden) @ kernel + bias
        others = {key: value for key, value in (options | given).items() if key != "logit_scale"}
        logits *= options.get("logit_scale", 1.0)
        return cross_entropy(logits, labels, sample_weight=kept, implementation="xla", **others)

    with jax.enable_x64(True):
        want = jax.value_and_grad(exact, (0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in (hidden, kernel, bias)))
    for result in (found, in_chunks):
        np.testing.assert_allclose(result[0], want[0], rtol=1e-5)
        for a, b in zip(result[1], want[1], strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            assert np.linalg.norm(a - b) <= 2 * jnp.finfo(jnp.bfloat16).eps * np.linalg.norm(b)


def test_whether_a_second_walk_pays():
    """By compilers' counts it does on a v6e and a v7x, not on a v5e and a v5p, and for many tokens nowhere."""
    ridges = {"v5e": 240.0, "v5p": 187.0, "v6e": 561.0, "v7x": 313.0}
    pays = {chip for chip, ridge in ridges.items() if pays_to_walk_twice(2048, 688, ridge)}
    assert pays == {"v6e", "v7x"}
    assert not any(pays_to_walk_twice(8192, 2048, ridge) for ridge in ridges.values())
    assert not pays_to_walk_twice(512, 512, 561.0)  # one chunk


PLANS = [  # a chip's fast memory, FLOPs a byte and generation; tokens, features, classes; dtype; what is planned
    # Its fast memory holds the sum.
    ((2**27, 240.0, 5), (2048, 512, 32768), "bfloat16", (1024, "never", None, "bfloat16")),
    ((2**26, 166.0, 5), (2048, 512, 32768), "bfloat16", (688, "never", None, "bfloat16")),
    ((2**27, 560.0, 6), (2048, 512, 32768), "bfloat16", (688, "if all count", 4096, "bfloat16")),  # walks twice
    ((2**27, 560.0, 6), (2048, 512, 32768), "float32", (1024, "never", None, "bfloat16")),
    ((2**27, 560.0, 6), (8192, 1024, 128256), "bfloat16", (2048, "never", None, "bfloat16")),
    # Exponentials lie where the result will be, or a copy of the kernel does.
    ((2**27, 560.0, 6), (8192, 4096, 128256), "bfloat16", (4096, "never", None, "bfloat16")),
    ((2**26, 312.0, 7), (8192, 4096, 128256), "bfloat16", (2048, "never", None, "bfloat16")),
    ((2**26, 312.0, 7), (4096, 2048, 50257), "bfloat16", (1024, "if all count", None, "bfloat16")),
    (None, (8192, 1024, 128256), "float32", (2048, "never", None, "float32")),  # an unknown TPU
]


@pytest.mark.parametrize(("chip", "shape", "dtype", "expected"), PLANS, ids=str)
def test_plans_for_tpus(chip, shape, dtype, expected, monkeypatch, machine):
    if machine == "gpu":
        pytest.skip("of TPUs")
    monkeypatch.setattr(_linear_plan, "tpu", lambda: chip and Chip(*chip))
    plans, plan_for = [], _linear_plan.plan_for

    def spy(machine, *arguments, **options):
        plan = plan_for(machine, *arguments, **options)
        plans.extend([plan] if machine == "tpu" else [])
        return plan

    monkeypatch.setattr(_linear_sweep, "plan_for", spy)
    trace_anew(monkeypatch)
    tokens, features, classes = shape
    arrays = [jax.ShapeDtypeStruct(x, dtype) for x in ((tokens, features), (features, classes))]
    labels = jax.ShapeDtypeStruct((tokens,), "int32")
    jax.eval_shape(jax.value_and_grad(linear_cross_entropy, (0, 1)), *arrays, labels)
    plan = plans[-1]
    assert (plan.size, plan.at_once, plan.block, str(plan.stored)) == expected
