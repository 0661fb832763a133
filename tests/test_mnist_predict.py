"""The commands on pictures: what is made of them against MNIST's own images, what is printed, what is refused."""

import json
import os
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import train_mnist
from mnist import data, pictures
from mnist.datasets import DATASETS, FASHION_MNIST, MNIST
from mnist.idx import Digits

DIGITS = data.load(data.SAMPLE)["test"]
CHOSEN = range(0, 2000, 40)  # fifty digits, five of each class or about as many


def render(image, path, size=28, dark_on_light=False, mode="L", margin=(0, 0), **options):
    """Write one of MNIST's images as a picture of a digit that is `size` pixels large, off the centre, on paper."""
    digit = Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
    ink = Image.new("L", (size + 2 * size // 3, size + size // 2))
    ink.paste(digit, margin)
    if mode == "RGBA":  # a dark digit on nothing
        picture = Image.merge("RGBA", (*(Image.new("L", ink.size, shade) for shade in (60, 10, 30)), ink))
    else:
        picture = (ink.point(lambda value: 255 - value) if dark_on_light else ink).convert(mode)
    picture.save(path, **options)
    return path


def prepared(path, box=20):
    return pictures.prepared(pictures.read(path), box, path)


def likeness(a, b):
    """Return the correlation of two images, up to a shift by one pixel: the rounding of a centre of mass."""
    shifted = (np.roll(a, shift, (0, 1)) for shift in np.ndindex(3, 3))
    wanted = np.roll(b, (1, 1), (0, 1))
    return max(np.corrcoef(image.ravel(), wanted.ravel())[0, 1] for image in shifted)


VARIANTS = {
    "28.png": {"dark_on_light": True, "margin": (7, 11)},
    "28.jpg": {"mode": "RGB", "dark_on_light": True, "margin": (3, 0)},
    "60.jpg": {"size": 60, "margin": (40, 30)},
    "100.png": {"size": 100, "mode": "RGB", "dark_on_light": True},
    "150.png": {"size": 150, "mode": "RGBA", "margin": (0, 70)},
    "300.jpg": {"size": 300, "mode": "RGB", "margin": (150, 50), "quality": 60},
}


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_picture_of_an_mnist_digit_becomes_that_digit_again(name, tmp_path):
    likenesses = [
        likeness(prepared(render(DIGITS.images[i], tmp_path / name, **VARIANTS[name])), DIGITS.images[i])
        for i in CHOSEN
    ]
    assert np.median(likenesses) > 0.96
    assert np.quantile(likenesses, 0.1) > 0.9


def test_an_mnist_digit_without_faint_pixels_stays_as_it_is(tmp_path):
    count = 0
    for i in CHOSEN:
        image = np.where(DIGITS.images[i] > 40, DIGITS.images[i], 0)
        rows, columns = (np.flatnonzero(image.any((axis, 2))) for axis in (1, 0))
        whole = ndimage.label(image, np.ones((3, 3, 3)))[1] == 1  # no speck, which would be left out
        if whole and max(np.ptp(rows), np.ptp(columns)) == 19 and image.max() == 255:  # it still is 20 pixels long
            got = prepared(render(image, tmp_path / "same.png", margin=(5, 2)))
            count += 1
            shifts = {
                int(np.abs(np.roll(got, (i - 1, j - 1), (0, 1)) - image.astype(int)).max())
                for i, j in np.ndindex(3, 3)
            }
            assert min(shifts) <= 1  # grey levels
    assert count > 10


@pytest.mark.parametrize("box", [20, 28])
def test_the_digit_is_in_its_box_and_its_mass_in_the_middle(box, tmp_path):
    for i in CHOSEN:
        image = prepared(render(DIGITS.images[i], tmp_path / "x.png", 90, True, margin=(0, 40)), box)[..., 0]
        assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        assert box - 2 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= box
        if box == 20:
            centre = [image.sum(1 - axis) @ np.arange(28) / image.sum() for axis in (0, 1)]
            assert np.abs(np.subtract(centre, 14)).max() < 0.51


def test_where_how_large_and_which_way_round_do_not_matter(tmp_path):
    image = DIGITS.images[7]
    want = prepared(render(image, tmp_path / "a.png", 56))
    for options in ({"margin": (20, 9)}, {"dark_on_light": True}, {"mode": "RGB"}, {"mode": "LA"}, {"mode": "P"}):
        got = prepared(render(image, tmp_path / "b.png", 56, **options))
        assert np.abs(got.astype(int) - want).max() <= 1
    large, larger = (prepared(render(image, tmp_path / "c.png", size)) for size in (400, 1600))
    assert likeness(large, larger) > 0.98


def test_sixteen_bits_black_and_white_and_colours_are_understood(tmp_path):
    grey = np.asarray(Image.open(render(DIGITS.images[3], tmp_path / "a.png", 56)))
    want = prepared(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    assert np.abs(prepared(tmp_path / "b.png").astype(int) - want).max() <= 2
    Image.fromarray(grey > 127).save(tmp_path / "c.png")
    assert likeness(prepared(tmp_path / "c.png"), want) > 0.9
    weight = grey[..., None] / 255  # green on a red that is as bright
    colored = weight * [0, 130, 0] + (1 - weight) * [255, 0, 0]
    Image.fromarray(np.rint(colored).astype(np.uint8)).save(tmp_path / "d.png")
    assert np.abs(prepared(tmp_path / "d.png").astype(int) - want).max() <= 2
    shade = Image.new("L", grey.T.shape, 250)  # a light digit on nothing
    Image.merge("RGBA", (shade, shade, shade, Image.fromarray(grey))).save(tmp_path / "e.png")
    assert np.abs(prepared(tmp_path / "e.png").astype(int) - want).max() <= 2


def test_a_picture_that_lies_on_its_side_is_turned_as_its_exif_says(tmp_path):
    picture = Image.open(render(DIGITS.images[4], tmp_path / "up.png", 80, True))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise is needed
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.jpg", exif=exif, quality=95)
    assert likeness(prepared(tmp_path / "side.jpg"), prepared(tmp_path / "up.png")) > 0.99


def photograph(name, i):
    """Return one of MNIST's images as a dark digit (height, width) on paper in [0, 1], under bad conditions."""
    rng = np.random.default_rng(i)
    digit = np.asarray(Image.fromarray(DIGITS.images[i][..., 0]).resize((84, 84), Image.Resampling.BICUBIC)) / 255
    if name == "tight":
        return 0.95 - 0.85 * digit[np.ix_(*((digit > 0.2).any(axis) for axis in (1, 0)))]
    ink = np.zeros((126, 140))
    top, left = rng.integers(10, 32), rng.integers(10, 46)
    ink[top : top + 84, left : left + 84] = digit
    if "frame" in name:
        inset, width = int(name.split()[-1]), 2
        inner = slice(inset + width, -inset - width)
        framed = np.pad(np.zeros_like(ink[inner, inner]), width, constant_values=1.0)
        ink = np.maximum(ink, np.pad(framed, inset))
    y, x = np.mgrid[-1:1:126j, -1:1:140j]
    angle, light = rng.uniform(0, 2 * np.pi), 1.0
    if "sun" in name:
        light = 0.65 + 0.35 * (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)
    if "lamp" in name:
        light = 1 - 0.2 * ((x - np.cos(angle) / 2) ** 2 + (y - np.sin(angle) / 2) ** 2)
    noise = rng.normal(0, 0.05, ink.shape) if "noise" in name else 0.0
    if "neighbour" in name:
        ink[-14:] = np.maximum(ink[-14:], np.pad(digit[20:34], ((0, 0), (28, 28))))  # a digit that is cut off
    return (0.95 - 0.85 * ink) * light + noise


CONDITIONS = ["sun", "lamp", "frame 5", "frame 0", "noise", "tight", "neighbour", "sun, noise, frame 4"]


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_photograph_of_an_mnist_digit_becomes_that_digit_again(name, tmp_path):
    likenesses = []
    for i in CHOSEN[::2]:
        grey = np.rint(255 * photograph(name, i).clip(0, 1)).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "x.jpg", quality=90)
        likenesses.append(likeness(prepared(tmp_path / "x.jpg"), DIGITS.images[i]))
    assert np.median(likenesses) > 0.94
    assert np.quantile(likenesses, 0.1) > 0.85


# With a network that a run has trained


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Train on the sample, by the command; return the workdir, and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--data-dir", data.SAMPLE, "--workdir", folder, "--epochs", 3, "--batch-size", 100]
    with redirect_stdout(StringIO()) as out:
        assert train_mnist.main(list(map(str, flags))) == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def workdir(training):
    return training[0]


def command(*args, capsys):
    capsys.readouterr()
    status = train_mnist.main(list(map(str, args)))
    return status, *capsys.readouterr()


def test_evaluate_prints_what_training_ended_with(training, capsys):
    workdir, printed = training
    accuracy = re.search(r"final test accuracy (\S+), over 9 views", printed)[1]
    status, out, err = command("evaluate", "--workdir", workdir, capsys=capsys)
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"2,000 test images   accuracy {accuracy}   loss 0\.\d{{4}}", out.splitlines()[-1])
    assert f"| accuracy | {accuracy} |" in (workdir / "report" / "README.md").read_text()
    assert float(accuracy.rstrip("%")) > 97


def evaluate_after(change, workdir, copy, capsys):
    """Evaluate a copy of a run whose configuration has been changed."""
    shutil.copytree(workdir, copy)
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(stored | change))
    return command("evaluate", "--workdir", copy, capsys=capsys)


