"""Signals are answered at once, whatever the main thread does; test_mnist_resume.py has what a training keeps."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnist import signals

ROOT = Path(__file__).parents[1]
NUMBERS = pytest.mark.parametrize("number", signals.NUMBERS, ids=signals.NAMES[: len(signals.NUMBERS)])

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send these signals there")

# One call of a library that lasts for hours, in which Python handles no signal.
BUSY = """
import hashlib, sys
from mnist import signals

def compute():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.fixture(autouse=True)
def no_nohup():
    """A signal that is ignored when the tests are started is ignored by processes that they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextmanager
def started(*arguments, folder=ROOT, **pipes):
    """Yield a process that has printed its first line, and end it however the test ends."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process):
    """Wait for the end, and return the status and what was said."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@NUMBERS
def test_the_command_ends_without_a_word_while_it_imports(number, tmp_path):
    """A library that swallows exceptions does not prevent it."""
    (tmp_path / "tyro.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "while True:\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        pass\n"
    )
    # The path is set by hand, since the script's own folder comes before PYTHONPATH.
    with started("-c", "import sys, train_mnist; sys.exit(train_mnist.main([]))", folder=tmp_path) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert ended(process) == (128 + number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_acknowledged_at_once_and_a_second_one_ends_the_process(number):
    script = f"{BUSY}\nwith signals.heard(signals.tell('Saving.')):\n    compute()"
    with started("-c", script) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stderr.readline() == "Saving.\n"
        assert process.poll() is None
        process.send_signal(number)
        assert ended(process) == (128 + number, "", "")


CLOSED = """
import fcntl, sys, termios, time
from pathlib import Path
from mnist import signals

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on the terminal is this process's own
with signals.heard(signals.tell("Saving.")) as signal:
    Path(sys.argv[1]).write_text("ready")  # and not to the terminal, whose end a write may not outlive
    while not signal():
        time.sleep(0.01)
    time.sleep(0.5)  # while another one comes
    print("goes on", flush=True)
    Path(sys.argv[1]).write_text("saved")
    sys.exit(128 + signal())
"""


def test_a_closed_terminal_is_a_signal_and_no_error(tmp_path):
    """Its SIGHUP may come more than once, and nothing can be printed any more."""
    ours, theirs = os.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with started("-c", CLOSED, tmp_path / "file", **terminal) as process:
        os.close(theirs)
        while not (tmp_path / "file").exists():
            time.sleep(0.01)
        os.close(ours)
        time.sleep(0.2)  # or the two become one
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP
    assert (tmp_path / "file").read_text() == "saved"


def test_what_ignores_hangups_goes_on_to_do_so():
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does\n"
        "from mnist import signals\n"
        "with signals.heard(signals.leave) as heard:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(heard())"
    )
    with started("-c", script) as process:
        assert ended(process) == (0, "0\n", "")


def test_an_interrupted_part_cleans_up(tmp_path):
    script = (
        "import sys, tempfile, time\n"
        "from mnist import signals\n"
        "try:\n"
        "    with signals.cleaned(), tempfile.TemporaryDirectory(dir=sys.argv[1]):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "except signals.Interrupted as stop:\n"
        "    sys.exit(stop.status)"
    )
    with started("-c", script, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (128 + signal.SIGTERM, "", "Interrupted.\n")
    assert not list(tmp_path.iterdir())


def test_handlers_are_put_back_and_who_did_not_ask_is_interrupted():
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    with pytest.raises(signals.Interrupted) as caught, signals.heard(signals.ignore):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.status == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before
