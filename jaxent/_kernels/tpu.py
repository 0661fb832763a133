"""Kernels for TPUs, by Pallas: blocks of whole rows in fast memory, so that logits are read once and written once.

A block is worked on in groups of rows, and a group in parts of its classes, for its maximum, its sums and its entries
(rows.py). What there is of each row, its label or its sum, lies across the lanes of an array of (rows of a group,
groups), a column a group: so the arithmetic of rows is done for all of them at once, and they take little memory.
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

from .._class_axis import ClassAxis
from .rows import Function, Part, Rows, function_of, grouped, repeat, struct
from .rows import refusal as refusal_of_any

INTERPRET: Any = False  # tests run the kernels on CPUs
LANES, SUBLANES = 128, 8  # of a register and of a tile of memory
PART = 2 * LANES  # classes that are worked on at once: wide enough that nothing waits for the sum before
STEP = 128  # registers of logits that a step of a loop takes, which is then unrolled
GROUP = 64  # registers of logits of a group of rows, unless two tiles of rows have more
BLOCK = 4 * 2**20  # bytes in and out that hide the start of their copies
FAST_MEMORY = 56 * 2**20  # v5e, v5p and v6e have 128 MiB, v7x 64
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # have less; nobody has compiled for them
SLACK = 4 * 2**20  # for what the compiler keeps beside the blocks


class _Plan(NamedTuple):
    classes: int
    group: int  # rows
    groups: int  # of a block
    step: int  # classes that a step of a loop takes
    keeps: bool  # the exponentials, which are computed once, then
    memory: int  # in bytes

    @property
    def rows(self) -> int:
        return self.group * self.groups

    @property
    def rest(self) -> int:
        """Classes that fill no part."""
        return self.classes % PART


def _plan(function: Function, rows: int, classes: int, entry: int) -> _Plan | None:
    """For entries of so many bytes, of all arrays; None if not even one tile of rows fits fast memory."""
    tiles = pl.cdiv(classes, LANES)
    row = tiles * LANES
    group, step = 2 * SUBLANES, STEP * SUBLANES  # two tiles, as half precision fills its registers
    while group < rows and 2 * group * tiles <= GROUP * SUBLANES:
        group *= 2
    smallest = min(rows, group)
    for group, keeps in ((smallest, function.keeps), (smallest, False), (min(rows, SUBLANES), False)):
        groups = max(1, min(LANES, BLOCK // (group * row * entry), pl.cdiv(rows, group)))
        memory = groups * pl.cdiv(group, SUBLANES) * SUBLANES * row * (2 * entry + 4 * keeps) + SLACK
        if memory <= FAST_MEMORY:
            width = max(PART, min(classes // PART * PART, step // group * LANES // PART * PART))
            return _Plan(classes, group, groups, width, keeps, memory)
    return None


class _Block(NamedTuple):
    plan: _Plan
    logits: Any
    other: Any
    labels: Any  # as numbers
    exponentials: Any

    def group(self, ref: Any, i: Any, first: Any, width: int) -> Any:
        """Where a part of a group lies."""
        rows = pl.ds(pl.multiple_of(i * self.plan.group, self.plan.group), self.plan.group)
        return ref.at[rows, pl.ds(first, width)]

    def maxima(self, i: Any) -> jax.Array:
        """Of the rows of a group."""

        def step(first: Any, width: int, so_far: Any) -> Any:
            return (jnp.maximum(so_far[0], _wide(self.group(self.logits, i, first, width))),)

        return _folded(self.plan, step, 1, -jnp.inf, jnp.max, jnp.maximum)[0]

    def first(self, i: Any, m: jax.Array) -> jax.Array:
        """Of the rows of a group, the first class whose logit is `m`, as a number."""
        spread = _spread(self.plan, m)
        position = {w: jax.lax.broadcasted_iota(jnp.int32, x.shape, 1).astype(jnp.float32) for w, x in spread.items()}

        def step(first: Any, width: int, so_far: Any) -> Any:
            x = _wide(self.group(self.logits, i, first, width))
            here = position[width] + jnp.asarray(first, jnp.float32)
            return (jnp.minimum(so_far[0], jnp.where(x == spread[width], here, jnp.inf)),)

        return _folded(self.plan, step, 1, jnp.inf, jnp.min, jnp.minimum)[0]

    def parts(self, i: Any, m: jax.Array, again: bool) -> Callable[[Any, int], Part]:
        """What gives the parts of a group, for the first time or again."""
        plan, m_of, labels_of = self.plan, _spread(self.plan, m), {}
        if self.labels is not None:
            y = _column(self.labels[...], i).astype(jnp.int32)
            labels_of = {w: y - jax.lax.broadcasted_iota(jnp.int32, m_of[w].shape, 1) for w in m_of}

        def part(first: Any, width: int) -> Part:
            x = _wide(self.group(self.logits, i, first, width))
            t = None if self.other is None else _wide(self.group(self.other, i, first, width))
            kept = self.group(self.exponentials, i, first, width) if plan.keeps else None
            e = kept[...] if again and kept is not None else jnp.exp(x - m_of[width])
            if kept is not None and not again:
                kept[...] = e
            return Part(x, m_of[width], e, t, labels_of[width] == first if labels_of else None)

        return part


def _wide(ref: Any) -> jax.Array:
    return ref[...].astype(jnp.float32)


def _spread(plan: _Plan, column: jax.Array) -> dict[int, jax.Array]:
    """A number a row for all classes of a part, by its width: once, and not in every step."""
    return {w: jnp.broadcast_to(column, (plan.group, w)) for w in (PART * (plan.classes >= PART), plan.rest) if w}


def _column(rows: jax.Array, i: Any) -> jax.Array:
    """The rows of group `i`, which lie in a column."""
    if rows.shape[1] == 1:
        return rows
    return jnp.sum(jnp.where(_is_column(rows, i), rows, 0.0), 1, keepdims=True)


def _with_column(rows: jax.Array, i: Any, column: jax.Array) -> jax.Array:
    return column if rows.shape[1] == 1 else jnp.where(_is_column(rows, i), column, rows)


def _is_column(rows: jax.Array, i: Any) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) == i


def _over_parts(plan: _Plan, step: Callable[[Any, int, Any], Any], start: Any, join: Callable[..., Any]) -> Any:
    """`step`, given its first class, its width and what came before, over all parts but the rest.

    Each step of the loop starts anew, and is joined with what came before: one sum of many small numbers beside a
    large one would round them all away.
    """

    def steps(first: Any, width: int, so_far: Any) -> Any:
        for i in range(0, width, PART):
            so_far = step(first + i, PART, so_far)
        return so_far

    def several(i: Any, so_far: Any) -> Any:
        return joined(so_far, steps(pl.multiple_of(i * plan.step, PART), plan.step, start))

    def joined(*both: Any) -> Any:
        return tuple(map(join, *both))

    loops, left = divmod(plan.classes - plan.rest, plan.step)
    if loops < 2:
        return steps(0, plan.classes - plan.rest, start)
    found = jax.lax.fori_loop(0, loops, several, start)
    return joined(found, steps(plan.classes - plan.rest - left, left, start))


def _folded(
    plan: _Plan,
    step: Callable[[Any, int, Any], Any],
    count: int,
    start: float,
    reduce: Callable[..., Any],
    join: Callable[..., Any],
) -> tuple[jax.Array, ...]:
    """What `step` collects in arrays of a part's shape, reduced to columns."""

    def zeros(width: int) -> tuple[jax.Array, ...]:
        return (jnp.full((plan.group, width), start, jnp.float32),) * count

    found = []
    if plan.classes >= PART:
        found.append(_over_parts(plan, step, zeros(PART), join))
    if plan.rest:
        found.append(step(plan.classes - plan.rest, plan.rest, zeros(plan.rest)))
    columns = [[reduce(x, axis=1, keepdims=True) for x in some] for some in found]
    return tuple(columns[0] if len(columns) == 1 else map(join, *columns))


