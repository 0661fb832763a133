"""What the compilers of accelerators make of every function: bytes moved and temporaries, counted without a device.

    python benchmarks/compiled.py tpu|gpu [--chips v5e v6e v5p v7x] [--check | --write] [--table FILE]

Every job is compiled as jaxent has it and as one would write it with jax.nn or optax, ahead of time for a described
chip. For TPUs bytes and temporaries are the compiler's own figures; for a GPU bytes are the operands and results of
all kernels, where a second read that hits the cache counts too. They are the same on every run.

`--check` fails where a figure is beyond its bound (`bound` below; for temporaries on TPUs the peer's and 1 % of the
logits) and compiled.json does not have it so, or where it is a hundredth above the one in compiled.json. `--write`
stores figures there. They belong to versions: .ci/compiled installs those that compiled.json names.

TPUs need `pip install "jax[tpu]"`, a GPU `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt
nvidia-cuda-nvcc-cu12` in jax's version, best in an environment of its own: `.ci/compiled` makes one.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
FILE = HERE / "compiled.json"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v7x": "tpu7x:2x2x1"}
SHAPES = {  # with the class axis
    (65536, 10): 1,
    (8192, 1000): 1,
    (8192, 32000): 1,
    (4096, 50257): 1,
    (8192, 128256): 1,
    (8, 21, 512, 512): 1,
    (4, 16, 2048, 2048): 3,  # of an attention: softmax alone
}
DTYPES = ("float32", "bfloat16")
PULLED_BACK = ("softmax and pullback", "log_softmax and pullback")


class Cell(NamedTuple):
    """A job compiled for a chip, in bytes."""

    chip: str
    job: str
    shape: tuple[int, ...]
    dtype: str
    ours: int
    theirs: int
    our_temporaries: int
    their_temporaries: int

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def prepare(platform: str) -> None:
    """Set what JAX reads when it is imported."""
    if platform == "gpu":
        spec = find_spec("nvidia.cuda_nvcc")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("compiling for a GPU needs nvidia-cuda-nvcc-cu12 and the plugins named in --help")
        tools = next(iter(spec.submodule_search_locations))
        flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={tools}"
        os.environ |= {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": flags}
    else:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def devices_of(chip: str) -> Any:
    """Described devices to compile for."""
    from jax.experimental import topologies

    if chip == "h100":
        description = (HERE / "h100.txtpb").read_text()
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=description, topology="1x1x1"
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return described.devices


def device_of(chip: str) -> Any:
    """A mesh of one described device. Where it is set, Pallas knows for which chip it compiles."""
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(devices_of(chip)[:1]), ("one",))


def jobs(axis: int, shape: tuple[int, ...], softmax_only: bool) -> dict[str, tuple[Any, Any, str]]:
    """Name -> as jaxent has it, as a peer has it, and a letter for each argument: x logits, y labels."""
    import jax
    import optax

    import jaxent

    def indices(x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x, y, axis=axis).mean()

    def smoothed(x: Any, y: Any) -> Any:
        q = optax.smooth_labels(jax.nn.one_hot(y, shape[axis], axis=axis, dtype=x.dtype), 0.1)
        return optax.softmax_cross_entropy(x, q, axis=axis).mean()

    def with_z_loss(x: Any, y: Any) -> Any:
        return indices(x, y) + 1e-4 * (jax.nn.logsumexp(x, axis) ** 2).mean()

    def with_stats(x: Any, y: Any) -> Any:
        return indices(x, y), (jax.nn.logsumexp(x, axis), x.argmax(axis))

    def probabilities(x: Any, q: Any) -> Any:
        return optax.softmax_cross_entropy(x, q, axis=axis).mean()

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda x, y: jaxent.cross_entropy(x, y, axis=axis, **options)

    def pulled_back(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any, cotangent: Any) -> Any:
            out, pullback = jax.vjp(f, x)
            return out, pullback(cotangent)[0]

        return run

    def both_of(name: str) -> list[Callable[..., Any]]:
        return [lambda x, module=module: getattr(module, name)(x, axis) for module in (jaxent, jax.nn)]

    of_logits = {name: both_of(name) for name in ("softmax", "log_softmax")}
    if softmax_only:
        return {"softmax": (*of_logits["softmax"], "x")}
    losses = {
        "cross_entropy": (ours(), indices, "xy"),
        "smoothing": (ours(label_smoothing=0.1), smoothed, "xy"),
        "z_loss": (ours(z_loss=1e-4), with_z_loss, "xy"),
        "probabilities": (ours(), probabilities, "xx"),
    }
    stats = (*(jax.value_and_grad(f, has_aux=True) for f in (ours(return_stats=True), with_stats)), "xy")
    return {
        **({"stats and gradient": stats} if shape[axis] > 50000 else {}),
        **{name: (*both, "x") for name, both in of_logits.items()},
        **{f"{name} and pullback": (*map(pulled_back, both), "xx") for name, both in of_logits.items()},
        **losses,
        **{
            f"{name} and gradient": (*map(jax.value_and_grad, both), letters)
            for name, (*both, letters) in losses.items()
        },
    }


def cells(chip: str) -> Iterator[Cell]:
    """All jobs at all shapes in both dtypes."""
    import jax

    mesh = device_of(chip)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for dtype in DTYPES:
        for shape, axis in SHAPES.items():
            x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            y = jax.ShapeDtypeStruct(shape[:axis] + shape[axis + 1 :], "int32", sharding=sharding)
            for name, (*both, letters) in jobs(axis, shape, shape[-1] == 2048).items():
                arguments = [{"x": x, "y": y}[letter] for letter in letters]
                with jax.set_mesh(mesh):
                    (ours, of_ours), (theirs, of_theirs) = (counted(chip, f, arguments) for f in both)
                yield Cell(chip, name, shape, dtype, ours, theirs, of_ours, of_theirs)


def counted(chip: str, f: Callable[..., Any], arguments: list[Any]) -> tuple[int, int]:
    """Bytes moved and bytes of temporaries."""
    import jax

    compiled = jax.jit(f).lower(*arguments).compile()
    moved = kernel_bytes(compiled.as_text()) if chip == "h100" else compiled.cost_analysis()["bytes accessed"]
    return int(moved), compiled.memory_analysis().temp_size_in_bytes


SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
NO_KERNELS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")


def kernel_bytes(text: str) -> int:
    """Operands and results of every kernel of a compiled program."""
    types, total = {}, 0
    for line in text[text.index("\nENTRY") :].splitlines():
        if match := INSTRUCTION.match(line):
            name, kind, operation, rest = match.groups()
            types[name] = kind
            if operation not in NO_KERNELS:
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                total += sum(map(array_bytes, [kind, *(types.get(operand, "") for operand in operands)]))
    return total


def array_bytes(kind: str) -> int:
    """Of all arrays in a type."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", kind)
    return sum(SIZES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def bound(cell: Cell) -> float:
    """How many times its peer's bytes a job may move."""
    if cell.chip == "h100":
        return 1.15 if cell.job in PULLED_BACK else 1.05
    if cell.chip in ("v6e", "v7x") and cell.job == "cross_entropy and gradient" and cell.shape[-1] >= 32000:
        return 0.7
    return 1.12 if cell.job in PULLED_BACK else 1.02


def beyond(cell: Cell) -> bool:
    """Whether a cell is beyond its bounds."""
    logits = math.prod(cell.shape) * (2 if cell.dtype == "bfloat16" else 4)
    too_large = cell.chip != "h100" and cell.our_temporaries > cell.their_temporaries + 0.01 * logits
    return cell.ratio > bound(cell) or too_large


def fault(cell: Cell, stored: Cell | None) -> str | None:
    """What is wrong with a cell, given what it was."""
    name = f"{cell.chip}, {cell.job}, {cell.shape}, {cell.dtype}"
    if stored is None:
        return (
            f"{name}: {cell.ratio:.3f} times the bytes, allowed {bound(cell)}, and unknown" if beyond(cell) else None
        )
    worse = cell.ours > 1.01 * stored.ours or cell.our_temporaries > 1.01 * stored.our_temporaries + 1e6
    if not worse and (not beyond(cell) or beyond(stored)):
        return None
    now, was = (f"{c.ours / 1e6:.1f} MB and {c.our_temporaries / 1e6:.1f} of temporaries" for c in (cell, stored))
    return f"{name}: {now}, was {was}"


def read() -> dict[tuple[Any, ...], Cell]:
    """The stored cells, by what they are of."""
    if not FILE.exists():
        return {}
    rows = json.loads(FILE.read_text())["cells"]
    cells = (Cell(chip, job, tuple(shape), *rest) for chip, job, shape, *rest in rows)
    return {cell[:4]: cell for cell in cells}


def write(found: list[Cell], versions: dict[str, str]) -> None:
    """Replace what is stored of the chips in `found`."""
    chips = {cell.chip for cell in found}
    every = [cell for cell in read().values() if cell.chip not in chips] + found
    rows = ",\n".join(json.dumps(cell) for cell in every)
    FILE.write_text(f'{{"versions": {json.dumps(versions)},\n"cells": [\n{rows}\n]}}\n')


def table(found: list[Cell]) -> str:
    """Ratios: a row a job and dtype, a column a shape."""
    shapes = [shape for shape in SHAPES if any(cell.shape == shape for cell in found)]
    by_row: dict[tuple[str, str, str], dict[tuple[int, ...], float]] = {}
    for cell in found:
        by_row.setdefault((cell.chip, cell.job, cell.dtype), {})[cell.shape] = cell.ratio
    lines = ["| chip | job | dtype | " + " | ".join("x".join(map(str, shape)) for shape in shapes) + " |"]
    lines.append("|---|---|---|" + "---:|" * len(shapes))
    for row, ratios in by_row.items():
        numbers = [f"{ratios[shape]:.2f}" if shape in ratios else "" for shape in shapes]
        lines.append("| " + " | ".join([*row, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=["tpu", "gpu"])
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=list(TOPOLOGIES))
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where a figure is worse than it may be")
    action.add_argument("--write", action="store_true", help="store the figures in compiled.json")
    parser.add_argument("--table", type=Path, help="write the ratios as Markdown")
    arguments = parser.parse_args()
    prepare(arguments.platform)
    found, stored = [], read()
    for chip in ["h100"] if arguments.platform == "gpu" else arguments.chips:
        for cell in cells(chip):
            found.append(cell)
            mb = [x / 1e6 for x in (cell.ours, cell.theirs, cell.our_temporaries, cell.their_temporaries)]
            print(f"{chip:5}{cell.job:28}{cell.shape!s:22}{cell.dtype:9}", *(f"{x:10.1f}" for x in mb), end=" MB")
            print(f"{cell.ratio:8.3f}{' beyond its bounds' * beyond(cell)}", flush=True)
    if arguments.write:
        write(found, {name: version(name) for name in ("jax", "libtpu")})
    if arguments.table:
        arguments.table.write_text(table(found))
    if arguments.check:
        faults = [line for cell in found if (line := fault(cell, stored.get(cell[:4])))]
        print("\n".join(faults) or "no figure is worse than it may be")
        sys.exit(bool(faults))


if __name__ == "__main__":
    main()
