"""All devices of all processes as one mesh: every device holds the parameters and a part of each batch."""

import importlib.util
import os
import urllib.request

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
    method = cluster() if missing else None
    if method or not missing:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            cluster_detection_method=method,
        )


def cluster() -> str | None:
    """Return by which of its methods JAX finds the other processes, if the environment says that there are any."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    if importlib.util.find_spec("libtpu") is None:
        return None
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "gketpu" if "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1 else None
    # JAX has set this when it was imported, if the machine has no TPU: then there is no server of metadata to ask.
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return None
    return "gcetpu" if "," in metadata("worker-network-endpoints") else None


def metadata(key: str) -> str:
    """Return what Cloud TPU tells a virtual machine of itself, or nothing where nobody answers."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    question = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(question, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


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
