"""Losses of a linear layer's outputs, of which only a chunk exists at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ._check import WeightArray
from ._chunks import (
    ENOUGH,
    SHARE,
    Chunks,
    block_of_classes,
    chunk_size_for_memory,
    chunk_size_in_caches,
    everywhere,
    fit_at_once,
    is_one_chunk,
    packed_chunks,
    pays_to_walk_twice,
    strided_chunks,
    unseen_parts,
)
from ._class_axis import ClassAxis, vary
from ._cross_entropy import Added, LossOptions, LossStats, Mixture, mixture, read_target, scale_of, told
from ._distillation import Divergence, divergences, divergences_and_gradient
from ._entropy import entropies, entropies_and_gradient
from ._kernels import are_native
from ._kernels.chip import tpu
from ._kernels.product import Layer, dot, fit, goes_alone
from ._label_loss import How, is_easily_underflown, is_perturbed, mixed, unmoved
from ._linear import inner, linear, times
from ._nll import Scale, counting, read_labels
from ._product_divergence import Pair, Tokens, product_divergences_and_gradients
from ._product_loss import (
    Center,
    Gradient,
    center,
    dtype_of_exponentials,
    lies_by_class,
    product_losses,
    product_losses_and_gradient,
    product_losses_and_gradients,
)


class Options(NamedTuple):
    """What is compiled in."""

    loss: LossOptions
    softcap: float | None
    chunk_size: int | None
    entropy: bool = False  # beside each loss, in an axis of two; for `reduction="none"`
    divergence: Divergence | None = None  # from a teacher, in place of the loss of labels

    def rows(self, tokens: Any) -> tuple[Any, ...]:
        """The shape of what is known of so many tokens."""
        return (tokens, 2) if self.entropy else (tokens,)

    @property
    def classes(self) -> ClassAxis:
        return self.loss.axis

    @property
    def how(self) -> How:
        return How(self.loss.axis, self.loss.implementation)


class Teacher(NamedTuple):
    """The last layer of another model."""

    kernel: Float[Array, "features classes"]
    bias: Float[Array, " classes"] | None


class Arrays(NamedTuple):
    """What is not. `hidden` and `labels` have a row per token; with a teacher, labels are its hidden states."""

    hidden: Float[Array, "..."]
    kernel: Float[Array, "features classes"]
    bias: Float[Array, " classes"] | None
    logit_scale: Float[Array, ""] | None
    where: Bool[Array, " classes"] | None
    weight: Float[Array, " classes"] | None
    labels: Shaped[Array, "..."]
    added: Added
    teacher: Teacher | None = None


class _Gradients(NamedTuple):
    """Of a sum of losses, accumulated in at least float32 and kept as `_kept` says; None where it is not wanted."""

    hidden: Float[Array, "tokens features"] | None
    kernel: Float[Array, "features classes"] | None
    bias: Float[Array, " classes"] | None
    logit_scale: Float[Array, ""] | None


_SHARE_OF_PAIRS = 0.05  # of one model's logits, what is held of both models' at most
_Wanted = tuple[bool, bool, bool, bool]
_NOTHING: _Wanted = (False, False, False, False)
_SampleWeight = Float[Array, "..."] | None  # one per token
_OfRows = Float[Array, " size"] | None


class _Known(NamedTuple):
    """Of each token beside its loss; 0 of those that do not count. It has no derivatives."""

    logsumexp: Float[Array, " tokens"]
    predicted: Integer[Array, " tokens"]


@partial(jax.jit, static_argnums=2)
def linear_losses(
    arrays: Arrays, sample_weight: WeightArray | None, options: Options
) -> Float[Array, "..."] | tuple[Float[Array, "..."], LossStats]:
    """Losses of tokens, or their scaled sum; and stats, where they are wanted."""
    arrays = jax.tree.map(_at_least_half, arrays)
    dtype, v = _compute_dtype(arrays), None
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
    counts = _counts(options, arrays, None if v is None else v != 0.0)
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
    dtype, classes = _compute_dtype(arrays), options.classes.size(arrays.kernel)
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
        loss, losses, known = _total(options, arrays, scale if v is None else scale * v)
        losses = losses if v is None or losses is None else times(v, losses)
    else:
        losses, known = _losses(options, arrays, None) if v is None else _weighted(options, arrays, v)
        loss = losses.reshape(*lead, *losses.shape[1:])
    if known is None or losses is None:
        return loss, None
    return loss, LossStats(*(rows.reshape(lead) for rows in (losses, *known)))


def _compute_dtype(arrays: Arrays) -> jnp.dtype:
    of_teacher = () if arrays.teacher is None else (arrays.labels, arrays.teacher.kernel)
    return jnp.promote_types(jnp.result_type(arrays.hidden, arrays.kernel, *of_teacher), jnp.float32)


# Two functions of the arrays: the losses one by one, and their scaled sum. The rules of both are loops in which the
# logits' gradient is made and used up chunk by chunk. The sum knows its cotangent but for a factor, so its gradients
# come together with the losses: three matrix products in all. The single losses wait for their cotangents and then
# make the logits anew: four. Tokens that are not `live`, where that is given, are as good as ignored: those of weight
# 0, unless the derivative by their weight, which is their loss, is wanted. Beside the losses they give what else is
# known of each token, where that is wanted, and beside the sum the losses then, too.

_Live = Bool[Array, " tokens"] | None


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(
    options: Options, arrays: Arrays, scale: Float[Array, ""] | Float[Array, " tokens"]
) -> tuple[Float[Array, ""], Float[Array, " tokens"] | None, _Known | None]:
    """`sum(scale * losses)`."""
    losses, known = _losses(options, arrays, _live(scale))
    return _scaled_sum(scale, losses), None if known is None else losses, known


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(options: Options, primals: tuple[Arrays, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    arrays, scale = primals
    arrays_dot, scale_dot = tangents
    live = None if is_perturbed(scale_dot) else _live(scale)
    if _only_by_ad(arrays_dot):
        return _with_known(*_jvp_by_ad(partial(_sweep_total, options, live), primals, tangents))
    wanted, linear_dot = _wanted(arrays_dot)
    losses, known, gradients = _losses_and_gradients(
        options, wanted, arrays, jnp.broadcast_to(scale, arrays.hidden.shape[:1]), live
    )
    terms = [inner(g, t) for g, t in zip(jax.tree.leaves(gradients), linear_dot, strict=True)]
    tangent = options.classes.total(sum(terms, jnp.zeros((), losses.dtype)))
    if is_perturbed(scale_dot):
        tangent += _scaled_sum(scale_dot, losses)
    return _with_known(_scaled_sum(scale, losses), tangent, (None if known is None else losses, known))


def _with_known(out: Array, tangent: Array, known: tuple[Any, ...]) -> tuple[Any, Any]:
    """What a rule returns."""
    return (out, *known), (tangent, *unmoved(known))


def _live(scale: Float[Array, ""] | Float[Array, " tokens"]) -> _Live:
    return scale != 0.0 if scale.ndim else None


def _scaled_sum(scale: Float[Array, ""] | Float[Array, " tokens"], losses: Float[Array, " tokens"]) -> Array:
    return jnp.sum(times(scale, losses)) if scale.ndim else scale * jnp.sum(losses)


def _times(v: Float[Array, " tokens"], losses: Float[Array, "tokens ..."]) -> Array:
    return times(jnp.broadcast_to(_beside(losses, v), losses.shape), losses)


def _beside(rows: Shaped[Array, "tokens ..."], x: Shaped[Array, " tokens"]) -> Array:
    """`x` as it broadcasts to rows."""
    return x.reshape(x.shape + (1,) * (rows.ndim - 1))


def _kept(gradient: Array, dtype: DTypeLike) -> Array:
    """The gradient as it waits for its cotangent: in the dtype of what it is of, if that has the range."""
    return gradient if is_easily_underflown(dtype) else gradient.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted(
    options: Options, arrays: Arrays, v: Float[Array, " tokens"]
) -> tuple[Float[Array, "tokens ..."], _Known | None]:
    """The loss of each token, times its weight."""
    losses, known = _losses(options, arrays, _live(v))
    return _times(v, losses), known


@partial(_weighted.defjvp, symbolic_zeros=True)
def _weighted_jvp(options: Options, primals: tuple[Arrays, Array], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    live = None if is_perturbed(tangents[1]) else _live(primals[1])

    def weighted(arrays: Arrays, v: Array) -> tuple[Array, tuple[Any, ...]]:
        losses, known = _losses(options, arrays, live)
        return _times(v, losses), (known,)

    return _with_known(*_jvp_by_ad(weighted, primals, tangents))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _losses(options: Options, arrays: Arrays, live: _Live) -> tuple[Float[Array, "tokens ..."], _Known | None]:
    """The loss of each token, 0 of those that are not live."""
    return _sweep(options, _NOTHING, arrays, None, live)[:2]


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(options: Options, primals: tuple[Arrays, _Live], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (arrays, live), (arrays_dot, _) = primals, tangents
    if _only_by_ad(arrays_dot):
        return _with_known(*_jvp_by_ad(partial(_sweep_losses, options, live), (arrays,), (arrays_dot,)))
    wanted, linear_dot = _wanted(arrays_dot)
    tangent = _directional(options, wanted, arrays, live is not None, linear_dot)
    losses, known = _losses(options, arrays, live)
    return _with_known(losses, options.classes.total(tangent), (known,))


def _directional(
    options: Options, wanted: _Wanted, arrays: Arrays, weighted: bool, direction: tuple[Array, ...]
) -> Float[Array, "tokens ..."]:
    """Derivative J of each loss along `direction`: `J v`, whose transpose is `_losses_and_gradients`.

    AD would transpose the loop of `J v` to one that makes a new array of the kernel's size in every step. If losses
    are `weighted`, those of no weight get cotangents of 0, and are not live there.
    """
    leaves, structure = jax.tree.flatten(arrays)
    dtypes, count = [v.dtype for v in direction], len(leaves)  # not the tracers themselves, which would leak

    def along(*values: Array) -> Array:
        known, v = values[:count], values[count:]
        return _sweep_directional(options, wanted, jax.tree.unflatten(structure, known), v)

    def transposed(*values: Array) -> tuple[Array, ...]:
        known, c = jax.tree.unflatten(structure, values[:count]), values[-1]
        # All parts of the classes have the same cotangents, but types say that they may differ.
        counts = jnp.any(c != 0.0, tuple(range(1, c.ndim))).astype(jnp.int32)
        live = options.classes.total(counts) > 0 if weighted else None
        silent = options._replace(loss=options.loss._replace(stats=False))
        gradients = _losses_and_gradients(silent, wanted, known, c, live)[-1]
        return tuple(g.astype(dtype) for g, dtype in zip(jax.tree.leaves(gradients), dtypes, strict=True))

    return linear(along, transposed, tuple(leaves), *direction)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _losses_and_gradients(
    options: Options, wanted: _Wanted, arrays: Arrays, scale: Float[Array, "tokens ..."], live: _Live
) -> tuple[Float[Array, "tokens ..."], _Known | None, _Gradients]:
    """Losses, what else is known, and gradients of `sum(scale * losses)`; of split classes this device's terms."""
    return _sweep(options, wanted, arrays, scale, live)


