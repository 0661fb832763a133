"""Time softmax, log_softmax, nll and cross_entropy, forward and with gradient, against other libraries.

    python benchmarks/losses.py speed [--rounds 30] [--seconds 1.5] [--json FILE]
    python benchmarks/losses.py eager ...      # calls outside of jit on (128, 10), against jitted peers
    python benchmarks/losses.py compile ...    # seconds until the first value and gradient

`_runner.py` says how is measured. A JAX peer computes in float32 and returns what jaxent returns, so it is given
`logits.astype(float32)` where they are bfloat16. Losses are means; `value_and_grad` of softmax and log_softmax is
their value and its pullback of a given array. The contestants:

- jaxent
- jax.nn: what a user writes with `jax.nn.softmax` or `jax.nn.log_softmax`
- optax: `softmax_cross_entropy_with_integer_labels` where labels are indices, else `softmax_cross_entropy`
- optax one-hot: `softmax_cross_entropy` of one-hot labels (of `smooth_labels` with label smoothing)
- torch: eager `torch.nn.functional`; torch.compile: the same, compiled, for the shapes of `--compiled`
- limit, of large arrays: all cores read what has the logits' shape once (NumPy's maximum) and copy as many of these
  arrays as there are results of that shape, into fresh memory that they ask for in large pages: no arithmetic
"""

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _runner import Call, Measured, blocking, jitted, machine, measure, quartiles, write_json  # before PyTorch

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxent

SHAPES = [(128, 10), (65536, 10), (8192, 100), (1024, 1000), (512, 32000), (128, 128256)]
DTYPES = ["float32", "bfloat16"]
WORKS = ["forward", "value_and_grad"]
SMOOTHING = 0.1
LARGE = 2**24  # bytes of logits
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
POOL = ThreadPoolExecutor(CORES)
F = torch.nn.functional

Loss = Callable[..., Any]
Shape = tuple[int, ...]  # rows and classes, and of images, height and width


def picked(log_p: jax.Array, y: jax.Array) -> jax.Array:
    """Entry `y` of each row."""
    return jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]


