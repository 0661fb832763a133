"""What Ctrl-C, SIGTERM and SIGHUP do, from the first moment on: so this imports nothing that takes time.

Python calls handlers in its main thread, between two of its own steps, and one step can be seconds of compilation or
of computing. So the system only wakes up a thread, which answers at once, whatever the main thread does.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
NUMBERS = [int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)]
HANGUP = int(getattr(signal, "SIGHUP", 0))


class Interrupted(KeyboardInterrupt):
    """A signal ended the process before its time; who should know has been told."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


def leave(number: int) -> None:
    """End the process, like a kill: what is written at this moment is left for the next run to remove."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + number)


def tell(line: str) -> Callable[[int], None]:
    """Return an answer to a signal that prints the line."""
    return lambda _: print(line, file=sys.stderr, flush=True)


def ignore(number: int) -> None:
    """Leave it to the thread."""


def interrupt(number: int) -> None:
    """Have the main thread clean up as it ends; not while JAX computes, which an exception can crash."""
    raise Interrupted(number)


@contextmanager
def heard(answer: Callable[[int], None], handle: Callable[[int], None] = ignore) -> Generator[Callable[[], int]]:
    """Within, the first signal is answered by a thread, and handled by the main one as soon as that can.

    The function that this yields says which it was, or 0; who ends without having asked is interrupted. The same
    signal again ends the process at once, except a SIGHUP: a terminal that is closed may send several.
    """
    came: list[int] = []
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while heard := ear.recv(1):
            number = heard[0]
            if number == HANGUP:
                silence(terminals)
            if number in came and number != HANGUP:
                leave(number)
            if number in NUMBERS:
                came.append(number)
                if len(came) == 1:
                    answer(number)

    def in_main(number: int, frame: FrameType | None) -> None:
        del frame
        handle(number)

    # None stands for a handler that is not Python's. What ignores SIGHUP, as nohup makes it, goes on to do so.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in NUMBERS}
    before = {n: handler for n, handler in before.items() if n != HANGUP or handler is not signal.SIG_IGN}
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    outer = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, in_main)
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        mouth.close()
        thread.join()
        ear.close()
    if came:
        raise Interrupted(came[0])


def cleaned() -> AbstractContextManager[Callable[[], int]]:
    """Within, a signal ends what is under way by an exception, so that it leaves nothing half-written."""
    return heard(tell("Interrupted."), interrupt)


def silence(descriptors: list[int]) -> None:
    """Once a terminal is closed, writing to it is an error: send what is still said there to nowhere."""
    for descriptor in descriptors:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
