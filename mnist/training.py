"""The training loop: the data lies on the devices, many steps are one dispatch, and any moment may be the last."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxent
from mnist import checkpoints, machine
from mnist.augment import augmented
from mnist.config import Config, ConfigError
from mnist.devices import divided, make_mesh, spread, whole
from mnist.evaluation import in_blocks, logits_of, scores
from mnist.idx import Splits
from mnist.model import Committee, make_network
from mnist.recipes import Recipe, make_optimizer
from mnist.signals import heard, tell
from mnist.terminal import progress_bar, say
from mnist.workdir import History, NotFiniteError, StoppedError, claim, sha256, write_metrics

SAVING = "Saving; again to stop now."
SAVE, SAVE_EVERY = 128, 10.0  # what a process asks for like a signal, of a larger number than any; seconds
LONGEST_DISPATCH = 64  # steps; the progress bar moves, and signals are heard, between dispatches

Params = Any  # a tree of arrays, as nnx.split makes it
Model = nnx.GraphDef[Committee]
Data = tuple[jax.Array, jax.Array]  # images and labels


class State(NamedTuple):
    """What a step changes. All that is random, the order of the data too, follows from the seed and the step."""

    step: jax.Array
    loss: jax.Array  # summed over the steps of this epoch
    params: Params
    optimizer: optax.OptState
    average: Params  # of parameters and batch statistics over the last steps: what predictions are made with


class Output(NamedTuple):
    """What a dispatch tells the host."""

    step: jax.Array  # the last one
    losses: jax.Array  # of all its steps
    asked: jax.Array  # the signal that some process has heard, or SAVE, or 0


class Result(NamedTuple):
    """What a run ends with."""

    params: Params
    accuracy: float
    history: History


def train(config: Config, splits: Splits) -> Result:
    """Train on one split, evaluate on the other after every epoch, and go on where an earlier call was stopped."""
    recipe, mesh, workdir = config.settings, make_mesh(), config.workdir
    shape = dispatches, steps, batch_size = plan(len(splits["train"].labels), recipe.batch_size, mesh.size)
    epoch_steps, total_steps = dispatches * steps, recipe.epochs * dispatches * steps
    claim(config, splits)
    say("configuration: " + ", ".join(f"{name} {value}" for name, value in config.decisive.items()))
    data: Data = jax.device_put(tuple(splits["train"]), whole(mesh))
    test_images, test_labels = in_blocks(splits["test"].images, mesh), splits["test"].labels
    optimizer = make_optimizer(recipe, total_steps)
    model, state = initial(config, optimizer, mesh)
    run = make_run(model, optimizer, recipe, mesh, epoch_steps)
    order_key, step_key = jax.random.split(jax.random.key(config.seed))
    start = time.perf_counter()

    with heard(tell(SAVING)) as signal, checkpoints.opened(workdir) as saved, progress_bar() as bar:
        step, history, items = checkpoints.latest(saved, as_items(state)) or (0, [], as_items(state))
        state = state._replace(**items.pop("progress"), **items)
        write_metrics(workdir, history)
        if step:
            say(f"{workdir} {'is complete' if step == total_steps else 'goes on'} after step {step:,}")
        if step < total_steps:
            machine.note(workdir, step)
        task = bar.add_task("training", total=total_steps * batch_size, completed=step * batch_size)

        def take(output: Output) -> int:
            losses = np.asarray(output.losses)
            for i in np.flatnonzero(~np.isfinite(losses)):
                raise NotFiniteError("The loss", int(output.step) - len(losses) + int(i) + 1, workdir)
            bar.advance(task, len(losses) * batch_size)
            return int(output.asked)

        while step < total_steps:
            epoch, begun = step // epoch_steps, time.monotonic()
            order = shuffled(jax.random.fold_in(order_key, epoch), len(data[1]), shape)
            outputs: list[Output] = []
            stop = 0
            for dispatch in range(step // steps % dispatches, dispatches):
                asked = signal() or (SAVE if time.monotonic() - begun > SAVE_EVERY else 0)
                state, output = run(state, data, order[dispatch], step_key, spread(asked, mesh))
                step += steps
                outputs.append(output)
                if len(outputs) > 1:  # the device has its next work, so it need not wait while this is fetched
                    stop = take(outputs.pop(0))
                if stop:
                    break
            stop = take(*outputs) or stop
            if not finite(state):
                raise NotFiniteError("A parameter", step, workdir)
            if step % epoch_steps == 0:
                test_loss, accuracy = scores(logits_of(model, mesh, state.average, test_images), test_labels)
                if not math.isfinite(test_loss):
                    raise NotFiniteError("The test loss", step, workdir)
                row = {"epoch": epoch + 1, "step": step, "train_loss": float(state.loss) / epoch_steps}
                history.append({**row, "test_loss": test_loss, "test_accuracy": accuracy})
                write_metrics(workdir, history)
                stop = int(spread(signal(), mesh).max()) or stop  # after the last epoch no dispatch would tell
                say(
                    f"epoch {epoch + 1:2}/{recipe.epochs}   loss {row['train_loss']:.4f}   "
                    f"test accuracy {accuracy:.2%}   {time.perf_counter() - start:.0f} s"
                )
            checkpoints.save(saved, step, history, as_items(state))
            if stop not in (0, SAVE):
                raise StoppedError(stop, step, workdir)
    return Result(state.average, history[-1]["test_accuracy"], history)


def plan(examples: int, batch_size: int, devices: int = 1) -> tuple[int, int, int]:
    """Cut an epoch into equal dispatches: return their number, the steps of each, and the examples of a step.

    Equal, so that one compiled program serves all; the few examples left over differ from epoch to epoch.
    """
    if batch_size % devices:
        raise ConfigError(
            f"--batch-size is {batch_size}, but must be a multiple of {devices}, the number of devices."
        )
    steps = examples // batch_size
    if steps == 0:
        raise ConfigError(f"--batch-size is {batch_size}, but there are only {examples} training images.")
    dispatches = -(-steps // LONGEST_DISPATCH)
    return dispatches, steps // dispatches, batch_size


def initial(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[Model, State]:
    """Return the network without its parameters, and the state before the first step, on every device."""
    model, params, statistics = nnx.split(make_network(config), nnx.Param, nnx.BatchStat)
    average = jax.tree.map(jnp.copy, joined(params, statistics))  # of its own: a step may overwrite both
    state = State(jnp.zeros((), jnp.int32), jnp.zeros(()), params, optimizer.init(params), average)
    return model, jax.device_put(state, whole(mesh))


def joined(params: Params, statistics: Params) -> Params:
    """Return all that the network needs for predictions, in one tree."""
    return nnx.merge_state(params, statistics)


def as_items(state: State) -> dict[str, Any]:
    """Return the trees that a checkpoint keeps, by name."""
    progress = {"step": state.step, "loss": state.loss}
    return {"params": state.params, "optimizer": state.optimizer, "average": state.average, "progress": progress}


@partial(jax.jit, static_argnums=(1, 2))
def shuffled(key: jax.Array, examples: int, shape: tuple[int, ...]) -> jax.Array:
    """Return the order in which an epoch visits the examples, cut to `shape`."""
    return jax.random.permutation(key, examples)[: np.prod(shape)].reshape(shape)


Run = Callable[[State, Data, jax.Array, jax.Array, jax.Array], tuple[State, Output]]


def make_run(
    model: Model, optimizer: optax.GradientTransformation, recipe: Recipe, mesh: Mesh, epoch_steps: int
) -> Run:
    """Compile many steps into one program, `run(state, data, indices, key, asked)`.

    `indices` (steps, batch) says which examples each step sees. Each device computes with its part of every batch;
    the loss is the mean over the whole batch, and the compiler adds what the devices must tell each other.
    """
    distorted = round((1 - recipe.undistorted) * recipe.epochs * epoch_steps)  # steps

    def loss_of(params: Params, statistics: Params, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        network = nnx.merge(model, params, statistics, copy=True)  # its statistics become the batch's
        losses = jax.vmap(jaxent.cross_entropy, in_axes=(0, None))(network(images, key), labels)  # of the members
        return losses.mean(), nnx.state(network, nnx.BatchStat)

    @partial(jax.jit, donate_argnums=0, out_shardings=whole(mesh))
    def run(state: State, data: Data, indices: jax.Array, key: jax.Array, asked: jax.Array) -> tuple[State, Output]:
        images, labels = data

        def step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
            batch = jax.lax.with_sharding_constraint(batch, divided(mesh, 0))
            augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
            inputs = augmented(augment_key, images[batch], jnp.where(state.step < distorted, 1.0, 0.0))
            args = state.params, nnx.filter_state(state.average, nnx.BatchStat), inputs, labels[batch], dropout_key
            (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(*args)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            decay = jnp.minimum(recipe.ema, (state.step + 1) / (state.step + 10))  # at first, forget sooner
            average = optax.incremental_update(joined(params, statistics), state.average, 1 - decay)
            total = jnp.where(state.step % epoch_steps == 0, 0, state.loss) + loss
            return State(state.step + 1, total, params, optimizer_state, average), loss

        state, losses = jax.lax.scan(step, state, indices)
        return state, Output(state.step, losses, asked.max())

    return run


@jax.jit
def finite(state: State) -> jax.Array:
    """Say whether all of the state is."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def fingerprint(params: Params) -> str:
    """Return a short hash of all parameters' bits, equal only for runs that are equal."""
    return sha256(params)[:16]
