"""All devices of all processes as one mesh: every device holds the parameters and a part of each batch."""

import importlib.util
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnist.config import Config, ConfigError


def connect(config: Config) -> None:
    """Join the other processes, if there are any; must come before anything else touches a device."""
    flags = {
        "--coordinator-address": config.coordinator_address,
        "--num-processes": config.num_processes,
        "--process-id": config.process_id,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if 0 < len(missing) < len(flags):
        raise ConfigError(f"Several processes need {' and '.join(missing)} too.")
    if not missing or in_cluster():
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)


def in_cluster() -> bool:
    """Say whether jax.distributed finds the other processes by itself: in a step of Slurm, and on Cloud TPU."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return slurm or importlib.util.find_spec("libtpu") is not None


def make_mesh() -> Mesh:
    """Return all devices in a row, whose only axis divides the batch."""
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def whole(mesh: Mesh) -> NamedSharding:
    """Every device holds all."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh, axis: int) -> NamedSharding:
    """Every device holds its part of this axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch"))


def is_main() -> bool:
    """Say whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def spread(value: int, mesh: Mesh) -> jax.Array:
    """Return an array that holds each process's value once for each of its devices."""
    return jax.make_array_from_callback((mesh.size,), divided(mesh, 0), lambda _: np.full(1, value, np.int32))
