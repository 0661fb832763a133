"""What `pytest` leaves out runs by `pytest --rest`, and the two together are `pytest --all`."""

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CASES = """
import pytest
from hypothesis import given, strategies as st

@pytest.mark.parametrize("i", range(7))
@pytest.mark.more(cases=3)
def test_many(i): pass

@pytest.mark.parametrize("i", range(7))
@pytest.mark.more(cases=1)
def test_once(i): pass

@pytest.mark.parametrize("i", range(7))
@pytest.mark.more(cases=1)
def test_another(i): pass

@pytest.mark.parametrize("i", range(7))
@pytest.mark.more(cases=9)
def test_fewer_than_asked_for(i): pass

@pytest.mark.more
def test_long(): pass

@pytest.mark.more(inside=True)
def test_other_tests_inside(): pass

@given(st.integers())
def test_drawn(i): pass

def test_plain():
    ">>> 1 + 1"
"""


@pytest.fixture
def chosen(pytester):
    """Return a function that says which cases run with these options."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(test_it=CASES)

    def names(*options):
        lines = pytester.runpytest_subprocess("--collect-only", "-q", "--doctest-modules", *options).outlines
        return {line.partition("::")[2] for line in lines if "::" in line}

    return names


@pytest.mark.more
def test_the_default_and_the_rest_are_all(chosen):
    few, rest, every = chosen(), chosen("--rest"), chosen("--all")
    assert few | rest == every
    assert few & rest == {"test_other_tests_inside", "test_drawn"}  # of which there is less by default
    names = "test_many", "test_once", "test_another", "test_fewer_than_asked_for"
    many, once, another, fewer = ([i for i in range(7) if f"{name}[{i}]" in few] for name in names)
    assert (len(many), len(once), len(another), len(fewer)) == (3, 1, 1, 7)
    assert {(b - a) % 7 for a, b in zip(many, [*many[1:], many[0]], strict=True)} == {2, 3}  # evenly spread
    assert once != another
    assert "test_long" in rest
    assert len(every) == 33


def test_ci_runs_readmes_command_and_the_rest():
    script = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert re.search(r'^eval "\$command"$.*^  pytest --rest --minutes "\$minutes"$', script, re.MULTILINE | re.DOTALL)


@pytest.mark.more
@pytest.mark.parametrize(("minutes", "outcome"), [("0", "skipped"), ("60", "passed")])
def test_what_has_not_begun_in_time_is_skipped(minutes, outcome, pytester):
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(test_it="def test_plain(): pass")
    pytester.runpytest_subprocess("--minutes", minutes).assert_outcomes(**{outcome: 1})
