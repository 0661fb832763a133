"""What eight chips of a TPU v5e each move for logits that are split over them, compiled and counted without a device.

    python benchmarks/compiled_sharded.py [--shapes 8192x32000 ...] [--dtype bfloat16] [--check]

cross_entropy with its gradient and log_softmax, beside optax's and jax.nn's, with the batch split, the classes, or
both; under automatic and explicit sharding, and inside `jax.shard_map` where the classes are whole. A peer that
raises under explicit sharding has no figure. `--check` fails where jaxent moves over 1.02 times what its peer does,
communicates anything but all-reduces, or where no kernel serves whole rows that are not left to the compiler to cut.
Needs what `compiled.py tpu` needs.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compiled

WAYS = ("automatic", "explicit", "shard_map")
SPLITS = {"batch": (("b", "c"), None), "classes": (None, ("b", "c")), "both": ("b", "c")}
COMMUNICATES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


class Counted(NamedTuple):
    """Of one chip's program."""

    mb: float
    kernels: int
    reduced: int  # how often numbers are all-reduced
    others: int  # how often anything else is communicated


def programs() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Ours and a peer's, of logits and labels."""
    import jax
    import optax

    import jaxent

    def theirs(x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    return {
        "cross_entropy and gradient": (jax.value_and_grad(jaxent.cross_entropy), jax.value_and_grad(theirs)),
        "log_softmax": (lambda x, y: jaxent.log_softmax(x), lambda x, y: jax.nn.log_softmax(x)),
    }


def counted(f: Callable[..., Any], way: str, split: tuple[Any, Any], shape: tuple[int, int], dtype: str) -> Counted:
    """Compile `f` for a mesh of 4 x 2 chips."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("b", "c"), axis_types=(kind, kind))
    specs = PartitionSpec(*split), PartitionSpec(split[0])
    shapes = zip((shape, shape[:1]), (dtype, "int32"), specs, strict=True)
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in shapes]

    def on_each(x: Any, y: Any) -> Any:
        out = f(x, y)
        return (jax.lax.pmean(out[0], ("b", "c")), out[1]) if isinstance(out, tuple) else out

    run = f
    if way == "shard_map":
        results = jax.tree.map(lambda out: specs[0] if out.ndim else PartitionSpec(), jax.eval_shape(f, *arguments))
        run = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)
    program = jax.jit(run).lower(*arguments).compile()
    text = program.as_text()
    times = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COMMUNICATES}
    reduced = times.pop("all-reduce")
    moved = program.cost_analysis()["bytes accessed"] / 1e6
    return Counted(moved, text.count('custom_call_target="tpu_custom_call"'), reduced, sum(times.values()))


def rows(shapes: list[tuple[int, int]], dtype: str) -> Iterator[tuple[str, bool]]:
    """The table's rows, and whether each is as it should be."""
    for name, (ours, theirs) in programs().items():
        for shape in shapes:
            for split, spec in SPLITS.items():
                for way in WAYS[: 3 if spec[1] is None else 2]:
                    own = counted(ours, way, spec, shape, dtype)
                    try:
                        peer = counted(theirs, way, spec, shape, dtype)
                    except Exception as error:  # ShardingTypeError is not JAX's public name
                        peer, why = None, type(error).__name__
                    known = f"{peer.mb:.1f}" if peer else why
                    row = f"| {name} | {shape[0]}x{shape[1]} | {split} | {way} | {own.mb:.1f} | {known} |"
                    row += f" {own.kernels} | {own.reduced} | {own.others} |"
                    served = own.kernels > 0 or spec[1] is not None or way == "automatic"
                    yield row, served and not own.others and (peer is None or own.mb <= 1.02 * peer.mb)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8192x1000", "65536x128256"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--check", action="store_true", help="fail where a row is not as it should be")
    arguments = parser.parse_args()
    compiled.prepare("tpu")
    print("| function | logits | split | sharding | MB a chip | peer's | kernels | all-reduces | others |")
    print("|---|---|---|---|" + "---:|" * 5)
    faults = 0
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.shapes]
    for row, right in rows(shapes, arguments.dtype):
        faults += not right
        print(row + " !" * (not right), flush=True)
    if arguments.check:
        print(f"{faults} rows are not as they should be")
        sys.exit(bool(faults))


if __name__ == "__main__":
    main()
