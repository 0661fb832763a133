"""Train a network on MNIST: `python train_mnist.py`, with the flags that `--help` lists."""

import signal
import sys
from collections.abc import Sequence

from mnist.signals import heard, leave


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a signal ends it without a word, where nobody else hears it."""
    with heard(leave):
        from mnist.command import run  # takes seconds

        return run(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # after all, too, Ctrl-C makes no traceback
    sys.exit(main())
