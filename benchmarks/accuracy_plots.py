"""Picture of the errors of softmax losses over the margin, beside five libraries.

Loss, gradient and Hessian in float32 and bfloat16, each entry against 100-digit arithmetic on the same logits; the
figure shows the worst relative error of all entries that are normal numbers of the dtype. 1 means that nothing is
left. SciPy has no derivatives: these are p - onehot and diag(p) - p p^T of its softmax.

    pip install -e ".[test]" && python benchmarks/accuracy_plots.py docs/images
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import mpmath
import numpy as np
import optax
import scipy.special
import torch

import jaxent

MARGINS = range(0, 88, 3)
ROWS, CLASSES = 8, 10
QUANTITIES = ("loss", "gradient", "Hessian")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rows(margin, dtype):
    """Logits whose first class, the label, leads the best of the others by the margin."""
    rng = np.random.default_rng(margin)
    x = np.maximum(-rng.exponential(0.5, (ROWS, CLASSES)), margin - 87)
    x[:, 0], x[:, 1] = margin, 0
    return jnp.asarray(x + rng.uniform(size=(ROWS, 1)), dtype)


def exact(x):
    """Loss, gradient and Hessian of every row, from the definitions."""
    results = []
    with mpmath.workdps(100):
        for row in np.asarray(x, np.float64).tolist():
            powers = [mpmath.exp(v) for v in row]
            total = mpmath.fsum(powers)
            p = [power / total for power in powers]
            hessian = [[float(a * ((j == k) - b)) for k, b in enumerate(p)] for j, a in enumerate(p)]
            results.append(
                (float(mpmath.log(total) - row[0]), [float(v - (k == 0)) for k, v in enumerate(p)], hessian)
            )
    return [np.array(values) for values in zip(*results, strict=True)]


def in_jax(loss):
    functions = [jax.jit(jax.vmap(f)) for f in (loss, jax.grad(loss), jax.hessian(loss))]
    return lambda x: [np.asarray(f(x), np.float64) for f in functions]


def in_torch(x):
    def loss(row):
        return torch.nn.functional.cross_entropy(row, torch.tensor(0))

    x = torch.tensor(np.asarray(x, np.float32)).to(DTYPES[x.dtype.name])
    functions = [torch.func.vmap(f) for f in (loss, torch.func.grad(loss), torch.func.hessian(loss))]
    return [f(x).double().numpy() for f in functions]


def in_scipy(x):
    x = np.asarray(x)
    p = scipy.special.softmax(x, axis=1)
    eye = np.eye(CLASSES, dtype=x.dtype)
    hessian = p[:, :, None] * eye - p[:, :, None] * p[:, None, :]
    return [np.float64(v) for v in (-scipy.special.log_softmax(x, axis=1)[:, 0], p - eye[0], hessian)]


LIBRARIES = {
    "jaxent": in_jax(lambda row: jaxent.cross_entropy(row, jnp.array(0))),
    "torch": in_torch,
    "jax.nn": in_jax(lambda row: -jax.nn.log_softmax(row)[0]),
    "optax": in_jax(lambda row: optax.softmax_cross_entropy_with_integer_labels(row, jnp.array(0))),
    "SciPy": in_scipy,
}


def worst(got, want, dtype):
    """Largest relative error where the true value is a normal number of the dtype."""
    normal = np.abs(want) >= float(jnp.finfo(dtype).tiny)
    return np.max(np.abs(got - want)[normal] / np.abs(want)[normal])


def measure(dtype):
    """Errors by library and quantity, one for each margin."""
    libraries = [name for name in LIBRARIES if (dtype, name) != ("bfloat16", "SciPy")]  # which has no bfloat16
    errors = {name: [] for name in libraries}
    for margin in MARGINS:
        x = rows(margin, dtype)
        want = exact(x)
        for name in libraries:
            got = LIBRARIES[name](x)
            errors[name].append([worst(g, w, dtype) for g, w in zip(got, want, strict=True)])
    return {name: dict(zip(QUANTITIES, np.transpose(values), strict=True)) for name, values in errors.items()}


def draw(errors, path):
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(3, 2, figsize=(5, 7), sharex=True, sharey=True, layout="constrained")
    styles = {"jaxent": "C0D-", "torch": "C1o-", "jax.nn": "C2x-", "optax": "C3+-", "SciPy": "C4s-"}
    for column, (dtype, of_dtype) in zip(axes.T, errors.items(), strict=True):
        for axis, quantity in zip(column, QUANTITIES, strict=True):
            for name, values in of_dtype.items():
                error = np.maximum(values[quantity], 1e-9)
                axis.semilogy(MARGINS, error, styles[name], markersize=4, markerfacecolor="none", label=name)
            axis.axhline(float(jnp.finfo(dtype).eps), color="gray", linestyle=":", linewidth=1)
            axis.set_title(f"{quantity}, {dtype}")
            axis.set_ylim(1e-8, 30)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel("margin: by how much the label's logit leads")
    figure.supylabel("worst relative error (dotted: the dtype's epsilon)")
    figure.savefig(path, dpi=150)


def main():
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    errors = {dtype: measure(dtype) for dtype in DTYPES}
    for dtype, of_dtype in errors.items():
        for quantity in QUANTITIES:
            print(f"\n{quantity}, {dtype}: worst relative error\n\n| margin | " + " | ".join(of_dtype) + " |")
            print("|---:|" + "---:|" * len(of_dtype))
            for i in range(0, len(MARGINS), 4):
                cells = [f"{values[quantity][i]:.1e}" for values in of_dtype.values()]
                print(f"| {MARGINS[i]} | " + " | ".join(cells) + " |")
    draw(errors, directory / "accuracy.png")
    print(f"\ndrawn: {directory / 'accuracy.png'}")


if __name__ == "__main__":
    main()
