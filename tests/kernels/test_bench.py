"""The bench: rows are complete and survive a kill, clocks measure what they say, stages run."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import OutOfResources

from backmix.kernels import configs, dispatch
from bench import cases, rows, stage_kernels

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
COMMON = {"bench": "kernels", "stage": "bank", "device": "somewhere"}
interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="a GPU is here: kernels cannot run on the CPU"
)


def script(name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher as from a plain clone, with nothing but what a shell has."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env=environment,
    )


# --- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.name)
def test_every_stored_row_has_every_key_and_no_other(file: Path) -> None:
    stored = rows.load([file])
    assert stored
    for row in stored:
        assert set(row) == set(rows.KEYS)
        if row["ms_p50"] is not None:
            assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            # Loaders and conversion are timed in turns of whole epochs, kernels call by call, and
            # whole commands and scores of a whole test set, which last minutes, once.
            once = row["stage"] in ("scores", "scale")
            assert row["n"] >= (1 if once else 20 if row["kernel"] else 5)


def test_a_row_has_every_key_unknown_ones_null_and_refuses_others(tmp_path: Path) -> None:
    out = rows.Rows(tmp_path / "a.jsonl", COMMON)
    out.write(case="x", form="triton", l2="cold", bytes=7)
    (row,) = rows.load([tmp_path / "a.jsonl"])
    assert tuple(row) == rows.KEYS and row["bytes"] == 7 and row["flops"] is None
    with pytest.raises(KeyError, match="speed"):
        out.write(case="x", speed=1)


def test_a_rerun_skips_what_is_done_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows.Rows(path, COMMON).write(case="x", form="triton", l2="cold")
    again = rows.Rows(path, COMMON, skip_done=True)
    assert again.done(case="x", form="triton", l2="cold")
    assert not again.done(case="x", form="triton", l2="rotate")
    assert not again.done(case="x", form="eager", l2="cold")
    elsewhere = rows.Rows(path, COMMON | {"device": "another"}, skip_done=True)
    assert not elsewhere.done(case="x", form="triton", l2="cold")
    second = rows.Rows(path, COMMON, skip_done=True, repeat=1)
    assert not second.done(case="x", form="triton", l2="cold")
    assert not rows.Rows(path, COMMON).done(case="x", form="triton", l2="cold")


def test_a_line_cut_short_by_a_kill_costs_that_row_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    out = rows.Rows(path, COMMON)
    out.write(case="x", form="triton")
    out.write(case="y", form="triton")
    path.write_bytes(path.read_bytes()[:-20])
    rows.Rows(path, COMMON).write(case="z", form="triton")
    assert [row["case"] for row in rows.load([path])] == ["x", "z"]


def test_an_unsteady_stage_marks_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = rows.Rows(path, COMMON)
    first.write(case="x")
    assert rows.load([path])[0]["unsteady"] is None  # as a killed stage leaves it
    first.finish(unsteady=False)
    second = rows.Rows(path, COMMON)
    second.write(case="y")
    second.finish(unsteady=True)
    assert [row["unsteady"] for row in rows.load([path])] == [False, True]


def test_ceilings_that_move_by_more_than_a_twentieth_have_drifted() -> None:
    start = rows.Ceilings(4300, 780)
    assert not start.drifted(rows.Ceilings(4100, 800))
    assert start.drifted(rows.Ceilings(4000, 780)) and start.drifted(rows.Ceilings(4300, 730))


def test_rates_follow_from_bytes_operations_and_the_median() -> None:
    times, ceilings = rows.Times([1.0, 2.0, 3.0]), rows.Ceilings(4000, 500)
    row = rows.rates(times, ceilings, bytes=4 * 10**9, flops=5 * 10**11, l2_bytes=10**6)
    assert (row["ms_p50"], row["gb_per_s"], row["tflops"]) == (2, 2000, 250)
    assert (row["share_of_copy"], row["share_of_matmul"]) == (0.5, 0.5)
    assert row["l2_resident"] is False and row["unsteady"] is True
    small = rows.rates(times, ceilings, bytes=800_000, flops=None, l2_bytes=10**6)
    assert small["l2_resident"] is True and small["share_of_copy"] is None
    alone = rows.rates(times, None, bytes=1, flops=None, l2_bytes=0)
    assert alone["l2_resident"] is None and "share_of_copy" not in alone


def test_the_facts_of_the_machine_are_keys_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = rows.machine("cpu")
    assert facts.keys() <= set(rows.KEYS) and facts["device"].startswith("CPU: ")
    monkeypatch.setattr(rows, "_said", lambda *_: None)  # no git here
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert (rows.machine("cpu")["commit"], rows.machine("cpu")["dirty"]) == ("abc", None)


# --- clocks ------------------------------------------------------------------------------------


def test_timing_stops_when_the_mean_is_known_the_most_are_taken_or_time_is_up() -> None:
    def same(count: int) -> list[float]:
        return [1.0] * count

    alternating = iter(range(10**6))

    def wild(count: int) -> list[float]:
        return [1.0 + 100 * (next(alternating) % 2) for _ in range(count)]

    assert len(rows.repeat(same, rows.Effort(least=50, most=1000, seconds=60)).ms) == 50
    assert len(rows.repeat(wild, rows.Effort(least=50, most=200, seconds=60)).ms) == 200
    assert len(rows.repeat(wild, rows.Effort(least=50, most=200, seconds=0)).ms) == 20


def test_rotating_takes_every_set_in_turn_and_a_graph_holds_them_all() -> None:
    taken: list[int] = []
    calls = [lambda i=i: taken.append(i) for i in range(3)]
    rows.rotate(rows.CpuClock(), calls, rows.Effort(least=4, most=4, seconds=0))
    assert taken == [0, 1, 2, *(0, 1, 2, 0)]
    taken.clear()
    times = rows.graphed(rows.CpuClock(), calls, rows.Effort(least=2, most=2, in_a_row=20))
    assert taken == [0, 1, 2] * 7 * 3 and len(times.ms) == 2  # one replay ahead, two timed


def test_the_cache_is_read_over_before_every_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sum_ = torch.sum
    monkeypatch.setattr(torch, "sum", lambda *a, **k: (events.append("flush"), sum_(*a, **k))[1])
    effort = rows.Effort(least=2, most=2)
    rows.cold(rows.CpuClock(l2_bytes=4096), lambda: events.append("call"), effort)
    assert events == ["call", "flush", "call", "flush", "call"]


class FakeCuda:
    """What `CudaClock` asks of torch.cuda, written down in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.time = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                fake.said.append("record")
                self.at = fake.time

            def elapsed_time(self, end: Any) -> float:
                assert "synchronize" in fake.said
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                fake.said.append("replay")

        self.Event, self.CUDAGraph = Event, Graph

    @contextlib.contextmanager
    def graph(self, _graph: object) -> Iterator[None]:
        self.said.append("capture")
        yield
        self.said.append("captured")

    @contextlib.contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        yield

    def Stream(self, _device: object) -> object:
        return SimpleNamespace(wait_stream=lambda _: self.said.append("wait"))

    def current_stream(self, _device: object) -> object:
        return SimpleNamespace(wait_stream=lambda _: self.said.append("wait"))

    def synchronize(self, _device: object) -> None:
        self.said.append("synchronize")

    def reset_peak_memory_stats(self, _device: object) -> None:
        self.said.append("reset")

    def memory_allocated(self, _device: object) -> int:
        return 2**20

    def max_memory_allocated(self, _device: object) -> int:
        return 6 * 2**20

    def get_device_properties(self, _device: object) -> object:
        return SimpleNamespace(L2_cache_size=60 * 10**6, name="Fake", multi_processor_count=132)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in dir(fake):
        if not name.startswith("_") and hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_gpu_lap_is_the_call_between_its_events_and_waits_once(cuda: FakeCuda) -> None:
    def spend(name: str, ms: float) -> None:
        cuda.said.append(name)
        cuda.time += ms

    clock = rows.CudaClock(torch.device("cuda", 0))
    laps = clock.laps([lambda: spend("call", 2)] * 2, lambda: spend("before", 5))
    assert laps == [2, 2]
    assert cuda.said == [*["before", "record", "call", "record"] * 2, "synchronize"]


