"""The kernels for CPUs: against the plain form in every layout, and whatever XLA's threads may do to them."""

import functools
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxent
from jaxent import _cross_entropy as cross_entropy_module
from jaxent._class_axis import ClassAxis
from jaxent._kernels import native, xla

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.more(cases=1),
]

# Around the width of a vector, blocks, tiles and pieces; classes last, first and between.
SHAPES = [
    ((4, 10), 1), ((65, 10), 1), ((7, 1), 1), ((5, 16), 1), ((9, 17), 1), ((40, 24), 1), ((3, 100), 1),
    ((40, 1000), 1), ((33, 2048), 1), ((3, 2049), 1), ((2, 5000), 1), ((2, 70_001), 1), ((2, 7, 5), 1),
    ((2, 33, 70), 1), ((2, 200, 3), 1), ((300, 4), 0), ((4, 3, 5), 2), ((6,), 0), ((0, 5), 1), ((3, 0), 1),
]  # fmt: skip
DTYPES = ["float32", "bfloat16", "float16"]
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def _arrays(shape, axis, dtype, special):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape)
    if special:
        x = np.where(rng.random(shape) < 0.2, x.max(initial=0.0), x)  # ties
        x[rng.random(shape) < 0.1] = -np.inf
        x[rng.random(shape) < 0.3 / max(shape[axis], 1)] = np.nan
        x[rng.random(shape) < 0.3 / max(shape[axis], 1)] = np.inf
        rows = np.moveaxis(x, axis, -1)
        rows[..., rng.random(rows.shape[:-1]) < 0.2, :] = -np.inf
    rows = shape[:axis] + shape[axis + 1 :]
    return {
        "x": x.astype(dtype),
        "t": rng.standard_normal(shape).astype(dtype),
        "q": (rng.random(shape) * (rng.random(shape) < 0.7)).astype(dtype),
        "y": rng.integers(-1, shape[axis] + 1, rows).astype(np.int32),
        **{name: (rng.standard_normal(rows) * (rng.random(rows) < 0.8)).astype(np.float32) for name in "auz"},
    }


ARGUMENTS = {
    "softmax": "x", "log_softmax": "x", "softmax_derivative": "xt", "log_softmax_derivative": "xt",
    "log_softmax_pullback": "xt", "label_loss": "xy", "label_loss_and_gradient": "xyauz", "expected_loss": "xq",
    "expected_loss_and_gradient": "xqa", "pick": "xy", "place": "ay",
}  # fmt: skip
LABEL_TERMS = [("a", False), ("az", True), ("u", False), ("z", False)]
GIVEN = {"axis": np.int64(1), "terms": np.int64(7)}
ROWS_ONLY = ("label_loss", "expected_loss", "pick")


def _variants():
    """Functions with their stats, and those of labels with some of their terms."""
    for name, arguments in ARGUMENTS.items():
        yield name, arguments, {"stats": True} if "loss" in name else {}
        for some, stats in LABEL_TERMS if name.startswith("label") else ():
            terms = tuple(letter in some for letter in "auz")
            given = arguments[:2] + some if "gradient" in name else arguments
            yield name, given, {"terms": terms, "stats": stats}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "index"), SHAPES, ids=str)
