"""One of two processes with two devices each, started by test_sharding.py; writes what it computed.

python _two_processes.py ADDRESS PROCESS_ID OUTPUT.npz
"""

import sys

import _sharding_cases as cases
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

NAMES = ("cross_entropy with all", "cross_entropy mean", "log_softmax", "linear_cross_entropy mean")
WAYS = ("auto", "explicit", "shard_map")
NO_GLOO = 77  # exit status


def _place(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def compute(name, way, axes):
    """Value and gradients of a case, whole on every process."""
    function, mesh, specs = cases.sharded(cases.CASES[name], way, "tokens and classes", shape=(2, 2), axes=axes)
    arguments = cases.arguments_of(cases.CASES[name])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x, spec: _place(x, NamedSharding(mesh, spec)), arguments, specs)
        whole = jax.jit(function, out_shardings=NamedSharding(mesh, P()))(*placed)
    return [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(whole)]


def main(address, process, output):
    """Join the other process, compute every case with the classes within a process and across the two."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(process), initialization_timeout=60)
    try:
        devices = jax.devices()
    except Exception as error:
        if "gloo" not in str(error).lower():
            raise
        print(error)
        sys.exit(NO_GLOO)
    assert (len(devices), jax.local_device_count(), jax.process_count()) == (4, 2, 2)
    results = {}
    for name in NAMES:
        for way in WAYS:
            for axes in (("data", "class"), ("class", "data")):
                for i, array in enumerate(compute(name, way, axes)):
                    results[f"{name}/{way}/{axes[0]} across processes/{i}"] = array
    np.savez(output, **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
