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
from backmix.pipeline.loader import LARGEST_VIEW
from backmix.pipeline.options import usable_cores
from backmix.train import protocols
from backmix.train.check import check
from backmix.train.checkpoint import locked, write_atomically
from backmix.train.digests import weights_digest
from backmix.train.evaluate import refuse_names
from backmix.train.image_sets import KNOWN, BetonImages, image_sets
from backmix.train.jobs import Job, Say, finished, run_jobs
from backmix.train.known import known_classes
from backmix.train.log import Progress
from backmix.train.options import Arpl, EvaluateOptions, Run, TableOptions, host_of
from backmix.train.outputs import load_outputs
from backmix.train.recipes import METHOD_ROWS, RECIPES, parse_run
from backmix.train.results import configuration, read_all, read_judged
from backmix.train.run_folder import as_document, read_config
from backmix.train.table_page import table_document, table_page
from backmix.train.trained import Trained, read_run

SMALL = (
    "--model classifier32-quarter --loader.batch 128 --optim.kind sgd --optim.lr 0.1 "
    "--optim.momentum 0.9 --optim.weight-decay 5e-4 --optim.schedule cosine --optim.warmup 0.1 "
    "--threads 1"
)
"""Options of --budget small: one network of 63,000 parameters and one short schedule for all."""
_OF_THE_TABLE = {
    "--data": "--data",
    "--out": "--out",
    "--seed": "--seeds and --first-seed",
    "--split.protocol": "--family",
    "--split.family": "--family",
    "--split.list": "--lists",
}
"""Options of `backmix train` that every cell is given, and what of a table sets them."""


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
    if not options.data or not (options.test or options.openood):
        raise ValueError(
            "a table needs both sets: --data TRAIN.beton, and --test TEST.beton or --openood DIR"
        )
    trained = [_checked(cell, options) for cell in grid]
    _refuse_repeats(grid, trained)
    sets = _sets(grid, trained, options)
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        return _run(grid, sets, options, say)


def _run(grid: Sequence[Cell], sets: "_Sets", options: TableOptions, say: Say) -> int:
    """Do what is left of a grid that has been checked, alone in its folder."""
    runs = options.out / "runs"
    broken = {cell.name: why for cell in grid if (why := _broken(runs / cell.name))}
    sound = [cell for cell in grid if cell.name not in broken]
    left = [job for cell in sound if (job := _job(cell, runs, sets, options)) is not None]
    # The small budget trains on one thread a cell; the full one on all cores, or on the GPU.
    usual = usable_cores() if options.budget == "small" else 1
    workers = max(1, min(options.workers or usual, len(left)))
    say(
        f"{len(grid)} cells, {len(sound) - len(left)} of them finished; {workers} at a time "
        f"in {runs}"
    )
    watch = _Watch(left, runs, grid, quiet=options.quiet)
    failed = broken | run_jobs(left, workers, say, keep_going=True, watch=watch)
    for cell in grid:
        if cell.name not in failed:
            try:
                read_judged(runs / cell.name)
            except (ValueError, OSError) as error:
                failed[cell.name] = _unreadable(runs / cell.name, error)
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
    others = {path.parent.name for path in runs.glob("*/metrics.json")} - {c.name for c in grid}
    if others:
        say(f"not in it are runs of other grids in {runs}: {len(others)}")
    for message in failed.values():
        say(f"not in it: {message}")
    return 1 if failed else 0


def cells(base: str, options: TableOptions) -> list[Cell]:
    """Return the cells of a grid: by class list, then seed, then method.

    Raises:
        ValueError: a method or list that does not exist, or a grid without a cell.
    """
    rows = [
        words for row in options.methods.split(",") if (words := _words("--methods", row.strip()))
    ]
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
    further = _words("--options", options.options)
    for word in (*further, *(word for row in rows for word in row[1:])):
        name = word.partition("=")[0].replace("_", "-")
        if name in _OF_THE_TABLE:
            raise ValueError(
                f"{name} is no option of single rows or cells: the table sets it, by "
                f"{_OF_THE_TABLE[name]}"
            )
    common = shlex.split(SMALL if options.budget == "small" else "")
    made = []
    for number in _lists(RECIPES[f"{base}-softmax"](), options):
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for (method, *own), name in zip(rows, names, strict=True):
                recipe = f"{base}-{method}"
                chosen = [*common, *_epochs(RECIPES[recipe](), options), "--seed", str(seed)]
                if options.family == "all":
                    chosen += ["--split.protocol", "None"]
                    name_here = f"{name}-all-seed{seed}"
                elif number is not None:
                    chosen += ["--split.family", options.family, "--split.list", str(number)]
                    name_here = f"{name}-{options.family}{number}-seed{seed}"
                else:
                    name_here = f"{name}-seed{seed}"
                chosen += [*further, *own]
                made.append(Cell(name_here, recipe, tuple(chosen)))
    return made


