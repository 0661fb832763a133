"""The folder of a run: what it was told, and its metrics; the checkpoints have a file of their own.

    WORKDIR/config.json      what decides the result
    WORKDIR/machines.txt     what it was trained on, one line for each that was another
    WORKDIR/metrics.jsonl    one line an epoch, without anything that depends on the clock
    WORKDIR/tensorboard/     the same for TensorBoard, if that is installed
    WORKDIR/checkpoints/N/   everything that the run knew after step N
    WORKDIR/.lock            held by the process that trains

All but TensorBoard's appear whole or not at all, so a kill costs no more than the work since the last checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
from filelock import FileLock, Timeout

from mnist.board import write_events
from mnist.config import Config, ConfigError, UserError
from mnist.datasets import DATASETS
from mnist.devices import is_main
from mnist.disk import refusal
from mnist.idx import Splits, described

Tree = Any  # of arrays or numbers
Row = dict[str, int | float]  # of the metrics
History = list[Row]

PLACES = ("data_dir", "idx_dir")  # decide nothing: what lies there is hashed
CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Config).items() if get_origin(hint) is Literal}


class WorkdirError(UserError):
    """What is wrong with what an earlier run left."""


class NotFiniteError(UserError):
    """The loss or a parameter became infinite or NaN."""

    def __init__(self, what: str, step: int, workdir: Path) -> None:
        super().__init__(
            f"{what} is not finite at step {step:,}, so nothing newer than the last good checkpoint is kept in "
            f"{workdir}; a lower --learning-rate, with another --workdir, may help."
        )


class StoppedError(UserError):
    """A signal ended the run before its time."""

    def __init__(self, signal: int, step: int, workdir: Path) -> None:
        super().__init__(f"Stopped after step {step:,}, which {workdir} keeps: the same command goes on from there.")
        self.status = 128 + signal


@contextmanager
def alone(workdir: Path) -> Generator[None]:
    """Within, no other run can train in `workdir`. However its process ends, so does the lock."""
    if not is_main():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with FileLock(workdir / ".lock").acquire(timeout=0):
            yield
    except Timeout:
        raise WorkdirError(
            f"Another run is training in {workdir}: wait for its end, or choose another --workdir."
        ) from None
    except FileExistsError:
        raise WorkdirError(f"{workdir} is a file, and so cannot hold a run: choose another --workdir.") from None
    except OSError as error:  # of a write, say, which names no file
        place = error.filename or workdir
        raise WorkdirError(f"{place} cannot be written: {refusal(error, workdir)}.") from error


def claim(config: Config, splits: Splits) -> None:
    """Store what decides the result; if an earlier run has stored it: insist that nothing differs."""
    given: dict[str, Any] = {**config.decisive, "data": named(splits, config)}
    path = config.workdir / "config.json"
    begun = (config.workdir / "checkpoints").exists()  # asked first: another process may be writing both
    if not path.exists():
        if begun:
            raise WorkdirError(f"{path} is missing, so nobody knows how the run in {config.workdir} was configured.")
        places = {
            name: str(getattr(config, name).expanduser().absolute()) for name in PLACES if getattr(config, name)
        }
        write(path, json.dumps({**given, **places}, indent=2) + "\n")
        return
    stored = read_config(config.workdir)
    differing = [
        f"{name} is {stored[name]} there and {value} now" for name, value in given.items() if stored[name] != value
    ]
    if differing:
        raise WorkdirError(
            f"{config.workdir} holds a run of another configuration ({', '.join(differing)}): "
            f"choose another one, for example --workdir {config.workdir}-2, or delete it."
        )


def named(splits: Splits, config: Config) -> str:
    """Return what distinguishes the data, for people and by a hash."""
    return f"{described(splits, DATASETS[config.dataset])} ({sha256(list(splits.values()))[:16]})"


def stored_config(workdir: Path) -> Config:
    """Return the configuration of the run in `workdir`."""
    return as_config(read_config(workdir), workdir)


def as_config(stored: dict[str, Any], workdir: Path) -> Config:
    """Return what `claim` has stored as a configuration; ValueError says what in it cannot be that."""
    examples = Config().decisive | {"data": ""} | {name: "" for name in PLACES if name in stored}
    for name, example in examples.items():
        value = stored.get(name)
        if type(value) is not type(example) or value not in CHOICES.get(name, [value]):
            raise ValueError(f"{name} cannot be {json.dumps(value)}")
    flags: dict[str, Any] = {field.name: stored[field.name] for field in fields(Config) if field.name in stored}
    flags |= {name: Path(stored[name]) for name in PLACES if name in stored}
    return Config(**flags, workdir=workdir)


def read_config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    if not path.is_file():
        raise WorkdirError(f"{workdir} holds no run: there is no {path}.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it is no object")
        as_config(stored, workdir)
    except (ValueError, RecursionError, ConfigError) as error:
        raise WorkdirError(f"{path} is damaged: {str(error).rstrip('.')}.") from error
    return stored


def write_metrics(workdir: Path, history: History) -> None:
    """Replace the file of metrics, and TensorBoard's if that is installed."""
    write(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    if is_main():
        write_events(workdir / "tensorboard" / "events.out.tfevents.metrics", history)


def write(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, by the main process alone."""
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256(tree: Tree) -> str:
    """Return a hash of a tree's leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
