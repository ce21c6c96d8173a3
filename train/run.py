"""A run from its options to its folder: open, continue, log, save, stop.

The host looks at the device only when a row of the log is due.
"""

import contextlib
import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

from backmix.pipeline.loader import Loader
from backmix.pipeline.options import size_at
from backmix.train.check import check
from backmix.train.checkpoint import (
    locked,
    newest_checkpoint,
    newest_step,
)
from backmix.train.desk import Desk
from backmix.train.forward import compile_step
from backmix.train.log import Log, Progress, write_status
from backmix.train.loggers import Loggers, Start
from backmix.train.loop import steps
from backmix.train.models.fit import judge_maps
from backmix.train.options import Run
from backmix.train.prepare import (
    Beginning,
    begin,
    fill_bank,
    fitness,
    prepare_run,
    train_with_others,
)
from backmix.train.profile import Profile, fetched
from backmix.train.recorded import own_stream, recorded_steps
from backmix.train.run_folder import (
    OtherRunError,
    refuse_other_data_or_write,
    refuse_other_options,
    write_config,
)
from backmix.train.saves import Saves, refuse_many_voids, take_row
from backmix.train.state import State
from backmix.train.stop import StopAsked
from backmix.train.world import (
    Agreement,
    LostError,
    World,
    joined,
    under_torchrun,
)

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal, has a checkpoint, and has more to do."""
EXIT_INTERRUPTED = 130
"""Exit code of a run that was interrupted before there was anything to continue."""


def train(run: Run, recipe: str, command: list[str]) -> int:
    """Run, or continue, a training run; returns the exit code.

    Several processes that a launcher started train it together: it says in the environment who each
    of them is. The first one alone writes the run folder.
    """
    if run.dry_run:
        from backmix.train.dry_run import dry_run

        return dry_run(run, recipe, command)

    def last_words(why: str, lost: bool) -> None:
        write_status(run.out, "stopped" if lost else "failed", newest_step(run.out), why)

    kind = "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"
    with joined(kind, last_words) as world, StopAsked() as stop:
        check(run)
        if world.first:
            code = _train_first(run, recipe, command, world, stop)
        else:
            code = _train_together(run, recipe, command, world, stop, Progress(quiet=True))
    # Any other code is a failure to torchrun, which would start all processes anew.
    return 0 if code in (EXIT_STOPPED, EXIT_INTERRUPTED) and under_torchrun() else code


def _train_first(run: Run, recipe: str, command: list[str], world: World, stop: StopAsked) -> int:
    """Do this process's part, hold the run folder, and write there how it ends."""
    made = not run.out.exists()
    run.out.mkdir(parents=True, exist_ok=True)
    with locked(run.out):
        try:
            return _train_together(run, recipe, command, world, stop, Progress(run.quiet))
        except KeyboardInterrupt:
            write_status(run.out, "stopped", newest_step(run.out), "interrupted")
            if world.size > 1:  # the others are in the midst of a step, and must be told
                raise
            return EXIT_STOPPED if newest_step(run.out) else EXIT_INTERRUPTED
        except OtherRunError:
            raise
        except Exception as error:
            explained = world.explain(error)
            why, lost = world.word()
            if (run.out / "config.json").exists():
                with contextlib.suppress(OSError):
                    how = "stopped" if lost or isinstance(explained, LostError) else "failed"
                    why = why or str(error) or repr(error)
                    write_status(run.out, how, newest_step(run.out), why)
            elif made:
                shutil.rmtree(run.out, ignore_errors=True)
            if explained is error:
                raise
            raise explained from error


def _train_together(
    run: Run,
    recipe: str,
    command: list[str],
    world: World,
    stop: StopAsked,
    progress: Progress,
) -> int:
    """Do this process's part; the first one says what is to be said and writes the run folder."""
    try:
        return _train(run, recipe, command, world, stop, progress)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise ValueError(
                f"there is not enough memory ({error}): try a smaller --loader.batch or "
                "--loader.size"
            ) from error
        raise


