"""The loss of class probabilities q, `s * -sum(q * log p)` with a factor s for each row: linear in q and in s.

A row whose factor is 0 adds nothing, whatever its logits are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import _kernels as kernels
from ._label_loss import How, Row, is_easily_underflown, is_perturbed
from ._linear import inner, linear, times
from ._nll import expected_nll
from ._softmax import add, log_softmax_cotangent, softmax_tangent

Logits = Float[Array, "..."]


def expected_losses(how: How, x: Logits, q: Logits, s: Row) -> Row:
    """The loss of each row."""
    return _linear_in_q(how, False, x, q, s)


def expected_total(how: How, x: Logits, q: Logits, s: Row) -> Float[Array, ""]:
    """The sum of the losses of all rows."""
    return _linear_in_q(how, True, x, q, s)


def _linear_in_q(how: How, summed: bool, x: Logits, q: Logits, s: Row) -> Array:
    if how.axis.names:  # JAX knows how sums over devices are transposed
        log_p = kernels.log_softmax(x, dtype=s.dtype, **how._asdict())
        losses = times(s, expected_nll(log_p, q, how.axis))
        return jnp.sum(losses) if summed else losses
    return linear(partial(_losses, how, summed), partial(_surprises, how, q.dtype), (x, s), q)


def _surprises(how: How, dtype: DTypeLike, x: Logits, s: Row, g: Array) -> Logits:
    """The transpose: `-g * s * log p`, and 0 where a class cannot be or a row has no factor."""
    log_p = kernels.log_softmax(x, dtype=s.dtype, **how._asdict())
    nothing = (how.axis.expand(s) == 0.0) | (log_p == -jnp.inf)
    return (how.axis.expand(-g * s) * jnp.where(nothing, 0.0, log_p)).astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _losses(how: How, summed: bool, x: Logits, s: Row, q: Logits) -> Array:
    losses = times(s, kernels.expected_loss(x, q, **how._asdict()))
    return jnp.sum(losses) if summed else losses


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(how: How, summed: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, s, q), (x_dot, s_dot, q_dot) = primals, tangents
    out, terms = None, []
    if is_perturbed(x_dot) and summed and not is_easily_underflown(x.dtype):
        losses, gradient = expected_pass(how, x.dtype, x, q, s)
        out = jnp.sum(times(s, losses))
        terms.append(inner(gradient, x_dot))
    elif is_perturbed(x_dot):
        along = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, q, s), x_dot)
        terms.append(jnp.sum(along) if summed else along)
    if is_perturbed(s_dot):
        losses = times(s_dot, kernels.expected_loss(x, q, **how._asdict()))
        terms.append(jnp.sum(losses) if summed else losses)
    if is_perturbed(q_dot):
        terms.append(_linear_in_q(how, summed, x, q_dot, s))
    return _losses(how, summed, *primals) if out is None else out, add(terms)


def expected_pass(how: How, dtype: DTypeLike, x: Logits, q: Logits, s: Row) -> tuple[Row, Logits]:
    """The loss of each row without its factor, and the gradient with it in `dtype`."""
    return kernels.expected_loss_and_gradient(x, q, s, dtype=dtype, **how._asdict())


def _along(how: How, x: Logits, q: Logits, s: Row, t: Logits) -> Row:
    """The derivative along `t`."""
    return jnp.sum(expected_pass(how, s.dtype, x, q, s)[1] * t.astype(s.dtype), how.axis.index)


def _gradient(how: How, dtype: DTypeLike, x: Logits, q: Logits, s: Row, g: Row) -> Logits:
    """Its transpose."""
    return expected_pass(how, dtype, x, q, g * s)[1]


@kernels.expected_loss.defjvp
def _expected_loss_jvp(primals: Any, tangents: Any, **how: Any) -> tuple[Row, Row]:
    return kernels.expected_loss(*primals, **how), _along_both(How(**how), *primals, *tangents)


def _along_both(how: How, x: Logits, q: Logits, x_dot: Logits | None, q_dot: Logits | None) -> Row:
    dtype = kernels.compute_dtype(x.dtype)
    one = jnp.ones(how.axis.rows(x.shape), dtype)
    terms = []
    if x_dot is not None:
        along = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, q, one), x_dot)
        terms.append(how.axis.total(along))
    if q_dot is not None:
        terms.append(expected_losses(how, x, q_dot, one))
    return add(terms)


@kernels.expected_loss_and_gradient.defjvp
def _expected_pass_jvp(primals: Any, tangents: Any, *, dtype: DTypeLike, **how: Any) -> tuple[Any, Any]:
    (x, q, s), (x_dot, q_dot, s_dot) = primals, tangents
    axis, along, terms = how["axis"], jnp.zeros_like(s), []
    counts = axis.expand(s != 0.0)
    shown = jnp.where(counts, x, jnp.zeros((), x.dtype))  # of a row without a factor, NaN must not come back
    if x_dot is not None or q_dot is not None:
        along = _along_both(How(**how), x, q, x_dot, q_dot)
    if x_dot is not None:
        mass = axis.sum(q.astype(s.dtype))
        terms.append(axis.expand(s) * mass * softmax_tangent(shown, x_dot, dtype=s.dtype, **how))
    if q_dot is not None:  # the gradient is linear in q, and in s
        terms.append(-axis.expand(s) * log_softmax_cotangent(shown, q_dot, dtype=s.dtype, **how))
    if s_dot is not None:
        unit = expected_pass(How(**how), s.dtype, x, q, jnp.ones_like(s))[1]
        terms.append(times(jnp.broadcast_to(axis.expand(s_dot), x.shape), unit))
    return expected_pass(How(**how), dtype, *primals), (along, add(terms).astype(dtype))
