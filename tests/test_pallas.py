"""The Pallas kernels, interpreted on the CPU: against the plain form, and in the tests of everybody."""

import functools
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import interpret
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import jaxent
from jaxent._class_axis import ClassAxis
from jaxent._kernels import gpu, tpu, tpu_columns, tpu_lanes, tpu_long, tpu_parts, xla
from jaxent._kernels.rows import FUNCTIONS, function_of

pytestmark = pytest.mark.more(cases=2)

# One row; rows that fill no tile, in one batch and in several; several groups of a block, and a last one in part;
# a part of a part, one and several, and steps of them.
SHAPES = [(257,), (17, 1009), (3, 21, 300), (1500, 256), (9, 5000)]
# With the class axis: rows across the lanes, and classes across the sublanes, or before rows of two axes.
COLUMNS = [((1152, 300), 1), ((3, 37, 256), 1), ((2, 21, 40, 130), 1), ((2, 24, 128, 19), 3), ((70, 4, 256), 0)]
# Blocks of classes across the lanes or the sublanes, which are kept or read twice.
LONG = [
    *[((40, 5000), 1, True), ((2, 24, 5400), 2, False), ((4500, 40), 0, False)],
    *[((256, 1000), 1, False), ((3, 256, 1000), 2, True), ((1030, 256), 0, True)],
]
DTYPES = ["float32", "bfloat16"]
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for machine in (tpu, gpu):
        monkeypatch.setattr(machine, "INTERPRET", True)
    monkeypatch.setattr(tpu_parts, "STEP", 32)  # shorter programs, and loops at fewer classes
    monkeypatch.setattr(gpu, "BLOCK", 1024)


def _arrays(shape, dtype):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape)
    x[..., 0] += np.where(rng.random(shape[:-1]) < 0.5, 30.0, 0.0)  # a dominant class
    odd = np.where(rng.random(shape) < 0.2, x.max(-1, keepdims=True), x)  # ties
    odd[rng.random(shape) < 0.1] = -np.inf
    odd[rng.random(shape) < 0.3 / shape[-1]] = np.nan
    odd[rng.random(shape) < 0.3 / shape[-1]] = np.inf
    odd[rng.random(shape[:-1]) < 0.2] = -np.inf
    odd[rng.random(shape[:-1]) < 0.2, : shape[-1] // 2] = -np.inf
    x = np.where(rng.random((*shape[:-1], 1)) < 0.5, odd, x)
    rows = shape[:-1]
    return {
        "x": x.astype(dtype),
        "t": (rng.random(shape) * (rng.random(shape) < 0.7)).astype(dtype),
        "y": rng.integers(-1, shape[-1] + 1, rows).astype(np.int32),
        "r": (rng.standard_normal(rows) * (rng.random(rows) < 0.8)).astype(np.float32),
    }


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("machine", [tpu, gpu], ids=["tpu", "gpu"])
def test_it_computes_what_the_plain_form_does(machine, shape, dtype):
    _compare(machine, shape, len(shape) - 1, dtype)


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), COLUMNS, ids=str)
def test_rows_across_the_lanes(monkeypatch, shape, axis, dtype):
    monkeypatch.setattr(tpu_lanes, "call", None)  # nobody asks it
    monkeypatch.setattr(tpu_columns, "BLOCK", 2**19)  # several blocks
    _compare(tpu, shape, axis, dtype)


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "keeps"), LONG, ids=str)
def test_long_rows(monkeypatch, shape, axis, keeps, dtype):
    _as_long_rows(monkeypatch, keeps)
    _compare(tpu, shape, axis, dtype)


def _as_long_rows(monkeypatch, keeps):
    for form in (tpu_lanes, tpu_columns):
        monkeypatch.setattr(form, "plan", lambda *_: None)
    monkeypatch.setattr(tpu_long, "BLOCK", 2**17)
    monkeypatch.setattr(tpu_long, "LEAST_BLOCK", 0 if keeps else 2**40)
    plan = tpu_long.plan

    def several_blocks(function, *arguments):
        found = plan(function, *arguments)
        assert found.blocks > 1
        assert found.keeps == (keeps and function.entry is not None)
        return found

    monkeypatch.setattr(tpu_long, "plan", several_blocks)


