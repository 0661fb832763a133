"""Settings of hypothesis (HYPOTHESIS_PROFILE or `pytest --hypothesis-profile` choose one), and implementations."""

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

import jaxent
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


def _served(name):
    why_not = native.unavailable() if name == "native" else None
    return pytest.param(name, marks=pytest.mark.skipif(why_not is not None, reason=f"native: {why_not}"))


@pytest.fixture(scope="module", params=map(_served, implementations()))
def implementation(request):
    """A module that uses this runs once for each implementation, asked for by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"):
            patch.setattr(jaxent, name, _by(name, request.param))
        yield request.param
