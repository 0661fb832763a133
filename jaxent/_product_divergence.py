"""Divergences of two layers' outputs with gradients, in two walks: along the tokens, then along the classes.

The first walk makes all logits of some tokens and notes down what is to be known of rows. The second makes the
logits of some classes once more, for all tokens, and so completes a part of the kernel's gradient at a time. Chunks
of tokens alone need two matrix products less, but add up the whole gradient in float32, reading and writing it for
each chunk: on accelerators that takes more memory than all else, and on TPUs longer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._chunks import ENOUGH, Chunks, block_of_classes, packed_chunks, strided_chunks
from ._class_axis import ClassAxis, vary
from ._class_blocks import RowFunction, of_classes, row_values
from ._distillation import Divergence, divergences, gradient_of_student
from ._kernels.product import Layer, dot
from ._label_loss import is_easily_underflown


class Pair(NamedTuple):
    """Two layers with the same classes."""

    student: Layer
    teacher: Layer
    where: Bool[Array, " classes"] | None

    def logits(self, x: Float[Array, "size features"], y: Float[Array, "size its_features"]) -> tuple[Array, Array]:
        """Of both, without those of hidden classes."""
        both = self.student.logits(x), self.teacher.logits(y)
        if self.where is None:
            return both
        x, y = (jnp.where(self.where[None], logits, -jnp.inf) for logits in both)
        return x, y

    def classes(self, begin: Any, size: int) -> "Pair":
        """Some of the classes, which are every array's last axis."""

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, size, x.ndim - 1)

        return jax.tree.map(part, self)

    def at_step(self, i: Any) -> "Pair":
        """The same, as if kernels in float32 changed with every step of a loop.

        TPUs multiply float32 as bfloat16, if nobody asks for more, and their compiler converts what does not change
        before the loop: both kernels would be there once more, an eighth of one model's logits at 1024 features and
        8192 tokens.
        """
        one = jnp.exp(0.0 * jnp.asarray(i, jnp.float32))  # which nobody knows before it runs

        def changing(layer: Layer) -> Layer:
            return replace(layer, weight=one * layer.weight) if layer.weight.dtype == jnp.float32 else layer

        return self._replace(student=changing(self.student), teacher=changing(self.teacher))


class Tokens(NamedTuple):
    """Inputs of both layers, the factor of each divergence, and which tokens count."""

    x: Float[Array, "tokens features"]
    y: Float[Array, "tokens its_features"]
    scale: Float[Array, " tokens"]
    counts: Bool[Array, " tokens"] | None

    def chunks(self, size: int) -> Chunks:
        """So many at a time, those that count."""
        return packed_chunks(self.x.shape[0], size, self.counts, skip=True)

    def all_or(self, size: int) -> Chunks:
        """All at once if these are no more than so many, and all count."""
        count: Any = self.x.shape[0]
        if not isinstance(count, int):  # of a size that is known when it runs
            return self.chunks(min(size, ENOUGH))
        if self.counts is None and count <= size:
            return strided_chunks(count, count, None)
        return self.chunks(min(count, size, ENOUGH))


class Gradients(NamedTuple):
    """Of the student's arrays; None where it is not wanted."""

    hidden: Float[Array, "tokens features"] | None
    kernel: Float[Array, "features classes"] | None
    bias: Float[Array, " classes"] | None


def product_divergences_and_gradients(
    axis: ClassAxis, which: Divergence, pair: Pair, tokens: Tokens, wanted: tuple[bool, ...], size: int, *, tpu: bool
) -> tuple[Float[Array, " tokens"], Gradients]:
    """The divergences, 0 of what does not count, and gradients of `sum(scale * divergences)`.

    No more logits exist at once than those of `size` tokens.
    Gradients are accumulated in at least float32. That of the kernel has the kernel's dtype, unless it might leave
    the range of that. Of classes in parts they are this part's terms.
    """
    layers = Pair.at_step if tpu else _unchanged
    gradient = partial(gradient_of_student, which) if any(wanted) else None
    losses, known = _along_tokens(axis, which, gradient, pair, layers, tokens, size)
    if gradient is None:
        return losses, Gradients(None, None, None)
    return losses, _along_classes(axis, gradient, pair, layers, tokens, known, wanted, size)


_Layers = Callable[[Pair, Any], Pair]  # as they are in a step of a loop


def _unchanged(pair: Pair, _: Any) -> Pair:
    return pair


