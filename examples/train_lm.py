"""Trains a small GPT whose logits are never stored, beside the plain baseline, and compares the two.

Three runs with equal seeds, hence equal initial weights and batches:

  baseline   dense logits, optax.softmax_cross_entropy_with_integer_labels, optax.adamw
  ours       jaxsoft.linear_logits, a loss of jaxsoft, an optimizer of jaxsoft
  control    as ours, but with logits and attention scores that are stored: must end where ours ends

The text is the manual that comes with Python and the source of its standard library, or a file of yours.
The curves, a table of time and memory, and a sampled continuation are the result.

  python examples/train_lm.py --quick
  python examples/train_lm.py --loss poly_loss --optimizer lion_k --text book.txt
"""

import argparse
import collections
import functools
import inspect
import json
import math
import multiprocessing
import pathlib
import pydoc_data.topics
import re
import resource
import signal
import statistics
import sys
import sysconfig
import time
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxsoft
from jaxsoft import losses, optimizers
from jaxsoft.attention import dot_product_attention

# What the flags choose from: one line each.

LOSSES = {
    loss.__name__: loss
    for loss in (losses.cross_entropy, losses.poly_loss, losses.focal_loss, losses.max_suppression_loss)
}
NORMALIZERS = {
    "softmax": jaxsoft.softmax,
    "softmax_one": jaxsoft.softmax_one,
    "scalable_softmax": jaxsoft.scalable_softmax,
    "self_adjust_softmax": jaxsoft.self_adjust_softmax,
    "softpick": jaxsoft.softpick,
    "stablemax": jaxsoft.stablemax,
    "taylor_softmax": jaxsoft.taylor_softmax,
    "sigmoid_weights": jaxsoft.sigmoid_weights,
    "relu_weights": jaxsoft.relu_weights,
    "softplus_attention_weights": jaxsoft.softplus_attention_weights,  # of cosines, see attend
    "adaptive_temperature_softmax": jaxsoft.adaptive_temperature_softmax,
    "clipped_softmax": functools.partial(jaxsoft.clipped_softmax, zeta=1.0, gamma=-0.01),
    "sparse_softmax": jaxsoft.sparse_softmax,
    "sparsemax": jaxsoft.sparsemax,
    "entmax15": jaxsoft.entmax15,
}
OPTIMIZERS = {  # name: (learning rate -> optimizer, a good peak learning rate at the default sizes)
    "adamw": (optax.adamw, 3e-3),
    "lion_k": (optimizers.lion_k, 1e-3),
    "perpendicular_adamw": (
        lambda rate, **kw: optax.chain(optimizers.perpendicular_gradient(), optax.adamw(rate, **kw)),
        3e-3,
    ),
    "spam": (optimizers.spam, 3e-3),
    "stable_spam": (optimizers.stable_spam, 3e-3),
}
QUICK = dict(steps=30, batch=4, sequence=64, width=64, layers=1, heads=2, vocab=4096)
QUICK |= dict(source_mb=0.5, valid_batches=4, sample_tokens=20)


# Text.


class Tokenizer:
    """Whole tokens for the most frequent words, spaces and punctuation; tokens within them spell the rest."""

    PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|_+|\s+")  # every text is a sequence of these

    def __init__(self, text: str, size: int):
        frequent = collections.Counter(self.PIECES.findall(text)).most_common(size - 256)
        self.tokens = [bytes([b]) for b in range(256)]  # so that every text can be spelled
        self.tokens += [piece.encode() for piece, _ in frequent]
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def spell(self, piece: str) -> list[int]:
        """The ids of a piece, each of the longest token that fits."""
        rest, ids = piece.encode(), []
        while rest:
            n = next(n for n in range(len(rest), 0, -1) if rest[:n] in self.ids)
            ids.append(self.ids[rest[:n]])
            rest = rest[n:]
        return ids

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text."""
        pieces = self.PIECES.findall(text)
        spelled = {piece: self.spell(piece) for piece in set(pieces)}
        return np.array([i for piece in pieces for i in spelled[piece]], np.int32)

    def decode(self, ids) -> str:
        """The text of ids."""
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


def read_documents(args: argparse.Namespace) -> list[str]:
    """The user's file; or Python's manual, then its standard library's source up to a limit."""
    if args.text is not None:
        return [args.text.read_text(encoding="utf-8")]
    documents = list(pydoc_data.topics.topics.values())
    budget = args.source_mb * 1e6
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        budget -= path.stat().st_size
        if budget < 0:
            break
        documents.append(path.read_text(encoding="utf-8", errors="replace"))
    return documents


