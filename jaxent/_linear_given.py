"""What the losses of a linear layer's outputs are made of, and those of some hidden states with their gradient."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ._class_axis import ClassAxis
from ._cross_entropy import Added, LossOptions, LossStats, Mixture, mixture, read_target
from ._distillation import Divergence, divergences, divergences_and_gradient
from ._entropy import entropies, entropies_and_gradient
from ._kernels.product import Layer
from ._label_loss import How, mixed
from ._nll import counting
from ._product_loss import Center, Gradient, gradient_of, product_losses, product_losses_and_gradient

Live = Bool[Array, " tokens"] | None  # those that count; None if all do
Wanted = tuple[bool, bool, bool, bool]  # gradients of hidden, kernel, bias and logit_scale
NOTHING: Wanted = (False, False, False, False)
_OfRows = Float[Array, " size"] | None


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


class Gradients(NamedTuple):
    """Of a sum of losses, accumulated in at least float32; None where it is not wanted."""

    hidden: Float[Array, "tokens features"] | None
    kernel: Float[Array, "features classes"] | None
    bias: Float[Array, " classes"] | None
    logit_scale: Float[Array, ""] | None


class Known(NamedTuple):
    """Of each token beside its loss; 0 of those that do not count. It has no derivatives."""

    logsumexp: Float[Array, " tokens"]
    predicted: Integer[Array, " tokens"]


def compute_dtype(arrays: Arrays) -> jnp.dtype:
    of_teacher = () if arrays.teacher is None else (arrays.labels, arrays.teacher.kernel)
    return jnp.promote_types(jnp.result_type(arrays.hidden, arrays.kernel, *of_teacher), jnp.float32)


def counts_of(options: Options, arrays: Arrays, live: Live) -> Live:
    """Which tokens count; None if all of them do."""
    counts = counting(arrays.labels, options.loss.ignore_index)
    return live if counts is None else counts if live is None else counts & live


def beside(rows: Shaped[Array, "tokens ..."], x: Shaped[Array, " tokens"]) -> Array:
    """`x` as it broadcasts to rows."""
    return x.reshape(x.shape + (1,) * (rows.ndim - 1))


class Given(NamedTuple):
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


def given_by(arrays: Arrays, *, by_class: bool = False, filled: int = 0) -> Given:
    kernel, bias = arrays.kernel.astype(jnp.result_type(arrays.hidden, arrays.kernel)), arrays.bias
    if filled:
        bias = jnp.zeros(kernel.shape[1], compute_dtype(arrays)) if bias is None else bias
        bias = jnp.pad(bias, (0, filled), constant_values=-jnp.inf)
        kernel = jnp.pad(kernel, ((0, 0), (0, filled)))
    teacher = None
    if arrays.teacher is not None:
        dtype = jnp.result_type(arrays.labels, arrays.teacher.kernel)
        teacher = Layer(arrays.teacher.kernel.astype(dtype), arrays.teacher.bias)
    layer = Layer(kernel.T if by_class else kernel, bias, arrays.logit_scale, by_class, filled)
    return Given(layer, arrays.where, arrays.weight, arrays.added, teacher)


def losses_of(
    options: Options, given: Given, near: Center | None, x: Array, labels: Array
) -> tuple[Float[Array, "size ..."], Known | None]:
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


def _known(stats: LossStats | None) -> Known | None:
    return None if stats is None else Known(*stats[1:])


def losses_and_gradient_of(
    options: Options,
    given: Given,
    near: Center | None,
    stored: DTypeLike,
    x: Float[Array, "size features"],
    labels: Array,
    counts: Bool[Array, " size"],
    scale: Float[Array, "size ..."],
    *,
    scaled: bool = False,
) -> tuple[Float[Array, "size ..."], Known | None, Gradient, _OfRows]:
    """The losses of hidden states, what else is known of these, and gradients of `sum(scale * losses)`.

    First with respect to logits before they are scaled, then, if they are held, for each token by what scales them.
    """
    layer = given.layer
    if options.divergence is not None and given.teacher is not None:
        logits, of_teacher = given.shown(layer.logits(x)), given.shown(_logits(given.teacher, labels))
        scale = jnp.where(counts, scale, 0.0)
        loss, gradient = divergences_and_gradient(options.classes, options.divergence, logits, of_teacher, scale)
        return loss, None, gradient_of(gradient), None
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
        return loss, _known(stats), gradient_of(layer.scaled(gradient)), of_scale
    assert losses.label is not None
    factors = losses.factors.times(layer.scaled(scale)).along(losses.label)
    parts, gradient = product_losses_and_gradient(
        layer, near, x, losses.label, factors, options.classes, stored, scaled=scaled
    )
    return mixed(losses.label, parts, losses.factors), None, gradient, None


def _logits(layer: Layer, x: Float[Array, "size features"]) -> Float[Array, "size classes"]:
    return layer.logits(x.astype(layer.kernel.dtype))


def _capped(options: Options, logits: Float[Array, "size classes"]) -> Float[Array, "size classes"]:
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)
