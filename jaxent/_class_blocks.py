"""Functions of whole rows, worked out for some of their classes at a time.

What such a function finds out about rows are maxima, sums, and which class is a certain one. Noted down once with all
classes at hand, they are all that it needs to know of the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._class_axis import ClassAxis

RowFunction = Callable[..., Array]  # of what reduces as a ClassAxis does, and arrays with that axis; in plain JAX


def row_values(f: RowFunction, axis: ClassAxis, *arrays: Any) -> tuple[Array, ...]:
    """All that `f(axis, *arrays)` finds out about rows."""
    noting = _Noting(axis, [])
    f(noting, *arrays)
    return tuple(noting.found)


def of_classes(
    f: RowFunction, axis: ClassAxis, known: Sequence[Array], begin: Any, classes: int, *arrays: Any
) -> Array:
    """`f(axis, *arrays)` at some of this device's classes, those from `begin` on, which are all that arrays have."""
    values = iter(known)
    out = f(_Knowing(axis, values, begin, classes), *arrays)
    assert next(values, None) is None
    return out


@dataclass(frozen=True)
class _Noting:
    axis: ClassAxis
    found: list[Array]

    def max(self, x: Array) -> Array:
        return self._noted(self.axis.max(x))

    def sum(self, x: Array) -> Array:
        return self._noted(self.axis.sum(x))

    def recognised(self, mask: Array) -> Array:
        self._noted(self.axis.first(mask))
        return mask

    def _noted(self, row: Array) -> Array:
        self.found.append(row)
        return row


@dataclass(frozen=True)
class _Knowing:
    axis: ClassAxis
    known: Iterator[Array]
    begin: Any
    classes: int  # of this device

    def max(self, x: Array) -> Array:
        del x
        return next(self.known)

    sum = max

    def recognised(self, mask: Array) -> Array:
        names, index = self.axis.names, self.axis.index
        before = jax.lax.axis_index(names) * self.classes if names else 0
        return before + self.begin + jax.lax.broadcasted_iota(jnp.int32, mask.shape, index) == next(self.known)