def batches(tokens: np.ndarray, count: int, args: argparse.Namespace, seed: int) -> np.ndarray:
    """`[count, batch, sequence + 1]` stretches of the text, from random places."""
    starts = np.random.default_rng(seed).integers(len(tokens) - args.sequence, size=(count, args.batch, 1))
    return tokens[starts + np.arange(args.sequence + 1)]


# The model: a pre-norm GPT that returns hidden states and the head, not logits.


def attend(name, streamed, q, k, v):
    """Causal attention of `[batch, time, heads, features]` with any normalizer; streamed, or with stored scores."""
    normalizer, scale = NORMALIZERS[name], q.shape[-1] ** -0.5
    if name == "softplus_attention_weights":
        normalizer, scale = functools.partial(normalizer, scale=math.log(q.shape[-1])), 1.0
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
    if streamed:
        return dot_product_attention(q, k, v, normalizer=normalizer, scale=scale, is_causal=True)
    if normalizer is jaxsoft.softmax:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bkhd->bqhd", normalizer(scores, where=causal), v)


class Block(nnx.Module):
    """Attention, then a two-layer perceptron, each on the normalized residual stream."""

    def __init__(self, args: argparse.Namespace, streamed: bool, rngs: nnx.Rngs):
        width, linear = args.width, functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads, self.attend = args.heads, functools.partial(attend, args.normalizer, streamed)
        self.norm1, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x):
        """Adds to the residual stream `[batch, time, width]`."""
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, self.heads, -1)
        x = x + self.out(self.attend(*jnp.moveaxis(qkv, -3, 0)).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """From tokens `[batch, time]` to hidden states `[batch, time, width]` and the head's kernel.

    The kernel is `[width, vocab]`, or the embedding table `[vocab, width]` if the two are tied.
    """

    def __init__(self, args: argparse.Namespace, vocab: int, streamed: bool, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocab, args.width, embedding_init=small, rngs=rngs)
        self.place = nnx.Embed(args.sequence, args.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(args, streamed, rngs) for _ in range(args.layers)])
        self.norm = nnx.RMSNorm(args.width, rngs=rngs)
        self.head = None if args.tied else nnx.Param(small(rngs.params(), (args.width, vocab)))

    def __call__(self, tokens):
        """The hidden states and the head's kernel."""
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x), self.embed.embedding[...] if self.head is None else self.head[...]


# Training.


def make_logits(hidden, kernel, tied: bool, streamed: bool):
    """The one-line change."""
    if streamed:  # an expression: [tokens, vocab] is never stored
        return jaxsoft.linear_logits(hidden, kernel, transpose_weight=tied)
    return hidden @ (kernel.T if tied else kernel)


def loss_options(args: argparse.Namespace) -> dict:
    """The options of the loss that were given."""
    options = {"z_loss": args.z_loss, "label_smoothing": args.label_smoothing}
    return {name: value for name, value in options.items() if value is not None}


def make_optimizer(name: str, rate: float | None, args: argparse.Namespace) -> optax.GradientTransformation:
    """Linear warm-up, cosine decay, and weight decay of the matrices."""
    make, default_rate = OPTIMIZERS[name]
    peak = default_rate if rate is None else rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, args.steps // 10 + 1, args.steps + 1)

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return make(schedule, weight_decay=args.weight_decay, mask=matrices)


