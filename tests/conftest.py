"""Settings of hypothesis (HYPOTHESIS_PROFILE or `pytest --hypothesis-profile` choose one), and implementations."""

import functools
import importlib
import os

import jax
import pytest
from hypothesis import HealthCheck, settings

import jaxent
from jaxent import _kernels as kernels
from jaxent._kernels import implementations, native

# How many cases a fuzz test draws. The first call of every shape compiles: no deadline.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("default", _COMMON, max_examples=50, derandomize=True)  # the same cases on every run
settings.register_profile("nightly", _COMMON, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@functools.cache  # one object each, so that what jit has compiled for it is found again
def _by(name, implementation):
    function = getattr(jaxent, name)

    @functools.wraps(function)
    def asked(x, *args, **options):
        dtypes = [str(getattr(a, "dtype", "")) for a in (x, *args, *options.values())] + [str(options.get("dtype"))]
        by_xla = "float64" in dtypes  # nobody else computes in it
        return function(x, *args, implementation=None if by_xla else implementation, **options)

    return asked


PALLAS = os.environ.get("JAXENT_PALLAS")  # "tpu" or "gpu", whose kernels are then interpreted, in some more minutes


def _served(name):
    why_not = {"native": native.unavailable(), "pallas": None if PALLAS else "JAXENT_PALLAS is not set"}.get(name)
    return pytest.param(name, marks=pytest.mark.skipif(why_not is not None, reason=f"{name}: {why_not}"))


def interpret(patch, machine):
    """Have the CPU interpret the kernels of another machine, and take all that these can."""
    module = importlib.import_module(f"jaxent._kernels.{machine}")
    patch.setattr(module, "INTERPRET", True)
    patch.setattr(module, "unasked", lambda *_, **__: None)
    patch.setitem(kernels.MACHINES, "cpu", kernels.Machine(module.__name__, "pallas"))
    jax.clear_caches()
    return module


@pytest.fixture(scope="module", params=map(_served, implementations()))
def implementation(request):
    """A module that uses this runs once for each implementation, asked for by name."""
    with pytest.MonkeyPatch.context() as patch:
        asked = request.param
        if asked == "pallas":
            interpret(patch, PALLAS)
            asked = None  # the rest is XLA's
        for name in ("softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"):
            patch.setattr(jaxent, name, _by(name, asked))
        yield request.param
    if asked is None:
        jax.clear_caches()