@partial(_losses_and_gradients.defjvp, symbolic_zeros=True)
def _losses_and_gradients_jvp(options: Options, wanted: _Wanted, primals: Any, tangents: Any) -> tuple[Any, Any]:
    live = None if is_perturbed(tangents[1]) else primals[2]

    def sweep(arrays: Arrays, scale: Array) -> Any:
        losses, known, gradients = _sweep(options, wanted, arrays, scale, live, differentiable=True)
        return (losses, gradients), known

    (losses, gradients), (losses_dot, gradients_dot), known = _jvp_by_ad(sweep, primals[:2], tangents[:2])
    return (losses, known, gradients), (losses_dot, unmoved(known), gradients_dot)


def _sweep(
    options: Options,
    wanted: _Wanted,
    arrays: Arrays,
    scale: Float[Array, "tokens ..."] | None,
    live: _Live,
    *,
    differentiable: bool = False,
) -> tuple[Float[Array, "tokens ..."], _Known | None, _Gradients]:
    """One loop over chunks of tokens: losses, what else is known, and wanted gradients of `sum(scale * losses)`.

    With `differentiable` every operation is one that AD can differentiate in both directions, recomputing each chunk,
    at the price of one more array of the kernel's size. Otherwise gradients are updated in place, and the machine
    decides how: a CPU multiplies apart and has a kernel for what is left, others have what is made of logits in the
    product itself.
    """
    counts = _counts(options, arrays, live)
    if differentiable:
        chunks = _small_chunks(options, arrays, counts, skip=False)
        return _loop(options, "differentiable", chunks, wanted, arrays, scale)
    in_caches, fused = (partial(sweep, options, wanted) for sweep in (_sweep_in_caches, _sweep_fused))
    if options.loss.implementation == "xla":
        return fused(arrays, scale, counts)
    rocm = partial(fused, holds_logits=True)
    cuda = partial(rocm, has_kernels=True) if fit(arrays.hidden, arrays.kernel) else rocm  # one trace where it can be
    return jax.lax.platform_dependent(arrays, scale, counts, cpu=in_caches, cuda=cuda, rocm=rocm, default=fused)