def run(args: argparse.Namespace, variant: str, tokenizer: Tokenizer, train, valid):
    """Trains one variant: yields once it is compiled, then after every step, and at the end its results."""
    streamed = variant == "ours"
    if variant == "baseline":
        args = argparse.Namespace(**{**vars(args), "normalizer": "softmax"})
        optimizer = make_optimizer("adamw", args.baseline_learning_rate, args)

        def train_loss(logits, labels):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        valid_loss = train_loss
    else:
        optimizer = make_optimizer(args.optimizer, args.learning_rate, args)

        def train_loss(logits, labels):
            return losses.weighted_mean(LOSSES[args.loss], logits, labels, **loss_options(args))

        def valid_loss(logits, labels):
            return losses.cross_entropy(logits, labels).mean()

    graph, params = nnx.split(GPT(args, len(tokenizer.tokens), streamed, nnx.Rngs(args.seed)))
    opt_state = optimizer.init(params)
    checksum = zlib.crc32(train)
    for p in jax.tree.leaves(params):  # copies, because a buffer that NumPy knows cannot be donated
        checksum = zlib.crc32(np.asarray(jnp.copy(p)), checksum)

    def mean_loss(params, tokens, loss):
        hidden, kernel = nnx.merge(graph, params)(tokens[:, :-1])
        # Flat rows, in all runs: on a CPU, XLA multiplies [tokens, width] faster than [batch, time, width].
        logits = make_logits(hidden.reshape(-1, args.width), kernel, args.tied, streamed)
        return loss(logits, tokens[:, 1:].reshape(-1))

    def train_step(params, opt_state, tokens):
        loss, gradient = jax.value_and_grad(mean_loss)(params, tokens, train_loss)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def valid_step(params, tokens):
        return mean_loss(params, tokens, valid_loss)

    train_step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, opt_state, train[0]).compile()
    valid_step = jax.jit(valid_step).lower(params, train[0]).compile()

    def validate() -> float:
        return float(np.mean([valid_step(params, tokens) for tokens in valid]))

    curve, validation, seconds = [], [(0, validate())], []
    yield {"step": 0}
    memory_before = resident_memory()
    for step, tokens in enumerate(train, 1):
        began = time.perf_counter()
        params, opt_state, loss = jax.block_until_ready(train_step(params, opt_state, tokens))
        seconds.append(time.perf_counter() - began)
        curve.append(float(loss))
        if step % max(args.steps // args.validations, 1) == 0 or step == args.steps:
            validation.append((step, validate()))
        yield {"step": step, "loss": curve[-1], "valid": validation[-1][1], "seconds": seconds[-1]}

    peak = peak_memory()
    median = statistics.median(seconds[2:] or seconds)  # without the warm-up
    yield {
        "train_loss": curve,
        "validation": validation,
        "validation_before": validation[0][1],
        "validation_after": validation[-1][1],
        "seconds_per_step": median,
        "tokens_per_second": args.batch * args.sequence / median,
        "temporary_bytes": train_step.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak,
        "growth_bytes": peak - memory_before,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "start_checksum": checksum,  # of the initial weights and all batches
        "sample": continue_text(args, graph, params, tokenizer) if streamed else None,
    }


def continue_text(args: argparse.Namespace, graph, params, tokenizer: Tokenizer) -> str:
    """Samples a continuation of the prompt; neither temperature nor top-k stores the logits."""

    @jax.jit
    def next_token(window, last, key):
        hidden, kernel = nnx.merge(graph, params)(window[None])
        logits = make_logits(hidden[0, last], kernel, args.tied, streamed=True)
        top = jaxsoft.top_k(jaxsoft.temperature(logits, args.temperature), args.top_k)
        return top.indices[jax.random.categorical(key, top.values)]

    ids = list(tokenizer.encode(args.prompt or "\n"))
    for key in jax.random.split(jax.random.key(args.seed), args.sample_tokens):
        window = np.zeros(args.sequence, np.int32)
        recent = ids[-args.sequence :]
        window[: len(recent)] = recent
        ids.append(int(next_token(window, len(recent) - 1, key)))
    return tokenizer.decode(ids)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes: Python, libraries, compiler and all."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """The resident memory of this process now, in bytes; where the system does not say, its peak."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory()


# The comparison.


def load(args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, and batches for training and validation, which has the last tenth of each document."""
    documents = read_documents(args)
    cuts = [len(document) * 9 // 10 for document in documents]
    train = "".join(document[:cut] for document, cut in zip(documents, cuts))
    valid = "".join(document[cut:] for document, cut in zip(documents, cuts))
    tokenizer = Tokenizer(train, args.vocab)
    train, valid = tokenizer.encode(train), tokenizer.encode(valid)
    if min(len(train), len(valid)) <= args.sequence:
        raise ValueError(
            f"the text is too short: {len(train)} tokens to train on, {len(valid)} to validate on, "
            f"and --sequence is {args.sequence}"
        )
    print(
        f"{len(train):,} tokens of text to train on, {len(valid):,} to validate on, a vocabulary of "
        f"{len(tokenizer.tokens):,}\n{args.steps} steps of {args.batch} x {args.sequence} tokens\n"
    )
    return (
        tokenizer,
        batches(train, args.steps, args, args.seed),
        batches(valid, args.valid_batches, args, args.seed + 1),
    )


def work(connection, *run_args) -> None:
    """The process of a run: sends each message, then waits for its turn."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process answers Ctrl-C
    for message in run(*run_args):
        connection.send(message)
        if "step" in message:
            connection.recv()


def compare(args: argparse.Namespace, variants: dict[str, str], console: Console, data) -> dict[str, dict]:
    """Trains all variants and shows how far they are; returns their results.

    Each has a process, so that the peak of its memory is its own. They take a step in turns, never at the same
    time, so that whatever else the machine does slows all of them.
    """
    context = multiprocessing.get_context("spawn")
    connections, tasks = {}, {}
    name, numbers = TextColumn("{task.description:8}"), TextColumn("{task.fields[numbers]}")
    columns = name, BarColumn(10), MofNCompleteColumn(), numbers, TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for variant in variants:
            connections[variant], theirs = context.Pipe()
            context.Process(target=work, args=(theirs, args, variant, *data), daemon=True).start()
            theirs.close()
            tasks[variant] = progress.add_task(variant, total=args.steps, numbers="compiling")
        for connection in connections.values():
            connection.recv()
        for step in range(1, args.steps + 1):
            for variant, connection in connections.items():
                connection.send("go on")
                message = connection.recv()
                rate = args.batch * args.sequence / message["seconds"]
                numbers = f"loss {message['loss']:.3f}  valid. {message['valid']:.3f}  {rate:,.0f} tokens/s"
                progress.update(tasks[variant], completed=step, numbers=numbers)
                if not console.is_terminal and step % max(args.steps // 10, 1) == 0:
                    print(f"{variant:8}  step {step:>4}/{args.steps}  {numbers}", flush=True)
        for connection in connections.values():
            connection.send("finish")
        return {variant: connection.recv() for variant, connection in connections.items()}


def show(results: dict[str, dict], variants: dict[str, str], console: Console) -> None:
    """Prints the table, the check against the control, and the sample."""
    table = Table("run", box=box.SIMPLE_HEAD)
    headings = ("valid.\nbefore", "valid.\nafter", "step\nms", "tokens\n/s")
    for heading in (*headings, "temporary\nMB", "peak\nMB", "growth\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant, r in results.items():
        table.add_row(
            variant,
            f"{r['validation_before']:.4f}",
            f"{r['validation_after']:.4f}",
            f"{1e3 * r['seconds_per_step']:.0f}",
            f"{r['tokens_per_second']:,.0f}",
            *(f"{r[k] / 1e6:,.0f}" for k in ("temporary_bytes", "peak_bytes", "growth_bytes")),
        )
    console.print(table)
    print("valid.:     cross-entropy in nats a token, on text that is not trained on")
    print("step:       median time, after a warm-up")
    print("temporary:  what the compiled training step allocates beside its inputs and outputs")
    print("peak:       largest resident memory of the run's process, Python and the compiler included")
    print("growth:     peak minus the memory in use before the first step\n")
    for variant, what in variants.items():
        print(f"{variant:8}  {what}")
    if "control" in results:
        ours, control = results["ours"], results["control"]
        gap = abs(ours["validation_after"] - control["validation_after"])
        print(f"\nours and control end {gap:.1e} nats apart")
    print(f"\na sample of ours:\n\n{results['ours']['sample']}\n")


def plot(results: dict[str, dict], path: pathlib.Path) -> None:
    """Draws the curves of training and validation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    # The control lies on top of ours: dashes over a broad line show both.
    looks = {"baseline": dict(color="C7"), "ours": dict(color="C0", lw=4, alpha=0.5)}
    looks["control"] = dict(color="k", lw=1.2, ls="--")
    for variant, r in results.items():
        loss = np.array(r["train_loss"])
        window = min(10, len(loss))
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        left.plot(np.arange(window, len(loss) + 1), smooth, label=variant, **looks[variant])
        label = f"{variant}: {r['validation_after']:.3f}"
        right.plot(*zip(*r["validation"]), marker="o", ms=4, label=label, **looks[variant])
    left.set(title=f"Training loss, mean of {window} steps", xlabel="step", ylabel="nats a token")
    right.set(title="Validation cross-entropy", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# The command line.


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        """Exits with the message alone, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = float("inf")):
    """A type for a flag: a number in a range."""
    wanted = f"{'an integer' if kind is int else 'a number'} of {low} or more"
    wanted += f", {high} at most" if high < float("inf") else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high and value < float("inf")):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, flag, kind, default, help, **options):
        help += "" if default is None else " (%(default)s)"
        group.add_argument(flag, type=kind, default=default, help=help, **options)

    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--no-control", action="store_true", help="leave out the third run")
    add(parser, "--out", pathlib.Path, "runs", "folder of train_lm.png and train_lm.json")
    add(parser, "--seed", number(int, 0), 0, "of weights, batches and sample")

    text = parser.add_argument_group("text")
    add(text, "--text", pathlib.Path, None, "a file in UTF-8 to train on, instead of Python's own text")
    add(text, "--source-mb", number(float, 0), 5.0, "how much of the standard library's source to read")
    add(text, "--vocab", number(int, 512), 16384, "largest size of the vocabulary")

    model = parser.add_argument_group("model")
    add(model, "--width", number(int, 1), 128, "features of the hidden states")
    add(model, "--layers", number(int, 0), 2, "number of blocks")
    add(model, "--heads", number(int, 1), 4, "heads of attention; must divide the width")
    add(model, "--normalizer", str, "softmax", "normalizer of the scores of attention", choices=NORMALIZERS)
    model.add_argument("--tied", action="store_true", help="use the embedding table as the head")

    training = parser.add_argument_group("training, of all runs")
    add(training, "--steps", number(int, 1), 120, "number of steps")
    add(training, "--batch", number(int, 1), 8, "sequences a step")
    add(training, "--sequence", number(int, 2), 256, "tokens a sequence")
    add(training, "--weight-decay", number(float, 0), 0.1, "decoupled weight decay of the matrices")
    add(training, "--validations", number(int, 1), 10, "how often to validate")
    add(training, "--valid-batches", number(int, 1), 4, "batches a validation")
    add(training, "--baseline-learning-rate", number(float, 0), None, "peak rate of the baseline's adamw")

    ours = parser.add_argument_group("training, of ours and the control")
    add(ours, "--loss", str, "cross_entropy", "loss to minimize", choices=LOSSES)
    add(ours, "--z-loss", number(float, 0), None, "coefficient of logsumexp squared, such as 1e-4")
    add(ours, "--label-smoothing", number(float, 0, 1), None, "mass that moves from the label to all classes")
    add(ours, "--optimizer", str, "stable_spam", "optimizer", choices=OPTIMIZERS)
    add(
        ours, "--learning-rate", number(float, 0), None, "peak rate; by default the optimizer's in OPTIMIZERS"
    )

    sample = parser.add_argument_group("sample, of ours")
    add(sample, "--prompt", str, "The default value of", "text to continue")
    add(sample, "--sample-tokens", number(int, 0), 80, "tokens to sample")
    add(sample, "--temperature", number(float, 0.01), 0.8, "divides the logits")
    add(sample, "--top-k", number(int, 1), 40, "how many tokens to choose from")
    return parser


def parse_arguments(parser: Parser, given: list[str] | None = None) -> argparse.Namespace:
    if parser.parse_args(given).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(given)
    if args.width % args.heads:
        parser.error(f"argument --heads: must divide --width {args.width}, got {args.heads}")
    for option in loss_options(args):
        if option not in inspect.signature(LOSSES[args.loss]).parameters:
            parser.error(f"argument --{option.replace('_', '-')}: {args.loss} has no such option")
    return args


def main() -> None:
    parser = make_parser()
    args = parse_arguments(parser)
    console = Console(highlight=False)
    start = time.perf_counter()
    variants = {
        "baseline": "dense logits, optax's cross-entropy, optax.adamw",
        "ours": f"streamed logits, {args.loss}, {args.optimizer}",
        "control": f"stored logits and scores, {args.loss}, {args.optimizer}",
    }
    if args.no_control:
        del variants["control"]
    try:
        data = load(args)
    except (OSError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    try:
        results = compare(args, variants, console, data)
    except (EOFError, ConnectionResetError):
        sys.exit("train_lm.py: error: a run has failed")
    except KeyboardInterrupt:
        sys.exit(130)
    show(results, variants, console)

    args.out.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, jaxsoft)}
    settings = {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(args).items()}
    seconds = time.perf_counter() - start
    record = {"settings": settings, "versions": versions, "seconds": seconds, "runs": results}
    (args.out / "train_lm.json").write_text(json.dumps(record, indent=1))
    plot(results, args.out / "train_lm.png")
    print(f"{args.out / 'train_lm.png'} and {args.out / 'train_lm.json'} written; {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
