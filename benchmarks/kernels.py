"""What the compilers of accelerators make of each Pallas kernel, without a device.

    python benchmarks/kernels.py tpu|gpu [--check] [--chips v5e v6e] [--shapes 8192x1000 ...] [--axis 1]
        [--dtypes bfloat16] [--functions softmax ...]

TPU: how long a kernel computes, beside how long its bytes take. Blocks are copied while others are worked on, so it
takes the longer of both. The compiler's last schedule has a line for each bundle of instructions, which takes a
cycle; loops are counted as often as they run, what a predicate jumps over as if it ran, and waiting for copies not at
all. GPU: registers of a thread, what of them is spilt, shared memory, and how long the bytes take, each read and
written once.

Kernels for TPUs are chosen by how XLA lays out an argument; for some shapes that is asked of the compiler.

`--check` fails where a TPU's kernel computes for more than 1.15 times as long as its bytes take, or a GPU's spills
anything, but for those that `KNOWN` names. Both need what `compiled.py` needs for that platform.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _cost
import compiled

CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "v7x": 2.2e9}  # cycles a second, as the compiler reckons
STAGES = 2  # that the loop over blocks runs longer than there are blocks, since copies come before and after
SLOTS = 4  # bundles after a branch that run before it is taken
BOUND = 1.15
# A loss without gradient reads two bytes a logit, for which v6e has 2.2 cycles a register, and takes nine operations,
# of which at most four go at once.
KNOWN = {("v6e", "label_loss"): 1.5}
SHAPES = ["8192x1000", "8192x32000", "4096x50257", "8192x128256"]
LAYOUTS = [  # of arguments of all kinds: padded, in batches, with axes of 1 to 8, in their order and not
    *[(65536, 10), (8192, 1000), (4096, 50257), (8192, 30522), (8192, 32000), (200, 50257), (100, 1000), (2, 384)],
    *[(8, 1024, 1000), (8, 1024, 50257), (4, 2048, 50257), (3, 2048, 50257), (32, 197, 1000), (200, 2, 500)],
    *[(8, 21, 512, 512), (16, 512, 512, 21), (16, 224, 224, 21), (8, 513, 513, 21), (8, 3, 512, 512), (8, 224, 2, 2)],
    *[(256, 513, 2), (384, 3, 513, 100), (384, 500, 21, 256), (1000, 16, 1000, 64), (100, 256, 100, 100)],
]


class Case(NamedTuple):
    """A kernel to compile."""

    chip: str
    name: str
    shape: tuple[int, ...]
    axis: int
    dtype: str

    @property
    def options(self) -> dict[str, Any]:
        """Of labels, cross-entropy without smoothing and z-loss."""
        return {"terms": (True, False, False)} if self.name.startswith("label") else {}

    @property
    def function(self) -> Any:
        """What a kernel knows of it."""
        from jaxent._kernels.rows import function_of

        return function_of(self.name, stats=False, **self.options)

    @property
    def seconds_of_bytes(self) -> float:
        """Reading and writing each array of the logits' shape once."""
        function = self.function
        arrays = sum(kind in "xto" for kind in function.arguments + function.results)
        return arrays * math.prod(self.shape) * (2 if self.dtype == "bfloat16" else 4) / _cost.CHIPS[self.chip].bytes


def cycles(schedule: str) -> int:
    """Of a whole kernel, by the text of its last schedule."""
    bundles: list[str] = []
    for line in schedule.splitlines():
        if re.match(r"\s*0(x[0-9a-f]+)?\s.*\{", line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    weights = [1] * len(bundles)
    outermost = True
    for start, bundle in enumerate(bundles):
        if not re.match(r"\s*\w+\s+LB:", bundle):
            continue
        regions = re.findall(r"region (\d+)", bundle)  # one of which begins here, where the loop's last branch leads
        end, predicate = next(
            (end, branch[1])
            for end in range(start, len(bundles))
            for branch in re.finditer(r"sbr\.rel \(!%(p\d+_p\d+)\) target = \$region(\d+)", bundles[end])
            if branch[2] in regions
        )
        test = re.search(rf"%{predicate} = scmp\.ge\S* (?:\(\S+ )?\S+ (\d+) /\* loop exit test", schedule)
        if test is None:
            raise ValueError(f"the loop at bundle {start} does not say how often it runs")
        times = int(test[1])
        if outermost and times > STAGES:  # blocks
            times -= STAGES
        outermost = False
        for i in range(start, min(end + 1 + SLOTS, len(bundles))):
            weights[i] *= times
    return sum(weights)


def compile_kernel(case: Case, options: dict[str, Any]) -> Any:
    """The compiled program of the kernel alone."""
    import jax
    import jax.numpy as jnp

    from jaxent import _kernels
    from jaxent._class_axis import ClassAxis

    mesh = compiled.device_of(case.chip)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function, axis = case.function, ClassAxis(case.axis)

    def argument(kind: str) -> Any:
        of_rows = {"y": "int32", "r": "float32"}.get(kind)
        shape = axis.rows(case.shape) if of_rows else case.shape
        return jax.ShapeDtypeStruct(shape, of_rows or case.dtype, sharding=sharding)

    def run(*arrays: Any) -> Any:
        result = {"dtype": jnp.dtype(case.dtype)} if function.entry else {}
        return getattr(_kernels, case.name)(*arrays, axis=axis, implementation="pallas", **result, **case.options)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*map(argument, function.arguments)).compile(compiler_options=options)


