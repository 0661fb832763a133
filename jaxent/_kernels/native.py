"""Kernels for CPUs in C++: rows.cc computes, in one read and one write, what xla.py says; this file hands it to XLA.

The library stands beside this file if a C++ compiler was found when the package was built (hatch_build.py).
"""

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.typing import DTypeLike

from .._class_axis import ClassAxis
from . import lower_in_place, lower_kernel
from .label_sums import ALL, OWN, Terms, results_of

TARGET = "jaxent_rows"
LIBRARY = Path(__file__).parent / "native" / "libjaxent.so"


@cache
def unavailable() -> str | None:
    """Why the library cannot be used. It is loaded when this is first asked."""
    if not LIBRARY.exists():
        return "no C++ compiler was found, or none that works, when jaxent was installed"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.jaxent_sources.restype = ctypes.c_char_p
        compiled_from = library.jaxent_sources().decode()
        sources = sorted([*LIBRARY.parent.glob("*.cc"), *LIBRARY.parent.glob("*.h")])  # in an editable installation
        if sources and hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest() != compiled_from:
            return "its library was compiled from other sources than are there: install jaxent again"
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jaxent_rows), platform="cpu")
    except Exception as error:  # whatever an alien library may do, XLA computes
        return f"its library does not load: {error}"
    return None


def level() -> str:
    """For which instruction set the library computes."""
    library = ctypes.CDLL(str(LIBRARY))
    library.jaxent_level.restype = ctypes.c_char_p
    return library.jaxent_level().decode()


def refusal(_: str, *arrays: Any, dtype: DTypeLike = jnp.float32, **__: Any) -> str | None:
    """Why that function is not computed here for such arguments."""
    if jnp.float64 in (jnp.dtype(dtype), *(a.dtype for a in arrays)):
        return "it computes no float64"
    return unavailable()


def _row_function(name: str, results: str, of_stats: str = "") -> Callable[..., Any]:
    """A letter for each result: one of the logits' shape (o), or of rows a number (r), a class (p) or losses (l)."""

    def function(
        *arrays: jax.Array,
        axis: ClassAxis,
        dtype: DTypeLike = jnp.float32,
        stats: bool = False,
        terms: Terms = ALL,
        in_place: bool = False,
    ) -> Any:
        shape = arrays[0].shape
        row, label = (jax.ShapeDtypeStruct(axis.rows(shape), kind) for kind in (jnp.float32, jnp.int32))
        kinds = {"r": row, "p": label, "o": jax.ShapeDtypeStruct(shape, dtype)}
        letters = results.replace("l", "r" * sum(results_of(terms, stats))) + (of_stats if stats else "")
        out = tuple(kinds[kind] for kind in letters)
        arrays = *arrays[:2], *(jnp.broadcast_to(factor, row.shape) for factor in arrays[2:])
        return _call(name, out, arrays, axis, terms, {0: letters.index("o")} if in_place else None)

    return function


def _call(
    name: str,
    out: tuple[jax.ShapeDtypeStruct, ...],
    arrays: tuple[jax.Array, ...],
    axis: ClassAxis,
    terms: Terms = ALL,
    aliases: dict[int, int] | None = None,  # which argument a result is written over
) -> Any:
    known = tuple(jax.ShapeDtypeStruct(o.shape, _known(o.dtype)) for o in out)
    arrays = tuple(a.astype(_known(a.dtype)) for a in arrays)
    call = jax.ffi.ffi_call(TARGET, known, input_output_aliases=aliases or {})
    results = call(*arrays, function=name, axis=np.int64(axis.index), terms=np.int64(_mask(terms)))
    return tuple(r.astype(o.dtype) for r, o in zip(results, out, strict=True))


def _mask(terms: Terms) -> int:
    return sum(there_is << i for i, there_is in enumerate(terms))


