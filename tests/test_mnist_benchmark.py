"""The comparison with PyTorch's MNIST example: what it counts, and all of it in small."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")

from mnist import data
from mnist.idx import Digits

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mnist.py"
spec = importlib.util.spec_from_file_location("mnist_benchmark", SCRIPT)
assert spec is not None
assert spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)  # not `import mnist`, which is the package
spec.loader.exec_module(benchmark)


def test_torchs_network_has_the_examples_number_of_parameters():
    assert sum(parameter.numel() for parameter in benchmark.torch_network().parameters()) == 1_199_882


def test_a_goal_is_crossed_when_it_is_first_told():
    ours = [benchmark.Point(8.0, 98.0), benchmark.Point(15.0, 99.01), benchmark.Point(20.0, 98.9)]
    theirs = [benchmark.Point(40.0, 97.5), benchmark.Point(75.0, 98.99)]
    assert benchmark.crossed(ours, 99) == 15.0
    assert benchmark.crossed(theirs, 99) is None
    lines = [line.split() for line in benchmark.table({"ours": ours, "theirs": theirs})]
    assert lines[0] == ["goal", "ours", "theirs", "ratio"]
    assert lines[1][2:] == ["8.0", "s", "40.0", "s", "5.0"]
    assert lines[2][2:] == ["8.0", "s", "75.0", "s", "9.4"]
    assert lines[3][2:] == ["15.0", "s", "never", "-"]


@pytest.mark.more
def test_both_train_and_are_followed(tmp_path):
    sample = data.load(data.SAMPLE)
    few = {split: Digits(digits.images[::4], digits.labels[::4]) for split, digits in sample.items()}
    data.prepare(few, tmp_path / "data")
    flags = [
        "--data-dir",
        tmp_path / "data",
        "--epochs",
        "2",
        "--torch-epochs",
        "1",
        "--json",
        tmp_path / "runs.json",
    ]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=True)
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert {name: len(points) for name, points in runs.items()} == {"train_mnist": 2, "torch": 1}
    for points in runs.values():
        assert points[-1]["accuracy"] > 70  # of 2,500 digits' training
        assert all(point["seconds"] > 0 for point in points)
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["goal", "97", "98", "99"]
