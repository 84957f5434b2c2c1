"""Trains a small GPT whose logits are never stored, beside the plain baseline, and compares the two.

Three runs with equal seeds, hence equal initial weights and batches, each in a process of its own:

  baseline   dense logits, optax.softmax_cross_entropy_with_integer_labels, optax.adamw
  ours       jaxsoft.linear_logits, a loss of jaxsoft, an optimizer of jaxsoft
  control    as ours, but with dense logits: must end where ours ends

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
import multiprocessing
import pathlib
import pydoc_data.topics
import re
import resource
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

# What the flags choose from: one line each.

LOSSES = {
    loss.__name__: loss
    for loss in (losses.cross_entropy, losses.poly_loss, losses.focal_loss, losses.max_suppression_loss)
}
NORMALIZERS = {"softmax": jaxsoft.softmax}
OPTIMIZERS = {  # name: (learning rate -> optimizer, default learning rate at these sizes)
    "adamw": (optax.adamw, 3e-3),
    "lion_k": (optimizers.lion_k, 3e-4),
    "perpendicular_adamw": (
        lambda rate, **kw: optax.chain(optimizers.perpendicular_gradient(), optax.adamw(rate, **kw)),
        3e-3,
    ),
    "spam": (optimizers.spam, 3e-3),
    "stable_spam": (optimizers.stable_spam, 3e-3),
}
QUICK = dict(
    steps=30, batch=4, sequence=64, width=64, layers=1, heads=2, vocab=4096, source_mb=0.5, valid_batches=4
)


# Text.


class Tokenizer:
    """The most frequent words, spaces and punctuation as tokens, and the 256 bytes, to spell all else with."""

    PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|_+|\s+")  # every text is a sequence of these

    def __init__(self, text: str, size: int):
        frequent = collections.Counter(self.PIECES.findall(text)).most_common(size - 256)
        self.tokens = [bytes([b]) for b in range(256)] + [piece.encode() for piece, _ in frequent]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.longest = max(map(len, self.tokens))

    @functools.cache  # noqa: B019 (a tokenizer lives as long as the program)
    def _spell(self, piece: str) -> list[int]:
        """The ids of a piece: always the longest token that fits."""
        rest, ids = piece.encode(), []
        while rest:
            n = next(n for n in range(min(len(rest), self.longest), 0, -1) if rest[:n] in self.ids)
            ids.append(self.ids[rest[:n]])
            rest = rest[n:]
        return ids

    def encode(self, text: str) -> np.ndarray:
        return np.array([i for piece in self.PIECES.findall(text) for i in self._spell(piece)], np.int32)

    def decode(self, ids) -> str:
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


def attend(normalizer, q, k, v):
    """Causal attention of `[batch, time, heads, features]` with any normalizer."""
    if normalizer is jaxsoft.softmax:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bkhd->bqhd", normalizer(scores, where=causal), v)


class Block(nnx.Module):
    """Attention, then a two-layer perceptron, each on the normalized residual stream."""

    def __init__(self, args: argparse.Namespace, rngs: nnx.Rngs):
        width, linear = args.width, functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads, self.normalizer = args.heads, NORMALIZERS[args.normalizer]
        self.norm1, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x):
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, self.heads, -1)
        x = x + self.out(attend(self.normalizer, *jnp.moveaxis(qkv, -3, 0)).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Token ids `[batch, time]` -> hidden states `[batch, time, width]` and the head's kernel `[width, vocab]`."""

    def __init__(self, args: argparse.Namespace, vocab: int, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocab, args.width, embedding_init=small, rngs=rngs)
        self.place = nnx.Embed(args.sequence, args.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(args, rngs) for _ in range(args.layers)])
        self.norm = nnx.RMSNorm(args.width, rngs=rngs)
        self.head = None if args.tied else nnx.Param(small(rngs.params(), (args.width, vocab)))

    def __call__(self, tokens):
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x), self.embed.embedding[...].T if self.head is None else self.head[...]


# Training.


def make_logits(hidden, kernel, streamed: bool):
    """The one-line change."""
    if streamed:
        return jaxsoft.linear_logits(hidden, kernel)  # an expression: [batch, time, vocab] is never stored
    return hidden @ kernel


def make_losses(args: argparse.Namespace, variant: str):
    """What is trained, and what is reported as validation loss (always the plain cross-entropy)."""
    if variant == "baseline":

        def plain(logits, labels):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return plain, plain
    train_loss = functools.partial(losses.weighted_mean, LOSSES[args.loss], **loss_options(args))
    return train_loss, functools.partial(losses.weighted_mean, losses.cross_entropy)


def loss_options(args: argparse.Namespace) -> dict:
    """The options of the loss that were given."""
    options = {"z_loss": args.z_loss, "label_smoothing": args.label_smoothing}
    return {name: value for name, value in options.items() if value is not None}


