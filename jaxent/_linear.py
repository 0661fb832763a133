"""Linear maps that say what their transpose is, so that reverse mode keeps their residuals and nothing else.

`jax.custom_derivatives.linear_call` does so too, but not under `vmap` and not with derivatives by its residuals.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from ._class_axis import vary
from ._kernels import Primitive, as_tuple, batch_first, compute_dtype

Map = Callable[..., Any]  # of residuals and operands, to an array or a tuple of them


def linear(forward: Map, transpose: Map, residuals: tuple[Any, ...], *operands: Any) -> Any:
    """`forward(*residuals, *operands)`, whose transpose is `transpose(*residuals, *cotangents)`.

    Both must be linear in what follows the residuals, and differentiable by the floating residuals.
    """
    every = (*residuals, *operands)
    out = _linear_p.bind(
        *residuals, *(vary(x, *every) for x in operands), forward=forward, transpose=transpose, count=len(residuals)
    )
    return out[0] if len(out) == 1 else tuple(out)


_linear_p = Primitive("jaxent_linear")
_linear_p.multiple_results = True


@_linear_p.def_impl
def _run(*arrays: Any, forward: Map, **_: Any) -> tuple[Any, ...]:
    return as_tuple(forward(*arrays))


@_linear_p.def_abstract_eval
def _abstract(*avals: Any, forward: Map, **_: Any) -> Any:
    return jax.make_jaxpr(forward)(*avals).out_avals


def _jvp(primals: Any, tangents: Any, *, count: int, **maps: Map) -> Any:
    bind = partial(_linear_p.bind, count=count, **maps)
    residuals, operands = primals[:count], primals[count:]
    out, terms = bind(*primals), []
    if not all(isinstance(t, ad.Zero) for t in tangents[count:]):
        terms.append(bind(*residuals, *map(ad.instantiate_zeros, tangents[count:])))
    moving = [i for i in range(count) if not isinstance(tangents[i], ad.Zero)]
    if moving:

        def of_moving(*values: Any) -> Any:
            every = dict(enumerate(residuals)) | dict(zip(moving, values, strict=True))
            return as_tuple(maps["forward"](*every.values(), *operands))

        # The value too, which may come out of the same pass.
        out, along = jax.jvp(of_moving, [residuals[i] for i in moving], [tangents[i] for i in moving])
        terms.append(along)
    return out, [sum(term[1:], term[0]) for term in zip(*terms, strict=True)]


def _transposed(cotangents: Any, *arrays: Any, forward: Map, transpose: Map, count: int) -> Any:
    residuals, operands = arrays[:count], arrays[count:]
    cotangents = map(ad.instantiate_zeros, cotangents)
    out = _linear_p.bind(*residuals, *cotangents, forward=transpose, transpose=forward, count=count)
    pairs = zip(out, operands, strict=True)
    return [None] * count + [_like(x, y.aval) if ad.is_undefined_primal(y) else None for x, y in pairs]


def _like(x: Any, aval: Any) -> Any:
    """A cotangent sharded as what it is the cotangent of, where types say how."""
    here, there = jax.typeof(x).sharding, aval.sharding
    return x if here.mesh.empty or here == there else jax.sharding.reshard(x, there)


def _batched(arrays: Any, dims: Any, *, forward: Map, transpose: Map, count: int) -> Any:
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    operands = [batch_first(x, d, size) for x, d in zip(arrays[count:], dims[count:], strict=True)]

    def of_batch(f: Map) -> Map:
        def mapped(*arrays: Any) -> Any:
            return jax.vmap(f, (*dims[:count], *(0 for _ in arrays[count:])))(*arrays)

        return mapped

    maps = {"forward": of_batch(forward), "transpose": of_batch(transpose)}
    out = _linear_p.bind(*arrays[:count], *operands, count=count, **maps)
    return out, [0] * len(out)


def _taylor(primals: Any, series: Any, **maps: Any) -> Any:
    return jet.jet(partial(_run, **maps), primals, series, factorial_scaled=False)


mlir.register_lowering(_linear_p, mlir.lower_fun(_run), cacheable=False)  # see _kernels
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transposed
batching.primitive_batchers[_linear_p] = _batched
jet.jet_rules[_linear_p] = _taylor


def times(factor: Any, x: Any) -> Any:
    """`factor * x` of equal shapes, where 0 times anything is 0: what has no weight adds nothing, not even a NaN.

    Unlike a `where` around the product, it has the derivative `x` by a factor of 0, too.
    """
    return linear(_times, _times, (x,), factor)


def _times(x: Any, factor: Any) -> Any:
    # Only what is not finite is left out, since the derivative by `x` has one by the factor in its turn.
    return factor * jnp.where((factor == 0.0) & ~jnp.isfinite(x), 0.0, x)


def sum_times(factor: Any, x: Any) -> Any:
    """The sum of `times` with one factor for all, in range even where the sum of `x` is not."""
    return linear(_sum_times, _sum_times, (x,), factor)


def _sum_times(x: Any, factor: Any) -> Any:
    total = jnp.sum(factor * x)
    return jnp.where((factor == 0.0) & ~jnp.isfinite(total), 0.0, total)


def inner(g: Any, t: Any) -> Any:
    """The sum of `g * t`, in at least float32, for a `g` that is kept as it is."""
    return linear(_inner, partial(_outer, t.dtype), (g,), t)


def _inner(g: Any, t: Any) -> Any:
    dtype = compute_dtype(g.dtype)
    return jnp.sum(g.astype(dtype) * t.astype(dtype))


def _outer(dtype: DTypeLike, g: Any, cotangent: Any) -> Any:
    return (cotangent * g.astype(cotangent.dtype)).astype(dtype)
