"""The four official files of a data set: how they are found, checked, and turned into arrays."""

import gzip
import hashlib
import http.client
import queue
import struct
import threading
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist.config import UserError
from mnist.datasets import MNIST, Dataset

PREFIXES = {"train": "train", "test": "t10k"}
ALL = 60_000  # training images in the official files of each data set
LONGEST = 64 << 20  # bytes; no official file, compressed or not, is longer
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # urllib's own errors are OSErrors


class DataError(UserError):
    """What is wrong with the data."""


class UnreachableError(DataError):
    """No server gave an answer."""


class Digits(NamedTuple):
    """Images (N, 28, 28, 1) and their labels (N,), both uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


Splits = dict[str, Digits]  # "train" and "test"


def from_folder(folder: Path, dataset: Dataset = MNIST) -> Splits:
    """Read the four files from a local folder: gzip-compressed, or not where the contents' checksum is known."""
    if not folder.is_dir():
        raise DataError(f"The IDX folder {folder} does not exist or is no folder.")

    def read(name: str) -> bytes:
        names = [known for known in (name, f"{name}.gz") if known in dataset.sha256 or known.endswith(".gz")]
        path = next((folder / known for known in names if (folder / known).is_file()), None)
        if path is None:
            raise DataError(f"The IDX folder {folder} does not hold {' or '.join(names)}.")
        try:
            return checked(path.read_bytes(), name, dataset, str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error

    return decode(read)


def from_network(dataset: Dataset = MNIST, patience: float = 4.0) -> Splits:
    """Download the four files into memory from the first mirror that answers within `patience` seconds."""
    failure: DataError = UnreachableError("The network gives no answer.")
    for mirror in answering(dataset.mirrors, f"{PREFIXES['test']}-labels-idx1-ubyte.gz", patience):
        print(f"Downloading {dataset.title} from {mirror}", flush=True)
        try:
            return decode(lambda name, mirror=mirror: fetch(f"{mirror}{name}.gz", name, dataset))
        except UnreachableError:
            continue
        except DataError as error:
            failure = error
    raise failure


def answering(mirrors: tuple[str, ...], name: str, patience: float) -> list[str]:
    """Return the mirror that first delivers the file `name`, then the others; nothing if none does in time.

    The probes run in daemon threads, because no timeout of a socket covers a name look-up that hangs.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def probe(mirror: str) -> None:
        try:
            with urllib.request.urlopen(mirror + name, timeout=patience):
                answers.put(mirror)
        except NETWORK_ERRORS:
            answers.put(None)

    for mirror in mirrors:
        threading.Thread(target=probe, args=(mirror,), daemon=True).start()
    try:
        first = next((mirror for _ in mirrors if (mirror := answers.get(timeout=patience))), None)
    except queue.Empty:
        return []
    return [] if first is None else [first, *(mirror for mirror in mirrors if mirror != first)]


def fetch(url: str, name: str, dataset: Dataset, timeout: float = 15.0) -> bytes:
    """Download one file and return its checked, uncompressed contents."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            raw: bytes = response.read(LONGEST)
    except NETWORK_ERRORS as error:
        raise UnreachableError(f"{url} cannot be downloaded: {error}.") from error
    return checked(raw, name, dataset, url)


def checked(raw: bytes, name: str, dataset: Dataset, origin: str) -> bytes:
    """Uncompress `raw` if need be, and insist that it is the official file `name`."""
    try:
        content = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is damaged: it does not uncompress ({error}).") from error
    what, known, expected = "its contents do", content, dataset.sha256.get(name)
    if expected is None:
        what, known, expected = "it does", raw, dataset.sha256[f"{name}.gz"]
    if hashlib.sha256(known).hexdigest() != expected:
        raise DataError(f"{origin} is damaged: {what} not have the checksum of the official file.")
    return content


def decode(read: Callable[[str], bytes]) -> Splits:
    """Build both splits from the uncompressed contents that `read` returns for each file's name."""

    def split(prefix: str) -> Digits:
        images, labels = (parse(read(f"{prefix}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        return Digits(images[..., None], labels)

    return {name: split(prefix) for name, prefix in PREFIXES.items()}


def described(splits: Splits, dataset: Dataset = MNIST) -> str:
    """Name the data for a person: the official files are whole, or this is a sample of them."""
    train, test = (len(splits[name].labels) for name in PREFIXES)
    return (
        f"{'all' if train == ALL else 'a sample of'} {train:,} training and {test:,} test images of {dataset.title}"
    )


def parse(content: bytes) -> NDArray[np.uint8]:
    """Turn the bytes of an IDX file of unsigned bytes into an array."""
    rank = content[3]  # the fourth byte of the magic number; the third, 8, says unsigned bytes
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
