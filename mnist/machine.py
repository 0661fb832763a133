"""What a run computes on. Sums are rounded in an order that depends on it, and so do the last bits of a result."""

import os
from pathlib import Path

import jax

from mnist.terminal import say
from mnist.workdir import write


def here() -> str:
    """Describe the devices of all processes and, where they are CPUs, the cores that this one may use."""
    count, device = jax.device_count(), jax.devices()[0]
    cores = f", {counted(usable_cores(), 'core')}" if device.platform == "cpu" else ""
    return f"{counted(count, f'{device.device_kind} device')}{cores}, JAX {jax.__version__}"


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def usable_cores() -> int:
    """Return among how many cores XLA divides its work: those that taskset or a scheduler leaves it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def note(workdir: Path, step: int) -> None:
    """Record what the run computes on after this step, and say so if some step before was computed on another."""
    path, now = workdir / "machines.txt", here()
    known = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []
    if others := [machine for machine in known if machine != now]:
        say(f"It was trained on {' and on '.join(others)}, but goes on with {now}, so it will end with other bits.")
    if now not in known:
        write(path, "".join(f"{machine}\n" for machine in [*known, now]))
