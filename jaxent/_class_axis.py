"""The axis along which the classes lie: whole in one array, or in parts on several devices."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Integer, Num


@dataclass(frozen=True)
class ClassAxis:
    """What differs where the classes are in parts. Reductions over this axis leave nothing that depends on a part.

    That happens in three ways. Inside `jax.shard_map` an array *is* one part, and `names` are the mesh axes over
    which the parts lie. Under explicit sharding the array says so. Under automatic sharding only the compiler knows.
    """

    index: int  # counted from the front
    names: tuple[str, ...] = ()

    def size(self, x: Array) -> int:
        """How many classes there are in all parts."""
        return x.shape[self.index] * self.named_parts()

    def named_parts(self) -> int:
        """Into how many parts `names` split the classes."""
        return jax.lax.axis_size(self.names) if self.names else 1  # itself a microsecond outside of jit

    def max(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Largest entry of each row, with the axis kept; -inf if there are no classes."""
        m = jnp.max(x, self.index, keepdims=True, initial=-jnp.inf)
        return jax.lax.pmax(m, self.names) if self.names else m

    def sum(self, x: Num[Array, "..."] | Bool[Array, "..."], keepdims: bool = False) -> Num[Array, "..."]:
        """Sum over all classes."""
        return self.total(jnp.sum(x, self.index, keepdims=keepdims))

    def total(self, of_part: Num[Array, "..."]) -> Num[Array, "..."]:
        """Sum over the parts of what each has summed by itself."""
        return jax.lax.psum(of_part, self.names) if self.names else of_part

    def local(self, index: Integer[Array, "..."], x: Array) -> Integer[Array, "..."]:
        """Class `index` counted from the first class of the part `x`; outside of `[0, x's classes)` if in another."""
        return index - self._start(x) if self.names else index

    def one_hot(self, index: Integer[Array, "..."], x: Array) -> Bool[Array, "..."]:
        """Mask of the shape of `x`, True at class `index`."""
        return one_hot(self.local(index, x), x.shape, self.index)

    def take(self, x: Float[Array, "..."], index: Integer[Array, "..."]) -> Float[Array, "..."]:
        """The entry of class `index >= 0` in each row, without a derivative of its own; NaN if there is none."""
        if not x.shape[self.index]:
            return jnp.full(index.shape, jnp.nan, x.dtype)
        if self.names:
            local = self.local(index, x)
            inside = (local >= 0) & (local < x.shape[self.index])
            entry = jnp.where(inside, self._gather(x, local, "clip"), 0.0)
        elif self.is_sharded(x):
            entry = jnp.where(self.one_hot(index, x), x, 0.0).sum(self.index)
        else:
            return self._gather(x, index, "fill")
        return jnp.where(index < self.size(x), self.total(entry), jnp.nan)

    def is_short(self, x: Array) -> bool:
        """Whether rows are so short that sums over them are best unrolled."""
        return x.shape[self.index] <= 32 and self.is_whole(x)

    def is_whole(self, x: Array) -> bool:
        """Whether all classes of `x` surely lie on one device, where slicing them moves no data."""
        return not self.is_sharded(x) and self.unseen_parts(x) == 1

    def is_sharded(self, x: Array) -> bool:
        """Whether explicit sharding splits the classes of `x`, which then cannot be indexed, only masked."""
        return jax.typeof(x).sharding.spec[self.index] is not None

    def unseen_parts(self, x: Array) -> int:
        """Into how many parts automatic sharding might split the classes of `x` at most."""
        mesh = jax.typeof(x).sharding.mesh
        if mesh.empty:
            return jax.device_count()
        sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return math.prod(size for size, kind in sizes if kind == AxisType.Auto)

    def _start(self, x: Array) -> Integer[Array, ""]:
        return jax.lax.axis_index(self.names) * x.shape[self.index]

    def _gather(self, x: Array, index: Integer[Array, "..."], mode: str) -> Array:
        index, dtype = jnp.expand_dims(index, self.index), x.dtype
        if dtype.itemsize == 2:  # XLA's CPU backend would convert all of x to float32 first
            x = jax.lax.bitcast_convert_type(x, jnp.uint16)  # which "fill" fills with ones, the bits of a NaN
        entry = jnp.squeeze(jnp.take_along_axis(x, index, self.index, mode=mode), self.index)
        return jax.lax.bitcast_convert_type(entry, dtype)


# One object for equal arguments, which jit compares before it compares what they hold.
class_axis = functools.cache(ClassAxis)


def one_hot(index: Integer[Array, "..."], shape: tuple[int, ...], axis: int) -> Bool[Array, "..."]:
    """Mask of the given shape, True where the position along `axis` is `index`."""
    position = jax.lax.broadcasted_iota(index.dtype, shape, axis)
    return position == jnp.expand_dims(index, axis)


def vary(x: Array, *like: Any) -> Array:
    """`x`, typed inside `jax.shard_map` as differing between devices wherever an array in `like` does.

    The state of a loop must be typed so from the start. The sum of no entries is a 0 of the right type.
    """
    for array in jax.tree.leaves(like):
        x = x + jnp.sum(jnp.ravel(array)[:0]).astype(x.dtype)
    return x
