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
from ._kernels.label_sums import OWN
from ._label_loss import How, Parts, Row, is_easily_underflown, is_perturbed, unmoved
from ._linear import inner, linear, sum_times, times
from ._nll import expected_nll
from ._softmax import add, log_softmax_cotangent, softmax_tangent

Logits = Float[Array, "..."]


# With `stats`, both functions also give the loss of each row without its factor, its logsumexp and its largest class,
# which have no derivatives.


def expected_losses(how: How, stats: bool, x: Logits, q: Logits, s: Row) -> tuple[Row, Parts | None]:
    """The loss of each row."""
    return _expected(how, stats, False, x, q, s)


def expected_total(how: How, stats: bool, x: Logits, q: Logits, s: Row) -> tuple[Float[Array, ""], Parts | None]:
    """The sum of the losses of all rows."""
    return _expected(how, stats, True, x, q, s)


def _expected(how: How, stats: bool, summed: bool, x: Logits, q: Logits, s: Row) -> tuple[Array, Parts | None]:
    if not stats:
        return _linear_in_q(how, summed, x, q, s), None
    if not how.axis.names:
        return _losses(how, stats, summed, x, s, q)
    # Split classes have no kernels; the plain form of label_loss knows what is missing.
    fixed, q_fixed = jax.lax.stop_gradient((x, q))
    nobody = jnp.zeros(how.axis.rows(x.shape), jnp.int32)
    _, *known = kernels.label_loss(fixed, nobody, stats=True, terms=OWN, **how._asdict())
    losses = _linear_in_q(how, False, fixed, q_fixed, jnp.ones_like(s))
    return _linear_in_q(how, summed, x, q, s), (losses, *known)


def _linear_in_q(how: How, summed: bool, x: Logits, q: Logits, s: Row) -> Array:
    if how.axis.names:  # JAX knows how sums over devices are transposed
        log_p = kernels.log_softmax(x, dtype=s.dtype, **how._asdict())
        return _weighed(summed, s, expected_nll(log_p, q, how.axis))
    return linear(partial(_value, how, summed), partial(_surprises, how, q.dtype), (x, s), q)


def _weighed(summed: bool, s: Row, losses: Row) -> Array:
    """Losses with their factors, or with the one of all; or their sum."""
    if summed and not s.ndim:
        return sum_times(s, losses)
    losses = times(jnp.broadcast_to(s, losses.shape), losses)
    return jnp.sum(losses) if summed else losses


def _value(how: How, summed: bool, x: Logits, s: Row, q: Logits) -> Array:
    return _losses(how, False, summed, x, s, q)[0]


def _surprises(how: How, dtype: DTypeLike, x: Logits, s: Row, g: Array) -> Logits:
    """The transpose: `-g * s * log p`, and 0 where a class cannot be or a row has no factor."""
    log_p = kernels.log_softmax(x, dtype=s.dtype, **how._asdict())
    nothing = (how.axis.expand(s) == 0.0) | (log_p == -jnp.inf)
    return (how.axis.expand(-g * s) * jnp.where(nothing, 0.0, log_p)).astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _losses(how: How, stats: bool, summed: bool, x: Logits, s: Row, q: Logits) -> tuple[Array, Parts | None]:
    parts = _parts(how, stats, x, q)
    return _weighed(summed, s, parts[0]), parts if stats else None


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(how: How, stats: bool, summed: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, s, q), (x_dot, s_dot, q_dot) = primals, tangents
    out, terms = None, []
    if is_perturbed(x_dot) and summed and not is_easily_underflown(x.dtype):
        parts, gradient = expected_pass(how, x.dtype, x, q, s, stats=stats)
        out = _weighed(summed, s, parts[0]), parts if stats else None
        terms.append(inner(gradient, x_dot))
    elif is_perturbed(x_dot):
        along = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, q, s), x_dot)
        terms.append(jnp.sum(along) if summed else along)
    if is_perturbed(s_dot):
        terms.append(_weighed(summed, s_dot, _parts(how, stats, x, q)[0]))
    if is_perturbed(q_dot):
        terms.append(_linear_in_q(how, summed, x, q_dot, s))
    value, known = _losses(how, stats, summed, *primals) if out is None else out
    return (value, known), (add(terms), unmoved(known))


def _parts(how: How, stats: bool, x: Logits, q: Logits) -> Parts:
    return kernels.as_tuple(kernels.expected_loss(x, q, stats=stats, **how._asdict()))


def expected_pass(
    how: How, dtype: DTypeLike, x: Logits, q: Logits, s: Row, *, stats: bool = False
) -> tuple[Parts, Logits]:
    """The loss of each row without its factor, and the gradient with it in `dtype`."""
    loss, gradient, *known = kernels.expected_loss_and_gradient(x, q, s, dtype=dtype, stats=stats, **how._asdict())
    return (loss, *known), gradient


def _along(how: How, x: Logits, q: Logits, s: Row, t: Logits) -> Row:
    """The derivative along `t`."""
    return jnp.sum(expected_pass(how, s.dtype, x, q, s)[1] * t.astype(s.dtype), how.axis.index)


def _gradient(how: How, dtype: DTypeLike, x: Logits, q: Logits, s: Row, g: Row) -> Logits:
    """Its transpose."""
    return expected_pass(how, dtype, x, q, g * s)[1]


@kernels.expected_loss.defjvp
def _expected_loss_jvp(primals: Any, tangents: Any, *, stats: bool = False, **how: Any) -> tuple[Any, Row]:
    return kernels.expected_loss(*primals, stats=stats, **how), _along_both(How(**how), *primals, *tangents)


def _along_both(how: How, x: Logits, q: Logits, x_dot: Logits | None, q_dot: Logits | None) -> Row:
    one, terms = jnp.ones((), kernels.compute_dtype(x.dtype)), []
    if x_dot is not None:
        along = linear(partial(_along, how), partial(_gradient, how, x.dtype), (x, q, one), x_dot)
        terms.append(how.axis.total(along))
    if q_dot is not None:
        terms.append(_linear_in_q(how, False, x, q_dot, one))
    return add(terms)


@kernels.expected_loss_and_gradient.defjvp
def _expected_pass_jvp(
    primals: Any, tangents: Any, *, dtype: DTypeLike, stats: bool = False, **how: Any
) -> tuple[Any, Any]:
    (x, q, s), (x_dot, q_dot, s_dot) = primals, tangents
    axis, terms = how["axis"], []
    along = jnp.zeros(axis.rows(x.shape), s.dtype)
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
    out = kernels.expected_loss_and_gradient(*primals, dtype=dtype, stats=stats, **how)
    return out, (along, add(terms).astype(dtype))
