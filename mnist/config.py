"""Everything a run can be told, as one dataclass: its fields are the command's flags."""

import os
from dataclasses import dataclass
from pathlib import Path


class ConfigError(Exception):
    """A flag with a value that makes no sense, in one sentence for the person at the terminal."""


@dataclass(frozen=True)
class Config:
    """Train a small convolutional network on MNIST, the handwritten digits."""

    data_dir: Path = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    """Where TensorFlow Datasets keeps prepared data; MNIST is prepared here unless it is there already."""
    idx_dir: Path | None = None
    """A folder with the four official IDX files, gzip-compressed or not, to use instead of the network."""
    epochs: int = 10
    """How often every training digit is seen."""
    batch_size: int = 128
    """How many digits make one step of the optimiser."""
    learning_rate: float = 3e-3
    """The highest learning rate of the schedule, which warms up and then falls along a cosine."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    seed: int = 0
    """Decides everything random: two runs with the same seed end with the same bits."""

    def __post_init__(self) -> None:
        for flag, value, low in (
            ("--epochs", self.epochs, 1),
            ("--batch-size", self.batch_size, 1),
            ("--learning-rate", self.learning_rate, 0),
            ("--weight-decay", self.weight_decay, 0),
            ("--seed", self.seed, 0),
        ):
            if not low <= value < 2**31:  # nor is NaN
                raise ConfigError(f"{flag} is {value}, but must be at least {low} and less than 2**31.")
