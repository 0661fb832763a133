"""Walking over tokens a chunk at a time, so that only one chunk's logits exist at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Integer

SHARE = 0.2  # of all logits, at most
ENOUGH = 4096  # tokens: with more, products are no faster


def chunk_size_in_caches(tokens: Any, features: Any, *, in_place: bool = False) -> int:
    """Tokens whose logits a CPU holds at once, or derivatives of the second order.

    Matrix products want many rows, and every chunk reads the kernel and updates its gradient once more. A sixth of
    the features keeps a chunk's logits at a sixth of the kernel's size, and what a compiler may write out beside them
    at as much again; where the gradient is written over the logits, there may be twice as many. Chunks are of equal
    size as nearly as multiples of 16 allow.
    """
    if not isinstance(tokens, int) or not isinstance(features, int):  # of a size that is known when it runs
        return 256
    part = 3 if in_place else 6
    limit = min(max(768, features) // part, 1024)
    if tokens <= limit:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // limit))
    return min(-16 * (-even // 16), limit)


def chunk_size_for_memory(
    tokens: Any,
    features: Any,
    held: Sequence[float],
    parts: int = 1,
    share: float = SHARE,
    gradient: float | None = None,
    least: int = 3,
) -> int:
    """Tokens whose logits an accelerator holds at once, for each of so many `parts` of a machine.

    A chunk needs some arrays, `held` times the bytes of its logits each: this `share` of all logits at most, beside a
    sum for the kernel's gradient, if that is wanted. It has `gradient` times the bytes of its sum. There are
    `least` chunks, or more, so that some can be skipped.
    """
    if not isinstance(tokens, int):  # of a size that is known when it runs
        return 1024
    result, enough = 0.0, ENOUGH * parts
    if isinstance(features, int):  # many features, or many chunks would read and write their sum
        enough = max(ENOUGH, 2 * features) * parts
    if gradient is not None and isinstance(features, int):
        result = gradient * features / max(tokens, 1)
        if gradient == 1.0:  # the result is the sum, which takes nothing then
            share, result = share + result, 0.0
    steps = max(least, -(-tokens // enough))
    while 16 * steps < tokens and not _fit(held, 1.0 / steps, share, result):
        steps += 1
    # Chunks that fill the tiles of matrix units, where the number of tokens allows; but no more chunks than necessary
    # where each has to read and write a large sum of the kernel's gradient.
    if isinstance(features, int) and 4 * features < tokens:
        steps = next((n for n in range(steps, steps + steps // 3 + 1) if tokens % (128 * n) == 0), steps)
    return max(-16 * (tokens // (-16 * steps)), 1)


def _fit(held: Sequence[float], chunk: float, share: float, result: float) -> bool:
    """Whether the arrays of such a chunk do, one of them where the result will be if there is room for it."""
    sizes = [chunk * size for size in held]
    return sum(sizes) - max((size for size in sizes if size <= result), default=0.0) < share


def block_of_classes(tokens: Any, classes: int, size: int) -> int:
    """Classes whose logits of all tokens take half the room that all logits of `size` tokens take.

    A multiple of 128, into which accelerators cut arrays; one of which there is a whole number, if there is any that
    is not much smaller.
    """
    tiles = max(size * classes // (2 * 128 * tokens), 1) if isinstance(tokens, int) else 8
    tiles = next((n for n in range(tiles, tiles // 4, -1) if classes % (128 * n) == 0), tiles)
    return min(128 * tiles, classes)


def fit_at_once(tokens: Any, features: Any, held: float) -> bool:
    """Whether all tokens at once take no more than chunks of them, which add up the kernel's gradient beside them."""
    return isinstance(tokens, int) and isinstance(features, int) and 0 < (held - SHARE) * tokens <= features


