"""Train a small convolutional network on MNIST: `python train_mnist.py`, or with `--help` for the flags."""

import sys
from collections.abc import Sequence

import tyro

from mnist.config import Config, ConfigError
from mnist.data import obtain
from mnist.idx import DataError
from mnist.training import fingerprint, train


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        config = tyro.cli(Config, args=args)
        run(config)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def run(config: Config) -> None:
    """Get the data, train, and print what came out."""
    splits = obtain(config.data_dir, config.idx_dir)
    print(f"{len(splits['train'].labels):,} training and {len(splits['test'].labels):,} test digits", flush=True)
    result = train(config, splits)
    print(f"final test accuracy {result.accuracy:.2%}   parameters {fingerprint(result.params)}")


if __name__ == "__main__":
    sys.exit(main())
