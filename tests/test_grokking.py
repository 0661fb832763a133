"""The modular-addition example: its task, and that the arithmetics differ where and as they should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")

from examples import grokking
from examples.grokking import RUNS, Config

FAST = Config(modulus=7, train_share=0.6, width=32, steps=300, learning_rate=0.3, every=300)


@pytest.fixture(scope="module")
def runs():
    results = {}
    for name, (loss, dtype) in RUNS.items():
        with jax.enable_x64(dtype == jnp.float64):
            results[name] = grokking.run(FAST, loss, dtype)
    return results


def test_pairs_are_all_there_once_with_their_sums():
    train, test = grokking.split(FAST)
    numbers = np.concatenate([train.numbers, test.numbers])
    assert len(train.sums) == round(0.6 * 49)
    assert {tuple(pair) for pair in numbers.tolist()} == {(a, b) for a in range(7) for b in range(7)}
    np.testing.assert_array_equal(np.concatenate([train.sums, test.sums]), (numbers[:, 0] + numbers[:, 1]) % 7)


def test_the_runs_start_from_the_same_network(runs):
    first, *others = (measurements[0]["train_loss"] for measurements in runs.values())
    np.testing.assert_allclose(others, first, rtol=1e-6)


def test_the_usual_loss_collapses_in_float32_alone(runs):
    final = {name: measurements[-1] for name, measurements in runs.items()}
    assert all(run["train_accuracy"] == 1 for run in final.values())
    assert final["usual"]["without_gradient"] > 0.1
    assert final["jaxent"]["without_gradient"] == final["usual, float64"]["without_gradient"] == 0


@pytest.mark.more
def test_picture_and_figures(tmp_path, capsys):
    config = Config(modulus=5, steps=10, width=8, every=5)
    grokking.main(config, tmp_path / "picture.png", tmp_path / "figures.json", ("jaxent",))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "figures.json").read_text())["runs"]["jaxent"]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert "| 10 |" in capsys.readouterr().out
