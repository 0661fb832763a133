"""Kernels for TPUs, by Pallas: blocks of whole rows in fast memory, so that logits are read once and written once.

Where classes lie across the lanes of registers, tpu_lanes.py has the kernel, where rows do, tpu_columns.py, and for
rows that fast memory does not hold twice, tpu_long.py. XLA lays arguments and results of a program out so that their
padding is small; a kernel that wanted them otherwise would have them copied.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._class_axis import ClassAxis
from . import chip, lower_in_place, tpu_columns, tpu_lanes, tpu_long
from .label_sums import ALL, Terms
from .rows import function_of
from .rows import refusal as refusal_of_any
from .tpu_parts import LANES, SUBLANES

INTERPRET: Any = False  # tests run the kernels on CPUs
FAST_MEMORY = 56 * 2**20  # where the chip is not known: v5e and v6e have 128 MiB, a core of v5p and v7x 64
MARGIN = 8 * 2**20  # of fast memory, for others
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # have less; nobody has compiled for them
MOST_CLASSES = 2**24  # whose numbers are exact in float32
LEAST_CLASSES = 512
LEAST_LOGITS = 2**19  # of these, 8 classes suffice where rows lie across the lanes, and two before tiles of rows


def _fast_memory() -> int:
    """Bytes that a kernel may use of it."""
    known = chip.tpu()
    return FAST_MEMORY if known is None else known.fast_memory - MARGIN


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


class _Form(NamedTuple):
    """How a function is computed."""

    file: Any  # that has the kernel
    plan: Any
    shape: tuple[int, ...]  # of the logits, squeezed
    order: tuple[int, ...]  # of its axes, as they lie in memory
    axis: int  # of the classes, then

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape that the kernel sees."""
        return tuple(self.shape[axis] for axis in self.order)

    def laid_out(self, x: jax.Array, of_rows: bool) -> jax.Array:
        """As the kernel sees an array of the logits' shape, or of their rows' shape."""
        order, shape = self._of(of_rows)
        return x.reshape(shape).transpose(order)

    def back(self, x: jax.Array, of_rows: bool) -> jax.Array:
        """The other way round, still squeezed."""
        order, _ = self._of(of_rows)
        return x.transpose([order.index(axis) for axis in range(len(order))])

    def _of(self, of_rows: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        classes = self.order[self.axis]
        if not of_rows:
            return self.order, self.shape
        order = tuple(axis - (axis > classes) for axis in self.order if axis != classes)
        return order, self.shape[:classes] + self.shape[classes + 1 :]


def _form(name: str, arrays: Any, axis: int, dtype: DTypeLike, terms: Terms = ALL) -> _Form:
    function = function_of(name, False, terms)
    read = sum(a.dtype.itemsize for a, kind in zip(arrays, function.arguments, strict=True) if kind in "xt")
    written = jnp.dtype(dtype).itemsize * ("o" in function.results)
    shape, classes = _squeezed(arrays[0].shape, axis)
    sides, axes = _sides(shape), range(len(shape))
    order = (*(a for a in axes if a not in sides), *sides)

    def form(order: tuple[int, ...]) -> _Form:
        seen, at = tuple(shape[a] for a in order), order.index(classes)
        file = tpu_lanes if order[-1] == classes else tpu_columns
        plan = file.plan(function, seen, at, read + written, _fast_memory())
        if plan is None and classes in order[-2:]:
            file, plan = tpu_long, tpu_long.plan(function, seen, at, read, written, _fast_memory())
        return _Form(file, plan, shape, order, at)

    found = form(order)
    if found.plan is not None and not (classes == sides[1] and tpu_lanes.scattered(found.seen)):
        return found
    # What a product writes for a kernel lies as it is wanted; an argument is copied.
    return form((*(a for a in axes if a != classes), classes))


def _function(name: str) -> Callable[..., Any]:
    def served(
        *arrays: jax.Array,
        axis: ClassAxis,
        dtype: DTypeLike = jnp.float32,
        stats: bool = False,
        terms: Terms = ALL,
        in_place: bool = False,
    ) -> Any:
        function, shape, classes = function_of(name, stats, terms).of(*arrays), arrays[0].shape, axis.size(arrays[0])
        form = _form(name, arrays, axis.index, dtype, terms)

        def as_seen(x: jax.Array, kind: str) -> jax.Array:
            if kind == "f":
                return jnp.broadcast_to(x, (SUBLANES, LANES))  # a tile, which is made in fast memory
            narrowed = kind == "y" and x.dtype != jnp.int32
            x = jnp.clip(x, -1, classes).astype(jnp.int32) if narrowed else x
            return form.laid_out(x, of_rows=kind not in "xt")

        def as_given(x: jax.Array, kind: str) -> jax.Array:
            x = form.back(x, of_rows=kind != "o").reshape(shape if kind == "o" else axis.rows(shape))
            return jnp.where(x < classes, x, 0.0).astype(jnp.int32) if kind == "p" else x

        given = tuple(map(as_seen, arrays, function.arguments))
        with jax.enable_x64(False):  # indices of 64 bits do not compile
            found = form.file.call(name, function, form.plan, given, dtype, in_place, INTERPRET)
        results = tuple(map(as_given, found, function.results))
        return results[0] if len(results) == 1 else results

    return served


def refusal(_: str, x: Any, *others: Any, axis: ClassAxis, dtype: DTypeLike = jnp.float32, **__: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if not INTERPRET and jax.default_backend() == "tpu" and jax.devices()[0].device_kind.startswith(TOO_SMALL):
        return f"the fast memory of a {jax.devices()[0].device_kind} is small"
    if x.shape[axis.index] > MOST_CLASSES:
        return f"there are more than {MOST_CLASSES} classes"
    return refusal_of_any(("float32", "bfloat16"), x, *others, dtype=dtype)


def unasked(
    name: str,
    x: Any,
    *others: Any,
    axis: ClassAxis,
    dtype: DTypeLike = jnp.float32,
    terms: Terms = ALL,
    **_: Any,
) -> str | None:
    """Why it is XLA that computes what it could, unless somebody asks: by the bytes that are moved."""
    form = _form(name, (x, *others), axis.index, dtype, terms)
    across_lanes = form.axis == len(form.order) - 1
    if across_lanes and form.order[-1] != _sides(form.shape)[1]:
        return "rows lie across sublanes and lanes, and do not fit fast memory so"
    is_large = not across_lanes and math.prod(x.shape) >= LEAST_LOGITS
    # Across the lanes or the sublanes, or before both.
    least = (SUBLANES if form.axis >= len(form.order) - 2 else 2) if is_large else LEAST_CLASSES
    if form.seen[form.axis] < least:
        return f"there are fewer than {least} classes"
    if across_lanes:
        return tpu_lanes.scattered(form.seen)
    return tpu_columns.scattered(form.plan, form.seen) if form.file is tpu_columns else None


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