def _counts(options: Options, arrays: Arrays, live: _Live) -> _Live:
    """Which tokens count; None if all of them do."""
    counts = counting(arrays.labels, options.loss.ignore_index)
    return live if counts is None else counts if live is None else counts & live


# How a loop goes: so that AD can differentiate it, with tiles added to the kernel's gradient one by one, with logits
# in memory but no tiles, or without, see _product_loss.py; then the gradient is made of exponentials in its products,
# or, where the compiler would write it out first, is these with rows yet to be scaled.
_Way = Literal["differentiable", "tiles", "logits", "fused", "scaled"]


def _sweep_in_caches(
    options: Options, wanted: _Wanted, arrays: Arrays, scale: Array | None, counts: _Live
) -> tuple[Float[Array, "tokens ..."], _Known | None, _Gradients]:
    # Whether a kernel will serve, and be alone, as nearly as can be known here: nothing but memory depends on it.
    smoothed = arrays.added.uniform is not None and arrays.weight is not None
    one_pass = jnp.issubdtype(arrays.labels.dtype, jnp.integer) and not (
        smoothed or options.softcap or options.entropy
    )
    known = unseen_parts(arrays.hidden) == 1 and not options.classes.names and _compute_dtype(arrays) == jnp.float32
    in_place = one_pass and options.divergence is None and known and are_native()
    chunks = _small_chunks(options, arrays, counts, skip=True, in_place=in_place)
    return _loop(options, "tiles", chunks, wanted, arrays, scale)


def _dtype_of_exponentials(wanted: _Wanted, arrays: Arrays, *, on_tpu: bool) -> jnp.dtype:
    bias = None if arrays.bias is None or not wanted[2] else arrays.bias.dtype
    operand = jnp.result_type(arrays.hidden, arrays.kernel)
    if on_tpu and operand == jnp.float32 and jax.config.jax_default_matmul_precision is None:
        operand = jnp.dtype(jnp.bfloat16)
    return dtype_of_exponentials(operand, bias)


