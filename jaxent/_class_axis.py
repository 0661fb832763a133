"""The axis along which the classes lie: whole in one array, or in parts on several devices."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Integer, Num


@dataclass(frozen=True)
class ClassAxis:
    """Reductions over the classes. What they leave depends on no part, and keeps the axis.

    Classes come in parts in three ways. Inside `jax.shard_map` an array *is* one part, and `names` are the mesh axes
    over which the parts lie. Under explicit and automatic sharding the compiler cuts what is written here as if the
    classes were whole.
    """

    index: int  # counted from the front
    names: tuple[str, ...] = ()

    def size(self, x: Array | jax.ShapeDtypeStruct) -> int:
        """How many classes there are in all parts."""
        return x.shape[self.index] * self.parts()

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what has a number for each row."""
        return shape[: self.index] + shape[self.index + 1 :]

    def parts(self) -> int:
        """Into how many parts `names` split the classes."""
        return jax.lax.axis_size(self.names) if self.names else 1  # itself a microsecond outside of jit

    def max(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest entry of each row; -inf if there are no classes."""
        return self.largest(jnp.max(x, self.index, keepdims=True, initial=-jnp.inf))

    def largest(self, of_part: Float[Array, "..."]) -> Float[Array, "..."]:
        """The largest of what each part has found by itself."""
        return jax.lax.pmax(of_part, self.names) if self.names else of_part

    def sum(self, x: Num[Array, "..."] | Bool[Array, "..."]) -> Num[Array, "..."]:
        """Sum over all classes."""
        return self.total(jnp.sum(x, self.index, keepdims=True))

    def total(self, of_part: Num[Array, "..."]) -> Num[Array, "..."]:
        """Sum over the parts of what each has summed by itself."""
        return jax.lax.psum(of_part, self.names) if self.names else of_part

    def expand(self, row: Num[Array, "..."]) -> Num[Array, "..."]:
        """A number a row, with the axis; one for all rows broadcasts as it is."""
        return jnp.expand_dims(row, self.index) if row.ndim else row

    def squeeze(self, row: Num[Array, "..."]) -> Num[Array, "..."]:
        """The way back."""
        return jnp.squeeze(row, self.index)

    def one_hot(self, index: Integer[Array, "..."], x: Array | jax.ShapeDtypeStruct) -> Bool[Array, "..."]:
        """Mask of the shape of `x`, True at class `index`; nowhere if that lies in another part, or in none."""
        position = jax.lax.broadcasted_iota(index.dtype, x.shape, self.index)
        return position == self.expand(index - self.start(x))

    def start(self, x: Array | jax.ShapeDtypeStruct) -> Integer[Array, ""] | int:
        """The first class of this part."""
        return jax.lax.axis_index(self.names) * x.shape[self.index] if self.names else 0

    def first(self, mask: Bool[Array, "..."]) -> Integer[Array, "..."]:
        """The first class of each row where `mask` is True, which it is somewhere."""
        position = self.start(mask) + jax.lax.broadcasted_iota(jnp.int32, mask.shape, self.index)
        classes: Any = self.size(mask)
        # The largest of floats is found in the pass that adds up others, where they can tell all classes apart.
        dtype = jnp.float32 if isinstance(classes, int) and classes <= 2**24 else jnp.int32
        none = -jnp.inf if dtype == jnp.float32 else -jnp.iinfo(jnp.int32).max
        before = jnp.where(mask, -position.astype(dtype), none)
        found = jnp.max(before, self.index, keepdims=True, initial=none)
        return -(jax.lax.pmax(found, self.names) if self.names else found).astype(jnp.int32)

    def recognised(self, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """`mask`, which tells one class of each row from the others.

        Where logits are made again, a part at a time and rounded in another way, it is told by its place.
        """
        return mask

    def behind(self, batch: int) -> "ClassAxis":
        """The same axis where `batch` more stand in front."""
        return replace(self, index=self.index + batch)


# One object for equal arguments, which jit compares before it compares what they hold.
class_axis = functools.cache(ClassAxis)


def merge_axes(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` with these axes as a single one, the last, in this order."""
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    kept = x.ndim - len(axes)
    return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))


def split_axes(x: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The way back to `shape`."""
    x = x.reshape(*x.shape[:-1], *(shape[axis] for axis in axes))
    return jnp.moveaxis(x, range(-len(axes), 0), axes)


def vary(x: Array, *like: Array) -> Array:
    """`x`, typed inside `jax.shard_map` as differing between devices wherever an array in `like` does.

    The state of a loop must be typed so from the start, and an array like its cotangent. The sum of no entries is a 0
    of the right type.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return x
    for array in like:
        x = x + jnp.sum(jnp.ravel(array)[:0]).astype(x.dtype)
    return x