def _kernel(function: Function, plan: _Plan, *refs: Any) -> None:
    wide, labels, given, out_rows, out, predicted = grouped(function, refs)
    block = _Block(
        plan, wide[0], wide[1] if wide[1:] else None, labels[0] if labels else None, refs[-1] if plan.keeps else None
    )

    def collect(i: Any, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m = block.maxima(i)
        part = block.parts(i, m, again=False)

        def step(first: Any, width: int, so_far: Any) -> Any:
            return function.collect(part(first, width), *so_far)

        sums = _folded(plan, step, function.sums, 0.0, jnp.sum, jnp.add)
        first = (block.first(i, m),) if predicted else ()
        return tuple(_with_column(row, i, x) for row, x in zip(rows, (m, *sums, *first), strict=True))

    nothing = jnp.zeros((plan.group, plan.groups), jnp.float32)
    largest, *collected = repeat(plan.groups, collect, (nothing,) * (1 + function.sums + len(predicted)))
    sums, first = collected[: function.sums], collected[function.sums :]
    results, of_rows = function.finish(Rows(largest, plan.classes, tuple(ref[...] for ref in given)), *sums)
    for ref, result in zip((*out_rows, *predicted), (*results[: len(out_rows)], *first), strict=True):
        ref[...] = result
    entry = function.entry
    if entry is None:
        return

    def write(i: Any, _: Any) -> Any:
        m, *coefficients = (_column(x, i) for x in (largest, *of_rows))
        part = block.parts(i, m, again=True)
        spread = [_spread(plan, x) for x in coefficients]

        def step(first: Any, width: int, _: Any) -> Any:
            entries = entry(part(first, width), *(x[width] for x in spread))
            block.group(out[0], i, first, width)[...] = entries.astype(out[0].dtype)
            return ()

        _over_parts(plan, step, (), jnp.add)
        if plan.rest:
            step(plan.classes - plan.rest, plan.rest, ())
        return ()

    repeat(plan.groups, write, ())


def _function(name: str) -> Callable[..., Any]:
    def served(*arrays: jax.Array, axis: ClassAxis, dtype: DTypeLike = jnp.float32, stats: bool = False) -> Any:
        del axis
        function, shape = function_of(name, stats), arrays[0].shape
        batch, rows, classes = _sides(shape)
        plan = _plan_of(name, arrays, dtype)
        assert plan is not None
        blocks = pl.cdiv(rows, plan.rows)
        by_entry = pl.BlockSpec((None, plan.rows, classes), _place_of_entries)
        by_row = pl.BlockSpec((None, None, plan.group, plan.groups), _place_of_rows)
        entries = struct((batch, rows, classes), dtype, *arrays)
        numbers = struct((batch, blocks, plan.group, plan.groups), jnp.float32, *arrays)

        def laid_out(x: jax.Array, kind: str) -> jax.Array:
            if kind in "xt":
                return x.reshape(batch, rows, classes)
            # Labels are numbers, too, which have room for 2 ** 24 of them.
            x = (jnp.clip(x, -1, classes) if kind == "y" else x).astype(jnp.float32)
            x = jnp.pad(x.reshape(batch, rows), ((0, 0), (0, blocks * plan.rows - rows)))
            return x.reshape(batch, blocks, plan.groups, plan.group).swapaxes(2, 3)

        def as_given(x: jax.Array, kind: str) -> jax.Array:
            if kind == "o":
                return x.reshape(shape)
            x = x.swapaxes(2, 3).reshape(batch, -1)[:, :rows].reshape(shape[:-1])
            return jnp.where(x < classes, x, 0.0).astype(jnp.int32) if kind == "p" else x

        moved = sum(
            math.prod(s.shape) * s.dtype.itemsize for s in (*arrays, entries)[: None if function.entry else -1]
        )
        out = pl.pallas_call(
            partial(_kernel, function, plan),
            out_shape=[entries if kind == "o" else numbers for kind in function.results],
            grid=(batch, blocks),
            in_specs=[by_entry if kind in "xt" else by_row for kind in function.arguments],
            out_specs=[by_entry if kind == "o" else by_row for kind in function.results],
            scratch_shapes=[pltpu.VMEM((plan.rows, classes), jnp.float32)] * plan.keeps,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=plan.memory
            ),
            cost_estimate=pl.CostEstimate(
                flops=10 * math.prod(shape), transcendentals=math.prod(shape), bytes_accessed=moved
            ),
            name=f"jaxent_{name}",
            interpret=INTERPRET,
        )(*map(laid_out, arrays, function.arguments))
        results = tuple(map(as_given, out, function.results))
        return results[0] if len(results) == 1 else results

    return served


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


