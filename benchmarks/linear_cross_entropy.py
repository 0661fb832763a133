"""Time and memory of linear_cross_entropy with its gradients, against unfused forms and other libraries.

    python benchmarks/linear_cross_entropy.py [--sweep] [--rounds 15] [--seconds 60] [--json FILE]
    python benchmarks/linear_cross_entropy.py --compiled v5e,v6e,v5p,v7x,h100

Each call computes the loss and its gradients with respect to hidden (tokens N, features D) and kernel (D, classes C)
in float32. `_runner.py` says how is measured. Among the contestants is a plain large matrix product, which measures
what the machine can do: the share of the matmul rate counts the three products that the gradients need, for the
tokens that are not ignored; reduction "none" makes the logits a second time. Memory is the compiled program's
temporaries in per cent of the N * C * 4 bytes of the logits. Ctrl-C prints what is done.

With `--compiled` nothing is run: what the compilers of TPUs and GPUs make of it is counted, by `compiled_linear.py`,
which has options of its own. PyTorch is not needed then.

The contestants:

- jaxent: `jaxent.linear_cross_entropy`
- unfused: `jaxent.cross_entropy(hidden @ kernel, labels)`
- optax: `optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)`, and a masked mean if tokens are
  ignored
- tokamax: `tokamax.linear_softmax_cross_entropy_loss(..., implementation="chunked_xla")`, if installed (it wants
  Python >= 3.12); it cannot ignore tokens
- torch: eager `cross_entropy(linear(hidden, weight), labels)`
- torch chunked: eager `linear_cross_entropy(hidden, weight, labels, options=LinearCrossEntropyOptions())`
- none ignored: `jaxent.linear_cross_entropy` as in the first line, with no token ignored
"""

import argparse
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _runner import Call, blocking, jitted, machine, measure, write_json

import jaxent

MATMUL = (2048, 4096, 4096)


class Case(NamedTuple):
    """What is computed."""

    name: str
    tokens: int
    features: int
    classes: int
    reduction: str = "mean"
    ignored: str = "none"  # or "every other", "second half"


HEADLINE = (2048, 512, 32768)
CASES = [
    Case("headline", *HEADLINE),
    Case("reduction none", *HEADLINE, reduction="none"),
    Case("every other token ignored", *HEADLINE, ignored="every other"),
    Case("second half ignored", *HEADLINE, ignored="second half"),
]
# The largest takes half a minute a call; 1536 tokens are still more than one chunk.
SWEEP = [
    Case(f"{features} features", 2048 if features * classes < 2**28 else 1536, features, classes)
    for features in (256, 1024, 4096)
    for classes in (4096, 32768, 128256)
]


def jax_losses() -> dict[str, Callable[..., jax.Array]]:
    """Each library's loss, or losses, as a function of hidden, kernel and labels, and the reduction."""

    def optax_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, reduction: str) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
        return losses.mean() if reduction == "mean" else losses

    def unfused(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, reduction: str) -> jax.Array:
        return jaxent.cross_entropy(hidden @ kernel, labels, reduction=reduction)

    def fused(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, reduction: str) -> jax.Array:
        return jaxent.linear_cross_entropy(hidden, kernel, labels, reduction=reduction)

    losses = {"jaxent": fused, "unfused": unfused, "optax": optax_loss}
    if find_spec("tokamax"):
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns that it was not tuned for CPUs
        import tokamax

        losses["tokamax"] = lambda hidden, kernel, labels, reduction: tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction=reduction, implementation="chunked_xla"
        )
    return losses


def masked_optax_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, _: str) -> jax.Array:
    """What an optax user writes where tokens are ignored."""
    counts = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, jnp.where(counts, labels, 0))
    return jnp.where(counts, losses, 0.0).sum() / counts.sum()


def torch_losses() -> dict[str, Callable[..., Any]]:
    """The same for PyTorch, whose weight is the transpose of kernel."""
    import torch

    functional = torch.nn.functional

    def unfused(hidden: Any, weight: Any, labels: Any, reduction: str) -> Any:
        return functional.cross_entropy(functional.linear(hidden, weight), labels, reduction=reduction)

    def chunked(hidden: Any, weight: Any, labels: Any, reduction: str) -> Any:
        options = torch.nn.LinearCrossEntropyOptions()
        return functional.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)

    return {"torch": unfused, "torch chunked": chunked}


class Contestants(NamedTuple):
    """Calls without arguments, and what is known of them before they run."""

    calls: dict[str, Call]
    temporaries: dict[str, float]  # per cent of the logits' bytes
    compile_seconds: dict[str, float]


