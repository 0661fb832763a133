"""Seconds until 97, 98 and 99 % of the test digits are right: train_mnist.py against PyTorch's MNIST example.

    python benchmarks/mnist.py [--idx-dir DIR] [--data-dir DIR] [--epochs 2] [--torch-epochs 6] [--json FILE]

The two train one after the other, each in a process of its own that evaluates after every epoch. The clock starts
with the process, so it counts imports, reading the digits, compilation and evaluation; the data set is prepared
before.

- train_mnist: `train_mnist.py --epochs N`, whose learning rate has fallen to zero after these epochs
- torch: the network and training of PyTorch's example, in eager float32: convolutions of 32 and 64 channels, one
  pool, dense layers of 128 and 10, dropout, Adadelta with rate 1 that falls by 0.7 an epoch, batches of 64. The
  example loads images one by one with a DataLoader; here they lie in one tensor, which is faster
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

GOALS = 97, 98, 99


class Point(NamedTuple):
    """The test accuracy, in per cent, that a run has told some seconds after its process was started."""

    seconds: float
    accuracy: float


def torch_network() -> "torch.nn.Module":
    """Return the example's network, from images (N, 1, 28, 28) to log-probabilities (N, 10)."""
    from torch.nn import Conv2d, Dropout, Flatten, Linear, LogSoftmax, MaxPool2d, ReLU, Sequential

    convolutions = Conv2d(1, 32, 3), ReLU(), Conv2d(32, 64, 3), ReLU(), MaxPool2d(2), Dropout(0.25), Flatten()
    return Sequential(*convolutions, Linear(9216, 128), ReLU(), Dropout(0.5), Linear(128, 10), LogSoftmax(1))


def torch_example(data_dir: Path, idx_dir: Path | None, epochs: int, seed: int) -> None:
    """Train as PyTorch's example does, and print the test accuracy after every epoch."""
    import torch
    from torch.nn.functional import nll_loss

    from mnist.data import obtain

    splits = obtain(data_dir, idx_dir)

    def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = map(torch.tensor, splits[split])
        return (images.float().permute(0, 3, 1, 2) / 255 - 0.1307) / 0.3081, labels.long()

    images, labels = tensors("train")
    test_images, test_labels = tensors("test")
    torch.manual_seed(seed)
    model = torch_network()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nll_loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.inference_mode():
            hits = sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(test_images.split(1000), test_labels.split(1000), strict=True)
            )
        print(f"epoch {epoch}/{epochs}   test accuracy {hits / len(test_labels):.2%}", flush=True)


def follow(command: Sequence[str]) -> list[Point]:
    """Run a training to its end, print its lines with their times, and return the accuracies that it tells."""
    start = time.perf_counter()
    points = []
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seconds = time.perf_counter() - start
            print(f"{seconds:6.1f} s   {line}", end="", flush=True)
            if told := re.match(r"epoch .* test accuracy ([\d.]+)%", line):
                points.append(Point(seconds, float(told[1])))
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}.")
    return points


def crossed(points: Sequence[Point], goal: float) -> float | None:
    """Return after how many seconds the accuracy first was at least `goal`, or None if it never was."""
    return next((seconds for seconds, accuracy in points if accuracy >= goal), None)


def table(runs: dict[str, list[Point]]) -> list[str]:
    """Return the lines of a table of when each run crossed each goal, and how many times sooner the first did."""

    def cell(seconds: float | None) -> str:
        return "never" if seconds is None else f"{seconds:.1f} s"

    lines = [" goal" + "".join(f"{name:>14}" for name in runs) + "         ratio"]
    for goal in GOALS:
        ours, theirs = times = [crossed(points, goal) for points in runs.values()]
        ratio = f"{theirs / ours:.1f}" if ours and theirs else "-"
        lines.append(f" {goal} %" + "".join(f"{cell(seconds):>14}" for seconds in times) + f"{ratio:>14}")
    return lines


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    from mnist.config import Config
    from mnist.data import obtain

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--idx-dir", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Config.data_dir.expanduser())
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--torch-epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--torch-only", action="store_true", help=argparse.SUPPRESS)  # the process with PyTorch
    flags = parser.parse_args(args)
    if flags.torch_only:
        torch_example(flags.data_dir, flags.idx_dir, flags.torch_epochs, flags.seed)
        return
    obtain(flags.data_dir, flags.idx_dir)  # prepares the data set
    common = ["--data-dir", str(flags.data_dir), "--seed", str(flags.seed)]
    if flags.idx_dir:
        common += ["--idx-dir", str(flags.idx_dir)]
    with tempfile.TemporaryDirectory() as workdir:
        ours = ["train_mnist.py", *common, "--epochs", str(flags.epochs), "--workdir", workdir]
        theirs = ["benchmarks/mnist.py", *common, "--torch-epochs", str(flags.torch_epochs), "--torch-only"]
        runs = {"train_mnist": follow([str(ROOT / ours[0]), *ours[1:]])}
        runs["torch"] = follow([str(ROOT / theirs[0]), *theirs[1:]])
    print(*table(runs), sep="\n")
    if flags.json:
        figures = {name: [point._asdict() for point in points] for name, points in runs.items()}
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
