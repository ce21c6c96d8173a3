"""A run from its options to its folder: open, continue, log, save, stop.

The host looks at the device only when a row of the log is due.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Self

import numpy as np
import torch

from backmix.pipeline.batch import Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.loader import Loader, choose, open_loader
from backmix.pipeline.options import size_at
from backmix.pipeline.subset import Subset, hold_out, select
from backmix.train import protocols
from backmix.train.check import check
from backmix.train.checkpoint import (
    locked,
    newest_checkpoint,
    newest_step,
    save_checkpoint,
    write_atomically,
)
from backmix.train.log import Log, Progress, write_status
from backmix.train.loop import steps
from backmix.train.methods.build import build as build_method
from backmix.train.methods.build import build_network
from backmix.train.methods.method import Method
from backmix.train.models.build import Model
from backmix.train.models.weights import begin_with
from backmix.train.optim import make_optimizer
from backmix.train.options import Run, Ssod, host_of
from backmix.train.profile import Profile
from backmix.train.run_folder import (
    Config,
    OtherRunError,
    Resolved,
    refuse_other_data_or_write,
    refuse_other_options,
    resolve,
)
from backmix.train.state import State
from backmix.train.trained import read_run

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal, has a checkpoint, and has more to do."""
EXIT_INTERRUPTED = 130
"""Exit code of a run that was interrupted before there was anything to continue."""
MOST_VOID_STEPS = 10
"""Void steps between two log rows that end the run."""
MOST_VOID_ROWS = 3
"""Log rows in succession with void steps that end the run."""
MOST_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written (a full disk) before the run ends."""


class StopAsked:
    """Whether SIGTERM or Ctrl-C asked to stop, looked at between steps.

    A second Ctrl-C is obeyed at once.
    """

    def __init__(self) -> None:
        """Install the handlers, where this is the main thread."""
        self.signal = 0
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return bool(self.signal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def prepare_run(
    run: Run,
    recipe: str,
    command: list[str],
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Config, State, Loader]:
    """Open the data and make model, optimizer and method of a run, as its seed makes them.

    `progress` is called with (done, all) while a resident pool is decoded, `say` with the lines of
    `--loader.loader fastest`, of which an unfinished run keeps what it began with.
    """
    check(run)
    resolved = resolve(run)
    device = torch.device(resolved.device)
    torch.set_num_threads(resolved.threads)
    with open_set(run.data) as data:
        known = known_classes(run, data.classes)
        refuse_unfit_init(run, [data.classes[number] for number in known], data)
        subset = training_subset(run, data.labels, known, data.classes)
        loader_options = run.loader
        if run.loader.loader == "fastest" and resolved.loader:
            loader_options = replace(run.loader, loader=resolved.loader)
        kind = choose(data, loader_options, subset, device=device, say=say)
        resolved = replace(resolved, loader=kind)
        config = Config.of(run, recipe, command, resolved, data, known, len(subset))
        views = view_dtype(resolved)
        state = fresh_state(run, data, subset, len(known), device, views)
    loader = open_loader(
        run.data,
        replace(run.loader, loader=kind),
        split="train",
        subset=subset,
        seed=run.seed,
        device=str(device),
        progress=progress,
    )
    return config, state, loader


def view_dtype(resolved: Resolved) -> torch.dtype:
    """Return the dtype of the images that the network is given.

    On a GPU in bf16 autocast, bf16: half the bytes, and the rounding that the first convolution
    would do. On a CPU always fp32.
    """
    on_gpu = resolved.device == "cuda" and resolved.precision == "bf16"
    return torch.bfloat16 if on_gpu else torch.float32


def fresh_state(
    run: Run,
    data: BetonSet,
    subset: Subset,
    classes: int,
    device: torch.device,
    views: torch.dtype,
) -> State:
    """Make model, optimizer and method as the run's seed makes them; `views` as `view_dtype`."""
    model, optimizer = fresh_network(run, classes, device)
    method = build_method(run, model, data, subset, device, views)
    return first_state(model, optimizer, method, Place(run.seed), device)


def fresh_network(
    run: Run, classes: int, device: torch.device
) -> tuple[Model, torch.optim.Optimizer]:
    """Make the network as the run's seed makes it, in training mode, and its optimizer."""
    torch.manual_seed(run.seed)
    model = build_network(run, classes)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = make_optimizer(
        model.named_parameters(),
        kind=run.optim.kind,
        lr=run.optim.lr,
        momentum=run.optim.momentum,
        nesterov=run.optim.nesterov,
        weight_decay=run.optim.weight_decay,
        decay=run.optim.decay,
    )
    return model, optimizer


