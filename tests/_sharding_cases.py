import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import _exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _machine import served_by_a_machine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent import _linear_cross_entropy, _linear_losses, _linear_plan, _linear_sweep
from jaxent._kernels import gpu, gpu_product, native, product
from jaxent._kernels.chip import Chip

pytestmark = pytest.mark.more(cases=1)

SIZES = {"n": 16, "c": 32, "l": 3, "d": 12}  # tokens, classes, and two axes that are never sharded

# Over which mesh axes tokens and classes are sharded.
LAYOUTS = {
    "tokens and classes": {"n": "data", "c": "class"},
    "classes": {"c": "class"},
    "classes over two mesh axes": {"c": ("data", "class")},
    "tokens": {"n": "data"},
}
WAYS = ("auto", "explicit", "shard_map", "gradient inside shard_map", "shard_map without check_vma")


@dataclass(frozen=True)
class Case:
    """A function, and arrays whose axes are named by letters: n tokens, c classes."""

    function: Callable[..., Any]
    arrays: dict[str, str]
    out: str
    dtype: Any
    wrt: tuple[str, ...]  # the arrays that get gradients
    ignored: bool  # whether some labels are -100
    options: dict[str, Any]

    @property
    def tokens(self):
        """The axes that remain without the classes."""
        return self.arrays[self.wrt[0]].replace("c", "")


def _case(function, arrays, out="n", dtype=jnp.float32, wrt=("logits",), ignored=False, **options):
    return Case(function, arrays, out, dtype, wrt, ignored, options)


_LOGITS, _INDICES = {"logits": "nc"}, {"logits": "nc", "labels": "n"}
_SOFT = {"logits": "nc", "labels": "nc"}
_CE = partial(_case, jaxent.cross_entropy, reduction="none")
_LCE = partial(_case, jaxent.linear_cross_entropy, reduction="none", chunk_size=4)
_LINEAR = {"hidden": "nd", "kernel": "dc", "labels": "n", "bias": "c"}
_LEARNT = ("hidden", "kernel", "bias")


def _log_probs(hidden, kernel, labels, **options):
    """Both results in one, which tells them apart by its derivatives."""
    log_probs, entropies = jaxent.linear_log_probs(hidden, kernel, labels, entropy=True, chunk_size=4, **options)
    return log_probs - jnp.cos(entropies)


def _with_stats(function, **arguments):
    """The loss beside all that is known of it."""
    loss, stats = function(**arguments, return_stats=True)
    return loss + jnp.cos(stats.loss) * jnp.sin(loss) + stats.logsumexp * (1.0 + jnp.cos(stats.predicted))


