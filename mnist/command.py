"""Train a network on MNIST: `python train_mnist.py`, with the flags below.

Ctrl-C, SIGTERM or SIGHUP saves what is trained and ends the run; a second Ctrl-C or SIGTERM ends it at once.

`python train_mnist.py evaluate --workdir W` measures what a run has trained on the test images.

`python train_mnist.py predict --workdir W IMAGE...` says what pictures of digits show.
"""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import tyro

from mnist.config import Config, ConfigError, UserError
from mnist.predict import Evaluate, Predict, evaluate, predict
from mnist.run import train
from mnist.signals import Interrupted

KINDS = {"INT": "a whole number", "FLOAT": "a number"}  # that flags take, by tyro's words
COMMANDS: dict[str, Any] = {"train": (Config, train), "evaluate": (Evaluate, evaluate), "predict": (Predict, predict)}


def run(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    try:
        command, flags = parse(args)
        command(flags)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"{error.filename or 'The system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.status
    return 0


def parse(args: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """Read command and flags; what is wrong with them becomes one sentence instead of tyro's box of several lines."""
    if args and args[0] not in COMMANDS and not args[0].startswith("-"):
        raise ConfigError(f"There is no command {args[0]}, only {', '.join(COMMANDS)}; see --help.")
    name, rest = (args[0], args[1:]) if args and args[0] in COMMANDS else ("train", args)
    flags, run = COMMANDS[name]
    prog, about = ("train_mnist.py", __doc__) if rest is args else (f"train_mnist.py {name}", None)
    box = StringIO()
    try:
        with redirect_stderr(box):
            return run, tyro.cli(flags, args=rest, prog=prog, description=about)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(f"{reason(box.getvalue())}; see --help.") from None


def reason(box: str) -> str:
    """Return the message of tyro's box and the flags that it suggests, without all else that it tells of them."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:-1]]  # without the title
    text = "\n".join(lines).lstrip("-\n")  # the rules are of "-", one below the title, where stdout is not UTF-8
    message, *details, _ = re.split(r"\n[─-]{4,}\n", text)
    message = " ".join(message.split()).rstrip(" .")
    described = re.findall(r"^(--\w\S*) ?(\S*)", "\n".join(details), re.MULTILINE)  # flags, and what they take
    if wrong := re.match(r"Error parsing (--\S+): .*(['\"])(.*)\2", message):  # and what each type has against it
        kind = described[0][1].removeprefix("{None}|")
        return f"{wrong[1]} takes {KINDS.get(kind, kind)}, not {wrong[3]}"
    if described and message.startswith("Unrecognized"):
        return f"{message}; perhaps you meant {' or '.join(flag for flag, _ in described)}"
    return message
