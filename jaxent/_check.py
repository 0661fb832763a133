"""Argument checks. They run in Python, before anything is traced, and raise one sentence."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Inexact, Integer, Shaped

from ._class_axis import ClassAxis, class_axis, merge_axes
from ._kernels import implementations

AnyArray: TypeAlias = jax.Array | np.ndarray
FloatArray: TypeAlias = Float[AnyArray, "..."]
WeightArray: TypeAlias = Float[AnyArray, "..."] | Bool[AnyArray, "..."]
LabelArray: TypeAlias = Integer[AnyArray, "..."] | Inexact[AnyArray, "..."]
Labels: TypeAlias = LabelArray | int | np.integer  # what a user may give
BoolArray: TypeAlias = Bool[AnyArray, "..."]
Scalar: TypeAlias = float | Float[AnyArray, ""]
Axis: TypeAlias = int | tuple[int, ...]
AxisName: TypeAlias = str | tuple[str, ...]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Implementation: TypeAlias = Literal["native", "pallas", "xla"]


@functools.cache  # outside of jit, `issubdtype` would be a tenth of a small call's time
def _kind(dtype: object) -> Literal["floating", "integer", "boolean", "other"] | None:
    """What an array of this dtype holds; None for a dtype that JAX does not read."""
    if not isinstance(dtype, np.dtype) or not dtype.isnative:
        return None
    if jnp.issubdtype(dtype, jnp.floating):
        return "floating"
    if jnp.issubdtype(dtype, jnp.integer):
        return "integer"
    return "boolean" if dtype == jnp.bool_ else "other"


def kind_of(name: str, x: Shaped[AnyArray, "..."]) -> Literal["floating", "integer", "boolean", "other"]:
    """What `x` holds, which must be an array that JAX reads."""
    dtype = getattr(x, "dtype", None)
    if kind := _kind(dtype):
        return kind
    if isinstance(dtype, np.dtype):  # once a shape is compiled, JAX would take the bytes for native ones
        raise TypeError(f"{name} must be of native byte order, got {dtype}; x.astype(x.dtype.newbyteorder('=')) is")
    if isinstance(x, jax.Array):  # of keys, say
        raise TypeError(f"{name} must hold numbers, got {dtype}")
    module = type(x).__module__
    got = type(x).__name__ if module == "builtins" else f"{module}.{type(x).__name__}"
    raise TypeError(f"{name} must be a jax or numpy array, got {got}; jnp.asarray makes one of tensors and lists")


def check_floating(name: str, x: Shaped[AnyArray, "..."]) -> None:
    """Require a real floating dtype."""
    if kind_of(name, x) != "floating":
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")


def check_dtype(dtype: DTypeLike | None) -> None:
    """Require `dtype` to be None or floating."""
    if dtype is None:
        return
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = dtype  # PyTorch's, for instance
    if _kind(wanted) != "floating":
        raise TypeError(f"dtype must be a floating dtype that JAX has, got {wanted}")


def _normalize_axis(name: str, shape: tuple[int, ...], axis: int) -> int:
    """`axis` counted from the front."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    if not shape:
        raise ValueError(f"{name} must have a class axis, got a scalar of shape ()")
    if not -len(shape) <= index < len(shape):
        raise ValueError(
            f"axis must lie in [{-len(shape)}, {len(shape) - 1}] for {name} of shape {shape}, got {axis}"
        )
    return index % len(shape)


def check_class_axis(
    name: str, shape: tuple[int, ...], axis: Axis, axis_name: AxisName | None
) -> tuple[ClassAxis, Callable[[Any], Any]]:
    """The class axis; and what merges several axes into it, the last, in an array that broadcasts to `shape`."""
    if not isinstance(axis, tuple):
        return class_axis(_normalize_axis(name, shape, axis), check_axis_name(axis_name)), _as_it_is
    indices = tuple(_normalize_axis(name, shape, one) for one in axis)
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"axis must be an axis or several different ones, got {axis}")
    if axis_name is not None:
        raise ValueError(f"axis_name needs a single class axis, got axis={axis}")

    def merged(x: Any) -> Any:
        return None if x is None else merge_axes(jnp.broadcast_to(x, shape), indices)

    return class_axis(len(shape) - len(indices), ()), merged


def _as_it_is(x: Any) -> Any:
    return x