_STATS_CE = partial(_case, partial(_with_stats, jaxent.cross_entropy), reduction="none")
_STATS_LCE = partial(_case, partial(_with_stats, jaxent.linear_cross_entropy), reduction="none", chunk_size=4)
_NLL = partial(_case, jaxent.nll, wrt=("log_probs",), reduction="none")
CASES = {
    "softmax": _case(jaxent.softmax, _LOGITS, "nc"),
    "softmax where": _case(jaxent.softmax, _LOGITS | {"where": "nc"}, "nc"),
    "softmax axis 1": _case(jaxent.softmax, {"logits": "ncl"}, "ncl", axis=1),
    "log_softmax": _case(jaxent.log_softmax, _LOGITS, "nc"),
    "log_softmax where": _case(jaxent.log_softmax, _LOGITS | {"where": "nc"}, "nc"),
    "log_softmax bfloat16": _case(jaxent.log_softmax, _LOGITS, "nc", jnp.bfloat16),
    "entropy": _case(jaxent.entropy, _LOGITS),
    "entropy where": _case(jaxent.entropy, {"logits": "ncl", "where": "ncl"}, "nl", axis=1),
    "nll": _NLL({"log_probs": "nc", "labels": "n"}),
    "nll weight": _NLL({"log_probs": "nc", "labels": "n", "weight": "c"}, wrt=("log_probs", "weight"), ignored=True),
    "nll probabilities": _NLL({"log_probs": "nc", "labels": "nc", "weight": "c"}),
    "cross_entropy": _CE(_INDICES),
    "cross_entropy weight": _CE(_INDICES | {"weight": "c"}, wrt=("logits", "weight")),
    "cross_entropy ignore_index": _CE(_INDICES, ignored=True),
    "cross_entropy label_smoothing": _CE(_INDICES, label_smoothing=0.1),
    "cross_entropy z_loss": _CE(_INDICES, z_loss=0.1),
    "cross_entropy where": _CE(_INDICES | {"where": "nc"}, label_smoothing=0.1),
    "cross_entropy where of classes": _CE(_INDICES | {"where": "c"}),
    "cross_entropy probabilities": _CE(_SOFT, wrt=("logits", "labels")),
    "cross_entropy probabilities with all": _CE(
        _SOFT | {"weight": "c", "where": "nc"}, label_smoothing=0.2, z_loss=0.1, wrt=("logits", "labels")
    ),
    "cross_entropy with all": _CE(
        _INDICES | {"weight": "c", "where": "nc"},
        ignored=True,
        label_smoothing=0.2,
        z_loss=0.1,
        wrt=("logits", "weight"),
    ),
    "cross_entropy axis 1": _CE({"logits": "ncl", "labels": "nl", "weight": "c"}, "nl", axis=1),
    "cross_entropy bfloat16": _CE(_INDICES | {"weight": "c"}, dtype=jnp.bfloat16),
    "cross_entropy mean": _CE(_INDICES | {"weight": "c"}, "", ignored=True, reduction="mean"),
    "cross_entropy sum": _CE(_INDICES, "", reduction="sum"),
    "nll mean of weighted tokens": _NLL(
        {"log_probs": "nc", "labels": "n", "sample_weight": "n"},
        "",
        wrt=("log_probs", "sample_weight"),
        reduction="mean",
    ),
    "cross_entropy of weighted tokens": _CE(_INDICES | {"sample_weight": "n"}, wrt=("logits", "sample_weight")),
    "cross_entropy mean of weighted tokens": _CE(
        _INDICES | {"sample_weight": "n", "weight": "c"},
        "",
        wrt=("logits", "sample_weight"),
        ignored=True,
        label_smoothing=0.1,
        reduction="mean",
    ),
    "cross_entropy probabilities of weighted tokens": _CE(_SOFT | {"sample_weight": "n"}, "", reduction="mean"),
    "linear_cross_entropy": _LCE(_LINEAR, wrt=_LEARNT),
    "linear_cross_entropy of rows": _LCE(
        _LINEAR | {"hidden": "nld", "labels": "nl"}, "nl", wrt=_LEARNT, ignored=True
    ),
    "linear_cross_entropy at once": _LCE(_LINEAR, wrt=_LEARNT, ignored=True, chunk_size=None),
    "linear_cross_entropy in one chunk": _LCE(_LINEAR, wrt=_LEARNT, ignored=True, chunk_size=SIZES["n"]),
    "linear_cross_entropy mean at once": _LCE(_LINEAR, "", wrt=_LEARNT, reduction="mean", chunk_size=None),
    "linear_cross_entropy bfloat16 at once": _LCE(_LINEAR, dtype=jnp.bfloat16, wrt=_LEARNT, chunk_size=None),
    "linear_cross_entropy bfloat16": _LCE(_LINEAR, dtype=jnp.bfloat16, wrt=_LEARNT),
    "linear_cross_entropy frozen kernel": _LCE(_LINEAR, wrt=("hidden",), ignored=True),
    "linear_cross_entropy probabilities": _LCE(_LINEAR | {"labels": "nc"}, wrt=("hidden", "kernel", "labels")),
    "linear_cross_entropy with all": _LCE(
        _LINEAR | {"weight": "c"}, wrt=_LEARNT, ignored=True, label_smoothing=0.2, z_loss=0.1, softcap=5.0
    ),
    "linear_cross_entropy scaled and masked": _LCE(
        _LINEAR | {"where": "c", "logit_scale": ""}, wrt=(*_LEARNT, "logit_scale"), softcap=5.0, label_smoothing=0.1
    ),
    "linear_cross_entropy mean": _LCE(_LINEAR | {"weight": "c"}, "", wrt=_LEARNT, ignored=True, reduction="mean"),
    "linear_cross_entropy mean of class weights": _LCE(
        _LINEAR | {"weight": "c"}, "", wrt=("weight", "kernel"), ignored=True, reduction="mean"
    ),
    "linear_cross_entropy sum": _LCE(_LINEAR, "", wrt=_LEARNT, reduction="sum"),
    "linear_cross_entropy of weighted tokens": _LCE(_LINEAR | {"sample_weight": "n"}, wrt=_LEARNT),
    "linear_log_probs": _case(_log_probs, _LINEAR, wrt=_LEARNT),
    "linear_log_probs with all": _case(
        _log_probs,
        _LINEAR | {"hidden": "nld", "labels": "nl", "where": "c", "logit_scale": ""},
        "nl",
        wrt=(*_LEARNT, "logit_scale"),
        softcap=5.0,
    ),
    "distillation_loss": _case(
        jaxent.distillation_loss,
        {"logits": "nc", "teacher_logits": "nc"},
        wrt=("logits", "teacher_logits"),
        reduction="none",
        train_teacher=True,
    ),
    "distillation_loss with all": _case(
        jaxent.distillation_loss,
        {"logits": "ncl", "teacher_logits": "ncl", "where": "ncl"},
        "nl",
        axis=1,
        beta=0.3,
        temperature=2.0,
        reduction="none",
    ),
    "distillation_loss mean": _case(
        jaxent.distillation_loss,
        {"logits": "nc", "teacher_logits": "nc", "sample_weight": "n"},
        "",
        beta=1.0,
        reduction="mean",
    ),
    "linear_distillation_loss": _case(
        partial(jaxent.linear_distillation_loss, chunk_size=4),
        {"hidden": "nd", "kernel": "dc", "teacher_hidden": "nl", "teacher_kernel": "lc", "bias": "c"},
        wrt=_LEARNT,
        reduction="none",
        beta=0.3,
    ),
    "linear_distillation_loss mean": _case(
        partial(jaxent.linear_distillation_loss, chunk_size=4, train_teacher=True),
        {"hidden": "nd", "kernel": "dc", "teacher_hidden": "nl", "teacher_kernel": "lc", "teacher_bias": "c"},
        "",
        wrt=("hidden", "kernel", "teacher_kernel"),
        reduction="mean",
    ),
    "cross_entropy of a schedule": _CE(
        _INDICES | {"weight": "c", "label_smoothing": "", "z_loss": ""}, wrt=("logits", "label_smoothing", "z_loss")
    ),
    "linear_cross_entropy of a schedule": _LCE(
        _LINEAR | {"label_smoothing": "", "z_loss": ""}, "", wrt=("kernel", "z_loss"), reduction="mean"
    ),
    "linear_cross_entropy mean of weighted tokens": _LCE(
        _LINEAR | {"sample_weight": "n"}, "", wrt=(*_LEARNT, "sample_weight"), ignored=True, reduction="mean"
    ),
}
CASES |= {
    "cross_entropy with stats": _STATS_CE(_INDICES | {"weight": "c"}, wrt=("logits", "weight"), ignored=True),
    "cross_entropy probabilities with stats": _STATS_CE(_SOFT, wrt=("logits", "labels")),
    "linear_cross_entropy with stats": _STATS_LCE(_LINEAR, wrt=_LEARNT, ignored=True),
}
# What TPUs and GPUs get, and here whoever asks for it: logits that never leave the product.
CASES |= {
    f"{name}, fused": replace(CASES[name], options=CASES[name].options | {"implementation": "xla"})
    for name in (
        "linear_cross_entropy of rows",
        "linear_cross_entropy bfloat16",
        "linear_cross_entropy mean",
        "linear_cross_entropy with stats",
    )
}
LINEAR_CASES = [name for name in CASES if name.startswith("linear")]


