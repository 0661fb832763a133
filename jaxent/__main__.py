"""`python -m jaxent`: versions, devices, and who computes on each platform and why."""

import platform
from importlib.metadata import version

import jax

from . import __version__
from ._kernels import MACHINES, native


def main() -> None:
    """Print them."""
    versions = {"jaxent": __version__, "jax": jax.__version__, "jaxlib": version("jaxlib")}
    print(
        ", ".join(f"{name} {number}" for name, number in versions.items()) + f", Python {platform.python_version()}"
    )
    for device in jax.devices():
        print(f"device {device.id}: {device.platform}, {device.device_kind}")
    why_not = native.unavailable()
    for name in sorted({"cpu", *(device.platform for device in jax.devices())}):
        if name not in MACHINES:
            print(f'on {name}: "xla", XLA from plain JAX: there are no other kernels for it')
        elif MACHINES[name].implementation == "pallas":
            print(f'on {name}: "pallas", kernels for rows in fast memory; "xla" for what they do not take')
        elif why_not is None:
            print(f'on {name}: "native", kernels for {native.level()}; "xla" for what they do not take')
        else:
            print(f'on {name}: "xla", XLA from plain JAX: {why_not}')


if __name__ == "__main__":
    main()