def check_axis_name(axis_name: AxisName | None) -> tuple[str, ...]:
    """The mesh axes over which the class axis is sharded."""
    names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names:
        try:
            jax.lax.axis_size(name)
        except (NameError, TypeError, ValueError):
            raise ValueError(f"axis_name must name mesh axes of an enclosing jax.shard_map, got {name!r}") from None
    return names


def check_where(name: str, shape: tuple[int, ...], where: BoolArray | None) -> None:
    """Require a boolean mask that broadcasts to `shape`."""
    if where is None:
        return
    _check_boolean("where", where)
    try:
        fits = jnp.broadcast_shapes(where.shape, shape) == shape  # which may be symbolic
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"where must broadcast to the shape {shape} of {name}, got shape {where.shape}")


def _check_boolean(name: str, mask: BoolArray) -> None:
    if kind_of(name, mask) != "boolean":
        raise TypeError(f"{name} must be a boolean array, got {mask.dtype}")


def check_reduction(reduction: str) -> None:
    """Require one of PyTorch's three reductions."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def check_implementation(implementation: str | None) -> None:
    """Require the name of an implementation, or None."""
    if implementation is not None and implementation not in implementations():
        names = ", ".join(map(repr, implementations()))
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")


def check_weight(weight: FloatArray | None, classes: int) -> None:
    """Require one floating weight per class."""
    if weight is None:
        return
    check_floating("weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one entry per class, got shape {weight.shape}")


def check_sample_weight(sample_weight: WeightArray | None, rows: tuple[int, ...]) -> None:
    """Require a number or a truth value for each example, of which there are so many."""
    if sample_weight is None:
        return
    if kind_of("sample_weight", sample_weight) not in ("floating", "boolean"):
        raise TypeError(f"sample_weight must have a floating dtype or be boolean, got {sample_weight.dtype}")
    shape = sample_weight.shape
    if len(shape) != len(rows) or any(size not in (1, wanted) for size, wanted in zip(shape, rows, strict=True)):
        raise ValueError(
            f"sample_weight must have the shape {rows}, one entry per example, or 1 in place of some of these sizes, "
            f"got shape {shape}"
        )


def check_smoothing(label_smoothing: Scalar) -> None:
    """Require a number in [0, 1]; what a traced one is, nobody knows yet."""
    check_scalar("label_smoothing", label_smoothing)
    if not isinstance(label_smoothing, Tracer) and not 0.0 <= float(label_smoothing) <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_number(name: str, value: float) -> float:
    """`value` as a Python float: these numbers are compiled in."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number known at compile time, got {value!r}") from None


def check_ignore_index(ignore_index: int | None) -> int | None:
    """`ignore_index` as a Python int or None."""
    try:
        return None if ignore_index is None else operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}") from None


def check_scalar(name: str, value: Scalar) -> None:
    """Require a number, or an array that is one."""
    if isinstance(value, jax.Array | np.ndarray):
        check_floating(name, value)
        if value.shape:
            raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
        return
    try:
        float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a scalar of a floating dtype, got {value!r}") from None


def check_chunk_size(chunk_size: int | None) -> int | None:
    """`chunk_size` as a positive Python int or None."""
    try:
        size = None if chunk_size is None else operator.index(chunk_size)
    except TypeError:
        raise TypeError(f"chunk_size must be an integer or None, got {chunk_size!r}") from None
    if size is not None and size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return size


def check_product(hidden: FloatArray, kernel: FloatArray, bias: FloatArray | None, whose: str = "") -> None:
    """Require hidden states, a kernel and maybe a bias that fit each other; `whose` stands before their names."""
    check_floating(f"{whose}hidden", hidden)
    check_floating(f"{whose}kernel", kernel)
    if not hidden.ndim:
        raise ValueError(f"{whose}hidden must have a feature axis, got a scalar of shape ()")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"{whose}kernel must have shape ({hidden.shape[-1]}, classes) to fit {whose}hidden of shape "
            f"{hidden.shape}, got shape {kernel.shape}"
        )
    if bias is not None:
        check_floating(f"{whose}bias", bias)
        classes = kernel.shape[1:]
        if bias.shape != classes:
            raise ValueError(f"{whose}bias must have shape {classes}, one entry per class, got shape {bias.shape}")