def _sweep_fused(
    options: Options,
    wanted: _Wanted,
    arrays: Arrays,
    scale: Array | None,
    counts: _Live,
    *,
    holds_logits: bool = False,
    has_kernels: bool = False,
) -> tuple[Float[Array, "tokens ..."], _Known | None, _Gradients]:
    """Where a product can leave its accumulator as exponentials, unless the compiler `holds_logits` all the same.

    Then there may be kernels that do not.
    """
    if options.divergence is not None and _can_cut_classes(arrays):
        return _walk_twice(options, options.divergence, wanted, arrays, scale, counts, holds_logits=holds_logits)
    tokens: Any = arrays.hidden.shape[0]
    features = arrays.hidden.shape[1]
    smoothed = arrays.added.uniform is not None and arrays.weight is not None
    indices = jnp.issubdtype(arrays.labels.dtype, jnp.integer)
    any_kernel = options.loss.implementation in (None, "xla")
    plain = indices and not smoothed and arrays.where is None and options.softcap is None and not wanted[3]
    plain = plain and not options.entropy and not options.loss.stats  # no product knows where its maximum is
    parts, operand = unseen_parts(arrays.hidden), jnp.result_type(arrays.hidden, arrays.kernel)
    # float16 has not the range of exponentials.
    scalable = arrays.added.uniform is None and not is_easily_underflown(operand)
    scalable = scalable and not (holds_logits and parts > 1)
    way = "logits" if not (any_kernel and plain) else "scaled" if scalable else "fused"
    chip = None if holds_logits else tpu()
    stored = operand if way == "logits" else _dtype_of_exponentials(wanted, arrays, on_tpu=chip is not None)
    wide = _compute_dtype(arrays).itemsize
    filled = _filled_up(options, arrays) if has_kernels and way != "logits" else None
    has_logits = way == "logits" or (holds_logits and filled is None)
    beside = features / max(arrays.kernel.shape[1], 1)  # the hidden states of a chunk, and the gradient of all
    held = [(stored.itemsize + operand.itemsize * beside) / wide]
    if has_logits or (holds_logits and way == "fused"):  # or the gradient that is made of exponentials
        held.append(1.0 if has_logits else operand.itemsize / wide)
    gradient = arrays.kernel.dtype.itemsize / wide if wanted[1] else None
    fits_at_once = fit_at_once(tokens, features, sum(held))
    copies = chip is not None and chip.generation > 6 and operand == jnp.bfloat16  # the kernel, to where its gradient will be
    size = chunk_size_for_memory(tokens, features, held, parts, SHARE - beside, None if copies else gradient)
    by_class = not holds_logits and lies_by_class(*arrays.kernel.shape)
    machine = {"by_class": by_class, "apart": holds_logits, "filled": filled or 0}
    loop = partial(_loop, options, way, wanted=wanted, arrays=arrays, scale=scale, **machine)
    more = options.entropy or options.divergence is not None  # is held beside the logits
    one_chunk = is_one_chunk(tokens, options.chunk_size)
    walks = way != "logits" and not holds_logits and _can_cut_classes(arrays)
    walks = walks and not (options.chunk_size or by_class or fits_at_once)
    walks = walks and wanted[1] and operand == jnp.bfloat16
    walks = walks and chip is not None and pays_to_walk_twice(tokens, size, chip.flops_per_byte)
    if chip is not None and not walks and wanted[1] and 2 * wide * arrays.kernel.size <= chip.fast_memory:
        # The compiler keeps the sum there.
        size = chunk_size_for_memory(tokens, features, held, parts, SHARE - beside + features / max(tokens, 1), gradient)
    chunks = _chunks(options, arrays, counts, size, skip=True)
    if not (one_chunk or walks) and (options.chunk_size or more or not fits_at_once):
        return loop(chunks)
    whole = partial(loop, strided_chunks(tokens, tokens, counts))
    if walks:
        block = block_of_classes(tokens, arrays.kernel.shape[1], size)
        whole = partial(_walk_along_classes, options, wanted, arrays, scale, counts, block)
    if counts is None or parts > 1 or one_chunk:
        return whole()
    if tokens > ENOUGH:  # a second program would be compiled for little
        return loop(chunks)
    # Where every chunk is needed, none is skipped. Without barriers gradients would be converted after the branches,
    # which would return them wide; one for all would make them vary over the same axes of a mesh.
    barred = partial(jax.tree.map, jax.lax.optimization_barrier)
    branches = (lambda way=way: barred(way()) for way in (whole, partial(loop, chunks)))
    with jax.named_scope("at_once"):
        return jax.lax.cond(everywhere(chunks.steps == -(-tokens // chunks.size)), *branches)


def _walk_along_classes(
    options: Options,
    wanted: _Wanted,
    arrays: Arrays,
    scale: Float[Array, "tokens ..."] | None,
    counts: _Live,
    block: int,
) -> tuple[Float[Array, "tokens ..."], None, _Gradients]:
    """All tokens at once, and so many classes at a time, see `product_losses_and_gradients`."""
    given, x = _given(arrays), arrays.hidden
    counts = jnp.ones(x.shape[0], bool) if counts is None else counts
    x = jnp.where(counts[:, None], x, 0).astype(given.layer.weight.dtype)  # no NaN of what does not count may spread
    near = center(given.layer, options.classes, apart=False)
    losses = given.mixture(options, arrays.labels, x)
    assert losses.label is not None
    label = jnp.where(counts, losses.label, -1)
    scale = jnp.where(counts, 1.0 if scale is None else scale, jnp.zeros((), _compute_dtype(arrays)))
    rows, gradients = product_losses_and_gradients(
        given.layer, near, x, label, losses.factors.times(scale).rows(label), options.classes, wanted, block
    )
    of = zip(gradients, arrays[:3], strict=True)
    hidden, kernel, bias = (None if g is None or x is None else _kept(g, x.dtype) for g, x in of)
    loss = jnp.where(counts, mixed(label, rows, losses.factors), 0.0)
    return loss, None, _Gradients(hidden, kernel, bias, None)


def _filled_up(options: Options, arrays: Arrays) -> int | None:
    """How many classes to add, without probability, so that a GPU's kernels can serve; None if they cannot.

    For numbers of classes that are no multiple of 8 a GPU's own products, too, would copy what they multiply.
    An exported program has chunks for kernels, and none of these: that it will be exported is not known here.
    """
    classes: Any = arrays.kernel.shape[1]
    if not goes_alone(arrays.hidden) or not isinstance(classes, int):
        return None
    more = -classes % 8
    # They are hidden by their bias, which a scale might turn around, and a mean of all logits would see.
    seen = arrays.logit_scale is not None or arrays.added.uniform is not None or options.classes.names
    return None if more and seen else more


def _loop(
    options: Options,
    way: _Way,
    chunks: Chunks,
    wanted: _Wanted,
    arrays: Arrays,
    scale: Float[Array, "tokens ..."] | None,
    *,
    by_class: bool = False,
    apart: bool = False,
    filled: int = 0,
) -> tuple[Float[Array, "tokens ..."], _Known | None, _Gradients]:
    """`by_class` says how the kernel lies in memory, `apart` that maxima are better made apart, see `Center`.

    And `filled`, how many classes to add, for the sake of the kernel's size.
    """
    hidden, labels, dtype = arrays.hidden, arrays.labels, _compute_dtype(arrays)
    tokens, (features, classes) = hidden.shape[0], arrays.kernel.shape
    given = _given(arrays, by_class=by_class, filled=filled)
    operand = given.layer.kernel.dtype
    near = center(given.layer, options.classes, apart=apart) if way in ("fused", "scaled") else None
    stored = _dtype_of_exponentials(wanted, arrays, on_tpu=not apart and tpu() is not None)
    scale, largest = (None, None) if scale is None else _in_range(scale, operand)

    def products(
        x: Array, given: _Given, labels: Array, counts: Array, s: Array
    ) -> tuple[Array, _Known | None, _Gradients]:
        if not any(wanted):
            return *_losses_of(options, given, near, x, labels), _Gradients(None, None, None, None)
        of_logits = partial(_losses_and_gradient_of, options, given, near, stored, scaled=way == "scaled")
        loss, known, of_rows, of_scale = of_logits(x, labels, counts, s)
        if apart and of_rows.bare is not None:
            return loss, None, _scaled_products(wanted, x, given.layer.kernel, of_rows)
        bias_term = jnp.sum(of_rows.whole, 0) if wanted[2] else None
        scale_term = jnp.sum(of_scale) if wanted[3] and of_scale is not None else None
        g = of_rows.whole.astype(operand)
        hidden_term = kernel_term = None
        if wanted[0]:  # in the other order faster on CPUs
            kernel = given.layer.kernel
            hidden_term = dot(kernel, g, 1, 1, dtype).T if way == "tiles" else dot(g, kernel, 1, 1, dtype)
        if wanted[1]:
            kernel_term = g if way == "tiles" else _of_kernel(x, of_rows, operand, dtype)
        return loss, known, _Gradients(hidden_term, kernel_term, bias_term, scale_term)

    if way == "differentiable":
        products = jax.checkpoint(products)
    once = near is not None and isinstance(chunks.steps, int) and chunks.steps == 1
    # The first step apart is a second program, of which a GPU's compiler makes no more than a few kernels.
    apart_first = once or (way == "scaled" and apart and bool(tokens))
    if apart_first and not once:
        products = jax.jit(products)  # is traced once
    rows = options.rows(tokens)
    by_token = jax.tree.map(chunks.spread, (hidden, labels, jnp.ones(rows, dtype) if scale is None else scale))

    def step(i: Any, carry: tuple[Any, _Gradients]) -> tuple[Any, _Gradients]:
        of_tokens, gradients = carry
        counts = chunks.counts(i)
        x, y, s = (chunks.take(rows, i) for rows in by_token)
        x = jnp.where(counts[:, None], x, 0).astype(operand)  # NaNs of a row that does not count must not spread
        y = y if arrays.teacher is None else jnp.where(counts[:, None], y, 0)
        s = jnp.where(_beside(s, counts), s, 0.0)
        loss, known, terms = products(x, given, y, counts, s)
        of_hidden, of_kernel, of_bias, of_scale = gradients
        if of_hidden is not None and terms.hidden is not None:
            of_hidden = chunks.put(of_hidden, terms.hidden, i)
        if terms.kernel is not None:
            if of_kernel is None:
                of_kernel = terms.kernel
            elif way == "tiles":
                by_class = unseen_parts(given.layer.kernel) == 1
                of_kernel = _add_product(of_kernel, x, terms.kernel, by_class=by_class)
            else:
                of_kernel = of_kernel + terms.kernel
        if of_bias is not None and terms.bias is not None:
            of_bias = of_bias + terms.bias
        if of_scale is not None and terms.logit_scale is not None:
            of_scale = of_scale + terms.logit_scale

        def put(rows: Array, some: Array) -> Array:
            return chunks.put(rows, jnp.where(_beside(some, counts), some, jnp.zeros((), some.dtype)), i)

        of_tokens = jax.tree.map(put, of_tokens, (loss, jax.lax.stop_gradient(known)))
        return of_tokens, _Gradients(of_hidden, of_kernel, of_bias, of_scale)

    zero = vary(jnp.zeros((), dtype), *jax.tree.leaves((arrays, scale)))
    nothing = chunks.spread(jnp.broadcast_to(options.classes.total(zero), rows))
    start = (
        (nothing, _Known(nothing, nothing.astype(jnp.int32)) if options.loss.stats else None),
        _Gradients(
            chunks.spread(jnp.broadcast_to(zero, hidden.shape)) if wanted[0] else None,
            jnp.broadcast_to(zero, (features, classes + filled)) if wanted[1] and not apart_first else None,
            jnp.broadcast_to(zero, classes + filled) if wanted[2] else None,
            zero if wanted[3] else None,
        ),
    )
    begun = step(0, start) if apart_first else start
    if tokens and not once:  # Without tokens nothing can be indexed, even in a loop of no steps.
        begun = jax.lax.fori_loop(int(apart_first), chunks.steps, step, begun)
    of_tokens, gradients = begun
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=chunks.gather(gradients.hidden))
    if filled:
        of_kernel, of_bias = (None if g is None else g[..., :classes] for g in (gradients.kernel, gradients.bias))
        gradients = gradients._replace(kernel=of_kernel, bias=of_bias)
    if largest is not None:
        gradients = _Gradients(*(None if g is None else g * largest for g in gradients))
    of = zip(gradients, (arrays.hidden, arrays.kernel, arrays.bias, arrays.logit_scale), strict=True)
    losses, known = jax.tree.map(chunks.gather, of_tokens)
    return losses, known, _Gradients(*(None if g is None or x is None else _kept(g, x.dtype) for g, x in of))


def _of_kernel(
    x: Float[Array, "size features"], gradient: Gradient, operand: jnp.dtype, dtype: jnp.dtype
) -> Float[Array, "features classes"]:
    """The gradient of the kernel, from that of logits."""
    g = gradient.whole
    if gradient.bare is not None and gradient.scale is not None:
        x, g = _unless_nothing(gradient.scale, x.astype(dtype)).astype(operand), gradient.bare
    return dot(x, g.astype(operand), 0, 0, dtype)


def _scaled_products(
    wanted: _Wanted, x: Float[Array, "size features"], kernel: Float[Array, "features classes"], gradient: Gradient
) -> _Gradients:
    """The terms of gradients, all of the bare rows, since nothing of the whole gradient is to be written out."""
    operand, scale, g = kernel.dtype, gradient.scale, gradient.bare
    assert scale is not None and g is not None
    dtype = scale.dtype
    return _Gradients(
        _unless_nothing(scale, dot(g.astype(operand), kernel, 1, 1, dtype)) if wanted[0] else None,
        _of_kernel(x, gradient, operand, dtype) if wanted[1] else None,
        jnp.sum(scale * g.astype(dtype), 0) if wanted[2] else None,
        None,
    )


def _unless_nothing(scale: Float[Array, "size 1"], x: Float[Array, "size ..."]) -> Float[Array, "size ..."]:
    """`scale * x`, without the NaNs of what does not count."""
    return jnp.where(scale == 0.0, 0.0, scale * x)


def _in_range(scale: Array, dtype: DTypeLike) -> tuple[Array, Array | None]:
    """Factors of gradients in `dtype`, and what is left to multiply these by where its range is small."""
    if not is_easily_underflown(dtype):
        return scale, None
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(scale), initial=0.0))
    largest = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
    return scale / largest, largest


