"""What a trained network is good for: `evaluate` it on the test images, and `predict` what pictures show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from mnist.checkpoints import restore_params
from mnist.config import Config
from mnist.data import SAMPLE, directory, load, obtain
from mnist.datasets import DATASETS
from mnist.evaluation import probabilities
from mnist.idx import DataError, Splits, described
from mnist.pictures import PictureError, prepared, read
from mnist.report import accuracy, negative_log_likelihood
from mnist.workdir import named, read_config, stored_config

SHOWN = 3  # probabilities a line


@dataclass(frozen=True)
class Evaluate:
    """Print the accuracy and the loss on the test images, with the newest whole checkpoint of a run."""

    workdir: Path = Config.workdir
    """The folder of the run."""


@dataclass(frozen=True)
class Predict:
    """Print what pictures of a digit show, one line each: the label, and the largest probabilities.

    Of a picture that cannot be read a sentence says why, and the exit status is 1; the others are predicted.
    """

    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="")
    ]
    """PNG or JPEG files: dark on light or light on dark, of any size, on paper of one colour."""
    workdir: Path = Config.workdir
    """The folder of the run whose newest whole checkpoint predicts."""


def evaluate(flags: Evaluate) -> None:
    """Print how well the run's network does on the test images."""
    config = stored_config(flags.workdir)
    params = restore_params(flags.workdir)
    splits = data_of(flags.workdir)
    print(f"data: {described(splits, DATASETS[config.dataset])}")
    images, labels = splits["test"]
    p = probabilities(config, params, images)
    loss = negative_log_likelihood(p, labels)
    print(f"{len(labels):,} test images   accuracy {accuracy(p, labels):.2%}   loss {loss:.4f}")


def data_of(workdir: Path) -> Splits:
    """Return the data that the run was trained on: the carried sample, or what is found where the run found it."""
    config, wanted = stored_config(workdir), read_config(workdir)["data"]
    dataset = DATASETS[config.dataset]
    # The sample first: who trained on it may have no network, or has prepared all of the data since.
    if directory(SAMPLE, dataset).exists() and named(sample := load(SAMPLE, dataset), config) == wanted:
        return sample
    found = obtain(config.data_dir, config.idx_dir, dataset)
    if named(found, config) != wanted:
        raise DataError(f"{workdir} was trained on {wanted}, but what is found now is {named(found, config)}.")
    return found


def predict(flags: Predict) -> None:
    """Print what each picture shows, and fail at the end with what is wrong with any."""
    if not flags.images:
        raise PictureError("There is no picture to predict: name one or more files.")
    config = stored_config(flags.workdir)
    params = restore_params(flags.workdir)
    dataset = DATASETS[config.dataset]
    images: list[tuple[Path, NDArray[np.uint8]]] = []
    wrong: list[str] = []
    for path in flags.images:
        try:
            images.append((path, prepared(read(path), dataset.box, path)))
        except PictureError as error:
            wrong.append(str(error))
    if images:
        paths, pixels = zip(*images, strict=True)
        for path, p in zip(paths, probabilities(config, params, np.stack(pixels)), strict=True):
            print(f"{path}: {described_by(p, dataset.class_names)}")
    if wrong:
        raise PictureError("\n".join(wrong))


def described_by(p: NDArray[np.float32], class_names: Sequence[str]) -> str:
    """Return the label, and the largest probabilities."""
    best = [(class_names[i], p[i]) for i in np.argsort(-p)[:SHOWN]]
    return f"{best[0][0]}   ({', '.join(f'{name} {share:.2%}' for name, share in best)})"
