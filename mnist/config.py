"""Everything a run can be told, as one dataclass: its fields are the command's flags."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mnist.datasets import Name
from mnist.recipes import RECIPES, Recipe


class UserError(Exception):
    """What went wrong, in one sentence for the person at the terminal."""

    status = 1  # of the process


class ConfigError(UserError):
    """A flag with a value that makes no sense."""


@dataclass(frozen=True)
class Config:
    """Train a small convolutional network on MNIST, the handwritten digits."""

    dataset: Name = "mnist"
    """What to learn: digits, clothes or Kuzushiji characters."""
    data_dir: Path = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    """Where TensorFlow Datasets keeps prepared data; the data set is prepared here unless it is there already."""
    idx_dir: Path | None = None
    """A folder with the four official IDX files, gzip-compressed or not, to use instead of the network."""
    workdir: Path = Path("mnist-run")
    """Where checkpoints, metrics and the report go; the same command again goes on from what is there."""
    recipe: Literal["default", "accurate"] = "default"
    """How to train: in a few minutes, or longer and better."""
    epochs: int | None = None
    """How often every training image is seen, if not as often as the recipe says."""
    batch_size: int | None = None
    """How many images make one step of the optimiser, all devices together, if not the recipe's number."""
    learning_rate: float | None = None
    """The highest learning rate of the schedule, if not the recipe's."""
    weight_decay: float | None = None
    """The weight decay, if not the recipe's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; the parameters are float32 always."""
    seed: int = 0
    """Decides everything random: two runs with the same seed end with the same bits, on one machine, with one version
    of JAX and as many devices and CPU cores; elsewhere they end alike, but for rounding."""
    coordinator_address: str | None = None
    """Where the first of several processes listens, as HOST:PORT; found automatically on Cloud TPU, GKE and Slurm."""
    num_processes: int | None = None
    """How many processes train together."""
    process_id: int | None = None
    """Which of them this one is, counted from 0."""

    def __post_init__(self) -> None:
        for flag, value, low in (
            ("--epochs", self.epochs, 1),
            ("--batch-size", self.batch_size, 1),
            ("--learning-rate", self.learning_rate, 0),
            ("--weight-decay", self.weight_decay, 0),
            ("--seed", self.seed, 0),
            ("--num-processes", self.num_processes, 1),
            ("--process-id", self.process_id, 0),
        ):
            if value is not None and not low <= value < 2**31:  # nor is NaN
                raise ConfigError(f"{flag} is {value}, but must be at least {low} and less than 2**31.")

    @property
    def settings(self) -> Recipe:
        """The recipe, with what the flags say instead."""
        flags = ("epochs", "batch_size", "learning_rate", "weight_decay")
        given = {flag: getattr(self, flag) for flag in flags if getattr(self, flag) is not None}
        return replace(RECIPES[self.recipe], **given)

    @property
    def decisive(self) -> dict[str, Any]:
        """All that the result depends on, besides the data."""
        own = {name: getattr(self, name) for name in ("dataset", "recipe", "dtype", "seed")}
        return own | asdict(self.settings)
