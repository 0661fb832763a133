"""The worked example: its data, its determinism, and what it says when something is wrong."""

import errno
import gzip
import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")

import train_mnist
from mnist import data, idx
from mnist.cut_sample import PER_CLASS, stratified
from mnist.datasets import DATASETS, FASHION_MNIST, KMNIST, MNIST, Dataset
from mnist.idx import DataError, Digits, UnreachableError

ROOT = Path(__file__).parents[1]


def draw(count: int, seed: int) -> Digits:
    """Draw images of noise, with every class among the labels."""
    rng = np.random.default_rng(seed)
    return Digits(rng.integers(0, 256, (count, 28, 28, 1), np.uint8), np.arange(count, dtype=np.uint8) % 10)


@pytest.fixture(scope="module")
def splits() -> idx.Splits:
    return {"train": draw(200, 0), "test": draw(50, 1)}


@pytest.fixture(scope="module")
def files(splits: idx.Splits) -> dict[str, bytes]:
    """Return the contents of the four files, written by the format's definition."""
    contents = {}
    for split, prefix in idx.PREFIXES.items():
        images, labels = splits[split]
        contents[f"{prefix}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, len(images), 28, 28) + images.tobytes()
        contents[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, len(labels)) + labels.tobytes()
    return contents


@pytest.fixture(scope="module")
def tiny_mnist(files: dict[str, bytes]) -> Dataset:
    """Return MNIST's definition with the small files' checksums, and without a mirror."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return replace(MNIST, mirrors=(), sha256=sums)


@pytest.fixture
def idx_dir(files: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_mnist: Dataset) -> None:
    """Let the small files pass for the official ones, and the network be down."""
    monkeypatch.setitem(DATASETS, "mnist", tiny_mnist)


def same(a: idx.Splits, b: idx.Splits) -> bool:
    return all(np.array_equal(x, y) for split in a for x, y in zip(a[split], b[split], strict=True))


def remains(folder: Path) -> list[str]:
    """Name the files under `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Data


def test_prepared_data_equals_the_idx_files(splits, tiny_mnist, idx_dir, tmp_path):
    read = idx.from_folder(idx_dir, tiny_mnist)
    assert same(read, splits)
    data.prepare(read, tmp_path / "data")
    prepared = data.load(tmp_path / "data")
    assert same(prepared, splits)
    assert [a.dtype for digits in prepared.values() for a in digits] == [np.uint8] * 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mnist_idx"]


def test_idx_files_may_be_uncompressed(splits, tiny_mnist, files, idx_dir):
    (idx_dir / "train-images-idx3-ubyte.gz").unlink()
    (idx_dir / "train-images-idx3-ubyte").write_bytes(files["train-images-idx3-ubyte"])
    assert same(idx.from_folder(idx_dir, tiny_mnist), splits)


def test_prepared_data_is_used_before_the_network(splits, tiny_mnist, idx_dir, tmp_path):
    assert same(data.obtain(tmp_path / "data", idx_dir, tiny_mnist), splits)
    shutil.rmtree(idx_dir)
    assert same(data.obtain(tmp_path / "data", dataset=tiny_mnist), splits)


def test_the_sample_is_small_stratified_and_disjoint():
    sample = data.load(data.SAMPLE)
    assert {split: len(digits.labels) for split, digits in sample.items()} == {"train": 10_000, "test": 2_000}
    for split, (images, labels) in sample.items():
        assert images.shape[1:] == (28, 28, 1)
        assert np.bincount(labels).tolist() == [PER_CLASS[split]] * 10
    distinct = {image.tobytes() for digits in sample.values() for image in digits.images}
    assert len(distinct) == 12_000
    assert sum(path.stat().st_size for path in data.SAMPLE.rglob("*")) <= 4_000_000
    assert "CC BY-SA 3.0" in (data.SAMPLE / "README.md").read_text(encoding="utf-8")


def test_a_stratified_cut_keeps_order_and_class_counts(splits):
    cut = stratified(splits["train"], 7)
    assert np.bincount(cut.labels).tolist() == [7] * 10
    positions = [
        next(i for i, image in enumerate(splits["train"].images) if np.array_equal(image, chosen))
        for chosen in cut.images
    ]
    assert positions == sorted(positions)
    assert np.array_equal(splits["train"].labels[positions], cut.labels)


def test_data_are_named_for_a_person():
    whole = {"train": Digits(np.zeros(60_000), np.zeros(60_000)), "test": Digits(np.zeros(9), np.zeros(9))}
    assert idx.described(whole, KMNIST) == "all 60,000 training and 9 test images of Kuzushiji-MNIST"
    assert idx.described(data.load(data.SAMPLE)).startswith("a sample of 10,000 training and 2,000 test images of ")


def test_commands_of_readme_and_docs_with_other_data_or_flags_have_a_workdir_each():
    """So that they work one after the other, in the order in which they stand."""
    for page in "README.md", "docs/training-mnist.md":
        flags, places = {}, {}
        for line in re.findall(r"python train_mnist\.py( --[^`\n]*|)", (ROOT / page).read_text()):
            words = line.split()
            if "--help" in words or "--process-id" in words or "--epochs" in words:
                continue
            place = words[words.index("--workdir") + 1] if "--workdir" in words else None
            told = " ".join(word for word in words if word not in ("--workdir", place))
            assert places.setdefault(place, told) == told, (page, line)
            assert flags.setdefault(told, place) == place, (page, line)
        assert len(places) > 1


