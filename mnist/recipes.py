"""How to train: the numbers, and the optimiser that they make."""

from dataclasses import dataclass

import optax


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    network: str = "small"  # which of the networks in model.py
    ema: float = 0.999  # decay of the averaged weights, which are what is evaluated
    undistorted: float = 0.0  # share of all steps, at the end, that see the images as they are


RECIPES = {
    "default": Recipe(epochs=12, batch_size=64, learning_rate=3e-3, weight_decay=3e-2, undistorted=0.07),
    "accurate": Recipe(epochs=10, batch_size=64, learning_rate=3e-3, weight_decay=1e-2, network="three"),
}


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Return AdamW with a learning rate that warms up and then falls along a cosine."""
    schedule = optax.schedules.cosine_onecycle_schedule(steps, recipe.learning_rate, pct_start=0.15)
    return optax.adamw(schedule, weight_decay=recipe.weight_decay)