def _can_cut_classes(arrays: Arrays) -> bool:
    """Whether there are tokens and classes, these of a number that is known, and no compiler might split them."""
    tokens: Any = arrays.hidden.shape[0]
    classes: Any = arrays.kernel.shape[1]
    return bool(tokens and isinstance(classes, int) and classes and unseen_parts(arrays.hidden) == 1)


def _walk_twice(
    options: Options,
    which: Divergence,
    wanted: _Wanted,
    arrays: Arrays,
    scale: Float[Array, "tokens ..."] | None,
    counts: _Live,
    *,
    holds_logits: bool,
) -> tuple[Float[Array, "tokens ..."], None, _Gradients]:
    """Divergences and gradients of `sum(scale * divergences)`, see _product_divergence.py."""
    given = _given(arrays)
    assert given.teacher is not None
    operand, of_teacher = given.layer.kernel.dtype, given.teacher.kernel.dtype
    # The memory that a chunk takes, in arrays of one model's logits, as compilers were seen to need it.
    held = 2.0 if not holds_logits else 3.0 if which.beta == 1.0 else 5.0
    count, features = arrays.hidden.shape
    size = options.chunk_size or chunk_size_for_memory(count, features, (held,), share=_SHARE_OF_PAIRS)
    ones = jnp.ones(count, _compute_dtype(arrays))
    scale, largest = _in_range(ones if scale is None else scale, operand)
    pair = Pair(given.layer, given.teacher, given.where)
    tokens = Tokens(arrays.hidden.astype(operand), arrays.labels.astype(of_teacher), scale, counts)
    losses, found = product_divergences_and_gradients(
        options.classes, which, pair, tokens, wanted[:3], size, tpu=not holds_logits
    )

    def kept(g: Array | None, x: Array | None) -> Array | None:
        return None if g is None or x is None else _kept(g if largest is None else g * largest, x.dtype)

    hidden, kernel, bias = (kept(g, x) for g, x in zip(found, arrays[:3], strict=True))
    return losses, None, _Gradients(hidden, kernel, bias, None)


