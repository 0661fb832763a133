r"""What kernels compute that go over a row three times in fast memory: for its maximum, its sums, and its entries.

The formulas are those of xla.py, taken apart: `sums` are what is added up over the classes, `finish` makes of them the
results of the row and the coefficients that its entries need, and `entry` makes the entries. How a row lies in memory
is the machine's business. Logits come from memory here, so that no compiler makes an fma of their making and of
$x_k - m$: the largest class's is 0 without saying so.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

Entries = Float[Array, "rows classes"]
Row = Float[Array, "..."]  # a number for each row


class Part(NamedTuple):
    """Some classes of some rows, in float32."""

    x: Entries
    m: Row  # the largest logit
    e: Entries  # exp(x - m)
    t: Entries  # the other array of the logits' shape, if there is one
    label: Bool[Array, "rows classes"]  # if there are labels

    @property
    def d(self) -> Entries:
        return self.x - self.m

    @property
    def largest(self) -> Bool[Array, "rows classes"]:
        return self.x == self.m


class Rows(NamedTuple):
    """What is known of rows: their maximum, how many classes they have, and what is given of each."""

    m: Row
    classes: int
    given: tuple[Array, ...]


class Function(NamedTuple):
    """A row function. A letter for each array: of the logits' shape (o), a label (y), or another number a row (r)."""

    arguments: str
    results: str
    sums: Callable[[Part], tuple[Entries, ...]]
    finish: Callable[..., tuple[tuple[Row, ...], tuple[Row, ...]]]  # of Rows and the sums
    entry: Callable[..., Entries] | None = None  # of a Part and the coefficients


# Below this sum one class holds two thirds of the probability.
_DOMINATED = 1.5


def _log1p(x: Row) -> Row:
    """By the series of artanh where x is small: what a kernel's compiler has may be log(1 + x)."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 2.0 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 / 13))))))
    return jnp.where(x < 0.5, series, jnp.log(1.0 + x))


def _log_total(total: Row, others: Row) -> Row:
    return jnp.where(total < _DOMINATED, _log1p(others), jnp.log(total))


def _threshold(total: Row) -> Row:
    """What only a dominant class's exponential exceeds."""
    return jnp.where(total < _DOMINATED, 0.75, 2.0)


