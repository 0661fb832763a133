"""The softmax family in exact arithmetic: mpmath, straight from the definitions, nothing shared with jaxent.

Every function takes one row of logits, reads its floats as exact numbers and returns float64.
"""

import functools

import mpmath
import numpy as np

# A loss of 1e-38 is the difference of two numbers near 1e4, so 42 digits cancel; 50 must be left.
mpmath.mp.dps = 100

TINY = np.finfo(np.float32).tiny


def _probabilities(x):
    return _cached_probabilities(np.float64(x).tobytes())


@functools.lru_cache(maxsize=1000)
def _cached_probabilities(data):
    powers = [mpmath.exp(mpmath.mpf(v)) for v in np.frombuffer(data).tolist()]
    total = mpmath.fsum(powers)
    return [power / total for power in powers], mpmath.log(total)


def _float64(values):
    return np.array([float(v) for v in values])


def _matrix(n, entry):
    return np.array([[float(entry(j, k)) for k in range(n)] for j in range(n)])


def softmax(x):
    return _float64(_probabilities(x)[0])


def log_softmax(x):
    logsumexp = _probabilities(x)[1]
    return _float64(mpmath.mpf(float(v)) - logsumexp for v in x)


def loss_and_gradient(x, label):
    """Cross-entropy of one row and its gradient, the probabilities minus the label's one-hot vector."""
    p, logsumexp = _probabilities(x)
    loss = float(logsumexp - mpmath.mpf(float(x[label])))
    return loss, _float64(v - (k == label) for k, v in enumerate(p))


def hessian(x):
    """Of the cross-entropy; the same for every label."""
    p, _ = _probabilities(x)
    return _matrix(len(p), lambda j, k: p[j] * ((j == k) - p[k]))


def log_softmax_jacobian(x):
    p, _ = _probabilities(x)
    return _matrix(len(p), lambda j, k: (j == k) - p[k])


def softmax_jacobian(x):
    return hessian(x)


def softmax_hessian(x):
    """Second derivatives [j, k, l] of the j-th probability by x_k and x_l."""
    p, _ = _probabilities(x)

    def entry(j, k, m):
        return p[j] * (((j == k) - p[k]) * ((j == m) - p[m]) - p[k] * ((k == m) - p[m]))

    n = range(len(p))
    return np.array([[[float(entry(j, k, m)) for m in n] for k in n] for j in n])


def entropy(x):
    p, logsumexp = _probabilities(x)
    return float(mpmath.fsum(q * (logsumexp - mpmath.mpf(float(v))) for q, v in zip(p, x, strict=True)))


def entropy_gradient(x):
    p, u = _relative_to_mean(x)
    return _float64(-q * v for q, v in zip(p, u, strict=True))


def entropy_hessian(x):
    p, u = _relative_to_mean(x)
    return _matrix(len(p), lambda j, k: -p[j] * ((j == k) * (u[j] + 1) - p[k] * (u[j] + u[k] + 1)))


def _relative_to_mean(x):
    """Probabilities, and how far each logit is above the mean that is weighted by them."""
    p, _ = _probabilities(x)
    mean = mpmath.fsum(q * mpmath.mpf(float(v)) for q, v in zip(p, x, strict=True))
    return p, [mpmath.mpf(float(v)) - mean for v in x]


def third_derivative(x):
    """Of the cross-entropy: the derivative of its Hessian, which is the softmax's second derivative."""
    return softmax_hessian(x)


def ulps(got, want):
    """Distance in units in the last place of a float32 near the true value."""
    return np.abs(np.float64(got) - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)


def relative_error(got, want, tiny=TINY):
    """Worst relative error where the true value is a normal float; the other entries may only underflow."""
    got, want = np.float64(got), np.asarray(want)
    normal = np.abs(want) >= tiny
    assert np.all(np.abs(got[~normal] - want[~normal]) <= tiny), "an underflowing entry is not tiny"
    assert np.all(np.isfinite(got))
    return float(np.max(np.abs(got - want)[normal] / np.abs(want[normal]), initial=0.0))