def test_it_computes_what_the_plain_form_does(shape, index, dtype, special):
    arrays, axis = _arrays(shape, index, dtype, special), ClassAxis(index)
    known = np.all(np.isfinite(np.max(np.float64(arrays["x"]), index, keepdims=True, initial=-np.inf)), index)
    for name, arguments, options in _variants():
        for out in {dtype, "float32"} if name not in ROWS_ONLY else {None}:
            options = options | ({} if out is None else {"dtype": jnp.dtype(out)})
            options |= {"classes": shape[index]} if name == "place" else {}
            args = [jnp.asarray(arrays[a]) for a in arguments]
            got = jax.jit(functools.partial(getattr(native, name), axis=axis, **options))(*args)
            want = getattr(xla, name)(*args, axis=axis, **options)
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                assert (g.dtype, g.shape) == (w.dtype, w.shape), name
                if g.dtype == np.int32:  # the largest class of a row that has one
                    np.testing.assert_array_equal(np.where(known, g, 0), np.where(known, w, 0), err_msg=name)
                    continue
                g, w = np.float64(g), np.float64(w)
                # Sums of terms of both signs are as exact as their largest term is.
                scale = np.max(np.abs(w), where=np.isfinite(w), initial=0.0)
                ulp = ULP[out or "float32"]
                np.testing.assert_allclose(g, w, rtol=16 * ulp, atol=8 * max(ulp, 2.0**-23) * scale, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "index"), [((5000, 10), 1), *(case for case in SHAPES if 0 not in case[0])], ids=str
)
def test_a_gradient_is_written_over_the_logits(shape, index, dtype):
    arrays = _arrays(shape, index, dtype, False)
    for name, arguments, options in _variants():
        if "gradient" not in name:
            continue
        x, *others = (jnp.asarray(arrays[a]) for a in arguments)

        def run(x, *others, in_place, name=name, options=options):
            options = {"axis": ClassAxis(index), "dtype": x.dtype, "in_place": in_place} | options
            return getattr(native, name)(x * jnp.asarray(2, x.dtype), *others, **options)

        programs = [jax.jit(functools.partial(run, in_place=i)).lower(x, *others).compile() for i in (True, False)]
        for g, w in zip(*(program(x, *others) for program in programs), strict=True):
            np.testing.assert_array_equal(np.float64(g), np.float64(w), err_msg=name)
        saved = [program.memory_analysis().temp_size_in_bytes for program in programs]
        assert saved[1] - saved[0] >= x.nbytes, name