def _sweep_losses(
    options: Options, live: _Live, arrays: Arrays
) -> tuple[Float[Array, "tokens ..."], tuple[_Known | None]]:
    """`_losses` for AD."""
    losses, known, _ = _sweep(options, _NOTHING, arrays, None, live, differentiable=True)
    return losses, (known,)


def _sweep_total(
    options: Options, live: _Live, arrays: Arrays, scale: Array
) -> tuple[Float[Array, ""], tuple[Array | None, _Known | None]]:
    """`_total` for AD."""
    losses, (known,) = _sweep_losses(options, live, arrays)
    return _scaled_sum(scale, losses), (None if known is None else losses, known)


def _sweep_directional(
    options: Options, wanted: _Wanted, arrays: Arrays, direction: tuple[Array, ...]
) -> Float[Array, "tokens ..."]:
    """The derivative of each loss along `direction`, for AD; this device's term of it if the classes are split."""
    hidden, dtype = arrays.hidden, _compute_dtype(arrays)
    chunks = _small_chunks(options, arrays, _counts(options, arrays, None), skip=False)
    given = _given(arrays)
    operand = given.layer.kernel.dtype
    parts = iter(direction)
    hidden_dot, *other_dots = (next(parts) if want else None for want in wanted)
    hidden_dot = None if hidden_dot is None else chunks.spread(hidden_dot)
    by_token = chunks.spread(hidden), chunks.spread(arrays.labels)

    @jax.checkpoint
    def along(
        x: Array, given: _Given, y: Array, counts: Array, x_dot: Array | None, other_dots: list[Array | None]
    ) -> Array:
        kernel_dot, bias_dot, scale_dot = other_dots
        logits_dot = jnp.zeros((1, 1), dtype) if bias_dot is None else bias_dot[None]
        if x_dot is not None:
            logits_dot += dot(x_dot, given.layer.kernel.astype(dtype), 1, 0, dtype)
        if kernel_dot is not None:
            logits_dot += dot(x.astype(dtype), kernel_dot, 1, 0, dtype)

        def of(unit: Array) -> Array:
            _, _, g, of_scale = _losses_and_gradient_of(options, given, None, dtype, x, y, counts, unit)
            tangent = jnp.sum(g.whole * logits_dot, 1)
            return tangent if scale_dot is None or of_scale is None else tangent + scale_dot * of_scale

        one = jnp.ones(x.shape[0], dtype)
        if not options.entropy:
            return of(one)
        zero = jnp.zeros_like(one)
        return jnp.stack([of(jnp.stack(pair, 1)) for pair in ((one, zero), (zero, one))], 1)

    def step(tangent: Array, i: Integer[Array, ""]) -> tuple[Array, None]:
        counts = chunks.counts(i)
        x, y = (chunks.take(rows, i) for rows in by_token)
        x_dot = None if hidden_dot is None else chunks.take(hidden_dot, i)
        x = jnp.where(counts[:, None], x, 0).astype(operand)
        y = y if arrays.teacher is None else jnp.where(counts[:, None], y, 0)
        rows = along(x, given, y, counts, x_dot, other_dots)
        return chunks.put(tangent, jnp.where(_beside(rows, counts), rows, 0.0), i), None

    start = vary(
        chunks.spread(jnp.zeros(options.rows(hidden.shape[0]), dtype)), *jax.tree.leaves((arrays, direction))
    )
    tangent = jax.lax.scan(step, start, jnp.arange(chunks.steps))[0] if hidden.shape[0] else start
    return chunks.gather(tangent)


