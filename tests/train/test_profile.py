"""`--profile`: the run keeps its bits, and the trace shows the parts of its steps."""

import gzip
import hashlib
import json
import re
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backmix.train import loop
from backmix.train.options import Run
from backmix.train.profile import PARTS, Profile, fetched, part, table
from backmix.train.run import train
from tests.runs import tiny_run, tiny_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fingerprint of a run that nobody looked into."""
    return fingerprint(tmp_path_factory.mktemp("plain") / "run", data)


def fingerprint(out: Path, data: Path, profile: int = 0) -> dict[str, str]:
    run = replace(tiny_run(data, out), profile=profile)
    assert train(run, "test", []) == 0
    names = (
        "model.safetensors",
        "log.jsonl",
        "summary.csv",
        "checkpoints/step-00000009.safetensors",
    )
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def spans(trace: Path) -> Counter[str]:
    """How often each named stretch stands in a trace."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return Counter("step" if name.startswith("ProfilerStep") else name for name in names)


def traces(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "profile").iterdir())


def test_a_traced_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, plain: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """9 steps, the last 3 traced: 8 would be left out at the start, but only 6 can."""
    assert fingerprint(tmp_path / "run", data, profile=3) == plain
    assert traces(tmp_path / "run") == ["step-00000007.json.gz"]
    found = spans(tmp_path / "run" / "profile" / "step-00000007.json.gz")
    assert found["step"] == 3
    assert {name: found[name] for name in PARTS if name != "data"} == dict.fromkeys(PARTS[1:], 3)
    assert found["data"] == 4  # the epoch's end is waited for, too
    said = capsys.readouterr().out
    assert "of 3 steps on cpu" in said and "aten::convolution_backward" in said
    assert len(re.findall(r"^ +[\d.]+ +[\d.]+% ", said, re.M)) == 15


def test_a_run_that_is_shorter_says_so_and_traces_what_there_is(
    data: Path, tmp_path: Path, plain: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(tiny_run(data, tmp_path / "run"), profile=50, quiet=False)
    assert train(run, "test", []) == 0
    assert "--profile 50: the run has 9 steps left, 8 can be traced" in capsys.readouterr().err
    assert spans(run.out / "profile" / "step-00000002.json.gz")["step"] == 8
    assert hashlib.sha256((run.out / "log.jsonl").read_bytes()).hexdigest() == plain["log.jsonl"]
    assert train(run, "test", []) == 0  # it is finished: there is nothing to trace
    assert "the run has 0 steps left, 0 can be traced" in capsys.readouterr().err
    assert traces(run.out) == ["step-00000002.json.gz"]


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, taken = loop.take_step, [0]

    def counted(*arguments: object) -> torch.Tensor:
        taken[0] += 1
        if taken[0] == number:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "take_step", counted)


@pytest.mark.parametrize(
    ("stopped_in", "steps"), [(2, 0), (6, 2), (8, 4)], ids=["before", "inside", "at its end"]
)
def test_a_run_stopped_while_it_is_traced_goes_on_to_the_same_bits(
    data: Path,
    tmp_path: Path,
    plain: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    stopped_in: int,
    steps: int,
) -> None:
    """Steps 5 to 8 of 9 are to be traced, as 9 - 1 - 4 are left out."""
    run = replace(tiny_run(data, tmp_path / "run"), profile=4, epochs=3)
    monkeypatch.setattr("backmix.train.profile._WAIT", 1)
    with monkeypatch.context() as patch:
        stop_in_step(patch, stopped_in)
        assert train(run, "test", []) == 75
    assert json.loads((run.out / "status.json").read_text())["state"] == "stopped"
    if steps:
        assert spans(run.out / "profile" / "step-00000005.json.gz")["step"] >= steps
    else:
        assert not (run.out / "profile").exists()
    assert fingerprint(run.out, data) == plain  # --profile may change: this start has none


def test_a_run_that_fails_leaves_no_trace_and_no_profiler_behind(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise ValueError("broken")

    run = replace(tiny_run(data, tmp_path / "run"), profile=8)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", broken)
        with pytest.raises(ValueError, match="broken"):
            train(run, "test", [])
    assert not (run.out / "profile").exists()
    assert part("mix") is part("bank")  # both nothing
    assert train(run, "test", []) == 0


def test_a_disk_without_room_costs_the_trace_and_not_the_run(
    data: Path,
    tmp_path: Path,
    plain: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: object, path: str) -> None:
        Path(path).write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)
    run: Run = replace(tiny_run(data, tmp_path / "run"), profile=3, quiet=False)
    assert train(run, "test", []) == 0
    assert "could not be written" in capsys.readouterr().err
    assert traces(run.out) == []
    assert hashlib.sha256((run.out / "log.jsonl").read_bytes()).hexdigest() == plain["log.jsonl"]


def test_negative_and_enormous_traces_are_refused(data: Path, tmp_path: Path) -> None:
    for steps in (-1, 1001):
        with pytest.raises(ValueError, match=rf"--profile must be 0 .. 1000, got {steps}"):
            train(replace(tiny_run(data, tmp_path / "run"), profile=steps), "test", [])
    assert not (tmp_path / "run").exists()


def test_without_a_trace_nothing_is_started(tmp_path: Path) -> None:
    said: list[str] = []
    with Profile(tmp_path, 0, first=1, left=9, device="cpu", say=said.append) as profile:
        profile.step()
        assert part("mix") is part("bank")
    assert said == [] and list(tmp_path.iterdir()) == []


def test_fetching_yields_every_item_and_closes_the_loader_with_itself() -> None:
    closed: list[bool] = []

    def loader():
        try:
            yield from (1, 2, 3)
        finally:
            closed.append(True)

    assert list(fetched(loader())) == [1, 2, 3] and closed == [True]
    left = fetched(loader())
    assert next(left) == 1
    del left
    assert closed == [True, True]


@dataclass
class Row:
    """What a profiler says of one name, as far as the table reads it; times in us."""

    key: str
    kind: str
    self_device_time_total: float = 0.0
    device_time_total: float = 0.0
    self_cpu_time_total: float = 0.0
    cpu_time_total: float = 0.0
    count: int = 2
    is_user_annotation: bool = False

    @property
    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.kind)


def test_the_table_of_a_gpu_counts_kernels_and_no_spans() -> None:
    """Nor backward's span, which holds only the kernel that the main thread launches."""
    rows = [
        Row("aten::convolution", "CPU", device_time_total=6000, self_cpu_time_total=9000),
        Row("conv_kernel", "CUDA", 6000, 6000),
        Row("copy_kernel", "CUDA", 2000, 2000, count=8),
        Row("forward", "CUDA", 7000, 7000, is_user_annotation=True),
        Row("backward", "CUDA", 2, 2, is_user_annotation=True),
        Row("ProfilerStep#7", "CUDA", 9000, 9000, is_user_annotation=True),
        Row("forward", "CPU", cpu_time_total=1, self_cpu_time_total=1),
    ]
    assert table(rows, 2, "cuda").splitlines() == [
        "of 2 steps on cuda, ms a step:",
        "     3.500  forward",
        "the 2 that took most of it, with share and calls a step:",
        "     3.000  75.0%      1.0  conv_kernel",
        "     1.000  25.0%      4.0  copy_kernel",
    ]
