"""Cross-entropy of class probabilities, with a rule of its own for the gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._class_axis import ClassAxis
from ._nll import expected_nll, known_terms
from ._softmax import (
    ALMOST_HALF,
    dominant_class,
    is_perturbed,
    log_softmax_core,
    log_softmax_parts,
    softmax_core,
    softmax_tangent,
    to_compute_dtype,
)

# With the mass Q, the sum of q, the gradient is Q p_k - q_k. Where a class has more than half of the probability,
# that rounds away what p and q leave to the others, so it takes the q of the others minus their share of Q.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def expected_loss(x: Float[Array, "..."], q: Float[Array, "..."], axis: ClassAxis) -> Float[Array, "..."]:
    """`-sum(q * log_p)` of each example, where 0 * -inf counts as 0."""
    return expected_nll(log_softmax_core(x, axis), q, axis)


@partial(expected_loss.defjvp, symbolic_zeros=True)
def _expected_loss_jvp(
    axis: ClassAxis, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    loss, gradient = _loss_and_gradient(*primals, axis)
    return loss, _tangent(gradient, *primals, *tangents, axis)


def _tangent(gradient: Array, x: Array, q: Array, x_dot: Any, q_dot: Any, axis: ClassAxis) -> Array:
    terms = []
    if is_perturbed(x_dot):
        terms.append(axis.sum(gradient * to_compute_dtype(x_dot)))
    if is_perturbed(q_dot):
        terms.append(-axis.sum(known_terms(log_softmax_core(x, axis), q) * q_dot))
    return sum(terms[1:], terms[0])


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _loss_and_gradient(
    x: Float[Array, "..."], q: Float[Array, "..."], axis: ClassAxis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    parts = log_softmax_parts(x, axis, True)
    dominant = dominant_class(x, parts, axis)
    loss, q = expected_nll(parts.log_p, q, axis), to_compute_dtype(q)
    mass = axis.sum(q, keepdims=True)
    of_dominant = axis.sum(jnp.where(dominant, 0.0, q), keepdims=True) - mass * parts.rest
    # As it is; without this select, XLA would write the sum out for all classes.
    of_dominant = jnp.where(parts.rest < ALMOST_HALF, of_dominant, 0.0)
    return loss, jnp.where(dominant, of_dominant, mass * parts.p - q)


@partial(_loss_and_gradient.defjvp, symbolic_zeros=True)
def _loss_and_gradient_jvp(
    axis: ClassAxis, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (x, q), (x_dot, q_dot) = primals, tangents
    loss, gradient = _loss_and_gradient(x, q, axis)
    p = softmax_core(to_compute_dtype(x), axis)
    terms = []
    if is_perturbed(x_dot):
        mass = axis.sum(to_compute_dtype(q), keepdims=True)
        terms.append(mass * softmax_tangent(p, to_compute_dtype(x_dot), axis))
    if is_perturbed(q_dot):
        q_dot, dominant = to_compute_dtype(q_dot), p > 0.5
        mass_dot = axis.sum(q_dot, keepdims=True)
        rest = axis.sum(jnp.where(dominant, 0.0, p), keepdims=True)
        of_dominant = axis.sum(jnp.where(dominant, 0.0, q_dot), keepdims=True) - rest * mass_dot
        terms.append(jnp.where(dominant, of_dominant, p * mass_dot - q_dot))
    return (loss, gradient), (_tangent(gradient, x, q, x_dot, q_dot, axis), sum(terms[1:], terms[0]))