class _Given(NamedTuple):
    """What makes losses of hidden states."""

    layer: Layer
    where: Bool[Array, " classes"] | None
    weight: Float[Array, " classes"] | None
    added: Added
    teacher: Layer | None

    def mixture(self, options: Options, labels: Array, x: Float[Array, "size features"]) -> Mixture:
        """Which losses these are."""
        logits = self.layer.shape(x)
        where = None if self.where is None else self.where[None]
        target = read_target(logits, labels, self.weight, options.loss)
        return mixture(logits, labels, target, where, self.weight, self.added, options.classes)

    def shown(self, logits: Float[Array, "size classes"]) -> Float[Array, "size classes"]:
        """Logits without those of hidden classes."""
        return logits if self.where is None else jnp.where(self.where[None], logits, -jnp.inf)


def _given(arrays: Arrays, *, by_class: bool = False, filled: int = 0) -> _Given:
    kernel, bias = arrays.kernel.astype(jnp.result_type(arrays.hidden, arrays.kernel)), arrays.bias
    if filled:
        bias = jnp.zeros(kernel.shape[1], _compute_dtype(arrays)) if bias is None else bias
        bias = jnp.pad(bias, (0, filled), constant_values=-jnp.inf)
        kernel = jnp.pad(kernel, ((0, 0), (0, filled)))
    teacher = None
    if arrays.teacher is not None:
        dtype = jnp.result_type(arrays.labels, arrays.teacher.kernel)
        teacher = Layer(arrays.teacher.kernel.astype(dtype), arrays.teacher.bias)
    layer = Layer(kernel.T if by_class else kernel, bias, arrays.logit_scale, by_class, filled)
    return _Given(layer, arrays.where, arrays.weight, arrays.added, teacher)


def _losses_of(
    options: Options, given: _Given, near: Center | None, x: Array, labels: Array
) -> tuple[Float[Array, "size ..."], _Known | None]:
    """The losses of hidden states, and what else is known; without logits if it is known what these are `near`."""
    if options.divergence is not None and given.teacher is not None:
        logits, of_teacher = given.shown(given.layer.logits(x)), given.shown(_logits(given.teacher, labels))
        return divergences(options.classes, options.divergence, logits, of_teacher), None
    losses = given.mixture(options, labels, x)
    if near is None:
        logits = given.shown(_capped(options, given.layer.logits(x)))
        loss, stats = losses.rows(options.how, logits, jnp.ones((), logits.dtype), options.loss.stats)
        if options.entropy:
            loss = jnp.stack([loss, entropies(options.classes, logits)], 1)
        return loss, _known(stats)
    assert losses.label is not None
    parts = product_losses(given.layer, near, x, losses.label, options.classes)
    return mixed(losses.label, parts, losses.factors), None


def _known(stats: LossStats | None) -> _Known | None:
    return None if stats is None else _Known(*stats[1:])


