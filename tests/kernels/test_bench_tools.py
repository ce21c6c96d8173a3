"""The tools around the bench: steps, the look into a kernel, figures and tables out of rows."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench import plot, profile_kernel
from bench.rows import KEYS

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def python(*arguments: str, path: str = "src") -> subprocess.CompletedProcess[str]:
    """Run a script as from a plain clone, with the working folder kept off the path."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**PLAIN, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )


# --- training step -----------------------------------------------------------------------------


@pytest.mark.slow  # about ten seconds of a ResNet-50 on one core
def test_the_step_bench_writes_a_row_for_each_method(tmp_path: Path) -> None:
    done = python("-m", "bench.bench_step", "--out", str(tmp_path), "--tiny", path="src:.")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "step_resnet50.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["form"] for row in rows] == ["softmax", "backmix_mix", "backmix_raw"]
    for row in rows:
        assert tuple(row) == KEYS and row["kernel"] == "step" and row["checked"]
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        rate = row["shape"]["B"] / row["ms_p50"] * 1e3
        assert row["config"]["images_per_s"] == pytest.approx(rate)
    assert rows[0]["config"]["added_ms_p50"] == 0
    again = ["-m", "bench.bench_step", "--out", str(tmp_path), "--tiny", "--skip-done"]
    assert "done already" in python(*again, path="src:.").stdout
    assert (tmp_path / "step_resnet50.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
def test_the_bench_of_small_runs_writes_a_row_for_each_form(tmp_path: Path) -> None:
    asked = ["-m", "bench.stage_osr", "--out", str(tmp_path), "--tiny"]
    done = python(*asked, path="src:.")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "osr.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    forms = {name: ["loop", "graph"] for name in ("softmax", "cutout", "backmix", "ssod", "arpl")}
    forms["softmax"] = ["loop", "graph", "graph x 2"]
    asked_for = [(f"classifier32-quarter, {m}", form) for m in forms for form in forms[m]]
    assert [(row["case"], row["form"]) for row in rows] == asked_for
    for row in rows:
        assert tuple(row) == KEYS and row["checked"]
        assert row["config"]["seconds_per_100_epochs"] == pytest.approx(46.9 * row["ms_p50"])
        assert row["unsteady"] is not None
    again = python(*asked, "--skip-done", "--method", "ssod", path="src:.")
    assert again.stdout == "classifier32-quarter, ssod: done already\n"


def test_a_method_whose_process_fails_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are asked for, each with the share of the time that is left for it."""
    from bench import stage_osr

    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, -6 if "backmix" in command else 0)

    monkeypatch.setattr(stage_osr.subprocess, "run", run)
    assert stage_osr.each_alone(["--out", "there"], 230) == 1
    assert [words[:4] for words in asked] == [
        ["--out", "there", "--method", method] for method in stage_osr.METHODS
    ]
    # 230 s shared by 5, then by those left: all of it stays for the last.
    shares = [float(words[5]) for words in asked]
    assert shares == pytest.approx([230 / n - stage_osr.START_S for n in (5, 4, 3, 2, 1)], abs=1)
    assert capsys.readouterr().out == "osr backmix: FAILED (-6)\n"
    monkeypatch.setattr(stage_osr, "METHODS", ("softmax",))
    assert stage_osr.each_alone([], 230) == 0


class Stream:
    """A stream that writes down who waits for whom."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_the_clocks_stream_waits_for_the_runs_on_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events stand around the steps: else the time would be that of asking for them."""
    import torch

    from bench.stage_osr import Going

    said: list[str] = []
    clock = Stream("clock", said)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: clock)
    going: Any = object.__new__(Going)
    going.streams = [Stream(name, said) for name in "ab"]

    def steps_of(name: str) -> Iterator[None]:
        while True:
            said.append(f"step of {name}")
            yield

    going.runs = [(nullcontext, steps_of(name)) for name in "ab"]
    going.take(2)
    assert said == [
        *("a waits for clock", "b waits for clock"),
        *["step of a", "step of b"] * 2,
        *("clock waits for a", "clock waits for b"),
    ]


@pytest.mark.gpu
def test_work_on_a_stream_of_its_own_is_timed() -> None:
    import torch

    from backmix.train.bench_step import timed
    from bench.stage_osr import Going

    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    torch.mm(work, work)
    _, one = timed(lambda: work @ work, device)
    own = torch.cuda.Stream()

    def steps() -> Iterator[None]:
        while True:
            torch.mm(work, work)
            yield

    going: Any = object.__new__(Going)
    going.streams, going.runs = [own], [(lambda: torch.cuda.stream(own), steps())]
    going.take(2)
    _, many = timed(lambda: going.take(50), device)
    assert many > 20 * one