def arguments_of(case, sizes=SIZES):
    """The arrays of a case, and a cotangent of its value; always the same."""
    rng = np.random.default_rng(zlib.crc32(repr((case.arrays, case.options, sizes)).encode()))
    arguments = {}
    for name, axes in case.arrays.items():
        shape = [sizes[a] for a in axes]
        if name == "labels" and "c" not in axes:
            arguments[name] = rng.integers(0, sizes["c"], shape).astype(np.int32)
        elif name == "where":
            arguments[name] = rng.random(shape) < 0.8
        elif name == "weight":
            arguments[name] = rng.uniform(0.5, 2, shape).astype(case.dtype)
        elif name == "sample_weight":
            arguments[name] = (rng.uniform(0.5, 2, shape) * (np.arange(sizes["n"]) % 5 > 0)).astype(case.dtype)
        elif name == "labels":
            arguments[name] = (rng.random(shape) / sizes["c"]).astype(case.dtype)
        elif "kernel" in name:  # such that logits are of the size that they have elsewhere
            arguments[name] = (rng.normal(size=shape) / np.sqrt(shape[0])).astype(case.dtype)
        else:
            arguments[name] = (rng.normal(size=shape) * 3).astype(case.dtype)
    axes = case.arrays.get("labels")
    if case.arrays.get("where") == "nc" and axes:  # a label on a masked class would make the loss inf
        if axes == "n":
            np.put_along_axis(arguments["where"], arguments["labels"][:, None], True, 1)
        else:
            arguments["labels"] *= arguments["where"]
    if case.arrays.get("where") == "c" and "hidden" in case.arrays:
        arguments["where"][arguments["labels"]] = True
    if case.ignored:
        arguments["labels"][::3] = -100
    return arguments, rng.normal(size=[sizes[a] for a in case.out]).astype(np.float32)


