r"""What kernels compute that go over a row three times in fast memory: for its maximum, its sums, and its entries.

The formulas are those of xla.py, taken apart: `collect` adds up entries of classes, `finish` makes of the sums the
results of a row and the coefficients that its entries need, and `entry` makes these. Where a row comes bit by bit,
sums are relative to its largest logit so far, and `rescale` makes them relative to a larger one. How a row lies in
memory is a machine's business. Logits come from memory here, where no compiler sees how they are made, so that the
largest one's $x_k - m$ is 0 without saying so.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .label_sums import ALL, Terms, all_three, of_terms, results_of

Entries = Float[Array, "..."]  # of some classes of some rows
Row = Float[Array, "..."]  # a number for each row, or the same number for all of its entries
Sums: TypeAlias = tuple[Entries, ...]
Finished: TypeAlias = tuple[tuple[Row, ...], tuple[Row, ...]]  # results, and coefficients


class Part(NamedTuple):
    """Some classes of some rows, in float32."""

    x: Entries
    m: Row  # the largest logit
    e: Entries  # exp(x - m)
    t: Any  # the entries of the other array of the logits' shape, if there is one
    label: Any  # a mask, if there are labels

    @property
    def largest(self) -> Bool[Array, "..."]:
        return self.x == self.m

    @property
    def others(self) -> Entries:
        """The exponentials without those of the largest class, or classes."""
        return jnp.where(self.largest, 0.0, self.e)


class Rows(NamedTuple):
    """What is known of rows: their maximum, how many classes they have, and what else is given of each."""

    m: Row
    classes: int
    given: tuple[Row, ...]


class Growth(NamedTuple):
    """What a larger maximum does to the sums of the classes so far."""

    grown: Bool[Array, "..."]  # whether there is one
    m: Row  # the largest logit until now, relative to the larger one; 0 where there is none
    classes: Any  # so far

    @property
    def e(self) -> Row:
        return jnp.exp(self.m)


class Function(NamedTuple):
    """A row function, for a machine that says how a row lies in memory.

    Letters stand for arrays: the logits and what has their shape (x, t), labels (y), numbers a row (r) or one for all
    rows (f); of the results those of the logits' shape (o), those of a number a row (s), and the first class of the
    largest logit (p).
    """

    arguments: str
    results: str
    sums: int
    collect: Callable[..., Sums]  # of a Part and the sums so far, entry by entry
    rescale: Callable[..., Sums]  # of a Growth and the sums of rows
    finish: Callable[..., Finished]  # of Rows and the sums
    entry: Callable[..., Entries] | None = None  # of a Part and the coefficients
    keeps: bool = False  # whether `entry` needs exponentials
    stats: str = ""  # results that there are on request

    def of(self, *arrays: Any) -> "Function":
        """That of these arrays."""
        letters = zip(self.arguments, arrays, strict=True)
        return self._replace(arguments="".join("f" if a == "r" and not x.ndim else a for a, x in letters))


def repeat(n: int, f: Callable[[Any, Any], Any], start: Any) -> Any:
    """`f` of 0 to n - 1 and of what came before; of 0 as a number where that is all."""
    return f(0, start) if n == 1 else jax.lax.fori_loop(0, n, f, start)


def struct(shape: tuple[int, ...], dtype: DTypeLike, *like: Array) -> Any:
    """Of a result, typed inside `jax.shard_map` as differing between devices wherever an argument does."""

    def result(*arrays: Array) -> Array:
        return sum((jnp.sum(jnp.ravel(x)[:0]).astype(dtype) for x in arrays), jnp.zeros(shape, dtype))

    return jax.eval_shape(result, *like)


def function_of(name: str, stats: bool, terms: Terms = ALL) -> Function:
    """The row function of that name, with its stats or without, and of labels with these terms."""
    function = LABEL_FUNCTIONS[name](terms, results_of(terms, stats)) if name in LABEL_FUNCTIONS else FUNCTIONS[name]
    return function._replace(results=function.results + function.stats) if stats else function


def grouped(function: Function, refs: tuple[Any, ...]) -> tuple[list[Any], ...]:
    """Of a kernel's arrays those of the logits' shape, the labels, all that is given of rows, and the results."""
    names = function.arguments + function.results
    return tuple(
        [ref for ref, name in zip(refs, names, strict=False) if name in some]
        for some in ("xt", "y", "yrf", "s", "o", "p")
    )


def per_row(
    function: Function, given: list[Any], of_row: Callable[[Any], Any], of_all: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """What is given of rows, loaded by one function, and the numbers for all rows by another."""
    kinds = (kind for kind in function.arguments if kind in "yrf")
    return tuple((of_all if kind == "f" else of_row)(ref) for kind, ref in zip(kinds, given, strict=True))


def over_logits(function: Function, in_place: bool) -> dict[int, int]:
    """Which argument a result is written over, as Pallas wants to know it."""
    return {0: function.results.index("o")} if in_place else {}


def refusal(floats: tuple[str, ...], x: Any, *others: Any, dtype: DTypeLike) -> str | None:
    """Why no such kernel takes such arguments; `floats` are what it can compute."""
    wide = (jnp.dtype(dtype), *(a.dtype for a in (x, *others) if a.ndim == x.ndim))
    if any(x.name not in floats for x in wide):
        return f"it computes {' and '.join(floats)} only"
    return "there is nothing to compute" if 0 in x.shape else None


def _collect_total(part: Part, total: Entries) -> Sums:
    return (total + part.e,)


def _collect_others(part: Part, total: Entries, others: Entries) -> Sums:
    return total + part.e, others + part.others


def _rescale_total(growth: Growth, total: Row) -> Sums:
    return (total * growth.e,)


def _rescale_others(growth: Growth, total: Row, others: Row) -> Sums:
    total = total * growth.e
    return total, jnp.where(growth.grown, total, others)


# Below this sum one class holds two thirds of the probability: there is no second one that is as large.
_DOMINATED = 1.5


def _log1p(x: Row) -> Row:
    """By the series of artanh where x is small: a kernel's compiler may have no better one than log(1 + x)."""
    factor = 2.0 / (2.0 + x)  # half of x may be subnormal, and so 0
    s2 = (0.5 * x * factor) ** 2
    series = x * factor * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 / 13))))))
    return jnp.where(x < 0.5, series, jnp.log(1.0 + x))


