"""Run one stage of the kernel bench and append its rows to a file; `gpu.py` starts each in turn.

    python -m bench.stage_kernels STAGE --out FOLDER [--skip-done] [--repeat N] [--dry-run]

Run from the repository's root with PYTHONPATH=src:. there. Needs torch, triton, numpy and
`backmix.kernels`; torchvision and kornia where they are installed. Without a CUDA device it
refuses, unless `--tiny` asks for tiny shapes on the CPU, for tests (with TRITON_INTERPRET=1).
"""

import argparse
import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime import OutOfResources

from backmix.kernels import configs, dispatch, offline
from backmix.kernels.launch import Launch
from backmix.kernels.shipped import SHIPPED
from bench import cases, rows
from bench.cases import Bank, Case, Draws, Locations, Mix, Reconstruction, Shape
from bench.rows import Call, Ceilings, Clock, Effort, Row, Rows, Times

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_BOUND_MS = 0.05
"""Calls whose bytes take less than this are timed in graphs: gaps would be most of it."""

# --- what is timed -----------------------------------------------------------------------------

CIFAR = partial(Mix, side=32, grid=4, patch=8, rows=50_000, pad=4)
TARGET = Reconstruction(12_544, 1000, 512, 16)
SHAPES: dict[str, list[Shape]] = {
    "mix_imagenet": [
        Mix(n, 224, 7, patch, flip=flip)
        for n in (1024, 256)
        for patch, flip in ((112, 0.5), (0, 0.0), (0, 1.0), (224, 0.5))
    ],
    "mix_cifar": [CIFAR(512), CIFAR(4096)],
    "bank": [
        Bank(n, grid, channels, classes, rows, channels_last=last)
        for n, grid, channels, classes, rows in (
            (1024, 7, 2048, 1000, 1_281_167),
            (256, 7, 2048, 1000, 1_281_167),
            (512, 4, 128, 6, 50_000),
            (4096, 4, 128, 6, 50_000),
        )
        for last in (True, False)
    ],
    "confidence": [Locations(256, 7, 2048, 1000), Locations(256, 7, 2048, 21_841)],
    "reconstruction": [
        dataclasses.replace(TARGET, what=what) for what in ("forward", "both", "backward")
    ],
    "draws": [Draws(512, 32, 8, 4, 50_000), Draws(1024, 224, 112, 0, 1024)],
}
"""By stage, the most wanted first."""
DOORS = {
    "mix_imagenet": ["mix_background"],
    "mix_cifar": ["mix_background"],
    "bank": ["update_cam_bank"],
    "confidence": ["location_confidence"],
    "reconstruction": ["class_reconstruction"],
    "draws": ["mix_draws"],
    "tune": ["mix_background", "update_cam_bank", "location_confidence", "class_reconstruction"],
    "machine": [],
    "tests": [],
}
"""By stage, the kernels that a dry run compiles."""


@dataclass
class Stage:
    """What a stage works with."""

    name: str
    clock: Clock
    out: Rows
    ceilings: Ceilings
    effort: Effort
    tiny: bool
    compiler: cases.Compiler
    failed: list[str] = field(default_factory=list)
    """What is wrong or broken."""
    absent: list[str] = field(default_factory=list)
    """What is not installed, or needs more memory than there is."""

    def shapes(self) -> list[Shape]:
        """Return the shapes, tiny ones where they are asked for."""
        shapes = SHAPES[self.name]
        return list(dict.fromkeys(shape.tiny() for shape in shapes))[:3] if self.tiny else shapes


# --- one form of one case ----------------------------------------------------------------------


def time_case(stage: Stage, case: Case, compiled: bool) -> None:
    """Time the forms of a case and write their rows; a form that is wrong gets none.

    Args:
        compiled: the forms that torch.compile makes, or all others.
    """
    for form in case.forms:
        if (form == "compile") != compiled:
            continue
        with failures(stage, f"{case.name}: {form}"):
            _time_form(stage, case, form, ("cold", "rotate"))