def _bind(case, axis_name=None):
    """The function of a case, of a dictionary of arrays."""
    options = case.options if axis_name is None else case.options | {"axis_name": axis_name}
    return lambda arrays: case.function(**arrays, **options)


def _first_order(function, wrt, arguments, cotangent):
    """The value and the gradients."""
    value, pull = jax.vjp(lambda x: function(arguments | x), {name: arguments[name] for name in wrt})
    return value, pull(cotangent.astype(value.dtype))[0]


def _second_order(function, wrt, arguments, cotangent):
    """The gradients, and their derivative along some direction, forward over reverse."""

    def gradients(x):
        return _first_order(function, wrt, arguments | x, cotangent)[1]

    x = {name: arguments[name] for name in wrt}
    return jax.jvp(gradients, (x,), (jax.tree.map(lambda x: jnp.sin(5 * x), x),))


def _reverse_over_reverse(function, wrt, arguments, cotangent):
    """The gradients, and their derivative pulled back."""

    def gradients(x):
        return _first_order(function, wrt, arguments | x, cotangent)[1]

    x = {name: arguments[name] for name in wrt}
    value, pull = jax.vjp(gradients, x)
    return value, pull(jax.tree.map(lambda x: jnp.sin(5 * x), x))[0]


def sharded(case, way, layout, work=_first_order, shape=(2, 4), axes=("data", "class")):
    """`work` on a case, done in one of the ways; the mesh; and the shardings of its arguments."""
    layout = LAYOUTS[layout]
    if "shard_map" in way and not case.out:  # a reduction inside is over the device's own tokens: let it have all
        layout = {axis: name for axis, name in layout.items() if axis == "c"}
    specs = {name: P(*map(layout.get, axes)) for name, axes in case.arrays.items()}
    out = P(*map(layout.get, case.out))
    kind = AxisType.Auto if way == "auto" else AxisType.Explicit
    mesh = jax.make_mesh(shape, axes, axis_types=(kind, kind))
    shard_map = partial(jax.shard_map, mesh=mesh, check_vma="without" not in way)
    if "shard_map" not in way:
        done = partial(work, _bind(case), case.wrt)
    elif way == "gradient inside shard_map":
        done = partial(work, _bind(case, layout.get("c")), case.wrt)
        gradients = {name: specs[name] for name in case.wrt}
        out_specs = (out, gradients) if work is _first_order else (gradients, gradients)
        done = shard_map(done, in_specs=(specs, out), out_specs=out_specs)
    else:
        inside = shard_map(_bind(case, layout.get("c")), in_specs=(specs,), out_specs=out)
        done = partial(work, inside, case.wrt)
    return done, mesh, (specs, out)


