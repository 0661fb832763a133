"""The report of a run: four pictures, and a page that shows them."""

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist.signals import cleaned

if TYPE_CHECKING:  # matplotlib is imported where it draws: a run that ends before its report does not wait for it
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]  # one row an epoch: epoch, step, and what was measured
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BINS = 15  # of confidence, as in Guo et al. 2017
TILES, COLUMNS = 40, 8  # mistakes shown, in all and side by side
RIGHT, WRONG, SHADE = "tab:blue", "tab:red", "0.75"


def write(
    folder: Path, history: History, images: Ints, labels: Ints, probabilities: Floats, class_names: Sequence[str]
) -> None:
    """Write the report into `folder`; each file appears there whole or not at all.

    `images` (N, 28, 28, 1) and `labels` (N,) are the test set's, `probabilities` (N, classes) the model's.
    """
    figures = {
        "curves": draw_curves(history),
        "confusion": draw_confusion(confusion(probabilities, labels), class_names),
        "gallery": draw_gallery(images, labels, probabilities, class_names),
        "calibration": draw_calibration(probabilities, labels),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with cleaned(), tempfile.TemporaryDirectory(dir=folder, prefix="incomplete.") as staging:
        for name, figure in figures.items():
            figure.savefig(Path(staging) / f"{name}.png")
        (Path(staging) / "README.md").write_text(
            page(history, labels, probabilities, list(figures)), encoding="utf-8"
        )
        for path in sorted(Path(staging).iterdir()):
            os.replace(path, folder / path.name)


def page(history: History, labels: Ints, probabilities: Floats, pictures: Sequence[str]) -> str:
    """Return the Markdown page: the final numbers, then the pictures."""
    rows = [
        f"| epochs | {len(history)} |",
        f"| test images | {len(labels):,} |",
        f"| accuracy | {accuracy(probabilities, labels):.2%} |",
        f"| loss | {negative_log_likelihood(probabilities, labels):.4f} |",
        f"| expected calibration error | {calibration_error(probabilities, labels):.2%} |",
    ]
    shown = [f"![{name}]({name}.png)" for name in pictures]
    return "\n\n".join(["# Report", "\n".join(["| | |", "|---|---:|", *rows]), *shown]) + "\n"


# ---- The numbers. ------------------------------------------------------------------------------------------------


def accuracy(probabilities: Floats, labels: Ints) -> float:
    """Return the share of examples whose most probable class is their label."""
    return float((probabilities.argmax(1) == labels).mean())


def negative_log_likelihood(probabilities: Floats, labels: Ints) -> float:
    """Return the mean of -log p(label); a probability that was rounded to 0 counts as the least float32."""
    likelihood = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(likelihood, np.finfo(np.float32).smallest_subnormal)).mean())


def confusion(probabilities: Floats, labels: Ints) -> NDArray[np.int64]:
    """Count the examples by label (rows) and most probable class (columns)."""
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def reliability(probabilities: Floats, labels: Ints) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return counts, accuracies and confidences in equal bins of the largest probability; 0 where a bin is empty."""
    confidence, right = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = (np.bincount(bins, weights, BINS) for weights in (right, confidence))
    accuracies, confidences = (total / np.maximum(counts, 1) for total in sums)
    return counts, accuracies, confidences


def calibration_error(probabilities: Floats, labels: Ints) -> float:
    """Return the mean distance between confidence and accuracy, `sum_b n_b |acc_b - conf_b| / N` over the bins."""
    counts, accuracies, confidences = reliability(probabilities, labels)
    return float(counts @ np.abs(accuracies - confidences) / counts.sum())


# ---- The pictures. -----------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13)
    return figure


def draw_curves(history: History) -> "Figure":
    """Draw every measured loss over the epochs, and every accuracy."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(9, 4, "")
    panels: Any = figure.subplots(1, 2)
    kinds: tuple[tuple[str, Callable[[float], float], str], ...] = (
        ("loss", float, "loss"),
        ("accuracy", lambda value: 100 * value, "accuracy, %"),
    )
    for axes, (kind, scaled, title) in zip(panels, kinds, strict=True):
        for name in [name for name in history[-1] if kind in name]:
            rows = [row for row in history if name in row]
            label = name.replace("_", " ").removesuffix(kind).strip() or kind
            epochs, values = [row["epoch"] for row in rows], [scaled(row[name]) for row in rows]
            color = WRONG if "train" in name else RIGHT
            (line,) = axes.plot(epochs, values, "o-", color=color, markersize=3, label=label)
            text = f"{values[-1]:.2f}" if kind == "accuracy" else f"{values[-1]:.4f}"
            axes.annotate(text, (epochs[-1], values[-1]), (5, -3), textcoords="offset points", color=line.get_color())
        axes.set(title=title, xlabel="epoch")
        axes.margins(x=0.14)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")  # 0.05, not 5 × 10⁻²
    panels[0].yaxis.set_minor_locator(NullLocator())
    return figure


