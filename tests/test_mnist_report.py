"""The report: its numbers against a second formulation, its pictures against what they must show, its files."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from mnist import report
from mnist.board import write_events

NAMES = tuple("abcdefghij")
HISTORY = [
    {"epoch": e, "step": 40 * e, "train_loss": 0.5**e, "test_loss": 0.6**e, "test_accuracy": 1 - 0.1 / e}
    for e in range(1, 5)
]


@pytest.fixture(scope="module")
def outcome():
    """Return images, labels and probabilities of a model that is often wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300).astype(np.uint8)
    logits = rng.normal(size=(300, 10))
    logits[np.arange(300), labels] += rng.gamma(2, 1.5, size=300)
    p = np.exp(logits)
    return rng.integers(0, 256, (300, 28, 28, 1), np.uint8), labels, (p / p.sum(1, keepdims=True)).astype(np.float32)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_numbers_equal_those_counted_one_by_one(outcome):
    _, labels, p = outcome
    counts = np.zeros((10, 10), int)
    bins = {}
    for label, row in zip(labels, p.astype(float), strict=True):
        guess = max(range(10), key=row.__getitem__)
        counts[label, guess] += 1
        bins.setdefault(min(int(row[guess] * 15), 14), []).append((row[guess], guess == label))
    error = sum(abs(sum(confidence - right for confidence, right in of_bin)) for of_bin in bins.values()) / 300
    assert np.array_equal(report.confusion(p, labels), counts)
    assert report.accuracy(p, labels) == pytest.approx(np.trace(counts) / 300)
    assert report.calibration_error(p, labels) == pytest.approx(error, rel=1e-12)
    assert error > 0.01


def test_the_loss_equals_torchs(outcome):
    torch = pytest.importorskip("torch")
    _, labels, p = outcome
    want = torch.nn.functional.nll_loss(torch.tensor(p).double().log(), torch.tensor(labels).long())
    assert report.negative_log_likelihood(p, labels) == pytest.approx(float(want), rel=1e-12)
    assert report.negative_log_likelihood(np.array([[1, 0]], np.float32), np.array([1])) == pytest.approx(
        103.28, rel=1e-4
    )


def test_a_calibration_known_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    assert report.calibration_error(p, np.array([0, 0, 0, 1, 1])) == pytest.approx((4 * 0.15 + 0.4) / 5)
    counts, accuracies, confidences = report.reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert (counts[-1], accuracies[-1], confidences[-1], counts.sum()) == (1, 1, 1, 1)


def test_the_report_is_four_pictures_and_a_page_that_shows_them(outcome, tmp_path):
    images, labels, p = outcome
    report.write(tmp_path / "report", HISTORY, images, labels, p, NAMES)
    names = ["calibration.png", "confusion.png", "curves.png", "gallery.png"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["README.md", *names]
    page = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((.*?)\)", page)) == names
    assert f"| accuracy | {(p.argmax(1) == labels).mean():.2%} |" in page
    for name in names:
        with Image.open(tmp_path / "report" / name) as picture:
            picture.load()
            assert min(picture.size) > 400
            assert len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_a_report_that_fails_leaves_the_former_one(outcome, tmp_path, monkeypatch):
    images, labels, p = outcome
    report.write(tmp_path, HISTORY, images, labels, p, NAMES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)  # the last to be made
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path, HISTORY[:2], images, labels, p[::-1], NAMES)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_curves_are_the_history():
    losses, accuracies = report.draw_curves(HISTORY).axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()) for line in losses.lines}
    assert drawn.keys() == {"train", "test"}
    assert np.allclose(drawn["train"], [(row["epoch"], row["train_loss"]) for row in HISTORY])
    assert np.allclose(accuracies.lines[0].get_ydata(), [100 * row["test_accuracy"] for row in HISTORY])


def test_the_confusion_matrix_shows_every_count(outcome):
    _, labels, p = outcome
    counts = report.confusion(p, labels)
    figure = report.draw_confusion(counts, NAMES)
    shown = {text.get_position(): int(text.get_text()) for text in figure.axes[0].texts}
    assert shown == {(c, r): n for (r, c), n in np.ndenumerate(counts) if n or r == c}
    shades = figure.axes[0].images[0].get_array().filled(0)
    assert np.array_equal(shades, counts * (1 - np.eye(10)))  # only the mistakes are shaded


def test_the_gallery_shows_the_mistakes_the_most_confident_first(outcome):
    images, labels, p = outcome
    mistakes = np.flatnonzero(p.argmax(1) != labels)
    assert len(mistakes) > report.TILES
    tiles = [axes for axes in report.draw_gallery(images, labels, p, NAMES).axes if axes.images]
    order = sorted(mistakes, key=lambda i: -p[i].max())[: report.TILES]
    assert len(tiles) == len(order)
    for tile, i in zip(tiles, order, strict=True):
        assert tile.get_title() == f"{NAMES[p[i].argmax()]}, not {NAMES[labels[i]]}\n{p[i].max():.1%}"
        assert np.array_equal(tile.images[0].get_array(), images[i, ..., 0])


@pytest.mark.parametrize("count", [1, 8, 9])
def test_the_gallery_of_few_mistakes_shows_them_all(outcome, count):
    images, labels, p = outcome
    chosen = [*np.flatnonzero(p.argmax(1) != labels)[:count], *np.flatnonzero(p.argmax(1) == labels)[:5]]
    figure = report.draw_gallery(images[chosen], labels[chosen], p[chosen], NAMES)
    assert len([axes for axes in figure.axes if axes.images]) == count


def test_without_a_mistake_the_report_says_so(outcome, tmp_path):
    images, labels, _ = outcome
    perfect = np.eye(10, dtype=np.float32)[labels]
    figure = report.draw_gallery(images, labels, perfect, NAMES)
    assert not figure.axes
    assert "there is no mistake to show" in figure.get_suptitle()
    report.write(tmp_path, HISTORY[:1], images, labels, perfect, NAMES)  # nor do the other pictures mind
    assert "| accuracy | 100.00% |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_calibration_diagram_shows_accuracies_and_counts(outcome):
    _, labels, p = outcome
    figure = report.draw_calibration(p, labels)
    counts, accuracies, _ = report.reliability(p, labels)
    above, below = figure.axes
    assert np.allclose([bar.get_height() for bar in above.patches], accuracies[counts > 0])
    assert [text.get_text() for text in below.texts] == [f"{count:,}" for count in counts if count]
    assert f"{report.calibration_error(p, labels):.2%}" in figure.get_suptitle()


# TensorBoard


def test_tensorboard_reads_every_epoch_once(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    path = tmp_path / "events.out.tfevents.metrics"
    write_events(path, HISTORY[:3])
    first = path.read_bytes()
    write_events(path, HISTORY[:2])  # as a run does that resumes before its last epoch
    write_events(path, HISTORY)
    assert path.read_bytes().startswith(first)
    read = {}
    for event in loader.LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            read.setdefault(value.tag, []).append((event.step, value.simple_value))
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert read.pop(name) == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in HISTORY]
    assert not read


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    write_events(tmp_path / "events", HISTORY)
    assert list(Path(tmp_path).iterdir()) == []
