"""Kernels for TPUs where rows lie across the lanes, and classes across the sublanes or before both.

So XLA lays out the logits of 1,000 classes, or of images. A block has all classes of some tiles of rows, of which one
is worked on at once, in parts of its classes, for its maximum, its sums and its entries (rows.py). What there is of
each row fills a tile as the rows themselves do.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from .rows import Function, Part, Rows, grouped, per_row, repeat, struct
from .tpu_parts import BLOCK, LANES, SLACK, SUBLANES, Blocks, Parts, of_tile, parts, wide

PART = 4  # registers of logits that are worked on at once
ACROSS = 4  # registers across, at most, of as many logits as GROUP, or one
GROUP = 512
OF_ROWS = 64  # bytes for a row's numbers, twice
LEAST_BLOCK = 2**18  # bytes in and out that take as long as the start of a block


class Plan(NamedTuple):
    """How a block is worked on."""

    classes: int  # their axis, the last but one or before
    block: tuple[int | None, ...]  # sizes of all axes, None where a block has one index
    tile: tuple[int, ...]  # rows at once, along the last axes
    tiles: tuple[int, ...]  # of a block
    parts: Parts
    keeps: bool  # the exponentials, which are computed once, then
    memory: int  # in bytes
    copied: int  # bytes in and out, of a block


def plan(function: Function, shape: tuple[int, ...], classes: int, entry: int, most: int) -> Plan | None:
    """For entries of so many bytes, of all arrays; None if one tile does not fit fast memory of `most`."""
    if classes == len(shape) - 2:
        rows = [shape[-1]]
        lanes = max(1, min(ACROSS, GROUP * SUBLANES // shape[classes], pl.cdiv(rows[0], LANES))) * LANES
        column, least_part, tiles = pl.cdiv(shape[classes], 2 * SUBLANES) * 2 * SUBLANES, SUBLANES, [(lanes,)]
    else:
        rows = [*shape[-2:]]
        column, least_part = shape[classes], 1
        tiles = [(min(n * SUBLANES, rows[0]), LANES) for n in (2, 1)]
    for tile in tiles:
        padded = math.prod((*(pl.cdiv(n, SUBLANES) * SUBLANES for n in tile[:-1]), tile[-1]))
        counts, left = [], max(1, BLOCK // (entry * column * padded))
        for n, size in zip(rows[::-1], tile[::-1], strict=True):
            counts.insert(0, min(pl.cdiv(n, size), left))
            left = max(1, left // counts[0])
        walk = parts(shape[classes], max(least_part, PART * SUBLANES * LANES // padded), padded, axis=0)
        for keeps in (function.keeps, False):
            of_row = column * (2 * entry + 4 * keeps) + OF_ROWS
            memory = math.prod(counts) * padded * of_row + SLACK
            if memory <= most:
                block: list[int | None] = [None] * (len(shape) - len(tile))
                block += [n * size for n, size in zip(counts, tile, strict=True)]
                block[classes] = shape[classes]
                copied = math.prod(counts) * padded * column * entry
                return Plan(classes, tuple(block), tile, tuple(counts), walk, keeps, memory, copied)
    return None


def scattered(plan: Plan, shape: tuple[int, ...]) -> str | None:
    """Why blocks of such an array are too small."""
    blocks = math.prod(_grid(plan, shape))
    small = plan.copied < LEAST_BLOCK and blocks > 8  # of a small array, there are few
    return f"{blocks} blocks of {plan.copied} bytes are small" if small else None


def _kernel(function: Function, plan: Plan, *refs: Any) -> None:
    (logits, *other), labels, given, out_rows, out, predicted = grouped(function, refs)
    exponentials = refs[-1] if plan.keeps else None

    def work(i: Any, _: Any) -> Any:
        rows = _rows(plan, i)

        def row(ref: Any) -> jax.Array:
            return ref[(slice(0, 1), *rows)]

        def group(ref: Any, first: Any, width: int) -> Any:
            return ref.at[(pl.ds(first, width), *rows)]

        def load(ref: Any, first: Any, width: int) -> jax.Array:
            return wide(group(ref, first, width)[...])

        def shape(width: int) -> tuple[int, ...]:
            return width, *plan.tile

        def maximum(first: Any, width: int, so_far: Any) -> Any:
            return (jnp.maximum(so_far[0], load(logits, first, width)),)

        m = plan.parts.fold(maximum, shape, 1, -jnp.inf, jnp.max, jnp.maximum)[0]
        position = {w: jax.lax.broadcasted_iota(jnp.int32, shape(w), 0) for w in plan.parts.widths}
        from_label = {w: row(labels[0]) - p for w, p in position.items()} if labels else {}

        def part(first: Any, width: int, again: bool) -> Part:
            x = load(logits, first, width)
            t = load(other[0], first, width) if other else None
            kept = None if exponentials is None else group(exponentials, first, width)
            e = kept[...] if again and kept is not None else jnp.exp(x - m)
            if kept is not None and not again:
                kept[...] = e
            return Part(x, m, e, t, from_label[width] == first if labels else None)

        def collect(first: Any, width: int, so_far: Any) -> Any:
            return function.collect(part(first, width, again=False), *so_far)

        def here(first: Any, width: int, so_far: Any) -> Any:
            at = (position[width] + first).astype(jnp.float32)
            return (jnp.minimum(so_far[0], jnp.where(load(logits, first, width) == m, at, jnp.inf)),)

        sums = plan.parts.fold(collect, shape, function.sums, 0.0, jnp.sum, jnp.add)
        known = Rows(m, plan.parts.classes, per_row(function, given, row, of_tile(m.shape)))
        results, coefficients = function.finish(known, *sums)
        for ref, result in zip(out_rows, results, strict=False):
            ref[(slice(0, 1), *rows)] = result
        for ref in predicted:
            ref[(slice(0, 1), *rows)] = plan.parts.fold(here, shape, 1, jnp.inf, jnp.min, jnp.minimum)[0]
        entry = function.entry
        if entry is None:
            return _

        def write(first: Any, width: int) -> None:
            entries = entry(part(first, width, again=True), *coefficients)
            group(out[0], first, width)[...] = entries.astype(out[0].dtype)

        plan.parts.each(write)
        return _

    repeat(math.prod(plan.tiles), work, 0)


def _rows(plan: Plan, i: Any) -> tuple[Any, ...]:
    """Where the rows of tile `i` of a block lie."""
    places = []
    for size, count in zip(plan.tile[::-1], plan.tiles[::-1], strict=True):
        start = pl.multiple_of(jax.lax.rem(i, count) * size, size) if count > 1 else 0
        places.insert(0, pl.ds(start, size))
        i = jax.lax.div(i, count) if count > 1 else i
    return tuple(places)


def call(
    name: str,
    function: Function,
    plan: Plan,
    arrays: tuple[jax.Array, ...],
    dtype: DTypeLike,
    in_place: bool,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The results of a row function of arrays whose axes are as they lie."""
    axis, shape = plan.classes, arrays[0].shape
    grid = _grid(plan, shape)

    def place(*indices: Any) -> tuple[Any, ...]:
        return (*indices[:axis], 0, *indices[axis:])

    def of_row(sizes: tuple[int | None, ...]) -> tuple[Any, ...]:
        return (*sizes[:axis], 1, *sizes[axis + 1 :])

    by_entry = pl.BlockSpec(plan.block, place)
    by_row = pl.BlockSpec(of_row(plan.block), place)
    entries = struct(shape, dtype, *arrays)
    of_rows = struct(of_row(shape), jnp.float32, *arrays)

    def laid_out(x: jax.Array, kind: str) -> jax.Array:
        return x if kind in "xtf" else jnp.expand_dims(x, axis)

    given = tuple(map(laid_out, arrays, function.arguments))
    scratch = [pltpu.VMEM(tuple(n for n in plan.block if n is not None), jnp.float32)] * plan.keeps
    blocks = Blocks(grid, by_entry, by_entry, by_row, entries, of_rows, scratch, plan.memory)
    out = blocks.call(partial(_kernel, function, plan), name, function, given, in_place, interpret)
    return tuple(x if kind == "o" else x.squeeze(axis) for x, kind in zip(out, function.results, strict=True))


def _grid(plan: Plan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along all axes but that of the classes."""
    blocks = [pl.cdiv(n, 1 if size is None else size) for n, size in zip(shape, plan.block, strict=True)]
    return (*blocks[: plan.classes], *blocks[plan.classes + 1 :])