@pytest.mark.more(cases=1)
@pytest.mark.parametrize(("shape", "axis"), [((40, 300), 1), ((300, 300), 1), ((2, 11, 20, 130), 1)], ids=str)
def test_nothing_is_read_beyond_arrays_and_nothing_races(monkeypatch, capfd, shape, axis):
    monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    for form in (tpu_lanes, tpu_columns):
        monkeypatch.setattr(form, "BLOCK", 2**17)  # several blocks, the last one in part
    _compare(tpu, shape, axis, "bfloat16", ("softmax", "label_loss_and_gradient", "expected_loss_and_gradient"))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("machine", "shape", "keeps"),
    [
        *[(gpu, (40, 300), None), (gpu, (9, 2500), None)],
        # In blocks that are full: JAX's interpreter takes no others that are written over.
        *[(tpu, (32, 640), None), (tpu, (256, 320), None), (tpu, (32, 10240), True), (tpu, (256, 1280), False)],
    ],
    ids=str,
)
def test_a_gradient_is_written_over_the_logits(monkeypatch, machine, shape, keeps, dtype):
    if keeps is not None:
        _as_long_rows(monkeypatch, keeps)
    if machine is tpu:
        # One array for both; a GPU's kernels, whose programs touch their own rows only, are interpreted with two.
        monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams())
    arrays = _arrays(shape, dtype)
    for name in machine.LOWERING:
        kinds = FUNCTIONS[name].arguments
        axis = 0 if keeps is False else 1  # so that whole blocks of classes lie across the sublanes
        args = [np.moveaxis(arrays[kind], -1, axis) if kind in "xt" else arrays[kind] for kind in kinds]
        run = functools.partial(getattr(machine, name), axis=ClassAxis(axis), dtype=jnp.dtype(dtype))
        got, want = (jax.jit(functools.partial(run, in_place=i))(*args) for i in (True, False))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.float32(g), np.float32(w))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_only_logits_that_the_program_makes_are_written_over(monkeypatch, platform):
    for machine in (tpu, gpu):
        monkeypatch.setattr(machine, "INTERPRET", False)
    if platform == "cuda" and gpu.unavailable():
        pytest.skip(gpu.unavailable())
    x, y = jax.ShapeDtypeStruct((64, 512), "bfloat16"), jax.ShapeDtypeStruct((64,), "int32")
    w = jax.ShapeDtypeStruct((512, 512), "bfloat16")

    def lowered(loss, *arguments):
        gradient = jax.jit(jax.grad(loss))
        text = gradient.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert "jaxent_label_loss_and_gradient" in text
        return re.search(r"output_operand_aliases?\s*=\s*\[#", text) is not None

    assert lowered(lambda x, w, y: jaxent.cross_entropy(x @ w, y), x, w, y)
    assert lowered(lambda x, w, y: jaxent.cross_entropy((x @ w).reshape(8, 8, -1), y.reshape(8, 8)), x, w, y)
    assert not lowered(jaxent.cross_entropy, x, y)
    assert not lowered(lambda x, y: jaxent.cross_entropy(x.reshape(8, 8, -1), y.reshape(8, 8)), x, y)
    assert not lowered(lambda x, y: jaxent.cross_entropy(x[None], y[None]), x, y)
    assert not lowered(jax.checkpoint(jaxent.cross_entropy), x, y)
    assert not lowered(lambda x, y: jaxent.cross_entropy(jax.jit(lambda x: x.T)(x).T, y), x, y)


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((40, 5000), 1), ((256, 1000), 1)], ids=str)
def test_nothing_is_read_beyond_long_rows_and_nothing_races(monkeypatch, capfd, shape, axis, keeps):
    _as_long_rows(monkeypatch, keeps)
    monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    _compare(tpu, shape, axis, "bfloat16", ("softmax", "label_loss_and_gradient", "expected_loss"))
    assert "RACE" not in "".join(capfd.readouterr())


def test_a_race_is_seen(capfd):
    def kernel(x, out):
        out[...] = x[...]

    params = pltpu.CompilerParams(dimension_semantics=("parallel",))
    spec, all_to_one = pl.BlockSpec((8, 128), lambda i: (i, 0)), pl.BlockSpec((8, 128), lambda i: (0, 0))
    racing = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((8, 128), "float32"),
        grid=(4,),
        in_specs=[spec],
        out_specs=all_to_one,
        compiler_params=params,
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )
    raised = ""
    try:
        jax.block_until_ready(racing(jnp.ones((32, 128))))
    except jax.errors.JaxRuntimeError as error:  # from JAX 0.12 on
        raised = str(error)
    assert "RACE" in raised + "".join(capfd.readouterr())


def test_a_read_beyond_an_array_is_seen():
    def kernel(x, out):
        out[...] = x[pl.ds(x[0, 0].astype(jnp.int32), 8)]

    beyond = pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 128), "float32"), interpret=pltpu.InterpretParams())
    with pytest.raises(Exception, match="ut-of-bounds"):
        jax.block_until_ready(beyond(jnp.full((8, 128), 5.0)))


