"""Which TPU a program is traced for, where that is known."""

from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """What decides between ways of a computation."""

    fast_memory: int  # bytes of a core's
    flops_per_byte: float  # of bfloat16, while a byte of its memory is moved
    generation: int


def tpu() -> Chip | None:
    """The TPU at hand, or that which the mesh of `jax.set_mesh` describes; None if there is none.

    Programs may be compiled for another, so nothing but their speed and memory depends on it, and no precision but
    what all TPUs round away.
    """
    described: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = described.device_kind if described is not None else jax.devices()[0].device_kind
    if not kind.startswith("TPU"):
        return None
    from jax.experimental.pallas import tpu as pltpu  # not before, since it takes long to import

    try:
        info = pltpu.get_tpu_info()
    except (AttributeError, ValueError):  # a later one than this JAX knows
        return None
    return Chip(info.vmem_capacity_bytes, info.bf16_ops_per_second / info.mem_bw_bytes_per_second, info.generation)
