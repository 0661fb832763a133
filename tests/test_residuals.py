"""What a gradient keeps between its forward and its backward pass, as JAX lists it: one array of the logits' size."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

pytestmark = pytest.mark.more(cases=1)

try:
    from jax.ad_checkpoint import saved_residuals
except ImportError:  # public is only print_saved_residuals, whose text would have to be parsed
    from jax._src.ad_checkpoint import saved_residuals

N, C, D = 64, 200, 16
ROW = 8  # numbers a row that may be kept beside
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
LABELS = np.arange(N, dtype=np.int32)
WEIGHT = np.linspace(0.5, 1.5, C, dtype=np.float32)
SOFT = np.full((N, C), 1 / C, np.float32)

FUNCTIONS = {
    "softmax": jaxent.softmax,
    "softmax of axis 0": partial(jaxent.softmax, axis=0),
    "softmax in float32": lambda x: jaxent.softmax(x, dtype=jnp.float32),
    "log_softmax": jaxent.log_softmax,
    "log_softmax in float32": lambda x: jaxent.log_softmax(x, dtype=jnp.float32),
    "nll of log_softmax": lambda x: jaxent.nll(jaxent.log_softmax(x), LABELS),
    "nll of log_softmax none": lambda x: jaxent.nll(jaxent.log_softmax(x), LABELS, weight=WEIGHT, reduction="none"),
    **{
        f"cross_entropy {reduction} {name}": partial(
            jaxent.cross_entropy, labels=LABELS, reduction=reduction, **options
        )
        for reduction in ("mean", "sum", "none")
        for name, options in {
            "": {},
            "label_smoothing": {"label_smoothing": 0.1},
            "z_loss": {"z_loss": 0.1},
            "weight": {"weight": WEIGHT},
            "ignore_index": {"ignore_index": 3},
            "xla": {"implementation": "xla"},
        }.items()
    },
}


def kept(f, *arrays):
    """Shapes and dtypes of what is kept: all that is of more than a few numbers a row, and how many such numbers."""
    large, numbers = [], 0
    for aval, _ in saved_residuals(f, *arrays):
        if math.prod(aval.shape) >= N * C // 2:
            large.append((aval.shape, aval.dtype))
        else:
            numbers += math.prod(aval.shape)
    return large, numbers


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_array_in_the_dtype_of_the_logits(name, dtype):
    large, numbers = kept(FUNCTIONS[name], jnp.ones((N, C), dtype))
    assert large == [((N, C), jnp.dtype(dtype))]
    assert numbers <= ROW * N + 3 * C


@DTYPES
@pytest.mark.parametrize("shape", [(N, C), (1, C)])
@pytest.mark.parametrize(
    "f",
    [
        jaxent.softmax,
        jaxent.log_softmax,
        partial(jaxent.cross_entropy, labels=LABELS),
        partial(jaxent.cross_entropy, labels=LABELS, reduction="none"),
    ],
)
def test_of_a_mask_what_the_caller_gave(f, shape, dtype):
    """And not once more in the shape of the logits."""
    where = jnp.asarray(np.random.default_rng(0).random(shape) < 0.9)
    large, _ = kept(lambda x, where: f(x, where=where), jnp.ones((N, C), dtype), where)
    assert sorted(map(str, large)) == sorted(
        map(str, [((N, C), jnp.dtype(dtype))] + [(shape, jnp.dtype(bool))] * (shape == (N, C)))
    )


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities(reduction, dtype):
    loss = partial(jaxent.cross_entropy, reduction=reduction)
    x, q = jnp.ones((N, C), dtype), jnp.asarray(SOFT, dtype)
    large, _ = kept(lambda x: loss(x, q), x)
    assert large in ([((N, C), jnp.dtype(dtype))], [((N, C), jnp.dtype(dtype))] * 2)
    large, _ = kept(loss, x, q)
    assert large == [((N, C), jnp.dtype(dtype))] * 2


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction, dtype):
    """The gradients of its arguments, or, where these wait for the cotangents, the arguments."""
    hidden, kernel, bias = jnp.ones((N, D), dtype), jnp.ones((D, C), dtype), jnp.ones(C, dtype)

    def loss(hidden, kernel, bias):
        return jaxent.linear_cross_entropy(hidden, kernel, LABELS, bias=bias, reduction=reduction, chunk_size=16)

    found = [(aval.shape, str(aval.dtype)) for aval, _ in saved_residuals(loss, hidden, kernel, bias)]
    wide = "float32" if dtype == "float16" and reduction == "mean" else dtype  # 1 / tokens underflows in float16
    wanted = [(x.shape, wide) for x in (hidden, kernel, bias)]
    assert sorted(entry for entry in found if entry[0] not in ((), (N,))) == sorted(wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("f", "outputs"),
    [(jaxent.softmax, 1), (jaxent.log_softmax, 1), (partial(jaxent.cross_entropy, labels=LABELS), 0)],
)
def test_a_scan_over_layers_keeps_one_array_a_layer(f, outputs, dtype):
    """What is kept there is multiplied by the layers: the scan's stacked outputs, in the forward loop's jaxpr."""
    layers = 7

    def run(x):
        def layer(x, _):
            out = f(x)
            return (x + out).astype(dtype) if outputs else x * (1 + out).astype(dtype), None

        return jax.lax.scan(layer, x, None, length=layers)[0]

    stacked = [aval for aval, _ in saved_residuals(run, jnp.ones((N, C), dtype)) if aval.shape == (layers, N, C)]
    # Of the product with the loss, the factor x itself is one more.
    assert [aval.dtype for aval in stacked] == [jnp.dtype(dtype)] * (1 if outputs else 2)