@pytest.mark.more(cases=1)
@pytest.mark.parametrize(("shape", "axis"), [((384, 24), 0), ((8, 21, 300), 2), ((640, 3, 16), 0)], ids=str)
def test_classes_across_the_lanes_are_no_last_axis(shape, axis):
    form = tpu._form("softmax", (jax.ShapeDtypeStruct(shape, "float32"),), axis, "float32")
    assert form.file is tpu_lanes
    _compare(tpu, shape, axis, "float32")


@pytest.mark.more
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((300, 10), 1), ((2, 21, 5, 70), 1), ((130, 9), 0), ((5, 400), 1), ((3, 1, 7), 1)], ids=str
)
def test_several_rows_a_program(monkeypatch, shape, axis, dtype):
    monkeypatch.setattr(gpu, "_call", None)  # nobody asks it
    _compare(gpu, shape, axis, dtype)


def _variants(name):
    """With stats, of labels with some of their terms, and with one factor for all rows."""
    yield name, {"stats": bool(FUNCTIONS[name].stats)}, False
    if "label" in name:
        yield name, {"terms": (True, False, False), "stats": False}, False
        yield name, {"terms": (True, False, True), "stats": True}, True
        yield name, {"terms": (False, False, True), "stats": False}, True
    elif "r" in FUNCTIONS[name].arguments:
        yield name, {"stats": False}, True


def _compare(machine, shape, axis, dtype, names=tuple(FUNCTIONS)):
    last = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    arrays = {k: np.moveaxis(a, -1, axis) if k in "xt" else a for k, a in _arrays(last, dtype).items()}
    known = np.isfinite(np.max(np.float64(arrays["x"]), axis))
    for name, options, for_all in itertools.chain.from_iterable(map(_variants, names)):
        function = function_of(name, **options)
        # What a loss's pullback asks for: half precision in, and float32 out.
        out = "float32" if len(shape) == 1 else dtype
        options = {key: option for key, option in options.items() if option is not False}
        options |= {"dtype": jnp.dtype(out)} if function.entry else {}
        options["axis"] = ClassAxis(axis)
        args = [
            jnp.asarray(np.roll(arrays[a], i) if a == "r" else arrays[a]) for i, a in enumerate(function.arguments)
        ]
        if for_all and function.arguments[-1] == "r":
            args[-1] = jnp.float32(-0.7)
        assert machine.refusal(name, *args, **options) is None
        got = jax.jit(functools.partial(getattr(machine, name), **options))(*args)
        want = getattr(xla, name)(*args, **options)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape), name
            if g.dtype == np.int32:  # the largest class of a row that has one
                np.testing.assert_array_equal(np.where(known, g, 0), np.where(known, w, 0), err_msg=name)
                continue
            g, w = np.float64(g), np.float64(w)
            # Sums of terms of both signs are as exact as their largest term is.
            scale = np.max(np.abs(w), where=np.isfinite(w), initial=0.0)
            ulp = ULP[out if g.shape == shape else "float32"]
            np.testing.assert_allclose(g, w, rtol=16 * ulp, atol=8 * max(ulp, 2.0**-23) * scale, err_msg=name)


def _asked(machine, shape, dtype="float32", axis=None):
    x = jax.ShapeDtypeStruct(shape, dtype)
    axis = ClassAxis(len(shape) - 1 if axis is None else axis)
    return machine.refusal("softmax", x, axis=axis, dtype=x.dtype) or machine.unasked(
        "softmax", x, axis=axis, dtype=x.dtype
    )


@pytest.mark.parametrize("machine", [tpu, gpu], ids=["tpu", "gpu"])
def test_where_the_plain_form_serves(machine):
    for shape in [(8192, 512), (8192, 128256), (4, 16, 2048, 2048), (4, 2047, 32000), (8, 262144), (32000,)]:
        for dtype in DTYPES:
            assert _asked(machine, shape, dtype) is None
    assert "fewer than 512 classes" in _asked(machine, (128, 384))
    assert "nothing to compute" in _asked(machine, (0, 512))
    assert "it computes float32" in _asked(machine, (8, 512), "float8_e4m3fn")


def test_where_the_plain_form_serves_on_one_of_them():
    assert "lie side by side" in _asked(tpu, (5, 5, 512))
    assert _asked(tpu, (64, 5, 512)) is None  # as XLA lays them out, 64 do
    assert _asked(tpu, (8, 2**22)) is None
    assert "more than 16777216 classes" in _asked(tpu, (8, 2**24 + 1))
    assert "it computes float32 and bfloat16 only" in _asked(tpu, (8, 512), "float16")
    assert "fewer than 512 classes" in _asked(tpu, (32768, 10))
    assert "fewer than 8 classes" in _asked(tpu, (2**20, 7))
    assert "fewer than 512 classes" in _asked(tpu, (2, 3, 256, 256), axis=1)
    assert _asked(tpu, (65536, 10)) is _asked(tpu, (8, 3, 512, 512), axis=1) is None
    assert "rows lie across sublanes and lanes" in _asked(tpu, (8, 1024, 50257), "bfloat16")
    assert "65536 blocks of 8192 bytes are small" in _asked(tpu, (65536, 16, 128), "bfloat16", axis=1)
    assert "along an axis that is not the last" in _asked(gpu, (8, 513, 512), axis=1)
    assert _asked(gpu, (65536, 10)) is _asked(gpu, (8, 512, 512), axis=1) is None
    assert "more than 2147483647 logits" in _asked(gpu, (2**16, 2**15))


