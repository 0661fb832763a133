r"""How much two softmaxes of the same classes differ: plain forms of row functions, as in xla.py.

Of a student's logits $x$ and a teacher's $t$, both divided by a temperature, $q$ and $p$ are the softmaxes. With
$u_k = x_k - t_k$ less the mean of these under $p$,

$$\mathrm{KL}(p, q) = \log \sum_k p_k e^{u_k} = \log \Big(1 + \sum_k p_k (e^{u_k} - 1 - u_k)\Big), \qquad
\log \frac{q_k}{p_k} = u_k - \mathrm{KL}(p, q).$$

No term of the sum is negative. In $\sum_k p_k (\log p_k - \log q_k)$, where both nearly agree, nearly all cancels.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._class_axis import ClassAxis
from .xla import Logits, Row, log_softmax, softmax, wide

_CLOSE = 0.25  # of a logarithm of a ratio: below, results are sums of terms that do not cancel


def log_ratio(x: Logits, teacher: Logits, *, axis: ClassAxis, temperature: float) -> Logits:
    r"""$\log (q_k / p_k)$; 0 of what neither thinks possible."""
    return _compare(x, teacher, axis, temperature).v


def difference(x: Logits, teacher: Logits, *, axis: ClassAxis, temperature: float) -> Logits:
    r"""$q_k - p_k$."""
    p, q, v, _ = _compare(x, teacher, axis, temperature)
    return jnp.where(jnp.abs(v) < _CLOSE, p * jnp.expm1(v), q - p)


def divergence(x: Logits, teacher: Logits, *, axis: ClassAxis, temperature: float, beta: float) -> Row:
    r"""$\beta \mathrm{KL}(p, r) + (1 - \beta) \mathrm{KL}(q, r)$ with $r = \beta p + (1 - \beta) q$.

    At the ends it is something else by definition: $\mathrm{KL}(p, q)$ for 0, $\mathrm{KL}(q, p)$ for 1. Between, it
    is the sum of $p_k f(q_k / p_k)$ for a convex $f$ that is 0 at 1, as is its derivative: no term is
    negative either.
    """
    if beta in (0.0, 1.0):
        pair = (x, teacher) if beta == 0.0 else (teacher, x)
        return axis.squeeze(_compare(*pair, axis, temperature).kl)
    p, q, v, _ = _compare(x, teacher, axis, temperature)
    a, close = 1.0 - beta, jnp.abs(v) < _CLOSE
    small = jnp.where(close, v, 0.0)
    y, of_mixture = jnp.expm1(small), log_of_mixture(small, beta)
    excess = _excess(of_mixture)
    f = a * beta * y**2 + beta * excess + a * (1.0 + y) * (excess - _excess(small))
    large = -beta * p * log_of_mixture(v, beta) + a * q * log_of_student(v, beta)
    return axis.squeeze(axis.sum(jnp.where(close, p * f, large)))


def log_of_mixture(v: Logits, beta: float) -> Logits:
    r"""$\log (r_k / p_k)$, of $v_k = \log (q_k / p_k)$."""
    a, v = 1.0 - beta, _finite(v)
    close = jnp.abs(v) < _CLOSE
    far = jnp.logaddexp(math.log(beta), math.log(a) + jnp.where(close, 1.0, v))
    return jnp.where(close, jnp.log1p(a * jnp.expm1(jnp.where(close, v, 0.0))), far)


def log_of_student(v: Logits, beta: float) -> Logits:
    r"""$\log (q_k / r_k)$."""
    return -log_of_mixture(-v, 1.0 - beta)


def _finite(v: Logits) -> Logits:
    """A logarithm that multiplies a probability of 0 where it was infinite."""
    return jnp.clip(v, -1e4, 1e4)


class _Compared(NamedTuple):
    p: Logits
    q: Logits
    v: Logits  # log(q / p)
    kl: Row  # KL(p, q), keeps the axis


def _compare(x: Logits, teacher: Logits, axis: ClassAxis, temperature: float) -> _Compared:
    x, teacher = wide(x), wide(teacher)
    p, q = (softmax(y / temperature, axis=axis, dtype=y.dtype) for y in (teacher, x))
    first, largest = axis.max(teacher), axis.max(x)
    # Relative to the teacher's first choice, whose own difference is then 0, however much of the probability it has;
    # subtracted before they are divided, so that the temperature rounds no difference.
    d = jnp.where((x == -jnp.inf) & (teacher == -jnp.inf), 0.0, x - teacher)
    own = axis.max(jnp.where(teacher == first, d, -jnp.inf))
    own = jnp.where(jnp.isfinite(own), own, 0.0)
    d = jnp.where(axis.recognised((teacher == first) & (d == own)), 0.0, d - own) / temperature
    mean = axis.sum(jnp.where(p > 0.0, p * d, 0.0))
    u = d - mean
    near = axis.sum(jnp.where(p > 0.0, p * _excess(u), 0.0))
    total, of_teacher = (axis.sum(jnp.exp((y - m) / temperature)) for y, m in ((x, largest), (teacher, first)))
    far = jnp.log(total) + (largest - first - own) / temperature - jnp.log(of_teacher) - mean
    missed = axis.sum(jnp.where(p > 0.0, 0.0, q))  # which the sum that is near 1 lacks
    kl = jnp.where((near < 1.0) & (missed < 0.5), jnp.log1p(near) - jnp.log1p(-missed), far)
    log_q, log_p = (log_softmax(y / temperature, axis=axis, dtype=y.dtype) for y in (x, teacher))
    direct = jnp.where((q == 0.0) & (p == 0.0), 0.0, log_q - log_p)
    return _Compared(p, q, jnp.where(jnp.isfinite(u) & jnp.isfinite(kl), u - kl, direct), kl)


def _excess(u: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""$e^u - 1 - u$, by its series where that is small."""
    close = jnp.abs(u) < 0.5
    z = jnp.where(close, u, 0.0)
    series = jnp.ones_like(z)
    for k in range(16 if u.dtype.itemsize > 4 else 9, 2, -1):
        series = 1.0 + z / k * series
    return jnp.where(close, 0.5 * z**2 * series, jnp.expm1(u) - u)
