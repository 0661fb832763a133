"""What the compilers of accelerators make of linear_cross_entropy, against plain optax: counted without a device.

    python benchmarks/compiled_linear.py [--chips v5e v6e v5p v7x h100] [--dtypes bfloat16] [--check | --write]
    python benchmarks/compiled_linear.py --shape 4096 2048 50304 [--chips v5e]
    python benchmarks/compiled_linear.py --chunk-sizes 512 1024 2048 4096 [--shape 8192 1024 128256] [--chips v5e]
    python benchmarks/compiled_linear.py --distillation [--chips v5e] [--dtypes bfloat16 float32] [--check | --write]
    python benchmarks/compiled_linear.py --split batch | classes | both [--shape 65536 4096 128256]

The value and both gradients of the mean loss, for one device. The time is an estimate: of each kernel the larger of
its products over the chip's FLOPs and its bytes over the bandwidth, one after the other (`_cost.py`). Temporaries are
the peak of the device's memory without arguments and results, in per cent of the float32 logits. "at once" is jaxent
with `ignore_index=None`, "cross_entropy" jaxent's of the product of hidden and kernel, and "tokamax", where that is
installed, its `chunked_xla`, whose values are wrong where its blocks do not divide the classes. Bytes, FLOPs and
temporaries are the same on every run; the seconds of compiling, which are given as a multiple of optax's, are not.

`--distillation` counts linear_distillation_loss at the second shape, teacher and student alike, and beside it
distillation_loss of full logits. Its temporaries are in per cent of one model's float32 logits.

`--chunk-sizes` counts jaxent with chunks of so many tokens, and first with those that it chooses itself.

`--split` compiles for the eight chips of a TPU v5e, batch or classes split over all of them or both over 4 x 2, in
every way of sharding; its figures are of each chip, and with them come the large arrays that are communicated.

`--check` fails where time or temporaries are a hundredth above what compiled_linear.json has; `--write` stores them.
For the environment see compiled.py.
"""

import argparse
import contextlib
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import compiled
from _cost import CHIPS, array_bytes, kernels_of, seconds, total_bytes

FILE = Path(__file__).with_suffix(".json")
SHAPES = [
    (2048, 512, 32768),
    (8192, 1024, 128256),
    (8192, 4096, 128256),
    (16384, 2048, 256000),
    (4096, 2048, 50257),
]


class Counted(NamedTuple):
    """Of a compiled program."""

    milliseconds: float
    gigabytes: float
    temporaries: float  # per cent of the float32 logits
    compiling: float  # seconds