def test_a_graph_is_captured_after_a_first_run_on_another_stream(cuda: FakeCuda) -> None:
    clock = rows.CudaClock(torch.device("cuda", 0))
    replay = clock.capture([lambda: cuda.said.append("call")] * 2)
    ahead = ["wait", "call", "call", "wait", "synchronize"]
    assert cuda.said == [*ahead, "capture", "call", "call", "captured"]
    replay()
    assert cuda.said[-1] == "replay"


def test_memory_is_the_peak_beyond_what_was_there(cuda: FakeCuda) -> None:
    clock = rows.CudaClock(torch.device("cuda", 0))
    assert clock.peak_mib(lambda: cuda.said.append("call")) == 5
    assert cuda.said == ["synchronize", "reset", "call", "synchronize"]
    assert clock.l2_bytes == 60 * 10**6 and rows.sets_for(clock, 10**6) == 64
    facts = rows.machine("cuda")
    assert (facts["device"], facts["sm_count"]) == ("Fake", 132)


# --- forms -------------------------------------------------------------------------------------


def stage(tmp_path: Path, name: str = "bank") -> stage_kernels.Stage:
    clock = rows.CpuClock()
    return stage_kernels.Stage(
        name,
        clock,
        rows.Rows(tmp_path / "rows.jsonl", COMMON | {"stage": name}),
        rows.Ceilings(1, 1),
        rows.Effort(least=2, most=2, seconds=0, in_a_row=1),
        True,
        cases.Compiler(clock, "eager"),
    )


