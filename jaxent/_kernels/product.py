"""Sums of exponentials of logits that are a matrix product, and the exponentials, of classes that lie on one device.

Each function is a JAX primitive, as the row functions are, so that a GPU's lowering can take a kernel that never
writes logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from .._class_axis import ClassAxis
from . import Primitive, is_old_gpu, lower_kernel, module_of, refusal_of_place
from .xla import compute_dtype

_CLASSES = ClassAxis(1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """What makes logits of hidden states."""

    weight: Float[Array, "features classes"] | Float[Array, "classes features"]
    bias: Float[Array, " classes"] | None
    scale: Float[Array, ""] | None = None
    by_class: bool = field(default=False, metadata={"static": True})  # a row of `weight` is a class
    filled: int = field(default=0, metadata={"static": True})  # so many of the last classes are none

    @property
    def kernel(self) -> Float[Array, "features classes"]:
        """What multiplies hidden states."""
        # Behind a barrier, or it is the transpose that a loop takes.
        return jax.lax.optimization_barrier(self.weight).T if self.by_class else self.weight

    def logits(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens classes"]:
        """`scale * (x @ kernel + bias)`, accumulated in at least float32."""
        return self.scaled(self.unscaled(x))

    def unscaled(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens classes"]:
        """`x @ kernel + bias`."""
        dtype = compute_dtype(x.dtype)
        logits = jax.lax.dot_general(x, self.kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
        return logits if self.bias is None else logits + self.bias.astype(dtype)[None]

    def scaled(self, x: Array) -> Array:
        """`scale * x`."""
        return x if self.scale is None else self.scale * x

    def classes(self, begin: Any, size: int) -> "Layer":
        """Some of the classes; of a layer that is not `by_class`."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=size)
        return replace(self, weight=cut(self.weight, axis=1), bias=None if self.bias is None else cut(self.bias))

    def shape(self, x: Float[Array, "tokens features"]) -> jax.ShapeDtypeStruct:
        """Of `logits`, but for what is `filled` up."""
        classes = self.weight.shape[0 if self.by_class else 1] - self.filled
        return jax.ShapeDtypeStruct((x.shape[0], classes), compute_dtype(x.dtype))


def dot(a: Array, b: Array, a_axis: int, b_axis: int, dtype: jnp.dtype) -> Array:
    """Product of two matrices, contracting the given axes, accumulated and returned in `dtype`."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


class Sums(NamedTuple):
    """Of some classes, relative to a number for each token."""

    label: Float[Array, "tokens 1"]  # its logit less that number; 0 where it is not one of them
    others: Float[Array, "tokens 1"]  # exponentials of all but the label
    total: Float[Array, "tokens 1"]  # of the logits less that number
    e: Float[Array, "tokens classes"] | None  # the exponentials, 0 where a token is said not to count


def sums_of_logits(
    logits: Float[Array, "tokens classes"],
    reference: Float[Array, "tokens 1"],
    y: Integer[Array, " tokens"],
    counts: Bool[Array, " tokens"] | None,
    stored: DTypeLike | None,
) -> Sums:
    """Of logits that there are; exponentials if they are to be `stored`. `y` counts from the first class here."""
    d = logits - reference
    label, e = _CLASSES.one_hot(y, d), jnp.exp(d)
    of_label, others = _CLASSES.sum(jnp.where(label, d, 0.0)), _CLASSES.sum(jnp.where(label, 0.0, e))
    e = e if counts is None else jnp.where(_CLASSES.expand(counts), e, 0.0)
    # Behind a barrier, or the compiler would keep logits in float32 instead.
    e = None if stored is None else jax.lax.optimization_barrier(e.astype(stored))
    return Sums(of_label, others, _CLASSES.sum(d), e)


def _plain_sums(layer: Layer, x: Array, reference: Array, y: Array, counts: Any, *, stored: Any) -> Sums:
    return sums_of_logits(layer.logits(x), reference, y, counts, stored)


def _plain_maxima(layer: Layer, x: Array) -> Float[Array, "tokens 1"]:
    return _CLASSES.max(layer.logits(x))


KERNELS = {"cuda": "jaxent._kernels.gpu_product"}  # by platform: functions of the same names and arguments


def fit(x: Any, weight: Any) -> bool:
    """Whether a kernel may serve: products of bfloat16 and, as a GPU rounds them by default, of float32.

    Of features in words of 16 bytes.
    """
    features = x.shape[1]
    whole = isinstance(features, int) and features % 8 == 0 < features
    rounded = x.dtype == jnp.float32 and default_precision() is None
    return x.dtype == weight.dtype and (rounded or x.dtype == jnp.bfloat16) and whole and not is_old_gpu()


def missing_classes(classes: int, dtype: DTypeLike) -> int:
    """How many it wants more: of bfloat16 whole words, or it could not copy ahead, nor XLA multiply what is odd."""
    return -classes % 8 if dtype == jnp.bfloat16 else 0


def default_precision() -> str | None:
    """What somebody asks of products: None is as the machine would."""
    config: Any = jax.config
    return config.jax_default_matmul_precision


def goes_alone(x: Array) -> bool:
    """Whether the program is for one device, or each goes by itself: nobody else gets a kernel, see `_kernels`."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jax.device_count() == 1
    return all(n == 1 or kind == AxisType.Manual for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))


