"""The documentation names every argument of PyTorch's functions, and shows no Python that no test runs."""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {"F": torch.nn.functional, "nn": torch.nn}
FUNCTIONS = ("softmax", "log_softmax", "nll_loss", "cross_entropy", "linear_cross_entropy")
MODULES = ("Softmax", "LogSoftmax", "NLLLoss", "CrossEntropyLoss")


def is_notebook(page):
    return page.read_text().startswith("---\njupyter:")


@pytest.mark.parametrize("name", [f"F.{name}" for name in FUNCTIONS] + [f"nn.{name}" for name in MODULES])
def test_table_names_every_argument(name):
    page = (ROOT / "docs" / "coming-from-pytorch.md").read_text()
    section = page.split(f"### {name}\n")[1].split("\n#")[0]
    prefix, attribute = name.split(".")
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(
        inspect.signature(getattr(NAMES[prefix], attribute)).parameters
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_is_run(page):
    """Sessions are doctests, the cells of a notebook run when the site is built, and shell commands name files."""
    for language, block in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if language == "sh":
            for path in re.findall(r"python ([\w/]+\.py)", block):
                assert (ROOT / path).exists(), path
        elif language == "python" and is_notebook(page):
            assert ">>>" not in block
        elif language in ("python", "pycon"):
            assert block.lstrip().startswith(">>>"), block
            assert block.endswith("\n\n"), f"doctest takes the fence for output; leave a blank line:\n{block}"
        else:
            assert language in ("", "text"), language


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_workflows_run_our_scripts_alone():
    """What .ci/run runs, too: a command of a workflow's own would only ever run there."""
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for command in re.findall(r"\brun: *(.*)", workflow.read_text()):
            assert re.match(r"\.ci/\w+( |$)", command), (workflow.name, command)
            assert os.access(ROOT / command.split()[0], os.X_OK), command