def _known(dtype: DTypeLike) -> jnp.dtype:
    """Narrower floats come and go as float32."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype).itemsize < 2 else dtype)


softmax = _row_function("softmax", "o")
log_softmax = _row_function("log_softmax", "o")
softmax_derivative = _row_function("softmax_derivative", "o")
log_softmax_derivative = _row_function("log_softmax_derivative", "o")
label_loss = _row_function("label_loss", "l", "p")
label_loss_and_gradient = _row_function("label_loss_and_gradient", "lo", "p")
log_softmax_pullback = _row_function("log_softmax_pullback", "o")
expected_loss = _row_function("expected_loss", "r", "rp")
expected_loss_and_gradient = _row_function("expected_loss_and_gradient", "ro", "rp")


# PyTorch's nll_loss of log_softmax takes two passes that one can do: whoever is given the log-probabilities of labels
# looks where they come from, and if they are ours, asks for the loss of the labels instead. The same with gradients.


def pick(log_p: jax.Array, y: jax.Array, *, axis: ClassAxis) -> Any:
    """See xla.py."""
    classes = log_p.shape[axis.index]
    entry = jnp.take_along_axis(log_p, jnp.expand_dims(jnp.clip(y, 0, classes - 1), axis.index), axis.index)
    return jnp.where(y < 0, 0.0, jnp.where(y < classes, -axis.squeeze(entry).astype(jnp.float32), jnp.nan))


def place(g: jax.Array, y: jax.Array, *, axis: ClassAxis, classes: int, dtype: DTypeLike) -> Any:
    """See xla.py."""
    shape = (*y.shape[: axis.index], classes, *y.shape[axis.index :])
    return _call("place", (jax.ShapeDtypeStruct(shape, dtype),), (g, y), axis)


def _lower_pick(context: mlir.LoweringRuleContext, log_p: Any, y: Any, *, axis: ClassAxis) -> Any:
    made_of = _made_of("log_softmax", log_p, axis)
    if made_of is None:
        return lower_kernel(pick, context, log_p, y, axis=axis)

    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        return label_loss(x, y, axis=axis, terms=OWN)[0]

    return _lower_of(context, loss, made_of[0], y)


def _lower_pullback(context: mlir.LoweringRuleContext, x: Any, g: Any, *, axis: ClassAxis, dtype: DTypeLike) -> Any:
    made_of = _made_of("place", g, axis)
    if made_of is None:
        return lower_kernel(log_softmax_pullback, context, x, g, axis=axis, dtype=dtype)

    def loss_and_gradient(x: jax.Array, g: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        return label_loss_and_gradient(x, y, g, axis=axis, dtype=dtype, terms=OWN)

    loss, gradient = _lower_of(context, loss_and_gradient, x, *made_of)
    _give_loss_of(x, made_of[1], axis, loss)
    return [gradient]


def _give_loss_of(x: Any, y: Any, axis: ClassAxis, loss: Any) -> None:
    """Whoever was given the losses of these labels by a call of their own is given those of a later call instead.

    The earlier one is then made for nobody, and the logits are read once. Not where the later call needs its results.
    """
    earlier = [use.owner for use in x.uses if _arguments("label_loss", use.owner, axis, OWN) == (x, y)]
    if len(earlier) != 1 or len(earlier[0].results) != 1:
        return
    call = loss.owner.operation
    users = _users(earlier[0], call.block)
    if users is None or call in users:
        return
    earlier[0].results[0].replace_all_uses_with(loss)
    last = call
    for user in [user for user in (o.operation for o in call.block.operations) if user in users]:
        user.move_after(last)
        last = user


def _users(operation: Any, block: Any) -> list[Any] | None:
    """What a block makes of an operation's results, in any number of steps; None if another block does, too."""
    found: list[Any] = []
    new = [operation]
    while new:
        for use in (use for result in new.pop().results for use in result.uses):
            user = use.owner.operation
            while user is not None and user.block != block:
                user = user.parent and user.parent.operation
            if user is None:
                return None
            if user not in found:
                found.append(user)
                new.append(user)
    return found


LOWERING = {
    "pick": _lower_pick,
    "log_softmax_pullback": _lower_pullback,
    "label_loss_and_gradient": partial(lower_in_place, label_loss_and_gradient),
    "expected_loss_and_gradient": partial(lower_in_place, expected_loss_and_gradient),
}


def _made_of(function: str, value: Any, axis: ClassAxis) -> tuple[Any, ...] | None:
    """The arguments of our own call of `function` along `axis` that makes `value`; None if something else makes it.

    Half precision would be rounded on the way, so it is.
    """
    if str(value.type.element_type) != "f32":
        return None
    return _arguments(function, value.owner, axis)


def _arguments(function: str, operation: Any, axis: ClassAxis, terms: Terms = ALL) -> tuple[Any, ...] | None:
    """What our own `function` along `axis` is called with, if that is the operation."""
    if getattr(operation, "name", None) != "stablehlo.custom_call":
        return None
    if operation.attributes["call_target_name"].value != TARGET:
        return None
    options = operation.attributes["mhlo.backend_config"]
    found = tuple(options[name].value for name in ("function", "axis", "terms"))
    if found != (function, axis.index, _mask(terms)):
        return None
    return tuple(operation.operands)


_DTYPES_OF_MLIR = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "i32": jnp.int32}


def _lower_of(context: mlir.LoweringRuleContext, function: Callable[..., Any], *values: Any) -> Any:
    """`function` of values that may be others than the rule was called with."""
    avals = [ShapedArray(v.type.shape, _DTYPES_OF_MLIR[str(v.type.element_type)]) for v in values]
    return lower_kernel(function, context.replace(avals_in=avals), *values)
