"""The losses of docs/reinforcement-learning.md against plain formulas over full logits, and examples/grpo.py."""

import doctest
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

pytest.importorskip("tyro")

from examples import grpo
from examples.grpo import Config

PAGE = Path(__file__).parent.parent / "docs" / "reinforcement-learning.md"
RNG = np.random.default_rng(0)
GROUPS, MEMBERS, TOKENS, D, C = 2, 4, 5, 6, 9
HIDDEN, KERNEL = RNG.normal(size=(GROUPS, MEMBERS, TOKENS, D)), RNG.normal(size=(D, C))
LABELS = RNG.integers(0, C, (GROUPS, MEMBERS, TOKENS))
LABELS[:, 1, 3:], LABELS[:, 2, :1] = -100, -100  # padding, and prompts
REWARDS = RNG.normal(size=(GROUPS, MEMBERS))
OLD, REFERENCE = (np.where(LABELS < 0, 0.0, RNG.normal(-2.0, 1.0, LABELS.shape)) for _ in range(2))


@pytest.fixture(scope="module")
def page():
    """The functions that the page defines."""
    parser = doctest.DocTestParser()
    namespace = {}
    test = parser.get_doctest(PAGE.read_text(), namespace, PAGE.name, str(PAGE), 0)
    assert doctest.DocTestRunner(verbose=False).run(test, clear_globs=False).failed == 0
    return test.globs


def log_probs(hidden, kernel):
    """Of the labels, by torch."""
    log_p = torch.log_softmax(hidden @ kernel, -1)
    labels = torch.from_numpy(LABELS)
    return torch.where(labels < 0, 0.0, log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0])


def dpo(hidden, kernel, reference, beta):
    """The chosen ones are the first group."""
    sums = log_probs(hidden, kernel).sum(-1) - torch.tensor(reference)
    return -torch.log(torch.sigmoid(beta * (sums[0] - sums[1]))).mean()


def in_grpo(hidden, kernel, clip, beta):
    """A token at a time, as the formula has it."""
    of_policy = log_probs(hidden, kernel)
    total = 0.0
    for group in range(GROUPS):
        spread = REWARDS[group].std() + 1e-4
        for member in range(MEMBERS):
            advantage = (REWARDS[group, member] - REWARDS[group].mean()) / spread
            terms = []
            for token in np.flatnonzero(LABELS[group, member] >= 0):
                at = group, member, int(token)
                ratio = torch.exp(of_policy[at] - OLD[at])
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                odds = torch.exp(REFERENCE[at] - of_policy[at])
                terms.append(gain - beta * (odds - torch.log(odds) - 1))
            total = total + torch.stack(terms).mean()
    return -total / (GROUPS * MEMBERS)


def same(ours, theirs):
    """Values and gradients by hidden states and kernel."""
    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(HIDDEN, KERNEL)
    tensors = [torch.tensor(x, requires_grad=True) for x in (HIDDEN, KERNEL)]
    want = theirs(*tensors)
    want.backward()
    np.testing.assert_allclose(value, want.item(), rtol=1e-10)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert np.any(np.asarray(gradient))
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_dpo(page):
    reference = RNG.normal(-10.0, 1.0, (GROUPS, MEMBERS))

    def ours(hidden, kernel):
        sequences = (x.reshape(GROUPS * MEMBERS, *x.shape[2:]) for x in (hidden, LABELS))
        states, labels = sequences
        return page["dpo_loss"](states, kernel, labels, reference.reshape(-1), beta=0.3)

    same(ours, lambda hidden, kernel: dpo(hidden, kernel, reference, 0.3))


def test_grpo(page):
    def ours(hidden, kernel):
        return page["grpo_loss"](hidden, kernel, LABELS, OLD, REFERENCE, REWARDS, clip=0.3, beta=0.2)

    same(ours, lambda hidden, kernel: in_grpo(hidden, kernel, 0.3, 0.2))


@pytest.mark.more
def test_the_examples_loss_is_the_pages(page):
    """Where all answers are of one length, and no reference is wanted."""
    labels = LABELS.clip(0)

    def ours(hidden, kernel):
        return grpo.grpo_loss(grpo.jaxent.linear_log_probs(hidden, kernel, labels), OLD, REWARDS, 0.3)

    def of_page(hidden, kernel):
        return page["grpo_loss"](hidden, kernel, labels, OLD, OLD, REWARDS, clip=0.3, beta=0.0)

    with jax.enable_x64(True):
        got, want = (jax.value_and_grad(f, (0, 1))(HIDDEN, KERNEL) for f in (ours, of_page))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, want)


@pytest.mark.more
def test_rewards_rise(tmp_path, capsys):
    config = Config(length=2, width=64, prompts=32, answers=8, steps=150)
    grpo.main(config, tmp_path / "picture.png", tmp_path / "figures.json")
    steps = json.loads((tmp_path / "figures.json").read_text())["steps"]
    rewards = [step["reward"] for step in steps]
    assert len(rewards) == 150
    assert np.mean(rewards[:5]) < 0.25  # by chance a tenth
    assert np.mean(rewards[-10:]) > 0.6
    assert steps[-1]["entropy"] < steps[0]["entropy"] < np.log(10) + 1e-3
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| 135 |" in capsys.readouterr().out


def test_a_policy_sees_what_is_before_a_place_only():
    config = Config(length=3, width=8)
    parameters = grpo.initial(config)
    prompts, answers = np.array([[3, 1, 4]]), np.array([[1, 5, 9]])
    states = grpo.hidden_states(parameters, prompts, answers)
    for place in range(3):
        other = answers.copy()
        other[0, place] = 7
        moved = np.any(np.asarray(grpo.hidden_states(parameters, prompts, other)) != states, axis=(0, 2))
        np.testing.assert_array_equal(moved, np.arange(3) > place)