def _put(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def _run(case, way, arguments, layout="tokens and classes", work=_first_order):
    function, mesh, specs = sharded(case, way, layout, work)
    with jax.set_mesh(mesh):
        return jax.jit(function)(*_put(arguments, specs, mesh))


@functools.cache
def unsharded(name, classes=SIZES["c"], work=_first_order):
    """The same on one device."""
    case = CASES[name]
    return jax.jit(partial(work, _bind(case), case.wrt))(*arguments_of(case, SIZES | {"c": classes}))


def _check(name, way, layout="tokens and classes", classes=SIZES["c"], work=_first_order):
    case = CASES[name]
    got = _run(case, way, arguments_of(case, SIZES | {"c": classes}), layout, work)
    assert_close(got, unsharded(name, classes, work), case.dtype)


def assert_close(got, want, dtype):
    """Equal but for a few roundings, relative to the largest entry: sums are made in another order."""
    tolerance = 16 * float(jnp.finfo(dtype).eps)

    def compare(got, want):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        scale = np.max(np.abs(want), initial=0, where=np.isfinite(want))
        assert scale > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)

    jax.tree.map(compare, got, want)


@pytest.fixture(autouse=True)
def eight_devices():
    assert jax.device_count() == 8


BY_WAY = pytest.mark.parametrize("way", WAYS)
BY_MAIN_WAY = pytest.mark.parametrize("way", WAYS[:3])


@BY_WAY
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, way):
    _check(name, way)


@BY_MAIN_WAY
@pytest.mark.parametrize("name", ["linear_distillation_loss", "linear_distillation_loss mean"])
@pytest.mark.usefixtures("accelerators")
def test_as_on_accelerators(name, way):
    _check(name, way)


@BY_MAIN_WAY
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize(
    "name",
    [
        "log_softmax",
        "nll weight",
        "cross_entropy mean",
        "cross_entropy with all",
        "linear_cross_entropy with all",
        "linear_cross_entropy mean",
        "linear_cross_entropy mean, fused",
    ],
)
def test_layouts(name, layout, way):
    _check(name, way, layout)


@BY_MAIN_WAY
@pytest.mark.parametrize("classes", [40, 4800])
@pytest.mark.parametrize("name", ["log_softmax", "cross_entropy"])
def test_numbers_of_classes(name, classes, way):
    # Not few, and so many that shard_map sums them in blocks.
    _check(name, way, classes=classes)


@BY_WAY
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("softmax", _second_order),
        ("cross_entropy", _second_order),
        ("cross_entropy with all", _second_order),
        ("cross_entropy with all", _reverse_over_reverse),
        ("linear_cross_entropy mean", _second_order),
        ("linear_cross_entropy mean", _reverse_over_reverse),
        ("linear_log_probs", _second_order),
        ("entropy where", _second_order),
        ("distillation_loss with all", _second_order),
        ("linear_cross_entropy with all", _second_order),
        ("linear_cross_entropy with all", _reverse_over_reverse),
    ],
)
def test_second_derivatives(name, work, way):
    _check(name, way, work=work)


@BY_WAY
@pytest.mark.parametrize("name", ["cross_entropy", "nll", "cross_entropy weight"])
def test_a_label_out_of_range_spoils_one_token_only(name, way):
    case = CASES[name]
    arguments, cotangent = arguments_of(case, SIZES)
    arguments["labels"][[1, 10]] = SIZES["c"], -1
    losses, gradients = _run(case, way, (arguments, cotangent))
    bad = np.isin(np.arange(SIZES["n"]), [1, 10])
    assert np.array_equal(np.isnan(losses), bad)
    gradients = np.isnan(gradients[case.wrt[0]])
    assert np.array_equal(gradients.any(-1), bad)
    assert np.array_equal(gradients.all(-1), bad)


def _composed(logits, labels, axis_name=None):
    return jaxent.nll(jaxent.log_softmax(logits, axis_name=axis_name), labels, reduction="none", axis_name=axis_name)


@BY_WAY
@pytest.mark.parametrize("function", [partial(jaxent.cross_entropy, reduction="none"), _composed])
def test_accurate_at_large_margins(function, way):
    margins = np.repeat([2.0, 17.0, 30.0, 80.0], 4)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 32)).clip(-3, 3).astype(np.float32)
    labels = rng.integers(0, 32, 16).astype(np.int32)
    leader = np.where(np.arange(16) % 4 == 3, (labels + 20) % 32, labels)  # one in four on another device
    logits[np.arange(16), leader] = margins
    losses, gradients = map(np.stack, zip(*map(_exact.loss_and_gradient, logits, labels), strict=True))
    case = replace(CASES["cross_entropy"], function=function, options={})
    arguments = {"logits": logits, "labels": labels}, np.ones(16, np.float32)
    got, grads = _run(case, way, arguments)
    assert _exact.relative_error(got, losses) <= 1e-5
    assert _exact.relative_error(grads["logits"], gradients) <= 1e-5


