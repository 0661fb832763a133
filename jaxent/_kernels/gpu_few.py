"""Kernels for GPUs where classes are few, or not the last axis: a program for several rows, which stay in registers.

The logits are seen as (outer, classes, inner), where rows lie side by side along `inner`, or without it, where a row
lies in one piece.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from .rows import Function, Part, Rows, grouped, over_logits, per_row, struct

MOST_CLASSES = 512
ENTRIES = 8  # of a thread
THREADS = 128
WARP = 32


def _kernel(function: Function, classes: int, rows: int, block: tuple[int, int], axis: int, *refs: Any) -> None:
    (logits, *other), labels, given, out_rows, out, predicted = grouped(function, refs)
    outer = [pl.program_id(0)] * (1 - axis)
    first = pl.program_id(1 - axis) * block[1 - axis]
    position, row = (jax.lax.broadcasted_iota(jnp.int32, block, a) for a in (axis, 1 - axis))
    is_class, of_array = position < classes, first + row < rows
    inside, side = is_class & of_array, pl.ds(first, block[1 - axis])
    every = pl.ds(jnp.asarray(0, jnp.int32), block[axis])  # which an interpreter takes for 64 bits else
    entries = (*outer, every, side) if axis == 0 else (side, every)
    is_row = first + jax.lax.broadcasted_iota(jnp.int32, block[1 - axis : 2 - axis], 0) < rows

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref.at[entries], mask=inside, other=0.0).astype(jnp.float32)

    def of_rows(ref: Any) -> jax.Array:
        return jnp.expand_dims(plgpu.load(ref.at[*outer, side], mask=is_row, other=0), axis)

    def store(ref: Any, numbers: jax.Array) -> None:
        plgpu.store(ref.at[*outer, side], numbers.reshape(is_row.shape), mask=is_row)

    x, t = load(logits), load(other[0]) if other else None
    m = jnp.max(jnp.where(is_class, x, -jnp.inf), axis, keepdims=True)
    part = Part(x, m, jnp.exp(x - m), t, position == of_rows(labels[0]) if labels else None)
    collected = function.collect(part, *(jnp.zeros(block, jnp.float32),) * function.sums)
    sums = (jnp.sum(jnp.where(is_class, s, 0.0), axis, keepdims=True) for s in collected)
    known = Rows(m, classes, per_row(function, given, of_rows, lambda ref: jnp.full(m.shape, ref[0])))
    results, coefficients = function.finish(known, *sums)
    for ref, result in zip(out_rows, results, strict=False):
        store(ref, result)
    for ref in predicted:
        store(ref, jnp.min(jnp.where(is_class & part.largest, position, classes), axis, keepdims=True))
    if function.entry is not None:
        result = function.entry(part, *coefficients).astype(out[0].dtype)
        plgpu.store(out[0].at[entries], result, mask=inside)


def call(
    name: str,
    function: Function,
    arrays: tuple[jax.Array, ...],
    axis: int,
    dtype: DTypeLike,
    in_place: bool,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The results of a row function."""
    shape = arrays[0].shape
    outer, classes, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    width = pl.next_power_of_2(classes)
    several = max(1, ENTRIES * THREADS // width)
    sides, of_rows = ((outer, classes), (outer,)) if inner == 1 else ((outer, classes, inner), (outer, inner))
    block, across = ((several, width), 1) if inner == 1 else ((width, several), 0)
    rows = of_rows[-1]

    def laid_out(x: jax.Array, kind: str) -> jax.Array:
        return x.reshape(1 if kind == "f" else sides if kind in "xt" else of_rows)

    shapes = {"o": (sides, dtype), "s": (of_rows, jnp.float32), "p": (of_rows, jnp.int32)}
    found = pl.pallas_call(
        partial(_kernel, function, classes, rows, block, across),
        out_shape=[struct(*shapes[kind], *arrays) for kind in function.results],
        grid=(*of_rows[:-1], pl.cdiv(rows, several)),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, several * width // (WARP * ENTRIES)), num_stages=1),
        input_output_aliases=over_logits(function, in_place),
        name=f"jaxent_{name}",
        interpret=interpret,
    )(*map(laid_out, arrays, function.arguments))
    less = shape[:axis] + shape[axis + 1 :]
    return tuple(x.reshape(shape if kind == "o" else less) for x, kind in zip(found, function.results, strict=True))