def losses() -> dict[str, Callable[..., Any]]:
    """The contestants."""
    import optax

    import jaxent

    def plain(hidden: Any, kernel: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()

    def dense(hidden: Any, kernel: Any, labels: Any) -> Any:
        return jaxent.cross_entropy(hidden @ kernel, labels)

    at_once = partial(jaxent.linear_cross_entropy, ignore_index=None)
    linear = {"jaxent": jaxent.linear_cross_entropy, "jaxent at once": at_once}
    contestants = {"optax": plain, **linear, "cross_entropy": dense}
    if find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        def chunked(hidden: Any, kernel: Any, labels: Any) -> Any:
            loss = tokamax.linear_softmax_cross_entropy_loss
            return loss(hidden, labels, kernel, reduction="mean", implementation="chunked_xla")

        contestants["tokamax"] = chunked
    return contestants


def distillations() -> dict[str, Callable[..., Any]]:
    """Those of `--distillation`."""
    import jaxent

    def dense(beta: float, hidden: Any, kernel: Any, teacher_hidden: Any, teacher_kernel: Any) -> Any:
        return jaxent.distillation_loss(hidden @ kernel, teacher_hidden @ teacher_kernel, beta=beta)

    by_name: dict[str, Callable[..., Any]] = {}
    for beta in (0.0, 0.5, 1.0):
        by_name[f"linear_distillation_loss, beta={beta}"] = partial(jaxent.linear_distillation_loss, beta=beta)
        by_name[f"distillation_loss, beta={beta}"] = partial(dense, beta)
    return by_name


def compiled_for(chip: str, lowered: Any) -> tuple[Any, int]:
    """The program, and the bytes of a device's memory that it needs at a time, but for arguments and results.

    A TPU's fast memory is not counted; which is what, only the compiler's own report says.
    """
    if chip == "h100":
        program = lowered.compile()
        memory = program.memory_analysis()
        needed = memory.peak_memory_in_bytes
    else:
        with tempfile.TemporaryDirectory() as folder:
            program = lowered.compile(compiler_options={"xla_dump_to": folder})
            (report,) = Path(folder).glob("*.jit_*memory-usage-report.txt")
            needed = int(re.findall(r"color=0\)\nTotal bytes: (\d+)", report.read_text())[0])
        memory = program.memory_analysis()
    return program, needed - memory.argument_size_in_bytes - memory.output_size_in_bytes


@contextlib.contextmanager
def chunk_sizes() -> Iterator[dict[str, int]]:
    """Tokens in a chunk, by machine, of what is traced meanwhile; 1 where nothing is."""
    from jaxent import _linear_sweep

    sizes, plan_for = {"": 1}, _linear_sweep.plan_for

    def seen(machine: Any, *arguments: Any, **options: Any) -> Any:
        plan = plan_for(machine, *arguments, **options)
        sizes[machine] = plan.size
        return plan

    with mock.patch.object(_linear_sweep, "plan_for", seen):
        yield sizes


def count(chip: str, name: str, shape: tuple[int, int, int], dtype: str, chunk_size: int | None = None) -> Counted:
    """Compile one of them."""
    import jax
    import numpy as np

    tokens, features, classes = shape
    mesh = jax.sharding.Mesh(np.array(compiled.devices_of(chip)[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    layer = [((tokens, features), dtype), ((features, classes), dtype)]
    others = [((tokens,), "int32")] if name in losses() else layer
    arguments = [jax.ShapeDtypeStruct(size, kind, sharding=sharding) for size, kind in layer + others]
    jax.clear_caches()  # so that all is traced here
    start = time.perf_counter()
    loss = {**losses(), **distillations()}[name]
    loss = loss if chunk_size is None else partial(loss, chunk_size=chunk_size)
    with (
        contextlib.nullcontext() if chip == "h100" else jax.set_mesh(mesh),  # which tells of the chip
        chunk_sizes() as sizes,
    ):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments)
    program, temporaries = compiled_for(chip, lowered)
    compiling = time.perf_counter() - start
    machines = ("cuda", "rocm", "") if chip == "h100" else ("tpu", "")  # a function for both GPUs is rocm's
    steps = -(-tokens // next(sizes[machine] for machine in machines if machine in sizes))
    kernels = kernels_of(program.as_text(), steps - (steps > 1 and chip == "h100"))  # the first of its steps is apart
    share = 100 * temporaries / (4 * tokens * classes)
    return Counted(1e3 * seconds(kernels, CHIPS[chip]), 1e-9 * total_bytes(kernels), share, compiling)


def split_rows(how: str, shape: tuple[int, int, int]) -> Iterator[str]:
    """A row of the table for each way of sharding on eight chips."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import jaxent

    tokens, features, classes = shape
    chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    sizes = {"batch": (8, 1), "classes": (1, 8), "both": (4, 2)}[how]
    of_tokens = PartitionSpec("data") if sizes[0] > 1 else PartitionSpec()
    of_classes = PartitionSpec(None, "model") if sizes[1] > 1 else PartitionSpec()
    ways = [("jaxent", way) for way in ("automatic", "explicit", "shard_map")]
    for name, way in (("optax", "automatic"), *ways, ("jaxent in one chunk", "automatic")):
        kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
        mesh = Mesh(chips.reshape(sizes), ("data", "model"), axis_types=(kind, kind))

        def part(hidden: Any, kernel: Any, labels: Any) -> Any:
            axis_name = "model" if sizes[1] > 1 else None
            return jax.lax.pmean(jaxent.linear_cross_entropy(hidden, kernel, labels, axis_name=axis_name), "data")

        specs = (of_tokens, of_classes, of_tokens)
        mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        whole = partial(jaxent.linear_cross_entropy, chunk_size=tokens)
        loss = mapped if way == "shard_map" else {**losses(), "jaxent in one chunk": whole}[name]
        arguments = [
            jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))
            for size, dtype, spec in zip(
                ((tokens, features), (features, classes), (tokens,)),
                ("bfloat16", "bfloat16", "int32"),
                specs,
                strict=True,
            )
        ]
        jax.clear_caches()
        with jax.set_mesh(mesh), chunk_sizes() as chunks:
            lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments)
        program, temporaries = compiled_for("v5e", lowered)
        own = tokens // (1 if way == "automatic" else sizes[0])
        kernels = kernels_of(program.as_text(), -(-own // chunks.get("tpu", own)))
        sent = [k for k in kernels if re.match("all-|reduce-scatter|collective", k.instruction.operation)]
        large = [
            f"{k.times} x {k.instruction.kind.split('{')[0]}"
            for k in sent
            if array_bytes(k.instruction.kind, fast=True) > 2**20
        ]
        cells = [
            how,
            f"{name}, {way}",
            f"{1e3 * seconds(kernels, CHIPS['v5e']):.1f}",
            f"{1e-9 * total_bytes(kernels):.1f}",
        ]
        yield f"| {' | '.join([*cells, f'{1e-6 * temporaries:,.0f}', ', '.join(large)])} |"


def rows(chip: str, shape: tuple[int, int, int], dtype: str, found: dict[str, Counted]) -> Iterator[str]:
    """Of the Markdown table."""
    optax = found.get("optax")
    for name in losses():
        cells, counted = [chip, dtype, " x ".join(map(str, shape)), name], found.get(name)
        if counted is None:
            cells += ["does not fit the chip", *[""] * 4]
        else:
            of_optax = [f"{ours / theirs:.2f}" for ours, theirs in zip(counted, optax or (), strict=False)]
            cells += [f"{counted.milliseconds:.2f}", of_optax[0] if of_optax else "", f"{counted.gigabytes:.1f}"]
            cells += [f"{counted.temporaries:.0f} %", of_optax[-1] if of_optax else ""]
        yield f"| {' | '.join([*cells, f'{100 * shape[1] / shape[0] + 20:.0f} %'])} |"


CHUNKS = """\
| chip | dtype | tokens x features x classes | in a chunk | estimated ms | of optax's | GB moved | temporaries |
|---|---|---|---:|---:|---:|---:|---:|"""


def chunk_rows(chip: str, shape: tuple[int, int, int], dtype: str, sizes: list[int]) -> Iterator[str]:
    """A row for each number of tokens in a chunk, and first for the default."""
    optax = count(chip, "optax", shape, dtype)
    for size in (None, *sizes):
        ms, gigabytes, share, _ = count(chip, "jaxent", shape, dtype, size)
        cells = [chip, dtype, " x ".join(map(str, shape)), "default" if size is None else f"{size:,}", f"{ms:.2f}"]
        yield f"| {' | '.join([*cells, f'{ms / optax.milliseconds:.2f}', f'{gigabytes:.1f}', f'{share:.0f} %'])} |"


DISTILLATION = """\
| chip | dtype | loss | estimated ms | GB moved | temporaries |
|---|---|---|---:|---:|---:|"""
HEADER = """\
| chip | dtype | tokens x features x classes | loss | estimated ms | of optax's | GB moved | temporaries \
| compiling, of optax's | accumulator + 20 % |
|---|---|---|---|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    """Compile, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=["v5e"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="so many of the shapes")
    parser.add_argument("--distillation", action="store_true", help="linear_distillation_loss instead")
    parser.add_argument("--split", choices=["batch", "classes", "both"], help="on eight chips of a TPU v5e")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", help="tokens in a chunk, at the second shape")
    parser.add_argument("--shape", type=int, nargs=3, help="this one, as tokens, features and classes")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where a figure is worse than it was; jaxent alone")
    action.add_argument("--write", action="store_true", help="store the figures in compiled_linear.json")
    arguments = parser.parse_args()
    gpu = arguments.chips == ["h100"]
    if not gpu and "h100" in arguments.chips:
        parser.error("a process compiles for TPUs or for a GPU; give h100 alone")
    compiled.prepare("gpu" if gpu else "tpu")
    if arguments.split:
        print("| split | how | estimated ms | GB moved | temporaries, MB | large arrays that are communicated |")
        print("|---|---|---:|---:|---:|---|")
        for line in split_rows(arguments.split, tuple(arguments.shape or (65536, 4096, 128256))):
            print(line, flush=True)
        return
    if arguments.chunk_sizes:
        print(CHUNKS)
        shape = tuple(arguments.shape or SHAPES[1])
        for chip, dtype in itertools.product(arguments.chips, arguments.dtypes):
            for line in chunk_rows(chip, shape, dtype, arguments.chunk_sizes):
                print(line, flush=True)
        return
    import jax

    shapes = SHAPES[1:2] if arguments.distillation else SHAPES[: arguments.shapes]
    shapes = [tuple(arguments.shape)] if arguments.shape else shapes
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    faults = []
    names = list(distillations() if arguments.distillation else losses())
    peers = {"optax", "tokamax", *(name for name in names if name.startswith("distillation_loss"))}
    if not arguments.check:
        print(DISTILLATION if arguments.distillation else HEADER)
    for chip in arguments.chips:
        for dtype in arguments.dtypes:
            for shape in shapes:
                found = {}
                for name in names:
                    if arguments.check and name in peers:
                        continue
                    try:
                        found[name] = count(chip, name, shape, dtype)
                    except jax.errors.JaxRuntimeError as error:
                        if "RESOURCE_EXHAUSTED" not in str(error):
                            raise
                for name, counted in found.items():
                    key, now = f"{chip}, {dtype}, {shape}, {name}", [round(x, 3) for x in counted[:3]]
                    was = stored.get(key)
                    if was is None or any(n > 1.01 * w for n, w in zip(now, was, strict=True)):
                        faults.append(f"{key}: milliseconds, gigabytes and % of temporaries {was} -> {now}")
                    stored[key] = now
                if arguments.distillation and not arguments.check:
                    for name, (milliseconds, gigabytes, share, _) in found.items():
                        cells = chip, dtype, name, f"{milliseconds:.1f}", f"{gigabytes:.1f}", f"{share:.1f} %"
                        print(f"| {' | '.join(cells)} |", flush=True)
                elif not arguments.check:
                    for line in rows(chip, shape, dtype, found):
                        print(line, flush=True)
    if arguments.write:
        FILE.write_text(json.dumps(stored, indent=1) + "\n")
    if arguments.check:
        print("\n".join(faults) or "linear losses: no figure is worse than it was")
        sys.exit(bool(faults))


if __name__ == "__main__":
    main()
