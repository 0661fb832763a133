"""Worst error of softmax losses in float32 against 50-digit arithmetic: `python benchmarks/accuracy.py`.

Prints one table a quantity, a row a margin (by how much the label's logit leads), a column a library, and writes
all figures to a JSON file. Needs mpmath, torch and optax: `pip install -e ".[test]"`.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import torch

import jaxent

MARGINS = (0, 2, 10, 17, 20, 30, 40, 60, 80, 87)
CLASSES = (2, 10, 100)
ROWS = 16
QUANTITIES = ("loss", "gradient", "label's gradient")


def rows(margin, classes):
    """Logits whose first class, the label, stands `margin` above the best of the others."""
    rng = np.random.default_rng([margin, classes])
    x = np.maximum(-rng.exponential(0.5, (ROWS, classes)), margin - 87)
    x[:, 0], x[:, 1] = margin, 0
    # Fractions, so that differences of logits round as they do in life.
    return (x + rng.choice([0, 1, -100, 1e4], (ROWS, 1)) + rng.uniform(size=(ROWS, 1))).astype(np.float32)


def exact(x):
    """Loss and gradient of every row, from the definition; 100 digits so that 50 are left of the smallest loss."""
    losses, gradients = [], []
    with mpmath.workdps(100):
        for row in x.tolist():
            powers = [mpmath.exp(mpmath.mpf(v)) for v in row]
            total = mpmath.fsum(powers)
            losses.append(float(mpmath.log(total) - mpmath.mpf(row[0])))
            gradients.append([float(p / total - (k == 0)) for k, p in enumerate(powers)])
    return np.array(losses), np.array(gradients)


def in_jax(loss):
    def loss_and_gradient(x):
        losses, pull = jax.vjp(loss, jnp.asarray(x))
        return losses, pull(jnp.ones_like(losses))[0]

    return jax.jit(loss_and_gradient)


def in_torch(loss):
    def loss_and_gradient(x):
        x = torch.tensor(x, requires_grad=True)
        losses = loss(x)
        losses.sum().backward()
        return losses.detach().numpy(), x.grad.numpy()

    return loss_and_gradient


def zeros(x):
    return jnp.zeros(len(x), int)


def torch_zeros(x):
    return torch.zeros(len(x), dtype=torch.long)


CROSS_ENTROPY = {
    "jaxent": in_jax(lambda x: jaxent.cross_entropy(x, zeros(x), reduction="none")),
    "torch": in_torch(lambda x: torch.nn.functional.cross_entropy(x, torch_zeros(x), reduction="none")),
    "optax": in_jax(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, zeros(x))),
}
LOG_SOFTMAX = {
    "jaxent": in_jax(lambda x: jaxent.nll(jaxent.log_softmax(x), zeros(x), reduction="none")),
    "torch": in_torch(
        lambda x: torch.nn.functional.nll_loss(torch.log_softmax(x, -1), torch_zeros(x), reduction="none")
    ),
    "jax.nn": in_jax(lambda x: -jax.nn.log_softmax(x)[:, 0]),
}


def worst(got, want):
    """Largest relative error, and in units in the last place of float32, where the true value is normal."""
    got = np.asarray(got, np.float64)
    normal = np.abs(want) >= np.finfo(np.float32).tiny
    error = np.abs(got - want)[normal]
    size = np.abs(want)[normal]
    return float(np.max(error / size)), float(np.max(error / np.spacing(size.astype(np.float32))))


def measure(functions):
    results = []
    for margin in MARGINS:
        cases = [(x, *exact(x)) for x in (rows(margin, classes) for classes in CLASSES)]
        for library, function in functions.items():
            errors = [
                (worst(loss, want), worst(gradient, want_gradient), worst(gradient[:, 0], want_gradient[:, 0]))
                for x, want, want_gradient in cases
                for loss, gradient in [function(x)]
            ]
            for quantity, per_case in zip(QUANTITIES, zip(*errors, strict=True), strict=True):
                relative, ulp = (max(values) for values in zip(*per_case, strict=True))
                results.append(
                    {
                        "margin": margin,
                        "library": library,
                        "quantity": quantity,
                        "relative": relative,
                        "ulp": ulp,
                    }
                )
    return results


def show(title, results, libraries):
    for quantity in QUANTITIES:
        print(f"\n{title}, {quantity}: worst relative error (ulp)\n")
        print("| margin | " + " | ".join(libraries) + " |\n|---:|" + "---:|" * len(libraries))
        for margin in MARGINS:
            cells = [
                f"{r['relative']:.1e} ({r['ulp']:.2g})"
                for library in libraries
                for r in results
                if (r["margin"], r["library"], r["quantity"]) == (margin, library, quantity)
            ]
            print(f"| {margin} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("accuracy.json"), help="where to write the figures")
    path = parser.parse_args().json
    figures = {}
    for title, functions in (("cross_entropy", CROSS_ENTROPY), ("nll(log_softmax)", LOG_SOFTMAX)):
        figures[title] = measure(functions)
        show(title, figures[title], list(functions))
    versions = {"jax": jax.__version__, "torch": torch.__version__, "optax": optax.__version__}
    path.write_text(json.dumps({"versions": versions, "figures": figures}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
