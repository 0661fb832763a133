"""Interrupted runs of the worked example go on, and end with the bits of a run that was never interrupted."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")

from _mnist_run import stripes
from flax import nnx

from mnist import checkpoints, machine, run, training
from mnist.config import Config
from mnist.disk import refusal
from mnist.idx import Digits
from mnist.model import make_network
from mnist.workdir import WorkdirError, alone

HERE = Path(__file__).parent
RUN = {"epochs": 12, "batch_size": 25}  # of 20 steps each


def environment(folder: Path) -> dict[str, str]:
    """Restarts are cheap with a cache of compiled programs, which the first run fills."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}


def start(workdir: Path, death: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, HERE / "_mnist_run.py", death, json.dumps({**RUN, "workdir": str(workdir)})]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(cache), stdout=pipe, stderr=pipe, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def metrics(workdir: Path) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """Return the workdir of a run that nobody disturbed, and what it said at the end."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return workdir, outcome(start(workdir, "never", cache))


def assert_same_end(workdir, process, uninterrupted):
    other, expected = uninterrupted
    assert outcome(process)["fingerprint"] == expected["fingerprint"]
    assert metrics(workdir) == metrics(other)


def test_metrics_are_one_line_an_epoch(uninterrupted):
    workdir, _ = uninterrupted
    rows = [json.loads(line) for line in metrics(workdir).splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(n, 20 * n) for n in range(1, 13)]
    assert all(set(row) == {"epoch", "step", "train_loss", "test_loss", "test_accuracy"} for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 0.9


@pytest.mark.more
def test_killed_at_ten_moments(tmp_path, uninterrupted, cache):
    """One of them while a checkpoint is written, one before the first step, and the others wherever it hits."""
    workdir = tmp_path / "run"
    rng = random.Random(0)
    length = 0.2 * uninterrupted[1]["seconds"]
    for death in ["+2", "saving", *(str(rng.uniform(0, length)) for _ in range(8))]:
        died = start(workdir, death, cache)
        _, err = died.communicate(timeout=300)
        assert died.returncode == -signal.SIGKILL, err
        if death == "saving":
            names = {path.name for path in (workdir / "checkpoints").iterdir()}
            whole = {name for name in names if name.isdigit()}
            assert whole
            assert names - whole  # so it did die in the middle
    steps = checkpoint_steps(workdir)
    assert 20 <= max(steps) < 240  # so the end below is a resumed one
    assert_same_end(workdir, start(workdir, "never", cache), uninterrupted)


def checkpoint_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.more(cases=1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path, uninterrupted, cache):
    workdir = tmp_path / "run"
    process = start(workdir, "never", cache)
    deadline = time.monotonic() + 300
    try:
        while not (workdir / "metrics.jsonl").exists() or not metrics(workdir):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    last = checkpoint_steps(workdir)[-1]
    told, stopped = err.splitlines()
    assert told == training.SAVING
    assert stopped == f"Stopped after step {last}, which {workdir} keeps: the same command goes on from there."
    assert last < 240
    assert_same_end(workdir, start(workdir, "never", cache), uninterrupted)


@pytest.mark.more
def test_a_run_saves_inside_an_epoch_and_goes_on_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LONGEST_DISPATCH", 4)  # five dispatches an epoch
    config = Config(epochs=2, batch_size=25, workdir=tmp_path / "undisturbed")
    undisturbed = training.train(config, splits())
    assert checkpoint_steps(config.workdir) == [20, 40]
    save, config = checkpoints.save, Config(epochs=2, batch_size=25, workdir=tmp_path / "run")

    def save_and_die(manager, step, *what):
        save(manager, step, *what)
        if step == 28:
            raise RuntimeError("died")

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(checkpoints, "save", save_and_die)
        with pytest.raises(RuntimeError, match="died"):
            training.train(config, splits())
    assert checkpoint_steps(config.workdir) == [20, 28]
    resumed = training.train(config, splits())
    assert training.fingerprint(resumed.params) == training.fingerprint(undisturbed.params)
    assert metrics(config.workdir) == metrics(tmp_path / "undisturbed")


# What stops a run


def splits() -> dict[str, Digits]:
    return {"train": stripes(500, 0), "test": stripes(100, 1)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(error: Exception) -> str:
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"epochs": 13}, ["epochs is 12 there and 13 now"]),
        ({"seed": 1, "dtype": "bfloat16"}, ["seed is 0 there and 1 now", "dtype is float32 there and bfloat16 now"]),
        ({"recipe": "accurate"}, ["recipe is default there and accurate now"]),
    ],
)
def test_another_configuration_is_refused(flags, expected, uninterrupted):
    workdir, _ = uninterrupted
    before = contents(workdir)
    with pytest.raises(WorkdirError) as caught:
        training.train(Config(**{**RUN, **flags}, workdir=workdir), splits())
    text = one_sentence(caught.value)
    assert str(workdir) in text
    for part in expected:
        assert part in text
    assert "data is" not in text
    assert contents(workdir) == before


def test_other_data_are_refused(uninterrupted):
    workdir, _ = uninterrupted
    before = contents(workdir)
    with pytest.raises(WorkdirError) as caught:
        training.train(Config(**RUN, workdir=workdir), {"train": stripes(600, 2), "test": stripes(100, 1)})
    one, other = (rf"a sample of {n} training and 100 test images of MNIST \([0-9a-f]{{16}}\)" for n in (500, 600))
    assert re.search(rf"\(data is {one} there and {other} now\): choose another one", one_sentence(caught.value))
    assert f"--workdir {workdir}-2," in str(caught.value)
    assert contents(workdir) == before


def test_a_finished_run_is_not_trained_again(uninterrupted, tmp_path, capsys, monkeypatch):
    """Nor does it matter where the data lie; and metrics that the checkpoint does not know are dropped."""
    finished, expected = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 13}\n')

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "make_run", lambda *_: refuse)
    result = training.train(Config(**RUN, workdir=workdir, data_dir=Path("elsewhere")), splits())
    assert training.fingerprint(result.params) == expected["fingerprint"]
    assert result.accuracy == json.loads(metrics(finished).splitlines()[-1])["test_accuracy"]
    assert metrics(workdir) == metrics(finished)
    assert "is complete after step 240" in capsys.readouterr().out


@pytest.mark.more
def test_a_run_that_goes_on_elsewhere_says_so(uninterrupted, tmp_path, capsys, monkeypatch):
    finished, expected = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "240")
    before = machine.here()
    monkeypatch.setattr(machine, "here", lambda: "1 core of another machine")
    result = training.train(Config(**RUN, workdir=workdir), splits())
    _, resumed, told, *epochs = capsys.readouterr().out.splitlines()
    assert resumed.endswith("goes on after step 220")
    assert told == (
        f"It was trained on {before}, but goes on with 1 core of another machine, so it will end with other bits."
    )
    assert len(epochs) == 1
    assert (workdir / "machines.txt").read_text() == f"{before}\n1 core of another machine\n"
    assert training.fingerprint(result.params) == expected["fingerprint"]  # since it was the same one in truth


def test_a_machine_is_told_only_where_a_step_was_made(tmp_path, capsys, monkeypatch):
    for now, step in ("first", 0), ("second", 0), ("second", 10), ("third", 20), ("third", 30):
        monkeypatch.setattr(machine, "here", lambda now=now: now)
        machine.note(tmp_path, step)
        told = "It was trained on second, but goes on with third, so it will end with other bits.\n"
        assert capsys.readouterr().out == (told if now == "third" else "")
    assert (tmp_path / "machines.txt").read_text() == "second\nthird\n"


def test_a_machine_is_its_devices_usable_cores_and_jax(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert machine.here() == f"1 cpu device, 1 core, JAX {jax.__version__}"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert machine.here() == f"1 cpu device, 2 cores, JAX {jax.__version__}"


def test_the_configuration_and_the_weights_can_be_read_back(uninterrupted):
    workdir, expected = uninterrupted
    before = contents(workdir)
    config = checkpoints.stored_config(workdir)
    assert config.decisive == Config(**RUN).decisive
    params = checkpoints.restore_params(workdir)
    assert training.fingerprint(params) == expected["fingerprint"]
    test = splits()["test"]
    network, _ = nnx.split(make_network(config))
    predicted = np.asarray(nnx.merge(network, params)(test.images)).argmax(-1)
    assert np.mean(predicted == test.labels) == json.loads(metrics(workdir).splitlines()[-1])["test_accuracy"]
    assert contents(workdir) == before


HOLD = """
import sys, time
from pathlib import Path
from mnist.workdir import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_only_one_run_at_a_time_until_its_process_is_dead(tmp_path, cache):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError) as caught, alone(workdir):
            pass
        process.kill()
    assert one_sentence(caught.value).startswith(f"Another run is training in {workdir}: ")
    with alone(workdir):
        pass


