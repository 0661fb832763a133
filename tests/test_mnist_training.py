"""The training loop: its determinism, and its cutting into dispatches."""

from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")

from mnist import data, training
from mnist.config import Config
from mnist.idx import Digits


def tiny(workdir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[training.Result, str]:
    sample = data.load(data.SAMPLE)
    few = {split: Digits(digits.images[::20], digits.labels[::20]) for split, digits in sample.items()}
    result = training.train(Config(workdir=workdir, epochs=2, batch_size=25, seed=3), few)
    return result, capsys.readouterr().out


def test_two_runs_with_one_seed_end_with_the_same_bits(tmp_path, capsys):
    (first, out), (second, _) = tiny(tmp_path / "first", capsys), tiny(tmp_path / "second", capsys)
    pairs = zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    assert training.fingerprint(first.params) == training.fingerprint(second.params)
    assert first.accuracy > 0.5
    assert [line.split()[0] for line in out.splitlines()] == ["configuration:", "epoch", "epoch"]


@pytest.mark.parametrize(("examples", "batch"), [(10_000, 128), (60_000, 128), (60_000, 1), (128, 128)])
def test_an_epoch_is_cut_into_equal_dispatches_that_miss_little(examples, batch):
    dispatches, steps, _ = training.plan(examples, batch)
    assert steps <= training.LONGEST_DISPATCH
    missed = examples - dispatches * steps * batch
    assert 0 <= missed < (dispatches + 1) * batch
