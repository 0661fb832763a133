"""The training loop: the data lies on the device, and many steps are one dispatch."""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jaxent
from mnist.config import Config, ConfigError
from mnist.idx import Splits
from mnist.model import Cnn

LONGEST_DISPATCH = 64  # steps; the progress bar moves, and Ctrl-C is heard, between dispatches
MARGIN = 2  # pixels by which a training image is shifted at most


Params = Any  # a tree of arrays, as nnx.split makes it


class State(NamedTuple):
    """What a step changes."""

    params: Params
    optimizer: optax.OptState
    step: jax.Array


class Result(NamedTuple):
    """What a run ends with."""

    params: Params
    accuracy: float


def train(config: Config, splits: Splits) -> Result:
    """Train on one split, print the accuracy on the other after every epoch, and return the outcome."""
    images, labels = map(jnp.asarray, splits["train"])
    test_images, test_labels = map(jnp.asarray, splits["test"])
    shape = dispatches, steps, _ = plan(len(images), config.batch_size)
    total_steps = config.epochs * dispatches * steps
    optimizer = make_optimizer(config, total_steps)
    model, params = nnx.split(Cnn(nnx.Rngs(config.seed)))
    state = State(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    run = make_run(model, optimizer)
    order_key, step_key = jax.random.split(jax.random.key(config.seed))
    start = time.perf_counter()
    accuracy = 0.0
    with progress_bar() as bar:
        task = bar.add_task("training", total=total_steps)
        for epoch in range(1, config.epochs + 1):
            losses: list[float] = []
            for indices in shuffled(jax.random.fold_in(order_key, epoch), len(images), shape):
                state, loss = run(state, images, labels, indices, step_key)
                losses.append(float(loss))
                bar.advance(task, steps)
            accuracy = evaluate(model, state.params, test_images, test_labels)
            seconds = time.perf_counter() - start
            print(
                f"epoch {epoch:2}/{config.epochs}   loss {np.mean(losses):.4f}   "
                f"test accuracy {accuracy:.2%}   {seconds:.0f} s",
                flush=True,
            )
    return Result(state.params, accuracy)


def plan(examples: int, batch_size: int) -> tuple[int, int, int]:
    """Cut an epoch into equal dispatches: return their number, the steps of each, and the examples of a step.

    Equal, so that one compiled program serves all; the few examples left over differ from epoch to epoch.
    """
    steps = examples // batch_size
    if steps == 0:
        raise ConfigError(f"--batch-size is {batch_size}, but there are only {examples} training digits.")
    dispatches = -(-steps // LONGEST_DISPATCH)
    return dispatches, steps // dispatches, batch_size


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    schedule = optax.schedules.cosine_onecycle_schedule(steps, config.learning_rate, pct_start=0.15)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


@partial(jax.jit, static_argnums=(1, 2))
def shuffled(key: jax.Array, examples: int, shape: tuple[int, ...]) -> jax.Array:
    """Return the order in which an epoch visits the examples, cut to `shape`."""
    return jax.random.permutation(key, examples)[: np.prod(shape)].reshape(shape)


Run = Callable[[State, jax.Array, jax.Array, jax.Array, jax.Array], tuple[State, jax.Array]]


def make_run(model: nnx.GraphDef[Cnn], optimizer: optax.GradientTransformation) -> Run:
    """Compile many steps into one program, `run(state, images, labels, indices, key)`.

    `indices` (steps, batch) says which examples each step sees. Returns the new state and the mean loss.
    """

    def loss_of(params: Params, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        logits = nnx.merge(model, params)(images, key)
        return jaxent.cross_entropy(logits, labels)

    @partial(jax.jit, donate_argnums=0)
    def run(
        state: State, images: jax.Array, labels: jax.Array, indices: jax.Array, key: jax.Array
    ) -> tuple[State, jax.Array]:
        def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
            shift_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
            inputs, targets = shifted(shift_key, images[batch]), labels[batch]
            loss, grads = jax.value_and_grad(loss_of)(state.params, inputs, targets, dropout_key)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            return State(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), loss

        state, losses = jax.lax.scan(step, state, indices)
        return state, losses.mean()

    return run


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Move every image by up to MARGIN pixels along each axis."""
    padded = jnp.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * MARGIN + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


@partial(jax.jit, static_argnums=0)
def hits(model: nnx.GraphDef[Cnn], params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    network = nnx.merge(model, params)

    def guess(image: jax.Array) -> jax.Array:
        return network(image[None])[0].argmax()

    return (jax.lax.map(guess, images, batch_size=500) == labels).sum()


def evaluate(model: nnx.GraphDef[Cnn], params: Params, images: jax.Array, labels: jax.Array) -> float:
    """Return the share of images that the model labels rightly."""
    return int(hits(model, params, images, labels)) / len(labels)


def fingerprint(params: Params) -> str:
    """Return a short hash of all parameters' bits, equal only for runs that are equal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def progress_bar() -> Progress:
    """Return a bar for terminals; where stdout is none, it stays invisible."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