def _log_total(total: Row, others: Row) -> Row:
    return jnp.where(total < _DOMINATED, _log1p(others), jnp.log(total))


def _threshold(total: Row) -> Row:
    """What only a dominant class's exponential exceeds."""
    return jnp.where(total < _DOMINATED, 0.75, total)


# softmax and log_softmax


def _softmax_rows(_: Rows, total: Row) -> Finished:
    return (), (1.0 / total,)


def _softmax(part: Part, inverse: Row) -> Entries:
    return part.e * inverse


def _log_softmax_rows(_: Rows, total: Row, others: Row) -> Finished:
    return (), (_log_total(total, others),)


def _log_softmax(part: Part, log_total: Row) -> Entries:
    return part.x - part.m - log_total


# Their derivatives, relative to the dominant class


def _collect_tangents(part: Part, total: Entries, others: Entries, of_largest: Entries, of_others: Entries) -> Sums:
    own = jnp.where(part.largest, part.t, 0.0)
    return total + part.e, others + part.others, of_largest + own, of_others + part.others * part.t


def _rescale_tangents(growth: Growth, total: Row, others: Row, of_largest: Row, of_others: Row) -> Sums:
    moved = (of_largest + of_others) * growth.e
    moved, own = jnp.where(growth.grown, moved, of_others), jnp.where(growth.grown, 0.0, of_largest)
    return *_rescale_others(growth, total, others), own, moved


def _tangent_rows(_: Rows, total: Row, others: Row, of_largest: Row, of_others: Row) -> Finished:
    dominated = total < _DOMINATED
    own = jnp.where(dominated, of_largest, 0.0)
    mean = jnp.where(dominated, of_others - others * of_largest, of_others + of_largest) / total
    return (), (_threshold(total), own, mean, 1.0 / total)


