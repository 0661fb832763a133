"""How each machine goes over tokens and classes of a linear layer's losses.

Only time and memory depend on it, but for float32 on a TPU: exponentials are rounded before they wait, or when they
are multiplied, as that machine does anyway.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from ._chunks import (
    ENOUGH,
    SHARE,
    block_of_classes,
    chunk_size_for_memory,
    chunk_size_in_caches,
    fit_at_once,
    is_one_chunk,
    pays_to_walk_twice,
    unseen_parts,
)
from ._kernels import are_native
from ._kernels.chip import tpu
from ._kernels.product import default_precision, fit, goes_alone, missing_classes
from ._label_loss import is_easily_underflown
from ._linear_given import Arrays, Options, Wanted, compute_dtype
from ._product_loss import dtype_of_exponentials, lies_by_class

Machine = Literal["cpu", "tpu", "cuda", "rocm"]
# How a loop goes: so that AD can differentiate it, with tiles added to the kernel's gradient one by one, with logits
# in memory but no tiles, or without, see _product_loss.py; then the gradient is made of exponentials, or the products
# take these, with rows yet to be scaled.
Way = Literal["differentiable", "tiles", "logits", "fused", "scaled"]
_LARGE_FAST_MEMORY = 2**27  # TPUs with less keep a gradient that two products take


class Plan(NamedTuple):
    """Of one machine, for arrays of one size."""

    way: Way
    size: int  # tokens in a chunk
    at_once: Literal["always", "if all count", "never"] = "never"  # one step with all tokens
    block: int | None = None  # which then walks twice, the second time over so many classes after one another
    stored: Any = None  # the dtype of exponentials
    by_class: bool = False  # how the kernel lies in memory
    unset: bool = False  # the first chunk makes the sum of the kernel's gradient, and nobody a zero
    apart: bool = False  # maxima are better made apart, see `Center`
    filled: int = 0  # classes to add, for the sake of the kernel's size


def plan_for(machine: Machine, options: Options, wanted: Wanted, arrays: Arrays, *, all_count: bool) -> Plan:
    """A CPU multiplies apart and has a kernel for what is left; others make what they can in the product itself."""
    if machine == "cpu":
        return _in_caches(options, arrays)
    return _in_products(machine, options, wanted, arrays, all_count=all_count)


def differentiable(options: Options, arrays: Arrays) -> Plan:
    """For derivatives of the second order."""
    return Plan("differentiable", _size(options, chunk_size_in_caches(*arrays.hidden.shape)))


def can_cut_classes(arrays: Arrays) -> bool:
    """Whether there are tokens and classes, these of a number that is known, and no compiler might split them."""
    tokens: Any = arrays.hidden.shape[0]
    classes: Any = arrays.kernel.shape[1]
    return bool(tokens and isinstance(classes, int) and classes and unseen_parts(arrays.hidden) == 1)


def _size(options: Options, size: int) -> int:
    # What is made beside the logits and the gradient: of entropies a gradient, of divergences what they are made of.
    return options.chunk_size or -(-size // (2 if options.entropy else 5 if options.divergence else 1))


def _in_caches(options: Options, arrays: Arrays) -> Plan:
    # Whether a kernel will serve, and be alone, as nearly as can be known here.
    smoothed = arrays.added.uniform is not None and arrays.weight is not None
    one_pass = jnp.issubdtype(arrays.labels.dtype, jnp.integer) and not (
        smoothed or options.softcap or options.entropy
    )
    known = unseen_parts(arrays.hidden) == 1 and not options.classes.names and compute_dtype(arrays) == jnp.float32
    in_place = one_pass and options.divergence is None and known and are_native()
    return Plan("tiles", _size(options, chunk_size_in_caches(*arrays.hidden.shape, in_place=in_place)))


def _in_products(machine: Machine, options: Options, wanted: Wanted, arrays: Arrays, *, all_count: bool) -> Plan:
    tokens: Any = arrays.hidden.shape[0]
    features: Any = arrays.hidden.shape[1]
    classes: Any = arrays.kernel.shape[1]
    known = all(isinstance(size, int) for size in (tokens, features, classes)) and tokens > 0
    on_tpu, chip = machine == "tpu", tpu() if machine == "tpu" else None
    operand, parts = jnp.result_type(arrays.hidden, arrays.kernel), unseen_parts(arrays.hidden)
    way = _way(options, wanted, arrays)
    filled = _filled_up(options, arrays) if machine == "cuda" and way != "logits" and fit(*arrays[:2]) else None
    # As a TPU rounds what it multiplies, unless somebody asks for more; of plain JAX, it may be another that does.
    rounded = way == "scaled" and chip is not None and options.loss.implementation is None
    stored = operand if way == "logits" else _dtype_of_exponentials(wanted, arrays, rounded=rounded)

    # In bytes of logits in the dtype of sums: the arrays of a chunk.
    wide = compute_dtype(arrays).itemsize
    held = [stored.itemsize / wide]
    has_logits = way == "logits" or not (on_tpu or filled is not None)
    keeps = not on_tpu or (chip is not None and chip.fast_memory < _LARGE_FAST_MEMORY)
    if has_logits or (way == "fused" and keeps):  # or the gradient that is made of exponentials
        held.append(1.0 if has_logits else operand.itemsize / wide)
    gradient = arrays.kernel.dtype.itemsize / wide if wanted[1] else None
    # A TPU v7x lays bfloat16 anew for its products, where the gradient will be.
    room = None if chip is not None and chip.generation > 6 and operand == jnp.bfloat16 else gradient
    least = 2 if on_tpu else 3
    fitting = partial(chunk_size_for_memory, tokens, features, held, parts, gradient=room, least=least)
    # And on TPUs chunks of hidden states and of their gradient; not if they are many, which chunks do not help.
    share = SHARE - 1.5 * min(features / max(classes, 1), SHARE / 4) if known and on_tpu else SHARE
    size = fitting(share)

    by_class = on_tpu and lies_by_class(features, classes)
    one_chunk = is_one_chunk(tokens, options.chunk_size)
    is_free = not (options.chunk_size or options.entropy or options.divergence)
    at_once = is_free and fit_at_once(tokens, features, sum(held))
    block = None
    if chip is not None and wanted[1] and known and is_free and not at_once:
        walks = way != "logits" and operand == jnp.bfloat16 and not by_class and can_cut_classes(arrays)
        if walks and pays_to_walk_twice(tokens, size, chip.flops_per_byte):
            block = block_of_classes(tokens, classes, size)
        elif 2 * wide * features * classes <= chip.fast_memory:  # where the compiler keeps the sum of the gradient
            size = fitting(share + features / tokens)
    when = "never"
    if one_chunk or at_once or block:
        if all_count or parts > 1 or one_chunk:
            when = "always"
        elif tokens <= ENOUGH:  # for more, a second program would be compiled for little
            when = "if all count"
    # What was never set has a layout of its own, and cannot be split. Where the sum is the gradient itself, to ask at
    # last whether there were any chunks would be a pass over it.
    unset = on_tpu and parts == 1 and block is None and arrays.kernel.dtype != compute_dtype(arrays)
    return Plan(way, _size(options, size), when, block, stored, by_class, unset, not on_tpu, filled or 0)


def _way(options: Options, wanted: Wanted, arrays: Arrays) -> Way:
    smoothed = arrays.added.uniform is not None and arrays.weight is not None
    indices = jnp.issubdtype(arrays.labels.dtype, jnp.integer)
    plain = indices and not smoothed and arrays.where is None and options.softcap is None and not wanted[3]
    # No product knows where its maximum is.
    plain = plain and not options.entropy and not options.loss.stats and options.divergence is None
    if not plain or options.loss.implementation not in (None, "xla"):
        return "logits"
    if is_easily_underflown(jnp.result_type(arrays.hidden, arrays.kernel)):  # it has not the range of exponentials
        return "fused"
    # What a smoothed loss adds to a gradient is no multiple of a probability. Sharded automatically, GPUs could not
    # write the label's entry in place, and what is yet to be scaled would be reduced in float32.
    return "scaled" if arrays.added.uniform is None and unseen_parts(arrays.hidden) == 1 else "fused"


def _dtype_of_exponentials(wanted: Wanted, arrays: Arrays, *, rounded: bool) -> jnp.dtype:
    bias = None if arrays.bias is None or not wanted[2] else arrays.bias.dtype
    operand = jnp.result_type(arrays.hidden, arrays.kernel)
    if rounded and operand == jnp.float32 and default_precision() is None:
        operand = jnp.dtype(jnp.bfloat16)
    return dtype_of_exponentials(operand, bias)


def _filled_up(options: Options, arrays: Arrays) -> int | None:
    """How many classes to add, without probability, so that a GPU's kernels can serve; None if they cannot.

    An exported program has chunks for kernels, and none of these: that it will be exported is not known here.
    """
    classes: Any = arrays.kernel.shape[1]
    if not goes_alone(arrays.hidden) or not isinstance(classes, int):
        return None
    more = missing_classes(classes, arrays.kernel.dtype)
    # They are hidden by their bias, which a scale might turn around, and a mean of all logits would see.
    seen = arrays.logit_scale is not None or arrays.added.uniform is not None or options.classes.names
    return None if more and seen else more
