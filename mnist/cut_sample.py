"""Cut the carried sample out of the official files: `python -m mnist.cut_sample IDX_DIR`.

Of every class it takes 1,000 digits of the official training files and 200 of the official test files. They
are evenly spaced over all digits of that class, because the files are sorted by groups of writers, and keep
the order of the files.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from mnist.data import SAMPLE, directory, prepare
from mnist.idx import DataError, Digits, Splits, from_folder

PER_CLASS = {"train": 1000, "test": 200}


def cut(splits: Splits) -> Splits:
    """Return the sample of both splits."""
    return {name: stratified(splits[name], count) for name, count in PER_CLASS.items()}


def stratified(digits: Digits, per_class: int) -> Digits:
    """Return `per_class` digits of every class, evenly spaced, in their original order."""
    members = [np.flatnonzero(digits.labels == c) for c in range(10)]
    chosen = np.sort(np.concatenate([m[np.arange(per_class) * len(m) // per_class] for m in members]))
    return Digits(digits.images[chosen], digits.labels[chosen])


def main(idx_dir: str) -> None:
    """Replace the carried sample."""
    sample = cut(from_folder(Path(idx_dir)))
    shutil.rmtree(directory(SAMPLE), ignore_errors=True)
    prepare(sample, SAMPLE)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (DataError, TypeError) as problem:
        sys.exit(str(problem))
