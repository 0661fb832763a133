"""Rows of the loss of class indices, and its gradient, from sums of exponentials that are relative to any number."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._class_axis import ClassAxis

Logits = Float[Array, "..."]
Row = Float[Array, "..."]


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
    a: Row,
    u: Row,
    z: Row,
    *,
    axis: ClassAxis,
    classes: int | None = None,
) -> Logits:
    """That of `label_loss_and_gradient`, from the exponentials of all classes but the label.

    Or of some classes, if it is said how many there are.
    """
    lse = axis.expand(label_rows(sums, y, axis=axis)[2])
    a, u, z = map(axis.expand, (a, u, z))
    own, others = jnp.exp(sums.d), sums.others
    total, shared = others + own, u + 2.0 * z * lse
    gradient = jnp.where(label, shared * (own / total) - a * (others / total), e / total * (a + shared))
    nothing = axis.expand(y < 0) | ((a == 0.0) & (u == 0.0) & (z == 0.0))
    return jnp.where(nothing, 0.0, gradient - u / max(classes or axis.size(e), 1))