@pytest.mark.more
def test_evaluate_takes_the_data_that_the_run_was_trained_on(workdir, tmp_path, capsys):
    """Though other data are prepared now."""
    data.prepare({"train": draw(60, 0), "test": draw(50, 1)}, tmp_path / "data")
    now = {"data_dir": str(tmp_path / "data")}
    status, out, err = evaluate_after(now, workdir, tmp_path / "a", capsys)
    assert (status, err) == (0, "")
    data_line, scores = out.splitlines()
    assert data_line == "data: a sample of 10,000 training and 2,000 test images of MNIST"
    assert scores.startswith("2,000 test images ")
    was = "a sample of 70 training and 50 test images of MNIST (0123456789abcdef)"
    status, out, err = evaluate_after(now | {"data": was}, workdir, tmp_path / "b", capsys)
    assert (status, out) == (1, "")
    assert is_one_sentence(err)
    assert f"was trained on {was}, but what is found now is a sample of 60 training and 50 test" in err


def draw(count, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28, 1), np.uint8)
    return Digits(images, np.arange(count, dtype=np.uint8) % 10)


def test_the_run_leaves_a_report(workdir):
    assert len(list((workdir / "report").glob("*.png"))) == 4


LINE = r"(.*): (\d)   \((\d) (\d+\.\d\d)%, (\d) (\d+\.\d\d)%, (\d) (\d+\.\d\d)%\)"


