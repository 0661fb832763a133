"""MNIST and its like through TensorFlow Datasets, with a builder of our own that needs no TensorFlow."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.writer import ExampleWriter

from mnist.datasets import MNIST, Dataset
from mnist.disk import refusal
from mnist.idx import DataError, Digits, Splits, UnreachableError, from_folder, from_network
from mnist.signals import cleaned

SAMPLE = Path(__file__).parent / "sample"  # a data directory that the repository carries

# Silence TFDS's notes, and array_record's "error" that groups of examples are slow to read one by one.
logging.set_verbosity(logging.FATAL)
tfds.disable_progress_bar()


class GroupedWriter(ExampleWriter):
    """Writes array_record files whose examples are compressed together, which makes them twice as small."""

    def write(self, path: str | os.PathLike[str], examples: Iterable[tuple[Any, bytes]]) -> None:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1000,brotli:9")
        for _, example in examples:
            writer.write(example)
        writer.close()


class IdxBuilder(tfds.core.GeneratorBasedBuilder):
    """28×28 grey-level pixels and their class, prepared from arrays in the order of the official files."""

    name = "idx"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, dataset: Dataset, splits: Splits | None = None, **kwargs: Any) -> None:
        self.name = f"{dataset.name}_idx"  # pyright: ignore[reportAttributeAccessIssue]
        self._dataset = dataset
        self._splits = splits
        super().__init__(file_format=FileFormat.ARRAY_RECORD, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._dataset.title,
            homepage=self._dataset.homepage,
            license=self._dataset.license,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="bytes"),
                    "label": tfds.features.ClassLabel(names=self._dataset.class_names),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _example_writer(self) -> GroupedWriter:
        return GroupedWriter(FileFormat.ARRAY_RECORD)

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        return {name: self._generate_examples(digits) for name, digits in (self._splits or {}).items()}

    def _generate_examples(self, digits: Digits) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (image, label) in enumerate(zip(*digits, strict=True)):
            yield key, {"image": image, "label": int(label)}


def obtain(data_dir: Path, idx_dir: Path | None = None, dataset: Dataset = MNIST) -> Splits:
    """Return the data: from `idx_dir` if given, else as prepared, else downloaded, else MNIST's carried sample."""
    if idx_dir is not None:
        return keep(from_folder(idx_dir, dataset), data_dir, dataset)
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"The data directory {data_dir} is no directory.")
    if directory(data_dir, dataset).exists():
        return load(data_dir, dataset)
    try:
        return keep(from_network(dataset), data_dir, dataset)
    except UnreachableError as error:
        if not directory(SAMPLE, dataset).exists():
            raise DataError(
                f"The network gives no answer, and the repository carries no sample of {dataset.title}: "
                "download its four files elsewhere and name their folder with --idx-dir."
            ) from error
        print(
            "The network gives no answer, so this takes the carried sample of MNIST: "
            "10,000 training and 2,000 test digits.",
            flush=True,
        )
        return load(SAMPLE, dataset)


def keep(splits: Splits, data_dir: Path, dataset: Dataset) -> Splits:
    """Prepare the data set for the next run unless it is prepared already."""
    if not directory(data_dir, dataset).exists():
        print(f"Preparing the data set under {data_dir}", flush=True)
        prepare(splits, data_dir, dataset)
    return splits


def directory(data_dir: Path, dataset: Dataset = MNIST) -> Path:
    """Return where TensorFlow Datasets keeps the data set under `data_dir`."""
    return data_dir / f"{dataset.name}_idx" / str(IdxBuilder.VERSION)


def prepare(splits: Splits, data_dir: Path, dataset: Dataset = MNIST) -> None:
    """Write the data set under `data_dir`: it appears there whole and verified, or not at all."""
    target = directory(data_dir, dataset)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with cleaned(), tempfile.TemporaryDirectory(dir=data_dir, prefix="incomplete.") as staging:
            with redirect_stdout(StringIO()):  # TFDS announces the staging directory as if it were the result
                IdxBuilder(dataset, splits, data_dir=staging).download_and_prepare()
            if not same(splits, load(Path(staging), dataset)):
                raise DataError(f"What was written under {data_dir} reads back differently.")
            target.parent.mkdir(exist_ok=True)
            if not target.exists():  # as it does if another process was faster
                directory(Path(staging), dataset).rename(target)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError, on a full disk say
        raise DataError(f"The data set cannot be written under {data_dir}: {refusal(error, data_dir)}.") from error


def load(data_dir: Path, dataset: Dataset = MNIST) -> Splits:
    """Read the prepared data set under `data_dir`."""
    source = directory(data_dir, dataset)
    try:
        sources: Any = tfds.builder_from_directory(source).as_data_source()
        return {split: read(sources[split]) for split in ("train", "test")}
    except Exception as error:  # JSON, protobuf, array_record and TFDS each raise their own on damaged files
        raise DataError(
            f"The prepared data set {source} is damaged, delete it to have it prepared anew: {sentence(error)}."
        ) from error


def read(source: Any) -> Digits:
    """Read a whole split into arrays."""
    examples = source.__getitems__(range(len(source)))
    images = np.stack([example["image"] for example in examples])
    return Digits(images, np.array([example["label"] for example in examples], np.uint8))


def same(a: Splits, b: Splits) -> bool:
    return all(np.array_equal(x, y) for split in a for x, y in zip(a[split], b[split], strict=True))


def sentence(error: Exception) -> str:
    """Return the error's reason on one line, without the full stop."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()).rstrip(".") or type(error).__name__