def test_without_an_answer_the_sample_is_used_and_said_so(tiny_mnist, capsys, tmp_path):
    chosen = data.obtain(tmp_path, dataset=tiny_mnist)
    assert len(chosen["train"].labels) == 10_000
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "network gives no answer" in out
    assert remains(tmp_path) == []


# Download


@pytest.fixture
def serve():
    """Return a function that serves {path: bytes} on the loopback interface, and its address."""
    servers = []

    def start(contents: dict[str, bytes]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = contents.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def zipped(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"/{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}


def test_a_good_download_is_accepted(serve, files, tiny_mnist, splits):
    assert same(idx.from_network(replace(tiny_mnist, mirrors=(serve(zipped(files)),))), splits)


def test_a_mirror_without_the_files_is_passed_over(serve, files, tiny_mnist, splits):
    mirrors = serve({}), serve(zipped(files))
    assert same(idx.from_network(replace(tiny_mnist, mirrors=mirrors)), splits)


DAMAGE = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "flipped": lambda raw: raw[:-12] + bytes([raw[-12] ^ 1]) + raw[-11:],
    "shorter": lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
    "captive portal": lambda raw: b"<html>Please log in</html>",
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupted_download_is_rejected(serve, files, tiny_mnist, damage, tmp_path):
    served = zipped(files)
    served["/train-images-idx3-ubyte.gz"] = damage(served["/train-images-idx3-ubyte.gz"])
    dataset = replace(tiny_mnist, mirrors=(serve(served), serve({})))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged") as caught:
        data.obtain(tmp_path, dataset=dataset)
    assert not isinstance(caught.value, UnreachableError)
    assert remains(tmp_path) == []


def test_a_damaged_mirror_is_followed_by_the_next(serve, files, tiny_mnist, splits):
    bad = serve(dict.fromkeys(zipped(files), b"nothing of the kind"))
    good = serve(zipped(files))
    for mirrors in (bad, good), (good, bad):
        assert same(idx.from_network(replace(tiny_mnist, mirrors=mirrors)), splits)


def test_a_silent_network_is_given_up_within_seconds(tiny_mnist):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        mirrors = (f"http://127.0.0.1:{silent.getsockname()[1]}/",)
        start = time.perf_counter()
        with pytest.raises(UnreachableError):
            idx.from_network(replace(tiny_mnist, mirrors=mirrors), patience=0.5)
        assert time.perf_counter() - start < 3


# The other data sets, whose checksums are those of the compressed files


@pytest.fixture(params=[FASHION_MNIST, KMNIST], ids=lambda dataset: dataset.name)
def tiny_other(request, files, monkeypatch) -> Dataset:
    """Return the data set's definition with the checksums of the small files, compressed, and without a mirror."""
    sums = {name[1:]: hashlib.sha256(raw).hexdigest() for name, raw in zipped(files).items()}
    dataset = replace(request.param, mirrors=(), sha256=sums)
    monkeypatch.setitem(DATASETS, dataset.name, dataset)
    return dataset


def test_every_data_set_names_ten_classes_and_four_checksums():
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert len(set(dataset.class_names)) == 10
        assert len({file.removesuffix(".gz") for file in dataset.sha256}) == 4
        assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in dataset.sha256.values())
        assert all(mirror.endswith("/") for mirror in dataset.mirrors)


def test_checksums_are_those_that_tfds_publishes():
    published = Path(data.tfds.__file__).parent / "url_checksums"
    for dataset in FASHION_MNIST, KMNIST:
        rows = [row.split("\t") for row in (published / f"{dataset.name}.txt").read_text().splitlines()]
        assert {name: checksum for _, _, checksum, name in rows} == dataset.sha256


def test_other_data_is_downloaded_prepared_and_loaded(tiny_other, serve, files, splits, tmp_path):
    served = replace(tiny_other, mirrors=(serve(zipped(files)),))
    assert same(data.obtain(tmp_path, dataset=served), splits)
    assert [path.name for path in tmp_path.iterdir()] == [f"{tiny_other.name}_idx"]
    assert same(data.obtain(tmp_path, dataset=tiny_other), splits)  # now without the network
    label = data.tfds.builder_from_directory(data.directory(tmp_path, tiny_other)).info.features["label"]
    assert tuple(label.names) == tiny_other.class_names


def test_other_data_comes_from_a_folder_too(tiny_other, idx_dir, splits, tmp_path):
    assert same(data.obtain(tmp_path / "data", idx_dir, tiny_other), splits)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_corrupted_other_data_is_rejected(tiny_other, serve, files, damage, tmp_path):
    served = zipped(files)
    served["/t10k-images-idx3-ubyte.gz"] = damage(served["/t10k-images-idx3-ubyte.gz"])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        data.obtain(tmp_path, dataset=replace(tiny_other, mirrors=(serve(served),)))
    assert remains(tmp_path) == []


def test_contents_without_a_checksum_are_not_accepted(tiny_other, files, idx_dir):
    name = "train-labels-idx1-ubyte"
    (idx_dir / f"{name}.gz").unlink()
    (idx_dir / name).write_bytes(files[name])
    with pytest.raises(DataError, match=rf"does not hold {name}\.gz\.$"):
        idx.from_folder(idx_dir, tiny_other)


def test_without_an_answer_other_data_is_not_replaced_by_the_sample(tiny_other, tmp_path, capsys):
    with pytest.raises(DataError, match=f"no sample of {tiny_other.title}: .*--idx-dir"):
        data.obtain(tmp_path, dataset=tiny_other)
    assert capsys.readouterr().out == ""


# Errors


def command(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = train_mnist.main([str(arg) for arg in args])
    return status, capsys.readouterr().err


def is_one_sentence(text: str) -> bool:
    return text.endswith(".\n") and text.count("\n") == 1 and "Traceback" not in text


def flip_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x55
    path.write_bytes(raw)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--colour", "red"], "Unrecognized options: --colour"),
        (["--epoch", "3"], "Unrecognized options: --epoch, 3; perhaps you meant --epochs; see --help."),
        (["train", "--workdi=x"], "; perhaps you meant --workdir; see --help."),
        (["evaluate", "--workdr", "x"], "; perhaps you meant --workdir; see --help."),
        (["predict", "x.png", "--workdr", "x"], "; perhaps you meant --workdir; see --help."),
        (["--epochs", "many"], "--epochs takes a whole number, not many; see --help."),
        (["--epochs", "a'b"], "--epochs takes a whole number, not a'b; see --help."),
        (["--seed", "1.5"], "--seed takes a whole number, not 1.5; see --help."),
        (["--learning-rate", "fast"], "--learning-rate takes a number, not fast; see --help."),
        (["--epochs"], "Missing value for argument '--epochs'"),
        (["--dtype", "float16"], "Expected one of ('float32', 'bfloat16'); see --help."),
        (["evalute"], "There is no command evalute, only train, evaluate, predict; see --help."),
        (["--workdir", __file__, "--data-dir", str(data.SAMPLE)], f"{__file__} is a file"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--batch-size", "20000", "--data-dir", str(data.SAMPLE)], "only 10000 training images"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data-dir", __file__], "is no directory"),
        (["--idx-dir", "/does/not/exist"], "/does/not/exist does not exist"),
    ],
)
def test_wrong_flags_get_one_sentence(flags, message, capsys):
    status, err = command(*flags, capsys=capsys)
    assert status != 0
    assert is_one_sentence(err)
    assert not re.search(r"[.,]; see|\{None\}|class", err)
    assert message in err


