"""Kernels for GPUs, by Pallas and Triton: a program for each row, which goes over it in blocks of its classes.

Where classes are few, or not the last axis, gpu_few.py has the kernel. A row of one block is read once and stays in
registers. A longer one is read three times in a row by the same program, for its maximum, its sums and its entries
(rows.py), and while few of them are under way, twice from the cache.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from .._class_axis import ClassAxis
from . import gpu_few, is_old_gpu, lower_in_place
from .label_sums import ALL, Terms
from .rows import Function, Part, Rows, function_of, grouped, over_logits, per_row, repeat, struct
from .rows import refusal as refusal_of_any

INTERPRET: Any = False  # tests run the kernels on CPUs
BLOCK = 8192  # classes, at most
ENTRIES = 8  # of a block that a thread has; half of them, of two arrays in a loop, so that its registers suffice
WARP = 32
LARGEST = 2**31 - 1  # entries that indices of 32 bits count
LEAST_CLASSES = 512
LEAST_LOGITS = 2**18  # of fewer classes


def _kernel(function: Function, classes: int, block: int, *refs: Any) -> None:
    row, entry = pl.program_id(0), function.entry
    wide, labels, given, out_rows, out, predicted = grouped(function, refs)
    blocks = pl.cdiv(classes, block)
    position = jax.lax.broadcasted_iota(jnp.int32, (block,), 0)
    y = labels[0][row] if labels else None

    def place(i: Any) -> Any:
        return row, pl.ds(jnp.asarray(i, jnp.int32) * block, block)

    def load(i: Any) -> tuple[Any, list[jax.Array]]:
        """Which classes of a block there are, and what they have."""
        inside = position < classes - i * block
        return inside, [plgpu.load(ref.at[place(i)], mask=inside, other=0.0).astype(jnp.float32) for ref in wide]

    first = load(0) if blocks == 1 else None

    def loaded(i: Any) -> tuple[Any, list[jax.Array]]:
        return first or load(i)

    def part(i: Any, m: jax.Array) -> tuple[Any, Part]:
        inside, (x, *t) = loaded(i)
        label = None if y is None else position == y - i * block
        return inside, Part(x, m, jnp.exp(x - m), t[0] if t else None, label)

    def maximum(i: Any, so_far: jax.Array) -> jax.Array:
        inside, (x, *_) = loaded(i)
        return jnp.maximum(so_far, jnp.where(inside, x, -jnp.inf))

    def collect(i: Any, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inside, of_part = part(i, m)
        collected = function.collect(of_part, *so_far[: function.sums])
        if predicted:
            here = jnp.where(of_part.largest, position + i * block, classes)
            collected = *collected, jnp.minimum(here, so_far[-1])
        return tuple(jnp.where(inside, *both) for both in zip(collected, so_far, strict=True))

    m = jnp.max(repeat(blocks, maximum, jnp.full((block,), -jnp.inf, jnp.float32)))
    nothing = (jnp.zeros((block,), jnp.float32),) * function.sums
    nowhere = (jnp.full((block,), classes, jnp.int32),) * len(predicted)
    collected = repeat(blocks, collect, (*nothing, *nowhere))
    known = Rows(m, classes, per_row(function, given, lambda ref: ref[row], lambda ref: ref[0]))
    results, coefficients = function.finish(known, *map(jnp.sum, collected[: function.sums]))
    for ref, result in zip(out_rows, results, strict=False):
        ref[row] = result
    for ref in predicted:
        ref[row] = jnp.min(collected[-1])
    if entry is None:
        return

    def write(i: Any, _: Any) -> None:
        inside, of_part = part(i, m)
        entries = entry(of_part, *coefficients).astype(out[0].dtype)
        plgpu.store(out[0].at[place(i)], entries, mask=inside)

    repeat(blocks, write, None)


def _call(
    name: str, function: Function, arrays: tuple[jax.Array, ...], dtype: DTypeLike, in_place: bool, interpret: Any
) -> tuple[jax.Array, ...]:
    """The results of a row function, whose classes are the last axis."""
    shape = arrays[0].shape
    rows, classes = math.prod(shape[:-1]), shape[-1]
    of_thread = ENTRIES if classes <= BLOCK or "t" not in function.arguments else ENTRIES // 2
    block = min(BLOCK * of_thread // ENTRIES, pl.next_power_of_2(classes))
    shapes = {"o": ((rows, classes), dtype), "s": ((rows,), jnp.float32), "p": ((rows,), jnp.int32)}

    def laid_out(x: jax.Array, kind: str) -> jax.Array:
        return x.reshape(1 if kind == "f" else (rows, classes) if kind in "xt" else rows)

    found = pl.pallas_call(
        partial(_kernel, function, classes, block),
        out_shape=[struct(*shapes[kind], *arrays) for kind in function.results],
        grid=(rows,),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // (WARP * of_thread)), num_stages=1),
        input_output_aliases=over_logits(function, in_place),
        name=f"jaxent_{name}",
        interpret=interpret,
    )(*map(laid_out, arrays, function.arguments))
    return tuple(
        x.reshape(shape if kind == "o" else shape[:-1]) for x, kind in zip(found, function.results, strict=True)
    )


def _function(name: str) -> Callable[..., Any]:
    def served(
        *arrays: jax.Array,
        axis: ClassAxis,
        dtype: DTypeLike = jnp.float32,
        stats: bool = False,
        terms: Terms = ALL,
        in_place: bool = False,
    ) -> Any:
        function, classes = function_of(name, stats, terms).of(*arrays), axis.size(arrays[0])

        def narrowed(x: jax.Array, kind: str) -> jax.Array:
            return jnp.clip(x, -1, classes).astype(jnp.int32) if kind == "y" and x.dtype != jnp.int32 else x

        given = tuple(map(narrowed, arrays, function.arguments))
        with jax.enable_x64(False):  # indices of 32 bits are enough, see LARGEST
            if _are_few(arrays[0].shape, axis.index):
                results = gpu_few.call(name, function, given, axis.index, dtype, in_place, INTERPRET)
            else:
                results = _call(name, function, given, dtype, in_place, INTERPRET)
        return results[0] if len(results) == 1 else results

    return served


def _are_few(shape: tuple[int, ...], axis: int) -> bool:
    """Whether programs have several rows."""
    return axis != len(shape) - 1 or shape[axis] < LEAST_CLASSES


def unavailable() -> str | None:
    """Why nothing can be compiled for a GPU here. From JAX 0.12 on Triton asks which one it is for."""
    try:
        getattr(plgpu, "get_gpu_info", lambda: None)()
    except (RuntimeError, ValueError) as error:
        return f"Triton does not know the GPU: {error}"
    return None


def refusal(_: str, x: Any, *others: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **__: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if not INTERPRET and is_old_gpu():
        return "Triton wants a GPU of compute capability 8.0 or more"
    if not INTERPRET and (why_not := unavailable()):
        return why_not
    if math.prod(x.shape) > LARGEST:
        return f"there are more than {LARGEST} logits"
    if _are_few(x.shape, axis.index) and x.shape[axis.index] > gpu_few.MOST_CLASSES:
        return f"there are more than {gpu_few.MOST_CLASSES} classes along an axis that is not the last"
    return refusal_of_any(("float32", "bfloat16", "float16"), x, *others, dtype=dtype)


def unasked(_: str, x: Any, *__: Any, axis: ClassAxis, **___: Any) -> str | None:
    """Why it is XLA that computes what it could, unless somebody asks."""
    few = _are_few(x.shape, axis.index) and math.prod(x.shape) < LEAST_LOGITS
    return f"there are fewer than {LEAST_CLASSES} classes and {LEAST_LOGITS} logits" if few else None


softmax = _function("softmax")
log_softmax = _function("log_softmax")
softmax_derivative = _function("softmax_derivative")
log_softmax_derivative = _function("log_softmax_derivative")
log_softmax_pullback = _function("log_softmax_pullback")
label_loss = _function("label_loss")
label_loss_and_gradient = _function("label_loss_and_gradient")
expected_loss = _function("expected_loss")
expected_loss_and_gradient = _function("expected_loss_and_gradient")

LOWERING = {
    "label_loss_and_gradient": partial(lower_in_place, label_loss_and_gradient),
    "expected_loss_and_gradient": partial(lower_in_place, expected_loss_and_gradient),
}