def predictions(workdir, paths, capsys):
    status, out, err = command("predict", "--workdir", workdir, *paths, capsys=capsys)
    assert (status, err) == (0, "")
    lines = [re.fullmatch(LINE, line) for line in out.splitlines()]
    assert [line[1] for line in lines] == list(map(str, paths))
    for line in lines:
        assert line[2] == line[3]
        assert float(line[4]) + float(line[6]) + float(line[8]) <= 100.02
        assert float(line[4]) >= float(line[6]) >= float(line[8])
    return [int(line[2]) for line in lines]


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("name", VARIANTS)
def test_pictures_of_test_digits_are_recognised(name, workdir, tmp_path, capsys):
    paths = [render(DIGITS.images[i], tmp_path / f"{i}-{name}", **VARIANTS[name]) for i in CHOSEN]
    guesses = predictions(workdir, paths, capsys)
    assert np.mean(guesses == DIGITS.labels[list(CHOSEN)]) >= 0.9


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Oblique.ttf"])
def test_printed_digits_are_recognised(font, workdir, tmp_path, capsys):
    paths = [tmp_path / f"{digit}.png" for digit in range(10)]
    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font), 60)
    for digit, path in enumerate(paths):
        picture = Image.new("RGB", (120, 90), "ivory")
        ImageDraw.Draw(picture).text((50, 10), str(digit), fill="navy", font=face)
        picture.save(path)
    assert np.sum(predictions(workdir, paths, capsys) == np.arange(10)) >= 8


