"""Kernels for TPUs, by Pallas: blocks of whole rows in fast memory, so that logits are read once and written once.

A block is worked on in groups of rows that fill the registers' sublanes. What there is of each row, its label or its
sum, lies across the lanes of a (rows of a group, groups) array: a column a group, so that the arithmetic of rows is
done for all of them at once.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from .._class_axis import ClassAxis
from .rows import FUNCTIONS, Function, Part, Rows

INTERPRET: Any = False  # tests run the kernels on CPUs
LANES = 128
PART = int(os.environ.get("PART", "256"))
FAST_MEMORY = 48 * 2**20  # of 64 MiB and more on v5e, v5p, v6e and v7x
BLOCK = 2**20  # bytes of a block that hide the start of its copy
REGISTERS = int(os.environ.get("REGS", "128"))  # registers of a part of a group, of 64 in all


class _Plan(NamedTuple):
    """How many rows a group has and how many classes a part, and how many groups a block has."""

    classes: int
    group: int
    width: int
    groups: int

    @property
    def rows(self) -> int:
        return self.group * self.groups


def _plan(rows: int, classes: int, bytes_of_class: int) -> _Plan:
    tiles = pl.cdiv(classes, LANES)
    group = int(os.environ.get("GROUP", "16"))
    while group < 128 and 2 * group // 8 * tiles <= REGISTERS and 2 * group <= rows:
        group *= 2
    width = max(PART, min(classes // PART * PART, REGISTERS * 8 // group * LANES))
    row = tiles * LANES * bytes_of_class
    groups = max(1, min(LANES, BLOCK // (group * row), pl.cdiv(rows, group)))
    return _Plan(classes, group, width, groups)


def _lane(value: Any, groups: int, group: Any) -> jax.Array:
    """The column of a group."""
    if groups == 1:
        return value
    here = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1) == group
    return jnp.sum(jnp.where(here, value, 0.0), 1, keepdims=True)


def _with_lane(value: Any, group: Any, column: Any) -> jax.Array:
    if value.shape[1] == 1:
        return column
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, 1) == group, column, value)


def _spread(x, plan):
    widths = {PART, plan.classes % PART} - {0}
    if os.environ.get("NOSPREAD"):
        return {w: x for w in widths}
    return {w: jnp.broadcast_to(x, (plan.group, w)) for w in widths}


def _for_each_part(plan: _Plan, step: Callable[[Any, int, Any], Any], start: Any) -> Any:
    """`step` of the first class, the width and what came before, for all classes but those that fill no part."""

    def several(first: Any, n: int, so_far: Any) -> Any:
        for j in range(n):
            so_far = step(first + j * PART, PART, so_far)
        return so_far

    whole, rest = divmod(plan.classes // PART * PART, plan.width)
    if whole:
        start = jax.lax.fori_loop(
            0, whole, lambda i, so_far: several(pl.multiple_of(i * plan.width, plan.width), plan.width // PART, so_far), start
        )
    return several(whole * plan.width, rest // PART, start)


def _fold(reduce: Callable[..., Any], neutral: float, count: int, plan: _Plan, step: Callable[[Any, int, Any], Any]) -> tuple[Any, ...]:
    """`reduce` over the classes of what `step` collects."""
    rest, results = plan.classes % PART, []
    if plan.classes >= PART:
        start = (jnp.full((plan.group, PART), neutral, jnp.float32),) * count
        results.append([reduce(x, axis=1, keepdims=True) for x in _for_each_part(plan, step, start)])
    if rest:
        start = (jnp.full((plan.group, rest), neutral, jnp.float32),) * count
        results.append([reduce(x, axis=1, keepdims=True) for x in step(plan.classes - rest, rest, start)])
    join = {jnp.sum: jnp.add, jnp.max: jnp.maximum}[reduce]
    return tuple(results[0] if len(results) == 1 else map(join, *results))


def _kernel(function: Function, plan: _Plan, *refs: Any) -> None:
    *refs, exponentials = refs
    keep = function.entry is not None
    n = len(function.arguments)
    wide = [ref for ref, kind in zip(refs[:n], function.arguments, strict=True) if kind == "o"]
    given = tuple(ref[0] for ref, kind in zip(refs[:n], function.arguments, strict=True) if kind != "o")
    outs = [ref for ref, kind in zip(refs[n:], function.results, strict=True) if kind == "r"]
    entries = [ref for ref, kind in zip(refs[n:], function.results, strict=True) if kind == "o"]
    labelled = "y" in function.arguments
    groups = plan.groups
    shape = (plan.group, groups)

    def rows_of(group: Any) -> Any:
        return pl.ds(pl.multiple_of(group * plan.group, plan.group), plan.group)

    def maker(group: Any, m: Any) -> Callable[[Any, int], Part]:
        widths = {PART, plan.classes % PART}
        m_of = _spread(m, plan)
        offset = {}
        if labelled:
            y = _lane(given[0], groups, group).astype(jnp.int32)
            offset = {w: y - jax.lax.broadcasted_iota(jnp.int32, (plan.group, w), 1) for w in widths if w}

        def part(first: Any, width: int, again: bool = False) -> Part:
            x, *t = [ref[rows_of(group), pl.ds(first, width)].astype(jnp.float32) for ref in wide]
            m = m_of[width]
            if again:
                e = exponentials[:, pl.ds(first, width)]
            else:
                e = jnp.exp(x - m)
                if keep:
                    exponentials[:, pl.ds(first, width)] = e
            return Part(x, m, e, t[0] if t else None, offset[width] == first if labelled else None)

        return part

    def gather(group: Any, rows: tuple[Any, ...]) -> tuple[Any, ...]:
        def maximum(first: Any, width: int, so_far: tuple[Any, ...]) -> tuple[Any, ...]:
            return (jnp.maximum(so_far[0], wide[0][rows_of(group), pl.ds(first, width)].astype(jnp.float32)),)

        (m,) = _fold(jnp.max, -jnp.inf, 1, plan, maximum)
        part_of = maker(group, m)

        def add(first: Any, width: int, so_far: tuple[Any, ...]) -> tuple[Any, ...]:
            part = part_of(first, width)
            sums = tuple(map(jnp.add, so_far, function.sums(part)))
            return (*sums, jnp.where(part.label, part.x, so_far[-1])) if labelled else sums

        sums = _fold(jnp.sum, 0.0, len(rows) - 1, plan, add)
        return tuple(_with_lane(row, group, x) for row, x in zip(rows, (m, *sums), strict=True))

    zeros = jnp.zeros(shape, jnp.float32)
    dummy = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    count = 1 + labelled + len(jax.eval_shape(lambda x: function.sums(Part(x, x, x, x, x > 0)), dummy))
    m, *sums = _each(groups, gather, (zeros,) * count)
    results, coefficients = function.finish(Rows(m, plan.classes, given), *sums)
    for ref, result in zip(outs, results, strict=True):
        ref[0] = result
    if function.entry is None:
        return

    def write(group: Any, _: Any) -> Any:
        mine = [_lane(x, groups, group) for x in (m, *coefficients)]
        part_of = maker(group, mine[0])
        spread = [_spread(x, plan) for x in mine[1:]]

        def of_part(first: Any, width: int, _: Any) -> Any:
            out = function.entry(part_of(first, width, True), *(x[width] for x in spread))
            entries[0][rows_of(group), pl.ds(first, width)] = out.astype(entries[0].dtype)
            return ()

        _for_each_part(plan, of_part, ())
        if plan.classes % PART:
            of_part(plan.classes // PART * PART, plan.classes % PART, ())
        return ()

    _each(groups, write, ())


def _each(groups: int, f: Callable[[Any, Any], Any], start: Any) -> Any:
    return f(0, start) if groups == 1 else jax.lax.fori_loop(0, groups, f, start)


def _function(name: str) -> Callable[..., Any]:
    function = FUNCTIONS[name]

    def served(*arrays: jax.Array, axis: ClassAxis, dtype: DTypeLike = jnp.float32) -> Any:
        shape = arrays[0].shape
        classes, rows = shape[-1], math.prod(shape[:-1])
        size = sum(a.dtype.itemsize for a, kind in zip(arrays, function.arguments, strict=True) if kind == "o")
        size += jnp.dtype(dtype).itemsize * ("o" in function.results)
        plan = _plan(rows, classes, size)
        blocks = pl.cdiv(rows, plan.rows)
        in_rows = pl.BlockSpec((1, plan.group, plan.groups), lambda i: (i, 0, 0))
        in_entries = pl.BlockSpec((plan.rows, classes), lambda i: (i, 0))
        kinds = {"o": in_entries, "y": in_rows, "r": in_rows}
        out_shapes = [
            jax.ShapeDtypeStruct((rows, classes), dtype)
            if kind == "o"
            else jax.ShapeDtypeStruct((blocks, plan.group, plan.groups), jnp.float32)
            for kind in function.results
        ]

        def laid_out(x: jax.Array, kind: str) -> jax.Array:
            if kind == "o":
                return x.reshape(rows, classes)
            x = jnp.clip(x, -1, classes) if kind == "y" else x
            x = jnp.pad(x.astype(jnp.float32).reshape(rows), (0, blocks * plan.rows - rows))
            return x.reshape(blocks, plan.groups, plan.group).swapaxes(1, 2)

        def as_given(x: jax.Array, kind: str) -> jax.Array:
            if kind == "o":
                return x.reshape(shape)
            return x.swapaxes(1, 2).reshape(-1)[:rows].reshape(shape[:-1])

        memory = 2 * plan.rows * pl.cdiv(classes, LANES) * LANES * size + 4 * 2**20
        out = pl.pallas_call(
            partial(_kernel, function, plan),
            out_shape=out_shapes,
            grid=(blocks,),
            in_specs=[kinds[kind] for kind in function.arguments],
            out_specs=[kinds[kind] for kind in function.results],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=max(memory, 16 * 2**20)
            ),
            scratch_shapes=[pltpu.VMEM((plan.group, classes), jnp.float32)],
            name=f"jaxent_{name}",
            interpret=INTERPRET,
        )(*map(laid_out, arrays, function.arguments))
        results = tuple(map(as_given, out, function.results))
        return results[0] if len(results) == 1 else results

    return served


def refusal(name: str, *arrays: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **__: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if name not in FUNCTIONS:
        return f"it has no kernel for {name}"
    if jnp.float64 in (jnp.dtype(dtype), *(a.dtype for a in arrays)):
        return "it computes no float64"
    if axis.index != arrays[0].ndim - 1:
        return "the class axis is not the last"
    return None


softmax = _function("softmax")
log_softmax = _function("log_softmax")
softmax_derivative = _function("softmax_derivative")
log_softmax_derivative = _function("log_softmax_derivative")
log_softmax_pullback = _function("log_softmax_pullback")
label_loss = _function("label_loss")
label_loss_and_gradient = _function("label_loss_and_gradient")
expected_loss = _function("expected_loss")
expected_loss_and_gradient = _function("expected_loss_and_gradient")