def _losses_and_gradient_of(
    options: Options,
    given: _Given,
    near: Center | None,
    stored: DTypeLike,
    x: Float[Array, "size features"],
    labels: Array,
    counts: Bool[Array, " size"],
    scale: Float[Array, "size ..."],
    *,
    scaled: bool = False,
) -> tuple[Float[Array, "size ..."], _Known | None, Gradient, _OfRows]:
    """The losses of hidden states, what else is known of these, and gradients of `sum(scale * losses)`.

    First with respect to logits before they are scaled, then, if they are held, for each token by what scales them.
    """
    layer = given.layer
    if options.divergence is not None and given.teacher is not None:
        logits, of_teacher = given.shown(layer.logits(x)), given.shown(_logits(given.teacher, labels))
        scale = jnp.where(counts, scale, 0.0)
        loss, gradient = divergences_and_gradient(options.classes, options.divergence, logits, of_teacher, scale)
        return loss, None, Gradient(gradient), None
    losses = given.mixture(options, labels, x)
    if losses.label is not None:  # what does not count has no label: no infinity of the kernel may reach it
        losses = losses._replace(label=jnp.where(counts, losses.label, -1))
    if near is None:
        unscaled = layer.unscaled(x)
        logits = _capped(options, layer.scaled(unscaled))
        shown = given.shown(logits)
        of_loss = scale[:, 0] if options.entropy else scale
        loss, stats, gradient = losses.rows_and_gradient(options.how, shown, of_loss, options.loss.stats)
        if options.entropy:
            h, curved = entropies_and_gradient(options.classes, shown, scale[:, 1])
            loss = jnp.stack([loss, h], 1)
            gradient += jnp.where(counts[:, None], curved, 0.0)
        if options.softcap is not None:
            gradient = gradient * (1.0 - (logits / options.softcap) ** 2)
        of_scale = None if layer.scale is None else jnp.sum(gradient * unscaled, 1)
        return loss, _known(stats), Gradient(layer.scaled(gradient)), of_scale
    assert losses.label is not None
    factors = losses.factors.times(layer.scaled(scale)).rows(losses.label)
    parts, gradient = product_losses_and_gradient(
        layer, near, x, losses.label, factors, options.classes, stored, scaled=scaled
    )
    return mixed(losses.label, parts, losses.factors), None, gradient, None


def _logits(layer: Layer, x: Float[Array, "size features"]) -> Float[Array, "size classes"]:
    return layer.logits(x.astype(layer.kernel.dtype))


def _capped(options: Options, logits: Float[Array, "size classes"]) -> Float[Array, "size classes"]:
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)


def _add_product(
    total: Float[Array, "features classes"], x: Array, g: Array, *, by_class: bool
) -> Float[Array, "features classes"]:
    """`total + x.T @ g`, in place, a tile at a time: the whole product would be a second array of that size.

    Tiles of some classes are the faster ones. Tiles of some features move nothing where the classes are split.
    """
    axis = int(by_class)
    size: Any = total.shape[axis]
    if not isinstance(size, int):  # of a size that is known when it runs: no tiles
        return total + dot(x, g, 0, 0, total.dtype)
    tile = min(1024 if by_class else max(x.shape[0] // 8, 8), size)

    def step(i: Any, total: Array) -> Array:
        start = jnp.minimum(i * tile, size - tile)  # the last tile may overlap the one before
        some = jax.lax.dynamic_slice_in_dim(g if by_class else x, start, tile, 1)
        some = jnp.where(start + jnp.arange(tile) >= i * tile, some, 0)
        part = dot(x, some, 0, 0, total.dtype) if by_class else dot(some, g, 0, 0, total.dtype)
        part += jax.lax.dynamic_slice_in_dim(total, start, tile, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis)

    return jax.lax.fori_loop(0, math.ceil(size / max(tile, 1)), step, total)


def _small_chunks(options: Options, arrays: Arrays, counts: _Live, *, skip: bool, in_place: bool = False) -> Chunks:
    size = chunk_size_in_caches(*arrays.hidden.shape, in_place=in_place)
    return _chunks(options, arrays, counts, size, skip=skip)


def _chunks(options: Options, arrays: Arrays, counts: _Live, size: int, *, skip: bool) -> Chunks:
    tokens = arrays.hidden.shape[0]
    # What is made beside the logits and the gradient: of entropies a gradient, of divergences what they are made of.
    size = -(-size // (2 if options.entropy else 5 if options.divergence else 1))
    size = options.chunk_size or size
    # Under automatic sharding nobody knows yet how the tokens will be split.
    if unseen_parts(arrays.hidden) > 1:
        return strided_chunks(tokens, size, counts)
    return packed_chunks(tokens, size, counts, skip=skip)


def _only_by_ad(arrays_dot: Any) -> bool:
    """Whether there are tangents of what no loop of ours has the gradients of."""
    others = (arrays_dot.weight, arrays_dot.labels, arrays_dot.added, arrays_dot.teacher)
    return any(map(is_perturbed, jax.tree.leaves(others, is_leaf=lambda t: isinstance(t, SymbolicZero))))


def _wanted(arrays_dot: Any) -> tuple[_Wanted, tuple[Array, ...]]:
    """Which of hidden, kernel, bias and logit_scale have tangents, and those tangents."""
    linear = (arrays_dot.hidden, arrays_dot.kernel, arrays_dot.bias, arrays_dot.logit_scale)
    wanted: Any = tuple(map(is_perturbed, linear))
    return wanted, tuple(t for t, want in zip(linear, wanted, strict=True) if want)


def _jvp_by_ad(f: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any, Any]:
    """`jax.jvp`, given zero tangents as custom_jvp gives them, of what gives something without derivatives, too."""
    leaves, structure = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    moving = [i for i, t in enumerate(dots) if is_perturbed(t)]

    def of_moving(*values: Array) -> Any:
        every = list(leaves)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return f(*jax.tree.unflatten(structure, every))

    return jax.jvp(of_moving, [leaves[i] for i in moving], [dots[i] for i in moving], has_aux=True)
