"""Train a network far past 100 % training accuracy, with three arithmetics of a loss: `python examples/grokking.py`.

The task is addition modulo a prime, of which the network sees some of all pairs; without weight decay, so that only
the loss drives it. Where all training examples are right, the loss goes on to fall, and in float32 the usual form of
it rounds to zero, example by example: "softmax collapse" (Prieto et al. 2025, "Grokking at the Edge of Numerical
Stability"). Compares jaxent in float32, the usual form in float32 and, as a control, the usual form in float64.

    pip install -e ".[examples]"
    python examples/grokking.py --picture grokking.png
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from numpy.typing import NDArray

import jaxent

Parameters = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Config:
    """What all runs share."""

    modulus: int = 59
    """A prime; there are its square many pairs."""
    train_share: float = 0.7
    """The share of the pairs that is trained on; accuracy is tested on the others."""
    width: int = 256
    """Of the one hidden layer."""
    steps: int = 60_000
    """Of Adam, each on all training pairs."""
    learning_rate: float = 1e-3
    epsilon: float = 1e-30
    """Adam's epsilon. Gradients far below it, as they are at the end, do not move anything."""
    seed: int = 0
    every: int = 500
    """Steps from one measurement to the next."""


RUNS: dict[str, tuple[Loss, Any]] = {
    "jaxent": (partial(jaxent.cross_entropy, reduction="none"), jnp.float32),
    "usual": (optax.softmax_cross_entropy_with_integer_labels, jnp.float32),
    "usual, float64": (optax.softmax_cross_entropy_with_integer_labels, jnp.float64),
}


class Pairs(NamedTuple):
    """Some pairs of numbers (pairs, 2), and their sums (pairs,)."""

    numbers: NDArray[np.int32]
    sums: NDArray[np.int32]


def split(config: Config) -> tuple[Pairs, Pairs]:
    """Divide all pairs into those to train on and those to test on."""
    numbers = np.stack(np.divmod(np.arange(config.modulus**2, dtype=np.int32), config.modulus), axis=1)
    numbers = np.random.default_rng(config.seed).permutation(numbers)
    pairs = Pairs(numbers, numbers.sum(axis=1) % config.modulus)
    count = round(config.train_share * len(numbers))
    return Pairs(*(array[:count] for array in pairs)), Pairs(*(array[count:] for array in pairs))


def initial(config: Config, dtype: Any) -> Parameters:
    """Draw small weights; the same in every dtype, but for rounding."""
    draw = jax.nn.initializers.variance_scaling(0.125, "fan_in", "normal")
    shapes = {"first": (config.modulus, config.width), "second": (config.modulus, config.width)}
    shapes["out"] = (config.width, config.modulus)
    keys = jax.random.split(jax.random.key(config.seed), len(shapes))
    parameters = {
        name: draw(key, shape, jnp.float32) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    parameters["bias"] = jnp.zeros(config.width, jnp.float32)
    return {name: value.astype(dtype) for name, value in parameters.items()}


def logits_of(parameters: Parameters, numbers: NDArray[np.int32]) -> jax.Array:
    """Embed both numbers, add, and go through one hidden layer."""
    hidden = parameters["first"][numbers[:, 0]] + parameters["second"][numbers[:, 1]] + parameters["bias"]
    return jax.nn.relu(hidden) @ parameters["out"]


def run(config: Config, loss: Loss, dtype: Any) -> list[dict[str, float]]:
    """Train, and measure every so often."""
    train, test = split(config)
    optimizer = optax.adam(config.learning_rate, eps=config.epsilon)
    parameters = initial(config, dtype)
    state = parameters, optimizer.init(parameters)

    def objective(parameters: Parameters) -> jax.Array:
        return loss(logits_of(parameters, train.numbers), jnp.asarray(train.sums)).mean()

    def step(state: tuple[Parameters, optax.OptState], _: None) -> tuple[tuple[Parameters, optax.OptState], None]:
        parameters, moments = state
        updates, moments = optimizer.update(jax.grad(objective)(parameters), moments, parameters)
        return (optax.tree_utils.tree_add(parameters, updates), moments), None

    @jax.jit
    def advance(state: tuple[Parameters, optax.OptState]) -> tuple[Parameters, optax.OptState]:
        return jax.lax.scan(step, state, length=config.every)[0]

    measurements: list[dict[str, float]] = []
    for at in range(0, config.steps + 1, config.every):
        state = advance(state) if at else state
        measured = {name: float(value) for name, value in measure(state[0], loss, train, test).items()}
        measurements.append({"step": at} | measured)
    return measurements


@partial(jax.jit, static_argnums=1)
def measure(parameters: Parameters, loss: Loss, train: Pairs, test: Pairs) -> dict[str, jax.Array]:
    """Look at the network: the true losses, whatever arithmetic it trains with, and what that leaves of gradients."""
    logits, test_logits = logits_of(parameters, train.numbers), logits_of(parameters, test.numbers)

    def total(logits: jax.Array) -> jax.Array:
        return loss(logits, jnp.asarray(train.sums)).sum()

    gradient = jax.grad(total)(logits)
    of_label = jnp.take_along_axis(gradient, train.sums[:, None], 1)
    return {
        "train_loss": jaxent.cross_entropy(logits, train.sums),
        "train_accuracy": (logits.argmax(1) == train.sums).mean(),
        "test_loss": jaxent.cross_entropy(test_logits, test.sums),
        "test_accuracy": (test_logits.argmax(1) == test.sums).mean(),
        "without_gradient": (of_label == 0).mean(),
    }


def draw(runs: dict[str, list[dict[str, float]]], picture: Path) -> None:
    """Four diagrams over the steps, a line a run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    titles = {
        "train_loss": "training loss",
        "without_gradient": "training examples whose label has a gradient of 0",
        "test_accuracy": "test accuracy",
        "test_loss": "test loss",
    }
    plt.rcParams["font.size"] = 9
    figure, axes = plt.subplots(4, 1, figsize=(6, 9), sharex=True, layout="constrained")
    for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
        for (name, measurements), style in zip(runs.items(), ("-", "--", ":"), strict=False):
            axis.plot([m["step"] for m in measurements], [m[quantity] for m in measurements], style, label=name)
        axis.set_title(title)
    axes[0].set_yscale("log")
    axes[0].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(picture, dpi=120)


def main(
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(),
    picture: Path | None = None,
    output: Path | None = None,
    runs: tuple[str, ...] = tuple(RUNS),
) -> None:
    """Train a network on modular addition with several arithmetics of one loss.

    Args:
        config: what all runs share.
        picture: where to draw what came out.
        output: where to write all measurements, as JSON.
        runs: which of them.
    """
    results: dict[str, list[dict[str, float]]] = {}
    for name in runs:
        loss, dtype = RUNS[name]
        with jax.enable_x64(dtype == jnp.float64):
            results[name] = run(config, loss, dtype)
        print(
            f"\n{name}\n\n| step | " + " | ".join(key.replace("_", " ") for key in list(results[name][0])[1:]) + " |"
        )
        print("|---:|" + "---:|" * (len(results[name][0]) - 1))
        for measurement in results[name][:: max(1, len(results[name]) // 10)]:
            step, *values = measurement.values()
            print(f"| {step} | " + " | ".join(f"{value:.3g}" for value in values) + " |", flush=True)
    if output:
        output.write_text(json.dumps({"config": asdict(config), "runs": results}) + "\n")
    if picture:
        draw(results, picture)


if __name__ == "__main__":
    tyro.cli(main)
