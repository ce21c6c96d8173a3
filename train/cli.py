"""The command line: one function per command, heavy imports inside them.

Exit codes: 0 done; 1 failed, with one message on stderr; 2 wrong usage; 75 stopped by a signal with
a checkpoint written and more to do; 130 interrupted with nothing to continue. `status` and
`monitor` have codes of their own, which their help names.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from backmix.pipeline.options import ConvertOptions
from backmix.train.decide.options import CalibrateOptions, MonitorOptions, PredictOptions
from backmix.train.options import EvaluateOptions, PreviewOptions, TableOptions
from backmix.train.recipes import METHOD_ROWS, RECIPES, listed, parse_run

Asked = TypeVar("Asked")
CONFIG = (tyro.conf.FlagCreatePairsOff,)
DONE, FAILED, USAGE, RECALIBRATE, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Convert:
    """Convert folders, archives, lists or a published data set into one .beton file.

    SOURCE is folder:DIR, tar:FILE//PREFIX, list:FILE//ROOT, imagenet:DIR[//val], cifar:DIR[//test],
    svhn:DIR[//test], tinyimagenet:DIR[//val], 'webdataset:SHARDS' or 'parquet:FILES'.
    """

    source: tyro.conf.Positional[str]
    """Kind and place of the images, see above."""
    out: tyro.conf.Positional[Path]
    """The .beton file to write; a manifest OUT.beton.jsonl is written beside it. With --shards the
    files have numbers in their names."""
    storing: tyro.conf.OmitArgPrefixes[ConvertOptions] = field(default_factory=ConvertOptions)
    """How images are stored."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Inspect:
    """Print what is in a .beton file."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """A .beton file, shards of one set, or the manifest of either."""
    verify: bool = False
    """Check every sample's checksum and decode it; exit code 1 where one fails."""


@dataclass(frozen=True)
class BenchStep:
    """Measure what the loader of a training run delivers, what a step consumes, and both together.

    RECIPE and all its options are those of `backmix train`, less --out: nothing is written. The
    three forms take turns, so that a slow moment of the machine hits all.
    """

    recipe: tyro.conf.Positional[str]
    """A recipe of `backmix train`."""
    rounds: int = 5
    """Turns of each form, at least 2."""
    steps: int = 20
    """Steps of a turn, at most."""
    seconds: float = 60.0
    """For all turns together, about; the steps of a turn become fewer for it [s]."""


@dataclass(frozen=True)
class Status:
    """Say how a run stands: exit code 0 finished, 75 go on, 1 failed, 3 running, 2 none there."""

    run: tyro.conf.Positional[Path]
    """Run folder."""


@dataclass(frozen=True)
class Evaluate:
    """Score known and unknown test images with a trained run and measure how well they part."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    scoring: tyro.conf.OmitArgPrefixes[EvaluateOptions] = field(default_factory=EvaluateOptions)
    """What to score."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Table:
    """Train and judge a grid of class lists, methods and seeds; lay the figures side by side."""

    recipes: tyro.conf.Positional[str]
    """Name of the recipes without the method: cifar10, svhn, cifar+10, tiny-imagenet, ..."""
    grid: tyro.conf.OmitArgPrefixes[TableOptions]
    """The grid."""


@dataclass(frozen=True)
class Report:
    """Make one self-contained page of one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or the folder of a table; runs of one method are averaged over splits and
    seeds."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page to write."""
    model: str = ""
    """The --model of runs of MODULE:CALLABLE once more: their pictures import that program."""


@dataclass(frozen=True)
class Calibrate:
    """Choose the threshold of a run on held-out known images, with a guarantee."""

    run: tyro.conf.Positional[Path]
    """Run folder; its threshold.json is written."""
    choosing: tyro.conf.OmitArgPrefixes[CalibrateOptions] = field(default_factory=CalibrateOptions)
    """How."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Predict:
    """Accept or reject images: a row for each, with class, score and p-value.

    SOURCE is an image, a folder with its subfolders, a plain tar, a .beton file, or - for names of
    files from standard input. A call that was stopped goes on with the same command.
    """

    path: tyro.conf.Positional[Path]
    """A calibrated run folder, or an exported file."""
    sources: tyro.conf.Positional[tuple[str, ...]]
    """What to decide about."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("predictions.csv")
    """The table to write: .csv, .json, .jsonl or .parquet."""
    deciding: tyro.conf.OmitArgPrefixes[PredictOptions] = field(default_factory=PredictOptions)
    """How."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Export:
    """Write one file that holds preprocessing, network, score, threshold and class names."""

    run: tyro.conf.Positional[Path]
    """A calibrated run folder."""
    out: tyro.conf.Positional[Path]
    """The file to write: .onnx or .pt2."""
    model: str = ""
    """The --model of a run of MODULE:CALLABLE once more: exporting imports that program."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class VerifyExport:
    """Replay the self-test that an exported file carries; exit code 1 where it fails."""

    path: tyro.conf.Positional[Path]
    """An .onnx or .pt2 file of `backmix export`."""
    trust: bool = False
    """Open a .pt2 file: torch runs what is in it, so only your own or a trusted party's."""


@dataclass(frozen=True)
class Monitor:
    """Watch predictions: is the rejection rate what was promised? Exit code 3 where it is not."""

    predictions: tyro.conf.Positional[tuple[Path, ...]]
    """Tables of `backmix predict`, in the order in which they came about."""
    watching: tyro.conf.OmitArgPrefixes[MonitorOptions]
    """How."""
    quiet: bool = False
    """No progress."""


@dataclass(frozen=True)
class Preview:
    """Draw target, donor with its mask, and mixed image, side by side."""

    data: tyro.conf.Positional[Path]
    """A .beton file, or a manifest."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("preview.png")
    """The picture to write."""
    drawing: tyro.conf.OmitArgPrefixes[PreviewOptions] = field(default_factory=PreviewOptions)
    """What to draw."""


@dataclass(frozen=True)
class Demo:
    """Run the whole road on synthetic images: data, training, evaluation, report."""

    out: Path = Path("demo")
    """Folder for everything that is made; a second call continues."""
    seeds: int = 3
    """Number of seeds, from 0."""


def _ask(command: type[Asked], name: str, arguments: Sequence[str]) -> Asked:
    """Parse a command's arguments; a mistake ends the process with exit code 2 and a hint."""
    return tyro.cli(command, prog=f"backmix {name}", args=arguments, config=CONFIG)


def _convert(arguments: Sequence[str]) -> int:
    asked = _ask(Convert, "convert", arguments)
    from backmix.pipeline.convert import convert

    with _Bar("converting", asked.quiet) as bar:
        summary = convert(asked.source, asked.out, asked.storing, progress=bar)
    print(summary)
    return DONE


def _inspect(arguments: Sequence[str]) -> int:
    asked = _ask(Inspect, "inspect", arguments)
    from backmix.pipeline.inspect import describe, verify

    if not asked.files:
        return _usage("backmix inspect needs a .beton file")
    print(describe(asked.files))
    if not asked.verify:
        return DONE
    with _Bar("verifying", quiet=False) as bar:
        problems = verify(asked.files, progress=bar)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems found" if problems else "every sample verified")
    return FAILED if problems else DONE


def _train(arguments: Sequence[str]) -> int:
    recipe, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    if recipe in ("", "-h", "--help"):
        print(_recipes())
        return DONE if recipe else USAGE
    if wrong := _no_recipe(recipe):
        return _usage(wrong)
    asked = parse_run(recipe, options)
    if not asked.data:
        return _usage("backmix train needs the training set: --data FILE.beton")
    from backmix.train.run import train

    return train(asked, recipe, ["backmix", "train", *arguments])


def _no_recipe(recipe: str) -> str:
    """Return what is wrong with the name of a recipe, or nothing."""
    if f"{recipe}-softmax" in RECIPES:
        return f"{recipe} is no recipe without a method, such as {recipe}-backmix"
    if recipe not in RECIPES:
        what = "the recipe comes first" if recipe.startswith("-") else f"no recipe {recipe!r}"
        return f"{what}{_near(recipe, RECIPES)} (backmix train --help lists them)"
    return ""


def _bench_step(arguments: Sequence[str]) -> int:
    asked, options = tyro.cli(
        BenchStep,
        prog="backmix bench-step",
        args=arguments,
        config=CONFIG,
        return_unknown_args=True,
    )
    if wrong := _no_recipe(asked.recipe):
        return _usage(wrong)
    if asked.rounds < 2 or asked.steps < 2:
        return _usage("--rounds and --steps must be at least 2")
    run = parse_run(asked.recipe, ["--out", "bench-step", *options])
    if not run.data:
        return _usage("backmix bench-step needs the training set: --data FILE.beton")
    from backmix.train.bench_step import bench_step, table
    from backmix.train.log import Progress

    progress = Progress(run.quiet)
    laps = bench_step(run, asked.rounds, asked.steps, asked.seconds, _say(progress))
    print(table(laps))
    return DONE


def _say(progress: Any) -> Callable[[str], None]:
    return lambda line: progress.show(line, final=True)


def _recipes() -> str:
    """Return the list of recipes: data sets by methods, and those that stand alone."""
    methods = {name: what for name, what, _ in METHOD_ROWS}
    bases, alone = listed()
    width = max(map(len, [*methods, *alone, *bases])) + 2

    def rows(named: dict[str, str]) -> list[str]:
        return [f"  {name:{width}}{what}" for name, what in named.items()]

    lines = ["usage: backmix train RECIPE --data FILE.beton --out RUN [options]", ""]
    lines += ["Train a recipe; the same command continues an unfinished run.", ""]
    lines += ["A recipe is DATA-METHOD, such as cifar10-backmix. DATA:"]
    lines += rows(bases)
    lines += ["", "METHOD:", *rows(methods), "", "Others:"]
    lines += rows(alone)
    lines += ["", "backmix train RECIPE --help shows every option with the recipe's value."]
    return "\n".join(lines)


def _near(word: str, words: Iterable[str]) -> str:
    """Return a hint at the known word that is meant, or nothing."""
    near = get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _status(arguments: Sequence[str]) -> int:
    asked = _ask(Status, "status", arguments)
    from backmix.train.log import read_status, status_line

    if not (asked.run / "status.json").exists():
        return _usage(f"{asked.run} has no status.json: there is no run, or it has just begun")
    status = read_status(asked.run)
    print(status_line(status))
    return {"finished": 0, "stopped": 75, "failed": 1, "running": 3}[status["state"]]


def _evaluate(arguments: Sequence[str]) -> int:
    asked = _ask(Evaluate, "evaluate", arguments)
    from backmix.train.evaluate import evaluate
    from backmix.train.judge import table
    from backmix.train.log import Progress

    progress = Progress(asked.quiet)
    figures = evaluate(
        asked.run,
        asked.scoring,
        say=progress.show,
        tell=lambda line: progress.show(line, final=True),
    )
    if figures:  # of several processes the first one has them
        print(table(figures))
    return DONE


def _report(arguments: Sequence[str]) -> int:
    asked = _ask(Report, "report", arguments)
    if not asked.runs:
        return _usage("backmix report needs a run folder")
    from backmix.train.report import write_report

    print(write_report(asked.runs, asked.out, asked.model))
    print(f"wrote {asked.out}")
    return DONE


def _calibrate(arguments: Sequence[str]) -> int:
    asked = _ask(Calibrate, "calibrate", arguments)
    from backmix.train.decide.calibrate import calibrate
    from backmix.train.log import Progress

    progress = Progress(asked.quiet)
    words = ["backmix", "calibrate", *arguments]
    print(calibrate(asked.run, asked.choosing, words, say=progress.show, tell=_say(progress)))
    return DONE


def _predict(arguments: Sequence[str]) -> int:
    asked = _ask(Predict, "predict", arguments)
    if not asked.sources:
        return _usage("backmix predict needs images: files, folders, tars, .beton files, or -")
    from backmix.train.decide.predict import predict
    from backmix.train.log import Progress

    progress = Progress(asked.quiet)
    summary = predict(
        asked.path,
        asked.sources,
        asked.out,
        asked.deciding,
        stdin=sys.stdin.buffer if sys.stdin else None,
        say=progress.show,
        tell=_say(progress),
    )
    print(summary)
    return summary.exit_code


def _export(arguments: Sequence[str]) -> int:
    asked = _ask(Export, "export", arguments)
    from backmix.train.decide.export import export
    from backmix.train.log import Progress

    print(export(asked.run, asked.out, model=asked.model, say=Progress(asked.quiet).show))
    return DONE


def _verify_export(arguments: Sequence[str]) -> int:
    asked = _ask(VerifyExport, "verify-export", arguments)
    from backmix.train.decide.verify import verify_export

    print(verify_export(asked.path, trust=asked.trust))
    return DONE


def _monitor(arguments: Sequence[str]) -> int:
    asked = _ask(Monitor, "monitor", arguments)
    if not asked.predictions:
        return _usage("backmix monitor needs a table of `backmix predict`")
    from backmix.train.decide.monitor import monitor
    from backmix.train.log import Progress

    progress = Progress(asked.quiet)
    words, changed = monitor(asked.predictions, asked.watching, say=progress.show)
    print(words)
    return RECALIBRATE if changed else DONE


def _table(arguments: Sequence[str]) -> int:
    asked = _ask(Table, "table", arguments)
    from backmix.train.table import run_table

    return run_table(asked.recipes, asked.grid, say=lambda line: print(line, flush=True))


def _preview(arguments: Sequence[str]) -> int:
    asked = _ask(Preview, "preview", arguments)
    from backmix.train.preview import write_preview

    print(write_preview(asked.data, asked.out, asked.drawing))
    print(f"wrote {asked.out}")
    return DONE


def _demo(arguments: Sequence[str]) -> int:
    asked = _ask(Demo, "demo", arguments)
    from backmix.train.demo import run_demo

    return run_demo(asked.out, range(asked.seeds))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "convert": (_convert, "a folder, tar or published data set -> one .beton file"),
    "inspect": (_inspect, "what is in a .beton file; --verify checks every sample"),
    "preview": (_preview, "a picture of targets, donors with masks, and mixes"),
    "train": (_train, "train a recipe, or continue a run"),
    "bench-step": (_bench_step, "what loader and step of a recipe can do, alone and together"),
    "status": (_status, "how a run stands, as an exit code for schedulers"),
    "evaluate": (_evaluate, "scores and open-set metrics of a run"),
    "calibrate": (_calibrate, "a threshold with a guarantee, from held-out known images"),
    "predict": (_predict, "accept or reject images: one row each, as csv, json or parquet"),
    "export": (_export, "one file to ship: preprocessing, network, score and threshold"),
    "verify-export": (_verify_export, "replay the self-test of an exported file"),
    "monitor": (_monitor, "is the rejection rate still what was promised?"),
    "table": (_table, "a whole grid of methods, class lists and seeds, as one table"),
    "report": (_report, "one page about one or several runs"),
    "demo": (_demo, "the whole road on synthetic images"),
}


