"""`backmix table`: a grid of class lists, methods and seeds, trained, judged and laid side by side.

Every cell is a run folder that the usual commands made; the command lines stand in its config.json.
What is finished is not done again, so the same command goes on after an interruption, and a wider
grid in the same folder keeps the cells that are there.
"""

import json
import re
import shlex
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backmix.pipeline.beton import open_set
from backmix.pipeline.options import usable_cores
from backmix.train import protocols
from backmix.train.check import check
from backmix.train.checkpoint import write_atomically
from backmix.train.jobs import Job, Say, finished, run_jobs
from backmix.train.log import Progress
from backmix.train.options import Arpl, Run, TableOptions, host_of
from backmix.train.recipes import METHOD_ROWS, RECIPES, parse_run
from backmix.train.results import read_all
from backmix.train.run_folder import read_config
from backmix.train.table_page import table_document, table_page
from backmix.train.trained import read_run

SMALL = (
    "--model classifier32-quarter --loader.batch 128 --optim.kind sgd --optim.lr 0.1 "
    "--optim.momentum 0.9 --optim.weight-decay 5e-4 --optim.schedule cosine --optim.warmup 0.1 "
    "--threads 1"
)
"""Options of --budget small: one network of 63,000 parameters and one short schedule for all."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    """Name of its folder: method, class list, seed."""
    recipe: str
    options: tuple[str, ...]
    """Options of `backmix train`, without data and folder."""


def run_table(base: str, options: TableOptions, *, say: Say = print) -> int:
    """Train and judge all cells of a grid; write OUT/table.md and OUT/table.json.

    Args:
        base: the recipes' name without the method: cifar10, svhn, cifar10-wrn, ...
        options: the grid.
        say: takes lines of progress, and the table at the end.

    Returns 0, or 1 where cells failed: the others are done and are in the table.

    Raises:
        ValueError: what is wrong with the grid, or what made every cell fail.
        OSError: a file could not be written.
    """
    grid = cells(base, options)
    if not options.data or not options.test:
        raise ValueError("a table needs both sets: --data TRAIN.beton --test TEST.beton")
    for cell in grid:
        _check(cell, options)
    _check_sets(options)
    runs = options.out / "runs"
    left = [job for cell in grid if (job := _job(cell, runs, options)) is not None]
    # The small budget trains on one thread a cell; the full one on all cores, or on the GPU.
    usual = usable_cores() if options.budget == "small" else 1
    workers = max(1, min(options.workers or usual, len(left)))
    say(
        f"{len(grid)} cells, {len(grid) - len(left)} of them finished; {workers} at a time "
        f"in {runs}"
    )
    watch = _Watch(left, runs, grid, quiet=options.quiet)
    failed = run_jobs(left, workers, say, keep_going=True, watch=watch)
    done = [runs / cell.name for cell in grid if cell.name not in failed]
    if not done:
        raise ValueError(
            "no cell could be finished; the first said: " + next(iter(failed.values()))
        )
    document = table_document(read_all(done))
    page = table_page(document)
    write_atomically(options.out / "table.md", page.encode())
    write_atomically(options.out / "table.json", (json.dumps(document) + "\n").encode())
    say(page)
    say(f"wrote {options.out / 'table.md'} and table.json; {len(done)} of {len(grid)} cells")
    for message in failed.values():
        say(f"not in it: {message}")
    return 1 if failed else 0


def cells(base: str, options: TableOptions) -> list[Cell]:
    """Return the cells of a grid: by class list, then seed, then method.

    Raises:
        ValueError: a method or list that does not exist, or a grid without a cell.
    """
    rows = [words for row in options.methods.split(",") if (words := shlex.split(row))]
    if not rows or options.seeds < 1:
        raise ValueError("a table needs at least one method (--methods) and one seed (--seeds)")
    if f"{base}-softmax" not in RECIPES:
        bases = [name.removesuffix("-softmax") for name in RECIPES if name.endswith("-softmax")]
        raise ValueError(f"no recipes are called {base}-METHOD; there are {', '.join(bases)}")
    for method, *_ in rows:
        if f"{base}-{method}" not in RECIPES:
            there = [name for name, *_ in METHOD_ROWS if f"{base}-{name}" in RECIPES]
            raise ValueError(f"--methods: {base} has no {method}; it has {', '.join(there)}")
    names = [_name(row) for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"--methods names a row twice: {', '.join(names)}")
    common = shlex.split(SMALL if options.budget == "small" else "")
    made = []
    for number in _lists(RECIPES[f"{base}-softmax"](), options):
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for (method, *own), name in zip(rows, names, strict=True):
                recipe = f"{base}-{method}"
                chosen = [*common, *_epochs(RECIPES[recipe](), options), "--seed", str(seed)]
                if number is not None:
                    chosen += ["--split.family", options.family, "--split.list", str(number)]
                    name_here = f"{name}-{options.family}{number}-seed{seed}"
                else:
                    name_here = f"{name}-seed{seed}"
                chosen += [*shlex.split(options.options), *own]
                made.append(Cell(name_here, recipe, tuple(chosen)))
    return made


def _name(row: Sequence[str]) -> str:
    """Return a row's folder name: the method, and its options' values in letters and digits."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", " ".join(row)).strip("-")


def _lists(run: Run, options: TableOptions) -> list[int | None]:
    """Return the numbers of the class lists; None alone where the recipe follows no protocol."""
    protocol = run.split.protocol
    if protocol is None:
        if options.lists:
            raise ValueError("--lists: these recipes follow no protocol and have no class lists")
        return [None]
    published = len(protocols.splits(protocol, options.family))
    wanted = list(options.lists) or list(range(published))
    for number in wanted:
        protocols.split(protocol, options.family, number)
    if len(set(wanted)) < len(wanted):
        raise ValueError("--lists names a list twice")
    return [*wanted]


