"""Time cross_entropy, forward and value_and_grad, against optax and eager PyTorch.

    python benchmarks/cross_entropy.py [--rounds 30] [--json FILE]

All contestants run in one process, in random order, round after round, so that a slow moment of the machine hits
all of them; printed are medians in milliseconds and the ratios peer / jaxent (above 1: jaxent is faster).
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# PyTorch's worker threads otherwise spin for a while after each call and take the cores from whoever comes next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxent

SHAPES = [(128, 10), (65536, 10), (8192, 100), (1024, 1000), (512, 32000), (128, 128256)]


def optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What an optax user writes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def torch_value_and_grad(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Eager PyTorch's forward and backward."""
    logits.grad = None
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    return loss


def contestants(shape: tuple[int, int]) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each kind of work, a zero-argument call a library."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape, dtype=np.float32)
    y = rng.integers(shape[1], size=shape[0])
    logits, labels = jnp.asarray(x), jnp.asarray(y)
    t_logits, t_labels = torch.tensor(x), torch.tensor(y)
    t_leaf = torch.tensor(x, requires_grad=True)
    jitted = {
        "jaxent": (jax.jit(jaxent.cross_entropy), jax.jit(jax.value_and_grad(jaxent.cross_entropy))),
        "optax": (jax.jit(optax_loss), jax.jit(jax.value_and_grad(optax_loss))),
    }
    forward: dict[str, Callable[[], Any]] = {
        name: (lambda f=f: jax.block_until_ready(f(logits, labels))) for name, (f, _) in jitted.items()
    }
    backward: dict[str, Callable[[], Any]] = {
        name: (lambda g=g: jax.block_until_ready(g(logits, labels))) for name, (_, g) in jitted.items()
    }
    forward["torch"] = lambda: torch.nn.functional.cross_entropy(t_logits, t_labels)
    backward["torch"] = lambda: torch_value_and_grad(t_leaf, t_labels)
    return {"forward": forward, "value_and_grad": backward}


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, from interleaved rounds after three to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for i in range(rounds + 3):
        for name, call in order.sample(sorted(calls.items()), len(calls)):  # nobody always follows the same peer
            start = time.perf_counter()
            call()
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    """Print the table and, on request, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    print(f"jax {jax.__version__} on {jax.devices()[0].platform}, torch {torch.__version__}, float32, ms")
    print(f"{'shape':>14} {'work':>15} {'jaxent':>9} {'optax':>9} {'torch':>9} {'optax/':>7} {'torch/':>7}")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for work, calls in contestants(shape).items():
            ms = medians(calls, args.rounds if shape[0] > 128 or shape[1] > 100 else 20 * args.rounds)
            ratios = {peer: ms[peer] / ms["jaxent"] for peer in ("optax", "torch")}
            rows.append({"shape": shape, "work": work, "ms": ms, "ratio": ratios})
            print(
                f"{shape!s:>14} {work:>15} {ms['jaxent']:9.3f} {ms['optax']:9.3f} {ms['torch']:9.3f} "
                f"{ratios['optax']:7.2f} {ratios['torch']:7.2f}",
                flush=True,
            )
    means = {peer: statistics.geometric_mean(row["ratio"][peer] for row in rows) for peer in ("optax", "torch")}
    print(f"{'geometric mean':>59} {means['optax']:7.2f} {means['torch']:7.2f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "geometric_mean": means}, indent=1))


if __name__ == "__main__":
    main()
