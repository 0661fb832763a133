"""What a trained network is good for: `evaluate` it on the test images, and `predict` what pictures show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mnist.checkpoints import restore_params
from mnist.config import Config, UserError
from mnist.data import SAMPLE, directory, load, obtain, sentence
from mnist.datasets import DATASETS
from mnist.evaluation import probabilities
from mnist.idx import DataError, Splits, described
from mnist.report import accuracy, negative_log_likelihood
from mnist.workdir import named, read_config, stored_config

Floats = NDArray[np.float32]

SIDE, CENTRE = 28, 14  # MNIST's images: their side, and the pixel in which the centre of mass lies
LARGEST = 1024  # pixels; a larger picture is made smaller first
BLANK = 0.1  # a picture with less contrast than this shows nothing
FAINT = 0.15  # of the contrast; less is the paper, or what JPEG makes of it
SHOWN = 3  # probabilities a line


class PictureError(UserError):
    """What is wrong with a picture."""


@dataclass(frozen=True)
class Evaluate:
    """Print the accuracy and the loss on the test images, with the newest whole checkpoint of a run."""

    workdir: Path = Config.workdir
    """The folder of the run."""


@dataclass(frozen=True)
class Predict:
    """Print what pictures of a digit show, one line each: the label, and the largest probabilities."""

    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="")
    ]
    """PNG or JPEG files: dark on light or light on dark, of any size, with an even background."""
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
    """Print what each picture shows."""
    if not flags.images:
        raise PictureError("There is no picture to predict: name one or more files.")
    config = stored_config(flags.workdir)
    params = restore_params(flags.workdir)
    dataset = DATASETS[config.dataset]
    images = np.stack([prepared(read(path), dataset.box, path) for path in flags.images])
    for path, p in zip(flags.images, probabilities(config, params, images), strict=True):
        best = np.argsort(-p)[:SHOWN]
        names = [dataset.class_names[i] for i in best]
        print(
            f"{path}: {names[0]}   ({', '.join(f'{name} {p[i]:.2%}' for name, i in zip(names, best, strict=True))})"
        )


def read(path: Path) -> Floats:
    """Decode a picture into colours (height, width, 3) in [0, 1]; transparent parts become paper."""
    try:
        with Image.open(path) as file:
            image = as_rgba(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise PictureError(f"There is no file {path}.") from None
    except Exception as error:  # each decoder raises its own on damaged files
        raise PictureError(f"{path} is no picture that can be read: {sentence(error)}.") from error
    image.thumbnail((LARGEST, LARGEST))
    pixels = np.asarray(image, np.float32) / 255
    colors, opacity = pixels[..., :3], pixels[..., 3:]
    dark = (colors * opacity).sum() < 0.5 * 3 * opacity.sum()
    return colors * opacity + (1 - opacity) * dark  # what is drawn in dark colours was drawn on white paper


def as_rgba(image: Image.Image) -> Image.Image:
    """Convert from any mode; Pillow itself would cut 16-bit and float values off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGBA")
    values = np.asarray(image, np.float64)
    scaled = 255 * (values - values.min()) / max(np.ptp(values), 1e-9)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGBA")


def prepared(pixels: Floats, box: int, path: Path) -> NDArray[np.uint8]:
    """Prepare colours (height, width, 3) as MNIST was: (28, 28, 1), bright on black, scaled and centred.

    What differs from the paper, whose colour is the border's median, is cut out, scaled to `box` pixels along its
    longer side, and shifted by whole pixels so that its centre of mass comes to the middle.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = np.abs(pixels - np.median(border, axis=0)).max(-1)
    if ink.max() < BLANK:
        raise PictureError(f"{path} is blank.")
    ink = np.where(ink < FAINT * ink.max(), 0, ink)
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(box * length / max(ink.shape))) for length in ink.shape)
    scaled = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    scaled = scaled / scaled.max()
    top, left = (
        int(np.clip(round(CENTRE - scaled.sum(1 - axis) @ np.arange(length) / scaled.sum()), 0, SIDE - length))
        for axis, length in enumerate(scaled.shape)
    )
    canvas = np.zeros((SIDE, SIDE, 1), np.uint8)
    canvas[top : top + height, left : left + width, 0] = np.rint(255 * scaled)
    return canvas
