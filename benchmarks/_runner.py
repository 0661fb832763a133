"""How the benchmarks measure. pyperf and pytest-benchmark time one contestant after the other; here all take turns.

Contestants are calls without arguments. All run in one process, in random order, round after round, so that a slow
moment of the machine hits all of them. A ratio is the median over the rounds of time / time of the reference (above
1: the reference is faster), with its quartiles. Compilation and warm-up are not part of it.
"""

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's worker threads otherwise spin for milliseconds after each call and take the cores from whoever comes next.
# They ask when they are loaded, and never again.
if "torch" in sys.modules:
    raise ImportError("import _runner before torch")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax

Call = Callable[[], Any]
Quartiles = tuple[float, float, float]  # the lower quartile, the median and the upper quartile


class Measured(NamedTuple):
    """What one cell of a table was measured to be."""

    rounds: int
    ms: dict[str, Quartiles]
    ratio: dict[str, Quartiles]  # of each peer to the reference


def jitted(f: Callable[..., Any], *args: Any) -> tuple[Call, float]:
    """A call of compiled `f`, and the seconds until it was traced and compiled (less with a compilation cache)."""
    compiled = jax.jit(f)
    start = time.perf_counter()
    compiled.lower(*args).compile()
    return blocking(compiled, *args), time.perf_counter() - start


def blocking(f: Callable[..., Any], *args: Any) -> Call:
    """A call of `f` that waits for its result."""
    return lambda: jax.block_until_ready(f(*args))


def take_turns(
    calls: Mapping[str, Call], rounds: int, seconds: float, warm_up: int, at_least: int
) -> dict[str, list[float]]:
    """Seconds of each call in each round: in at most so many rounds and seconds, but in a few rounds at least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(warm_up):
        for call in calls.values():
            call()
    start = time.perf_counter()
    for i in range(rounds):
        if i >= at_least and time.perf_counter() - start > seconds:
            break
        for name, call in order.sample(sorted(calls.items()), len(calls)):  # nobody always follows the same peer
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def measure(
    calls: Mapping[str, Call], reference: str, rounds: int, seconds: float, warm_up: int = 2, at_least: int = 5
) -> Measured:
    """Times of all calls, and how they compare with those of the reference."""
    times = take_turns(calls, rounds, seconds, warm_up, at_least)
    of_reference = times[reference]
    ratio = {
        name: quartiles([a / b for a, b in zip(t, of_reference, strict=True)])
        for name, t in times.items()
        if name != reference
    }
    return Measured(len(of_reference), {name: quartiles([1e3 * s for s in t]) for name, t in times.items()}, ratio)


def quartiles(values: Sequence[float]) -> Quartiles:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine(*packages: str) -> dict[str, Any]:
    """What ran: versions, the device and its number."""
    device = jax.devices()[0]
    kind = _cpu_name() if device.platform == "cpu" else device.device_kind
    versions = {name: version(name) for name in ("jax", "jaxlib", *packages)}
    return {**versions, "python": platform.python_version(), "device": kind, "cores": os.cpu_count()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, content: Any) -> None:
    """Write a table's numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