def _function(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` as a primitive of the leaves of its arguments."""
    primitive = Primitive(f"jaxent_product_{name}")
    primitive.multiple_results = True

    def form(
        f: Callable[..., Any], *leaves: Any, tree: Any, batches: Sequence[Any], precision: Any, **options: Any
    ) -> Any:
        def run(*leaves: Any) -> tuple[Any, ...]:
            with jax.default_matmul_precision(precision):  # of when it was called, which may be over
                return tuple(jax.tree.leaves(f(*jax.tree.unflatten(tree, leaves), **options)))

        for dims in batches:
            run = jax.vmap(run, dims)
        return run(*leaves)

    @cache  # several programs trace the same
    def abstract(*avals: Any, **params: Any) -> Any:
        return jax.make_jaxpr(partial(form, plain, **params))(*avals).out_avals

    def batched(leaves: Any, dims: Any, *, batches: Sequence[Any], **params: Any) -> Any:
        out = primitive.bind(*leaves, batches=(*batches, tuple(dims)), **params)
        return out, [0] * len(out)

    def along(primals: Any, tangents: Any, **params: Any) -> Any:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def run(*some: Any) -> Any:
            leaves = dict(enumerate(primals)) | dict(zip(moving, some, strict=True))
            return form(plain, *leaves.values(), **params)

        return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])

    def lower(context: mlir.LoweringRuleContext, *leaves: Any, **params: Any) -> Any:
        platforms = context.platforms or context.module_context.platforms
        file = KERNELS.get(platforms[0]) if len(platforms) == 1 else None
        kernels = None if file is None or refusal_of_place(context, _CLASSES) else module_of(file)
        if kernels is None:
            return mlir.lower_fun(partial(form, plain))(context, *leaves, **params)

        def chosen(layer: Layer, x: Array, *others: Any, **options: Any) -> Any:
            f = getattr(kernels, name) if kernels.serves(layer, x) else plain
            return f(layer, x, *others, **options)

        return lower_kernel(partial(form, chosen), context, *leaves, **params)

    primitive.def_impl(partial(form, plain))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = along  # by the loops and checkpoints of a first derivative, see `_kernels`
    mlir.register_lowering(primitive, lower, cacheable=False)  # as those of row functions

    def bound(*arguments: Any, **options: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(arguments)
        return primitive.bind(*leaves, tree=tree, batches=(), precision=default_precision(), **options)

    return bound


_maxima = _function("maxima", _plain_maxima)
_sums = _function("sums", _plain_sums)


def product_maxima(layer: Layer, x: Float[Array, "tokens features"]) -> Float[Array, "tokens 1"]:
    """The largest logit of each token."""
    return _maxima(layer, x)[0]


def product_sums(
    layer: Layer,
    x: Float[Array, "tokens features"],
    reference: Float[Array, "tokens 1"],
    y: Integer[Array, " tokens"],
    counts: Bool[Array, " tokens"] | None,
    stored: DTypeLike | None,
) -> Sums:
    """`sums_of_logits`, by a kernel that never writes these where there is one."""
    own, others, total, *e = _sums(layer, x, reference, y, counts, stored=stored)
    return Sums(own, others, total, e[0] if e else None)