def test_without_a_gpu_the_step_bench_says_so(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        done = python("-m", "bench.bench_step", "--out", str(tmp_path), path="src:.")
        assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
        assert "no CUDA device" in done.stdout
    dry = python("-m", "bench.bench_step", "--dry-run", path="src:.")
    assert dry.returncode == 0 and "images=256, side=224" in dry.stdout


def test_what_a_method_adds_is_the_median_of_the_rounds_differences() -> None:
    """One slow round of both does not count as added; the medians apart would say 3 ms."""
    from bench.bench_step import added

    times = {"softmax": [10.0, 30.0, 11.0, 10.0], "backmix": [11.0, 31.0, 13.0, 15.0]}
    assert added(times, "backmix")["added_ms_p50"] == 1.5  # of 1, 1, 2, 5
    assert added(times, "backmix")["added_percent"] == pytest.approx(100 * 1.5 / 10.5)


# --- looking into a kernel ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks", "why"),
    [
        (90, 32, 0, 4, 16, "warps"),  # 64 warps
        (90, 90, 0, 8, 2, "registers"),  # 2,880 -> 3,072 a warp: 5 in each quarter, 20 in all
        (90, 255, 0, 4, 2, "registers"),  # 8,160 -> 8,192 a warp: 2 in each quarter, 8 in all
        (90, 168, 200 * 1024, 4, 1, "shared memory"),  # 201 of 228 KiB
        (80, 64, 80 * 1024, 4, 2, "shared memory"),  # 81 of 164 KiB
        (90, 16, 0, 1, 32, "blocks"),
    ],
)
def test_occupancy_by_hand(
    arch: int, registers: int, shared: int, warps: int, blocks: int, why: str
) -> None:
    found = profile_kernel.occupancy(arch, registers, shared, warps)
    assert found == (blocks, blocks * warps, why)


SASS = [
    "0000: LDC R1, c[0x0][0x28]",
    "0010: S2R R0, SR_TID.X",
    "0020: @!P0 LDG.E.64 R2, desc[UR16][R6.64]",
    "0030: IMAD.WIDE R6, R0, 0x8, R6",
    "0040: FMUL R4, R4, R5",
    "0050: STG.E.128 desc[UR4][R2.64], R8",
    "0060: @P1 BRA 0x30",
    "0070: LDG.E.U8 R2, desc[UR16][R6.64]",
    "0080: HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",
    "0090: EXIT",
    "00a0: BRA 0xa0",
]


def test_machine_code_is_read() -> None:
    code = profile_kernel.parsed(SASS)
    assert profile_kernel.widest(code, "LDG") == 8 and profile_kernel.widest(code, "STG") == 16
    assert profile_kernel.loops(code) == [profile_kernel.Loop(0x30, 4, 16)]
    kinds = [profile_kernel.kind_of(line.name.split(".")[0]) for line in code]
    wanted = "constant move load integer float store control load matrix control control"
    assert " ".join(kinds) == wanted


def test_bytes_count_the_rows_that_are_touched() -> None:
    import torch

    from backmix.kernels.launch import Launch

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    arguments: dict[str, Any] = {
        "out_ptr": meta(4, 3, 8, 8, dtype=torch.bfloat16),
        "pool_ptr": meta(1000, 8, 8, 3, dtype=torch.uint8),
        "target_ptr": meta(4, dtype=torch.int64),
        "rate": 0.5,
    }
    launch = Launch(None, (1,), arguments, {}, warps=4)
    assert profile_kernel.bytes_of("mix_background", launch) == 4 * 3 * 64 * (2 + 1) + 4 * 8
    assert profile_kernel.flops_of("mix_background", launch) == 0
    assert profile_kernel.floor_us(4_300_000, 0) == pytest.approx(1.0)
    assert profile_kernel.floor_us(0, 769_000_000) == pytest.approx(1.0)


def test_a_kernel_is_described_without_a_gpu() -> None:
    kernel = "location_confidence"
    done = python("bench/profile_kernel.py", kernel, "--arch", "90", "--case", "1000, join")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in (f"{kernel} | ", "sm_90", "registers", "on an H200 (computed)", "instructions:"):
        assert word in done.stdout
    assert python("bench/profile_kernel.py", kernel, "--case", "nowhere").returncode == 1


