"""Kernels for TPUs, by Pallas: blocks of whole rows in fast memory, so that logits are read once and written once.

Where classes lie across the lanes of registers, tpu_lanes.py has the kernel, where rows do, tpu_columns.py. XLA lays
arguments and results of a program out so that their padding is small; a kernel that wanted them otherwise would have
them copied.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from .._class_axis import ClassAxis
from . import tpu_columns, tpu_lanes
from .rows import function_of
from .rows import refusal as refusal_of_any
from .tpu_parts import LANES, SUBLANES

INTERPRET: Any = False  # tests run the kernels on CPUs
FAST_MEMORY = 56 * 2**20  # where the chip is not known: v5e and v6e have 128 MiB, a core of v5p and v7x 64
MARGIN = 8 * 2**20  # of fast memory, for others
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # have less; nobody has compiled for them
LEAST_CLASSES = 512
LEAST_LOGITS = 2**19  # of these, 8 classes suffice where rows lie across the lanes, and two before tiles of rows


def _fast_memory() -> int:
    """Bytes that a kernel may use of it."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes - MARGIN
    except (AttributeError, ValueError):  # no TPU here, only its compiler
        return FAST_MEMORY


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The axes of sublanes and lanes as XLA has them: padded least, and late ones first."""

    def padded(sides: tuple[int, int]) -> int:
        second, last = (shape[axis] for axis in sides)
        rest = math.prod(n for axis, n in enumerate(shape) if axis not in sides)
        across = next((n for n in (1, 2, 4) if second <= n), -(-second // SUBLANES) * SUBLANES)
        return rest * across * -(-last // LANES) * LANES

    axes = range(len(shape))[::-1]
    return min(((i, j) for j in axes for i in axes if i != j), key=padded)


def _squeezed(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int]:
    """Without axes of size 1 beside that of the classes, but two axes at least."""
    kept = [i for i, n in enumerate(shape) if n > 1 or i == axis]
    kept_shape = tuple(shape[i] for i in kept)
    return ((1, *kept_shape), 1) if len(kept) == 1 else (kept_shape, kept.index(axis))


def _form(name: str, arrays: Any, axis: int, dtype: DTypeLike) -> tuple[Any, Any, tuple[int, ...], int]:
    """The file that has the kernel, its plan, and the shape and the class axis that it sees."""
    function = function_of(name, False)
    widths = [a.dtype for a, kind in zip(arrays, function.arguments, strict=True) if kind in "xt"]
    widths += [jnp.dtype(dtype)] * ("o" in function.results)
    entry, most = sum(x.itemsize for x in widths), _fast_memory()
    shape, index = _squeezed(arrays[0].shape, axis)
    sides = _sides(shape)
    if index != sides[1]:
        plan = tpu_columns.plan(function, shape, index, sides, entry, most)
        if plan is not None:
            return tpu_columns, plan, shape, index
    # The shape that was given: for this kernel it matters how many rows lie side by side.
    shape = arrays[0].shape
    last = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    return tpu_lanes, tpu_lanes.plan(function, last, entry, most), last, len(last) - 1


def _function(name: str) -> Callable[..., Any]:
    def served(*arrays: jax.Array, axis: ClassAxis, dtype: DTypeLike = jnp.float32, stats: bool = False) -> Any:
        function, shape = function_of(name, stats), arrays[0].shape
        form, plan, seen, index = _form(name, arrays, axis.index, dtype)
        rows, classes = seen[:index] + seen[index + 1 :], shape[axis.index]

        def as_seen(x: jax.Array, kind: str) -> jax.Array:
            if kind in "xt":
                return (jnp.moveaxis(x, axis.index, -1) if form is tpu_lanes else x).reshape(seen)
            narrowed = kind == "y" and x.dtype != jnp.int32
            return (jnp.clip(x, -1, classes).astype(jnp.int32) if narrowed else x).reshape(rows)

        def as_given(x: jax.Array, kind: str) -> jax.Array:
            if kind == "o":
                return jnp.moveaxis(x, -1, axis.index) if form is tpu_lanes else x.reshape(shape)
            x = x.reshape(axis.rows(shape))
            return jnp.where(x < classes, x, 0.0).astype(jnp.int32) if kind == "p" else x

        given = tuple(map(as_seen, arrays, function.arguments))
        with jax.enable_x64(False):  # indices of 64 bits do not compile
            found = form.call(name, function, plan, given, dtype, INTERPRET)
        results = tuple(map(as_given, found, function.results))
        return results[0] if len(results) == 1 else results

    return served


def refusal(name: str, x: Any, *others: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **_: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if not INTERPRET and jax.default_backend() == "tpu" and jax.devices()[0].device_kind.startswith(TOO_SMALL):
        return f"the fast memory of a {jax.devices()[0].device_kind} is small"
    why_not = refusal_of_any(("float32", "bfloat16"), x, *others, dtype=dtype)
    if why_not is not None:
        return why_not
    return None if _form(name, (x, *others), axis.index, dtype)[1] else "a row does not fit fast memory"


def unasked(name: str, x: Any, *others: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **_: Any) -> str | None:
    """Why it is XLA that computes what it could, unless somebody asks: by the bytes that are moved."""
    shape, index = _squeezed(x.shape, axis.index)
    sides, classes = _sides(shape), shape[index]
    form, plan, seen, _last = _form(name, (x, *others), axis.index, dtype)
    if form is tpu_lanes and index != sides[1]:
        return "rows lie across the lanes, and do not fit fast memory so"
    is_large = form is tpu_columns and math.prod(shape) >= LEAST_LOGITS
    least = (SUBLANES if index in sides else 2) if is_large else LEAST_CLASSES
    if classes < least:
        return f"there are fewer than {least} classes"
    return tpu_lanes.scattered(seen) if form is tpu_lanes else tpu_columns.scattered(plan, seen)


softmax = _function("softmax")
log_softmax = _function("log_softmax")
softmax_derivative = _function("softmax_derivative")
log_softmax_derivative = _function("log_softmax_derivative")
log_softmax_pullback = _function("log_softmax_pullback")
label_loss = _function("label_loss")
label_loss_and_gradient = _function("label_loss_and_gradient")
expected_loss = _function("expected_loss")
expected_loss_and_gradient = _function("expected_loss_and_gradient")
