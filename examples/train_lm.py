"""Train a small GPT on Python's standard library, with and without the logits: `python examples/train_lm.py compare`.

The vocabulary is what makes a language model's loss expensive: of 2,048 tokens and 32,768 words the logits alone are
256 MiB, their gradient as much again. `--loss fused` takes `jaxent.linear_cross_entropy`, which never holds either.

Where a file ends inside a sequence, what follows is padding: it has weight 0. The log shows the loss with its z-loss,
that part alone, and the accuracy, which `return_stats` knows without another matrix product.

    pip install -e ".[examples]"
    python examples/train_lm.py train --loss fused    # or unfused, or optax
    python examples/train_lm.py compare               # all three, each in a process of its own, and a picture
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from numpy.typing import NDArray

import jaxent

Loss = Literal["optax", "unfused", "fused"]


@dataclass(frozen=True)
class Config:
    """What all runs of a comparison share."""

    workdir: Path = Path("~/.cache/jaxent-lm")
    """Where the tokens of the standard library are kept."""
    vocabulary: int = 32768
    width: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 128
    """Tokens a sequence."""
    batch_size: int = 16
    """Sequences a step."""
    steps: int = 300
    learning_rate: float = 1e-3
    """The highest of the schedule, which warms up and then falls along a cosine."""
    z_loss: float = 1e-4
    """Factor of the squared logsumexp of the logits, which keeps them small."""
    seed: int = 0
    """Decides the initial parameters and the batches, whatever the loss."""


# ---- The loss: the one place where the runs differ. --------------------------------------------------------------


def loss_of_hidden(
    loss: Loss, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, counts: jax.Array, z_loss: float
) -> tuple[jax.Array, jaxent.LossStats]:
    """Return the mean cross-entropy over the tokens that count, and what is known of each token.

    Of `hidden` (tokens, width) times `kernel` (width, vocabulary) at the labels (tokens,).
    """
    options: Any = {"sample_weight": counts, "z_loss": z_loss, "return_stats": True}
    match loss:
        case "optax":
            logits = hidden @ kernel
            lse = jax.nn.logsumexp(logits, axis=-1)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels) + z_loss * lse**2
            losses, lse = (jnp.where(counts, of_each, 0.0) for of_each in (losses, lse))
            return losses.sum() / counts.sum(), jaxent.LossStats(losses, lse, logits.argmax(-1))
        case "unfused":
            return jaxent.cross_entropy(hidden @ kernel, labels, **options)
        case "fused":
            return jaxent.linear_cross_entropy(hidden, kernel, labels, **options)


# ---- The model. --------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Causal self-attention and a feed-forward network, each added to what it reads."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Gpt(nnx.Module):
    """Maps tokens (batch, length) to hidden states (batch, length, width): what comes before the logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        embed = partial(nnx.Embed, features=config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.tokens, self.positions = embed(config.vocabulary), embed(config.length)
        self.blocks = nnx.List([Block(config.width, config.heads, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def kernel(self) -> jax.Array:
        """The last layer's kernel (width, vocabulary), tied to the embedding of the tokens."""
        return self.tokens.embedding[...].T


# ---- The data. ---------------------------------------------------------------------------------------------------


END = 0  # the mark after each file


def tokens_of(config: Config) -> NDArray[np.int32]:
    """Return the standard library as one row of tokens, from the cache if it is there."""
    workdir = config.workdir.expanduser()
    path = workdir / f"stdlib-{platform.python_version()}-{config.vocabulary}.npy"
    if not path.exists():
        tokens = tokenize(sources(), config.vocabulary)
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=workdir, prefix="incomplete.") as staging:
            np.save(Path(staging) / path.name, tokens)
            os.replace(Path(staging) / path.name, path)  # there whole, or not at all
    return np.load(path)


def sources() -> list[str]:
    """Read the modules of the standard library in sorted order, without tests and what is mostly tables."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "encodings", "idlelib", "pydoc_data", "turtledemo", "lib2to3"}
    paths = [path for path in sorted(stdlib.rglob("*.py")) if skipped.isdisjoint(path.relative_to(stdlib).parts)]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def tokenize(texts: list[str], vocabulary: int) -> NDArray[np.int32]:
    """Learn a byte-pair encoding from the texts, and encode them, each with an end mark after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # only this function needs it, and only once

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return np.concatenate([np.array([*text.ids, END], np.int32) for text in tokenizer.encode_batch(texts)])


def batches(config: Config, tokens: NDArray[np.int32]) -> Iterator[jax.Array]:
    """Draw `steps` batches (batch_size, length + 1) of windows anywhere in the text."""
    rng = np.random.default_rng(config.seed)
    for _ in range(config.steps):
        starts = rng.integers(len(tokens) - config.length, size=(config.batch_size, 1))
        yield jnp.asarray(tokens[starts + np.arange(config.length + 1)])


def counted(batch: jax.Array) -> jax.Array:
    """Say which labels of a batch are of the file with which their sequence begins; the others are padding."""
    return jnp.cumsum(batch[:, :-1] == END, axis=1) == 0


# ---- Training. ---------------------------------------------------------------------------------------------------

State = tuple[Any, optax.OptState]  # parameters and the optimizer's
Log = dict[str, jax.Array]  # means over the tokens of a step
Step = Callable[[State, jax.Array], tuple[State, Log]]


def make_step(config: Config, loss: Loss) -> tuple[State, Step]:
    """Return the initial state and the function that trains on one batch."""
    model, params = nnx.split(Gpt(config, nnx.Rngs(config.seed)))
    schedule = optax.schedules.cosine_onecycle_schedule(config.steps, config.learning_rate, pct_start=0.1)
    optimizer = optax.adamw(schedule, weight_decay=0.01)

    def loss_of(params: Any, batch: jax.Array) -> tuple[jax.Array, Log]:
        gpt = nnx.merge(model, params)
        hidden = gpt(batch[:, :-1]).reshape(-1, config.width)  # as rows, the logits cost optax and jaxent least
        labels, counts = batch[:, 1:].reshape(-1), counted(batch).reshape(-1)
        value, stats = loss_of_hidden(loss, hidden, gpt.kernel(), labels, counts, config.z_loss)
        z_losses, hits = config.z_loss * stats.logsumexp**2, stats.predicted == labels
        log = {"z_loss": jnp.mean(z_losses, where=counts), "accuracy": jnp.mean(hits, where=counts)}
        return value, {"loss": value, **log}

    def step(state: State, batch: jax.Array) -> tuple[State, Log]:
        params, optimizer_state = state
        (_, log), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), log

    return (params, optimizer.init(params)), step


def compile_step(config: Config, loss: Loss) -> tuple[State, jax.stages.Compiled]:
    """Return the initial state and the compiled step; ahead of time, so that no step's seconds hold that."""
    state, step = make_step(config, loss)
    batch = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)
    return state, jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def temp_bytes(step: jax.stages.Compiled) -> int:
    """Return what the compiled step allocates besides the state: no measurement, but XLA's own plan."""
    analysis: Any = step.memory_analysis()
    return analysis.temp_size_in_bytes


def peak_bytes() -> int:
    """Return the most memory used so far: of the device where it counts, else of this process."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(
    config: Annotated[Config, tyro.conf.OmitArgPrefixes], loss: Loss = "fused", report: Path | None = None
) -> None:
    """Train with one of the losses, and on request write what it took as JSON.

    Args:
        config: the run.
        loss: optax's or jaxent's of the logits, or jaxent's without logits.
        report: file for the losses, the seconds a step and the bytes.
    """
    tokens = tokens_of(config)
    state, step = compile_step(config, loss)
    losses: list[float] = []
    seconds: list[float] = []
    for batch in batches(config, tokens):
        start = time.perf_counter()
        state, log = step(state, batch)
        losses.append(float(log["loss"]))
        seconds.append(time.perf_counter() - start)
        if len(losses) % 10 in (0, 1):
            print(
                f"{loss:>8}   step {len(losses):4}   loss {losses[-1]:.4f}   z-loss {log['z_loss']:.4f}   "
                f"accuracy {log['accuracy']:.1%}   {seconds[-1]:.2f} s",
                flush=True,
            )
    if report:
        memory = {"temp_bytes": temp_bytes(step), "peak_bytes": peak_bytes()}
        device = jax.devices()[0].device_kind
        report.write_text(json.dumps({"device": device, "losses": losses, "seconds": seconds, **memory}))


def prepare(config: Annotated[Config, tyro.conf.OmitArgPrefixes]) -> None:
    """Tokenise the standard library, unless that is done already."""
    tokens = tokens_of(config)
    print(f"{len(tokens):,} tokens, {len(np.unique(tokens)):,} of {config.vocabulary:,} words in use", flush=True)


# ---- The comparison. ---------------------------------------------------------------------------------------------


def compare(
    config: Annotated[Config, tyro.conf.OmitArgPrefixes],
    output: Path = Path("train_lm.json"),
    picture: Path = Path("train_lm.png"),
) -> None:
    """Train with every loss from the same start on the same batches, draw the losses, and print a table.

    Args:
        config: the runs.
        output: JSON file for all that was measured.
        picture: PNG or SVG file.
    """
    flags = [text for name, value in asdict(config).items() for text in (f"--{name.replace('_', '-')}", str(value))]
    for path in (output, picture):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the runs
    runs: dict[str, dict[str, Any]] = {}
    # A process's peak is that of all it has done, and on Linux no less than its parent's: so one process a run, and
    # one that tokenises, while this one only waits.
    command("prepare", *flags)
    with tempfile.TemporaryDirectory() as folder:
        for loss in get_args(Loss):
            report = Path(folder) / f"{loss}.json"
            command("train", "--loss", loss, "--report", str(report), *flags)
            runs[loss] = json.loads(report.read_text())
    shape = {name: value for name, value in asdict(config).items() if name != "workdir"}
    output.write_text(json.dumps({"jax": jax.__version__, "config": shape, "runs": runs}) + "\n")
    print(table(runs))
    draw(config, runs, picture)


def command(*args: str) -> None:
    """Run this script with other arguments. In a session of its own it hears no Ctrl-C, which ends it through us."""
    subprocess.run([sys.executable, __file__, *args], check=True, start_new_session=True)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return what the runs took as a table in Markdown."""
    rows = ["| loss | last ten losses | step's temporaries | peak memory | median step |", "|---" + 4 * "|---:" + "|"]
    for loss, run in runs.items():
        last, seconds = statistics.mean(run["losses"][-10:]), statistics.median(run["seconds"])
        temp, peak = run["temp_bytes"] / 2**20, run["peak_bytes"] / 2**20
        rows.append(f"| {loss} | {last:.6f} | {temp:,.0f} MiB | {peak:,.0f} MiB | {seconds:.3f} s |")
    return "\n".join(rows)


def draw(config: Config, runs: dict[str, dict[str, Any]], picture: Path) -> None:
    """Draw the losses over each other, and how far each is from the unfused one's."""
    from matplotlib.figure import Figure  # only `compare` draws

    names = {"optax": "optax", "unfused": "cross_entropy", "fused": "linear_cross_entropy"}
    colors = {"optax": "0.6", "unfused": "tab:orange", "fused": "tab:blue"}
    figure = Figure(figsize=(5, 6), dpi=150, layout="constrained")  # its text is read on a phone, too
    axes = figure.subplot_mosaic([["loss"], ["gap"]], sharex=True, height_ratios=[3, 2])

    for loss, run in runs.items():
        width = {"optax": 7, "unfused": 4, "fused": 1.2}[loss]  # where they agree, the last hides the others
        axes["loss"].plot(run["losses"], color=colors[loss], label=names[loss], linewidth=width)
        if loss != "unfused":
            gap = np.abs(np.subtract(run["losses"], runs["unfused"]["losses"]))
            equal = f"{names[loss]}: equal in {np.sum(gap == 0)} of {len(gap)} steps"  # which no logarithm shows
            axes["gap"].semilogy(np.where(gap > 0, gap, np.nan), ".", markersize=3, color=colors[loss], label=equal)
    tokens = config.batch_size * config.length
    axes["loss"].set(title=f"loss, {tokens:,} tokens a step and {config.vocabulary:,} words")
    axes["loss"].legend()
    axes["gap"].legend(markerscale=3, fontsize="small", loc="lower right")
    axes["gap"].set(title="distance of the loss from cross_entropy's", xlabel="step")
    figure.savefig(picture)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "compare": compare, "prepare": prepare}, args=args, description=__doc__
        )
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as error:  # the child has said why
        return error.returncode
    except OSError as error:
        print(f"{error.filename or 'The system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