def _log_softmax_tangent(part: Part, threshold: Row, own: Row, mean: Row, _: Row) -> Entries:
    return jnp.where(part.e > threshold, 0.0, part.t - own) - mean


def _softmax_tangent(part: Part, threshold: Row, own: Row, mean: Row, inverse: Row) -> Entries:
    return part.e * inverse * _log_softmax_tangent(part, threshold, own, mean, inverse)


def _collect_cotangents(part: Part, total: Entries, others: Entries, of_largest: Entries, of_others: Entries) -> Sums:
    own, rest = jnp.where(part.largest, part.t, 0.0), jnp.where(part.largest, 0.0, part.t)
    return total + part.e, others + part.others, of_largest + own, of_others + rest


def _rescale_cotangents(growth: Growth, total: Row, others: Row, of_largest: Row, of_others: Row) -> Sums:
    moved = of_others + jnp.where(growth.grown, of_largest, 0.0)
    return *_rescale_others(growth, total, others), jnp.where(growth.grown, 0.0, of_largest), moved


def _cotangent_rows(_: Rows, total: Row, others: Row, of_largest: Row, of_others: Row) -> Finished:
    of_dominant = (of_largest * others - of_others) / total
    return (), (_threshold(total), of_dominant, (of_largest + of_others) / total)


def _log_softmax_cotangent(part: Part, threshold: Row, of_dominant: Row, mean: Row) -> Entries:
    return jnp.where(part.e > threshold, of_dominant, part.t - part.e * mean)


# The loss of labels. There are gaps where the mean over all classes is wanted.


def _collect_losses(part: Part, others: Entries, of_label: Entries, *gaps: Entries) -> Sums:
    own = jnp.where(part.label, part.x, of_label)
    return others + jnp.where(part.label, 0.0, part.e), own, *(sum_ + (part.x - part.m) for sum_ in gaps)


def _rescale_losses(growth: Growth, others: Row, of_label: Row, *gaps: Row) -> Sums:
    return others * growth.e, of_label, *(sum_ + growth.classes * growth.m for sum_ in gaps)


def _losses(rows: Rows, others: Row, of_label: Row, *gaps: Row) -> tuple[tuple[Row, Row | None, Row], Row]:
    """The three losses, and the exponential of the label's class."""
    y = rows.given[0]
    d = jnp.where(y < rows.classes, of_label - rows.m, jnp.nan)
    of_label = jnp.exp(d)
    log_total = jnp.where(d == 0.0, _log1p(others), jnp.log(others + of_label))
    loss, lse = (jnp.where(y < 0, 0.0, x) for x in (log_total - d, rows.m + log_total))
    uniform = jnp.where(y < 0, 0.0, log_total - gaps[0] / rows.classes) if gaps else None
    return (loss, uniform, lse), of_label


def _loss_rows(results: Terms, rows: Rows, *sums: Row) -> Finished:
    return of_terms(_losses(rows, *sums)[0], results), ()


def _loss_gradient_rows(terms: Terms, results: Terms, rows: Rows, others: Row, of_label: Row, *gaps: Row) -> Finished:
    losses, own = _losses(rows, others, of_label, *gaps)
    y, *factors = rows.given
    a, u, z = (jnp.zeros_like(own) if factor is None else factor for factor in all_three(factors, terms))
    total, shared = others + own, u + 2.0 * z * losses[2] if terms[2] else u
    y = jnp.where(reduce(and_, (factor == 0.0 for factor in factors)), -1, y)
    shift = u / rows.classes
    of_label = jnp.where(y < 0, 0.0, (shared * own - a * others) / total - shift)
    coefficients = y, of_label, (a + shared) / total
    return of_terms(losses, results), (*coefficients, shift) if terms[1] else coefficients


def _loss_gradient(part: Part, y: Row, of_label: Row, scale: Row, *shift: Row) -> Entries:
    of_others = part.e * scale - shift[0] if shift else part.e * scale
    return jnp.where(part.label | (y < 0), of_label, of_others)


