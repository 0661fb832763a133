"""PyTorch in float64 as the reference, with error bounds from dtype and number of terms."""

import contextlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

import jaxent

torch.set_num_threads(1)

DTYPES = ("float16", "bfloat16", "float32", "float64")

# For class probabilities a logit of -inf is the limit of a very negative one, where torch has 0 * -inf = NaN
# (see test_differences.py).
_LOWEST = -1e300


def x64(dtype):
    """The context in which JAX keeps `dtype` as it is."""
    return jax.enable_x64(True) if dtype in ("float64", "int64", "uint64") else contextlib.nullcontext()


def to_torch(array):
    """The same numbers in torch: floating ones in float64, integers as class indices."""
    array = np.asarray(array)
    wide = np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64
    return torch.tensor(array.astype(wide))


def torch_cross_entropy(logits, labels, *, axis=-1, ignore_index=-100, **options):
    """`functional.cross_entropy` with the class axis anywhere. `ignore_index=None` ignores nothing."""
    return _torch_loss(functional.cross_entropy, logits, labels, axis, ignore_index, options)


def torch_nll(log_probs, labels, *, axis=-1, ignore_index=-100, **options):
    """`functional.nll_loss` with the class axis anywhere. `ignore_index=None` ignores nothing."""
    return _torch_loss(functional.nll_loss, log_probs, labels, axis, ignore_index, options)


def _torch_loss(loss, scores, labels, axis, ignore_index, options):
    class_axis = min(1, scores.ndim - 1)
    scores = scores.movedim(axis, class_axis)
    if labels.is_floating_point():
        labels = labels.movedim(axis, class_axis)
    nobody = -(2**40)
    return loss(scores, labels, ignore_index=nobody if ignore_index is None else ignore_index, **options)


TORCH = {"cross_entropy": torch_cross_entropy, "nll": torch_nll}


def jax_value_and_grads(name, scores, labels, weight, cotangent, options):
    """The loss and its gradients: of the scores, and of the labels where these are probabilities."""
    return _value_and_grads(getattr(jaxent, name), scores, labels, weight, cotangent, options)


@partial(jax.jit, static_argnames=("function", "options"))
def _value_and_grads(function, scores, labels, weight, cotangent, options):
    loss = partial(function, weight=weight, **dict(options))
    if jnp.issubdtype(labels.dtype, jnp.floating):
        value, pullback = jax.vjp(loss, scores, labels)
    else:
        value, pullback = jax.vjp(lambda scores: loss(scores, labels), scores)
    return value, pullback(cotangent.astype(value.dtype))


def torch_value_and_grads(name, scores, labels, weight, cotangent, options):
    """What `jax_value_and_grads` should return, in float64."""
    scores, labels = to_torch(scores), to_torch(labels)
    soft = labels.is_floating_point()
    if soft:
        scores = scores.clamp(min=_LOWEST)
    inputs = [x.requires_grad_() for x in ((scores, labels) if soft else (scores,))]
    options = dict(options) | ({} if weight is None else {"weight": to_torch(weight)})
    value = TORCH[name](scores, labels, **options)
    return value, torch.autograd.grad(value, inputs, to_torch(cotangent))


def assert_close(got, expected, error, dtype):
    """`got` has `dtype` and lies within `error` of `expected`, after the one rounding to `dtype`."""
    info = ml_dtypes.finfo(dtype)
    assert got.dtype == dtype
    got = np.asarray(got).astype(np.float64)
    expected = np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    rounding = float(info.eps) * np.abs(expected) + float(info.smallest_subnormal)
    overflows = np.abs(expected) > min(float(info.max), -_LOWEST * 1e-10)
    expected = np.where(overflows, np.copysign(np.inf, expected), expected)
    with np.errstate(invalid="ignore"):
        far = ~((np.abs(got - expected) <= error + rounding) | (got == expected))
    far &= ~(np.isnan(got) & np.isnan(expected))
    assert not far.any(), (
        f"got {got[far]}, expected {expected[far]}, allowed {np.broadcast_to(error, far.shape)[far]}"
    )


