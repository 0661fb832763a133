"""What a run says at the terminal, and what it hears there."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mnist.devices import is_main


def say(line: str) -> None:
    """Print a line, once if there are several processes."""
    if is_main():
        print(line, flush=True)


class Throughput(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


def progress_bar() -> Progress:
    """Return a bar for terminals; where stdout is none, it stays invisible."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), Throughput(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_main()))


@contextmanager
def heard() -> Generator[Callable[[], int]]:
    """Within, SIGTERM and Ctrl-C end nothing: the function says which signal has come, or 0.

    A second time, the same signal does what it does elsewhere.
    """
    came = 0
    # None stands for a handler that is not Python's.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        del frame
        came = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