def _train(
    run: Run,
    recipe: str,
    command: list[str],
    world: World,
    stop: StopAsked,
    progress: Progress,
) -> int:
    def decoding(done: int, total: int) -> None:
        progress.show(f"decoding: {done:,} of {total:,}")

    def say(line: str) -> None:
        progress.show(line, final=True)

    if world.first:
        refuse_other_options(run)
    config, state, loader = prepare_run(run, recipe, command, decoding, say, world)
    with loader:
        found = None
        if world.first:
            refuse_other_data_or_write(run, config)
            found, said = newest_checkpoint(run.out)
            for line in said:
                say(line)
        tensors = world.tensors_of_first(found and found[0])
        meta = world.of_first(found and found[1])
        beginning = Beginning([], head=False)
        if tensors is not None:
            state.load(tensors, meta)  # of --init nothing is needed any more
            say(f"continuing {run.out} at step {state.step}")
        else:
            beginning = begin(state, run)
            for line in beginning.said:
                say(line)
            network = world.of_first(fitness(run, state, loader.subset) if world.first else {})
            for line in judge_maps(run, network):
                say(line)
            if network and world.first:
                config = replace(config, network=network)
                write_config(run, config)
        del found, tensors
        train_with_others(state, run, loader)
        if beginning.head and fill_bank(state, run, loader):
            say("BackMix's bank: filled from the network as it was")
        if run.compile:
            state.forward = compile_step(state.forward, state.model)
        for line in remarks(run, loader.samples):
            say(line)
        device = config.resolved.device
        total = run.epochs * -(-loader.samples // run.loader.batch)
        with ExitStack() as stack:
            desk = None
            if world.first:
                started = Start(run.out, state.step, asdict(config))
                log = Log(run.out, meta and meta["log"], Loggers(run.log_to, started, say))
                stack.callback(log.close)
                write_status(run.out, "running", state.step)
                event = {"event": "resume" if meta else "start", "step": state.step}
                many = {"processes": world.size} if world.size > 1 else {}
                log.time({**event, "host": os.uname().nodename, **many})
                profile = Profile(
                    run.out,
                    run.profile,
                    first=state.step + 1,
                    left=total - state.step,
                    device=device,
                    say=say,
                )
                saves = Saves(run, log)
                desk = Desk(run, state, log, saves, stack.enter_context(profile), progress, total)
                stack.callback(saves.finish)
            autocast = torch.autocast(
                device, torch.bfloat16, enabled=config.resolved.precision == "bf16"
            )
            with own_stream(state.void_steps.device) if run.graph else contextlib.nullcontext():
                return _go(run, state, loader, autocast, stop, desk)


def remarks(run: Run, samples: int) -> list[str]:
    """Return what is odd about a run's options on these data, as lines for people."""
    lines = []
    if samples < run.loader.batch:
        lines.append(
            f"only {samples} training images for --loader.batch {run.loader.batch}: an "
            "epoch is a single step; the recipe's learning rate belongs to its batch"
        )
    last = size_at(run.loader, run.epochs - 1)
    if last < run.loader.size:
        lines.append(
            f"views end at {last} pixels and never have --loader.size {run.loader.size}: "
            f"--loader.grow ends at epoch {run.loader.grow[1]}, the run has --epochs "
            f"{run.epochs}"
        )
    return lines


def _go(
    run: Run,
    state: State,
    loader: Loader,
    autocast: torch.autocast,
    stop: StopAsked,
    desk: Desk | None,
) -> int:
    """Take steps; log, save and stop when it is time, all processes in the same step."""
    world = state.world

    def save(wait: bool) -> None:
        if desk is None:
            state.tensors()  # which all make together
        elif wait:
            desk.saves.write(state)
        else:
            desk.saves.try_to_write(state, desk.progress)

    [asked] = world.greatest([stop.signal])
    if asked:  # it came while the data were opened
        if desk is not None:
            write_status(run.out, "stopped", state.step, signal.Signals(asked).name)
        return EXIT_STOPPED if state.step else EXIT_INTERRUPTED
    agreement = Agreement(world, state.step)
    named_bad = 0
    if run.graph:
        going = recorded_steps(state, loader, run, autocast)
    else:
        going = steps(state, loader, run, autocast, desk.clock.fetched if desk else fetched)
    for step in going:
        if desk is not None:
            desk.step()
        if step.end_of_epoch:
            sums = state.epoch.take(world)
            if desk is not None:
                desk.epoch(sums)
        if state.step % run.log_every == 0 or step.end_of_epoch:
            row, taken = take_row(state)
            bad = world.gathered([len(loader.bad), loader.bad[named_bad:]])
            named_bad = len(loader.bad)
            if desk is not None:
                named = [line for _, lines in bad for line in lines]
                desk.row(row, sum(count for count, _ in bad), named, step.end_of_epoch)
            refuse_many_voids(state, row, taken, run)
        if desk is not None:
            desk.show()
        due = desk is not None and desk.saves.due(state)
        asked, due = agreement.now(state.step, stop.signal, due)
        if asked:
            save(wait=True)
            if desk is not None:
                desk.stopped(asked, step.end_of_epoch)
            return EXIT_STOPPED
        if due or (run.save_steps and state.step % run.save_steps == 0):
            save(wait=False)
    save(wait=True)
    if desk is not None:
        desk.finished()
    return 0
