"""What fused linear losses in JAX can do: a Markdown table, of those that are installed, by trying it on a CPU.

    pip install --pre . tokamax marin-levanter      (Python 3.12 or later, an environment of its own)
    python benchmarks/fused_losses.py

A cell says yes, or "wrong" where a result is further than 1e-3 of its largest entry away from NumPy's float64, or no
where it raises. Everybody gets float32, 256 tokens of 128 features and 2,048 classes. What runs
on TPUs only is left out.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxent

TOKENS, FEATURES, CLASSES = 256, 128, 2048
Loss = Callable[[Any, Any, Any], Any]  # of hidden, kernel and labels: a number for each token, or their sum


def contestants() -> dict[str, Loss]:
    """By name and version."""
    found: dict[str, Loss] = {"jaxent": partial(jaxent.linear_cross_entropy, reduction="none")}
    if find_spec("tokamax"):
        import tokamax

        def of_tokamax(hidden: Any, kernel: Any, labels: Any) -> Any:
            options = {"reduction": "none", "implementation": "chunked_xla"}
            return tokamax.linear_softmax_cross_entropy_loss(hidden, labels, kernel, **options)

        found[f"tokamax {version('tokamax')}, `chunked_xla`"] = of_tokamax
    if find_spec("levanter"):
        from levanter.kernels.pallas import fused_cross_entropy_loss as levanter

        # In blocks, which it would not use for so few classes.
        blocks = levanter.BlockSizes(b_block_size=128, h_block_size=128, v_block_size=512)

        def of_levanter(hidden: Any, kernel: Any, labels: Any) -> Any:
            options = {"reduction": None, "logsumexp_weight": None, "block_sizes": blocks, "implementation": "xla"}
            return levanter.fused_cross_entropy_loss_and_logsumexp_penalty(hidden, labels, kernel, **options)

        def of_tokens(hidden: Any, kernel: Any, labels: Any) -> Any:
            options = {"logsumexp_weight": None, "token_block_size": 64}
            weight = jnp.ones(labels.shape)
            return levanter.linear_softmax_cross_entropy_weighted_sum(hidden, labels, kernel, weight, **options)

        name = f"levanter {version('marin-levanter')}"
        found |= {f"{name}, `xla`": of_levanter, f"{name}, its weighted sum": of_tokens}
    return found


def draw(classes: int = CLASSES) -> tuple[Any, Any, Any]:
    """Arguments whose logits are of about size 1."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((TOKENS, FEATURES)).astype(np.float32)
    kernel = (rng.standard_normal((FEATURES, classes)) / np.sqrt(FEATURES)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(rng.integers(classes, size=TOKENS), jnp.int32)


class Exact:
    """The sum of losses of tokens that count, and its derivatives along changes of both arrays, in float64."""

    def __init__(self, hidden: Any, kernel: Any, labels: Any) -> None:
        self.h, self.w, y = np.asarray(hidden, float), np.asarray(kernel, float), np.asarray(labels)
        x = self.h @ self.w
        x -= x.max(1, keepdims=True)
        e = np.exp(x)
        self.p, self.counts = e / e.sum(1, keepdims=True), y >= 0
        label = np.arange(x.shape[1]) == y[:, None]
        others = np.where(label, 0.0, e).sum(1)
        own = np.where(label, x, 0.0).sum(1)
        self.losses = np.where(self.counts, np.log1p(others / np.exp(own)), 0.0)
        self.g = np.where(self.counts[:, None], self.p - label, 0.0)

    def gradients(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of the sum."""
        return self.g @ self.w.T, self.h.T @ self.g

    def curvature(self, dh: Any, dw: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The change of the gradients."""
        dh, dw = np.asarray(dh, float), np.asarray(dw, float)
        dx = dh @ self.w + self.h @ dw
        dg = np.where(self.counts[:, None], self.p * (dx - (self.p * dx).sum(1, keepdims=True)), 0.0)
        return dg @ self.w.T + self.g @ dw.T, dh.T @ self.g + self.h.T @ dg


def close(found: Any, expected: Any) -> bool:
    """Relative to the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.max(np.abs(np.asarray(a, float) - b)) <= 1e-3 * np.max(np.abs(b)) for a, b in pairs)


def summed(f: Loss, labels: Any) -> Callable[[Any, Any], Any]:
    """As a function of both arrays."""
    return lambda hidden, kernel: jnp.sum(f(hidden, kernel, labels))


def value(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """Each loss, or their sum."""
    found, expected = jax.jit(f)(*arrays), Exact(*arrays).losses
    return close(found, expected if found.ndim else expected.sum(keepdims=True)[0])


def gradient(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """In reverse mode."""
    found = jax.jit(jax.grad(summed(f, arrays[2]), (0, 1)))(*arrays[:2])
    return close(found, Exact(*arrays).gradients())


def both(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """Value and gradient."""
    return value(f, arrays) and gradient(f, arrays)


def forward(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """Along one direction."""
    tangents = draw(arrays[1].shape[1])[:2]
    found = jax.jit(lambda *primals: jax.jvp(summed(f, arrays[2]), primals, tangents)[1])(*arrays[:2])
    expected = sum(
        (np.asarray(t, float) * g).sum() for t, g in zip(tangents, Exact(*arrays).gradients(), strict=True)
    )
    return close(found, np.asarray(expected))


def second(f: Loss, arrays: tuple[Any, Any, Any], *, reverse: bool) -> bool:
    """The gradient's change along one direction, by forward or by reverse mode over reverse mode."""
    tangents, of_sum = draw(arrays[1].shape[1])[:2], summed(f, arrays[2])

    def along(*primals: Any) -> Any:
        if not reverse:
            return jax.jvp(jax.grad(of_sum, (0, 1)), primals, tangents)[1]

        def slope(*primals: Any) -> Any:
            gradients = jax.grad(of_sum, (0, 1))(*primals)
            return sum(jnp.vdot(t, g) for t, g in zip(tangents, gradients, strict=True))

        return jax.grad(slope, (0, 1))(*primals)

    return close(jax.jit(along)(*arrays[:2]), Exact(*arrays).curvature(*tangents))


def mapped(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """Gradients below `jax.vmap` over two batches of one kernel."""
    hidden, kernel, labels = arrays
    several = jnp.stack([hidden, 2.0 * hidden]), kernel, jnp.stack([labels, labels])

    def gradients(hidden: Any, kernel: Any, labels: Any) -> Any:
        return jax.grad(summed(f, labels), (0, 1))(hidden, kernel)

    found = jax.jit(jax.vmap(gradients, (0, None, 0)))(*several)
    one, two = (Exact(several[0][i], kernel, labels).gradients() for i in range(2))
    return close(found, tuple(np.stack(pair) for pair in zip(one, two, strict=True)))


def ignored(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """Tokens labelled -100 add nothing, whatever they hold."""
    hidden, kernel, labels = arrays
    return both(f, (hidden, kernel, labels.at[::3].set(-100)))


def certain(f: Loss, arrays: tuple[Any, Any, Any]) -> bool:
    """The loss of a token whose label leads by far, some 1e-7."""
    hidden, kernel, _ = arrays
    labels = jnp.argmax(hidden @ kernel, 1)
    exact = Exact(hidden, 8.0 * kernel, labels)
    (least,) = np.flatnonzero(exact.losses == exact.losses.min())
    assert 1e-12 < exact.losses[least] < 1e-5
    only = jnp.full((TOKENS, FEATURES), hidden[least]), 8.0 * kernel, jnp.full(TOKENS, labels[least])
    return value(f, only)


TRIED: dict[str, tuple[Callable[..., bool], dict[str, Any]]] = {
    "value, gradient": (both, {}),
    "1,000 classes": (both, {"classes": 1000}),
    "forward mode": (forward, {}),
    "forward over reverse": (partial(second, reverse=False), {}),
    "reverse over reverse": (partial(second, reverse=True), {}),
    "`vmap`": (mapped, {}),
    "labels of -100": (ignored, {}),
    "small losses": (certain, {}),
}


def tried(f: Loss, attempt: Callable[..., bool], how: dict[str, Any]) -> str:
    """A cell."""
    try:
        return "yes" if attempt(f, draw(**how)) else "wrong"
    except Exception as error:  # of any kind: that is the answer
        print(f"{type(error).__name__}: {str(error)[:100]!r}", file=sys.stderr)
        return "no"


def main() -> None:
    rows = [[name, *(tried(f, *what) for what in TRIED.values())] for name, f in contestants().items()]
    print(f"| JAX {jax.__version__} | {' | '.join(TRIED)} |\n|{'---|' * (len(TRIED) + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