def test_who_is_written_over():
    """Logits that the program makes itself; an argument would have to be copied."""
    x, layer, y, q = jnp.zeros((512, 64)), jnp.zeros((64, 1000)), jnp.zeros(512, jnp.int32), jnp.zeros((512, 1000))

    def temporaries(f, *args):
        return jax.jit(jax.value_and_grad(f)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    def copies(f, *args):
        text = jax.jit(jax.value_and_grad(f)).lower(*args).compile().as_text()
        return len(re.findall(r"= f32\[512,1000\]\S* copy\(", text))

    logits = 4 * 512 * 1000
    assert temporaries(lambda x: jaxent.cross_entropy(x @ layer, y), x) < 1.2 * logits
    assert temporaries(lambda x, q: jaxent.cross_entropy(x @ layer, q), x, q) < 1.2 * logits
    # Neither an argument nor one of two that want the same is, for a copy; an accuracy from stats needs none.
    assert copies(lambda x: jaxent.cross_entropy(x, y), q) == 0
    assert copies(lambda x, q: jaxent.cross_entropy(x @ layer, q, z_loss=0.1), x, q) == 0

    def with_accuracy(x):
        loss, stats = jaxent.cross_entropy(x @ layer, y, return_stats=True)
        return loss, jnp.mean(stats.predicted == y)

    program = jax.jit(jax.value_and_grad(with_accuracy, has_aux=True)).lower(x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * logits


@pytest.mark.parametrize("classes", [10, 20, 129, 513, 1025, 2049, 5000, 70_001])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_label_counts_once_wherever_it_is(classes, axis):
    """Largest of its lane, block or piece, but not of the row; the largest; tied with it; out of sight."""
    places = sorted({0, 1, 7, 16, classes // 3, classes // 2, classes - 2, classes - 1} & set(range(classes)))
    rows = [(y, m, value) for y in places for m in places for value in (2.0, 3.0, 4.0, -50.0)]
    x = np.random.default_rng(0).uniform(-9.0, -5.0, (len(rows), classes)).astype(np.float32)
    for row, (y, m, value) in zip(x, rows, strict=True):
        row[m], row[y] = 3.0, value
    labels = np.array([y for y, _, _ in rows])
    wide = np.float64(x)
    e = np.exp(wide - wide.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    want = np.log(e.sum(1)) + wide.max(1) - wide[np.arange(len(rows)), labels]
    p[np.arange(len(rows)), labels] -= 1.0
    turn = (lambda a: jnp.asarray(a)) if axis else (lambda a: jnp.asarray(a.T))
    f = functools.partial(jaxent.cross_entropy, axis=axis, implementation="native")
    np.testing.assert_allclose(f(turn(x), labels, reduction="none"), want, rtol=2e-6, atol=1e-6)
    gradient = jax.grad(functools.partial(f, reduction="sum"))(turn(x), labels)
    np.testing.assert_allclose(gradient if axis else gradient.T, p, rtol=1e-5, atol=1e-6)


def test_numbers_whose_difference_is_subnormal():
    x = jnp.asarray([[1.2e-38, 1.3e-38]])
    loss, gradient = jax.value_and_grad(jaxent.cross_entropy)(x, jnp.array([0]))
    np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_precision_number_is_read_and_written_right(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    with np.errstate(invalid="ignore"):
        x = jnp.asarray(every[np.isfinite(every)])[:, None]
    # Of an impossible class the logarithm's derivative is its tangent less that of the certain one, which is 0 here.
    logits = jnp.concatenate([jnp.zeros_like(x), jnp.full_like(x, -jnp.inf)], 1)
    got = native.log_softmax_derivative(logits, jnp.concatenate([0 * x, x], 1), axis=ClassAxis(1), dtype=x.dtype)[0]
    np.testing.assert_array_equal(np.float64(got)[:, 1], _without_subnormal_ones(np.float64(x)[:, 0]))
    with np.errstate(over="ignore"):  # rounded to nearest, ties to even
        wide = np.float32(x[:, 0]) * np.float32(1.0 + 2.0**-9)
        want = np.float64(wide.astype(x.dtype))
    t = jnp.stack([jnp.zeros_like(wide), wide], 1)
    got = native.log_softmax_derivative(logits, t, axis=ClassAxis(1), dtype=x.dtype)[0]
    np.testing.assert_array_equal(np.float64(got)[:, 1], _without_subnormal_ones(want))


def _without_subnormal_ones(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x)  # XLA's threads take them for 0


def test_asked_for_what_it_does_not_compute():
    with jax.enable_x64(True):
        x = jnp.zeros((2, 3), jnp.float64)
        with pytest.raises(ValueError, match="'native' cannot serve softmax here: it computes no float64"):
            jaxent.softmax(x, implementation="native")
        assert jaxent.softmax(x).dtype == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "results", "options", "message"),
    [
        ("x", "x", {"function": "nonsense"}, "there is no such function"),
        ("xx", "x", {}, "expected 1 arguments and 1 results"),
        ("x", "y", {}, "result 0 has the wrong shape"),
        ("x", "d", {}, "result 0 has the wrong dtype"),
        ("d", "x", {}, "argument 0 has the wrong dtype"),
        ("x", "x", {"axis": np.int64(2)}, "the logits have no such axis"),
        ("xx", "rrr", {"function": "label_loss"}, "argument 1 has the wrong shape"),
        ("xr", "rrr", {"function": "label_loss"}, "argument 1 has the wrong dtype"),
        ("xi", "rr", {"function": "label_loss", "terms": np.int64(1)}, "expected 2 arguments and 1 results"),
        ("xirrr", "rx", {"function": "label_loss_and_gradient", "terms": np.int64(1)}, "expected 3 arguments and 2"),
        ("xir", "rx", {"function": "label_loss_and_gradient", "terms": np.int64(3)}, "expected 4 arguments and 3"),
        ("ri", "x", {"function": "place", "terms": np.int64(0)}, "there are no such terms"),
        ("xi", "r", {"function": "label_loss", "terms": np.int64(8)}, "there are no such terms"),
        ("xxr", "rxix", {"function": "expected_loss_and_gradient", "terms": np.int64(5)}, "result 2 has the wrong"),
    ],
)
def test_a_call_that_cannot_be_is_refused(arguments, results, options, message):
    arrays = {"x": jnp.zeros((4, 3)), "y": jnp.zeros((4, 4)), "d": jnp.zeros((4, 3), jnp.int32), "r": jnp.zeros(4)}
    arrays["i"] = jnp.zeros(4, jnp.int32)
    out = [jax.ShapeDtypeStruct(arrays[r].shape, arrays[r].dtype) for r in results]
    call = jax.ffi.ffi_call(native.TARGET, out)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*(arrays[a] for a in arguments), **{"function": "softmax", **GIVEN} | options)


def _calls(f, *args):
    text = jax.jit(f).lower(*args).as_text()
    return [line.split('function = "')[1].split('"')[0] for line in text.splitlines() if "@jaxent_rows" in line]


def test_nll_of_log_softmax_is_one_pass():
    x, y = jnp.zeros((8, 5)), jnp.arange(8) % 5

    def loss(x):
        return jaxent.nll(jaxent.log_softmax(x), y)

    assert _calls(loss, x) == ["log_softmax", "label_loss"]  # and nothing uses the first: XLA leaves it out
    compiled = jax.jit(loss).lower(x).compile().as_text()
    assert compiled.count('custom_call_target="jaxent_rows"') == 1
    assert 'function = "log_softmax"' not in compiled


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("mean", 1),
        ("sum", 1),
        ("weight", 1),
        ("rows", 1),  # losses times weights, summed outside of nll
        ("branch", 1),  # and what is made of the loss in a branch and in a loop
        ("square", 2),  # the gradient of whose loss needs the loss
        ("kept", 2),  # losses are results, too, which nobody has asked for yet when the gradient is made
        ("twice", 5),  # of which no gradient is that of one loss: both losses, what both place, and the pullback
    ],
)
def test_nll_of_log_softmax_with_its_gradient_is_one_pass(kind, calls):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal((64, 20)), jnp.float32)
    y = jnp.asarray(rng.integers(20, size=64)).at[::5].set(-100)
    w = jnp.asarray(rng.uniform(0.5, 2, 64), jnp.float32)

    def loss(log_softmax, x):
        log_p = log_softmax(x)
        if kind in ("rows", "kept"):
            losses = jaxent.nll(log_p, y, reduction="none")
            return jnp.sum(w * losses), losses
        if kind == "twice":
            return jaxent.nll(log_p, y) + jaxent.nll(log_p, y[::-1]), x[0]
        mean = jaxent.nll(
            log_p, y, weight=w[:20] if kind == "weight" else None, reduction="sum" if kind == "sum" else "mean"
        )
        if kind != "branch":
            return mean**2 if kind == "square" else mean, x[0]
        doubled = jax.lax.while_loop(lambda a: a < 100.0, lambda a: a + mean, 0.0)
        return mean, doubled + jax.lax.cond(mean > x[0, 0], lambda: 2 * mean, lambda: 3 * mean)

    def both(log_softmax):
        def f(x):
            (value, aux), gradient = jax.value_and_grad(functools.partial(loss, log_softmax), has_aux=True)(x)
            return value, gradient, None if kind == "rows" else aux

        return jax.jit(f)

    ours, theirs = both(jaxent.log_softmax), both(jax.nn.log_softmax)
    assert ours.lower(x).compile().as_text().count('custom_call_target="jaxent_rows"') == calls
    for got, want in zip(jax.tree.leaves(ours(x)), jax.tree.leaves(theirs(x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_log_probabilities_of_somebody_else_are_looked_up():
    x, y = jnp.zeros((8, 5)), jnp.arange(8) % 5
    assert _calls(lambda x: jaxent.nll(x, y), x) == []
    assert _calls(lambda x: jaxent.nll(jaxent.log_softmax(x, 0).T, y[:5]), x) == ["log_softmax"]


def _run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


BITS = """
    import os, sys
    if os.environ.get("ONE_CORE"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import hashlib, jax, jax.numpy as jnp, numpy as np, jaxent
    rng, bits = np.random.default_rng(0), hashlib.sha256()
    for shape in [(3000, 10), (500, 100), (40, 5000), (2, 300_000), (1, 1_000_000)]:
        x = jnp.asarray(30 * rng.standard_normal(shape), jnp.float32)  # with subnormal probabilities
        y = jnp.asarray(rng.integers(shape[1], size=shape[0]))
        q = jaxent.softmax(x[::-1])
        # The sum over rows is XLA's, and its order depends on the threads.
        for out in (jaxent.softmax(x), jaxent.log_softmax(x), jaxent.cross_entropy(x, y, reduction="none"),
                    jax.grad(lambda x: jaxent.cross_entropy(x, y, reduction="sum"))(x),
                    jax.grad(lambda x: jaxent.cross_entropy(x, q, reduction="sum"))(x)):
            bits.update(np.asarray(out).tobytes())
    print(bits.hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux chooses cores")
@pytest.mark.more
def test_the_bits_are_the_same_for_any_number_of_threads():
    assert _run(BITS, ONE_CORE="1") == _run(BITS)


CROWD = """
    import threading, jax, jax.numpy as jnp, numpy as np, jaxent
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3000)), jnp.float32)
    y = jnp.arange(64)
    want = np.asarray(jax.nn.softmax(x))
    wrong = []

    def work(i):
        device = jax.devices()[i % jax.device_count()]
        mine, labels = jax.device_put(x, device), jax.device_put(y, device)
        for _ in range(20):
            if not np.allclose(jaxent.softmax(mine), want, atol=1e-6):
                wrong.append(i)
            jax.block_until_ready(jax.grad(jaxent.cross_entropy)(mine, labels))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong

    @jax.jit
    def nested(x):
        def step(carry, _):
            carry = jax.vmap(jax.vmap(jaxent.softmax))(carry.reshape(8, 8, 3000)).reshape(x.shape)
            again = lambda s: (s[0] + 1, jaxent.softmax(s[1]))
            return jax.lax.while_loop(lambda s: s[0] < 3, again, (0, carry))[1], None
        return jax.lax.scan(step, x, None, length=5)[0]

    assert np.isfinite(np.asarray(nested(x))).all()
    print(jax.device_count())
