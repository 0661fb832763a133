"""What the compilers of accelerators make of a training step of train_mnist.py: counted without a device.

    python benchmarks/compiled_mnist.py tpu | gpu [--check]

The step of the recipe "accurate", on one and on four chips of a TPU v5e, or on one H100: the bytes that it moves on
each chip, its temporaries, what the chips tell each other, and the seconds of compiling. `--check` fails where a step
moves more than BOUNDS allow, or communicates otherwise. For the environment see compiled.py; this needs flax,
orbax-checkpoint, filelock, rich and tyro, too.
"""

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import compiled
from _cost import kernels_of, total_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 4  # of a dispatch
# Megabytes that a step moves on each chip, and how often it communicates.
BOUNDS = {("v5e", 1): (1180, {}), ("v5e", 4): (570, {"all-reduce": 12}), ("h100", 1): (470, {})}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


class Counted(NamedTuple):
    """Of a step, on each chip."""

    megabytes: float
    temporaries: float  # megabytes, of the whole program
    collectives: dict[str, int]
    compiling: float  # seconds


def count(chip: str, devices: int) -> Counted:
    """Compile a dispatch for so many devices."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from mnist.config import Config
    from mnist.devices import divided, whole
    from mnist.recipes import make_optimizer
    from mnist.training import initial, make_run

    def mesh_of(devices: Any) -> Mesh:
        return Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))

    config, mesh = Config(recipe="accurate"), mesh_of(compiled.devices_of(chip)[:devices])
    optimizer = make_optimizer(config.settings, 1000)
    model, state = initial(config, optimizer, mesh_of(jax.devices("cpu")[:1]))
    data = np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32)
    indices = np.zeros((STEPS, config.settings.batch_size), np.int32)

    def described(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole(mesh))

    arguments = jax.tree.map(described, (state, data, indices, jax.random.key(0)))
    asked = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=divided(mesh, 0))
    run = make_run(model, optimizer, config.settings, mesh, 100)
    start = time.perf_counter()
    program = run.lower(*arguments, asked).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    text, counted = program.as_text(), program.cost_analysis()
    # XLA counts a loop's body once, and what stays in a core's fast memory too; for GPUs it counts nothing.
    moved = counted["bytes accessed"] if counted else total_bytes(kernels_of(text)) / STEPS
    return Counted(
        moved / 1e6,
        program.memory_analysis().temp_size_in_bytes / 1e6,
        dict(Counter(COLLECTIVE.findall(text))),
        seconds,
    )


def main() -> None:
    """Compile, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=["tpu", "gpu"])
    parser.add_argument("--check", action="store_true", help="fail where a step is worse than it may be")
    arguments = parser.parse_args()
    compiled.prepare(arguments.platform)
    faults = 0
    for (chip, devices), (most, collectives) in BOUNDS.items():
        if (chip == "h100") == (arguments.platform == "gpu"):
            found = count(chip, devices)
            faults += found.megabytes > most or found.collectives != collectives
            print(
                f"{chip} x {devices}: {found.megabytes:,.0f} MB a step (at most {most:,}), temporaries "
                f"{found.temporaries:,.0f} MB, {found.collectives}, compiled in {found.compiling:.0f} s"
            )
    sys.exit(bool(arguments.check and faults))


if __name__ == "__main__":
    main()