# --- figures and tables ------------------------------------------------------------------------

GPU = "NVIDIA Invented"


def row(kernel: str, case: str, form: str, ms: float, **more: Any) -> dict[str, Any]:
    """An invented row."""
    known = {
        "bench": "kernels",
        "stage": "invented",
        "device": GPU,
        "torch": "2.99.0",
        "triton": "3.99.0",
        "driver": "999.1",
        "commit": "0123456789abcdef",
        "dirty": False,
        "utc": "2030-01-02T03:04:05+00:00",
        "kernel": kernel,
        "case": case,
        "form": form,
        "ms_p20": 0.95 * ms,
        "ms_p50": ms,
        "ms_p80": 1.12 * ms,
        "n": 50,
        "l2": "rotate",
        "bytes": 462_422_016,
        "gb_per_s": 462.4 / ms,
        "copy_gb_per_s": 4000.0,
        "bf16_tflops": 700.0,
        "share_of_copy": 462.4 / ms / 4000,
        "l2_resident": False,
    }
    return dict.fromkeys(KEYS) | known | more


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(some) + "\n" for some in rows))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Rows of two kernels on an invented GPU and of one on an invented CPU."""
    folder = tmp_path / "results"
    mix = plot.HEADLINES[0].case
    write(
        folder,
        "gpu-mix.jsonl",
        [
            row("mix_background", mix, "triton", 0.14, l2="cold"),
            row("mix_background", mix, "triton", 0.125),
            row("mix_background", mix, "compile", 0.5),
            row("mix_background", mix, "eager", 2.0),
            row("mix_background", mix, "triton", 0.01, stage="tune"),
            row("mix_background", mix, "stage", 1.0, ms_p50=None),
            row("mix_background", "other", "steps_torchvision", 5.0),
        ],
    )
    case = next(x.case for x in plot.HEADLINES if x.kernel == "location_confidence")
    product = {"bytes": 55_576_000, "flops": 51_380_224_000, "tflops": 400.0}
    write(
        folder,
        "gpu-confidence.jsonl",
        [
            row("location_confidence", case, "triton", 0.128, stage="two", **product),
            row("location_confidence", case, "eager", 0.8, stage="two", **product),
        ],
    )
    cpu = {"device": "CPU: Invented", "l2": None, "copy_gb_per_s": None, "bf16_tflops": None}
    write(
        folder,
        "cpu.jsonl",
        [
            row("mix_background", "8 x 32 px", "eager", 7.9, config={"threads": 2}, **cpu),
            row("mix_background", "8 x 32 px", "plain", 1.9, config={"threads": 2}, **cpu),
        ],
    )
    return folder


def test_the_speed_table_says_floor_time_and_how_many_times(results: Path) -> None:
    first = plot.speed(plot.newest(results)).splitlines()[2]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    # 462.4 MB at the run's own 4,000 GB/s are 115.6 us; of 125 us that is 92 %
    assert cells[2:] == ["462 MB", "116 µs", "125 µs", "92%", "16.0x", "4.00x"]
    assert "NVIDIA Invented" in plot.speed(plot.newest(results))
    assert "commit 0123456789ab" in plot.speed(plot.newest(results))


def test_what_no_row_says_is_not_measured(results: Path) -> None:
    lines = plot.speed(plot.newest(results)).splitlines()
    bank = next(line for line in lines if "update_cam_bank" in line)
    assert bank.count("*not measured*") == 4
    assert plot.speed([]).count("*not measured*") == 4 * len(plot.HEADLINES)
    assert "No GPU has been timed" in plot.speed([])
    (results / "gpu-mix.jsonl").unlink()
    (results / "gpu-confidence.jsonl").unlink()
    assert "No GPU has been timed" in plot.speed(plot.newest(results))  # a CPU is none
    for table in (plot.step, plot.small_runs, plot.cpu):
        assert "*not measured*" in table([])


def test_the_table_of_the_step_leaves_out_steps_of_small_runs(results: Path) -> None:
    config = {"images_per_s": 2560.0, "added_ms_p50": 0.0, "added_percent": 0.0}
    one = row("step", "ResNet-50", "softmax", 100.0, stage="step_resnet50", config=config)
    write(results, "gpu-step.jsonl", [one])
    table = plot.step(plot.newest(results))
    config = {"images_per_s": 64e3, "seconds_per_100_epochs": 46.9}
    small = row("step", "classifier32, ssod", "graph x 4", 1.0, stage="osr", config=config)
    write(results, "gpu-osr.jsonl", [small])
    assert plot.step(plot.newest(results)) == table and "`softmax`" in table
    (line,) = [x for x in plot.small_runs(plot.newest(results)).splitlines() if "graph x 4" in x]
    assert line.startswith("| classifier32, ssod | `graph x 4` | 1")
    assert line.endswith("| 64,000 | 46.9 |")


def test_the_newest_file_of_a_stage_counts(results: Path) -> None:
    mix = plot.HEADLINES[0].case
    later = row("mix_background", mix, "triton", 0.25, utc="2031-01-01T00:00:00+00:00")
    write(results, "a-later-run.jsonl", [later])
    lines = plot.speed(plot.newest(results)).splitlines()
    assert "250 µs" in lines[2] and "*not measured*" in lines[2]  # its eager row is gone
    assert "0.128" in json.dumps(plot.newest(results))  # the other stage is still the old one


def test_a_row_cut_short_by_a_kill_is_left_out(results: Path) -> None:
    whole = plot.newest(results)
    with (results / "gpu-mix.jsonl").open("a") as file:
        file.write('{"kernel": "mix_ba')
    assert plot.newest(results) == whole


def test_every_form_of_a_kernel_has_a_line_but_not_what_was_tuned(results: Path) -> None:
    table = plot.TABLES["mix_background"](plot.newest(results))
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 5
    assert "125 µs (119 to 140)" in table and "10.0 µs" not in table
    assert "5.00 ms (4.75 to 5.60)" in table


def test_the_cpu_table_has_a_column_for_each_form(results: Path) -> None:
    table = plot.cpu(plot.newest(results))
    assert "| `mix_background` | `eager` | `plain` |" in table
    assert "| 8 x 32 px | 7.90 (7.50 to 8.85) | 1.90 (1.80 to 2.13) |" in table
    assert "CPU: Invented" in table and "2 threads" in table


def test_rows_of_loaders_on_a_newer_machine_leave_the_cpu_table_alone(results: Path) -> None:
    before = plot.cpu(plot.newest(results))
    other = {"device": "CPU: Newer", "kernel": None, "stage": "loaders", "utc": "2999-01-01"}
    write(results, "loaders.jsonl", [row("", "224 px", "turbo", 2.0) | other])
    assert plot.cpu(plot.newest(results)) == before


def test_a_page_gets_its_tables_and_keeps_the_rest() -> None:
    page = "before\n<!-- table: step -->\nold\nolder\n<!-- end table -->\nafter\n"
    made = plot.with_tables(page, [])
    assert made.startswith("before\n<!-- table: step -->\n") and made.endswith(
        "\n<!-- end table -->\nafter\n"
    )
    assert "old" not in made and plot.with_tables(made, []) == made
    with pytest.raises(ValueError, match="no table 'sped'"):
        plot.with_tables("<!-- table: sped -->\n<!-- end table -->", [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,234"),
        (99.96, "100"),
        (31.26, "31.3"),
        (1.916, "1.92"),
        (0.1367, "0.137"),
        (0.0123, "0.012"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert plot.number(value) == text


def test_figures_are_drawn_of_what_there_is(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: not run")
    from PIL import Image

    plot.draw(plot.newest(results), tmp_path / "all")
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {
        "gpu-mix_background.png",
        "gpu-location_confidence.png",
        "roofline.png",
        "cpu-mix_background.png",
    }
    for path in (tmp_path / "all").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 150 and len(image.convert("RGB").getcolors(2**24) or ()) > 20

    for path in results.glob("gpu-*"):
        path.unlink()
    said = plot.draw(plot.newest(results), tmp_path / "cpu")
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {"cpu-mix_background.png"}
    assert "there are no GPU rows: nothing drawn of them" in said


def test_plot_runs_from_a_plain_clone() -> None:
    done = python("bench/plot.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"## {name}\n" in done.stdout for name in plot.TABLES)


def test_the_headlines_are_what_the_bench_times() -> None:
    """Their names, bytes and operations are the bench's own, written a second time."""
    from bench.stage_kernels import SHAPES

    shapes = {shape.name: shape for some in SHAPES.values() for shape in some}
    for headline in plot.HEADLINES:
        shape = shapes[headline.case]
        assert headline.bytes == shape.bytes, headline
        assert headline.flops == getattr(shape, "flops", 0), headline
    assert math.isclose(plot.floor_ms(plot.HEADLINES[0].bytes, 0), 0.1075, rel_tol=1e-3)
