"""Kernels for CPUs in C++: rows.cc computes, in one read and one write, what xla.py says; this file hands it to XLA.

The library stands beside this file if a C++ compiler was found when the package was built (hatch_build.py).
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._class_axis import ClassAxis

LIBRARY = Path(__file__).parent / "native" / "libjaxent.so"

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the library cannot be used. It is loaded when this is first asked."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"its library is not there: {error}" if not LIBRARY.exists() else f"its library does not load: {error}"
    jax.ffi.register_ffi_target("jaxent_rows", jax.ffi.pycapsule(library.jaxent_rows), platform="cpu")
    return None


def refusal(name: str, x: Any, *arrays: Any, axis: ClassAxis, dtype: DTypeLike | None = None) -> str | None:
    """Why `name` is not computed here for such arguments."""
    del name
    dtypes = {jnp.dtype(a.dtype) for a in (x, *arrays) if jnp.issubdtype(a.dtype, jnp.floating)}
    dtypes |= set() if dtype is None else {jnp.dtype(dtype)}
    if other := dtypes - set(map(jnp.dtype, DTYPES)):
        return f"it computes no {' or '.join(sorted(map(str, other)))}"
    if not x.shape[axis.index]:
        return "there are no classes"
    return unavailable()


def _row_function(name: str, results: str) -> Callable[..., Any]:
    """A letter for each result: one of the logits' shape (o), or a number for each row (r)."""

    def function(*arrays: jax.Array, axis: ClassAxis, dtype: DTypeLike = jnp.float32) -> Any:
        shape = arrays[0].shape
        row = jax.ShapeDtypeStruct(shape[: axis.index] + shape[axis.index + 1 :], jnp.float32)
        out = tuple(row if kind == "r" else jax.ShapeDtypeStruct(shape, dtype) for kind in results)
        return tuple(jax.ffi.ffi_call("jaxent_rows", out)(*arrays, function=name, axis=np.int64(axis.index)))

    return function


softmax = _row_function("softmax", "o")
log_softmax = _row_function("log_softmax", "o")
softmax_derivative = _row_function("softmax_derivative", "o")
log_softmax_derivative = _row_function("log_softmax_derivative", "o")
log_softmax_pullback = _row_function("log_softmax_pullback", "o")
label_loss = _row_function("label_loss", "rrr")
label_loss_and_gradient = _row_function("label_loss_and_gradient", "rrro")
expected_loss = _row_function("expected_loss", "r")
expected_loss_and_gradient = _row_function("expected_loss_and_gradient", "ro")
