"""A short training in a process of its own, which may kill itself.

python _mnist_run.py DEATH CONFIG

DEATH says when the process dies as by `kill -9`: after a number of seconds, since its start if the number has a plus
sign, else since its first step, but at the end of its second epoch at the latest; or `saving`: in the middle of
saving a checkpoint; or `never`. CONFIG is JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from mnist import training
from mnist.config import Config, UserError
from mnist.devices import connect
from mnist.idx import Digits

begun: list[float] = []  # when the metrics were written


def stripes(count: int, seed: int) -> Digits:
    """Draw noisy images with a bright stripe, whose place is the label."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 28, 28, 1), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for image, label in zip(images, labels, strict=True):
        image[:, 4 + 2 * label : 6 + 2 * label] = 180
    return Digits(images, labels)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds: float) -> None:
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def die_while_saving(folder: Path) -> None:
    """Wait for a checkpoint that is under way while an earlier one is whole."""
    while True:
        names = [path.name for path in folder.glob("*")]
        if any("tmp" in name for name in names) and any(name.isdigit() for name in names):
            die()
        time.sleep(0.0005)


def arrange(death: str, config: Config) -> None:
    if death == "saving":
        threading.Thread(target=die_while_saving, args=(config.workdir / "checkpoints",), daemon=True).start()
    elif death.startswith("+"):
        die_after(float(death))
    write_metrics = training.write_metrics

    def write_and_note(*args: object) -> None:
        write_metrics(*args)
        begun.append(time.perf_counter())
        if death[0].isdigit() and len(begun) == 1:
            die_after(float(death))
        elif death[0].isdigit() and len(begun) == 3:
            die()

    training.write_metrics = write_and_note  # called before the first step, and after every epoch


def main(death: str, text: str) -> int:
    values = json.loads(text)
    config = Config(**{**values, "workdir": Path(values["workdir"])})
    arrange(death, config)
    try:
        connect(config)
        result = training.train(config, {"train": stripes(500, 0), "test": stripes(100, 1)})
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    print(json.dumps({"fingerprint": training.fingerprint(result.params), "seconds": time.perf_counter() - begun[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