def case_with(**forms: Any) -> cases.Case:
    shape = {"B": 1}
    return cases.Case("c", "update_cam_bank", shape, 10, None, "x", "y", None, "", forms)


def failing(error: BaseException) -> None:
    raise error


def test_a_wrong_form_gets_no_row_and_the_others_theirs(tmp_path: Path) -> None:
    here = stage(tmp_path)
    runs = iter([None, AssertionError("late")])  # right at first, wrong after the timing
    forms = {
        "wrong": lambda: cases.Form([list], lambda: failing(AssertionError("off by 3"))),
        "broken": lambda: failing(RuntimeError("no such thing")),
        "absent": lambda: failing(ImportError("kornia")),
        "too large": lambda: failing(OutOfResources(393_216, 232_448, "shared memory")),
        "racing": lambda: cases.Form([list], lambda: (e := next(runs)) and failing(e)),
        "right": lambda: cases.Form([list], lambda: None),
    }
    stage_kernels.time_case(here, case_with(**forms), compiled=False)
    assert {row["form"] for row in here.out.all()} == {"right"}
    assert here.failed == [
        "c: wrong: WRONG: off by 3",
        "c: broken: RuntimeError: no such thing",
        "c: racing: WRONG: late",
    ]
    kornia, blocks = here.absent
    assert kornia == "c: absent: ImportError: kornia"
    assert blocks.startswith("c: too large: OutOfResources: out of resource: shared memory")


def test_what_cannot_be_captured_is_timed_by_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "graphed", lambda *_: failing(RuntimeError("no capture")))
    here = stage(tmp_path)
    form = cases.Form([list], lambda: None)
    stage_kernels.time_case(here, case_with(eager=lambda: form), compiled=False)
    timers = {row["l2"]: row["config"]["timer"] for row in here.out.all()}
    assert timers == {"cold": "events", "rotate": "events"}


def test_compiling_keeps_the_fastest_way_and_survives_one_that_fails() -> None:
    compiler = cases.Compiler(rows.CpuClock(), "eager")

    def slow(wrap: Any) -> Any:
        return wrap(lambda x: sum(x for _ in range(300)) * 0 + x + 1)

    def broken(wrap: Any) -> Any:
        raise RuntimeError("cannot be compiled")

    def fast(wrap: Any) -> Any:
        return wrap(lambda x: x + 1)

    ways = {"slow": slow, "broken": broken, "fast": fast}
    call, config = compiler.best("a", ways, (torch.zeros(2),))
    assert call(torch.zeros(2)).tolist() == [1, 1] and config["way"] == "fast"
    assert "cannot be compiled" in config["tried"]["broken / default"]["failed"]
    assert compiler.best("a", {}, ()) == (call, config)
    with pytest.raises(RuntimeError, match="nothing compiled"):
        compiler.best("b", {"broken": broken}, (torch.zeros(2),))


@pytest.mark.parametrize("shape", [cases.Mix(5, 24, 4, 11), cases.Mix(5, 8, 4, 3, rows=9, pad=4)])
def test_the_steps_of_torchvision_make_the_same_mix(shape: cases.Mix, torchvision: Any) -> None:
    clock = rows.CpuClock()
    case = cases.mix_case(shape, clock, cases.Compiler(clock, "eager"))
    case.forms["steps_torchvision"]().verify()


@interpreted
def test_a_candidate_is_what_the_kernel_runs_with_and_only_then() -> None:
    shape = cases.Bank(2, 4, 32, 3, 5, dtype=torch.float16)
    clock = rows.CpuClock()
    case = cases.bank_case(shape, clock, cases.Compiler(clock, "eager"))
    call = case.forms["triton"]().calls[0]
    shipped, arguments, options = stage_kernels.shipped_config("update_cam_bank", call)
    assert shipped == configs.update_cam_bank(*arguments, **options)
    other = configs.CamBankConfig(channels=16, unroll=1, warps=2)
    with stage_kernels.configured("update_cam_bank", other):
        (launch,) = stage_kernels.launches_of(call)
    assert launch.warps == 2
    (launch,) = stage_kernels.launches_of(call)
    assert launch.warps == shipped.warps