def _softmax_rows(_: Rows, total: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return (), (1.0 / total,)


def _total_and_others(part: Part) -> tuple[Entries, Entries]:
    return part.e, jnp.where(part.largest, 0.0, part.e)


def _log_softmax_rows(_: Rows, total: Row, others: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return (), (_log_total(total, others),)


def _tangent_sums(part: Part) -> tuple[Entries, ...]:
    e, others = _total_and_others(part)
    return e, others, jnp.where(part.largest, part.t, 0.0), others * part.t


def _tangent_rows(
    _: Rows, total: Row, others: Row, of_largest: Row, of_others: Row
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    dominated = total < _DOMINATED
    own = jnp.where(dominated, of_largest, 0.0)
    mean = jnp.where(dominated, of_others - others * of_largest, of_others + of_largest) / total
    return (), (_threshold(total), own, mean, 1.0 / total)


def _log_softmax_tangent(part: Part, threshold: Row, own: Row, mean: Row, _: Row) -> Entries:
    return jnp.where(part.e > threshold, 0.0, part.t - own) - mean


def _softmax_tangent(part: Part, threshold: Row, own: Row, mean: Row, inverse: Row) -> Entries:
    return part.e * inverse * (jnp.where(part.e > threshold, 0.0, part.t - own) - mean)


def _cotangent_sums(part: Part) -> tuple[Entries, ...]:
    return *_total_and_others(part), jnp.where(part.largest, part.t, 0.0), jnp.where(part.largest, 0.0, part.t)


def _log_softmax_cotangent_rows(
    _: Rows, total: Row, others: Row, of_largest: Row, of_others: Row
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return (), (
        _threshold(total),
        (of_largest * others - of_others) / total,
        (of_largest + of_others) / total,
    )


def _log_softmax_cotangent(part: Part, threshold: Row, of_dominant: Row, mean: Row) -> Entries:
    return jnp.where(part.e > threshold, of_dominant, part.t - part.e * mean)


def _label_sums(part: Part) -> tuple[Entries, ...]:
    return jnp.where(part.label, 0.0, part.e), part.d


def _losses(rows: Rows, others: Row, gaps: Row, of_label: Row) -> tuple[tuple[Row, ...], Row]:
    """The three losses, and the exponential of the label's class."""
    y = rows.given[0]
    d = jnp.where(y < rows.classes, of_label - rows.m, jnp.nan)
    of_label = jnp.exp(d)
    log_total = jnp.where(d == 0.0, _log1p(others), jnp.log(others + of_label))
    losses = log_total - d, log_total - gaps / rows.classes, rows.m + log_total
    return tuple(jnp.where(y < 0, 0.0, loss) for loss in losses), of_label


def _label_rows(rows: Rows, *sums: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return _losses(rows, *sums)[0], ()


def _label_gradient_rows(rows: Rows, others: Row, *sums: Row) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    losses, of_label = _losses(rows, others, *sums)
    y, a, u, z = rows.given
    total, shared, shift = others + of_label, u + 2.0 * z * losses[2], u / rows.classes
    of_label = (shared * of_label - a * others) / total - shift
    return losses, (jnp.where(y < 0, 0.0, 1.0), jnp.where(y < 0, 0.0, of_label), (a + shared) / total, shift)


def _label_gradient(part: Part, counts: Row, of_label: Row, scale: Row, shift: Row) -> Entries:
    return jnp.where(part.label | (counts == 0.0), of_label, part.e * scale - shift)


def _expected_sums(part: Part) -> tuple[Entries, ...]:
    q = part.t
    return *_total_and_others(part), jnp.where(q == 0.0, 0.0, q * part.d), q


def _expected_rows(
    _: Rows, total: Row, others: Row, gaps: Row, mass: Row, *__: Row
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return (mass * _log_total(total, others) - gaps,), ()


def _expected_gradient_sums(part: Part) -> tuple[Entries, ...]:
    return *_expected_sums(part), jnp.where(part.largest, 0.0, part.t)


def _expected_gradient_rows(
    rows: Rows, total: Row, others: Row, gaps: Row, mass: Row, of_others: Row
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    losses, _ = _expected_rows(rows, total, others, gaps, mass)
    return losses, (_threshold(total), of_others - mass * others / total, mass / total, rows.given[0])


def _expected_gradient(part: Part, threshold: Row, of_dominant: Row, mass: Row, a: Row) -> Entries:
    return jnp.where(a == 0.0, 0.0, a * jnp.where(part.e > threshold, of_dominant, mass * part.e - part.t))


def _softmax(part: Part, inverse: Row) -> Entries:
    return part.e * inverse


FUNCTIONS = {
    "softmax": Function("o", "o", lambda part: (part.e,), _softmax_rows, _softmax),
    "log_softmax": Function("o", "o", _total_and_others, _log_softmax_rows, lambda part, log: part.d - log),
    "softmax_derivative": Function("oo", "o", _tangent_sums, _tangent_rows, _softmax_tangent),
    "log_softmax_derivative": Function("oo", "o", _tangent_sums, _tangent_rows, _log_softmax_tangent),
    "log_softmax_pullback": Function(
        "oo", "o", _cotangent_sums, _log_softmax_cotangent_rows, _log_softmax_cotangent
    ),
    "label_loss": Function("oy", "rrr", _label_sums, _label_rows),
    "label_loss_and_gradient": Function("oyrrr", "rrro", _label_sums, _label_gradient_rows, _label_gradient),
    "expected_loss": Function("oo", "r", _expected_sums, _expected_rows),
    "expected_loss_and_gradient": Function(
        "oor", "ro", _expected_gradient_sums, _expected_gradient_rows, _expected_gradient
    ),
}
