"""Train a small convolutional network on MNIST: `python train_mnist.py`, or with `--help` for the flags."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO

import tyro

from mnist.config import Config, ConfigError, UserError
from mnist.data import obtain
from mnist.datasets import DATASETS
from mnist.devices import connect
from mnist.idx import DataError
from mnist.terminal import say
from mnist.training import fingerprint, train


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        run(parse(args))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or 'The system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def parse(args: Sequence[str] | None) -> Config:
    """Read the flags; what is wrong with them becomes one sentence instead of tyro's box of several lines."""
    box = StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(Config, args=args, prog="train_mnist.py")
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        message, _, _ = "".join(box.getvalue().splitlines(keepends=True)[1:]).partition("───")
        raise ConfigError(f"{' '.join(message.replace('│', ' ').split())}; see --help.") from None


def run(config: Config) -> None:
    """Get the data, train, and print what came out."""
    connect(config)
    splits = obtain(config.data_dir.expanduser(), config.idx_dir, DATASETS[config.dataset])
    train_size, test_size = (len(splits[split].labels) for split in ("train", "test"))
    say(f"{train_size:,} training and {test_size:,} test images")
    result = train(config, splits)
    say(f"final test accuracy {result.accuracy:.2%}   parameters {fingerprint(result.params)}")


if __name__ == "__main__":
    sys.exit(main())
