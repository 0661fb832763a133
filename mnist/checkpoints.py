"""Checkpoints by orbax, written in the background, and believed only if they are whole.

Each holds the metrics up to its step, which the file of metrics only mirrors, and the hashes of all that it holds:
orbax does not notice every damage.
"""

import gc
import logging
import sys
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from mnist.disk import refusal
from mnist.model import make_network
from mnist.terminal import say
from mnist.workdir import History, Tree, WorkdirError, sha256, stored_config

Trees = Mapping[str, Tree]

# Of several writes that failed one is reported; asyncio logs the others, whenever they are collected.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextmanager
def opened(workdir: Path, read_only: bool = False) -> Generator[ocp.CheckpointManager]:
    """Yield what saves in the background and keeps the newest two; at the end it waits until all is written."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    folder = (workdir / "checkpoints").absolute()
    hook = sys.unraisablehook

    def unless_in_vain(unraisable: Any) -> None:
        """When one write fails, the others end without anyone who waits for them."""
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_in_vain
    try:
        with written(folder):
            manager = ocp.CheckpointManager(folder, options=options)
        try:
            yield manager
        finally:
            with written(folder):
                manager.close()
    finally:
        sys.unraisablehook = hook


@contextmanager
def written(folder: Path) -> Generator[None]:
    """Within, what cannot be written becomes one sentence, maybe that of an earlier save in the background."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
        time.sleep(0.1)  # until the writes that are still under way have ended
        raise WorkdirError(f"A checkpoint cannot be written under {folder}: {refusal(error, folder)}.") from error


def save(manager: ocp.CheckpointManager, step: int, history: History, trees: Trees) -> None:
    """Start to save, and return as soon as the arrays may change again, long before all is written."""
    hashes = {name: sha256(value) for name, value in {**trees, "history": history}.items()}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    record = ocp.args.JsonSave({"history": list(history), "sha256": hashes})
    with written(Path(manager.directory)):
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
                say(f"The checkpoint of step {damaged:,} is damaged, so that of step {step:,} is taken.")
                manager.delete(damaged)
            return step, found.pop("history"), found
    if steps:
        raise WorkdirError(f"All checkpoints in {manager.directory} are damaged; delete that folder to start anew.")
    return None


def restored(manager: ocp.CheckpointManager, step: int, like: Trees) -> dict[str, Any] | None:
    """Return the wanted trees and the history of one checkpoint, or None if it is damaged."""
    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    with no_aftermath():
        try:
            found = dict(manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore(), **wanted)))
            record = found.pop("record")
            found["history"] = record["history"]
            if all(sha256(value) == record["sha256"][name] for name, value in found.items()):
                return found
        except Exception:  # orbax, tensorstore, zstd and JSON each raise their own on damaged files
            time.sleep(0.1)  # until the reads that are still under way have ended
    return None


@contextmanager
def no_aftermath() -> Generator[None]:
    """Keep quiet what orbax leaves behind when it fails: coroutines never awaited, reads whose event loop is gone."""

    def ignore(_: object) -> None:
        pass

    hook, sys.unraisablehook = sys.unraisablehook, ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            yield
            gc.collect()
        finally:
            sys.unraisablehook = hook


def restore_params(workdir: Path) -> Tree:
    """Return the weights to predict with, of the newest whole checkpoint."""
    config = stored_config(workdir)
    _, abstract = nnx.split(nnx.eval_shape(lambda: make_network(config)))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    with opened(workdir, read_only=True) as manager:
        found = latest(manager, {"average": jax.tree.map(placed, abstract)})
    if found is None:
        raise WorkdirError(f"{workdir} holds no checkpoint yet.")
    _, _, trees = found
    return trees["average"]