def begin(state: State, run: Run) -> None:
    """Take the weights of --init, where there is one, into the state of a fresh run."""
    if run.init is not None:
        begin_with(state.model, run.init)
        state.keep_buffers()


def first_state(
    model: Model,
    optimizer: torch.optim.Optimizer,
    method: Method,
    place: Place,
    device: torch.device,
) -> State:
    """Return the state before the first step, all of it on the device."""
    state = State(model, optimizer, method, place)
    state.void_steps = state.void_steps.to(device)
    state.void_samples = state.void_samples.to(device)
    state.keep_buffers()
    return state


def known_classes(run: Run, classes: list[str]) -> list[int]:
    """Return the stored class numbers of the known classes, in label order."""
    split = run.split
    if split.protocol:
        published = protocols.split(split.protocol, split.family, split.list)
        if published.classes != len(classes):
            raise ValueError(
                f"protocol {split.protocol} splits {published.classes} classes, but the data have "
                f"{len(classes)}: {', '.join(classes[:10])}"
            )
        return list(published.known)
    missing = [name for name in split.known if name not in classes]
    if missing:
        raise ValueError(
            f"--split.known: the data have no class {', '.join(missing)}; "
            f"their classes are {', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}"
        )
    known = [classes.index(name) for name in split.known] or list(range(len(classes)))
    if len(set(known)) != len(known):
        raise ValueError("--split.known names a class twice")
    return known


def refuse_unfit_init(run: Run, known: list[str], data: BetonSet) -> None:
    """Refuse to begin with a run that has learned what this one must not, or other classes.

    Args:
        run: the options.
        known: names of the known classes in label order.
        data: the training set.

    Raises:
        ValueError: it knows classes that are unknown here, or was trained on images that --val
            holds out here; or the class head is kept, and the class lists differ.
    """
    if run.init is None or not (run.init / "config.json").is_file():
        return
    before = read_run(run.init)
    if before.options.model != run.model:
        raise ValueError(
            f"--init {run.init} is a {before.options.model}, this run a {run.model}: add --model "
            f"{before.options.model}"
        )
    host = host_of(run.method)
    if isinstance(host, Ssod) and host.train == "head" and list(before.classes) != known:
        raise ValueError(
            f"--init {run.init} knows the classes {', '.join(before.classes[:10])}, this run "
            f"{', '.join(known[:10])}: a rejection head is trained beside the class head that is "
            "there, so both need the same --split"
        )
    seen = [name for name in before.classes if name in data.classes and name not in known]
    if seen:
        raise ValueError(
            f"--init {run.init} was trained on {', '.join(seen[:10])}, unknown in this run, which "
            "would then be tested on what it has learned: begin with a run of the same --split"
        )
    options = before.options
    held_out_then = options.seed == run.seed and options.val >= run.val
    if run.val and before.digest == data.digest and not held_out_then:
        raise ValueError(
            f"--val {run.val:g} holds images out that --init {run.init} was trained on (--val "
            f"{options.val:g} --seed {options.seed}): begin with a run of this --seed and at least "
            "this --val, or leave --val out"
        )


def training_subset(run: Run, labels: np.ndarray, known: list[int], classes: list[str]) -> Subset:
    """Return the training samples: those of the known classes, less what --val holds out."""
    rest, _ = hold_out(select(labels, known), run.val, run.seed)
    absent = sorted(set(range(len(known))) - set(rest.labels.tolist()))
    if absent:
        names = ", ".join(classes[known[label]] for label in absent[:10])
        raise ValueError(
            f"no training image is left of {len(absent)} of the {len(known)} known classes: {names}"
            + (" ..." if len(absent) > 10 else "")
            + (f" (--val {run.val})" if run.val else "")
            + "; --split.known names the classes to train on"
        )
    return rest


