"""Losses of a linear layer's outputs, of which only a chunk exists at a time: how arrays lie, and what is reduced."""

import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ._check import WeightArray
from ._class_axis import ClassAxis
from ._cross_entropy import Added, LossStats, scale_of, told
from ._linear import times
from ._linear_derivatives import single_losses, total, weighted
from ._linear_given import Arrays, Options, Teacher, compute_dtype, counts_of
from ._nll import Scale, read_labels

_SampleWeight = Float[Array, "..."] | None  # one per token


@partial(jax.jit, static_argnums=2)
def linear_losses(
    arrays: Arrays, sample_weight: WeightArray | None, options: Options
) -> Float[Array, "..."] | tuple[Float[Array, "..."], LossStats]:
    """Losses of tokens, or their scaled sum; and stats, where they are wanted."""
    arrays = jax.tree.map(_at_least_half, arrays)
    dtype, v = compute_dtype(arrays), None
    if arrays.teacher is not None and dtype.itemsize > 4:  # of one of the two, which are compared
        arrays = jax.tree.map(partial(_converted, dtype), arrays)
    if arrays.logit_scale is not None:
        arrays = arrays._replace(logit_scale=arrays.logit_scale.astype(dtype))
    if sample_weight is not None:
        v = jnp.broadcast_to(jnp.asarray(sample_weight, dtype), arrays.hidden.shape[:-1])
    if arrays.where is not None:  # without any class there is nothing to add
        classes = ClassAxis(0, options.classes.names)
        v = jnp.where(
            classes.sum(arrays.where) > 0, jnp.ones(arrays.hidden.shape[:-1], dtype) if v is None else v, 0.0
        )
    scale, empty = _scale(options, arrays, v)
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(arrays)]
    mesh = next((sharding.mesh for sharding in shardings if any(sharding.spec)), None)
    here = _on_device if mesh is None else partial(_across_devices, mesh)
    loss, stats = here(options, arrays, v, scale)
    loss += empty
    if stats is None:
        return loss
    counts = counts_of(options, arrays, None if v is None else v != 0.0)
    return loss, told(stats, jnp.ones((), bool) if counts is None else counts)


def _at_least_half(x: Any) -> Array:
    """Narrower floats in float32: matrix products of them differ from machine to machine."""
    x = jnp.asarray(x)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 16
    return x.astype(jnp.float32) if narrow else x


def _converted(dtype: jnp.dtype, x: Array) -> Array:
    """Floats in `dtype`."""
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _across_devices(
    mesh: AbstractMesh, options: Options, arrays: Arrays, v: _SampleWeight, scale: Float[Array, ""] | None
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Under explicit sharding: arrays tell where tokens and classes are, so each device loops over its own tokens."""
    of_hidden, of_kernel = (jax.typeof(x).sharding for x in (arrays.hidden, arrays.kernel))
    *lead, of_features = of_hidden.spec
    if of_features is not None or of_kernel.spec[0] is not None:
        raise ValueError(
            f"the feature axis of hidden and kernel must not be sharded, got shardings {of_hidden.spec} "
            f"and {of_kernel.spec}; jax.sharding.reshard gathers it"
        )
    token_names, class_names = _names(*lead), _names(of_kernel.spec[1])
    if set(token_names) & set(class_names):
        raise ValueError(
            f"hidden's tokens and kernel's classes must be sharded over different mesh axes, got shardings "
            f"{of_hidden.spec} and {of_kernel.spec}"
        )
    of_classes = PartitionSpec(of_kernel.spec[1])
    with_classes = arrays.labels.ndim > len(lead) and arrays.teacher is None
    of_labels = PartitionSpec(*lead, *(of_classes if with_classes else ()))
    specs = (of_hidden.spec, of_kernel.spec, of_classes, PartitionSpec(), of_classes, of_classes, of_labels)
    specs = [None if x is None else spec for x, spec in zip(arrays, specs, strict=False)]
    of_added = Added(*cast(Any, (None if x is None else PartitionSpec() for x in arrays.added)))
    of_teacher = None
    if arrays.teacher is not None:
        of_bias: Any = None if arrays.teacher.bias is None else of_classes
        of_teacher = Teacher(of_kernel.spec, of_bias)
    specs += [of_added, of_teacher]
    specs = tuple(specs), None if v is None else PartitionSpec(*lead)
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs)
    parts = jax.tree.map(jax.sharding.reshard, (tuple(arrays), v), shardings)
    options = options._replace(loss=options.loss._replace(axis=ClassAxis(1, class_names)))

    def part(parts: Any, scale: Array | None) -> tuple[Array, LossStats | None]:
        loss, stats = _on_device(options, Arrays(*parts[0]), parts[1], scale)
        return loss if scale is None else jax.lax.psum(loss, token_names), stats

    explicit = [
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    ]
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(specs, None if scale is None else PartitionSpec()),
        out_specs=(PartitionSpec(*lead) if scale is None else PartitionSpec(), PartitionSpec(*lead)),
        axis_names=set(explicit),
    )(parts, scale)


def _names(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in entries of a PartitionSpec."""
    return tuple(name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry))


def _scale(options: Options, arrays: Arrays, v: _SampleWeight) -> Scale:
    """What reduces the losses of all tokens."""
    dtype, classes = compute_dtype(arrays), options.classes.size(arrays.kernel)
    target = None
    if not jnp.issubdtype(arrays.labels.dtype, jnp.floating):
        ignored, names = options.loss.ignore_index, options.classes.names
        target = read_labels(arrays.labels, classes, arrays.weight, ignored, dtype, names, v)
    return scale_of(target, arrays.hidden.shape[:-1], classes, v, options.loss.reduction, dtype)


def _on_device(
    options: Options, arrays: Arrays, v: _SampleWeight, scale: Float[Array, ""] | None
) -> tuple[Float[Array, "..."], LossStats | None]:
    """Losses of this device's tokens, or their scaled sum; and stats, where they are wanted."""
    lead = arrays.hidden.shape[:-1]
    tokens = math.prod(lead)
    arrays = arrays._replace(
        hidden=arrays.hidden.reshape(tokens, arrays.hidden.shape[-1]),
        labels=arrays.labels.reshape(tokens, *arrays.labels.shape[len(lead) :]),
    )
    v = None if v is None else v.reshape(tokens)
    if scale is not None:
        loss, losses, known = total(options, arrays, scale if v is None else scale * v)
        losses = losses if v is None or losses is None else times(v, losses)
    else:
        losses, known = single_losses(options, arrays, None) if v is None else weighted(options, arrays, v)
        loss = losses.reshape(*lead, *losses.shape[1:])
    if known is None or losses is None:
        return loss, None
    return loss, LossStats(*(rows.reshape(lead) for rows in (losses, *known)))
