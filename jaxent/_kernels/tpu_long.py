"""Kernels for TPUs whose rows do not lie in fast memory twice, with rows or classes across the lanes.

A row comes in blocks of its classes, and its sums are relative to the largest logit so far (the online softmax of
Milakov and Gimelshein, arXiv:1805.02867). Then its entries are written block by block, of the logits that fast memory
has kept, or else, if it does not hold them even once, of logits that are read again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from .rows import Function, Growth, Part, Rows, grouped, per_row, struct
from .tpu_parts import BLOCK, LANES, SLACK, SUBLANES, Blocks, Parts, of_tile, parts, wide

PART = 4  # registers of logits that are worked on at once
LEAST_BLOCK = 2**20  # bytes in and out, beside rows that are kept


class Plan(NamedTuple):
    """How rows are worked on."""

    axis: int  # of the classes
    block: tuple[int | None, ...]  # sizes of all axes, None where a block has one index
    blocks: int  # of a row
    parts: Parts  # of a block
    last: Parts  # of the last one
    keeps: bool  # what has been read of a row
    memory: int  # in bytes


def plan(function: Function, shape: tuple[int, ...], axis: int, read: int, written: int, most: int) -> Plan:
    """For entries of so many bytes, of the arrays that are read and of the one that is written."""
    across_lanes, classes = axis == len(shape) - 1, shape[axis]
    rows, part = (min(2 * SUBLANES, shape[-2]), PART * LANES // 2) if across_lanes else (LANES, PART * SUBLANES)
    at_once = pl.cdiv(rows, SUBLANES) * SUBLANES
    walk = partial(parts, part=part, rows=at_once, axis=int(across_lanes))

    def of(width: int, keeps: bool) -> Plan:
        blocks = pl.cdiv(classes, width)
        block = (None,) * (len(shape) - 2) + ((rows, width) if across_lanes else (width, rows))
        memory = at_once * width * (2 * (read + written) + read * blocks * keeps) + SLACK
        return Plan(axis, block, blocks, walk(width), walk(classes - (blocks - 1) * width), keeps, memory)

    of_class = at_once * (read + written)
    widest = max(part, BLOCK // of_class // part * part)
    least = pl.cdiv(LEAST_BLOCK, of_class * part) * part
    widths = range(widest, max(least, part) - 1, -part) if function.entry is not None else ()
    kept = (of(min(classes, width), True) for width in widths)
    return next((plan for plan in kept if plan.memory <= most), of(min(classes, widest), False))


class _Block(NamedTuple):
    """One that is worked on."""

    plan: Plan
    i: Any  # which one of its rows
    walk: Parts
    labels: list[Any]

    def shape(self, width: int) -> tuple[int, ...]:
        sizes = [n for n in self.plan.block if n is not None]
        sizes[self.walk.axis] = width
        return tuple(sizes)

    def at(self, ref: Any, first: Any, width: int) -> Any:
        return ref.at[(slice(None),) * self.walk.axis + (pl.ds(first, width),)]

    def load(self, ref: Any, first: Any, width: int) -> jax.Array:
        return wide(self.at(ref, first, width)[...])

    def position(self, width: int) -> jax.Array:
        """Which class each is, but for the first one of a part."""
        here = jax.lax.broadcasted_iota(jnp.int32, self.shape(width), self.walk.axis)
        return here + self.i * self.plan.parts.classes

    def part_of(self, arrays: list[Any], m: jax.Array) -> Callable[[Any, int], Part]:
        m_of = {w: jnp.broadcast_to(m, self.shape(w)) for w in self.walk.widths}
        label_of = {w: self.labels[0][...] - self.position(w) for w in m_of if self.labels}

        def part(first: Any, width: int) -> Part:
            x, *t = (self.load(ref, first, width) for ref in arrays)
            label = label_of[width] == first if label_of else None
            return Part(x, m_of[width], jnp.exp(x - m_of[width]), t[0] if t else None, label)

        return part


def _kernel(function: Function, plan: Plan, *refs: Any) -> None:
    arrays, labels, given, out_rows, out, predicted = grouped(function, refs)
    m, sums, coefficients, *kept = refs[len(function.arguments + function.results) :]
    phase, i = (pl.program_id(len(plan.block) - k) for k in (1, 0))
    classes = plan.parts.classes * (plan.blocks - 1) + plan.last.classes

    def collect(block: _Block) -> None:
        def maximum(first: Any, width: int, so_far: Any) -> Any:
            for ref, copy in zip(arrays, kept, strict=False):
                block.at(copy.at[i], first, width)[...] = block.at(ref, first, width)[...]
            return (jnp.maximum(so_far[0], block.load(arrays[0], first, width)),)

        here = block.walk.fold(maximum, block.shape, 1, -jnp.inf, jnp.max, jnp.maximum)[0]
        largest = jnp.maximum(m[0], here)
        before = jnp.where(i == 0, largest, m[0])
        grown = before != largest
        # Relative to minus infinity, the sums of this block would be NaN, and those of later ones with them.
        part = block.part_of(arrays, jnp.where(largest == -jnp.inf, 0.0, largest))

        def step(first: Any, width: int, so_far: Any) -> Any:
            return function.collect(part(first, width), *so_far)

        def first_of(first: Any, width: int, so_far: Any) -> Any:
            class_ = (block.position(width) + first).astype(jnp.float32)
            is_largest = block.load(arrays[0], first, width) == largest
            return (jnp.minimum(so_far[0], jnp.where(is_largest, class_, jnp.inf)),)

        found = block.walk.fold(step, block.shape, function.sums, 0.0, jnp.sum, jnp.add)
        growth = Growth(grown, jnp.where(grown, before - largest, 0.0), i * plan.parts.classes)
        moved = function.rescale(growth, *(sums[k] for k in range(function.sums)))
        for k, (of_others, of_block) in enumerate(zip(moved, found, strict=True)):
            sums[k] = of_others + of_block
        for ref in predicted:
            earliest = block.walk.fold(first_of, block.shape, 1, jnp.inf, jnp.min, jnp.minimum)[0]
            ref[...] = jnp.where(grown | (i == 0), earliest, ref[...])
        m[0] = largest

    def finish() -> None:
        # Nothing is known of a row whose largest logit is infinite.
        totals = [sums[k] + (m[0] - m[0]) for k in range(function.sums)]
        of_rows = per_row(function, given, lambda ref: ref[...], of_tile(m[0].shape))
        results, needed = function.finish(Rows(m[0], classes, of_rows), *totals)
        for ref, result in zip(out_rows, results, strict=False):
            ref[...] = result
        for k, x in enumerate(needed):
            coefficients[k] = x.astype(jnp.float32)

    def write(block: _Block) -> None:
        entry = function.entry
        if entry is None:
            return
        part = block.part_of([copy.at[i] for copy in kept] or arrays, m[0])
        needed = [coefficients[k] for k in range(coefficients.shape[0])]

        def visit(first: Any, width: int) -> None:
            block.at(out[0], first, width)[...] = entry(part(first, width), *needed).astype(out[0].dtype)

        block.walk.each(visit)

    def on_block(work: Callable[[_Block], None], when: Any) -> None:
        is_last = i == plan.blocks - 1
        for walk, here in ((plan.parts, ~is_last), (plan.last, is_last)):
            pl.when(when & here)(partial(work, _Block(plan, i, walk, labels)))

    @pl.when((phase == 0) & (i == 0))
    def _() -> None:
        m[...] = jnp.full(m.shape, -jnp.inf)
        sums[...] = jnp.zeros(sums.shape)

    on_block(collect, phase == 0)
    pl.when((phase == 0) & (i == plan.blocks - 1))(finish)
    on_block(write, phase == 1)


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
    axis, shape = plan.axis, arrays[0].shape
    of_rows = (*plan.block[:axis], 1, *plan.block[axis + 1 :])

    def spec(sizes: tuple[int | None, ...], index: Callable[[Any, Any], Any]) -> Any:
        def place(*indices: Any) -> tuple[Any, ...]:
            *rows, phase, i = indices
            return (*rows[:axis], index(phase, i), *rows[axis:])

        return pl.BlockSpec(sizes, place)

    # A block that stays where it was is not copied: what is read while something is written, and the other way round.
    def read(phase: Any, i: Any) -> Any:
        return jnp.maximum(i, phase * (plan.blocks - 1)) if plan.keeps else i

    def written(phase: Any, i: Any) -> Any:
        return phase * i

    def of_row(*_: Any) -> int:
        return 0

    row = tuple(n for n in of_rows if n is not None)
    block = tuple(n for n in plan.block if n is not None)
    scratch = [pltpu.VMEM((n, *row), jnp.float32) for n in (1, function.sums, _coefficients(function, row))]
    scratch += [pltpu.VMEM((plan.blocks, *block), x.dtype) for x in arrays if x.ndim == len(shape)] * plan.keeps
    counts = [pl.cdiv(n, size or 1) for n, size in zip(shape, plan.block, strict=True)]
    given = [
        x if kind in "xtf" else jnp.expand_dims(x, axis) for x, kind in zip(arrays, function.arguments, strict=True)
    ]
    blocks = Blocks(
        grid=(*counts[:axis], *counts[axis + 1 :], 1 + (function.entry is not None), plan.blocks),
        read=spec(plan.block, read),
        written=spec(plan.block, written),
        by_row=spec(of_rows, of_row),
        entries=struct(shape, dtype, *arrays),
        numbers=struct((*shape[:axis], 1, *shape[axis + 1 :]), jnp.float32, *arrays),
        scratch=scratch,
        memory=plan.memory,
        in_turn=2,
        reads=1 if plan.keeps or function.entry is None else 2,
    )
    out = blocks.call(partial(_kernel, function, plan), name, function, tuple(given), in_place, interpret)
    return tuple(x if kind == "o" else x.squeeze(axis) for x, kind in zip(out, function.results, strict=True))


def _coefficients(function: Function, shape: tuple[int, ...]) -> int:
    """How many there are, or 1."""

    def found(m: jax.Array, *given: jax.Array) -> Any:
        return function.finish(Rows(m, 1, given), *[m] * function.sums)[1]

    given = sum(kind in "yrf" for kind in function.arguments)
    return max(1, len(jax.eval_shape(found, *[jax.ShapeDtypeStruct(shape, jnp.float32)] * (1 + given))))
