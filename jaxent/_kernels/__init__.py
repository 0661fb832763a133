"""The seam between meaning and machines: every row function is a JAX primitive, and its lowering picks the kernel.

`xla.py` has the plain form of each, and `divergences.py` of those of two models. A machine's file beside them, named
in `MACHINES`, has functions of the same names and arguments for what it does better. It says in `refusal` which
arguments it does not take, and maybe in `unasked` where it serves by name only; one that wants to see what its
arguments are made of has a lowering rule of its own, in `LOWERING`. Nothing here knows of derivatives, of what labels
mean, of weights or of reductions.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from .._class_axis import ClassAxis
from . import divergences, xla
from .xla import compute_dtype as compute_dtype
from .xla import wide as wide


class Machine(NamedTuple):
    """Who serves a platform: a module, and how `implementation` calls it."""

    module: str
    implementation: str


MACHINES = {  # by platform, as JAX calls it when it lowers
    "cpu": Machine("jaxent._kernels.native", "native"),
    "tpu": Machine("jaxent._kernels.tpu", "pallas"),
    "cuda": Machine("jaxent._kernels.gpu", "pallas"),
}


# That of `jax.extend.core`, as a test says. Its package imports all of Pallas, a third of what `import jaxent` took.
Primitive: Any = type(jax.lax.add_p)

# For `jax.jit` of what kernels want to see the arguments of: JAX 0.12 says when a program takes up another.
INLINE: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)


def implementations() -> tuple[str, ...]:
    """What may be asked for by name."""
    return ("xla", *sorted({machine.implementation for machine in MACHINES.values()}))


def _row_function(plain: Callable[..., Any]) -> Any:
    """`plain` as a primitive, of logits and arrays of their shape or of their rows' shape, or of rows only.

    A third array and those behind it are factors, which may be one number for all rows.
    """
    primitive = Primitive(f"jaxent_{plain.__name__}")
    primitive.multiple_results = True

    def form(*arrays: Any, implementation: str | None = None, **options: Any) -> tuple[Any, ...]:
        del implementation
        return as_tuple(plain(*arrays, **options))

    @cache  # a rule traces the same function several times
    def abstract(*avals: Any, **options: Any) -> Any:
        return jax.make_jaxpr(partial(form, **options))(*avals).out_avals

    def batched(arrays: Any, dims: Any, *, axis: ClassAxis, **options: Any) -> Any:
        size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
        axis = axis.behind(1)
        first = [batch_first(x, d, size) for x, d in zip(arrays[:2], dims, strict=False)]

        def factor(x: Any, d: Any) -> Any:
            if x.ndim > (d is not None):
                return batch_first(x, d, size)
            if d is None:
                return x
            rows = axis.rows(first[0].shape)  # one number for all of each batch's
            return jnp.broadcast_to(x.reshape(size, *(1,) * (len(rows) - 1)), rows)

        factors = map(factor, arrays[2:], dims[2:])
        out = primitive.bind(*first, *factors, axis=axis, **options)
        return out, [0] * len(out)

    def lower(context: mlir.LoweringRuleContext, *arrays: Any, **options: Any) -> Any:
        rule = _rule(context, plain.__name__, **options)
        if rule is None:
            return mlir.lower_fun(form)(context, *arrays, **options)
        del options["implementation"]
        return rule(context, *arrays, **options)

    def taylor(primals: Any, series: Any, **options: Any) -> Any:
        return jet.jet(partial(form, **options), primals, series, factorial_scaled=False)

    primitive.def_impl(form)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    # JAX lowers what it caches apart, where a rule cannot see what its arguments are made of.
    mlir.register_lowering(primitive, lower, cacheable=False)
    jet.jet_rules[primitive] = taylor

    def defjvp(rule: Callable[..., Any]) -> Callable[..., Any]:
        """Take a rule of primals, tangents (None where there is none) and options, for the meaning to give.

        It gives tangents of the first results; those without are not differentiable.
        Not by `jax.custom_jvp`, whose rules are forgotten in the loops and checkpoints of a first derivative.
        """

        def of_primitive(primals: Any, tangents: Any, **options: Any) -> Any:
            moving = [None if isinstance(t, ad.Zero) else t for t in tangents]
            out, along = map(as_tuple, rule(primals, moving, **options))
            return out, (*along, *(ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out[len(along) :]))

        ad.primitive_jvps[primitive] = of_primitive
        return rule

    @wraps(plain)
    def bound(*arrays: Any, implementation: str | None = None, **options: Any) -> Any:
        run = partial(primitive.bind, implementation=implementation, **options)
        if implementation != "xla":
            run = _on_each_device(run, arrays, options["axis"])
        out = run(*arrays)
        return out[0] if len(out) == 1 else tuple(out)

    function: Any = bound
    function.defjvp = defjvp
    return function


def as_tuple(out: Any) -> tuple[Any, ...]:
    """One result or several, as several."""
    return out if isinstance(out, tuple) else (out,)


def batch_first(x: Any, dim: Any, size: int) -> Any:
    """A batch of `x` whose axis leads, under `jax.vmap`."""
    if dim is None:
        return jnp.broadcast_to(x, (size, *x.shape))
    return jnp.moveaxis(x, dim, 0)


def _on_each_device(run: Callable[..., Any], arrays: tuple[Any, ...], axis: ClassAxis) -> Callable[..., Any]:
    """Under explicit sharding with whole classes: each device with its own rows, as a kernel needs it."""
    sharding = jax.typeof(arrays[0]).sharding
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = {name for name, kind in kinds if kind == AxisType.Explicit}
    rank = arrays[0].ndim
    results = jax.eval_shape(run, *arrays) if explicit and any(sharding.spec) else ()
    # What has no logits to look at cannot know how the classes of its result will be split.
    if not results or max(x.ndim for x in results) > rank or sharding.spec[axis.index] is not None:
        return run
    rows = PartitionSpec(*sharding.spec[: axis.index], *sharding.spec[axis.index + 1 :])
    of = {rank: sharding.spec, rank - 1: rows}
    specs, out = ([of.get(x.ndim, PartitionSpec()) for x in some] for some in (arrays, results))
    mapped = jax.shard_map(run, mesh=sharding.mesh, in_specs=tuple(specs), out_specs=out, axis_names=explicit)
    return lambda *arrays: mapped(
        *(jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, s)) for x, s in zip(arrays, specs, strict=True))
    )


def _rule(
    context: mlir.LoweringRuleContext, name: str, *, implementation: str | None, axis: ClassAxis, **options: Any
) -> Callable[..., Any] | None:
    """The lowering rule of the machine's own function, or None where the plain form serves."""
    if implementation == "xla":
        return None
    platforms = context.platforms or context.module_context.platforms
    machine = MACHINES.get(platforms[0]) if len(platforms) == 1 else None
    if machine is None or implementation not in (None, machine.implementation):
        why_not, module = f"it has no kernels for {' and '.join(platforms)}", None
    else:
        module = module_of(machine.module)
        if module is None:
            why_not = f"{machine.module} cannot be imported"
        else:
            why_not = None if hasattr(module, name) else f"it has no {name}"
            why_not = why_not or refusal_of_place(context, axis)
            why_not = why_not or module.refusal(name, *context.avals_in, axis=axis, **options)
            if why_not is None and implementation is None and hasattr(module, "unasked"):
                why_not = module.unasked(name, *context.avals_in, axis=axis, **options)
    if why_not is None:
        return getattr(module, "LOWERING", {}).get(name) or partial(lower_kernel, getattr(module, name))
    if implementation is not None:
        raise ValueError(f"implementation={implementation!r} cannot serve {name} here: {why_not}")
    return None