"""


def test_a_crowd_of_callers_never_waits_for_itself():
    assert _run(CROWD) == "1\n"
    assert _run(CROWD, JAX_NUM_CPU_DEVICES="8") == "8\n"
    assert _run(CROWD, XLA_FLAGS="--xla_cpu_multi_thread_eigen=false") == "1\n"


SPAWNED = """
    import multiprocessing, os, sys

    def work(i):
        import jax.numpy as jnp, jaxent
        return float(jaxent.softmax(jnp.zeros((300, 1000))).sum())

    if __name__ == "__main__":
        import jax.numpy as jnp, jaxent
        jaxent.softmax(jnp.zeros((300, 1000))).block_until_ready()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert all(abs(total - 300) < 1e-3 for total in pool.map(work, range(4)))
"""


def test_spawned_processes(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(textwrap.dedent(SPAWNED))
    subprocess.run([sys.executable, script], check=True, timeout=120, capture_output=True)


def _memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0


@pytest.mark.skipif(_memory() < 8 * 2**30, reason="too little free memory")
@pytest.mark.more
def test_more_entries_than_32_bits_count():
    rows, classes = 2**16, 2**15 + 1
    x = jnp.zeros((rows, classes), jnp.bfloat16).at[-1, -1].set(10.0)
    y = jnp.full(rows, classes - 1)
    loss = np.asarray(jaxent.cross_entropy(x, y, reduction="none", implementation="native"))
    np.testing.assert_allclose(loss[:-1], np.log(classes), rtol=1e-6)
    np.testing.assert_allclose(loss[-1], np.log1p((classes - 1) * np.exp(-10.0)), rtol=1e-6)


def test_it_says_who_computes():
    out = subprocess.run([sys.executable, "-m", "jaxent"], check=True, capture_output=True, text=True).stdout
    assert f"jaxent {jaxent.__version__}, jax {jax.__version__}" in out
    assert 'on cpu: "native", kernels for ' in out
    assert "device 0: cpu" in out


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}])
def test_small_losses_outside_of_jit_wait_for_no_other_thread(monkeypatch, options):
    compiled = cross_entropy_module._cross_entropy
    flops = []

    def counted(*args):
        flops.append(compiled.lower(*args).compile().cost_analysis()["flops"])
        return compiled(*args)

    monkeypatch.setattr(cross_entropy_module, "_cross_entropy", counted)
    jaxent.cross_entropy(jnp.zeros((128, 10)), jnp.zeros(128, jnp.int32), **options)
    assert flops[0] < 1000  # from here on XLA's CPU client gives a program to a thread of its pool