def _epochs(run: Run, options: TableOptions) -> list[str]:
    """Return the option that sets a cell's epochs; ARPL+CS makes two passes in each."""
    small = 12 if options.budget == "small" else 0
    epochs = options.epochs or small
    if not epochs:
        return []
    host = host_of(run.method)
    passes = 2 if isinstance(host, Arpl) and host.confusing else 1
    return ["--epochs", str(passes * epochs)]


def _check(cell: Cell, options: TableOptions) -> None:
    """Refuse a cell's options before the first cell is trained."""
    given = ["--data", *map(str, options.data), "--out", str(options.out), *cell.options]
    try:
        check(parse_run(cell.recipe, given))
    except SystemExit:
        raise ValueError(
            f"{cell.name}: its training options are not understood, see above"
        ) from None
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error


def _check_sets(options: TableOptions) -> None:
    """Refuse sets that are not there before the first cell is trained."""
    for files in (options.data, options.test, options.unknown_data):
        if files:
            open_set(files).close()
    for given in options.unknown:
        name, equals, path = given.partition("=")
        if not (name and equals and Path(path).exists()):
            raise ValueError(f"--unknown {given}: write NAME=PATH, with the path of what is there")


def _job(cell: Cell, runs: Path, options: TableOptions) -> Job | None:
    """Return what is left to do for a cell, or None."""
    run = runs / cell.name
    commands: deque[list[str]] = deque()
    if not finished(run):
        train = ["train", cell.recipe, "--data", *map(str, options.data), "--out", str(run)]
        commands.append([*train, *cell.options])
    else:
        _refuse_other_training(run, cell)
    if commands or not _judged(run, options):
        evaluate = ["evaluate", str(run), "--test", *map(str, options.test), "--threads", "1"]
        if options.unknown_data:
            evaluate += ["--unknown-data", *map(str, options.unknown_data)]
        if options.unknown:
            evaluate += ["--unknown", *options.unknown]
        if options.fit:
            evaluate += ["--fit"]
        if options.size:
            evaluate += ["--size", str(options.size)]
        if options.flip:
            evaluate += ["--flip"]
        given = ["--data", *map(str, options.data), "--out", str(run), *cell.options]
        model = parse_run(cell.recipe, given).model
        if ":" in model:
            evaluate += ["--model", model]
        commands.append(evaluate)
    return Job(cell.name, commands, runs / f"{cell.name}.log") if commands else None


def _refuse_other_training(run: Path, cell: Cell) -> None:
    """Refuse a finished run of a cell's name that was trained by another command."""
    words = shlex.split(read_config(run).get("command", ""))
    options = words[words.index("--out") + 2 :] if "--out" in words else []
    if words[2:3] != [cell.recipe] or options != list(cell.options):
        was, wanted = set(_pairs(options)), set(_pairs(cell.options))
        before = ", ".join(sorted(was - wanted)) or "no other option"
        now = ", ".join(sorted(wanted - was)) or "no other option"
        raise ValueError(
            f"{run} is finished, but of another grid: it was {words[2]} with {before}, this one "
            f"asks for {cell.recipe} with {now}: choose another --out"
        )


def _pairs(options: Sequence[str]) -> list[str]:
    """Return options with their values as one text each."""
    return " ".join(options).replace(" --", "\n--").splitlines()


def _judged(run: Path, options: TableOptions) -> bool:
    """Return whether a run has been judged by all that the grid asks for."""
    try:
        metrics = json.loads((run / "metrics.json").read_text())
        wanted = {given.partition("=")[0] for given in options.unknown}
        views = metrics["views"]
        size = options.size or read_run(run).loader.size
        if (views["size"], views["flip"]) != (size, options.flip):
            return False
        return wanted <= metrics["unknown"].keys() and bool(metrics["fit"] or not options.fit)
    except (OSError, ValueError, KeyError):
        return False


class _Watch:
    """Says now and then how far the grid is, and how long the rest will take."""

    def __init__(
        self, left: Sequence[Job], runs: Path, grid: Sequence[Cell], *, quiet: bool
    ) -> None:
        self.left, self.runs = left, runs
        self.began = self.last = time.monotonic()
        self.at_start = {job.name: self._share(job.name) for job in left}
        self.progress = Progress(quiet)

    def __call__(self, running: Sequence[Job]) -> None:
        """Show a line, at most every five seconds."""
        now = time.monotonic()
        if now - self.last < 5:
            return
        self.last = now
        # The shares of the cells' work that were left at the start, and that are left now.
        before = sum(1 - share for share in self.at_start.values())
        after = sum(1 - self._share(job.name) for job in self.left)
        line = f"{len(running)} running, {after:.1f} cells left"
        if before > after:
            seconds = (now - self.began) * after / (before - after)
            line += f", about {seconds // 3600:.0f} h {seconds % 3600 / 60:02.0f} min"
        self.progress.show(line)

    def _share(self, name: str) -> float:
        """Return how much of a cell's training is done, from the last row of its log."""
        run = self.runs / name
        if (run / "metrics.json").exists():
            return 1.0
        try:
            config = json.loads((run / "config.json").read_text())
            with open(run / "log.jsonl", "rb") as log:
                log.seek(max(0, log.seek(0, 2) - 4096))
                row = json.loads(log.read().decode().rstrip("\n").rsplit("\n", 1)[-1])
            epochs = row["epoch"] + row["consumed"] / config["data"]["samples"]
            return min(epochs / config["run"]["epochs"], 0.99)
        except (OSError, ValueError, KeyError):
            return 0.0
