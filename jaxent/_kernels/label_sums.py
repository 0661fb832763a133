"""Rows of the loss of class indices, and its gradient, from sums of exponentials that are relative to any number."""

from collections.abc import Iterable
from functools import reduce
from operator import and_
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._class_axis import ClassAxis

Logits = Float[Array, "..."]
Row = Float[Array, "..."]

# Which of a label's three losses, and of their factors, there are: its own, the mean over all classes, the logsumexp.
Terms: TypeAlias = tuple[bool, bool, bool]
ALL: Terms = (True, True, True)
OWN: Terms = (True, False, False)


def of_terms(three: Iterable[Any], terms: Terms) -> tuple[Any, ...]:
    """Those that there are."""
    return tuple(x for x, there_is in zip(three, terms, strict=True) if there_is)


def all_three(some: Iterable[Any], terms: Terms) -> tuple[Any, Any, Any]:
    """None for those that there are not."""
    rest = iter(some)
    own, mean, lse = (next(rest) if there_is else None for there_is in terms)
    return own, mean, lse


def results_of(terms: Terms, stats: bool) -> Terms:
    """The losses that are results: with stats also those that these are made of."""
    return terms[0] or stats, terms[1], terms[2] or stats


class LabelSums(NamedTuple):
    """What the losses of a row and their gradients are made of, relative to a number near its largest logit."""

    reference: Row  # keeps the axis, as they all do
    d: Row  # the label's logit; NaN where there is no such class
    others: Row  # the sum of all exponentials but the label's
    mean: Row  # of all logits


def label_rows(sums: LabelSums, y: Integer[Array, "..."], *, axis: ClassAxis) -> tuple[Row, Row, Row]:
    """`label_loss`."""
    reference, d, others, mean = sums
    own = jnp.exp(d)
    leads = others < own
    loss, log_total = jnp.log1p(others / own), jnp.log(others + own)
    loss, log_total = jnp.where(leads, loss, log_total - d), jnp.where(leads, loss + d, log_total)
    rows = loss, log_total - mean, reference + log_total
    loss, uniform, lse = (jnp.where(y < 0, 0.0, axis.squeeze(row)) for row in rows)
    return loss, uniform, lse


def label_gradient(
    sums: LabelSums,
    label: Bool[Array, "..."],
    e: Logits,
    y: Integer[Array, "..."],
    a: Row | None,
    u: Row | None,
    z: Row | None,
    *,
    axis: ClassAxis,
    classes: int | None = None,
) -> Logits:
    """That of `label_loss_and_gradient`, from the exponentials of all classes but the label.

    Or of some classes, if it is said how many there are.
    """
    lse = axis.expand(label_rows(sums, y, axis=axis)[2])
    of_label, of_all, of_lse = (0.0 if factor is None else axis.expand(factor) for factor in (a, u, z))
    own, others = jnp.exp(sums.d), sums.others
    total, shared = others + own, of_all if z is None else of_all + 2.0 * of_lse * lse
    gradient = jnp.where(label, shared * (own / total) - of_label * (others / total), e / total * (of_label + shared))
    if u is not None:
        gradient -= of_all / max(classes or axis.size(e), 1)
    nothing = reduce(and_, (factor == 0.0 for factor in (a, u, z) if factor is not None))
    return jnp.where(axis.expand((y < 0) | nothing), 0.0, gradient)
