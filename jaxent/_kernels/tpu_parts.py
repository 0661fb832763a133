"""What kernels for TPUs share: their classes are gone over in parts, and several parts in a step of a loop."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .rows import Function, over_logits

LANES, SUBLANES = 128, 8  # of a register and of a tile of memory
STEP = 128  # registers of logits that a step of a loop takes
BLOCK = 4 * 2**20  # bytes in and out that hide the start of their copies
SLACK = 4 * 2**20  # of fast memory, for what the compiler keeps beside the blocks


class Parts(NamedTuple):
    """Parts of some rows' classes, which lie along `axis` of a part's array."""

    classes: int
    part: int  # classes that are worked on at once: so many that nothing waits for the sum before
    step: int  # classes that a step of a loop takes, which is then unrolled
    axis: int

    @property
    def rest(self) -> int:
        """Classes that fill no part."""
        return self.classes % self.part

    @property
    def widths(self) -> tuple[int, ...]:
        """How many classes parts have."""
        return tuple(w for w in (self.part * (self.classes >= self.part), self.rest) if w)

    def whole(self, visit: Callable[[Any, int, Any], Any], start: Any, join: Callable[..., Any]) -> Any:
        """`visit`, given a part's first class, its width and what came before, over all parts but the rest.

        Each step of the loop starts anew, and is joined with what came before: one sum of many small numbers beside a
        large one would round them all away.
        """

        def several(first: Any, width: int, so_far: Any) -> Any:
            for i in range(0, width, self.part):
                so_far = visit(first + i, self.part, so_far)
            return so_far

        def joined(*both: Any) -> Any:
            return tuple(map(join, *both))

        def step(i: Any, so_far: Any) -> Any:
            return joined(so_far, several(pl.multiple_of(i * self.step, self.part), self.step, start))

        whole = self.classes - self.rest
        loops, left = divmod(whole, self.step)
        if loops < 2:
            return several(0, whole, start)
        return joined(jax.lax.fori_loop(0, loops, step, start), several(whole - left, left, start))

    def each(self, visit: Callable[[Any, int], None]) -> None:
        """`visit` for all parts, the rest included."""

        def run(first: Any, width: int, _: Any) -> tuple[()]:
            visit(first, width)
            return ()

        self.whole(run, (), jnp.add)
        if self.rest:
            run(self.classes - self.rest, self.rest, ())

    def fold(
        self,
        visit: Callable[[Any, int, Any], Any],
        shape: Callable[[int], tuple[int, ...]],
        count: int,
        start: float,
        reduce: Callable[..., Any],
        join: Callable[..., Any],
    ) -> tuple[jax.Array, ...]:
        """What `visit` collects in arrays of a part's shape, reduced to a number a row."""

        def empty(width: int) -> tuple[jax.Array, ...]:
            return (jnp.full(shape(width), start, jnp.float32),) * count

        found = []
        if self.classes >= self.part:
            found.append(self.whole(visit, empty(self.part), join))
        if self.rest:
            found.append(visit(self.classes - self.rest, self.rest, empty(self.rest)))
        rows = [[reduce(x, axis=self.axis, keepdims=True) for x in some] for some in found]
        return tuple(rows[0] if len(rows) == 1 else map(join, *rows))


def parts(classes: int, part: int, rows: int, axis: int) -> Parts:
    """For so many rows at once."""
    most = STEP * SUBLANES * LANES // rows // part * part
    return Parts(classes, part, max(part, min(classes // part * part, most)), axis)


class Blocks(NamedTuple):
    """How arrays are cut: those of entries, and those of rows."""

    grid: tuple[int, ...]
    read: Any  # of entries
    written: Any
    by_row: Any
    entries: Any  # type of a result
    numbers: Any
    scratch: list[Any]
    memory: int  # in bytes
    in_turn: int = 0  # the last axes of the grid along which blocks wait for the one before
    reads: int = 1  # of all entries

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        function: Function,
        arrays: tuple[jax.Array, ...],
        in_place: bool,
        interpret: Any,
    ) -> Any:
        """The kernel's results, of arrays that lie as it wants them."""
        written = [self.entries] * ("o" in function.results)
        entries = math.prod(self.entries.shape)
        specs = {"x": self.read, "t": self.read, "f": pl.BlockSpec(memory_space=pltpu.VMEM)}
        return pl.pallas_call(
            kernel,
            out_shape=[self.entries if kind == "o" else self.numbers for kind in function.results],
            grid=self.grid,
            in_specs=[specs.get(kind, self.by_row) for kind in function.arguments],
            out_specs=[self.written if kind == "o" else self.by_row for kind in function.results],
            scratch_shapes=self.scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * (len(self.grid) - self.in_turn) + ("arbitrary",) * self.in_turn,
                vmem_limit_bytes=self.memory,
            ),
            cost_estimate=pl.CostEstimate(
                flops=10 * entries,
                transcendentals=entries,
                bytes_accessed=self.reads * sum(map(_size, arrays)) + sum(map(_size, written)),
            ),
            input_output_aliases=over_logits(function, in_place),
            name=f"jaxent_{name}",
            interpret=interpret,
        )(*arrays)


def _size(x: Any) -> int:
    """In bytes."""
    return math.prod(x.shape) * x.dtype.itemsize


def of_tile(shape: tuple[int, ...]) -> Callable[[Any], jax.Array]:
    """What loads the number of a tile for rows of that shape."""
    return lambda ref: jnp.broadcast_to(ref[:1, :1], shape)


def wide(x: jax.Array) -> jax.Array:
    """Entries as they are computed with."""
    return x.astype(jnp.float32)