def _label_loss(_: Terms, results: Terms) -> Function:
    letters, sums, finish = "s" * sum(results), 2 + results[1], partial(_loss_rows, results)
    return Function("xy", letters, sums, _collect_losses, _rescale_losses, finish, stats="p")


def _label_loss_and_gradient(terms: Terms, results: Terms) -> Function:
    return Function(
        "xy" + "r" * sum(terms),
        "s" * sum(results) + "o",
        2 + results[1],
        _collect_losses,
        _rescale_losses,
        partial(_loss_gradient_rows, terms, results),
        _loss_gradient,
        keeps=True,
        stats="p",
    )


# The loss of probabilities


def _collect_expected(part: Part, total: Entries, others: Entries, gaps: Entries, mass: Entries) -> Sums:
    gap = jnp.where(part.t == 0.0, 0.0, part.t * (part.x - part.m))
    return total + part.e, others + part.others, gaps + gap, mass + part.t


def _rescale_expected(growth: Growth, total: Row, others: Row, gaps: Row, mass: Row) -> Sums:
    gaps = jnp.where(mass == 0.0, gaps, gaps + mass * growth.m)
    return *_rescale_others(growth, total, others), gaps, mass


def _expected_rows(rows: Rows, total: Row, others: Row, gaps: Row, mass: Row) -> Finished:
    log_total = _log_total(total, others)
    return (mass * log_total - gaps, rows.m + log_total), ()  # the second where stats are wanted


def _collect_expected_gradient(part: Part, of_others: Entries, *sums: Entries) -> Sums:
    return of_others + jnp.where(part.largest, 0.0, part.t), *_collect_expected(part, *sums)


def _rescale_expected_gradient(growth: Growth, of_others: Row, *sums: Row) -> Sums:
    return jnp.where(growth.grown, sums[-1], of_others), *_rescale_expected(growth, *sums)


def _expected_gradient_rows(rows: Rows, of_others: Row, total: Row, others: Row, gaps: Row, mass: Row) -> Finished:
    losses, _ = _expected_rows(rows, total, others, gaps, mass)
    return losses, (_threshold(total), of_others - mass * others / total, mass / total, rows.given[0])


def _expected_gradient(part: Part, threshold: Row, of_dominant: Row, mean: Row, a: Row) -> Entries:
    gradient = jnp.where(part.e > threshold, of_dominant, mean * part.e - part.t)
    return jnp.where(a == 0.0, 0.0, a * gradient)


LABEL_FUNCTIONS = {"label_loss": _label_loss, "label_loss_and_gradient": _label_loss_and_gradient}
FUNCTIONS = {
    "softmax": Function("x", "o", 1, _collect_total, _rescale_total, _softmax_rows, _softmax, keeps=True),
    "log_softmax": Function("x", "o", 2, _collect_others, _rescale_others, _log_softmax_rows, _log_softmax),
    "softmax_derivative": Function(
        "xt", "o", 4, _collect_tangents, _rescale_tangents, _tangent_rows, _softmax_tangent, keeps=True
    ),
    "log_softmax_derivative": Function(
        "xt", "o", 4, _collect_tangents, _rescale_tangents, _tangent_rows, _log_softmax_tangent, keeps=True
    ),
    "log_softmax_pullback": Function(
        "xt", "o", 4, _collect_cotangents, _rescale_cotangents, _cotangent_rows, _log_softmax_cotangent, keeps=True
    ),
    "label_loss": _label_loss(ALL, ALL),
    "label_loss_and_gradient": _label_loss_and_gradient(ALL, ALL),
    "expected_loss": Function("xt", "s", 4, _collect_expected, _rescale_expected, _expected_rows, stats="sp"),
    "expected_loss_and_gradient": Function(
        "xtr",
        "so",
        5,
        _collect_expected_gradient,
        _rescale_expected_gradient,
        _expected_gradient_rows,
        _expected_gradient,
        keeps=True,
        stats="sp",
    ),
}