@contextlib.contextmanager
def failures(stage: Stage, what: str) -> Iterator[None]:
    """Note what failed and why, and go on: one form must not cost the others their rows."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, ImportError | torch.OutOfMemoryError | OutOfResources)
        wrong = isinstance(error, AssertionError)
        name = "WRONG" if wrong else type(error).__name__
        reason = f"{name}: {error}".strip().splitlines()[0][:300]
        if not known and not wrong:
            traceback.print_exc()
        (stage.absent if known else stage.failed).append(f"{what}: {reason}")
        print(f"no row for {what}: {reason}", flush=True)
    if stage.clock.device.type == "cuda":
        torch.cuda.empty_cache()


def _time_form(
    stage: Stage, case: Case, name: str, ways: Sequence[str], more: Row | None = None
) -> None:
    """Time one form, each way once: its cache cold, or its inputs rotated.

    A case with something ahead of each call is timed with a warm cache only.

    Args:
        more: to the row's config.
    """
    clock, effort = stage.clock, stage.effort
    about = {"case": case.name, "kernel": case.kernel, "form": name}
    # Before the form is made, so that a rerun neither makes nor compiles what is done.
    ways = ("warm",) if case.warm else ways
    ways = [way for way in ways if not stage.out.done(**about, l2=way)]
    if not ways:
        print(f"{case.name:44} {name:18} done already", flush=True)
        return
    form = case.forms[name]()
    form.verify()
    call, before = form.calls[0], form.before
    bound = case.bytes / stage.ceilings.copy_gb_per_s / 1e6 < LAUNCH_BOUND_MS
    graph = bound and form.capturable and before is None
    known = about | {
        "shape": case.shape,
        "dtype": case.dtype,
        "out_dtype": case.out_dtype,
        "memory_format": case.memory_format,
        "note": case.note,
        "checked": True,
        "registers": registers(call, clock) if name == "triton" and not (before or more) else None,
        "peak_mib": None if before else clock.peak_mib(call),
        "host_us": None if before else rows.host_us(clock, call, effort),
    }
    found: dict[str, tuple[Times, str]] = {}
    for way in ways:
        if way == "warm":
            times = rows.repeat(lambda count: clock.laps([call] * count, before), effort)
            found[way] = times, "events"
        elif way == "cold":
            found[way] = rows.cold(clock, call, effort), "events"
        else:
            found[way] = _rotated(stage, form, graph)
    form.verify()  # after all that, still
    for way, (times, timer) in found.items():
        config = {"timer": timer, "sets": len(form.calls), **form.config, **(more or {})}
        if name == "triton" and not more:
            config["times_ms"] = [round(ms, 5) for ms in times.ms]
        speed = rows.rates(times, stage.ceilings, case.bytes, case.flops, clock.l2_bytes)
        row = stage.out.write(**known, l2=way, config=config, **speed)
        say(row)


def _rotated(stage: Stage, form: cases.Form, graph: bool) -> tuple[Times, str]:
    """Time a form over its sets of inputs, in a graph if it can be captured; and say which."""
    if graph:
        try:
            return rows.graphed(stage.clock, form.calls, stage.effort), "graph"
        except RuntimeError as error:  # what cannot be captured has its other rows nevertheless
            print(f"not captured: {str(error).splitlines()[0]}", flush=True)
    return rows.rotate(stage.clock, form.calls, stage.effort), "events"


def say(row: Row) -> None:
    """Print a row as a line of a table."""
    shares = [
        f"{row[key]:4.0%} of {what}"
        for key, what in (("share_of_copy", "copy"), ("share_of_matmul", "matmul"))
        if row[key] is not None
    ]
    print(
        f"{row['case']:44} {row['form']:18} {row['l2']:6} {1e3 * row['ms_p50']:10.2f} us "
        f"({1e3 * row['ms_p20']:.2f}-{1e3 * row['ms_p80']:.2f}) n {row['n']:4} "
        f"{row['gb_per_s'] or 0:7.0f} GB/s {', '.join(shares)}",
        flush=True,
    )


def launches_of(call: Call) -> list[Launch]:
    """Return the launches that a call makes, making it."""
    made: list[Launch] = []
    run = Launch.run

    def recorded(launch: Launch) -> None:
        made.append(launch)
        run(launch)

    with mock.patch.object(Launch, "run", recorded):
        call()
    return made


def registers(call: Call, clock: Clock) -> int | None:
    """Return the most registers of a thread in a call's kernels; None where nothing compiles."""
    launches = launches_of(call)
    if clock.device.type != "cuda" or dispatch.INTERPRETED or not launches:
        return None
    major, minor = torch.cuda.get_device_capability(clock.device)
    try:
        compiled = [offline.compile_launch(launch, 10 * major + minor) for launch in launches]
        return max(one.registers for one in compiled)
    except Exception as error:  # a figure beside the time; it must not cost the time
        print(f"registers unknown: {type(error).__name__}: {error}", flush=True)
        return None