def test_the_command_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "obtain", lambda *_: splits())
    with alone(tmp_path), pytest.raises(WorkdirError, match="Another run is training"):
        run.train(Config(**RUN, workdir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("prepare", [lambda folder: None, Path.mkdir], ids=["no folder", "an empty folder"])
def test_a_folder_without_a_run_gets_one_sentence(prepare, tmp_path):
    prepare(tmp_path / "run")
    for function in (checkpoints.stored_config, checkpoints.restore_params):
        with pytest.raises(WorkdirError, match="holds no run") as caught:
            function(tmp_path / "run")
        one_sentence(caught.value)


def test_a_missing_or_damaged_configuration_gets_one_sentence(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"config\.json is damaged") as caught:
        training.train(Config(**RUN, workdir=workdir), splits())
    one_sentence(caught.value)
    (workdir / "config.json").unlink()
    with pytest.raises(WorkdirError, match=r"config\.json is missing") as caught:
        training.train(Config(**RUN, workdir=workdir), splits())
    one_sentence(caught.value)
    assert not (workdir / "config.json").exists()


WRONG = (None, "x", [1], True, {})
BAD_CONFIGURATIONS = [
    "",
    "{",
    "[1]",
    "null",
    "[" * 100_000,
    "\x00\xff",
    '{"epochs": "x"}',
    *({name: value} for name in ("seed", "epochs", "learning_rate", "dataset", "recipe") for value in WRONG),
    *({name: 3} for name in ("data", "data_dir", "idx_dir", "dataset")),
    {"seed": -1},
    {"learning_rate": float("nan")},
]


@pytest.mark.parametrize("bad", BAD_CONFIGURATIONS, ids=lambda bad: str(bad)[:30])
def test_a_configuration_of_another_kind_gets_one_sentence(bad, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    good = Config(**RUN).decisive | {"data": "some", "data_dir": "elsewhere"}
    if isinstance(bad, dict):
        bad = json.dumps(good | bad)
    (workdir / "config.json").write_bytes(bad.encode("latin1"))
    before = contents(workdir)
    for function in (checkpoints.stored_config, lambda _: training.train(Config(**RUN, workdir=workdir), splits())):
        with pytest.raises(WorkdirError, match=r"config\.json is damaged: ") as caught:
            function(workdir)
        one_sentence(caught.value)
    assert contents(workdir) == before


def test_a_configuration_that_was_cut_or_changed_never_ends_in_a_traceback(uninterrupted, tmp_path):
    """Every beginning of the file, and every byte of it changed in turn: refused in a sentence, or still readable."""
    whole = (uninterrupted[0] / "config.json").read_bytes()
    path = tmp_path / "config.json"
    refused = 0
    damaged = [whole[:end] for end in range(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (1, 128)]
    for raw in damaged:
        path.write_bytes(raw)
        try:
            checkpoints.stored_config(tmp_path)
        except WorkdirError as error:
            one_sentence(error)
            refused += 1
    assert refused > len(damaged) / 2


@pytest.mark.more
@pytest.mark.parametrize(
    ("bad_update", "message"),
    [(30, "The loss is not finite at step 32, "), (39, "A parameter is not finite at step 40, ")],
    ids=["in an epoch", "at its end"],
)
def test_a_loss_that_is_not_finite_stops_the_run(bad_update, message, tmp_path, monkeypatch):
    """Update 30, counted from 0, makes NaN parameters, so that the loss of step 32, counted from 1, is NaN."""
    broken = optax.sgd(lambda count: jnp.where(count == bad_update, jnp.nan, 0.01))
    monkeypatch.setattr(training, "make_optimizer", lambda *_: broken)
    with pytest.raises(training.NotFiniteError) as caught:
        training.train(Config(**RUN, workdir=tmp_path / "run"), splits())
    assert one_sentence(caught.value).startswith(message)
    assert checkpoint_steps(tmp_path / "run") == [20]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.restore_params(tmp_path / "run")))
    assert len(metrics(tmp_path / "run").splitlines()) == 1


# What damages a checkpoint

TREES = {
    "params": {"kernel": jnp.arange(300.0).reshape(30, 10)},
    "progress": {"step": jnp.array(7), "loss": jnp.array(0.5)},
}


def tree_of(step: int) -> dict[str, object]:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) + step, TREES)


