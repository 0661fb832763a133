"""The language-model example: the loss without logits trains as the others do, in less memory."""

import json
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("tyro")

from examples import train_lm
from examples.train_lm import Config, Loss

TINY = Config(vocabulary=2048, width=16, layers=1, heads=2, length=64, batch_size=16, steps=8)


class Run(NamedTuple):
    """The compiled step, and what some steps on the bytes of this file led to."""

    step: jax.stages.Compiled
    state: train_lm.State
    losses: list[float]


@pytest.fixture(scope="module")
def runs() -> dict[Loss, Run]:
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)

    def run(loss: Loss) -> Run:
        state, step = train_lm.compile_step(TINY, loss)
        losses: list[float] = []
        for batch in train_lm.batches(TINY, text):
            state, log = step(state, batch)
            losses.append(float(log["loss"]))
        return Run(step, state, losses)

    return {loss: run(loss) for loss in get_args(Loss)}


@pytest.mark.parametrize("loss", ["optax", "fused"])
def test_the_losses_are_those_of_the_unfused_run(runs: dict[Loss, Run], loss: Loss) -> None:
    """Each step carries on from the last, so gradients that differed would show in the losses after them."""
    losses, expected = runs[loss].losses, runs["unfused"].losses
    assert expected[0] - expected[-1] > 0.1  # it learns
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ["optax", "fused"])
def test_the_gradients_are_those_of_the_unfused_run(runs: dict[Loss, Run], loss: Loss) -> None:
    """Adam's steps forget the gradients' scale; its running mean of them does not."""
    means, expected = (optax.tree_utils.tree_get(runs[name].state[1], "mu") for name in (loss, "unfused"))
    for mean, value in zip(jax.tree.leaves(means), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mean, value, rtol=0, atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("loss", get_args(Loss))
def test_padding_adds_nothing_and_the_log_is_of_what_counts(loss: Loss) -> None:
    rng = np.random.default_rng(0)
    batch = rng.integers(1, 50, (3, 9)).astype(np.int32)
    batch[0, 4], batch[1, 0] = train_lm.END, train_lm.END
    counts = np.asarray(train_lm.counted(batch))
    assert counts.sum(1).tolist() == [4, 0, 8]  # the mark itself is the last label of its file
    hidden, kernel = rng.normal(size=(24, 8)), rng.normal(size=(8, 50))
    hidden, kernel = (x.astype(np.float32) for x in (hidden, kernel))
    labels, flat = batch[:, 1:].reshape(-1), counts.reshape(-1)
    value, stats = train_lm.loss_of_hidden(loss, hidden, kernel, labels, flat, 0.01)
    logits = (hidden @ kernel)[flat].astype(np.float64)
    lse = np.log(np.exp(logits).sum(1))
    losses = lse - logits[np.arange(len(lse)), labels[flat]] + 0.01 * lse**2
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(stats.logsumexp)[flat], lse, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(stats.predicted)[flat], logits.argmax(1))


def test_the_fused_step_plans_for_no_logits(runs: dict[Loss, Run]) -> None:
    logits = 4 * TINY.batch_size * TINY.length * TINY.vocabulary
    fused, *others = (train_lm.temp_bytes(runs[loss].step) for loss in ("fused", "unfused", "optax"))
    assert fused < logits <= min(others)


def test_batches_depend_on_the_seed_alone() -> None:
    text = np.arange(1000, dtype=np.int32)
    first, second = (list(train_lm.batches(TINY, text)) for _ in range(2))
    assert len(first) == TINY.steps
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (TINY.batch_size, TINY.length + 1)
    assert (np.diff(first[0], axis=1) == 1).all()  # windows of the text


def test_a_token_sees_only_what_precedes_it() -> None:
    gpt = train_lm.Gpt(TINY, train_lm.nnx.Rngs(0))
    text = np.arange(TINY.length)[None]
    changed = text.copy()
    changed[0, 40:] += 100
    before, after = gpt(text)[0], gpt(changed)[0]
    np.testing.assert_array_equal(before[:40], after[:40])
    assert (np.abs(before[40:] - after[40:]).max(-1) > 1e-3).all()


def test_tokens_are_cached_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def tokenize(texts: list[str], vocabulary: int) -> np.ndarray:
        calls.append(len(texts))
        return np.arange(vocabulary, dtype=np.int32)

    monkeypatch.setattr(train_lm, "tokenize", tokenize)
    monkeypatch.setattr(train_lm, "sources", lambda: ["import this"])
    config = Config(workdir=tmp_path / "new", vocabulary=300)
    first, second = train_lm.tokens_of(config), train_lm.tokens_of(config)
    np.testing.assert_array_equal(first, second)
    assert calls == [1]
    assert len(list(config.workdir.iterdir())) == 1  # and nothing of the staging


def test_tokens_of_each_text_end_with_a_mark() -> None:
    pytest.importorskip("tokenizers")
    tokens = train_lm.tokenize(["for i in range(10): pass\n"] * 3 + [""], 280)
    assert (tokens == 0).sum() == 4
    assert tokens[-1] == 0
    assert tokens.max() < 280
    assert len(tokens) < 3 * 25  # pairs of bytes have become one token


def test_a_comparison_makes_its_folders_before_the_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "new" / "lm.json", tmp_path / "other" / "lm.png"
    losses: list[str] = []

    def command(name: str, *args: str) -> None:
        assert output.parent.is_dir()
        assert picture.parent.is_dir()
        if name == "train":
            losses.append(args[1])
            took = {"device": "cpu", "seconds": [1.0] * 20, "temp_bytes": 2**20, "peak_bytes": 2**21}
            Path(args[3]).write_text(json.dumps({"losses": list(range(20, 0, -1)), **took}))

    monkeypatch.setattr(train_lm, "command", command)
    train_lm.compare(TINY, output, picture)
    assert losses == ["optax", "unfused", "fused"]
    assert set(json.loads(output.read_text())["runs"]) == set(losses)
    assert picture.read_bytes().startswith(b"\x89PNG")
