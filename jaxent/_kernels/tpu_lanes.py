"""Kernels for TPUs where classes lie across the lanes: blocks of whole rows in fast memory.

A block is worked on in groups of rows, and a group in parts of its classes, for its maximum, its sums and its entries
(rows.py). What there is of each row, its label or its sum, is an array of (rows of a group, groups) while it is
worked with, a column a group: so the arithmetic of rows is done for all of them at once. In memory it lies the other
way round, where it takes less room.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from .rows import Function, Part, Rows, grouped, per_row, repeat, struct
from .tpu_parts import BLOCK, LANES, SLACK, SUBLANES, Blocks, Parts, of_tile, parts, wide

PART = 2 * LANES
GROUP = 64  # registers of logits of a group of rows, unless two tiles of rows have more
LEAST_ROWS = 2 * SUBLANES


class Plan(NamedTuple):
    """How a block is worked on."""

    parts: Parts
    group: int  # rows
    groups: int  # of a block
    keeps: bool  # the exponentials, which are computed once, then
    memory: int  # in bytes

    @property
    def rows(self) -> int:
        return self.group * self.groups


def plan(function: Function, shape: tuple[int, ...], _: int, entry: int, most: int) -> Plan | None:
    """For entries of so many bytes, of all arrays; None if not even one tile of rows fits fast memory of `most`."""
    _batch, rows, classes = _sides(shape)
    tiles = pl.cdiv(classes, LANES)
    row = tiles * LANES
    group = 2 * SUBLANES  # two tiles, as half precision fills its registers
    while group < rows and 2 * group * tiles <= GROUP * SUBLANES:
        group *= 2
    smallest = min(rows, group)
    for size, keeps in ((smallest, function.keeps), (smallest, False), (min(rows, SUBLANES), False)):
        groups = max(1, min(LANES, BLOCK // (size * row * entry), pl.cdiv(rows, size)))
        memory = groups * pl.cdiv(size, SUBLANES) * SUBLANES * row * (2 * entry + 4 * keeps) + SLACK
        if memory <= most:
            return Plan(parts(classes, PART, size, axis=1), size, groups, keeps, memory)
    return None


class _Block(NamedTuple):
    plan: Plan
    logits: Any
    other: Any
    labels: Any  # as numbers
    exponentials: Any

    def shape(self, width: int) -> tuple[int, ...]:
        return self.plan.group, width

    def group(self, ref: Any, i: Any, first: Any, width: int) -> Any:
        """Where a part of a group lies."""
        rows = pl.ds(pl.multiple_of(i * self.plan.group, self.plan.group), self.plan.group)
        return ref.at[rows, pl.ds(first, width)]

    def maxima(self, i: Any) -> jax.Array:
        """Of the rows of a group."""

        def step(first: Any, width: int, so_far: Any) -> Any:
            return (jnp.maximum(so_far[0], wide(self.group(self.logits, i, first, width)[...])),)

        return self.plan.parts.fold(step, self.shape, 1, -jnp.inf, jnp.max, jnp.maximum)[0]

    def first(self, i: Any, m: jax.Array) -> jax.Array:
        """Of the rows of a group, the first class whose logit is `m`, as a number."""
        spread = _spread(self.plan, m)
        position = {w: jax.lax.broadcasted_iota(jnp.int32, x.shape, 1).astype(jnp.float32) for w, x in spread.items()}

        def step(first: Any, width: int, so_far: Any) -> Any:
            x = wide(self.group(self.logits, i, first, width)[...])
            here = position[width] + jnp.asarray(first, jnp.float32)
            return (jnp.minimum(so_far[0], jnp.where(x == spread[width], here, jnp.inf)),)

        return self.plan.parts.fold(step, self.shape, 1, jnp.inf, jnp.min, jnp.minimum)[0]

    def parts(self, i: Any, m: jax.Array, again: bool) -> Callable[[Any, int], Part]:
        """What gives the parts of a group, for the first time or again."""
        plan, m_of, labels_of = self.plan, _spread(self.plan, m), {}
        if self.labels is not None:
            y = _column(self.labels, i).astype(jnp.int32)
            labels_of = {w: y - jax.lax.broadcasted_iota(jnp.int32, m_of[w].shape, 1) for w in m_of}

        def part(first: Any, width: int) -> Part:
            x = wide(self.group(self.logits, i, first, width)[...])
            t = None if self.other is None else wide(self.group(self.other, i, first, width)[...])
            kept = self.group(self.exponentials, i, first, width) if plan.keeps else None
            e = kept[...] if again and kept is not None else jnp.exp(x - m_of[width])
            if kept is not None and not again:
                kept[...] = e
            return Part(x, m_of[width], e, t, labels_of[width] == first if labels_of else None)

        return part


def _spread(plan: Plan, column: jax.Array) -> dict[int, jax.Array]:
    """A number a row for all classes of a part, by its width: once, and not in every step."""
    return {w: jnp.broadcast_to(column, (plan.group, w)) for w in plan.parts.widths}


def _column(rows: jax.Array, i: Any) -> jax.Array:
    """The rows of group `i`, which lie in a column."""
    if rows.shape[1] == 1:
        return rows
    return jnp.sum(jnp.where(_is_column(rows, i), rows, 0.0), 1, keepdims=True)


def _with_column(rows: jax.Array, i: Any, column: jax.Array) -> jax.Array:
    return column if rows.shape[1] == 1 else jnp.where(_is_column(rows, i), column, rows)


def _is_column(rows: jax.Array, i: Any) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) == i


def _transposed(ref: Any) -> jax.Array:
    return ref[...].T


def _kernel(function: Function, plan: Plan, *refs: Any) -> None:
    (logits, *other), labels, given, out_rows, out, predicted = grouped(function, refs)
    of_rows = per_row(function, given, _transposed, of_tile((plan.group, plan.groups)))
    block = _Block(
        plan, logits, other[0] if other else None, of_rows[0] if labels else None, refs[-1] if plan.keeps else None
    )

    def collect(i: Any, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m = block.maxima(i)
        part = block.parts(i, m, again=False)

        def step(first: Any, width: int, so_far: Any) -> Any:
            return function.collect(part(first, width), *so_far)

        sums = plan.parts.fold(step, block.shape, function.sums, 0.0, jnp.sum, jnp.add)
        first = (block.first(i, m),) if predicted else ()
        return tuple(_with_column(row, i, x) for row, x in zip(rows, (m, *sums, *first), strict=True))

    nothing = jnp.zeros((plan.group, plan.groups), jnp.float32)
    largest, *collected = repeat(plan.groups, collect, (nothing,) * (1 + function.sums + len(predicted)))
    sums, first = collected[: function.sums], collected[function.sums :]
    results, coefficients = function.finish(Rows(largest, plan.parts.classes, of_rows), *sums)
    for ref, result in zip((*out_rows, *predicted), (*results[: len(out_rows)], *first), strict=True):
        ref[...] = result.T
    entry = function.entry
    if entry is None:
        return

    def write(i: Any, _: Any) -> Any:
        m, *columns = (_column(x, i) for x in (largest, *coefficients))
        part = block.parts(i, m, again=True)
        spread = [_spread(plan, x) for x in columns]

        def visit(first: Any, width: int) -> None:
            entries = entry(part(first, width), *(x[width] for x in spread))
            block.group(out[0], i, first, width)[...] = entries.astype(out[0].dtype)

        plan.parts.each(visit)
        return ()

    repeat(plan.groups, write, ())


def call(
    name: str,
    function: Function,
    plan: Plan,
    arrays: tuple[jax.Array, ...],
    dtype: DTypeLike,
    in_place: bool,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The results of a row function, whose classes are the last axis."""
    shape = arrays[0].shape
    batch, rows, classes = _sides(shape)
    blocks = pl.cdiv(rows, plan.rows)
    by_entry = pl.BlockSpec((None, plan.rows, classes), _place_of_entries)
    by_row = pl.BlockSpec((None, None, plan.groups, plan.group), _place_of_rows)
    entries = struct((batch, rows, classes), dtype, *arrays)
    of_rows = struct((batch, blocks, plan.groups, plan.group), jnp.float32, *arrays)

    def laid_out(x: jax.Array, kind: str) -> jax.Array:
        if kind in "xt":
            return x.reshape(batch, rows, classes)
        if kind == "f":
            return x
        # Labels are numbers, too, which have room for 2 ** 24 of them.
        x = (jnp.clip(x, -1, classes) if kind == "y" else x).astype(jnp.float32)
        x = jnp.pad(x.reshape(batch, rows), ((0, 0), (0, blocks * plan.rows - rows)))
        return x.reshape(batch, blocks, plan.groups, plan.group)

    def as_given(x: jax.Array, kind: str) -> jax.Array:
        if kind == "o":
            return x.reshape(shape)
        return x.reshape(batch, -1)[:, :rows].reshape(shape[:-1])

    given = tuple(map(laid_out, arrays, function.arguments))
    scratch = [pltpu.VMEM((plan.rows, classes), jnp.float32)] * plan.keeps
    blocks_of = Blocks((batch, blocks), by_entry, by_entry, by_row, entries, of_rows, scratch, plan.memory)
    out = blocks_of.call(partial(_kernel, function, plan), name, function, given, in_place, interpret)
    return tuple(map(as_given, out, function.results))


def _place_of_entries(batch: Any, block: Any) -> tuple[Any, ...]:
    return batch, block, 0


def _place_of_rows(batch: Any, block: Any) -> tuple[Any, ...]:
    return batch, block, 0, 0


def _sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Batches, rows and classes: one batch where rows fill their tiles, so that no array has to be copied."""
    *leading, classes = shape
    rows = leading[-1] if leading else 1
    if rows % SUBLANES:
        return math.prod(leading[:-1]), rows, classes
    return 1, math.prod(leading), classes


def scattered(shape: tuple[int, ...]) -> str | None:
    """Why rows of such an array fill their tiles badly."""
    batch, rows, _ = _sides(shape)
    return f"fewer than {LEAST_ROWS} rows lie side by side" if batch > 1 and rows < LEAST_ROWS else None