def _label_column(function, wrt, arguments, cotangent):
    """The gradients, and their derivative by the label's own logit."""

    def gradients(x):
        return _first_order(function, wrt, arguments | x, cotangent)[1]

    x = {name: arguments[name] for name in wrt}
    label = jnp.arange(SIZES["c"]) == arguments["labels"][:, None]
    # In the logits' sharding: JAX 0.12 lowers no second derivative of a shard_map along a tangent in another one.
    direction = jnp.where(label, jnp.ones_like(x["logits"]), 0.0)
    return jax.jvp(gradients, (x,), ({"logits": direction},))


@pytest.mark.parametrize("way", [way for way in WAYS if "inside" not in way])
def test_second_derivatives_are_accurate_at_large_margins(way):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 32)).clip(-3, 3).astype(np.float32)
    labels = rng.integers(0, 32, 16).astype(np.int32)
    logits[np.arange(16), labels] = np.repeat([2.0, 17.0, 30.0, 80.0], 4)
    want = np.stack([_exact.hessian(x)[:, y] for x, y in zip(logits, labels, strict=True)])
    arguments = {"logits": logits, "labels": labels}, np.ones(16, np.float32)
    _, got = _run(CASES["cross_entropy"], way, arguments, work=_label_column)
    assert _exact.relative_error(got["logits"], want) <= 1e-5


_COLLECTIVE = re.compile(
    r" = (?P<shapes>\(.*?\)|\S+) "
    r"(?P<name>all-gather|all-reduce|all-to-all|collective-\w+|ragged-all-to-all|reduce-scatter)(-start)?\("
)


def _collectives(function, arguments):
    """How often the compiled program communicates: (operation, number of elements) -> count."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = Counter()
    for match in _COLLECTIVE.finditer(text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", match["shapes"]):
            found[match["name"], int(np.prod([int(n) for n in shape.split(",") if n]))] += 1
    return found


def _communication(case, way, sizes):
    function, mesh, specs = sharded(case, way, "tokens and classes")
    with jax.set_mesh(mesh):
        return _collectives(function, _put(arguments_of(case, sizes), specs, mesh))


@BY_MAIN_WAY
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        *((name, 32) for name in CASES if name not in LINEAR_CASES),
        *((name, 2048) for name in ("log_softmax", "nll", "cross_entropy with all")),
    ],
)
def test_only_scalars_of_each_token_are_communicated(name, way, classes):
    sizes = {"n": 4, "c": classes, "l": 3}
    case = CASES[name]
    # The gradient of class weights is a sum over tokens; here is the one of the logits.
    found = _communication(replace(case, wrt=case.wrt[:1]), way, sizes)
    # On one device are half of the tokens, unless a loss that is reduced inside shard_map, or a mask, is of them all.
    halves = 1 if case.arrays.get("where") == "c" or ("shard_map" in way and not case.out) else 2
    tokens = sizes["n"] // halves * (sizes["l"] if "l" in case.tokens else 1)
    assert tokens < classes // 4
    assert found, "classes on four devices must communicate"
    assert {operation for operation, _ in found} == {"all-reduce"}, found
    assert max(size for _, size in found) <= tokens, found


def _collectives_by_place(function, arguments):
    """Elements of each array that is communicated, as (operation, number), in loops and outside of them."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    places = {"loop": [], "once": []}
    for computation in re.split(r"\n(?=\S)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", computation)
        place = places["loop" if name and name[1] in bodies else "once"]
        for match in _COLLECTIVE.finditer(computation):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match["shapes"]):
                place.append((match["name"], int(np.prod([int(n) for n in shape.split(",") if n]))))
    return places


