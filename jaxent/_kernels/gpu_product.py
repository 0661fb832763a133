"""Logits of a linear layer for GPUs, by Pallas and Triton, which leave their product as exponentials and sums.

Each program makes the logits of a block of tokens and of classes, and writes a row of each sum; these are added up
afterwards. Blocks of the same classes follow each other, so that the kernel is read from the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from .gpu import unavailable
from .product import Layer, Sums, fit, missing_classes
from .rows import struct

INTERPRET: Any = False  # tests run the kernels on CPUs
TOKENS, CLASSES, FEATURES = 128, 256, 128  # of a block; features in bytes
WARPS, STAGES = 8, 3


def serves(layer: Layer, x: Array) -> bool:
    """Whether such logits are made here."""
    classes: Any = layer.weight.shape[1]
    fits = fit(x, layer.weight) and not layer.by_class and missing_classes(classes, x.dtype) == 0 < classes
    return fits and (INTERPRET or unavailable() is None)


def maxima(layer: Layer, x: Float[Array, "tokens features"]) -> Float[Array, "tokens 1"]:
    """The largest logit of each token."""

    def write(block: "_Block", logits: Array, of_blocks: Any) -> None:
        block.put(of_blocks, jnp.max(jnp.where(block.classes, logits, -jnp.inf), 1))

    (of_blocks,) = _call("maxima", write, layer, x, (), [None])
    return jnp.max(of_blocks, 0)[:, None]


def sums(
    layer: Layer,
    x: Float[Array, "tokens features"],
    reference: Float[Array, "tokens 1"],
    y: Integer[Array, " tokens"],
    counts: Bool[Array, " tokens"] | None,
    *,
    stored: DTypeLike | None,
) -> Sums:
    """See product.py."""
    there = (y >= 0) & (y < layer.weight.shape[1])
    given = reference[:, 0], jnp.where(there, y, -1).astype(jnp.int32)

    def write(block: "_Block", logits: Array, *refs: Any) -> None:
        reference, y, *of_counts = (block.take(ref) for ref in refs[: len(given)])
        own, others, total, *entries = refs[len(given) :]
        d = logits - reference[:, None]
        label = block.places == y[:, None]
        block.put(own, jnp.sum(jnp.where(label, d, 0.0), 1))
        block.put(total, jnp.sum(jnp.where(block.classes, d, 0.0), 1))
        e = jnp.where(block.classes, jnp.exp(d), 0.0)
        block.put(others, jnp.sum(jnp.where(label, 0.0, e), 1))
        for ref in entries:
            block.put_all(ref, e if not of_counts else jnp.where(of_counts[0][:, None] > 0, e, 0.0))

    given = given if counts is None else (*given, counts.astype(jnp.int32))
    results = [None, None, None, *([] if stored is None else [stored])]
    own, others, total, *e = _call("sums", write, layer, x, given, results)
    own, others, total = (jnp.sum(of_blocks, 0)[:, None] for of_blocks in (own, others, total))
    return Sums(own, others, total, e[0] if e else None)


class _Block(NamedTuple):
    """Of which tokens and classes a program makes logits."""

    rows: Any  # slices
    columns: Any
    row: Integer[Array, ""]  # of blocks of classes
    tokens: Bool[Array, " TOKENS"]  # whether there are so many
    classes: Bool[Array, "1 CLASSES"]
    places: Integer[Array, "1 CLASSES"]

    def take(self, ref: Any) -> Array:
        """What the tokens have in an array with a number for each."""
        return plgpu.load(ref.at[self.rows], mask=self.tokens, other=0)

    def put(self, ref: Any, numbers: Array) -> None:
        """A number for each token."""
        plgpu.store(ref.at[self.row, self.rows], numbers, mask=self.tokens)

    def put_all(self, ref: Any, entries: Array) -> None:
        """One for each token and class."""
        mask = self.tokens[:, None] & self.classes
        plgpu.store(ref.at[self.rows, self.columns], entries.astype(ref.dtype), mask=mask)


def _kernel(write: Callable[..., None], shape: tuple[int, ...], layer: Any, x: Any, *refs: Any) -> None:
    tokens, features, classes = shape
    i, j = pl.program_id(0), pl.program_id(1)
    places = j * CLASSES + jax.lax.broadcasted_iota(jnp.int32, (1, CLASSES), 1)
    inside = i * TOKENS + jax.lax.iota(jnp.int32, TOKENS) < tokens
    size = FEATURES // x.dtype.itemsize
    block = _Block(pl.ds(i * TOKENS, TOKENS), pl.ds(j * CLASSES, CLASSES), j, inside, places < classes, places)

    def add(k: Any, logits: Array) -> Array:
        some = pl.ds(k * size, size)
        there = k * size + jax.lax.iota(jnp.int32, size) < features
        of_tokens = plgpu.load(x.at[block.rows, some], mask=inside[:, None] & there[None], other=0.0)
        of_classes = plgpu.load(layer.weight.at[some, block.columns], mask=there[:, None] & block.classes, other=0.0)
        return logits + plgpu.dot(of_tokens, of_classes)

    nothing = jnp.zeros((TOKENS, CLASSES), jnp.float32)
    logits = jax.lax.fori_loop(0, pl.cdiv(features, size), add, nothing)
    if layer.bias is not None:
        bias = plgpu.load(layer.bias.at[block.columns], mask=block.classes[0], other=0.0)
        logits += bias.astype(jnp.float32)[None]
    if layer.scale is not None:
        logits *= layer.scale[0]
    write(block, logits, *refs)


def _call(
    name: str,
    write: Callable[..., None],
    layer: Layer,
    x: Array,
    given: tuple[Array, ...],
    results: Sequence[DTypeLike | None],
) -> Any:
    """Give `write` the logits of every block. Results are entries of a dtype, or for None numbers of its tokens."""
    shape = tokens, _, classes = x.shape[0], *layer.weight.shape
    blocks = pl.cdiv(tokens, TOKENS), pl.cdiv(classes, CLASSES)
    scale = None if layer.scale is None else layer.scale.astype(jnp.float32).reshape(1)
    arrays, tree = jax.tree.flatten((Layer(layer.weight, layer.bias, scale), x, *given))

    def kernel(*refs: Any) -> None:
        arguments = jax.tree.unflatten(tree, refs[: len(arrays)])
        _kernel(write, shape, *arguments, *refs[len(arrays) :])

    return pl.pallas_call(
        kernel,
        out_shape=[
            struct((tokens, classes), dtype, *arrays)
            if dtype is not None
            else struct((blocks[1], tokens), jnp.float32, *arrays)
            for dtype in results
        ],
        grid=blocks,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        name=f"jaxent_product_{name}",
        interpret=INTERPRET,
    )(*arrays)