# --- stages ------------------------------------------------------------------------------------


def time_shapes(stage: Stage) -> None:
    """Time every shape of a stage; what has to be compiled for minutes comes last."""
    for compiled in (False, True):
        for shape in stage.shapes():
            with failures(stage, shape.name):
                case = cases.CASES[type(shape)](shape, stage.clock, stage.compiler)
                time_case(stage, case, compiled)


def time_machine(stage: Stage) -> None:
    """Write what the machine gives: ceilings, and what a launch costs."""
    clock = stage.clock
    one = torch.zeros(1, device=clock.device)
    add = partial(one.add_, 1)
    side = 64 if stage.tiny else 8192
    size = 2**20 if stage.tiny else 2**32
    measured = {
        "copy": (2 * size, None, stage.ceilings.copy_gb_per_s),
        "matmul": (6 * side**2, 2 * side**3, stage.ceilings.bf16_tflops),
    }
    for form, (bytes_, flops, rate) in measured.items():
        stage.out.write(
            case=f"{form}, {'tiny' if stage.tiny else size if form == 'copy' else side}",
            form=form,
            l2="rotate",
            bytes=bytes_,
            flops=flops,
            gb_per_s=rate if flops is None else None,
            tflops=rate if flops else None,
            **stage.ceilings.row,
        )
        print(f"{form}: {rate:.0f} {'GB/s' if flops is None else 'TFLOP/s'}", flush=True)
    costs = {
        "launch, events around it": rows.rotate(clock, [add], stage.effort),
        "launch, in a graph": rows.graphed(clock, [add], stage.effort),
        "nothing, events around it": rows.rotate(clock, [lambda: None], stage.effort),
    }
    for case, times in costs.items():
        us = rows.host_us(clock, add, stage.effort) if case.startswith("launch, events") else None
        config = {"l2_bytes": clock.l2_bytes, "what": "add_ of one number"}
        stage.out.write(case=case, form="launch", l2="warm", host_us=us, config=config, **times.row)
        host = "" if us is None else f", host {us:.2f} us"
        print(f"{case}: {1e3 * times.median:.2f} us{host}", flush=True)


# --- tune --------------------------------------------------------------------------------------

TUNED: dict[str, Shape] = {
    "mix_background": SHAPES["mix_imagenet"][0],
    "mix_background, 32 px": SHAPES["mix_cifar"][0],
    "update_cam_bank": SHAPES["bank"][0],
    "location_confidence": SHAPES["confidence"][0],
    "class_reconstruction": SHAPES["reconstruction"][1],
}
"""What each kernel is tuned at."""


@contextlib.contextmanager
def configured(name: str, config: Any) -> Iterator[None]:
    """Let `configs.NAME` be, or give, another configuration."""
    function = callable(getattr(configs, name))
    with mock.patch.object(configs, name, (lambda *_, **__: config) if function else config):
        yield


def shipped_config(name: str, call: Call) -> tuple[Any, tuple[Any, ...], Row]:
    """Return the configuration that a call takes, and what `configs.NAME` was asked for it."""
    chosen: Any = getattr(configs, name)
    if not callable(chosen):
        return chosen, (), {}
    asked: list[tuple[Any, tuple[Any, ...], Row]] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        asked.append((chosen(*arguments, **options), arguments, options))
        return asked[-1][0]

    with mock.patch.object(configs, name, recorded):
        call()
    if not asked:
        raise RuntimeError(f"the call never asks configs.{name}")
    return asked[0]


