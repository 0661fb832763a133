"""Train a tiny policy by reinforcement learning, with GRPO: `python examples/grpo.py`.

The policy is shown some digits and writes as many; its reward is the share of places at which these are the shown
ones in order. Nobody tells it that: it sees the rewards of what it happened to write, and GRPO (Shao et al. 2024,
"DeepSeekMath") raises the probability of what was better than the other answers to the same digits. What the loss
needs of the policy are log-probabilities of its answers and, to keep it curious, entropies. `linear_log_probs` has
both without logits, which here would be small, and in a language model are the largest arrays of all.

    pip install -e ".[examples]"
    python examples/grpo.py --picture grpo.png
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxent

Parameters = dict[str, jax.Array]
DIGITS = 10


@dataclass(frozen=True)
class Config:
    """A run."""

    length: int = 6
    """How many digits are shown, and written."""
    width: int = 128
    """Of the policy's two layers."""
    prompts: int = 64
    """Different ones in a step."""
    answers: int = 16
    """To each prompt, among which GRPO compares."""
    steps: int = 200
    updates: int = 2
    """Of the policy with the answers of one step."""
    learning_rate: float = 2e-3
    clip: float = 0.2
    """How far an update may move the ratio of new and old probabilities from 1."""
    entropy_weight: float = 0.01
    """Of the entropy in the objective."""
    seed: int = 0


class Batch(NamedTuple):
    """Answers to prompts, and what they were worth."""

    prompts: jax.Array  # (prompts, 1, length)
    answers: jax.Array  # (prompts, answers, length)
    log_probs: jax.Array  # of each digit of them, under the policy that wrote them
    rewards: jax.Array  # (prompts, answers)


def grpo_loss(log_probs: jax.Array, old: jax.Array, rewards: jax.Array, clip: float) -> jax.Array:
    """The clipped surrogate of a group's relative rewards.

    `log_probs` and `old` have shape (groups, members, tokens), under the policy and under that which wrote the
    tokens, `rewards` (groups, members).
    """
    of_group = rewards - rewards.mean(1, keepdims=True)
    advantage = (of_group / (rewards.std(1, keepdims=True) + 1e-4))[..., None]
    ratio = jnp.exp(log_probs - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage).mean()


def initial(config: Config) -> Parameters:
    """Draw a policy that knows nothing."""
    draw = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    shapes = {
        "prompt": (config.length, DIGITS, config.width),
        "place": (config.length, config.width),
        "written": (DIGITS, config.width),
        "layer": (config.width, config.width),
        "kernel": (config.width, DIGITS),
    }
    keys = jax.random.split(jax.random.key(config.seed), len(shapes))
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def hidden_states(parameters: Parameters, prompts: jax.Array, answers: jax.Array) -> jax.Array:
    """Shape (..., length, width): at each place of what the prompt says and of what is written before it."""
    places = jnp.arange(prompts.shape[-1])
    of_prompt = parameters["prompt"][places, prompts].sum(-2)[..., None, :]
    written = parameters["written"][answers[..., :-1]]
    before = jnp.cumsum(jnp.pad(written, [(0, 0)] * (answers.ndim - 1) + [(1, 0), (0, 0)]), -2)
    x = jax.nn.gelu(of_prompt + before + parameters["place"])
    return x + jax.nn.gelu(x @ parameters["layer"])


def write(config: Config, parameters: Parameters, key: jax.Array) -> Batch:
    """Draw prompts, have the policy answer each of them several times, and reward it."""
    of_prompts, *of_places = jax.random.split(key, config.length + 1)
    prompts = jax.random.randint(of_prompts, (config.prompts, 1, config.length), 0, DIGITS)
    answers = jnp.zeros((config.prompts, config.answers, config.length), jnp.int32)
    for place, of_place in enumerate(of_places):
        hidden = hidden_states(parameters, prompts, answers)[..., place, :]
        answers = answers.at[..., place].set(jax.random.categorical(of_place, hidden @ parameters["kernel"]))
    rewards = (answers == jnp.sort(prompts)).mean(-1)
    hidden = hidden_states(parameters, prompts, answers)
    return Batch(prompts, answers, jaxent.linear_log_probs(hidden, parameters["kernel"], answers), rewards)


def objective(config: Config, parameters: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What falls, and the policy's mean entropy."""
    hidden = hidden_states(parameters, batch.prompts, batch.answers)
    log_probs, entropies = jaxent.linear_log_probs(hidden, parameters["kernel"], batch.answers, entropy=True)
    loss = grpo_loss(log_probs, batch.log_probs, batch.rewards, config.clip)
    return loss - config.entropy_weight * entropies.mean(), entropies.mean()


def train(config: Config) -> list[dict[str, float]]:
    """Return the mean reward and the mean entropy of each step."""
    optimizer = optax.adam(config.learning_rate)

    @jax.jit
    def step(state: tuple[Parameters, optax.OptState], key: jax.Array) -> tuple[object, tuple[jax.Array, jax.Array]]:
        parameters, moments = state
        batch = write(config, parameters, key)
        entropy = jnp.zeros(())
        for _ in range(config.updates):
            gradient, entropy = jax.grad(partial(objective, config), has_aux=True)(parameters, batch)
            updates, moments = optimizer.update(gradient, moments, parameters)
            parameters = optax.tree_utils.tree_add(parameters, updates)
        return (parameters, moments), (batch.rewards.mean(), entropy)

    parameters = initial(config)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.steps)
    _, (rewards, entropies) = jax.lax.scan(step, (parameters, optimizer.init(parameters)), keys)
    pairs = zip(rewards.tolist(), entropies.tolist(), strict=True)
    return [{"reward": reward, "entropy": entropy} for reward, entropy in pairs]


def draw(measurements: list[dict[str, float]], picture: Path) -> None:
    """Reward and entropy over the steps."""
    from matplotlib.figure import Figure  # only this draws

    figure = Figure(figsize=(5, 5), dpi=150, layout="constrained")
    titles = {"reward": "mean reward", "entropy": "mean entropy, nats"}
    for axis, (quantity, title) in zip(figure.subplots(2, 1, sharex=True), titles.items(), strict=True):
        axis.plot([measured[quantity] for measured in measurements])
        axis.set(title=title, ylim=(0, None), xlabel="step" if quantity == "entropy" else None)
    figure.savefig(picture)


def main(
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(),
    picture: Path | None = None,
    output: Path | None = None,
) -> None:
    """Train a policy to put digits in order, by rewards alone.

    Args:
        config: the run.
        picture: where to draw what came out.
        output: where to write all measurements, as JSON.
    """
    measurements = train(config)
    print("| step | reward | entropy |\n|---:|---:|---:|")
    for at in range(0, config.steps, max(1, config.steps // 10)):
        some = measurements[at : at + max(1, config.steps // 10)]
        reward, entropy = (sum(m[quantity] for m in some) / len(some) for quantity in ("reward", "entropy"))
        print(f"| {at} | {reward:.3f} | {entropy:.3f} |")
    if output:
        output.write_text(json.dumps({"config": asdict(config), "steps": measurements}) + "\n")
    if picture:
        draw(measurements, picture)


if __name__ == "__main__":
    tyro.cli(main)