def lower_kernel(kernel: Callable[..., Any], context: mlir.LoweringRuleContext, *arrays: Any, **options: Any) -> Any:
    """The lowering rule of a kernel that is traced like any function."""

    def served(*arrays: Any) -> tuple[Any, ...]:
        return as_tuple(kernel(*arrays, **options))

    with warnings.catch_warnings():  # of JAX 0.12 to whoever uses Triton by way of Pallas, which is not our caller
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(served)(context, *arrays)


def lower_in_place(
    kernel: Callable[..., Any], context: mlir.LoweringRuleContext, x: Any, *others: Any, dtype: Any, **options: Any
) -> Any:
    """The lowering rule of a kernel that writes its result over the logits, if the program makes them itself.

    Whoever reads them as well does so before, or XLA makes a copy.
    """
    in_place = _made_here(x) and getattr(context.avals_in[0], "dtype", None) == dtype
    for use in x.uses if in_place else ():
        if _ALIASES in use.owner.attributes:  # of two that want to write over them, one would be given a copy
            use.owner.attributes[_ALIASES], in_place = mlir.ir.ArrayAttr.get([]), False
    return lower_kernel(kernel, context, x, *others, dtype=dtype, in_place=in_place, **options)


_ALIASES = "output_operand_aliases"  # of a call, what is written over
_SAME = ("reshape", "transpose", "broadcast_in_dim", "optimization_barrier")  # numbers, if there are as many


