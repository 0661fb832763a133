"""Compiles jaxent's kernels for CPUs (jaxent/_kernels/native) when the package is built, if there is a C++ compiler.

Without one, or if it fails, the package is pure Python, and XLA computes what the kernels would. The environment may
say otherwise: JAXENT_NATIVE=no compiles nothing, JAXENT_NATIVE=yes makes it an error if nothing can be compiled, CXX
names the compiler, and CXXFLAGS are added to its flags.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("jaxent/_kernels/native")
LIBRARY = SOURCES / "libjaxent.so"

# One file is compiled for several instruction sets, and the library chooses when it is used.
LEVELS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def compiler() -> list[str] | None:
    """The command of a C++ compiler that understands GCC's vectors."""
    if os.environ.get("JAXENT_NATIVE") == "no" or sys.platform == "win32":
        return None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)


def headers() -> list[str]:
    """jaxlib, which has XLA's headers for foreign functions, in the oldest version that is supported.

    A library that is compiled with older headers runs with newer ones. Pythons of the future have none so old.
    """
    with open("pyproject.toml", "rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    oldest = next(d.removeprefix("jax>=") for d in dependencies if d.startswith("jax>="))
    return [f"jaxlib=={oldest}; python_version < '3.15'", f"jaxlib>={oldest}; python_version >= '3.15'"]


def source_hash() -> str:
    """Of all source files, as _kernels/native.py computes it."""
    files = sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def build(command: list[str], library: Path) -> None:
    """Compile and link, and put the library in its place at once."""
    import jaxlib

    include = Path(jaxlib.__file__).parent / "include"
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"base": LEVELS["base"]}
    extra = shlex.split(os.environ.get("CXXFLAGS", "")) + shlex.split(os.environ.get("ARCHFLAGS", ""))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        # Of an inline function that several have, the linker takes the first: newer instructions come last.
        jobs = {f"{scratch}/ffi.o": ["ffi.cc", f'-DJAXENT_SOURCES="{source_hash()}"', "-isystem", str(include)]}
        for name, flags in levels.items():
            jobs[f"{scratch}/{name}.o"] = ["rows.cc", f"-DJAXENT_LEVEL={name}", *flags]

        def compile(job: tuple[str, list[str]]) -> None:
            (to, (source, *flags)) = job
            run([*command, *FLAGS, *extra, *flags, "-c", str(SOURCES / source), "-o", to])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile, jobs.items()))
        runtime = (
            ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL,-s"] if sys.platform == "linux" else []
        )
        run([*command, *extra, "-shared", *jobs, *runtime, "-o", f"{scratch}/library"])
        os.replace(f"{scratch}/library", library)


def run(command: list[str]) -> None:
    """Run `command`; if it fails, its messages are the error's."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


class NativeKernels(BuildHookInterface):
    """Hatchling's hook: it makes the wheel one for this platform and every Python."""

    def dependencies(self) -> list[str]:
        """What compiling needs."""
        return headers() if self.target_name == "wheel" and compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected."""
        if self.target_name != "wheel":
            return
        command, required = compiler(), os.environ.get("JAXENT_NATIVE") == "yes"
        # Where the package is used from its source, the library stands beside it.
        self.scratch = None if version == "editable" else tempfile.mkdtemp()
        library = Path(self.scratch) / LIBRARY.name if self.scratch else LIBRARY
        library.unlink(missing_ok=True)
        if command is None:
            why = "JAXENT_NATIVE=no" if os.environ.get("JAXENT_NATIVE") == "no" else "no C++ compiler was found"
            if required:
                raise RuntimeError(why)
            self.app.display_warning(f"jaxent is installed without its kernels for CPUs: {why}")
            return
        try:
            build(command, library)
        except (ImportError, OSError, RuntimeError) as error:
            if required:
                raise
            self.app.display_warning(f"jaxent is installed without its kernels for CPUs: {error}")
            return
        self.app.display_info(f"jaxent's kernels for CPUs were compiled by {command[0]}")
        if self.scratch:
            build_data["force_include"][str(library)] = str(LIBRARY)
        build_data["pure_python"] = False
        target = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{target}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is complete."""
        del version, build_data, artifact_path
        if self.target_name == "wheel" and self.scratch:
            shutil.rmtree(self.scratch)
