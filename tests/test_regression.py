"""What XLA plans for every function is what it was, see benchmarks/baseline.py."""

import pytest

from benchmarks import baseline


@pytest.mark.more
def test_compiled_programs_are_as_good_as_they_were():
    stored = baseline.read(baseline.version())
    if stored is None:
        pytest.skip(f"benchmarks/baseline.json has no figures of {baseline.version()}, which plans in its own way")
    lines = baseline.moved(stored, baseline.measure())
    assert not lines, "if meant, accept with `python benchmarks/baseline.py write`:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("figure", "now", "seen"),
    [("temporaries", 1009, 0), ("temporaries", 1011, 1), ("flops", 989, 1), ("fusions", 1001, 1)],
)
def test_what_counts_as_moved(figure, now, seen):
    stored = {"job": {"temporaries": 1000, "flops": 1000, "fusions": 1000}}
    assert len(baseline.moved(stored, {"job": stored["job"] | {figure: now}})) == seen
    assert len(baseline.moved(stored, {})) == 1