def _made_here(x: Any) -> bool:
    """Whether a value of a program is no argument, of which its caller would want a copy."""
    made_by = x.owner
    if not hasattr(made_by, "operands"):  # a block, which has arguments
        return False
    if made_by.name == "func.call":  # which may return one
        return False
    if made_by.name not in {f"stablehlo.{name}" for name in _SAME} | {"sdy.sharding_constraint"}:
        return True
    same = made_by.operands[x.result_number if made_by.name.endswith("barrier") else 0]
    return math.prod(same.type.shape) != math.prod(x.type.shape) or _made_here(same)


def module_of(name: str) -> Any:
    """A machine's file; None if a later JAX has not all that its kernels are made with."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def are_native() -> bool:
    """Whether programs for the CPU at hand have its own kernels, for what they take."""
    machine = MACHINES["cpu"]
    if jax.default_backend() != "cpu" or machine.implementation != "native":
        return False
    native = module_of(machine.module)
    return native is not None and native.unavailable() is None


def is_old_gpu() -> bool:
    """Whether there is a GPU that Triton does not take, of compute capability below 8.0."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) < 8.0  # AMD's are names


def refusal_of_place(context: mlir.LoweringRuleContext, axis: ClassAxis) -> str | None:
    """Why no kernel serves in this program, which a compiler might have to cut or to keep."""
    if axis.names:
        return "the class axis is sharded"
    if context.module_context.lowering_parameters.for_export:
        return "the program is exported"
    place = context.module_context.axis_context
    manual = getattr(place, "manual_axes", frozenset())
    mesh = getattr(place, "mesh", None)
    automatic = (
        getattr(place, "num_devices", 1)
        if mesh is None
        else max([size for axis_name, size in mesh.shape.items() if axis_name not in manual], default=1)
    )
    return "the program is sharded automatically over several devices" if automatic > 1 else None


softmax = _row_function(xla.softmax)
log_softmax = _row_function(xla.log_softmax)
softmax_derivative = _row_function(xla.softmax_derivative)
log_softmax_derivative = _row_function(xla.log_softmax_derivative)
log_softmax_pullback = _row_function(xla.log_softmax_pullback)
label_loss = _row_function(xla.label_loss)
label_loss_and_gradient = _row_function(xla.label_loss_and_gradient)
expected_loss = _row_function(xla.expected_loss)
expected_loss_and_gradient = _row_function(xla.expected_loss_and_gradient)
entropy = _row_function(xla.entropy)
log_ratio = _row_function(divergences.log_ratio)
difference = _row_function(divergences.difference)
divergence = _row_function(divergences.divergence)
pick = _row_function(xla.pick)
place = _row_function(xla.place)