def _plan_of(name: str, arrays: Any, dtype: DTypeLike) -> _Plan | None:
    function = function_of(name, False)
    wide = [a.dtype for a, kind in zip(arrays, function.arguments, strict=True) if kind in "xt"]
    wide += [jnp.dtype(dtype)] * ("o" in function.results)
    _, rows, classes = _sides(arrays[0].shape)
    return _plan(function, rows, classes, sum(x.itemsize for x in wide))


def refusal(name: str, x: Any, *others: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **_: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if not INTERPRET and jax.default_backend() == "tpu" and jax.devices()[0].device_kind.startswith(TOO_SMALL):
        return f"the fast memory of a {jax.devices()[0].device_kind} is small"
    why_not = refusal_of_any(("float32", "bfloat16"), x, *others, axis=axis, dtype=dtype)
    if why_not is not None:
        return why_not
    return None if _plan_of(name, (x, *others), dtype) else "a row does not fit fast memory"


LEAST_CLASSES = 512
LEAST_ROWS = 2 * SUBLANES


def unasked(_: str, x: Any, *__: Any, **___: Any) -> str | None:
    """Why it is XLA that computes what it could, unless somebody asks: by the bytes that are moved."""
    batch, rows, classes = _sides(x.shape)
    # XLA lays arguments and results out so that their padding is small, and so would turn them for a kernel.
    if classes % LANES:
        return f"the classes are no multiple of {LANES}"
    if classes < LEAST_CLASSES:
        return f"there are fewer than {LEAST_CLASSES} classes"
    return f"fewer than {LEAST_ROWS} rows lie side by side" if batch > 1 and rows < LEAST_ROWS else None


softmax = _function("softmax")
log_softmax = _function("log_softmax")
softmax_derivative = _function("softmax_derivative")
log_softmax_derivative = _function("log_softmax_derivative")
log_softmax_pullback = _function("log_softmax_pullback")
label_loss = _function("label_loss")
label_loss_and_gradient = _function("label_loss_and_gradient")
expected_loss = _function("expected_loss")
expected_loss_and_gradient = _function("expected_loss_and_gradient")