def assert_matches_torch(name, scores, labels, *, axis=-1, weight=None, **options):
    """Value and gradients of `jaxent.<name>` equal torch's, for a fixed but uneven cotangent."""
    dtype = scores.dtype.name
    batch = np.delete(np.array(scores.shape), axis)
    shape = batch if options.get("reduction", "mean") == "none" else ()
    cotangent = np.linspace(0.5, 1.5, math.prod(shape), dtype=np.float32).reshape(shape)
    options = tuple(sorted(({"axis": axis} | options).items()))
    arguments = (name, scores, labels, weight, cotangent, options)
    with x64(dtype):
        value, grads = jax_value_and_grads(*arguments)
    expected, expected_grads = torch_value_and_grads(*arguments)

    loss_dtype = "float64" if dtype == "float64" else "float32"
    loss_error, *grad_errors = _errors(*arguments)
    assert_close(value, expected.detach(), loss_error, loss_dtype)
    if len(grads) == 2:  # that of the labels is -log p, infinite or 0 * inf at a class of probability 0
        possible = np.asarray(scores) > -np.inf
        grads = grads[0], np.where(possible, grads[1], 0)
        expected_grads = expected_grads[0], np.where(possible, expected_grads[1], 0)
    for grad, expected_grad, error in zip(grads, expected_grads, grad_errors[: len(grads)], strict=True):
        assert_close(grad, expected_grad, error, dtype)


def _errors(name, scores, labels, weight, cotangent, options):
    """Bounds for the loss, the gradient of the scores and the gradient of the labels.

    Every quantity is a sum of products (weight x target x log-probability, or probability) and carries at
    most one rounding per term of the sum and a few for each product, all relative to the largest of them.
    """
    options = dict(options)
    axis, reduction = options["axis"], options.get("reduction", "mean")
    soft = not np.issubdtype(labels.dtype, np.integer)
    reach = _reach(name, scores, axis)
    heaviest = 1.0 if weight is None else float(np.abs(np.asarray(weight, np.float64)).max(initial=0))
    mass = np.abs(np.asarray(labels, np.float64)).sum(axis) if soft else np.ones(reach.shape)
    mass = mass + options.get("label_smoothing", 0.0)

    roundings = 8 + scores.shape[axis] + reach.size
    relative = roundings * np.finfo("float64" if scores.dtype == "float64" else "float32").eps * heaviest
    if reduction == "mean":
        relative /= _denominator(labels, weight, reach.size, options, soft)
    loss = relative * mass * reach
    slopes = relative * np.broadcast_to(cotangent, reach.shape)
    of_scores, of_labels = slopes * mass, slopes * reach
    return (
        loss if reduction == "none" else loss.sum(),
        np.expand_dims(of_scores, axis),
        np.expand_dims(of_labels, axis),
    )


def _reach(name, scores, axis):
    """How large a log-probability of each example can be."""
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    if name == "nll":
        return np.abs(np.where(finite, scores, 0)).max(axis, initial=0)
    largest = np.where(finite, scores, -np.inf).max(axis, initial=-np.inf)
    smallest = np.where(finite, scores, np.inf).min(axis, initial=np.inf)
    return np.where(finite.any(axis), largest - smallest, 0) + math.log(max(scores.shape[axis], 2))


def _denominator(labels, weight, examples, options, soft):
    """What torch's mean divides by."""
    if soft:
        return max(examples, 1)
    labels = np.asarray(labels).astype(int)
    kept = labels[labels != options.get("ignore_index", -100)]
    weights = np.ones(kept.shape) if weight is None else np.asarray(weight, np.float64)[kept]
    return abs(weights.sum()) or 1.0


def torch_linear_cross_entropy(
    hidden, kernel, labels, bias=None, weight=None, *, softcap=None, z_loss=0.0, ignore_index=-100, reduction="mean",
    label_smoothing=0.0,
):  # fmt: skip
    """`functional.linear_cross_entropy` with the kernel transposed, and with softcap, z_loss and batch axes."""
    lead = hidden.shape[:-1]
    if soft := labels.is_floating_point():
        nobody, counts = None, torch.ones(lead, dtype=torch.float64)
    else:
        nobody = -(2**40) if ignore_index is None else ignore_index
        counts = (labels != nobody).double()
    options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    x, y = (hidden.flatten(0, -2), labels.flatten(0, len(lead) - 1)) if lead else (hidden, labels)
    logits = functional.linear(hidden, kernel.T, bias)
    if softcap is None:
        loss = functional.linear_cross_entropy(x, kernel.T, y, linear_bias=bias, ignore_index=nobody, **options)
    else:
        logits = softcap * torch.tanh(logits / softcap)
        x = logits.flatten(0, -2) if lead else logits
        loss = functional.cross_entropy(x, y, **options, **({} if soft else {"ignore_index": nobody}))
    if reduction == "none":
        loss = loss.reshape(lead)
    if z_loss:
        extra = z_loss * counts * torch.logsumexp(logits, -1) ** 2
        if reduction == "mean":
            extra /= _denominator(labels, weight, counts.numel(), {"ignore_index": ignore_index}, soft)
        loss = loss + (extra if reduction == "none" else extra.sum())
    return loss


def jax_linear_value_and_grads(*arrays, options):
    """The loss and its gradients with respect to hidden, kernel and bias."""
    return _linear_value_and_grads(jaxent.linear_cross_entropy, *arrays, options)