def make_optimizer(args: argparse.Namespace, variant: str) -> optax.GradientTransformation:
    """Linear warm-up, cosine decay, and weight decay of the matrices."""
    name, rate = args.optimizer, args.learning_rate
    if variant == "baseline":
        name, rate = "adamw", args.baseline_learning_rate
    make, default_rate = OPTIMIZERS[name]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate or default_rate, args.steps // 10 + 1, args.steps + 1
    )
    return make(
        schedule,
        weight_decay=args.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )


def run(args: argparse.Namespace, variant: str, tokenizer: Tokenizer, train, valid, connection) -> None:
    """Trains one variant, and sends its progress and finally its results through the connection."""
    train_loss, valid_loss = make_losses(args, variant)
    optimizer = make_optimizer(args, variant)
    streamed = variant == "ours"

    graph, params = nnx.split(GPT(args, len(tokenizer.tokens), nnx.Rngs(args.seed)))
    checksum = zlib.crc32(
        b"".join(np.asarray(p).tobytes() for p in jax.tree.leaves(params)) + train.tobytes()
    )
    opt_state = optimizer.init(params)

    def mean_loss(params, tokens, loss):
        hidden, kernel = nnx.merge(graph, params)(tokens[:, :-1])
        return loss(make_logits(hidden, kernel, streamed), tokens[:, 1:])

    def train_step(params, opt_state, tokens):
        loss, gradient = jax.value_and_grad(mean_loss)(params, tokens, train_loss)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def valid_step(params, tokens):
        return mean_loss(params, tokens, valid_loss)

    train_step = jax.jit(train_step, donate_argnums=(0, 1)).lower(params, opt_state, train[0]).compile()
    valid_step = jax.jit(valid_step).lower(params, train[0]).compile()

    curve, validation, seconds = [], [], []
    memory_before = resident_memory()

    def validate(step):
        validation.append((step, float(np.mean([valid_step(params, tokens) for tokens in valid]))))

    validate(0)
    for step, tokens in enumerate(train, 1):
        start = time.perf_counter()
        params, opt_state, loss = jax.block_until_ready(train_step(params, opt_state, tokens))
        seconds.append(time.perf_counter() - start)
        curve.append(float(loss))
        if step % max(args.steps // 10, 1) == 0 or step == args.steps:
            validate(step)
        connection.send({"step": step, "loss": curve[-1], "valid": validation[-1][1], "seconds": seconds[-1]})
    peak = peak_memory()
    sample = continue_text(args, graph, params, tokenizer) if streamed else None
    median = statistics.median(seconds[2:] or seconds)  # without the warm-up
    connection.send(
        {
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
            "checksum": checksum,
            "sample": sample,
        }
    )


def continue_text(args: argparse.Namespace, graph, params, tokenizer: Tokenizer) -> str:
    """Samples a continuation of the prompt; neither temperature nor top-k stores the logits."""

    @jax.jit
    def next_token(window, last, key):
        hidden, kernel = nnx.merge(graph, params)(window[None])
        logits = make_logits(hidden[0, last], kernel, streamed=True)
        top = jaxsoft.top_k(jaxsoft.temperature(logits, args.temperature), args.top_k)
        return top.indices[jax.random.categorical(key, top.values)]

    ids = list(tokenizer.encode(args.prompt or "\n"))
    for key in jax.random.split(jax.random.key(args.seed), args.sample_tokens):
        window = np.zeros(args.sequence, np.int32)
        recent = ids[-args.sequence :]
        window[: len(recent)] = recent
        ids.append(int(next_token(window, len(recent) - 1, key)))
    return tokenizer.decode(ids)


# Memory of this process, in bytes: everything in it, Python, libraries and compiler included.


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    status = pathlib.Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak_memory()


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


def messages(args: argparse.Namespace, variant: str, *data):
    """What a run reports from a fresh process of its own, so that the peak of its memory is its own, too."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(args, variant, *data, sender), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        sys.exit(f"train_lm.py: the run {variant!r} failed")


def compare(args: argparse.Namespace, variants: dict[str, str], console: Console, data) -> dict[str, dict]:
    """Runs the variants one after the other and shows how far they are; returns their results."""
    text = TextColumn("{task.fields[text]}", markup=False)
    bars = (
        TextColumn("{task.description:8}"),
        BarColumn(20),
        MofNCompleteColumn(),
        text,
        TimeRemainingColumn(),
    )
    results = {}
    with Progress(*bars, console=console, disable=not console.is_terminal) as progress:
        for variant in variants:
            task = progress.add_task(variant, total=args.steps, text="compiling")
            for message in messages(args, variant, *data):
                if "step" not in message:
                    results[variant] = message
                    continue
                rate = args.batch * args.sequence / message["seconds"]
                text = f"loss {message['loss']:.3f}  validation {message['valid']:.3f}  {rate:,.0f} tokens/s"
                progress.update(task, completed=message["step"], text=text)
                if not console.is_terminal and message["step"] % max(args.steps // 10, 1) == 0:
                    print(f"{variant:8}  step {message['step']:>4}/{args.steps}  {text}", flush=True)
    return results


def show(results: dict[str, dict], variants: dict[str, str], console: Console) -> None:
    """Prints the table, the check against the control, and the sample."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=False)
    table.add_column("run")
    headings = ("validation\nbefore", "\nafter", "ms a step\nmedian", "tokens/s")
    for heading in (*headings, "temporary\nMB", "peak\nMB", "growth\nMB"):
        table.add_column(heading, justify="right")
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
    print("validation: cross-entropy in nats a token, on text that is not trained on")
    print("temporary:  what the compiled training step allocates beside its inputs and outputs")
    print("peak:       largest resident memory of the run's process, Python and the compiler included")
    print("growth:     peak minus the memory in use before the first step\n")
    for variant, what in variants.items():
        print(f"{variant:8}  {what}")
    if "control" in results:
        ours, control = results["ours"], results["control"]
        gap = abs(ours["validation_after"] - control["validation_after"])
        print(f"\nours and control end {gap:.1e} nats apart")
    print(
        f"\na sample of ours, after {len(results['ours']['train_loss'])} steps:\n\n{results['ours']['sample']}\n"
    )


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


def parse_arguments() -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows the defaults and leaves the description as it is."""

    parser = Parser(description=__doc__, formatter_class=Formatter)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and a few steps, to see that it runs"
    )
    parser.add_argument("--no-control", action="store_true", help="leave out the third run")
    parser.add_argument("--out", type=pathlib.Path, default="runs", help="folder for train_lm.png and .json")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of weights, batches and the sample")

    text = parser.add_argument_group("text")
    text.add_argument("--text", type=pathlib.Path, help="a file of yours, UTF-8, instead of Python's own")
    text.add_argument(
        "--source-mb", type=number(float, 0), default=5, help="of the standard library's source"
    )
    text.add_argument("--vocab", type=number(int, 512), default=16384, help="size of the vocabulary, at most")

    model = parser.add_argument_group("model")
    model.add_argument("--width", type=number(int, 1), default=128, help="of the residual stream")
    model.add_argument("--layers", type=number(int, 0), default=3, help="how many blocks")
    model.add_argument("--heads", type=number(int, 1), default=4, help="of attention; must divide the width")
    model.add_argument("--tied", action="store_true", help="make the embedding table the head")
    model.add_argument("--normalizer", choices=NORMALIZERS, default="softmax", help="of attention scores")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=number(int, 1), default=220, help="how many")
    training.add_argument("--batch", type=number(int, 1), default=8, help="sequences a step")
    training.add_argument("--sequence", type=number(int, 2), default=256, help="tokens a sequence")
    training.add_argument("--valid-batches", type=number(int, 1), default=8, help="batches a validation")

    ours = parser.add_argument_group("ours and control")
    ours.add_argument("--loss", choices=LOSSES, default="cross_entropy", help="what to minimize")
    ours.add_argument("--z-loss", type=number(float, 0), help="weight of logsumexp squared, such as 1e-4")
    ours.add_argument("--label-smoothing", type=number(float, 0, 1), help="mass moved off the label")
    ours.add_argument("--optimizer", choices=OPTIMIZERS, default="stable_spam", help="how to minimize it")
    ours.add_argument(
        "--learning-rate", type=number(float, 0), help="peak rate; by default the optimizer's own"
    )
    ours.add_argument(
        "--baseline-learning-rate", type=number(float, 0), help="the same for the baseline's adamw"
    )
    training.add_argument(
        "--weight-decay", type=number(float, 0), default=0.1, help="of matrices, in all runs"
    )

    sample = parser.add_argument_group("sample")
    sample.add_argument("--prompt", default="The default value of", help="text to continue")
    sample.add_argument("--sample-tokens", type=number(int, 0), default=80, help="length of the continuation")
    sample.add_argument("--temperature", type=number(float, 0.01), default=0.8, help="divides the logits")
    sample.add_argument("--top-k", type=number(int, 1), default=40, help="sample from so many tokens")

    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"argument --heads: must divide --width {args.width}, got {args.heads}")
    for option in loss_options(args):
        if option not in inspect.signature(LOSSES[args.loss]).parameters:
            parser.error(f"argument --{option.replace('_', '-')}: {args.loss} has no such option")
    if args.text and not args.text.is_file():
        parser.error(f"argument --text: no such file: {args.text}")
    return args


def main() -> None:
    args = parse_arguments()
    console = Console(highlight=False)
    start = time.perf_counter()
    variants = {
        "baseline": "dense logits, optax's cross-entropy, optax.adamw",
        "ours": f"streamed logits, {args.loss}, {args.optimizer}",
        "control": f"dense logits, {args.loss}, {args.optimizer}",
    }
    if args.no_control:
        del variants["control"]
    try:
        data = load(args)
    except (OSError, ValueError) as error:
        sys.exit(f"train_lm.py: error: {error}")
    results = compare(args, variants, console, data)
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
