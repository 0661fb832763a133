"""Settings of hypothesis: HYPOTHESIS_PROFILE or `pytest --hypothesis-profile` choose the profile."""

import os

from hypothesis import HealthCheck, settings

# How many cases a fuzz test draws. The first call of every shape compiles: no deadline.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("default", _COMMON, max_examples=50, derandomize=True)  # the same cases on every run
settings.register_profile("nightly", _COMMON, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
