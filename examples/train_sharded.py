"""Trains a small GPT on a mesh of devices that belong to several processes, here all on this machine.

One command starts the processes, each with its share of virtual CPU devices. They find each other over loopback, as
processes on several machines do over a network. The flags say which mesh axis shards what:

  --data         the sequences of a batch
  --sequence     the positions of a sequence: attention is a ring
  --fsdp         the matrices, the head included, over their input features (the embedding over its features)
  --vocabulary   the columns of the head: neither logits nor head are ever gathered

With `--single` the same training runs once more on one device, and the difference of the two losses is printed.

  python examples/train_sharded.py --single
  python examples/train_sharded.py --mesh data=4,model=2 --sequence none
  python examples/train_sharded.py --checkpoint runs/sharded --kill-at 7
  python examples/train_sharded.py --checkpoint runs/sharded --resume

If a process ends early, the command ends the others and says so, within 10 seconds. Where no parent process watches
(on several machines), JAX itself ends the others about 30 seconds later, the heartbeat timeout it is given.
"""

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import time
import zlib

import jax
import numpy as np
import optax
import train_lm
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jaxsoft
from jaxsoft import losses, shardings

TIMEOUT = 30  # seconds until a silent or missing process counts as gone
AXES = ("data", "sequence", "fsdp", "vocabulary")  # the flags that name a mesh axis


# Where things lie.


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh, None on one device, and which of its axes shards what; None: no axis does."""

    mesh: jax.sharding.Mesh | None
    data: str | None
    sequence: str | None
    fsdp: str | None
    vocabulary: str | None

    def at(self, *axes: str | None) -> NamedSharding | None:
        """The sharding of an array over these mesh axes."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*axes))

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where a parameter lies."""
        if len(shape) != 2:
            return self.at()
        if "head" in path:  # [width, vocab]
            return self.at(self.fsdp, self.vocabulary)
        if "embedding" in path:  # [vocab, width], of tokens and of positions
            return self.at(None, self.fsdp)
        return self.at(self.fsdp, None)


def place(value: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """An array of which every process has all numbers; each puts its own part on its devices."""
    if sharding is None:
        return jax.numpy.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


# Training.


def train(args: argparse.Namespace, placement: Placement, vocab: int, tokens: np.ndarray, valid: np.ndarray):
    """Trains: yields the step from which it starts, then every step and its loss, and at the end the results."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: train_lm.GPT(args, vocab, True, nnx.Rngs(args.seed))))
    optimizer = train_lm.make_optimizer(args.optimizer, args.learning_rate, args)
    on_mesh = placement.mesh is not None
    rows = placement.at(placement.data, placement.sequence)  # tokens, labels, hidden states, queries, keys
    results = {}
    if on_mesh:
        of_params = jax.tree_util.tree_map_with_path(
            lambda path, x: placement.parameter(jax.tree_util.keystr(path), x.shape), shapes
        )
        of_state = optax.tree_map_params(  # what has the shape of a parameter lies where the parameter does
            optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(optimizer.init, shapes),
            of_params,
            transform_non_params=lambda _: placement.at(),
        )
        results = {"out_shardings": (of_params, of_state)}

    def initialize():
        params = nnx.state(train_lm.GPT(args, vocab, True, nnx.Rngs(args.seed)))
        return params, optimizer.init(params)

    def mean_loss(params, tokens, labels):
        with shardings(query=rows, key=rows) if on_mesh else contextlib.nullcontext():
            hidden, head = nnx.merge(graph, params)(tokens)
        logits = jaxsoft.linear_logits(
            hidden,
            head,
            hidden_sharding=rows,
            weight_sharding=placement.at(placement.fsdp, placement.vocabulary),
        )
        return losses.weighted_mean(losses.cross_entropy, logits, labels)

    def train_step(params, opt_state, tokens, labels):
        loss, gradient = jax.value_and_grad(mean_loss)(params, tokens, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = jax.jit(initialize, **results)()
    if on_mesh:
        results = {"out_shardings": (of_params, of_state, placement.at())}
    train_step = jax.jit(train_step, donate_argnums=(0, 1), **results)

    start, checkpoints = 0, None
    if args.checkpoint is not None and on_mesh:
        import orbax.checkpoint as ocp

        checkpoints = ocp.CheckpointManager(args.checkpoint.absolute())
        if args.resume:
            start = checkpoints.latest_step()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, opt_state)
            )
            params, opt_state = checkpoints.restore(start, args=ocp.args.StandardRestore(like))

    def batch(stretch):
        return place(stretch[:, :-1], rows), place(stretch[:, 1:], rows)

    yield {"step": start}
    for step in range(start + 1, args.steps + 1):
        if step == args.kill_at and on_mesh and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        params, opt_state, loss = train_step(params, opt_state, *batch(tokens[step - 1]))
        if checkpoints is not None and (step % args.save_every == 0 or step == args.steps):
            checkpoints.save(step, args=ocp.args.StandardSave((params, opt_state)))
            checkpoints.wait_until_finished()
        yield {"step": step, "loss": float(loss)}
    whole = multihost_utils.process_allgather(params, tiled=True) if on_mesh else params
    checksum = 0
    for p in jax.tree.leaves(whole):
        checksum = zlib.crc32(np.asarray(p), checksum)
    *_, loss = train_step(
        params, opt_state, *batch(valid)
    )  # what the step would do to the weights is not used
    yield {"valid": float(loss), "checksum": checksum}


