"""The tutorial runs as it stands, and PyTorch's numbers are jaxent's wherever it shows both."""

import contextlib
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
CELL = re.compile(r"^```python(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NUMBER = re.compile(r"-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf)|nan")


@pytest.fixture(scope="module")
def cells():
    """What each cell prints, and what stands beside it: its tags."""
    matplotlib.use("agg")
    namespace, printed = {}, []
    with np.printoptions(), matplotlib.rc_context():
        for tags, source in CELL.findall(PAGE.read_text()):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(source, namespace)
            printed.append((tags, out.getvalue()))
    return printed


def numbers(text, library):
    found = re.search(rf"^{library}\s+(.*?)(?=^[A-Za-z(]|\Z)", text, re.MULTILINE | re.DOTALL)
    return found and [float(number) for number in NUMBER.findall(found[1])]


def test_pytorch_gives_the_same_numbers(cells):
    compared = 0
    for tags, text in cells:
        ours, theirs = numbers(text, "jaxent"), numbers(text, "PyTorch")
        if ours is None or "part" in tags:
            continue
        np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=text)
        compared += len(ours)
    assert compared >= 46


def test_they_part_where_the_text_says_so(cells):
    (text,) = (text for tags, text in cells if "part" in tags)
    np.testing.assert_allclose(numbers(text, "jaxent"), [2.061e-9, 2.061e-9, -2.061e-9], rtol=1e-3)
    loss, _, gradient = numbers(text, "PyTorch")
    assert loss == gradient == 0


def test_what_the_text_says_of_the_numbers(cells):
    text = "".join(text for _, text in cells)
    assert "log(softmax) [-inf   0.]" in text
    assert "softmax as the formula says [ 0. nan]" in text
    assert "gradient through log(softmax) [nan nan]" in text
    final = {name: float(value) for name, value in re.findall(r"'(\w+)': ([\d.]+)", text)}
    assert final["logits"] == pytest.approx(final["log_softmax"], abs=2e-4)
    assert final["logits"] < 0.3
    assert final["softmax"] > np.log(1 + 2 / np.e)
    assert float(re.search(r"largest difference (\S+)", text)[1]) < 1e-6