def weighted_mean(losses: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """What a user adds for class weights and ignored labels."""
    weight = jnp.where(y >= 0, w[y], 0.0)
    return (losses * weight).sum() / weight.sum()


def one_hot(x: jax.Array, y: jax.Array) -> jax.Array:
    """One-hot labels in float32."""
    return jax.nn.one_hot(y, x.shape[1], axis=1)


def up(x: jax.Array) -> jax.Array:
    """Logits in float32."""
    return x.astype(jnp.float32)


def log_p(x: jax.Array) -> jax.Array:
    """JAX's own log-probabilities."""
    return jax.nn.log_softmax(up(x), 1)


integer = partial(optax.softmax_cross_entropy_with_integer_labels, axis=1)
dense = partial(optax.softmax_cross_entropy, axis=1)
cross_entropy = partial(jaxent.cross_entropy, axis=1)


def smooth(y: jax.Array) -> jax.Array:
    """`optax.smooth_labels` for classes along axis 1."""
    return (1 - SMOOTHING) * y + SMOOTHING / y.shape[1]


# For each job and library a function of logits (rows, classes, ...) and what else the job takes; see `inputs`.
JOBS: dict[str, dict[str, Loss]] = {
    "softmax": {
        "jaxent": partial(jaxent.softmax, axis=1),
        "jax.nn": lambda x: jax.nn.softmax(up(x), 1).astype(x.dtype),
        "torch": lambda x: F.softmax(x, 1),
    },
    "log_softmax": {
        "jaxent": partial(jaxent.log_softmax, axis=1),
        "jax.nn": lambda x: log_p(x).astype(x.dtype),
        "torch": lambda x: F.log_softmax(x, 1),
    },
    "nll of log_softmax": {
        "jaxent": lambda x, y: jaxent.nll(jaxent.log_softmax(x, 1, dtype=jnp.float32), y, axis=1),
        "jax.nn": lambda x, y: -picked(log_p(x), y).mean(),
        "optax": lambda x, y: integer(up(x), y).mean(),
        "torch": lambda x, y: F.nll_loss(F.log_softmax(x, 1), y),
    },
    "cross_entropy": {
        "jaxent": cross_entropy,
        "jax.nn": lambda x, y: -picked(log_p(x), y).mean(),
        "optax": lambda x, y: integer(up(x), y).mean(),
        "optax one-hot": lambda x, y: dense(up(x), one_hot(x, y)).mean(),
        "torch": F.cross_entropy,
    },
    "with smoothing": {
        "jaxent": lambda x, y: cross_entropy(x, y, label_smoothing=SMOOTHING),
        "jax.nn": lambda x, y: (SMOOTHING - 1) * picked(log_p(x), y).mean() - SMOOTHING * log_p(x).mean(),
        "optax one-hot": lambda x, y: dense(up(x), smooth(one_hot(x, y))).mean(),
        "torch": lambda x, y: F.cross_entropy(x, y, label_smoothing=SMOOTHING),
    },
    "with weights, ignoring": {
        "jaxent": lambda x, y, w: cross_entropy(x, y, weight=w),
        "jax.nn": lambda x, y, w: weighted_mean(-picked(log_p(x), jnp.maximum(y, 0)), y, w),
        "optax": lambda x, y, w: weighted_mean(integer(up(x), jnp.maximum(y, 0)), y, w),
        "torch": lambda x, y, w: F.cross_entropy(x, y, w.to(x.dtype)),
    },
    "of probabilities": {
        "jaxent": cross_entropy,
        "jax.nn": lambda x, q: -(up(q) * log_p(x)).sum(1).mean(),
        "optax": lambda x, q: dense(up(x), up(q)).mean(),
        "torch": F.cross_entropy,
    },
}
FULL_RESULT = ("softmax", "log_softmax")
JAX_PEERS = ("jax.nn", "optax", "optax one-hot")


class Cell(NamedTuple):
    """What is computed."""

    job: str
    work: str
    dtype: str
    shape: Shape


class Prepared(NamedTuple):
    """Compiled calls of a cell, and the seconds that compiling took."""

    cell: Cell
    calls: dict[str, Call]
    compile_seconds: dict[str, float]


def inputs(job: str, shape: Shape) -> tuple[np.ndarray, ...]:
    """Logits, and labels, class weights or probabilities; every fourth label is -100 if labels are ignored."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape, dtype=np.float32)
    if job in FULL_RESULT:
        return (x,)
    if job == "of probabilities":
        q = np.exp(rng.standard_normal(shape, dtype=np.float32))
        return x, q / q.sum(1, keepdims=True)
    y = rng.integers(shape[1], size=shape[:1] + shape[2:])
    if "ignoring" not in job:
        return x, y
    y.reshape(-1)[::4] = -100
    return x, y, rng.uniform(0.5, 2.0, shape[1]).astype(np.float32)


def with_gradient(job: str, f: Loss) -> Loss:
    """`f` and its derivative by the logits: its gradient, or its pullback of an array that comes last."""
    if job not in FULL_RESULT:
        return jax.value_and_grad(f)

    def both(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pullback = jax.vjp(f, x)
        return out, pullback(cotangent)[0]

    return both


def torch_call(job: str, f: Loss, work: str, args: list[torch.Tensor]) -> Call:
    """A call of PyTorch's function, with backward if asked for."""
    if work == "forward":
        return lambda: f(*args)
    logits, *rest = args
    logits.requires_grad_()
    cotangent = rest.pop() if job in FULL_RESULT else None

    def call() -> None:
        logits.grad = None
        f(logits, *rest).backward(cotangent)

    return call


def apart(f: Loss) -> Loss:
    """`f` with code of its own: PyTorch compiles what has the same code for eight shapes, and then interprets."""

    def call(*args: Any) -> Any:
        return f(*args)

    call.__code__ = call.__code__.replace()
    return call


def prepare(cell: Cell, compiled: Iterable[Shape] = ()) -> Prepared:
    """Compile everybody's function of one cell; torch.compile's for the shapes in `compiled`."""
    job, work, dtype, shape = cell
    arrays = list(inputs(job, shape))
    if work == "value_and_grad" and job in FULL_RESULT:
        arrays.append(np.random.default_rng(1).standard_normal(shape, dtype=np.float32))
    in_dtype = [a.shape == shape for a in arrays]  # the others are labels and weights
    args = [jnp.asarray(a, dtype if cast else None) for a, cast in zip(arrays, in_dtype, strict=True)]
    tensors = [
        torch.tensor(a, dtype=getattr(torch, dtype) if cast else None)
        for a, cast in zip(arrays, in_dtype, strict=True)
    ]
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    for name, f in JOBS[job].items():
        if name != "torch":
            calls[name], seconds[name] = jitted(f if work == "forward" else with_gradient(job, f), *args)
            continue
        calls[name] = torch_call(job, f, work, tensors)
        if shape in compiled:
            start = time.perf_counter()
            calls["torch.compile"] = torch_call(job, torch.compile(apart(f), dynamic=False), work, tensors)
            calls["torch.compile"]()
            seconds["torch.compile"] = time.perf_counter() - start
    large = [np.asarray(x) for x in args if x.shape == shape]
    if large[0].nbytes >= LARGE:
        calls["limit"] = limit_of(large, (job in FULL_RESULT) + (work == "value_and_grad"))
    return Prepared(cell, calls, seconds)


def limit_of(arrays: list[np.ndarray], results: int) -> Call:
    """Touch what must be touched, and nothing else."""

    def cut(x: Any, like: np.ndarray) -> list[np.ndarray]:
        return np.array_split(np.frombuffer(x, f"u{like.itemsize}"), CORES)

    views = [cut(x, x) for x in arrays]

    def call() -> None:
        for view in views[results:]:
            list(POOL.map(np.max, view))
        for x, view in zip(arrays, views[:results], strict=False):
            fresh = mmap.mmap(-1, x.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has large pages on request
                fresh.madvise(mmap.MADV_HUGEPAGE)
            list(POOL.map(np.copyto, cut(fresh, x), view))

    return call


def best_jax(measured: Measured) -> float:
    """How many times jaxent's time the fastest JAX peer takes."""
    return min(measured.ratio[name][1] for name in JAX_PEERS if name in measured.ratio)


def users_choice(cell: Cell) -> str:
    """The JAX peer that a user would write."""
    return "optax one-hot" if cell.job == "with smoothing" else "optax" if "optax" in JOBS[cell.job] else "jax.nn"


def speed(args: argparse.Namespace) -> None:
    """The table of all cells."""
    cells = [Cell(*c) for c in ((j, w, d, s) for j in JOBS for d in args.dtypes for w in WORKS for s in args.shapes)]
    cells = [c for c in cells if not args.only or args.only in f"{c.job} {c.work} {c.dtype} {c.shape}"]
    prepared = [prepare(cell, args.compiled) for cell in cells]
    if args.pause:
        input("Compiled. Enter starts the measurement. ")
    names = ["limit", *JAX_PEERS, "torch", "torch.compile"]
    print(f"{'job':>23} {'work':>15} {'dtype':>9} {'shape':>18} {'ms':>8} " + " ".join(f"{n:>13}" for n in names))
    rows: list[tuple[Cell, Measured]] = []
    for cell, calls, _ in prepared:
        measured = measure(calls, "jaxent", args.rounds, args.seconds)
        rows.append((cell, measured))
        ratios = [f"{measured.ratio[n][1]:13.2f}" if n in measured.ratio else 13 * " " for n in names]
        print(
            f"{cell.job:>23} {cell.work:>15} {cell.dtype:>9} {cell.shape!s:>18} {measured.ms['jaxent'][1]:8.3f} "
            + " ".join(ratios),
            flush=True,
        )
    print("\n" + summary(rows) + "\n" + tables(rows))
    if args.json:
        compiling = [p.compile_seconds for p in prepared]
        content = [
            {**c._asdict(), **m._asdict(), "compile_seconds": s} for (c, m), s in zip(rows, compiling, strict=True)
        ]
        write_json(args.json, {"machine": machine("optax", "torch"), "rows": content})


def summary(rows: list[tuple[Cell, Measured]]) -> str:
    """Geometric means for each job, and the worst cell, as a Markdown table."""
    lines = [
        "| job | a user's JAX | torch | torch.compile | best JAX peer: mean | worst cell |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for job in [*JOBS, "all"]:
        of_job = [(c, m) for c, m in rows if job in (c.job, "all")]
        if not of_job:
            continue
        users = mean(m.ratio[users_choice(c)][1] for c, m in of_job)
        torches = [mean(m.ratio[t][1] for _, m in of_job if t in m.ratio) for t in ("torch", "torch.compile")]
        cell, worst = min(of_job, key=lambda row: best_jax(row[1]))
        at = f"{best_jax(worst):.2f} ({cell.work}, {cell.dtype}, {cell.shape})"
        columns = [job, users, *torches, mean(best_jax(m) for _, m in of_job), at]
        lines.append("| " + " | ".join(c if isinstance(c, str) else f"{c:.2f}" for c in columns) + " |")
    return "\n".join(lines)


def tables(rows: list[tuple[Cell, Measured]]) -> str:
    """How many times jaxent's time the fastest JAX peer takes, a Markdown table for each kind of work and dtype."""
    ratio = {cell: best_jax(measured) for cell, measured in rows}
    shapes = list(dict.fromkeys(cell.shape for cell in ratio))
    lines: list[str] = []
    for work, dtype in sorted(
        {(cell.work, cell.dtype) for cell in ratio}, key=lambda kind: (kind[1] != "float32", kind)
    ):
        lines += ["", f"| {work}, {dtype} | " + " | ".join("×".join(map(str, shape)) for shape in shapes) + " |"]
        lines.append("|---|" + "---:|" * len(shapes))
        for job in JOBS:
            found = [ratio.get(Cell(job, work, dtype, shape)) for shape in shapes]
            if any(found):
                lines.append(f"| {job} | " + " | ".join("" if x is None else f"{x:.2f}" for x in found) + " |")
    return "\n".join(lines)


def mean(ratios: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    values = list(ratios)
    return statistics.geometric_mean(values) if values else float("nan")


def eager(args: argparse.Namespace) -> None:
    """Calls outside of jit, argument checks included, against jitted peers on (128, 10)."""
    print(f"{'job':>23} {'us':>8} {'time / jitted peer, with quartiles':>36}")
    rows: list[dict[str, Any]] = []
    for job in JOBS:
        cell = Cell(job, "forward", "float32", (128, 10))
        peer = users_choice(cell)
        arrays = [jnp.asarray(a) for a in inputs(*cell[::3])]
        calls = {"jaxent": blocking(JOBS[job]["jaxent"], *arrays), peer: jitted(JOBS[job][peer], *arrays)[0]}
        measured = measure(calls, peer, 50 * args.rounds, args.seconds)
        rows.append({"job": job, "peer": peer, "ms": measured.ms, "ratio": measured.ratio["jaxent"]})
        low, middle, high = measured.ratio["jaxent"]
        cells = f"{1e3 * measured.ms['jaxent'][1]:8.0f} {middle:12.2f} ({low:.2f}-{high:.2f}) of {peer}"
        print(f"{job:>23} {cells}", flush=True)
    write_calls(args, rows)


def write_calls(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A table of single calls as JSON, if asked for."""
    if args.json:
        write_json(args.json, {"machine": machine("optax"), "rows": rows})


def compile_times(args: argparse.Namespace) -> None:
    """Seconds to trace and compile value_and_grad, in fresh caches each time."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise SystemExit("compile times need JAX_COMPILATION_CACHE_DIR unset")
    shape = (1024, 1000)
    print(f"{'job':>23} {'seconds':>8} {'time / peer, with quartiles':>30}")
    rows: list[dict[str, Any]] = []
    for job in JOBS:
        peer = users_choice(Cell(job, "value_and_grad", "float32", shape))
        arrays = [jnp.asarray(a) for a in inputs(job, shape)]
        if job in FULL_RESULT:
            arrays *= 2
        seconds: dict[str, list[float]] = {"jaxent": [], peer: []}
        for _ in range(max(5, args.rounds // 3)):
            for name, times in seconds.items():
                jax.clear_caches()
                times.append(jitted(with_gradient(job, JOBS[job][name]), *arrays)[1])
        ratio = quartiles([a / b for a, b in zip(seconds["jaxent"], seconds[peer], strict=True)])
        rows.append({"job": job, "peer": peer, "seconds": seconds, "ratio": ratio})
        low, middle, high = ratio
        cells = f"{statistics.median(seconds['jaxent']):8.3f} {middle:12.2f} ({low:.2f}-{high:.2f}) of {peer}"
        print(f"{job:>23} {cells}", flush=True)
    write_calls(args, rows)


def shapes(text: str) -> list[Shape]:
    """Shapes such as `128x10,512x32000`."""
    found = [tuple(map(int, part.split("x"))) for part in text.split(",") if part]
    if any(len(shape) < 2 for shape in found):
        raise argparse.ArgumentTypeError(f"{text} has a shape without classes")
    return found


def main() -> None:
    """Print a table and, on request, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=30, help="at most, for each cell")
    parser.add_argument("--seconds", type=float, default=1.5, help="at most, for each cell beyond five rounds")
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=DTYPES)
    parser.add_argument(
        "--shapes", type=shapes, default=SHAPES, help="such as 1x1000000,16x33x256x256: classes second"
    )
    parser.add_argument("--compiled", type=shapes, default=[], help="for torch.compile, such as 1024x1000,512x32000")
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--pause", action="store_true", help="wait for Enter between compiling and measuring")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine("optax", "torch").items()))
    TABLES[args.table](args)


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {"speed": speed, "eager": eager, "compile": compile_times}

if __name__ == "__main__":
    main()