def _along_tokens(
    axis: ClassAxis,
    which: Divergence,
    gradient: RowFunction | None,
    pair: Pair,
    layers: _Layers,
    tokens: Tokens,
    size: int,
) -> tuple[Float[Array, " tokens"], list[Array]]:
    """The divergences, and what the gradient knows of rows."""
    chunks = tokens.chunks(size)
    x, y = chunks.spread(tokens.x), chunks.spread(tokens.y)

    def of_chunk(i: Any) -> tuple[Array, ...]:
        logits = layers(pair, i).logits(*_counting(chunks, i, x, y))
        known = () if gradient is None else row_values(gradient, axis, *logits)
        return divergences(axis, which, *logits), *map(axis.squeeze, known)

    def step(i: Any, rows: tuple[Array, ...]) -> tuple[Array, ...]:
        counted = chunks.counts(i)
        return tuple(chunks.put(a, jnp.where(counted, b, 0), i) for a, b in zip(rows, of_chunk(i), strict=True))

    nothing = chunks.spread(jnp.broadcast_to(axis.total(_zero(pair, tokens)), tokens.scale.shape))
    start = tuple(nothing.astype(row.dtype) for row in jax.eval_shape(of_chunk, 0))
    losses, *known = map(chunks.gather, jax.lax.fori_loop(0, chunks.steps, step, start))
    return losses, known


def _along_classes(
    axis: ClassAxis,
    gradient: RowFunction,
    pair: Pair,
    layers: _Layers,
    tokens: Tokens,
    known: list[Array],
    wanted: tuple[bool, ...],
    size: int,
) -> Gradients:
    """Gradients by what is known of rows."""
    kernel, count, dtype = pair.student.kernel, tokens.scale.shape[0], tokens.scale.dtype
    (features, classes), operand = kernel.shape, kernel.dtype
    block = block_of_classes(count, classes, size)
    chunks = tokens.all_or(max(size * classes // block, 1))
    x, y, scale, *known = map(chunks.spread, (tokens.x, tokens.y, tokens.scale, *known))

    def step(j: Any, gradients: Gradients) -> Gradients:
        begin = j * block if classes % block == 0 else jnp.minimum(j * block, classes - block)
        fresh = (begin + jnp.arange(block) >= j * block)[None]  # the last block may overlap the one before
        part = layers(pair, j).classes(begin, block)

        def add(i: Any, sums: Gradients) -> Gradients:
            some_x, some_y = _counting(chunks, i, x, y)
            factors, *rows = (axis.expand(chunks.take(row, i)) for row in (scale, *known))
            g = of_classes(gradient, axis, rows, begin, classes, *part.logits(some_x, some_y))
            g = jnp.where(axis.expand(chunks.counts(i)) & fresh, factors * g, 0.0)
            of_hidden, of_kernel, of_bias = sums
            if of_bias is not None:
                of_bias += jnp.sum(g, 0)
            g = g.astype(operand)
            if of_hidden is not None:
                term = dot(g, part.student.kernel, 1, 1, dtype)
                of_hidden = chunks.put(of_hidden, chunks.take(of_hidden, i) + term, i)
            if of_kernel is not None:
                of_kernel += dot(some_x, g, 0, 0, dtype)
            return Gradients(of_hidden, of_kernel, of_bias)

        def nothing_of(total: Array | None) -> Array | None:
            return None if total is None else jnp.broadcast_to(zero, (*total.shape[:-1], block))

        def written(total: Array | None, sums: Array | None) -> Array | None:
            if total is None or sums is None:
                return None
            last = total.ndim - 1
            sums = sums.astype(total.dtype) + jax.lax.dynamic_slice_in_dim(total, begin, block, last)
            return jax.lax.dynamic_update_slice_in_dim(total, sums, begin, last)

        _, of_kernel, of_bias = gradients
        sums = Gradients(gradients.hidden, nothing_of(of_kernel), nothing_of(of_bias))
        sums = jax.lax.fori_loop(0, chunks.steps, add, sums)
        return Gradients(sums.hidden, written(of_kernel, sums.kernel), written(of_bias, sums.bias))

    zero = _zero(pair, tokens)
    kept = dtype if is_easily_underflown(operand) else operand
    start = Gradients(
        chunks.spread(jnp.broadcast_to(zero, (count, features))) if wanted[0] else None,
        jnp.broadcast_to(zero.astype(kept), (features, classes)) if wanted[1] else None,
        jnp.broadcast_to(zero, classes) if wanted[2] else None,
    )
    gradients = jax.lax.fori_loop(0, -(-classes // block), step, start)
    of_hidden = gradients.hidden
    return gradients._replace(hidden=None if of_hidden is None else chunks.gather(of_hidden))


def _counting(chunks: Chunks, i: Any, *arrays: Array) -> tuple[Array, ...]:
    """A step's rows; 0 of those that do not count, which may hold anything."""
    counted = chunks.counts(i)[:, None]
    return tuple(jnp.where(counted, chunks.take(x, i), jnp.zeros((), x.dtype)) for x in arrays)


def _zero(pair: Pair, tokens: Tokens) -> Float[Array, ""]:
    """It is typed as differing between devices wherever one of the arrays does."""
    return vary(jnp.zeros((), tokens.scale.dtype), *jax.tree.leaves((pair, tokens)))