def pays_to_walk_twice(tokens: Any, size: int, flops_per_byte: float) -> bool:
    """Whether chunks of `size` tokens wait for the sum of the kernel's gradient longer than a product takes.

    Of each weight they read and write 8 bytes a chunk while the product takes two FLOPs a token, and 10 before and
    after. Of bfloat16.
    """
    if not isinstance(tokens, int):  # of a size that is known when it runs
        return False
    steps = -(-tokens // size)
    waits = 10.0 + steps * max(0.0, 8.0 - 2.0 * size / flops_per_byte)
    return steps > 1 and 2.0 * tokens / flops_per_byte < waits


def is_one_chunk(tokens: Any, size: int | None) -> bool:
    """Whether somebody wants all tokens at once: then there is no chunk to skip, and no sum to add a chunk to."""
    return size is not None and isinstance(tokens, int) and 0 < tokens <= size


@dataclass(frozen=True)
class Chunks:
    """Which tokens the steps of a loop work on."""

    steps: int | Integer[Array, ""]
    size: int
    take: Callable[[Array, int | Integer[Array, ""]], Array]  # a step's rows of an array with a row per token
    put: Callable[[Array, Array, int | Integer[Array, ""]], Array]  # write a step's rows into a buffer
    counts: Callable[[int | Integer[Array, ""]], Bool[Array, " size"]]  # False: the row is ignored, or none at all
    spread: Callable[[Array], Array]  # an array with a row per token, as `take` and `put` want it
    gather: Callable[[Array], Array]  # the way back


def unseen_parts(x: Array) -> int:
    """Into how many parts automatic sharding might split `x` at most."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jax.device_count()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind == AxisType.Auto)


@jax.custom_batching.custom_vmap
def everywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """The flag; below `jax.vmap`, whether all flags are set: so a condition stays one, and a loop selects nothing."""
    return flag


@everywhere.def_vmap
def _everywhere(size: int, batched: list[bool], flags: Bool[Array, " size"]) -> tuple[Bool[Array, ""], bool]:
    return everywhere(jnp.all(flags)), False


def packed_chunks(tokens: int, size: int, counts: Bool[Array, " tokens"] | None, *, skip: bool) -> Chunks:
    """The tokens that count first; with `skip`, the loop ends after them, and no work is done for the others.

    A number of steps that depends on data cannot be differentiated backwards. The tokens are indexed freely, so all
    of them must be on one device.
    """
    steps = -(-tokens // size)
    if counts is None:
        order, live = jnp.arange(tokens), tokens
    else:
        order, live = jnp.argsort(~counts, stable=True), jnp.sum(counts, dtype=jnp.int32)
        if skip:
            steps = (live + size - 1) // size

    def position(i: int | Integer[Array, ""]) -> Integer[Array, " size"]:
        return i * size + jnp.arange(size)

    def row(i: int | Integer[Array, ""]) -> Integer[Array, " size"]:
        # Positions behind the last token lead nowhere, and each to another nowhere: AD wants them unique.
        return jnp.where(position(i) < tokens, order.at[position(i)].get(mode="clip"), position(i))

    def take(rows: Array, i: int | Integer[Array, ""]) -> Array:
        return rows.at[row(i)].get(mode="clip")

    def put(buffer: Array, rows: Array, i: int | Integer[Array, ""]) -> Array:
        return buffer.at[row(i)].set(rows, mode="drop", unique_indices=True)

    return Chunks(steps, size, take, put, lambda i: position(i) < live, lambda rows: rows, lambda rows: rows)


def strided_chunks(tokens: Any, size: int, counts: Bool[Array, " tokens"] | None) -> Chunks:
    """Every step takes tokens from everywhere, one of each run of `steps` tokens.

    Where the compiler has split the tokens over devices, each then has its share in every step, and no token moves.
    """
    least = -(-tokens // size)
    known = isinstance(tokens, int)
    steps = next((k for k in range(least, 2 * least) if tokens % k == 0), least) if known else least
    size = -(-tokens // max(steps, 1)) if known else size
    missing = size * steps - tokens

    def spread(rows: Array) -> Array:
        padded = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows
        return padded.reshape(size, steps, *rows.shape[1:])

    def gather(rows: Array) -> Array:
        return rows.reshape(size * steps, *rows.shape[2:])[:tokens]

    def take(rows: Array, i: int | Integer[Array, ""]) -> Array:
        return jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)

    def put(buffer: Array, rows: Array, i: int | Integer[Array, ""]) -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, rows, i, 1)

    live = spread(jnp.ones(tokens, bool) if counts is None else counts)
    return Chunks(steps, size, take, put, lambda i: take(live, i), spread, gather)
