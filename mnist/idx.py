"""The four official MNIST files: where they lie, how they are checked, and how they become arrays."""

import gzip
import hashlib
import http.client
import queue
import struct
import threading
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Of the uncompressed bytes: gzip headers differ between copies, the contents do not.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
PREFIXES = {"train": "train", "test": "t10k"}
LONGEST = 64 << 20  # bytes; no official file, compressed or not, is longer
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # urllib's own errors are OSErrors


class DataError(Exception):
    """What is wrong with the data, in one sentence for the person at the terminal."""


class UnreachableError(DataError):
    """No server gave an answer."""


class Digits(NamedTuple):
    """Images (N, 28, 28, 1) and their labels (N,), both uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


Splits = dict[str, Digits]  # "train" and "test"


def from_folder(folder: Path, sha256: Mapping[str, str] = SHA256) -> Splits:
    """Read the four files, gzip-compressed or not, from a local folder."""
    if not folder.is_dir():
        raise DataError(f"The IDX folder {folder} does not exist or is no folder.")

    def read(name: str) -> bytes:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if path is None:
            raise DataError(f"The IDX folder {folder} holds neither {name} nor {name}.gz.")
        try:
            return checked(path.read_bytes(), sha256[name], str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error

    return decode(read)


def from_network(
    mirrors: Sequence[str] = MIRRORS, sha256: Mapping[str, str] = SHA256, patience: float = 4.0
) -> Splits:
    """Download the four files into memory from the first mirror that answers within `patience` seconds."""
    failure: DataError = UnreachableError("The network gives no answer.")
    for mirror in answering(mirrors, f"{list(sha256)[-1]}.gz", patience):
        print(f"Downloading MNIST from {mirror}", flush=True)
        try:
            return decode(lambda name, mirror=mirror: fetch(f"{mirror}{name}.gz", sha256[name]))
        except UnreachableError:
            continue
        except DataError as error:
            failure = error
    raise failure


def answering(mirrors: Sequence[str], name: str, patience: float) -> list[str]:
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


def fetch(url: str, sha256: str, timeout: float = 15.0) -> bytes:
    """Download one file and return its checked, uncompressed contents."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            raw: bytes = response.read(LONGEST)
    except NETWORK_ERRORS as error:
        raise UnreachableError(f"{url} cannot be downloaded: {error}.") from error
    return checked(raw, sha256, url)


def checked(raw: bytes, sha256: str, origin: str) -> bytes:
    """Uncompress `raw` if need be, and insist that it is the official file."""
    try:
        content = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is damaged: it does not uncompress ({error}).") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{origin} is damaged: its contents do not have the checksum of the official file.")
    return content


def decode(read: Callable[[str], bytes]) -> Splits:
    """Build both splits from the uncompressed contents that `read` returns for each file's name."""

    def split(prefix: str) -> Digits:
        images, labels = (parse(read(f"{prefix}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        return Digits(images[..., None], labels)

    return {name: split(prefix) for name, prefix in PREFIXES.items()}


def parse(content: bytes) -> NDArray[np.uint8]:
    """Turn the bytes of an IDX file of unsigned bytes into an array."""
    rank = content[3]  # the fourth byte of the magic number; the third, 8, says unsigned bytes
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