def laid_out(chip: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The axes of sublanes and lanes of an argument of that shape."""
    import jax
    import jax.numpy as jnp

    sharding = jax.sharding.NamedSharding(compiled.device_of(chip), jax.sharding.PartitionSpec())
    argument = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
    program = jax.jit(jnp.exp).lower(argument).compile().as_text()
    last, second = re.findall(r"entry_computation_layout=\{\(f32\[[\d,]*\]\{(\d+),(\d+)", program)[0]
    return int(second), int(last)


def on_tpu(case: Case, folder: Path) -> tuple[str, bool]:
    """A row of the table, and whether it is as it should be."""
    program = compile_kernel(case, {})
    schedule = max(folder.glob(f"*jaxent_{case.name}*-final_bundles.txt"))
    computing = cycles(schedule.read_text()) / CLOCKS[case.chip]
    ratio = computing / case.seconds_of_bytes
    temporaries = program.memory_analysis().temp_size_in_bytes / 1e6
    row = f"{computing * 1e6:.0f} | {case.seconds_of_bytes * 1e6:.0f} | {ratio:.2f} | {temporaries:.1f}"
    return row, ratio <= KNOWN.get((case.chip, case.name), BOUND)


def on_gpu(case: Case, folder: Path) -> tuple[str, bool]:
    """A row of the table, and whether it is as it should be."""
    program = compile_kernel(case, {"xla_dump_to": str(folder)})
    entry = re.compile(rf"\.entry jaxent_{case.name}\b")
    file = next(file for file in folder.glob("*.ptx") if entry.search(file.read_text()))
    ptxas = next(Path(re.findall(r"cuda_data_dir=(\S+)", os.environ["XLA_FLAGS"])[0]).glob("**/ptxas"))
    command = [str(ptxas), "-v", "--gpu-name", "sm_90a", str(file), "-o", os.devnull]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, stored, loaded, shared = (
        int(found[1]) if (found := re.search(pattern, said)) else 0
        for pattern in (
            r"Used (\d+) reg",
            r"(\d+) bytes spill stores",
            r"(\d+) bytes spill loads",
            r"(\d+) bytes smem",
        )
    )
    temporaries = program.memory_analysis().temp_size_in_bytes / 1e6
    row = f"{registers} | {stored + loaded} | {shared} | {case.seconds_of_bytes * 1e6:.0f} | {temporaries:.1f}"
    return row, not stored + loaded


def main() -> None:
    """A row a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=["tpu", "gpu"])
    parser.add_argument("--chips", nargs="+", choices=list(CLOCKS), default=["v5e", "v6e"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--functions", nargs="+")
    parser.add_argument("--check", action="store_true", help="fail where a kernel is not as it should be")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    measure: Callable[[Case, Path], tuple[str, bool]]
    if arguments.platform == "tpu":
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        chips, measure = arguments.chips, on_tpu
        columns = ["schedule, us", "bytes, us", "ratio", "temporaries, MB"]
    else:
        chips, measure = ["h100"], on_gpu
        columns = ["registers", "spilt bytes", "shared bytes", "bytes, us", "temporaries, MB"]
    compiled.prepare(arguments.platform)
    from jaxent._kernels.rows import FUNCTIONS

    names, faults = arguments.functions or FUNCTIONS, 0
    if arguments.platform == "tpu":
        from jaxent._kernels.tpu import _sides

        unlike = [(chip, shape) for chip in chips for shape in LAYOUTS if laid_out(chip, shape) != _sides(shape)]
        print(f"{len(chips) * len(LAYOUTS) - len(unlike)} layouts are as expected, and not {unlike}")
        faults += len(unlike)
    print("| chip | shape | dtype | kernel |", " | ".join(columns), "|")
    print("|---" * 4 + "|---:" * len(columns) + "|")
    try:
        for chip in chips:
            for text in arguments.shapes:
                for dtype in arguments.dtypes:
                    for name in names:
                        case = Case(chip, name, tuple(map(int, text.split("x"))), arguments.axis, dtype)
                        row, right = measure(case, folder)
                        faults += not right
                        print(f"| {chip} | {text} | {dtype} | {name} | {row} |{'' if right else ' !'}", flush=True)
                        for file in folder.iterdir():
                            file.unlink()
    finally:
        shutil.rmtree(folder)
    if arguments.check:
        print(f"{faults} kernels are not as they should be")
        sys.exit(bool(faults))


if __name__ == "__main__":
    main()
