"""What a run says at the terminal."""

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
