"""Sharded losses: the cases of _sharding_cases.py on eight devices, and two processes that compute one loss.

All run in processes of their own, since the number of devices is fixed when JAX starts.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import _sharding_cases as cases
import _two_processes
import jax
import numpy as np
import pytest

HERE = Path(__file__).parent
# Each part in a process of its own, so that the workers of xdist share them.
PARTS = ["test_values_and_gradients", "test_only_scalars", "test_second or test_layouts or test_numbers"]
PARTS.append(f"not ({' or '.join(PARTS)})")


def _environment(devices):
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(HERE.parent)}


@pytest.mark.more(inside=True)
@pytest.mark.parametrize("part", PARTS)
def test_on_eight_devices(part, tmp_path, subtests, request):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "_sharding_cases.py", "-n", "0", "-k", part, f"--junitxml={report}"]
    command += [option for option in ("--all", "--rest") if request.config.getoption(option)]
    run = subprocess.run(
        command, cwd=HERE, env=_environment(8), capture_output=True, text=True, timeout=900, check=False
    )
    assert report.exists(), run.stdout + run.stderr
    results = list(ElementTree.parse(report).iter("testcase"))
    for case in results:
        with subtests.test(case.get("name")):
            problems = [child.text for child in case if child.tag in ("failure", "error", "skipped")]
            assert not problems, problems[0]
    assert results
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.more
def test_the_page_about_sharding_on_eight_devices():
    """Elsewhere its sessions run on one device, where no factor shows."""
    command = [sys.executable, "-m", "pytest", "docs/sharding.md", "-n", "0", "-q"]
    run = subprocess.run(
        command, cwd=HERE.parent, env=_environment(8), capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run_two_processes(directory, timeout):
    """Run both to the end, or until one fails or the time is over; return their exit statuses and what they wrote."""
    address = f"127.0.0.1:{_free_port()}"
    logs = [directory / f"{i}.log" for i in range(2)]
    processes = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, "_two_processes.py", address, str(i), str(directory / f"{i}.npz")]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(command, cwd=HERE, env=_environment(2), stdout=out, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        statuses = [p.poll() for p in processes]
        for p in processes:
            p.kill()
            p.wait()
    return statuses, "\n".join(log.read_text() for log in logs)


@pytest.mark.more
def test_two_processes(tmp_path):
    statuses, output = _run_two_processes(tmp_path, timeout=300)
    if _two_processes.NO_GLOO in statuses:
        pytest.skip(f"this jaxlib has no gloo: {output}")
    assert statuses == [0, 0], output  # None: still running when the time was over, or when the other failed
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as results:
            assert len(results.files) >= len(_two_processes.NAMES) * len(_two_processes.WAYS) * 2 * 2
            for key in results.files:
                name, *_, i = key.split("/")
                want = jax.tree.leaves(cases.unsharded(name))[int(i)]
                cases.assert_close(results[key], want, cases.CASES[name].dtype)


def test_two_processes_cannot_hang(tmp_path):
    start = time.monotonic()
    statuses, _ = _run_two_processes(tmp_path, timeout=0.5)
    assert statuses == [None, None]
    assert time.monotonic() - start < 30