def _words(option: str, text: str) -> list[str]:
    """Return a text's words as a shell has them; ValueError names the option that holds it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{option}: {text} cannot be read as options: {error}") from None


def _name(row: Sequence[str]) -> str:
    """Return a row's folder name: the method, and its options' values in letters and digits."""
    return re.sub(r"[^A-Za-z0-9+]+", "-", " ".join(row)).strip("-")


def _lists(run: Run, options: TableOptions) -> list[int | None]:
    """Return the numbers of the class lists; None alone where the recipe follows no protocol."""
    protocol = run.split.protocol
    if protocol is None or options.family == "all":
        if options.lists:
            why = "--family all has" if protocol else "these recipes follow no protocol and have"
            raise ValueError(f"--lists: {why} no class lists")
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


def _checked(cell: Cell, options: TableOptions) -> Run:
    """Return what a cell trains; its options are refused before the first cell is trained."""
    given = ["--data", *map(str, options.data), "--out", str(options.out), *cell.options]
    try:
        run = parse_run(cell.recipe, given)
        check(run)
    except SystemExit:
        raise ValueError(
            f"{cell.name}: its training options are not understood, see above"
        ) from None
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error
    return run


def _refuse_repeats(grid: Sequence[Cell], trained: Sequence[Run]) -> None:
    """Refuse cells that would be the same run under two names, and so no table in the end."""
    seen: dict[tuple[str, int, int], str] = {}
    for cell, run in zip(grid, trained, strict=True):
        key = configuration(as_document(run)), run.split.list, run.seed
        if seen.setdefault(key, cell.name) != cell.name:
            raise ValueError(
                f"{seen[key]} and {cell.name} would be the same run twice: an option of one row "
                "has the value that it has without it; leave one of them out"
            )


@dataclass(frozen=True)
class _Sets:
    """What the files hold that a grid is trained and judged on."""

    data: str
    """Digest of the training set."""
    judged: dict[str, str | tuple[str, int]]
    """Of every set that cells are judged on: its digest; of a folder, its path and its images."""


def _sets(grid: Sequence[Cell], trained: Sequence[Run], options: TableOptions) -> _Sets:
    """Find all sets, as training and evaluation do; what is wrong is refused before any of it."""
    if options.size and not 1 <= options.size <= LARGEST_VIEW:
        raise ValueError(f"--size must be 1 to {LARGEST_VIEW} pixels, got {options.size}")
    asked = EvaluateOptions(
        test=options.test,
        unknown_data=options.unknown_data,
        unknown=options.unknown,
        openood=options.openood,
        benchmark=options.benchmark,
        bench=options.bench,
    )
    judged: dict[str, str | tuple[str, int]] = {}
    unknown = False
    with open_set(options.data) as data:
        # Cells differ in what is known, and in nothing else that matters to their sets.
        by_split = {run.split: (run, cell) for run, cell in zip(trained, grid, strict=True)}
        for run, cell in by_split.values():
            known = known_classes(run, data.classes)
            split = run.split
            one = Trained(
                run=Path(cell.name),
                options=run,
                classes=tuple(data.classes[number] for number in known),
                known=tuple(known),
                files=options.data,
                digest=data.digest,
                split=protocols.split(split.protocol, split.family, split.list)
                if split.protocol
                else None,
            )
            sets = image_sets(one, asked).images
            refuse_names(sets)
            unknown |= any(images.kind == "unknown" for images in sets)
            for images in sets:
                judged[images.name] = (
                    images.digest
                    if isinstance(images, BetonImages)
                    else (str(images.folder), len(images))
                )
    if not unknown:
        raise ValueError(
            "every class of the test set is known, so there is nothing to tell apart: name unknown "
            "images by --unknown NAME=PATH, a .beton or a folder, or a bench (--openood, --bench)"
        )
    return _Sets(data.digest, judged)


def _job(cell: Cell, runs: Path, sets: _Sets, options: TableOptions) -> Job | None:
    """Return what is left to do for a cell, or None."""
    run = runs / cell.name
    commands: deque[list[str]] = deque()
    if not finished(run):
        train = ["train", cell.recipe, "--data", *map(str, options.data), "--out", str(run)]
        commands.append([*train, *cell.options])
    else:
        _refuse_other_training(run, cell, sets.data)
    if commands or not _judged(run, sets, options):
        evaluate = ["evaluate", str(run), "--threads", "1"]
        if options.test:
            evaluate += ["--test", *map(str, options.test)]
        if options.openood:
            evaluate += ["--openood", str(options.openood)]
        if options.benchmark:
            evaluate += ["--benchmark", options.benchmark]
        if options.bench:
            evaluate += ["--bench", *map(str, options.bench)]
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


def _broken(run: Path) -> str:
    """Return what keeps a finished cell from being told from one of another grid, or nothing."""
    try:
        if finished(run):
            read_run(run)
    except (ValueError, OSError) as error:
        return _unreadable(run, error)
    return ""


def _unreadable(run: Path, error: Exception) -> str:
    return f"{run.name}: {error}; remove {run}, and the same command trains it anew"


def _refuse_other_training(run: Path, cell: Cell, digest: str) -> None:
    """Refuse a finished run of a cell's name that was trained otherwise, or on other data."""
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
    trained = read_run(run)
    if trained.digest != digest:
        raise ValueError(
            f"{run} is finished, but of another grid: it was trained on other data than --data "
            f"holds now ({', '.join(map(str, trained.files))} then): choose another --out"
        )


def _pairs(options: Sequence[str]) -> list[str]:
    """Return options with their values as one text each."""
    return " ".join(options).replace(" --", "\n--").splitlines()


def _judged(run: Path, sets: _Sets, options: TableOptions) -> bool:
    """Return whether a run has been judged by all that the grid asks for, on these very images."""
    try:
        metrics = json.loads((run / "metrics.json").read_text())
        views = metrics["views"]
        size = options.size or read_run(run).loader.size
        if (views["size"], views["flip"]) != (size, options.flip):
            return False
        if metrics["weights"] != weights_digest(run):
            return False
        for name, wanted in sets.judged.items():
            found = load_outputs(run / "scores" / f"{name}.safetensors")
            there = found.files[0], len(found) + len(found.bad)
            if wanted != (found.digest if isinstance(wanted, str) else there):
                return False
        judged = {KNOWN, *metrics["unknown"], *metrics.get("shifted", {})}
        return sets.judged.keys() <= judged and bool(metrics["fit"] or not options.fit)
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
            hours, minutes = divmod(round(seconds / 60), 60)
            line += f", about {hours} h {minutes:02} min"
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
