"""The training loop: its determinism, and its cutting into dispatches."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")

import optax
from flax import nnx

from mnist import data, training
from mnist.augment import augmented
from mnist.config import Config
from mnist.evaluation import probabilities
from mnist.idx import Digits
from mnist.model import DEEP, NETWORKS, SMALL, Committee
from mnist.recipes import RECIPES, make_optimizer


def tiny(workdir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[training.Result, str]:
    sample = data.load(data.SAMPLE)
    few = {split: Digits(digits.images[::20], digits.labels[::20]) for split, digits in sample.items()}
    result = training.train(Config(workdir=workdir, epochs=2, batch_size=25, seed=3), few)
    return result, capsys.readouterr().out


@pytest.mark.more
def test_two_runs_with_one_seed_end_with_the_same_bits(tmp_path, capsys):
    (first, out), (second, _) = tiny(tmp_path / "first", capsys), tiny(tmp_path / "second", capsys)
    pairs = zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    assert training.fingerprint(first.params) == training.fingerprint(second.params)
    assert first.accuracy > 0.5  # of ten classes, after 40 steps
    assert [line.split()[0] for line in out.splitlines()] == ["configuration:", "epoch", "epoch"]


@pytest.mark.more
@pytest.mark.parametrize("members", [[SMALL], [SMALL, DEEP]])
def test_a_run_equals_a_plain_loop(members, tmp_path, monkeypatch):
    """A step at a time, by an nnx.Optimizer and optax's loss, without scan, dispatches and merged trees."""
    monkeypatch.setitem(NETWORKS, "small", members)
    monkeypatch.setitem(RECIPES, "default", replace(RECIPES["default"], undistorted=0.25))
    sample = data.load(data.SAMPLE)
    few = {split: Digits(digits.images[:100], digits.labels[:100]) for split, digits in sample.items()}
    config = Config(workdir=tmp_path / "run", epochs=2, batch_size=25, seed=3)
    result = training.train(config, few)

    recipe, images, labels = config.settings, *map(jnp.asarray, few["train"])
    network = Committee(nnx.Rngs(config.seed), members)
    optimizer = nnx.Optimizer(network, make_optimizer(recipe, steps := 8), wrt=nnx.Param)
    average = nnx.state(network)
    order_key, step_key = jax.random.split(jax.random.key(config.seed))
    losses = []

    @nnx.jit
    def plain_step(network, optimizer, step, batch, augment_key, dropout_key):
        def loss_of(network):
            inputs = jnp.where(step < 6, augmented(augment_key, images[batch]), images[batch])
            logits = [member(inputs, dropout_key) for member in network.members]
            cost = optax.softmax_cross_entropy_with_integer_labels
            return sum(cost(each, labels[batch]).mean() for each in logits) / len(members)

        loss, grads = nnx.value_and_grad(loss_of)(network)
        optimizer.update(network, grads)
        return loss

    for step in range(steps):
        order = jax.random.permutation(jax.random.fold_in(order_key, step // 4), 100)
        batch = order[step % 4 * 25 :][:25]
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(step_key, step))
        losses.append(float(plain_step(network, optimizer, step, batch, augment_key, dropout_key)))
        keep = min(recipe.ema, (step + 1) / (step + 10))
        average = jax.tree.map(lambda a, b, keep=keep: keep * a + (1 - keep) * b, average, nnx.state(network))
    told = [row["train_loss"] for row in result.history]
    np.testing.assert_allclose(told, [np.mean(losses[:4]), np.mean(losses[4:])], rtol=1e-3)
    # What they predict, since Adam makes whole steps of the rounding of gradients that are 0, such as those of a bias
    # before a normalisation, and these steps change nothing.
    wanted = jax.tree.unflatten(jax.tree.structure(result.params), jax.tree.leaves(average))
    p, p_wanted = (probabilities(config, params, few["test"].images) for params in (result.params, wanted))
    np.testing.assert_allclose(p, p_wanted, atol=2e-3)
    untrained = jax.tree.map(jnp.zeros_like, wanted)
    assert np.abs(probabilities(config, untrained, few["test"].images) - p_wanted).max() > 0.1


@pytest.mark.parametrize(("examples", "batch"), [(10_000, 128), (60_000, 128), (60_000, 1), (128, 128)])
def test_an_epoch_is_cut_into_equal_dispatches_that_miss_little(examples, batch):
    dispatches, steps, _ = training.plan(examples, batch)
    assert steps <= training.LONGEST_DISPATCH
    missed = examples - dispatches * steps * batch
    assert 0 <= missed < (dispatches + 1) * batch