def test_class_names_are_those_of_the_data_set(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**stored, "dataset": "fashion_mnist"}))
    path = render(DIGITS.images[0], tmp_path / "x.png")
    status, out, _ = command("predict", "--workdir", tmp_path / "run", path, capsys=capsys)
    assert status == 0
    assert any(f"{path}: {name}   ({name} " in out for name in FASHION_MNIST.class_names)


# What is refused


def is_one_sentence(text):
    return text.endswith(".\n") and text.count("\n") == 1 and "Traceback" not in text


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_text("no picture at all")


def whiten(path):
    Image.new("RGB", (40, 40), "white").save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "There is no file "),
        (cut, "is no picture that can be read"),
        (overwrite, "is no picture that can be read"),
        (whiten, "is blank"),
        (lambda path: path.write_bytes(b""), "is no picture that can be read"),
        (lambda path: (path.unlink(), path.mkdir()), "is no picture that can be read: Is a directory"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no file but a pipe"),
        (lambda path: Image.new("1", (11000, 11000)).save(path), "has more than 89 megapixels"),
    ],
)
def test_what_is_no_picture_gets_one_sentence(spoil, message, workdir, tmp_path, capsys):
    """And the others are predicted."""
    good, bad = (render(DIGITS.images[0], tmp_path / name, 200) for name in ("good.png", "bad.png"))
    spoil(bad)
    status, out, err = command("predict", "--workdir", workdir, bad, good, capsys=capsys)
    assert status == 1
    assert out.startswith(f"{good}: 7 ")
    assert out.count("\n") == 1
    assert is_one_sentence(err)
    assert message in err
    assert str(bad) in err


def test_each_bad_picture_gets_its_own_sentence(workdir, tmp_path, capsys):
    bad = [tmp_path / name for name in ("a.png", "b.png")]
    status, out, err = command("predict", "--workdir", workdir, *bad, capsys=capsys)
    assert (status, out) == (1, "")
    assert err == "".join(f"There is no file {path}.\n" for path in bad)


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_damaged_pictures_never_end_in_a_traceback(name, tmp_path):
    raw = render(DIGITS.images[0], tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(200):
        damaged = bytearray(raw)
        for position in rng.integers(len(raw), size=3):
            damaged[position] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            prepared(tmp_path / name)
        except pictures.PictureError as error:
            refused.append(f"{error}\n")
    assert len(refused) > 20
    assert all(map(is_one_sentence, refused))


@pytest.mark.parametrize("args", [["evaluate"], ["predict", "x.png"]])
def test_a_missing_or_empty_workdir_gets_one_sentence(args, workdir, tmp_path, capsys):
    render(DIGITS.images[0], tmp_path / "x.png")
    args = [tmp_path / arg if arg == "x.png" else arg for arg in args]
    status, _, err = command(*args, "--workdir", tmp_path / "nowhere", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "holds no run" in err
    (tmp_path / "begun").mkdir()
    shutil.copy(workdir / "config.json", tmp_path / "begun")
    status, _, err = command(*args, "--workdir", tmp_path / "begun", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "checkpoint" in err


def test_predict_needs_a_picture(workdir, capsys):
    status, _, err = command("predict", "--workdir", workdir, capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)


# Help


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], ["--workdir", "--dataset", "evaluate", "predict"]),
        (["train", "--help"], ["--workdir", "--dataset"]),
        (["evaluate", "--help"], ["--workdir", "newest whole checkpoint"]),
        (["predict", "--help"], ["--workdir", "IMAGE...", "PNG or JPEG"]),
    ],
)
def test_help_names_what_there_is(args, shown, capsys):
    with pytest.raises(SystemExit) as stop:
        train_mnist.main(args)
    assert not stop.value.code
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in shown)


def test_an_unknown_command_gets_one_sentence(capsys):
    status, _, err = command("prdict", "x.png", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "prdict" in err


def test_boxes_are_within_the_image():
    assert {dataset.box for dataset in DATASETS.values()} <= set(range(1, pictures.SIDE + 1))
    assert MNIST.box == 20