def check_layer(
    hidden: FloatArray,
    kernel: FloatArray,
    bias: FloatArray | None,
    where: BoolArray | None,
    logit_scale: Scalar | None,
    softcap: float | None,
) -> None:
    """Require what makes the logits of a linear layer."""
    check_product(hidden, kernel, bias)
    if where is not None:
        _check_boolean("where", where)
        if where.shape != kernel.shape[1:]:
            raise ValueError(
                f"where must have shape {kernel.shape[1:]}, one entry per class, got shape {where.shape}"
            )
    if logit_scale is not None:
        check_scalar("logit_scale", logit_scale)
    if softcap is not None and not 0.0 < check_number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")


def check_labels(
    name: str,
    shape: tuple[int, ...],
    labels: Labels,
    axis: ClassAxis,
    ignore_index: int | None,
    movable: bool = True,
) -> LabelArray:
    """`labels` as an array, whose dtype and shape fit scores called `name` of `shape`.

    `movable` says that the caller may name another class axis.
    """
    if isinstance(labels, (int, np.integer)):  # of a single row; a truth value is refused below
        labels = np.asarray(labels)
    kind = kind_of("labels", labels)
    if kind == "floating":
        if labels.shape != shape:
            raise ValueError(
                f"labels of dtype {labels.dtype} are class probabilities and must have the shape {shape} "
                f"of {name}, got shape {labels.shape}"
            )
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(f"ignore_index must be None or negative with class probabilities, got {ignore_index}")
        return labels
    if kind != "integer":
        raise TypeError(
            f"labels must have an integer dtype (class indices) or a floating dtype (class probabilities), "
            f"got {labels.dtype}"
        )
    expected = axis.rows(shape)
    if labels.shape != expected:
        second = movable and len(shape) > 1 and labels.shape == ClassAxis(1).rows(shape)  # PyTorch's (N, C, d1, ...)
        raise ValueError(
            f"labels of dtype {labels.dtype} are class indices and must have the shape {expected}, "
            f"{name}'s {shape} without its class axis {axis.index}, got shape {labels.shape}"
            + (", which fits axis=1" if second else "")
        )
    return labels


def check_indices(
    name: str, shape: tuple[int, ...], labels: Labels, axis: ClassAxis, ignore_index: int | None
) -> Integer[AnyArray, "..."]:
    """`labels` as an array of class indices, whose shape fits scores called `name` of `shape`."""
    array = np.asarray(labels) if isinstance(labels, (int, np.integer)) else labels
    if kind_of("labels", array) != "integer":
        raise TypeError(f"labels must have an integer dtype (class indices), got {array.dtype}")
    return check_labels(name, shape, labels, axis, ignore_index, movable=False)


@functools.cache
def _unsigned(dtype: np.dtype) -> tuple[np.dtype, int]:
    """`dtype` without its sign, in which negative numbers are huge, and how many numbers are not negative."""
    return np.dtype(f"u{dtype.itemsize}"), int(np.iinfo(dtype).max) + 1


def check_range(
    labels: LabelArray, classes: int, ignore_index: int | None, sample_weight: WeightArray | None
) -> bool:
    """Require class indices, if these are such, of which there are so many; whether all were seen to be right.

    What an example without weight has for a label is nobody's business.
    """
    # Traced labels have no values yet, and a process cannot read what other hosts hold: both give NaN later.
    if _kind(labels.dtype) == "floating" or isinstance(labels, Tracer) or isinstance(sample_weight, Tracer):
        return False
    if jax.process_count() > 1:
        for x in (labels, sample_weight):
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return False
    # numpy, not jnp: under an outer trace jnp would trace even a concrete array.
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        values = values.astype(np.int64)  # JAX's int4 and uint4, which leave half of a byte unused
    dtype, numbers = _unsigned(values.dtype)
    unsigned, limit = values.view(dtype), min(classes, numbers)
    if not unsigned.size or unsigned.item(unsigned.argmax()) < limit:  # a third of the time of `max`
        return True
    wrong = unsigned >= limit
    if ignore_index is not None:
        wrong &= values != ignore_index
    if sample_weight is not None:
        wrong &= np.asarray(sample_weight) != 0
    if not np.count_nonzero(wrong):
        return sample_weight is None
    position = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = f"labels[{', '.join(map(str, position))}]" if position else "labels"
    allowed = "" if ignore_index is None else f" or equal ignore_index={ignore_index}"
    raise ValueError(f"labels must lie in [0, {classes}){allowed}, got {place} = {cast(int, values[position])}")
