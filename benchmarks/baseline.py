"""Figures of compiled programs that do not depend on how busy a machine is, against those in baseline.json.

    python benchmarks/baseline.py          # compare, a line for each figure that moved
    python benchmarks/baseline.py write    # accept the figures as they are now

For each function, shape and kind of work: bytes of temporaries, floating-point operations and bytes accessed as XLA
counts them (the body of a loop once), fusions (passes over the data, roughly) and collective operations (of what is
sharded, on eight devices). Nothing is run, only compiled. Every version of XLA plans differently, so the figures
belong to one version of JAX on one kind of device.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import ShapeDtypeStruct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxent
from jaxent._kernels import native

FILE = Path(__file__).with_suffix(".json")
COUNTS = ("fusions", "collectives")  # compared exactly
TOLERANCE = 0.01  # of the others
COLLECTIVE = r" (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("

Figures = dict[str, dict[str, float]]


class Job(NamedTuple):
    """A function, its arguments and its result: a dtype and an axis a letter, n tokens, c classes, d features."""

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    result: str = "float32 "
    moving: int = 1  # so many arguments, from the first on, get gradients


def jobs_of_logits(dtype: str, axes: str) -> dict[str, Job]:
    """All functions of logits."""
    logits, indices = f"{dtype} {axes}", f"int32 {axes[:-1]}"
    loss = jaxent.cross_entropy
    return {
        "softmax": Job(jaxent.softmax, (logits,), logits),
        "log_softmax": Job(jaxent.log_softmax, (logits,), logits),
        "nll of log_softmax": Job(lambda x, y: jaxent.nll(jaxent.log_softmax(x), y), (logits, indices)),
        "cross_entropy": Job(loss, (logits, indices)),
        "single losses": Job(partial(loss, reduction="none"), (logits, indices), f"float32 {axes[:-1]}"),
        "smoothing": Job(partial(loss, label_smoothing=0.1), (logits, indices)),
        "z_loss": Job(partial(loss, z_loss=1e-4), (logits, indices)),
        "weights": Job(lambda x, y, w: loss(x, y, weight=w), (logits, indices, "float32 c")),
        "mask": Job(lambda x, y, m: loss(x, y, where=m), (logits, indices, f"bool {axes}")),
        "probabilities": Job(loss, (logits, logits)),
    }


def jobs_of_hidden() -> dict[str, Job]:
    """The fused loss, in both ways that it differentiates."""
    loss, arguments = jaxent.linear_cross_entropy, ("float32 nd", "float32 dc", "int32 n")
    return {
        "linear_cross_entropy": Job(loss, arguments, moving=2),
        "linear_cross_entropy, single losses": Job(partial(loss, reduction="none"), arguments, "float32 n", 2),
    }


def measure() -> Figures:
    """All figures; JAX fixes the number of devices when it starts, so each has a process of its own."""
    processes = []
    for devices in (1, 8):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        command = [sys.executable, __file__, "here"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a process that compiles the programs has failed")
    return {name: figures for output in outputs for name, figures in json.loads(output).items()}


def measure_here() -> Figures:
    """The figures for as many devices as there are."""
    return dict(on_one_device() if jax.device_count() == 1 else on_eight_devices())


def on_one_device() -> Iterator[tuple[str, dict[str, float]]]:
    """Everything by itself."""
    for dtype, sizes in [
        ("float32", {"n": 65536, "c": 10}),
        ("float32", {"n": 1024, "c": 1009}),
        ("float32", {"n": 512, "c": 32000}),
        ("float32", {"l": 16, "n": 128, "c": 32768}),
        ("bfloat16", {"n": 1024, "c": 1000}),
        ("bfloat16", {"n": 512, "c": 32000}),
    ]:
        for name, job in jobs_of_logits(dtype, "".join(sizes)).items():
            for work, figures in figures_of(job, sizes):
                yield f"{name}, {work}, {dtype}, {tuple(sizes.values())}", figures
    for name, job in jobs_of_hidden().items():
        for work, figures in figures_of(job, {"n": 2048, "d": 512, "c": 32768}):
            yield f"{name}, {work}, float32, (2048, 512, 32768)", figures


def on_eight_devices() -> Iterator[tuple[str, dict[str, float]]]:
    """Tokens split over two devices, and classes over four."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(kind, kind))
        for name, job in (jobs_of_logits("float32", "nc") | jobs_of_hidden()).items():
            for work, figures in figures_of(job, {"n": 256, "d": 64, "c": 8192}, mesh):
                yield f"{name}, {work}, sharded, {kind.name}", figures


def figures_of(job: Job, sizes: dict[str, int], mesh: Mesh | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """What XLA plans for a job, forward and with gradients."""

    def struct(description: str) -> ShapeDtypeStruct:
        dtype, _, axes = description.partition(" ")
        spec = PartitionSpec(*({"n": "tokens", "c": "classes"}.get(axis) for axis in axes))
        shape = tuple(sizes[axis] for axis in axes)
        return ShapeDtypeStruct(shape, dtype, sharding=None if mesh is None else NamedSharding(mesh, spec))

    def pulled_back(cotangent: Any, *args: Any) -> Any:
        fixed = args[job.moving :]
        value, pullback = jax.vjp(lambda *moving: job.function(*moving, *fixed), *args[: job.moving])
        return value, pullback(cotangent)

    arguments, result = [struct(argument) for argument in job.arguments], struct(job.result)
    yield "forward", plan(job.function, *arguments)
    if result.shape:
        yield "with gradient", plan(pulled_back, result, *arguments)
    else:
        yield "with gradient", plan(jax.value_and_grad(job.function, tuple(range(job.moving))), *arguments)


def plan(f: Callable[..., Any], *args: ShapeDtypeStruct) -> dict[str, float]:
    """What XLA plans for `f`."""
    compiled = jax.jit(f).lower(*args).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "flops": cost["flops"],
        "bytes accessed": cost["bytes accessed"],
        "fusions": len(re.findall(r" fusion\(", text)),
        "collectives": len(re.findall(COLLECTIVE, text)),
    }


def read(version: str) -> Figures | None:
    """The stored figures of a version, if there are any."""
    return json.loads(FILE.read_text()).get(version) if FILE.exists() else None


def version() -> str:
    """What the figures belong to."""
    return f"jax {jax.__version__} on cpu" + ("" if native.unavailable() else ", native")


def moved(stored: Figures, measured: Figures) -> list[str]:
    """A line for each figure that is not what it was, better or worse."""
    lines = [f"{name}: only in one of both" for name in sorted(stored.keys() ^ measured.keys())]
    for name in stored.keys() & measured.keys():
        for figure, was in stored[name].items():
            now = measured[name][figure]
            if abs(now - was) > (0 if figure in COUNTS else TOLERANCE * abs(was)):  # what XLA does not know is -1
                lines.append(f"{name}: {figure} {was:,.0f} -> {now:,.0f}")
    return sorted(lines)


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["compare", "write", "here"], default="compare")
    action = parser.parse_args().action
    if action == "here":  # the processes of `measure`
        print(json.dumps(measure_here()))
        return
    measured, stored = measure(), read(version())
    if action == "write":
        every = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(every | {version(): measured}, indent=1) + "\n")
    if stored is None:
        raise SystemExit(f"{FILE.name} had no figures of {version()}")
    lines = moved(stored, measured)
    print("\n".join(lines) or "nothing moved")
    raise SystemExit(action == "compare" and bool(lines))


if __name__ == "__main__":
    main()