def draw_confusion(counts: NDArray[np.int64], class_names: Sequence[str]) -> "Figure":
    """Draw the counts: mistakes shaded by how many there are, right answers plain."""
    mistakes = counts - np.diag(np.diag(counts))
    figure = new_figure(7.5, 7, f"{mistakes.sum():,} of {counts.sum():,} test images are mistaken for another class")
    axes: Any = figure.subplots()
    axes.imshow(np.where(mistakes, mistakes, np.nan), cmap="Reds", vmin=0, vmax=1.4 * max(1, mistakes.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count or row == column:
            style: dict[str, Any] = {"color": RIGHT} if row == column else {"fontweight": "bold"}
            axes.text(column, row, f"{count}", ha="center", va="center", **style)
    ticks = range(len(class_names))
    rates = np.diag(counts) / np.maximum(counts.sum(1), 1)
    rotation = 0 if max(map(len, class_names)) <= 3 else 45
    axes.set_xticks(ticks, class_names, rotation=rotation)
    axes.set_yticks(
        ticks, [f"{name}  {rate:6.1%}".replace(" ", "\u2007") for name, rate in zip(class_names, rates, strict=True)]
    )
    axes.set(xlabel="predicted", ylabel="label, and the share of it that is predicted rightly")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(0.5, len(class_names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(class_names) - 1), minor=True)
    axes.grid(which="minor", color="0.9")
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_color("0.9")
    return figure


def draw_gallery(images: Ints, labels: Ints, probabilities: Floats, class_names: Sequence[str]) -> "Figure":
    """Draw the mistakes, the most confident first."""
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    mistakes = np.flatnonzero(predicted != labels)
    shown = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:TILES]
    if not len(shown):
        return new_figure(7, 1, f"All {len(labels):,} test images are predicted rightly: there is no mistake to show")
    which = f"The {len(mistakes)} mistakes" if len(mistakes) <= TILES else f"{TILES} of {len(mistakes)} mistakes"
    rows = -(-len(shown) // COLUMNS)
    figure = new_figure(9, 0.6 + 1.4 * rows, f"{which}, the most confident first: predicted, not label, confidence")
    for axes, index in itertools.zip_longest(figure.subplots(rows, COLUMNS, squeeze=False).flat, shown.tolist()):
        axes.axis("off")
        if index is not None:
            names = f"{class_names[int(predicted[index])]}, not {class_names[int(labels[index])]}"
            axes.imshow(images[index, ..., 0], cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(f"{names}\n{confidence[index]:.1%}", fontsize=9)
    return figure


def draw_calibration(probabilities: Floats, labels: Ints) -> "Figure":
    """Draw how often the model is right against how sure it is, and how many predictions are that sure."""
    counts, accuracies, confidences = reliability(probabilities, labels)
    error = calibration_error(probabilities, labels)
    figure = new_figure(6, 6.5, f"Expected calibration error {error:.2%}")
    above: Any
    below: Any
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centres, filled = (np.arange(BINS) + 0.5) / BINS, counts > 0
    above.plot([0, 1], [0, 1], "--", color="0.4", zorder=3, label="as often right as sure")
    above.bar(centres[filled], accuracies[filled], 0.9 / BINS, color=RIGHT, alpha=0.8, label="accuracy")
    above.plot(confidences[filled], accuracies[filled], "o", color=WRONG, markersize=4, label="mean confidence")
    above.set(ylabel="accuracy", ylim=(0, 1.12), xlim=(0, 1))
    above.legend(frameon=False, loc="upper center", ncols=3)
    bars = below.bar(centres[filled], counts[filled], 0.9 / BINS, color=SHADE)
    below.bar_label(bars, [f"{count:,}" for count in counts[filled]], fontsize=8, padding=1)
    below.set_yscale("log")
    below.set(xlabel="confidence: the largest probability", ylabel="predictions", ylim=(0.5, 5 * counts.max()))
    for axes in above, below:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
