"""The Pallas kernels, interpreted on the CPU: against the plain form, and in the tests of everybody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxent._class_axis import ClassAxis
from jaxent._kernels import gpu, tpu, xla
from jaxent._kernels.rows import FUNCTIONS

# One row; rows that fill no tile, in one batch and in several; several groups of a block, and a last one in part;
# a part of a part, one and several, and steps of them.
SHAPES = [(257,), (17, 1009), (3, 21, 300), (1500, 256), (9, 5000)]
DTYPES = ["float32", "bfloat16"]
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for machine in (tpu, gpu):
        monkeypatch.setattr(machine, "INTERPRET", True)
    monkeypatch.setattr(tpu, "STEP", 32)  # shorter programs, and loops at fewer classes
    monkeypatch.setattr(gpu, "BLOCK", 1024)


def _arrays(shape, dtype):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape)
    x[..., 0] += np.where(rng.random(shape[:-1]) < 0.5, 30.0, 0.0)  # a dominant class
    odd = np.where(rng.random(shape) < 0.2, x.max(-1, keepdims=True), x)  # ties
    odd[rng.random(shape) < 0.1] = -np.inf
    odd[rng.random(shape) < 0.3 / shape[-1]] = np.nan
    odd[rng.random(shape) < 0.3 / shape[-1]] = np.inf
    odd[rng.random(shape[:-1]) < 0.2] = -np.inf
    x = np.where(rng.random((*shape[:-1], 1)) < 0.5, odd, x)
    rows = shape[:-1]
    return {
        "x": x.astype(dtype),
        "t": (rng.random(shape) * (rng.random(shape) < 0.7)).astype(dtype),
        "y": rng.integers(-1, shape[-1] + 1, rows).astype(np.int32),
        "r": (rng.standard_normal(rows) * (rng.random(rows) < 0.8)).astype(np.float32),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("machine", [tpu, gpu], ids=["tpu", "gpu"])
def test_it_computes_what_the_plain_form_does(machine, shape, dtype):
    arrays, axis = _arrays(shape, dtype), ClassAxis(len(shape) - 1)
    for name, function in FUNCTIONS.items():
        # What a loss's pullback asks for: half precision in, and float32 out.
        out = "float32" if len(shape) == 1 else dtype
        options = {"dtype": jnp.dtype(out)} if function.entry else {}
        args = [jnp.asarray(arrays[a]) for a in function.arguments]
        assert machine.refusal(name, *args, axis=axis, **options) is None
        got = jax.jit(functools.partial(getattr(machine, name), axis=axis, **options))(*args)
        want = getattr(xla, name)(*args, axis=axis, **options)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape), name
            g, w = np.float64(g), np.float64(w)
            # Sums of terms of both signs are as exact as their largest term is.
            scale, ulp = (
                np.max(np.abs(w), where=np.isfinite(w), initial=0.0),
                ULP[out if g.shape == shape else "float32"],
            )
            np.testing.assert_allclose(g, w, rtol=16 * ulp, atol=8 * max(ulp, 2.0**-23) * scale, err_msg=name)
