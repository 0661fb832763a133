"""What a run leaves behind, so that a kill at any moment costs no more than the work since the last checkpoint.

    WORKDIR/config.json      what decides the result
    WORKDIR/metrics.jsonl    one line an epoch
    WORKDIR/checkpoints/N/   everything that the run knew after step N

Each file and each checkpoint appears whole or not at all. A checkpoint also holds the metrics up to it, so the file
of metrics only mirrors them, and the hash of its contents, so that damage is noticed.
"""

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from mnist.config import Config, UserError
from mnist.devices import is_main
from mnist.idx import Splits
from mnist.model import Cnn
from mnist.terminal import say

Tree = Any  # of arrays or numbers
Trees = Mapping[str, Tree]
Row = dict[str, int | float]  # of the metrics
History = list[Row]


PLACES = ("data_dir", "idx_dir")  # decide nothing: what lies there is hashed


class WorkdirError(UserError):
    """What is wrong with what an earlier run left."""


# The configuration


def claim(config: Config, splits: Splits) -> None:
    """Store what decides the result; if an earlier run has stored it: insist that nothing differs."""
    given: dict[str, Any] = {**config.decisive, "data": sha256(list(splits.values()))[:16]}
    path = config.workdir / "config.json"
    if not path.exists():
        if (config.workdir / "checkpoints").exists():
            raise WorkdirError(f"{path} is missing, so nobody knows how the run in {config.workdir} was configured.")
        places = {
            name: str(getattr(config, name).expanduser().absolute()) for name in PLACES if getattr(config, name)
        }
        write(path, json.dumps({**given, **places}, indent=2) + "\n")
        return
    stored = read_config(config.workdir)
    differing = [
        f"{name} is {stored.get(name, 'not known')} there and {given.get(name, 'not known')} now"
        for name in dict.fromkeys([*given, *stored])
        if name not in PLACES and stored.get(name) != given.get(name)
    ]
    if differing:
        raise WorkdirError(
            f"{config.workdir} holds a run of another configuration ({', '.join(differing)}): "
            "choose another --workdir, or delete that one."
        )


def stored_config(workdir: Path) -> Config:
    """Return the configuration of the run in `workdir`."""
    stored = read_config(workdir)
    flags: dict[str, Any] = {field.name: stored[field.name] for field in fields(Config) if field.name in stored}
    flags |= {name: Path(stored[name]) for name in PLACES if name in stored}
    return Config(**flags, workdir=workdir)


def read_config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    if not path.is_file():
        raise WorkdirError(f"{workdir} holds no run: there is no {path}.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}.") from error


# The metrics


def write_metrics(workdir: Path, history: History) -> None:
    """Replace the file of metrics."""
    write(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def write(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, by the main process alone."""
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# The checkpoints


@contextmanager
def opened(workdir: Path, read_only: bool = False) -> Generator[ocp.CheckpointManager]:
    """Yield what saves in the background and keeps the newest two; at the end it waits until all is written."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
    try:
        yield manager
    finally:
        manager.close()


def save(manager: ocp.CheckpointManager, step: int, history: History, trees: Trees) -> None:
    """Start to save, and return as soon as the arrays may change again, long before all is written."""
    hashes = {name: sha256(value) for name, value in {**trees, "history": history}.items()}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    record = ocp.args.JsonSave({"history": list(history), "sha256": hashes})
    manager.save(step, args=ocp.args.Composite(**items, record=record))


def latest(manager: ocp.CheckpointManager, like: Trees) -> tuple[int, History, dict[str, Tree]] | None:
    """Return the step, history and trees of the newest whole checkpoint, or None if there has been none at all.

    `like` names the wanted trees, of the right shapes, dtypes and shardings. Damaged checkpoints are named and, once
    an older one has proved to be whole, deleted.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for i, step in enumerate(steps):
        found = restored(manager, step, like)
        if found is not None:
            for damaged in steps[:i]:
                manager.delete(damaged)
            return step, found.pop("history"), found
        say(f"The checkpoint of step {step:,} is damaged, so the one before is taken.")
    if steps:
        raise WorkdirError(f"All checkpoints in {manager.directory} are damaged; delete that folder to start anew.")
    return None


def restored(manager: ocp.CheckpointManager, step: int, like: Trees) -> dict[str, Any] | None:
    """Return the wanted trees and the history of one checkpoint, or None if it is damaged."""
    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    try:
        found = dict(manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore(), **wanted)))
        record = found.pop("record")
        found["history"] = record["history"]
        return found if all(sha256(value) == record["sha256"][name] for name, value in found.items()) else None
    except Exception:  # orbax, tensorstore, zstd and JSON each raise their own on damaged files
        return None


def restore_params(workdir: Path) -> Tree:
    """Return the weights to predict with, of the newest whole checkpoint."""
    name = "average" if stored_config(workdir).settings.ema else "params"
    _, abstract = nnx.split(nnx.eval_shape(lambda: Cnn(nnx.Rngs(0))))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    with opened(workdir, read_only=True) as manager:
        found = latest(manager, {name: jax.tree.map(placed, abstract)})
    if found is None:
        raise WorkdirError(f"{workdir} holds no checkpoint yet.")
    _, _, trees = found
    return trees[name]


def sha256(tree: Tree) -> str:
    """Return a hash of a tree's leaves."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