@pytest.mark.parametrize("width", ["30", "60", "200"])
def test_the_terminals_width_does_not_change_a_message(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    for flags, message in ((["--epochs", "x"], "--epochs takes a whole number, not x"), (["--epoch=3"], "--epochs;")):
        assert message in command(*flags, capsys=capsys)[1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [halve, flip_middle, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_damaged_idx_files_get_one_sentence(damage, name, idx_dir, tmp_path, capsys):
    damage(idx_dir / name)
    status, err = command("--idx-dir", idx_dir, "--data-dir", tmp_path / "data", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert name in err
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [halve, flip_middle, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    "name", ["mnist_idx-train.array_record-00000-of-00001", "dataset_info.json", "features.json"]
)
def test_damaged_prepared_data_get_one_sentence(damage, name, tmp_path, capsys):
    shutil.copytree(data.directory(data.SAMPLE), data.directory(tmp_path))
    path = data.directory(tmp_path) / name
    if damage is flip_middle and path.suffix == ".json":
        damage = halve  # one wrong letter of a description is no damage
    damage(path)
    status, err = command("--data-dir", tmp_path, capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert str(data.directory(tmp_path)) in err


@pytest.mark.usefixtures("small")
def test_a_full_disk_gets_one_sentence_and_leaves_nothing(idx_dir, tmp_path, capsys, monkeypatch):
    class FullDiskWriter(data.GroupedWriter):
        def write(self, path, examples):
            Path(path).write_bytes(b"the first part")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "GroupedWriter", FullDiskWriter)
    status, err = command("--idx-dir", idx_dir, "--data-dir", tmp_path / "data", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "No space left on device" in err
    assert remains(tmp_path / "data") == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_array_records_own_report_of_a_full_disk_is_caught(idx_dir, tmp_path, capsys, monkeypatch, small):
    class FullDiskWriter(data.GroupedWriter):
        def write(self, path, examples):
            Path(path).symlink_to("/dev/full")
            super().write(path, examples)

    monkeypatch.setattr(data, "GroupedWriter", FullDiskWriter)
    status, err = command("--idx-dir", idx_dir, "--data-dir", tmp_path / "data", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "cannot be written" in err
    assert remains(tmp_path / "data") == []


@pytest.mark.usefixtures("small")
def test_a_directory_that_cannot_be_written_gets_one_sentence(idx_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    status, err = command("--idx-dir", idx_dir, "--data-dir", tmp_path / "file" / "data", capsys=capsys)
    assert status == 1
    assert is_one_sentence(err)
    assert "Not a directory" in err


def test_killed_preparation_is_not_taken_for_whole(splits, tmp_path):
    """Kill a process in the middle of writing, as `kill -9` does; the next run does not see its leavings."""
    script = f"""
import os
from pathlib import Path
import numpy as np
from mnist import data, idx
digits = idx.Digits(np.zeros((9, 28, 28, 1), np.uint8), np.zeros(9, np.uint8))
class DyingWriter(data.GroupedWriter):
    def write(self, path, examples):
        super().write(path, examples)
        os.kill(os.getpid(), 9)
data.GroupedWriter = DyingWriter
data.prepare(dict(train=digits, test=digits), Path({str(tmp_path)!r}))
"""
    dead = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert dead.returncode == -9
    assert remains(tmp_path)  # so it did die in the middle
    assert not data.directory(tmp_path).exists()
    data.prepare(splits, tmp_path)
    assert same(data.load(tmp_path), splits)


def process(*flags: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as its own process, where `import tensorflow` would end it."""
    (folder / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported.')")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "train_mnist.py", *map(str, flags)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_fails_with_one_sentence_and_a_status(tmp_path):
    shutil.copytree(data.directory(data.SAMPLE), data.directory(tmp_path))
    halve(data.directory(tmp_path) / "mnist_idx-test.array_record-00000-of-00001")
    done = process("--data-dir", tmp_path, folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert is_one_sentence(done.stderr)


def test_a_process_trains_in_plain_lines_where_stdout_is_no_terminal(splits, tmp_path):
    data.prepare(splits, tmp_path)
    flags = {"--data-dir": tmp_path, "--workdir": tmp_path / "run", "--epochs": 2, "--batch-size": 20}
    done = process(*(word for pair in flags.items() for word in pair), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    size, configuration, first, second, final, where = done.stdout.splitlines()
    assert size == "data: a sample of 200 training and 50 test images of MNIST"
    assert configuration.startswith("configuration: dataset mnist, recipe default, dtype float32, seed 0, epochs 2, ")
    assert first.startswith("epoch  1/2   loss ")
    assert second.startswith("epoch  2/2   loss ")
    assert re.fullmatch(r"final test accuracy \d+\.\d\d%, over 9 views   parameters [0-9a-f]{16}", final)
    assert where == f"report in {tmp_path / 'run' / 'report'}"