@pytest.mark.parametrize(
    ("shape", "axis", "form"),
    [
        ((8192, 32000), 1, tpu_lanes),  # as XLA lays it out with the least padding
        ((8192, 1000), 1, tpu_columns),
        ((100, 1000), 1, tpu_lanes),
        ((1, 4096, 50257), 2, tpu_columns),
        ((8, 1024, 1000), 2, tpu_columns),
        ((8, 21, 512, 512), 1, tpu_columns),
        ((16, 512, 512, 21), 3, tpu_columns),
        ((4, 32, 2048), 1, tpu_columns),
        ((64, 1024, 5001), 2, tpu_columns),  # 8 by 128 rows fit, 16 do not
        ((512, 24), 0, tpu_lanes),
        ((5000, 2, 300), 0, tpu_lanes),
        ((8, 2**21), 1, tpu_long),
        ((1024, 100277), 1, tpu_long),
        ((8, 1024, 50257), 2, tpu_lanes),  # whose product would take longer where rows lie across the lanes
    ],
)
def test_the_kernel_is_for_the_layout(shape, axis, form):
    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    assert tpu._form("softmax", (x,), axis, x.dtype).file is form


@pytest.mark.parametrize(("rows", "most"), [(16, 800_000), (4096, 2 * 50257)])
def test_how_long_rows_are_that_are_kept(rows, most):
    """In float32 on a v5p, as docs/speed.md says; of half as many classes, such as GPT-2 has, in a pullback."""
    for name, classes in (("softmax", most), ("log_softmax_pullback", most // 2)):
        for longer in (False, True):
            x = jax.ShapeDtypeStruct((rows, classes + longer * most // 16), "float32")
            form = tpu._form(name, (x,) * len(FUNCTIONS[name].arguments), 1, x.dtype)
            assert (form.file, form.plan.keeps) == (tpu_long, not longer)
            assert form.plan.memory <= tpu.FAST_MEMORY


@pytest.mark.parametrize(
    ("platform", "shape"), [("tpu", (32, 512)), ("tpu", (256, 1000)), ("cuda", (8, 20000))], ids=str
)
def test_they_lower_where_numbers_have_64_bits(monkeypatch, platform, shape):
    for machine in (tpu, gpu):
        monkeypatch.setattr(machine, "INTERPRET", False)
    if platform == "cuda" and gpu.unavailable():
        pytest.skip(gpu.unavailable())
    with jax.enable_x64(True):
        arguments = jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct(shape[:1], "int64")
        traced = jax.jit(jax.value_and_grad(functools.partial(jaxent.cross_entropy, implementation="pallas"))).trace
        assert "jaxent_label_loss" in traced(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_they_are_imported_when_they_serve_only():
    code = """
import sys, jaxent, jax.numpy as jnp
assert "jax._src.pallas" not in sys.modules  # of which `jax.extend` imports a part
jaxent.softmax(jnp.ones((2, 3)))
assert "jax.experimental.pallas" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.more
@pytest.mark.parametrize("machine", ["tpu", "gpu"])
def test_under_every_transform(monkeypatch, machine):
    """Asked for by nobody, as programs are."""
    interpret(monkeypatch, machine)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)), jnp.float32)
    y = jnp.array([0, 299, 5, 17])
    loss = functools.partial(jaxent.cross_entropy, label_smoothing=0.1)
    plain = functools.partial(loss, implementation="xla")

    def along(f):
        return jax.jvp(jax.grad(lambda x: f(x, y)), (x,), (x[::-1],))[1]

    def looped(f):
        step = jax.checkpoint(lambda total, row: (total + f(row[0][None], row[1][None]), None))
        return jax.grad(lambda x: jax.lax.scan(step, 0.0, (x, y))[0])(x)

    def mapped(f):
        return jax.vmap(jax.grad(lambda x, y: f(x[None], y[None])))(x, y)

    for transformed in (along, looped, mapped):
        np.testing.assert_allclose(transformed(loss), transformed(plain), rtol=1e-5, atol=1e-6)
    jax.clear_caches()