class _Bar:
    """A progress bar on a terminal, plain lines elsewhere; called with (done, total)."""

    def __init__(self, what: str, quiet: bool) -> None:
        self.what = what
        self.quiet = quiet

    def __enter__(self) -> Callable[[int, int], None]:
        from backmix.train.log import Progress

        progress = Progress(self.quiet)

        def show(done: int, total: int) -> None:
            progress.show(f"{self.what}: {done:,} of {total:,}", final=done == total)

        return show

    def __exit__(self, *exception: object) -> None:
        return None


def _usage(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE


def _help() -> str:
    from backmix import __version__

    lines = [f"backmix {__version__}: open-set recognition regularised by image backgrounds", ""]
    lines += ["usage: backmix COMMAND [--help] [options]", ""]
    lines += [f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "--debug after any command shows the traceback of an error."]
    return "\n".join(lines)


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr."""
    words = [word for word in argv if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return DONE if words else USAGE
    if words[0] == "--version":
        from backmix import __version__

        print(__version__)
        return DONE
    if words[0] not in COMMANDS:
        hint = _near(words[0], COMMANDS)
        return _usage(f"there is no command {words[0]!r}{hint} (backmix --help lists them)")
    try:
        return COMMANDS[words[0]][0](words[1:])
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {_text(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return INTERRUPTED


def _text(error: BaseException) -> str:
    """Return an error's message as a person reads it."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return str(error) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> Any:
    """Enter from the console script: exit with the command's code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Pillow's, of images that are large and still within our own limit.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    try:
        code = run(arguments)
        if sys.stdout:  # closed by the caller: there is none
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