def tune(stage: Stage, kernel: str | None, seconds: float) -> None:
    """Try other configurations of the kernels, some seconds each, the shipped one first."""
    for name, shape in TUNED.items():
        door = name.split(",")[0]
        if kernel not in (None, door) or door not in cases.CANDIDATES:
            continue
        shape = shape.tiny() if stage.tiny else shape
        with failures(stage, f"tune {name}"):
            case = cases.CASES[type(shape)](shape, stage.clock, stage.compiler)
            _try_all(stage, cases.CANDIDATES[door], case, time.perf_counter() + seconds)


def _try_all(stage: Stage, tuning: cases.Tuning, case: Case, end: float) -> None:
    """Time a kernel's candidates until the time is up, and print the table, the fastest first."""
    call = case.forms["triton"]().calls[0]
    shipped, arguments, options = shipped_config(tuning.config, call)
    seen: dict[str, float] = {}

    def timed(config: Any) -> float:
        fields = dataclasses.asdict(shipped)
        words = [f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v != fields[k]]
        name = ", ".join(words) or "as shipped"
        if name in seen or time.perf_counter() > end:
            return seen.get(name, float("inf"))
        seen[name] = float("inf")
        about = dataclasses.replace(case, name=f"{case.name} | {name}")
        with failures(stage, about.name), configured(tuning.config, config):
            more = {"blocks": dataclasses.asdict(config)}
            _time_form(stage, about, "triton", ("rotate",), more)
            mine = [row for row in stage.out.all() if row["case"] == about.name]
            seen[name] = min(row["ms_p50"] for row in mine)
        return seen[name]

    timed(shipped)
    if tuning.candidates:
        listed = getattr(configs, tuning.candidates)(*arguments, **options)
        # In no order: where the time does not suffice for all, these are a fair sample.
        for config in random.Random(0).sample(listed, len(listed)):
            timed(config)
        print(f"{len(listed)} candidates, {len(seen)} tried")
    best = shipped
    for field_, values in [*tuning.fields.items()] * 2:  # each in turn from the best so far, twice
        best = min((best, *(dataclasses.replace(best, **{field_: v}) for v in values)), key=timed)
    print(f"\n{case.kernel}, {case.name}: shipped {shipped}")
    for words, ms in sorted(seen.items(), key=lambda item: item[1]):
        print(f"{1e3 * ms:10.2f} us  {words}")
    print(flush=True)


# --- tests -------------------------------------------------------------------------------------