@pytest.mark.parametrize(
    ("reduction", "way"), [*(("none", way) for way in WAYS), ("sum", "auto"), ("sum", "explicit")]
)
def test_what_linear_cross_entropy_communicates(reduction, way):
    # Each size tells what it is of. A device has 24 tokens, in 4 chunks of 6, and 7 classes.
    sizes = {"n": 48, "c": 28, "d": 16}
    case = _LCE(_LINEAR, "n" if reduction == "none" else "", wrt=_LEARNT, reduction=reduction)
    case = replace(case, options=case.options | {"chunk_size": 12 if way == "auto" else 6})
    function, mesh, specs = sharded(case, way, "tokens and classes")
    with jax.set_mesh(mesh):
        places = _collectives_by_place(function, _put(arguments_of(case, sizes), specs, mesh))
    assert {operation for found in places.values() for operation, _ in found} == {"all-reduce"}, places
    loop, once = (sorted(size for _, size in places[place] if size > 24) for place in ("loop", "once"))
    if (
        way == "auto"
    ):  # each chunk's dHidden; and its dKernel, 8 rows at a time: nothing public moves that out of the loop
        assert loop == [8 * 7, 6 * 16], places
        assert not once, places
    else:
        assert not loop, places
        assert once == [16 * 7, 24 * 16], places


def _indexed(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels]


def _sliced(logits, labels):
    return jax.nn.logsumexp(logits, -1) - sum(jnp.where(labels == k, logits[:, k], 0) for k in range(logits.shape[1]))


def _with_argmax(logits, labels):
    return jnp.where(jnp.argmax(logits, -1) == labels, 0, -jnp.max(jax.nn.log_softmax(logits), -1))


@pytest.mark.parametrize("function", [_indexed, _sliced, _with_argmax])
def test_other_communication_is_found(function):
    case = replace(CASES["cross_entropy"], function=function, options={})
    found = _communication(case, "auto", {"n": 4, "c": 32})
    assert any(operation != "all-reduce" or size > 2 for operation, size in found), found


@pytest.mark.parametrize("way", ["explicit", "shard_map"])
@pytest.mark.parametrize("name", ["linear_cross_entropy mean", "linear_cross_entropy probabilities"])
def test_the_tangent_of_the_value_beside_gradients(name, way):
    """Both of one jvp: a device's own classes are part of it, and all of it is wanted."""

    def work(function, wrt, arguments, cotangent):
        x = {name: arguments[name] for name in wrt}
        both = jax.value_and_grad(lambda x: jnp.vdot(cotangent, function(arguments | x)))
        return jax.jvp(both, (x,), (jax.tree.map(lambda x: jnp.sin(5 * x), x),))

    _check(name, way, layout="classes", work=work)


@pytest.fixture
def served(monkeypatch):
    yield from served_by_a_machine(monkeypatch)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy"])
@pytest.mark.parametrize(
    ("way", "layout", "rows"),
    [
        ("auto", "tokens", None),
        ("auto", "classes", None),
        ("explicit", "tokens", 8),
        ("explicit", "classes", None),
        ("shard_map", "tokens", 8),
        ("shard_map", "tokens and classes", None),
        ("gradient inside shard_map", "tokens", 8),
    ],
)
def test_who_gets_a_kernel(served, name, way, layout, rows):
    """Whoever has whole rows on each device: 16 tokens are on two. Others get the plain form, and are right."""
    _check(name, way, layout)
    names = {"softmax": {"softmax", "softmax_derivative"}, "cross_entropy": {"label_loss_and_gradient", "label_loss"}}
    whole = [shape for _, shape in served if shape == (SIZES["n"], SIZES["c"])]
    parts = [(kernel, shape) for kernel, shape in served if shape[0] != SIZES["n"]]
    assert len(whole) + len(parts) == len(served)  # those of `unsharded`, if it was not there before
    assert {kernel for kernel, _ in parts} == (names[name] if rows else set()), served
    assert {shape for _, shape in parts} == ({(rows, SIZES["c"])} if rows else set())