@partial(jax.jit, static_argnames=("function", "options"))
def _linear_value_and_grads(function, hidden, kernel, labels, bias, weight, cotangent, options):
    def loss(hidden, kernel, bias):
        return function(hidden, kernel, labels, bias=bias, weight=weight, **dict(options))

    value, pullback = jax.vjp(loss, hidden, kernel, bias)
    return value, pullback(cotangent.astype(value.dtype))


def assert_linear_matches_torch(hidden, kernel, labels, *, bias=None, weight=None, **options):
    """Value and gradients of `jaxent.linear_cross_entropy` equal torch's, for a fixed but uneven cotangent."""
    shape = hidden.shape[:-1] if options.get("reduction", "mean") == "none" else ()
    cotangent = np.linspace(0.5, 1.5, math.prod(shape), dtype=np.float32).reshape(shape)
    wide = "float64" if np.float64 in (hidden.dtype, kernel.dtype) else "float32"
    statics = tuple(sorted(options.items()))
    with x64(wide):
        value, grads = jax_linear_value_and_grads(hidden, kernel, labels, bias, weight, cotangent, options=statics)

    options.pop("chunk_size", None)
    arrays = [x for x in (hidden, kernel, bias) if x is not None]
    inputs = [to_torch(x).requires_grad_() for x in arrays]
    arguments = (*inputs[:2], to_torch(labels), *inputs[2:])
    options_of_torch = options if weight is None else options | {"weight": to_torch(weight)}
    expected = torch_linear_cross_entropy(*arguments, **options_of_torch)
    expected_grads = torch.autograd.grad(expected, inputs, to_torch(cotangent))

    loss_error, *errors = linear_errors(hidden, kernel, labels, bias, weight, cotangent, **options)
    assert_close(value, expected.detach(), loss_error, wide)
    for x, *of_x in zip(arrays, jax.tree.leaves(grads), expected_grads, errors[: len(arrays)], strict=True):
        assert_close(*of_x, x.dtype.name)


def linear_errors(
    hidden, kernel, labels, bias, weight, cotangent, *, softcap=None, z_loss=0.0, reduction="mean",
    label_smoothing=0.0, **options,
):  # fmt: skip
    """Bounds for the loss and the gradients of hidden, kernel and bias.

    The logits are sums of products and carry a rounding per term. The loss changes at most by its slope times that,
    the slope at most by itself times twice that (p does), and both carry the roundings that `_errors` counts. What
    multiplies the slopes in the gradients is exact, and they are rounded to half precision before.
    """
    soft = not np.issubdtype(labels.dtype, np.integer)
    with x64("float64"):
        operand = jnp.promote_types(hidden.dtype, kernel.dtype)
    eps = float(np.finfo(np.float64 if operand == np.float64 else np.float32).eps)
    h, k = (np.asarray(x).astype(np.float64) for x in (hidden, kernel))
    b = np.zeros(k.shape[1]) if bias is None else np.asarray(bias).astype(np.float64)
    logits = h @ k + b
    of_logits = eps * (k.shape[0] + 3) * (np.abs(h) @ np.abs(k) + np.abs(b)).max(-1, initial=0)
    curvature = 2.0
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        of_logits = of_logits + 4 * eps * softcap
        curvature += 2 / softcap
    reach = _reach("linear_cross_entropy", logits, -1)
    lse = np.abs(logits).max(-1, initial=0) + math.log(max(k.shape[1], 2))
    heaviest = 1.0 if weight is None else float(np.abs(np.asarray(weight).astype(np.float64)).max(initial=0))
    mass = np.abs(np.asarray(labels).astype(np.float64)).sum(-1) if soft else np.ones(reach.shape)
    mass = heaviest * (mass + label_smoothing)
    slope = 2 * mass + 2 * z_loss * lse
    relative = eps * (8 + k.shape[1] + reach.size)
    loss = slope * of_logits + relative * (mass * reach + z_loss * lse**2)
    of_slope = slope * (2 * relative + curvature * of_logits) + 2 * z_loss * of_logits
    if operand.itemsize < 4:
        half = ml_dtypes.finfo(operand)
        of_slope = of_slope + slope * float(half.eps) + k.shape[1] * float(half.smallest_subnormal)
    divisor = _denominator(labels, weight, reach.size, options, soft) if reduction == "mean" else 1.0
    if reduction != "none":
        loss = loss.sum() / divisor
    of_slope = np.broadcast_to(np.abs(cotangent).max(initial=0) / divisor, reach.shape) * of_slope
    of_hidden = of_slope[..., None] * np.abs(k).max(-1, initial=0)
    of_kernel = np.abs(h).reshape(-1, h.shape[-1]).T @ of_slope.reshape(-1, 1)
    return loss, of_hidden, of_kernel, of_slope.sum()