def train(run: Run, recipe: str, command: list[str]) -> int:
    """Run, or continue, a training run; returns the exit code."""
    check(run)
    made = not run.out.exists()
    run.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(run.quiet)
    with StopAsked() as stop, locked(run.out):
        try:
            return _train_locked(run, recipe, command, progress, stop)
        except KeyboardInterrupt:
            write_status(run.out, "stopped", newest_step(run.out), "interrupted")
            return EXIT_STOPPED if newest_step(run.out) else EXIT_INTERRUPTED
        except OtherRunError:
            raise
        except Exception as error:
            if (run.out / "config.json").exists():
                with contextlib.suppress(OSError):
                    step = newest_step(run.out)
                    write_status(run.out, "failed", step, str(error) or repr(error))
            elif made:
                shutil.rmtree(run.out, ignore_errors=True)
            if _is_out_of_memory(error):
                raise ValueError(
                    f"there is not enough memory ({error}): try a smaller --loader.batch or "
                    "--loader.size"
                ) from error
            raise


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _train_locked(
    run: Run, recipe: str, command: list[str], progress: Progress, stop: StopAsked
) -> int:
    def decoding(done: int, total: int) -> None:
        progress.show(f"decoding: {done:,} of {total:,}")

    def say(line: str) -> None:
        progress.show(line, final=True)

    refuse_other_options(run)
    config, state, loader = prepare_run(run, recipe, command, decoding, say)
    with loader:
        refuse_other_data_or_write(run, config)
        found, said = newest_checkpoint(run.out)
        for line in said:
            progress.show(line, final=True)
        lengths = None
        if found is not None:
            tensors, meta = found
            state.load(tensors, meta)  # of --init nothing is needed any more
            lengths = meta["log"]
            progress.show(f"continuing {run.out} at step {state.step}", final=True)
        else:
            begin(state, run)
        if loader.samples < run.loader.batch:
            progress.show(
                f"only {loader.samples} training images for --loader.batch {run.loader.batch}: an "
                "epoch is a single step; the recipe's learning rate belongs to its batch",
                final=True,
            )
        last = size_at(run.loader, run.epochs - 1)
        if last < run.loader.size:
            progress.show(
                f"views end at {last} pixels and never have --loader.size {run.loader.size}: "
                f"--loader.grow ends at epoch {run.loader.grow[1]}, the run has --epochs "
                f"{run.epochs}",
                final=True,
            )
        log = Log(run.out, lengths)
        try:
            write_status(run.out, "running", state.step)
            event = "resume" if found else "start"
            log.time({"event": event, "step": state.step, "host": os.uname().nodename})
            with Profile(
                run.out,
                run.profile,
                first=state.step + 1,
                left=run.epochs * -(-loader.samples // run.loader.batch) - state.step,
                device=config.resolved.device,
                say=say,
            ) as profile:
                return _go(run, config, state, loader, log, progress, stop, profile)
        finally:
            log.close()


def _go(
    run: Run,
    config: Config,
    state: State,
    loader: Loader,
    log: Log,
    progress: Progress,
    stop: StopAsked,
    profile: Profile,
) -> int:
    """Take steps; log, save and stop when it is time."""
    autocast = torch.autocast(
        config.resolved.device, torch.bfloat16, enabled=config.resolved.precision == "bf16"
    )
    saves = Saves(run, log)
    clock = Clock(state.step)
    named_bad = 0
    if stop:  # it came while the data were opened
        write_status(run.out, "stopped", state.step, signal.Signals(stop.signal).name)
        return EXIT_STOPPED if state.step else EXIT_INTERRUPTED
    for step in steps(state, loader, run, autocast):
        profile.step()
        if step.end_of_epoch:
            row = state.epoch.take()
            seen = max(row["seen"], 1)
            log.epoch(state.place.epoch + 1, state.step, row["loss"] / seen, row["right"] / seen)
        if state.step % run.log_every == 0 or step.end_of_epoch:
            write_row(state, log, run)
            rate = clock.rate(state.step, run.loader.batch)
            log.time(
                {"step": state.step, "images_per_s": round(rate, 1), "replaced": len(loader.bad)}
            )
            for line in loader.bad[named_bad:]:
                progress.show(f"replaced: {line}", final=True)
            named_bad = len(loader.bad)
        progress.show(_line(run, state, loader, clock))
        if stop:
            saves.write(state)
            write_status(run.out, "stopped", state.step, signal.Signals(stop.signal).name)
            progress.show(f"stopped at step {state.step}; the same command continues", final=True)
            return EXIT_STOPPED
        if saves.due(state):
            saves.try_to_write(state, progress)
    saves.write(state)
    write_model(run.out / "model.safetensors", state)
    write_status(run.out, "finished", state.step)
    progress.show(f"finished {run.out}: {state.step} steps", final=True)
    return 0


def write_row(state: State, log: Log, run: Run) -> None:
    """Append a row of the meters to log.jsonl; end the run where too many steps were void.

    Void steps count in `bad_steps` alone: the other figures are of the steps that were taken.
    """
    void, samples = int(state.void_steps), state.void_samples.tolist()
    sums = state.interval.take()
    seen, taken = sums.pop("seen"), sums.pop("steps")
    good = max(taken - void, 1)
    row = {
        "step": state.step,
        "epoch": state.place.epoch,
        "consumed": state.place.consumed,
        "samples": int(seen),
        "loss": sums.pop("loss") / max(seen, 1),
        "accuracy": sums.pop("right") / max(seen, 1),
        "lr": float(state.optimizer.param_groups[0]["lr"]),
        "grad_norm": sums.pop("grad_norm") / good,
        "bad_steps": void,
        # Sorted, as a resumed run takes them from its checkpoint.
        **{name: value / good for name, value in sorted(sums.items())},
    }
    named = [number for number in samples if number >= 0]
    if void:
        row["bad_samples"] = named
    log.row(row)
    state.void_steps.zero_()
    state.void_samples.fill_(-1)
    state.void_rows = state.void_rows + 1 if void else 0
    if void > MOST_VOID_STEPS or state.void_rows >= MOST_VOID_ROWS:
        raise ValueError(
            f"{run.out}: {void} of the last {int(taken)} steps up to step {state.step} had a "
            f"gradient that is not finite; samples of the first: {named}. A lower --optim.lr or "
            "--optim.clip 1 usually helps."
        )


@dataclass
class Clock:
    """Steps per second since the process began, and since the last look."""

    first: int

    def __post_init__(self) -> None:
        self.began = self.looked = time.perf_counter()
        self.last = self.first

    def rate(self, step: int, batch: int) -> float:
        """Return images per second since the last call."""
        now = time.perf_counter()
        rate = (step - self.last) * batch / max(now - self.looked, 1e-9)
        self.last, self.looked = step, now
        return rate

    def left(self, step: int, total: int) -> float:
        """Return the estimated seconds that remain."""
        done = step - self.first
        return (time.perf_counter() - self.began) / max(done, 1) * (total - step)


def _line(run: Run, state: State, loader: Loader, clock: Clock) -> str:
    per_epoch = -(-loader.samples // run.loader.batch)
    total = run.epochs * per_epoch
    left = int(clock.left(state.step, total))
    done = state.step - clock.first
    speed = done * run.loader.batch / max(time.perf_counter() - clock.began, 1e-9)
    return (
        f"{run.out.name}: epoch {state.place.epoch + 1}/{run.epochs}, "
        f"step {state.step:,}/{total:,}, "
        f"{speed:,.0f} img/s, {left // 60}:{left % 60:02d} left"
    )


class Saves:
    """When checkpoints are due, and what happens when one cannot be written."""

    def __init__(self, run: Run, log: Log) -> None:
        """Count from now."""
        self.run = run
        self.log = log
        self.last = time.monotonic()
        self.failed = 0

    def due(self, state: State) -> bool:
        """Return whether it is time, by minutes or by steps."""
        by_steps = self.run.save_steps and state.step % self.run.save_steps == 0
        return bool(by_steps) or time.monotonic() - self.last >= self.run.save_minutes * 60

    def write(self, state: State) -> None:
        """Write the checkpoint; the rows that it counts are on the disk before."""
        lengths = self.log.lengths()
        save_checkpoint(self.run.out, state.step, state.tensors(), {**state.meta(), "log": lengths})
        self.last = time.monotonic()
        self.failed = 0

    def try_to_write(self, state: State, progress: Progress) -> None:
        """Write the checkpoint; if that fails say so and go on, the one before is intact."""
        try:
            self.write(state)
        except OSError as error:
            self.failed += 1
            self.last = time.monotonic()
            progress.show(f"{error}; the checkpoint before is intact, going on", final=True)
            if self.failed >= MOST_FAILED_SAVES:
                raise


def write_model(path: Path, state: State) -> None:
    """Write the network alone, under plain names, for whoever wants it."""
    import safetensors.torch

    tensors = {
        name: value.detach().to("cpu").contiguous().clone()
        for name, value in state.model.state_dict().items()
    }
    write_atomically(path, safetensors.torch.save(tensors))
