"""Pictures of a digit, made into images as MNIST's are."""

import os
import warnings
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.optimize import least_squares

from mnist.config import UserError
from mnist.data import sentence

Floats = NDArray[np.float32]

SIDE, CENTRE = 28, 14  # MNIST's images: their side, and the pixel in which the centre of mass lies
LARGEST = 1024  # pixels; a larger picture is made smaller first
RIM = 0.1  # of the sides; so much along the border is paper, most of it
BLANK = 0.1  # a picture with less contrast than this shows nothing
FAINT = 0.15  # of the contrast; less is the paper, or what JPEG makes of it
NOISE = 8  # times the lower quartile; less is noise
ENOUGH = 1000  # pixels for a fit
SPECK = 0.05  # of the largest part; less is dirt
DIGIT = 0.15  # of the picture's longer side; what is as long can be the digit


class PictureError(UserError):
    """What is wrong with a picture."""


def read(path: Path) -> Floats:
    """Decode a picture into colours (height, width, 3) in [0, 1]; transparent parts become paper."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise PictureError(f"{path} is no file but a pipe or a device, for which one could wait forever.")
    try:
        with warnings.catch_warnings():  # Pillow's, which mean nothing to who sees them
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = as_rgba(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise PictureError(f"There is no file {path}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise PictureError(f"{path} has more than {most:.0f} megapixels: make it smaller first.") from None
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

    The digit is cut out, scaled to `box` pixels along its longer side, and shifted by whole pixels so that its centre
    of mass comes to the middle.
    """
    ink = digit(ink_on_paper(pixels))
    if ink.max() < BLANK:
        raise PictureError(f"{path} is blank.")
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


def ink_on_paper(pixels: Floats) -> Floats:
    """Return how much each pixel (height, width) differs from the paper, as far as that is more than noise."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    # In even light a digit may take most of the rim, and in uneven light whatever else may take the border.
    papers = np.broadcast_to(np.median(border, axis=0), pixels.shape), surface(pixels)
    paper = min(papers, key=lambda paper: np.quantile(np.abs(pixels - paper).max(-1), 0.25))  # most is paper
    difference = pixels - paper
    if difference.sum() < 0:  # dark ink, which takes its share of the light
        difference /= np.maximum(paper.max(-1, keepdims=True), BLANK)
    ink = np.abs(difference).max(-1)
    return np.where(ink < max(FAINT * ink.max(), NOISE * np.quantile(ink, 0.25)), 0, ink)


def surface(pixels: Floats) -> Floats:
    """Fit a quadratic in the coordinates to each colour of the rim, since light may come from anywhere.

    What differs from it, ink and frames, has as little weight as in a median.
    """
    height, width, _ = pixels.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    rim = np.maximum(np.abs(x), np.abs(y)) > 1 - 2 * RIM
    step = -(-np.count_nonzero(rim) // ENOUGH)
    fits = [terms @ robust_fit(terms[rim][::step], color[rim][::step]) for color in np.moveaxis(pixels, -1, 0)]
    return np.stack(fits, -1).astype(np.float32).clip(0, 1)


def robust_fit(terms: NDArray[np.float64], values: Floats) -> NDArray[np.float64]:
    """Return the coefficients of terms (points, terms) with the least absolute deviations from values (points)."""

    def missing(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        return terms @ coefficients - values

    return least_squares(missing, np.zeros(terms.shape[1]), loss="soft_l1", f_scale=1 / 255).x


def digit(ink: Floats) -> Floats:
    """Return the ink without frames, without what the border cuts off, and without specks."""
    labels = np.zeros(ink.shape, np.int32)
    count = cast("int", ndimage.label(ink, np.ones((3, 3)), labels))
    if not count:
        return ink
    number = np.arange(1, count + 1)
    boxes = ndimage.find_objects(labels)
    mass = ndimage.sum_labels(ink, labels, number)
    length = np.array([max(side.stop - side.start for side in box) for box in boxes])
    outside = np.array(
        [
            any(side.start == 0 or side.stop == whole for side, whole in zip(box, ink.shape, strict=True))
            or is_frame(labels[box] == i)
            for i, box in zip(number, boxes, strict=True)
        ]
    )
    inside = ~outside & (length >= DIGIT * max(ink.shape))
    if inside.any():  # otherwise it is the digit that touches the border
        mass[outside] = 0
    return np.where(np.isin(labels, number[mass >= SPECK * mass.max()]), ink, 0)


def is_frame(part: NDArray[np.bool_]) -> bool:
    """Say whether a part of the ink, cut out, runs along all of its sides, and only there."""
    depth = -(-max(part.shape) // 20)
    sides = part[:depth].any(0), part[-depth:].any(0), part[:, :depth].any(1), part[:, -depth:].any(1)
    return part.mean() < 0.3 and min(side.mean() for side in sides) > 0.8