def save_two(workdir: Path) -> None:
    with checkpoints.opened(workdir) as manager:
        for step in (1, 2):
            checkpoints.save(manager, step, [{"epoch": step}], tree_of(step))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.more
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_never_believed(damage, tmp_path, capsys):
    """Damage each file in turn: either it matters not, or the checkpoint before is taken, and that is said."""
    save_two(tmp_path / "good")
    newest = tmp_path / "good" / "checkpoints" / "2"
    fell_back = 0
    for number, file in enumerate(sorted(path for path in newest.rglob("*") if path.is_file())):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", workdir)
        damage(workdir / file.relative_to(tmp_path / "good"))
        with checkpoints.opened(workdir) as manager:
            step, history, trees = checkpoints.latest(manager, TREES)
            kept = list(manager.all_steps())
        said = "The checkpoint of step 2 is damaged, so that of step 1 is taken.\n" if step == 1 else ""
        assert capsys.readouterr().out == said, file
        assert history == [{"epoch": step}]
        assert kept == ([1] if step == 1 else [1, 2])
        assert jax.tree.all(jax.tree.map(np.array_equal, trees, tree_of(step)))
        fell_back += step == 1
    assert fell_back > 3


def test_all_checkpoints_damaged_is_an_error_and_deletes_none(tmp_path):
    save_two(tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/record/metadata"):
        file.write_text("nothing")
    before = contents(tmp_path)
    with (
        checkpoints.opened(tmp_path) as manager,
        pytest.raises(WorkdirError, match=r"All checkpoints in .* are damaged") as caught,
    ):
        checkpoints.latest(manager, TREES)
    one_sentence(caught.value)
    assert contents(tmp_path) == before


def test_only_the_newest_two_are_kept_and_what_is_unfinished_is_removed(tmp_path):
    unfinished = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    save_two(tmp_path)
    assert not unfinished.exists()
    with checkpoints.opened(tmp_path) as manager:
        checkpoints.save(manager, 3, [], tree_of(3))
    assert checkpoint_steps(tmp_path) == [2, 3]


def test_arrays_may_change_while_they_are_saved(tmp_path):
    """Donating the arrays to the next step, as training does, leaves what is being saved alone."""
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    like = {"params": {"kernel": jnp.zeros((1000, 1000))}}
    trees = like
    with checkpoints.opened(tmp_path) as manager:
        trees = jax.tree.map(jnp.copy, trees)
        for step in range(1, 6):
            trees = add(trees)
            checkpoints.save(manager, step, [], trees)
            for _ in range(3):
                trees = add(trees)
    with checkpoints.opened(tmp_path) as manager:
        _, _, found = checkpoints.latest(manager, like)
    assert np.all(np.asarray(found["params"]["kernel"]) == 1 + 4 * 4)


FULL = """
import resource, sys
from pathlib import Path
from _mnist_run import stripes
import train_mnist
from mnist import run

run.obtain = lambda *_: {"train": stripes(500, 0), "test": stripes(100, 1)}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
sys.exit(train_mnist.main(["--epochs", "3", "--batch-size", "100", "--workdir", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize(
    ("limit", "what"), [(100, "config.json"), pytest.param(100_000, "checkpoints", marks=pytest.mark.more)]
)
def test_a_full_disk_gets_one_sentence(limit, what, tmp_path):
    """No file can grow beyond the limit: the command says nothing else, and leaves no part of a file."""
    workdir = tmp_path / "run"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(workdir), str(limit)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    place = workdir / what if what == "checkpoints" else workdir
    assert re.fullmatch(
        rf".*{re.escape(str(place))}.*: File too large, with [0-9,]+\.[0-9] MB free\.\n", done.stderr
    ), done.stderr
    assert not list(workdir.glob(".*.new"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device, with [\d,]+\.\d MB free"),
        (ValueError("DATA_LOSS: [x: No space left on device]\n..."), r"No space left on device, with .* free"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied"),
        (RuntimeError("of another\nkind."), "of another kind, with .* free"),
        (RuntimeError(), "RuntimeError, with .* free"),
    ],
)
def test_why_a_disk_takes_no_more(error, words, tmp_path):
    assert re.fullmatch(words, refusal(error, tmp_path / "not" / "there"))