def _with_split_classes(loss, arrays, monkeypatch, *, check_vma):
    """The value of a loss of a linear layer and its gradients, traced anew, where tokens and classes are split."""
    losses = _linear_losses.linear_losses.__wrapped__
    anew = jax.jit(lambda arrays, weight, options: losses(arrays, weight, options), static_argnums=2)
    monkeypatch.setattr(_linear_cross_entropy, "linear_losses", anew)
    mesh = jax.make_mesh((2, 4), ("data", "class"), axis_types=(AxisType.Auto,) * 2)
    part = P("data"), P(None, "class"), P("data")
    mapped = jax.shard_map(
        lambda *arrays: jax.lax.psum(loss(*arrays, axis_name="class"), "data"),
        mesh=mesh,
        in_specs=part,
        out_specs=P(),
        check_vma=check_vma,
    )
    placed = jax.device_put(arrays, tuple(NamedSharding(mesh, spec) for spec in part))
    return jax.jit(jax.value_and_grad(mapped, (0, 1)))(*placed)


def _assert_near(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("size", [1.0, 100.0])  # large logits are made once more
def test_kernels_of_a_gpu_where_classes_are_split(size, monkeypatch):
    """Interpreted, which `check_vma` cannot follow."""
    served, serves = [], gpu_product.serves

    def spy(layer, x):
        served.append((x.shape, layer.weight.shape))
        return serves(layer, x)

    for name, value in (("INTERPRET", True), ("TOKENS", 16), ("CLASSES", 16), ("FEATURES", 16), ("serves", spy)):
        monkeypatch.setattr(gpu_product, name, value)
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((32, 16), (16, 64)))
    arrays = hidden, kernel * size, jnp.asarray(rng.integers(64, size=32)).at[3].set(-100)
    loss = partial(jaxent.linear_cross_entropy, reduction="sum")
    expected = jax.value_and_grad(loss, (0, 1))(*arrays)

    monkeypatch.setitem(product.KERNELS, "cpu", gpu_product.__name__)
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "cuda")
    found = _with_split_classes(loss, arrays, monkeypatch, check_vma=False)
    assert set(served) == {((16, 16), (16, 16))}
    _assert_near(found, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_few_tokens_walk_along_their_devices_classes(check_vma, monkeypatch):
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((128, 8), (8, 1200)))
    arrays = hidden, kernel, jnp.asarray(rng.integers(1200, size=128)).at[3].set(-100)
    loss = partial(jaxent.linear_cross_entropy, label_smoothing=0.1, reduction="sum")
    expected = jax.value_and_grad(loss, (0, 1))(*arrays)

    walked, walk = [], _linear_sweep.walk_along_classes
    monkeypatch.setattr(_linear_sweep, "walk_along_classes", lambda *given: (walked.append(1), walk(*given))[1])
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "tpu")
    monkeypatch.setattr(_linear_plan, "tpu", lambda: Chip(2**27, 560.0, 6))
    found = _with_split_classes(loss, arrays, monkeypatch, check_vma=check_vma)
    assert walked
    _assert_near(found, expected)


@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_who_gets_a_gpu_s_kernel(way):
    """Devices that go by themselves, also with a part of the classes."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "class"), axis_types=(kind,) * 2)
    shapes = ((32, 16), jnp.bfloat16), ((16, 64), jnp.bfloat16), ((32,), jnp.int32)
    part = P("data"), P(None, "class"), P("data")
    mapped = jax.shard_map(
        lambda *arrays: jax.lax.pmean(jaxent.linear_cross_entropy(*arrays, axis_name="class"), "data"),
        mesh=mesh,
        in_specs=part,
        out_specs=P(),
    )
    f = jax.jit(jax.value_and_grad(mapped if way == "shard_map" else jaxent.linear_cross_entropy, (0, 1)))
    arguments = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, part, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = f.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxent_product_sums" in text) == (way != "auto" and gpu.unavailable() is None)


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_kernel_of_one_device_serves_nobody_else_in_the_program(inside_first):
    """Of equations with equal arguments, one inside shard_map, JAX might lower both as it did the first."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(jaxent.softmax, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    def both(x, part):
        return (inside(x), jaxent.softmax(part)) if inside_first else (jaxent.softmax(part), inside(x))

    x, part = jnp.zeros((64, 5)), jnp.ones((8, 5))  # eight rows on each device
    x, part = jax.device_put((x, part), NamedSharding(mesh, P("data")))
    text = jax.jit(both).lower(x, part).as_text()
    assert text.count("@jaxent_rows") == (0 if native.unavailable() else 1)
    compiled = jax.jit(both).lower(x, part).compile().as_text()
    assert "all-gather" not in compiled