def contestants(case: Case) -> Contestants:
    """Everybody's value and gradients of one case; `matmul` is a plain product."""
    import torch

    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.tokens, case.features), dtype=np.float32)
    w = rng.standard_normal((case.features, case.classes), dtype=np.float32)
    w *= 2.0 / case.features**0.5
    y = rng.integers(case.classes, size=case.tokens)
    every_label = jnp.asarray(y)
    if case.ignored == "every other":
        y[1::2] = -100
    elif case.ignored == "second half":
        y[case.tokens // 2 :] = -100
    c = rng.standard_normal(case.tokens, dtype=np.float32) if case.reduction == "none" else np.ones((), np.float32)

    hidden, kernel, labels, cotangent = (jnp.asarray(a) for a in (x, w, y, c))
    calls: dict[str, Call] = {}
    temporaries: dict[str, float] = {}
    compile_seconds: dict[str, float] = {}
    for name, losses in jax_losses().items():
        f = losses
        if case.ignored != "none":
            if name == "tokamax":
                continue
            f = masked_optax_loss if name == "optax" else f

        def total(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, cotangent: jax.Array, f: Any = f) -> Any:
            return jnp.sum(cotangent * f(hidden, kernel, labels, case.reduction))

        g = jax.jit(jax.value_and_grad(total, (0, 1)))
        calls[name], compile_seconds[name] = jitted(g, hidden, kernel, labels, cotangent)
        temp_bytes = g.lower(hidden, kernel, labels, cotangent).compile().memory_analysis().temp_size_in_bytes
        temporaries[name] = 100 * temp_bytes / (4 * case.tokens * case.classes)
        if name == "jaxent" and case.ignored != "none":
            calls["none ignored"] = blocking(g, hidden, kernel, every_label, cotangent)

    t_hidden, t_weight = (torch.from_numpy(np.array(a, order="C")).requires_grad_() for a in (x, w.T))
    t_labels, t_cotangent = torch.tensor(y), torch.tensor(c)
    for name, f in torch_losses().items():

        def call(f: Any = f) -> None:
            f(t_hidden, t_weight, t_labels, case.reduction).backward(t_cotangent)
            t_hidden.grad = t_weight.grad = None

        calls[name] = call

    rows, inner, columns = MATMUL
    a, b = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    calls["matmul"], _ = jitted(jnp.matmul, a, b)
    return Contestants(calls, temporaries, compile_seconds)


def row_of_case(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """What one row of the table was measured to be."""
    calls, temporaries, compile_seconds = contestants(case)
    measured = measure(calls, "jaxent", rounds, seconds, warm_up=1, at_least=2)
    counted = case.tokens if case.ignored == "none" else case.tokens // 2
    flops, matmul_flops = 6 * counted * case.features * case.classes, 2 * math.prod(MATMUL)
    of_matmul = measured.ratio.pop("matmul")
    return {
        "case": case._asdict(),
        **measured._asdict(),
        "matmul_gflops": 1e-6 * matmul_flops / measured.ms["matmul"][1],
        "share_of_matmul_rate": [flops / matmul_flops * r for r in of_matmul],
        "temporaries_percent": temporaries,
        "compile_seconds": compile_seconds,
    }


PEERS = ["optax", "unfused", "tokamax", "torch", "torch chunked", "none ignored"]
COLUMNS = ["case", "N", "D", "C", "jaxent, s", *PEERS, "of matmul rate", "memory jaxent", "optax", "tokamax"]


def row_of(result: dict[str, Any]) -> str:
    """A result as a row of the Markdown table."""
    case = Case(**result["case"])
    cells = [case.name, *map(str, case[1:4]), f"{1e-3 * result['ms']['jaxent'][1]:.3f}"]
    for name in PEERS:
        if name in result["ratio"]:
            low, middle, high = result["ratio"][name]
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        else:
            cells.append("")
    cells.append(f"{100 * result['share_of_matmul_rate'][1]:.0f} %")
    memory = result["temporaries_percent"]
    cells += [f"{memory[name]:.1f} %" if name in memory else "" for name in ("jaxent", "optax", "tokamax")]
    return f"| {' | '.join(cells)} |"


def compiled(chips: list[str]) -> int:
    """Tables of `compiled_linear.py`, for TPUs and for a GPU apart: a process is for one of them."""
    command = [sys.executable, str(Path(__file__).with_name("compiled_linear.py")), "--chips"]
    groups = [[chip for chip in chips if (chip == "h100") == is_gpu] for is_gpu in (False, True)]
    return max(subprocess.run([*command, *group], check=False).returncode for group in groups if group)


def main() -> None:
    """Print the table and, on request, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="features and classes of many sizes")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each case")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for each case beyond two rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--compiled", metavar="CHIPS", help="count what compilers make of it for v5e,v6e,v5p,v7x,h100"
    )
    args = parser.parse_args()
    if args.compiled:
        raise SystemExit(compiled(args.compiled.split(",")))

    print(", ".join(f"{key} {value}" for key, value in machine("optax", "torch").items()))
    if not find_spec("tokamax"):
        print("tokamax is not installed and left out")
    print(f"\n| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", flush=True)
    results: list[dict[str, Any]] = []
    status = 0
    try:
        for case in SWEEP if args.sweep else CASES:
            if args.only and args.only not in case.name:
                continue
            results.append(row_of_case(case, args.rounds, args.seconds))
            print(row_of(results[-1]), flush=True)
    except KeyboardInterrupt:
        print("\nstopped")
        status = 130
    rates = [f"{result['matmul_gflops']:.0f}" for result in results]
    rounds = [str(result["rounds"]) for result in results]
    print(f"\nmatmul of {' × '.join(map(str, MATMUL))}, GFLOP/s, row by row: {', '.join(rates)}")
    print(f"rounds, row by row: {', '.join(rounds)}")
    if args.json:
        write_json(args.json, {"machine": machine("optax", "torch"), "rows": results})
    raise SystemExit(status)


if __name__ == "__main__":
    main()