def run_tests(stage: Stage, seconds: float | None) -> None:
    """Run the tests that need a GPU and write one row with their counts.

    After `seconds`, if given, no test begins any more, where pytest-timeout is installed.
    """
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        # Others need not even be imported here, where their packages may be missing.
        if any(word in path.read_text() for word in ("mark.gpu", "DEVICES"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=100", "-p", "no:cacheprovider"]
        # A file that cannot be imported here must not keep the others from being run.
        command += ["--continue-on-collection-errors"]
        if seconds and find_spec("pytest_timeout"):
            command += ["--session-timeout", str(seconds)]
        # Another machine's versions may warn of other things; that is not what is asked here.
        command += ["-W", "default", f"--junitxml={report}"]
        if find_spec("xdist"):
            command += ["-n", "2" if stage.tiny else "8", "--dist", "worksteal"]
        command += ["tests/kernels/test_philox.py"] if stage.tiny else ["-m", "gpu", *files]
        if stage.clock.device.type == "cuda":
            torch.cuda.empty_cache()
        done = subprocess.run(command, cwd=ROOT, check=False)
        found = read_report(report)
    stage.out.write(case="tests", form="tests", checked=done.returncode == 0, config=found)
    print(json.dumps(found, indent=1), flush=True)
    if done.returncode:
        stage.failed.append(f"tests: pytest returned {done.returncode}")


def read_report(report: Path) -> Row:
    """Return the counts of a JUnit report, and the names of what failed with its first line."""
    if not report.exists():
        return {"passed": 0, "failed": None, "skipped": None, "failures": {"no report": ""}}
    failures_: dict[str, str] = {}
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for test in xml.parse(report).getroot().iter("testcase"):
        bad = [part for part in test if part.tag in ("failure", "error")]
        skipped = any(part.tag == "skipped" for part in test)
        count["failed" if bad else "skipped" if skipped else "passed"] += 1
        for part in bad:
            name = f"{test.get('classname')}::{test.get('name')}"
            failures_[name] = (part.get("message") or "").split("\n")[0][:200]
    return {**count, "failures": failures_}


# --- the program -------------------------------------------------------------------------------


def dry_run(name: str) -> int:
    """Print a stage's shapes and compile its kernels for a GPU that is not here; 1 if one fails."""
    for shape in SHAPES.get(name, []):
        print(f"  {shape.name}: {json.dumps(shape.shape)}, {shape.bytes / 1e6:.1f} MB")
    if name == "tune":
        for kernel, tuning in cases.CANDIDATES.items():
            print(f"  {kernel}: {tuning.candidates or tuning.fields}")
    wrong = 0
    for door in DOORS[name]:
        if door not in SHIPPED:
            print(f"  {door}: nothing shipped")
            continue
        for case, launch in SHIPPED[door]().items():
            try:
                made = offline.measure(offline.compile_launch(launch, 90))
            except Exception as error:
                wrong += 1
                print(f"  {door} | {case} | sm_90: FAILED {type(error).__name__}: {error}")
            else:
                figures = ", ".join(f"{figure} {made[figure]}" for figure in made)
                print(f"  {door} | {case} | sm_90: {figures}", flush=True)
    return int(wrong > 0)


def main() -> int:
    """Run a stage; 1 if a form was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=DOORS)
    parser.add_argument("--out", type=Path, help="a folder; the rows go into STAGE.jsonl")
    parser.add_argument("--skip-done", action="store_true")
    parser.add_argument("--repeat", type=int, default=1, help="passes over the stage")
    parser.add_argument("--kernel", help="of the stage tune: only this one")
    parser.add_argument("--seconds", type=float, help="of tune: for each case (45); of tests")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, for tests")
    options = parser.parse_args()
    if options.dry_run:
        return dry_run(options.stage)
    if options.out is None:
        parser.error("--out is needed")
    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA device here: try --dry-run")
        return 1
    codes = [run_stage(options, repeat) for repeat in range(options.repeat)]
    return max(codes)


def run_stage(options: argparse.Namespace, repeat: int) -> int:
    """Run a stage once; return 1 if something failed."""
    started = time.perf_counter()
    clock = rows.clock("cpu" if options.tiny else "cuda")
    size: Row = {"copy_bytes": 2**20, "side": 64, "warm_s": 0.0} if options.tiny else {}
    first = rows.ceilings(clock, **size)
    out = Rows(
        options.out / f"{options.stage}.jsonl",
        {"bench": "kernels", "stage": options.stage, **rows.machine(clock.device)},
        skip_done=options.skip_done,
        repeat=repeat,
    )
    stage = Stage(
        options.stage,
        clock,
        out,
        first,
        Effort(least=2, most=2, seconds=0.01, in_a_row=1) if options.tiny else Effort(seconds=0.6),
        options.tiny,
        cases.Compiler(clock, "eager" if options.tiny else "inductor"),
    )
    if stage.name == "tests":
        run_tests(stage, options.seconds)
    elif stage.name == "machine":
        time_machine(stage)
    elif stage.name == "tune":
        tune(stage, options.kernel, 2 if options.tiny else options.seconds or 45)
    else:
        time_shapes(stage)

    last = rows.ceilings(clock, **size)
    unsteady = first.drifted(last)
    seconds = round(time.perf_counter() - started, 1)
    note = f"{seconds} s; failed: {'; '.join(stage.failed) or 'nothing'}"
    note += f"; not here: {'; '.join(stage.absent) or 'nothing'}"
    config = {"copy_gb_per_s_after": last.copy_gb_per_s, "bf16_tflops_after": last.bf16_tflops}
    out.write(case="stage", form="stage", note=note, config=config, **first.row)
    out.finish(unsteady)
    print(f"{stage.name}: {note}{'; UNSTEADY' if unsteady else ''}; rows: {out.path}", flush=True)
    return int(bool(stage.failed))


if __name__ == "__main__":
    sys.exit(main())
