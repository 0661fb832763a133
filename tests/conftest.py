"""How many cases run, settings of hypothesis, and implementations.

`pytest` runs nearly every test, `pytest --all` every case, and `pytest --rest` what the first leaves out of the
second; with `--minutes 10`, what has not begun after ten minutes is skipped. Marked are tests that repeat with more
cases, train for long, or compile for many shapes:

    @pytest.mark.more               not by default
    @pytest.mark.more(cases=2)      by default so many cases of each implementation, evenly spread; where they begin
                                    follows from the test's name, or all tests would take their plainest case
    @pytest.mark.more(inside=True)  always, since the test itself runs fewer by default

How many cases a fuzz test draws is a profile of hypothesis, which HYPOTHESIS_PROFILE chooses, too.
"""

import functools
import importlib
import itertools
import os
import time
import zlib
from collections import Counter, defaultdict

import jax
import pytest
from hypothesis import HealthCheck, settings

import jaxent
from jaxent import _kernels as kernels
from jaxent import _linear_sweep
from jaxent._kernels import implementations, native

# The first call of every shape compiles: no deadline.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("few", _COMMON, max_examples=6, derandomize=True)  # the same cases on every run
settings.register_profile("all", _COMMON, max_examples=50, derandomize=True)
settings.register_profile("nightly", _COMMON, max_examples=500)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run all cases of all tests")
    parser.addoption("--rest", action="store_true", help="run what --all would and the default would not")
    parser.addoption("--minutes", type=float, default=float("inf"), help="skip what has not begun by then")


def pytest_configure(config):
    config.addinivalue_line("markers", "more(cases, inside): runs, or has more cases, with --all")
    by_default = "all" if config.option.all or config.option.rest else "few"
    asked = config.getoption("--hypothesis-profile") or os.environ.get("HYPOTHESIS_PROFILE")
    settings.load_profile(asked or by_default)


_STARTED = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.monotonic() - _STARTED > 60 * item.config.option.minutes:
        pytest.skip("the time is up")


def pytest_collection_modifyitems(config, items):
    if config.option.all:
        return
    total = Counter(map(_test_of, items))
    number = defaultdict(itertools.count)  # of each test's case
    chosen = [_runs(item, next(number[_test_of(item)]), total[_test_of(item)], config.option.rest) for item in items]
    config.hook.pytest_deselected(items=[item for item, runs in zip(items, chosen, strict=True) if not runs])
    items[:] = itertools.compress(items, chosen)


def _test_of(item):
    """What an item is a case of."""
    callspec = getattr(item, "callspec", None)
    return getattr(item, "function", item), callspec and callspec.params.get("implementation")


def _runs(item, number, total, rest):
    """Say whether the case of this number runs by default, or as one of the rest."""
    if "hypothesis" in item.keywords:
        return True
    marker = item.get_closest_marker("more")
    if marker is None or marker.kwargs.get("inside"):
        return marker is not None or not rest
    cases = marker.kwargs.get("cases", 0)
    first = zlib.crc32(item.originalname.encode())
    return rest != (number in {(first + i * total // cases) % total for i in range(cases)})


@functools.cache  # one object each, so that what jit has compiled for it is found again
def _by(name, implementation):
    function = getattr(jaxent, name)

    @functools.wraps(function)
    def asked(x, *args, **options):
        dtypes = [str(getattr(a, "dtype", "")) for a in (x, *args, *options.values())] + [str(options.get("dtype"))]
        by_xla = "float64" in dtypes  # nobody else computes in it
        return function(x, *args, implementation=None if by_xla else implementation, **options)

    return asked


PALLAS = os.environ.get("JAXENT_PALLAS")  # "tpu" or "gpu", whose kernels a CPU then interprets wherever it can


def _served(name):
    if PALLAS:
        why_not = None if name == "pallas" else "JAXENT_PALLAS is set"
    else:
        why_not = {"native": native.unavailable(), "pallas": "JAXENT_PALLAS is not set"}.get(name)
    return pytest.param(name, marks=pytest.mark.skipif(why_not is not None, reason=f"{name}: {why_not}"))


def interpret(patch, machine):
    """Have the CPU interpret the kernels of another machine, and take all that these can."""
    module = importlib.import_module(f"jaxent._kernels.{machine}")
    patch.setattr(module, "INTERPRET", True)
    patch.setattr(module, "unasked", lambda *_, **__: None)
    patch.setitem(kernels.MACHINES, "cpu", kernels.Machine(module.__name__, "pallas"))
    jax.clear_caches()
    return module


@pytest.fixture(scope="session", autouse=bool(PALLAS))
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, PALLAS)
        yield


@pytest.fixture
def accelerators(monkeypatch):
    """A CPU walks over a linear layer's outputs as TPUs do."""
    monkeypatch.setitem(_linear_sweep.MACHINE_OF, "cpu", "tpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", params=map(_served, implementations()))
def implementation(request):
    """A module that uses this runs once for each implementation, asked for by name."""
    with pytest.MonkeyPatch.context() as patch:
        asked = None if request.param == "pallas" else request.param  # the rest is XLA's then
        for name in ("softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"):
            patch.setattr(jaxent, name, _by(name, asked))
        yield request.param
    if asked is None:
        jax.clear_caches()