def test_every_candidate_field_is_a_field_of_its_configuration() -> None:
    for tuning in cases.CANDIDATES.values():
        assert hasattr(configs, tuning.config)
        assert tuning.candidates is None or hasattr(configs, tuning.candidates)
    tuned = {name.split(",")[0] for name in stage_kernels.TUNED}
    assert tuned == set(cases.CANDIDATES)


# --- stages ------------------------------------------------------------------------------------

FORMS = {
    "machine": {"copy", "matmul", "launch"},
    "mix_imagenet": {"triton", "compile", "eager", "timm_prefetch"},
    "mix_cifar": {"triton", "compile", "eager"},
    "bank": {"triton", "compile", "eager"},
    "confidence": {"triton", "matmul", "compile", "plain_softmax", "eager"},
    "reconstruction": {"triton", "compile", "chunked", "loop", "eager"},
    "draws": {"triton", "host"},
    "tune": {"triton"},
}


@interpreted
@pytest.mark.slow  # interpreted kernels: the slowest stage takes half a minute
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # compiling looks at slices of leaves
@pytest.mark.parametrize("name", FORMS)
def test_a_stage_runs_from_end_to_end_and_again_for_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["stage_kernels", name, "--tiny", "--skip-done", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert stage_kernels.main() == 0
    found = rows.load([tmp_path / f"{name}.jsonl"])
    summary = found.pop()
    assert summary["form"] == "stage" and "failed: nothing" in summary["note"]
    forms = {row["form"] for row in found} - {"steps_torchvision", "steps_kornia"}
    assert forms == FORMS[name]
    for row in found:
        assert tuple(row) == rows.KEYS and row["device"].startswith("CPU")
        assert row["unsteady"] is not None
    if name not in ("machine", "tune"):  # these two measure anew; the others have all they need
        monkeypatch.setattr(stage_kernels, "_rotated", lambda *_: failing(AssertionError()))
        assert stage_kernels.main() == 0
        again = rows.load([tmp_path / f"{name}.jsonl"])
        assert [row["form"] for row in again[len(found) + 1 :]] == ["stage"]


@pytest.mark.parametrize("seconds", [None, 255.0])
def test_the_tests_end_by_themselves_before_they_are_ended(
    seconds: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(stage_kernels.subprocess, "run", run)
    stage_kernels.run_tests(stage(tmp_path, "tests"), seconds)
    limit = ["--session-timeout", "255.0"]
    assert [word for word in asked[0] if word in limit] == (limit if seconds else [])


def test_a_report_of_the_tests_becomes_counts_and_names(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='a' name='b'/>"
        "<testcase classname='a' name='c'><failure message='off by 3&#10;more'/></testcase>"
        "<testcase classname='a' name='d'><skipped message='no'/></testcase>"
        "</testsuite></testsuites>"
    )
    found = stage_kernels.read_report(report)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": {"a::c": "off by 3"}}
    assert stage_kernels.read_report(tmp_path / "none.xml")["failed"] is None


# --- launchers ---------------------------------------------------------------------------------


def test_without_a_gpu_the_bench_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing to refuse")
    done = script("gpu.py", "--out", str(tmp_path))
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
    assert "no CUDA device" in done.stdout and not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_shapes_and_compiles_for_sm_90() -> None:
    done = script("gpu.py", "--dry-run", "--stage", "draws")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "512 x 32 px" in done.stdout and "sm_90: registers" in done.stdout


def test_a_stage_beyond_its_limit_is_killed_and_said_to_be(tmp_path: Path) -> None:
    limits = ("--tiny", "--limit", "0.5", "--stage", "machine", "--out", str(tmp_path))
    done = script("gpu.py", *limits)
    assert done.returncode == 1 and "KILLED after 0.5 s" in done.stdout


def test_the_cpu_bench_writes_a_row_for_every_form(tmp_path: Path) -> None:
    tiny = ("--tiny", "--seconds", "0", "--threads", "1", "--results", str(tmp_path))
    done = script("cpu.py", *tiny)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["kernel"], row["form"]) for row in found} == {
        ("mix_background", "gather_normalise"),
        ("mix_background", "gather_normalise_lines"),
        ("mix_background", "eager"),
        ("update_cam_bank", "plain_whole_images"),
        ("update_cam_bank", "eager"),
        ("location_confidence", "plain_softmax"),
        ("location_confidence", "eager"),
        ("class_reconstruction", "loop"),
        ("class_reconstruction", "chunked"),
        ("class_reconstruction", "eager"),
    }
    for row in found:
        assert tuple(row) == rows.KEYS and row["device"].startswith("CPU") and row["n"] >= 20
        times = [row["ms_p20"], row["ms_p50"], row["ms_p80"]]
        assert np.all(np.diff(times) >= 0) and row["share_of_copy"] is None
    assert "compiled for sm_90" in done.stdout or "no figures" in done.stdout