# The processes.


def work(connection, process: int | None, port: int, args: argparse.Namespace, *data) -> None:
    """A process of the mesh, or (None) the run on one device: sends what `train` yields."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process answers Ctrl-C
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent process prints; gloo would, too
    try:
        mesh = None
        if process is not None:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                f"127.0.0.1:{port}",
                args.processes,
                process,
                initialization_timeout=TIMEOUT,
                heartbeat_timeout_seconds=TIMEOUT,
            )
            shape = tuple(args.mesh.values())
            mesh = jax.make_mesh(shape, tuple(args.mesh), axis_types=(AxisType.Auto,) * len(shape))
        for message in train(args, Placement(mesh, *(getattr(args, f"{name}_axis") for name in AXES)), *data):
            connection.send(message)
    except Exception as error:
        # Without a word to the others, which may be gone: JAX's own end waits for them.
        connection.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        connection.close()
        os._exit(1)


class Gone(Exception):
    """A process has ended early, or an error of one of them."""


def launch(args: argparse.Namespace, data: tuple, processes: int | None):
    """Starts the processes of the mesh (None: the one of the run on one device); yields process 0's messages.

    Ends them all if one of them ends early.
    """
    numbers = [None] if processes is None else list(range(processes))
    devices = 1 if processes is None else math.prod(args.mesh.values()) // processes
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    os.environ.setdefault("NPROC", "16")  # threads: virtual devices wait for one another in them
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers, connections = [], []
    for number in numbers:
        ours, theirs = context.Pipe(duplex=False)
        workers.append(context.Process(target=work, args=(theirs, number, port, args, *data), daemon=True))
        workers[-1].start()
        theirs.close()
        connections.append(ours)
    try:
        yield from listen(workers, connections)
    finally:
        for worker in workers:
            worker.kill()


def listen(workers: list, connections: list):
    """Process 0's messages, until all processes have ended.

    Raises:
      Gone: a process has ended early.
    """
    step, said, open_ = 0, {}, dict(zip(connections, range(len(connections))))
    while open_:
        for connection in multiprocessing.connection.wait(list(open_)):
            number = open_[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):  # the process has ended, or is about to
                del open_[connection]
                workers[number].join(TIMEOUT)
                if workers[number].exitcode:
                    raise Gone(describe(number, workers, step, said.get(number))) from None
                continue
            if "error" in message:
                said[number] = message["error"]
            elif number == 0:
                step = message.get("step", step)
                yield message


def describe(number: int, workers: list, step: int, said: str | None) -> str:
    """What to say about a process that has ended early."""
    time.sleep(
        0.5
    )  # it may have noticed the end of another one before us: a signal is a cause, not an effect
    number = next((i for i, worker in enumerate(workers) if (worker.exitcode or 0) < 0), number)
    code = workers[number].exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else said or f"ended with code {code}"
    others = "; the others were ended, too" if len(workers) > 1 else ""
    return f"process {number} of {len(workers)}, after step {step}: {how}{others}"


def follow(name: str, messages, steps: int, console: Console) -> tuple[dict[int, float], dict]:
    """Shows how far a run is; returns its losses and results."""
    curve, result = {}, {}
    columns = TextColumn("{task.description:12}"), BarColumn(10), MofNCompleteColumn()
    columns = (*columns, TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=steps, numbers="starting")
        for message in messages:
            if "valid" in message:
                result = message
                continue
            numbers = "compiling" if "loss" not in message else f"loss {message['loss']:.4f}"
            progress.update(task, completed=message["step"], numbers=numbers)
            if "loss" not in message:
                if message["step"]:
                    print(f"{name:12}  resumed after step {message['step']}", flush=True)
                continue
            curve[message["step"]] = message["loss"]
            if not console.is_terminal and message["step"] % max(steps // 5, 1) == 0:
                print(f"{name:12}  step {message['step']:>3}/{steps}  {numbers}", flush=True)
    print(f"{name:12}  validation {result['valid']:.6f}, checksum of the weights {result['checksum']:08x}")
    return curve, result


# The command line.


def mesh_of(text: str) -> dict[str, int]:
    """The axes of a mesh and their sizes."""
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(name.isidentifier() and size.isdecimal() and int(size) for name, size in sizes.items()):
        raise argparse.ArgumentTypeError(f"must be names and sizes such as data=2,model=4, got {text!r}")
    return {name: int(size) for name, size in sizes.items()}


def make_parser() -> train_lm.Parser:
    parser = train_lm.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = train_lm.number

    def add(group, flag, kind, default, help, **options):
        help += "" if default is None else " (%(default)s)"
        group.add_argument(flag, type=kind, default=default, help=help, **options)

    parser.add_argument("--single", action="store_true", help="run on one device as well, and compare")
    add(parser, "--seed", number(int, 0), 0, "of weights and batches")

    mesh = parser.add_argument_group("mesh")
    add(mesh, "--mesh", mesh_of, "data=2,model=4", "names and sizes of the axes")
    add(mesh, "--processes", number(int, 1), 2, "number of processes, which divides the number of devices")
    for name, default, what in zip(
        AXES,
        ("data", "model", "data", "model"),
        ("the sequences of a batch", "the positions", "the matrices", "the columns of the head"),
    ):
        help = f"axis over which {what} are sharded, or none"
        add(mesh, f"--{name}", str, default, help, dest=f"{name}_axis", metavar="AXIS")

    saved = parser.add_argument_group("checkpoints, of the run on the mesh")
    add(saved, "--checkpoint", pathlib.Path, None, "folder to save to, with orbax")
    add(saved, "--save-every", number(int, 1), 5, "steps between two checkpoints")
    saved.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the folder"
    )
    add(
        saved,
        "--kill-at",
        number(int, 1),
        None,
        "step at which the last process is killed, to see what happens",
    )

    model = parser.add_argument_group("model and training")
    add(model, "--steps", number(int, 1), 20, "number of steps")
    add(model, "--batch", number(int, 1), 8, "sequences per step")
    add(model, "--length", number(int, 2), 64, "tokens per sequence", dest="sequence")
    add(model, "--vocab", number(int, 512), 4096, "size of the vocabulary")
    add(model, "--width", number(int, 1), 64, "features of the hidden states")
    add(model, "--layers", number(int, 0), 1, "number of blocks")
    add(model, "--heads", number(int, 1), 2, "heads of attention; must divide the width")
    add(model, "--normalizer", str, "softmax", "of the scores of attention", choices=train_lm.NORMALIZERS)
    add(model, "--optimizer", str, "adamw", "optimizer", choices=train_lm.OPTIMIZERS)
    add(model, "--learning-rate", number(float, 0), None, "peak rate; by default the optimizer's")
    add(model, "--weight-decay", number(float, 0), 0.1, "decoupled weight decay of the matrices")
    return parser


def parse_arguments(parser: train_lm.Parser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"argument --heads: must divide --width {args.width}, got {args.heads}")
    if math.prod(args.mesh.values()) % args.processes:
        parser.error(f"argument --processes: must divide the devices of {args.mesh}, got {args.processes}")
    # What each axis shards must be divisible by its size.
    sizes = {"data": ("batch", args.batch), "sequence": ("length", args.sequence)}
    sizes |= {"fsdp": ("width", args.width), "vocabulary": ("vocab", args.vocab)}
    for name, (flag, size) in sizes.items():
        axis = getattr(args, f"{name}_axis")
        if axis == "none":
            setattr(args, f"{name}_axis", None)
        elif axis not in args.mesh:
            parser.error(f"argument --{name}: must be an axis of the mesh {args.mesh} or none, got {axis!r}")
        elif size % args.mesh[axis]:
            parser.error(
                f"argument --{flag}: must be divisible by the {args.mesh[axis]} devices along {axis!r} "
                f"(--{name}), got {size}"
            )
    for first, second in (("data", "sequence"), ("fsdp", "vocabulary")):
        axis = getattr(args, f"{first}_axis")
        if axis is not None and axis == getattr(args, f"{second}_axis"):
            parser.error(f"argument --{second}: must be another axis than --{first}, got {axis!r}")
    if args.resume and (args.checkpoint is None or not any(args.checkpoint.glob("[0-9]*"))):
        parser.error(
            f"argument --resume: needs --checkpoint, a folder with checkpoints, got {args.checkpoint}"
        )
    return args


FLAGS = os.environ.get("XLA_FLAGS", "")


def main() -> None:
    parser = make_parser()
    args = parse_arguments(parser)
    args.tied, args.text, args.source_mb = (
        False,
        None,
        0.0,
    )  # as train_lm knows them: its model, the manual's text
    console, start = Console(highlight=False), time.perf_counter()
    text = "".join(train_lm.read_documents(args))
    ids = train_lm.Tokenizer(text, args.vocab).encode(text)
    cut = len(ids) * 9 // 10
    tokens = train_lm.batches(ids[:cut], args.steps, args, args.seed)
    data = args.vocab, tokens, train_lm.batches(ids[cut:], 1, args, args.seed + 1)[0]
    axes = ", ".join(f"{name} over {axis}" for name in AXES if (axis := getattr(args, f"{name}_axis")))
    print(f"{args.processes} processes, mesh {args.mesh}: {axes or 'nothing sharded'}", flush=True)
    try:
        name = f"{math.prod(args.mesh.values())} devices"
        curve, result = follow(name, launch(args, data, args.processes), args.steps, console)
        if args.single:
            alone, single = follow("one device", launch(args, data, None), args.steps, console)
            most = max((abs(loss - alone[step]) for step, loss in curve.items()), default=0.0)
            after = abs(result["valid"] - single["valid"])
            print(
                f"the two losses differ by {most:.1e} at most during training, by {after:.1e} after the last step"
            )
    except Gone as error:
        sys.exit(f"train_sharded.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
