"""ImageNet's size: the repeated set, the bench's parts at a tiny size, the formulas on paper."""

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backmix.pipeline.beton import Flag, open_beton
from backmix.pipeline.inspect import verify
from backmix.pipeline.options import LoaderOptions
from backmix.train.exchange import Exchange
from backmix.train.models.build import build
from backmix.train.options import BackMix
from backmix.train.prepare import prepare_run
from backmix.train.world import World
from bench import on_paper, plot, synthetic
from tests.runs import tiny_run, tiny_set

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
NETWORKS = {"resnet18": on_paper.RESNET18, "resnet50": on_paper.RESNET50}


# --- the repeated set -----------------------------------------------------------------------------


def test_the_set_shows_a_few_images_again_and_again(tmp_path: Path) -> None:
    source = synthetic.made_images(tmp_path, 3)
    out = synthetic.repeated(source, tmp_path / "set.beton", 1000, 7, 3)
    with open_beton(source) as few, open_beton(out) as many:
        assert many.n == 1000 and len(many.classes) == 7
        assert many.labels.tolist() == [k % 7 for k in range(1000)]
        for k in (0, 1, 2, 3, 500, 999):
            assert many.region(k).tobytes() == few.region(k % 3).tobytes()
            assert many.name(k).endswith(f"_{k}.JPEG")
        assert max(few.sizes[0]) == synthetic.SIDE
        # As a converted set the loaders may decode regions of it.
        assert many.info["options"]["check"] == few.info["options"]["check"]
        assert few.flags is not None and many.flags is not None
        assert (many.flags & Flag.WARNED == 0).all()
        grown = out.stat().st_size - source.stat().st_size
        assert grown < 1000 * 130, "a repeated sample takes tables alone"
    assert verify([out]) == []


def test_the_memory_of_a_process_is_its_own_and_that_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    before = synthetic.memory()
    mapped = np.memmap(tmp_path / "file", np.uint8, mode="r")
    assert int(mapped.sum()) == 0
    between = synthetic.memory()
    assert (
        between["file_mib"] - before["file_mib"]
        > 60
        > 20
        > (between["own_mib"] - before["own_mib"])
    )
    # Straight from the kernel: malloc may hand out again what an earlier test has freed.
    held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(held, np.uint8)[:] = 1
    assert synthetic.memory()["own_mib"] - between["own_mib"] > 60
    with synthetic.watched() as most:
        more = np.ones(48 << 20, np.uint8)
        inside = synthetic.memory()["own_mib"]
        until = time.monotonic() + 60
        while most["own_mib"] < inside and time.monotonic() < until:
            time.sleep(0.01)
        del more
    assert most["own_mib"] >= inside
    del held, mapped


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    size = synthetic.TINY
    source = synthetic.made_images(folder, size.stored)
    return synthetic.repeated(source, folder / "set.beton", size.samples, size.classes, size.stored)


def measured(part: str, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Run a part of the bench here; returns the figures by form, the times as `ms`."""
    found: dict[str, dict[str, Any]] = {}

    def publish(form: str, ms: Sequence[float], **figures: Any) -> None:
        found[form] = figures | ({"ms": list(ms)} if ms else {})

    synthetic.PARTS[part](synthetic.TINY, data, folder, publish)
    return found


def test_reading_is_measured(tiny: Path, tmp_path: Path) -> None:
    found = measured("reading", tiny, tmp_path)
    for form in ("open", "order", "order, windowed", "hold out 2 %", "plan and draws of a step"):
        assert found[form]["ms"] and min(found[form]["ms"]) > 0
    border = found["first batch of the next epoch"]
    assert len(border["ms"]) == 1
    assert 0 < border["own_mib_before"] <= border["own_mib"] >= border["own_mib_behind"]


def test_scores_are_measured(tiny: Path, tmp_path: Path) -> None:
    found = measured("outputs", tiny, tmp_path)
    # 60 images of 10 classes and 32 features: logits, features, labels, numbers.
    spooled = 64 * (40 + 128 + 16)
    assert spooled <= found["outputs: map"]["bytes"] < spooled + 2000
    assert {form for form in found if "scores of" in form} == {
        "outputs: scores of the known set",
        "outputs: scores of the unknown set",
    }
    assert found["outputs: metrics, all scores"]["ms"][0] > 0


def test_a_checkpoint_is_measured(tiny: Path, tmp_path: Path) -> None:
    found = measured("state", tiny, tmp_path)
    copied = found["checkpoint: copy within memory"]
    parts = {name: copied[name] for name in ("model.", "optimizer.", "ema.", "method.")}
    assert parts["method."] == 600 * 2 * 64  # 8 x 8 cells of fp16
    assert parts["ema."] == parts["model."] > parts["optimizer."] > 0
    size = found["checkpoint: write and sync"]["bytes"]
    assert sum(parts.values()) < size < sum(parts.values()) + 60_000
    assert found["kept for backward"]["bytes_per_image"] > 64 * 64 * 3


def run_bench(tmp_path: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Run the bench's own command line; returns its rows by form."""
    root = Path(synthetic.__file__).parents[1]
    command = [sys.executable, "-m", "bench.synthetic", *words, "--work", str(tmp_path)]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "rows")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"], "it leaves nothing behind"
    [path] = (tmp_path / "rows").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["stage"] == "scale" for row in rows)
    return {row["form"]: row for row in rows}


@pytest.mark.slow  # the command line starts four times
@pytest.mark.timeout(300)
def test_the_real_commands_are_measured(tmp_path: Path) -> None:
    found = run_bench(tmp_path, "--tiny", "--part", "train", "--part", "evaluate")
    assert found["command until its first step"]["ms_p50"] > 0
    held = found["memory while training"]["config"]
    assert held["mapped_sets"] == 1 and held["open_files"] >= 4 and held["own_mib"] > 50
    assert found["memory over the border of an epoch"]["config"]["first_step_ms"] > 0
    evaluated = found["backmix evaluate, its pass"]["config"]
    assert evaluated["images"] == 60 and evaluated["images_per_s"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.skipif(not SOAK, reason="1,281,167 samples through the command: part of make soak")
def test_at_imagenet_s_size_the_main_process_stays_below_four_gibibytes(tmp_path: Path) -> None:
    found = run_bench(tmp_path, "--part", "train", "--part", "evaluate")
    for form in (
        "memory while training",
        "memory over the border of an epoch",
        "backmix evaluate, the whole command",
    ):
        assert found[form]["config"]["own_mib"] < synthetic.MOST_MIB, form


# --- on paper -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_those_that_are_trained(name: str) -> None:
    model, known = build(name, 1000, 224), NETWORKS[name]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert known.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert known.channels == sum(norm.num_features for norm in norms)
    assert known.norms == len(norms)
    assert known.buffers == sum(buffer.numel() for buffer in model.buffers())
    assert known.weights == sum(value.nbytes for value in model.state_dict().values())
    height, width = model.grid(224)
    assert known.cells == height * width


def test_a_ring_sends_every_byte_but_the_own_part_twice() -> None:
    # Four processes, 100 bytes: three rounds of 25 bytes to sum, three to spread.
    assert on_paper.ring(100, 4) == 3 * 25 + 3 * 25
    assert on_paper.ring(100, 1) == 0


def test_what_is_averaged_in_a_step_is_what_the_formula_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reduced: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat, *_, **__: reduced.append(flat.nbytes))
    model = build("resnet18", 1000, 64)
    World(rank=0, size=4).average_buffers(model, 0.25)
    assert reduced == [on_paper.DOUBLE * on_paper.RESNET18.buffers]
    assert on_paper.statistics(on_paper.RESNET18, 4) == 1.5 * reduced[0]
    gradient = sum(4 * parameter.numel() for parameter in model.parameters())
    assert on_paper.gradients(on_paper.RESNET18, 4) == 1.5 * gradient


def test_rows_arrive_once_an_epoch_from_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(found: list[Tensor], mine: Tensor) -> None:
        for other in found:
            other.copy_(mine)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    each = 10
    bank = torch.zeros(8 * each, 7, 7, dtype=torch.float16)
    exchange = Exchange(World(rank=0, size=8), bank)
    monkeypatch.setattr(World, "greatest", lambda self, values: list(values))
    exchange.wrote(torch.arange(each))  # an eighth of all rows
    exchange.settle()
    expected = on_paper.rows(on_paper.RESNET50, 8) / on_paper.SAMPLES * len(bank)
    assert exchange.received == expected == 7 * each * (8 + 98)


@pytest.mark.parametrize("running_mean", [False, True])
def test_a_checkpoint_has_the_bytes_of_the_formula(tmp_path: Path, running_mean: bool) -> None:
    data = tiny_set(tmp_path / "data.beton", 40)
    method = BackMix(patch=112, fill="keep")
    run = tiny_run(data, tmp_path / "run", method, model="resnet18", ema=0.9 * running_mean)
    loader = LoaderOptions(batch=8, group=8, threads=1, loader="turbo", size=224)
    _, state, opened = prepare_run(replace(run, loader=loader), "test", [])
    opened.close()
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    tensors = state.tensors()
    found = sum(tensor.nbytes for tensor in tensors.values())
    # Four classes and forty images in place of ImageNet's.
    paper = on_paper.RESNET18
    fewer = 996 * 513
    known = replace(paper, parameters=paper.parameters - fewer)
    expected = on_paper.checkpoint(known, 1, running_mean=running_mean)
    expected -= known.bank - 40 * known.bank_row + on_paper.CUDA_GENERATOR
    assert 0 <= found - expected < 2000, "meters alone are not counted"


def test_the_tables_say_what_was_measured_and_leave_open_what_was_not() -> None:
    row = dict.fromkeys(("note", "device", "torch", "triton", "driver", "commit", "dirty"))
    row |= {"stage": "scale", "utc": "2026-01-01", "device": "CPU: x"}
    row |= {"note": "a; load average 1.5 on 2 cores"}
    case = f"{on_paper.SAMPLES:,} samples, 1,000 classes"
    written = row | {"form": "checkpoint: write and sync", "case": case, "ms_p50": 500.0}
    written |= {"config": {"bytes": 430_000_000}}
    assert plot.synthetic([]).strip() == plot.NOT_MEASURED
    assert "430,000,000 bytes | 500 ms" in plot.synthetic([written])
    tiny = written | {"case": "600 samples, 10 classes"}
    assert plot.synthetic([tiny]).strip() == plot.NOT_MEASURED
    eight = plot.scale_node([written]).splitlines()[2]
    # 0.860 bytes a nanosecond, and the checkpoint of eight GPUs with a running mean.
    size = on_paper.checkpoint(on_paper.RESNET50, 8, running_mean=True)
    assert f"{size / 1e6:,.0f} MB | {size / 860_000:,.0f} ms" in eight
    assert plot.NOT_MEASURED in eight
    line = next(line for line in plot.scale([]).splitlines() if line.startswith("| ResNet-50 | 64"))
    assert "| 16,384 | 79 | 201 MB |" in line  # 2 x 63/64 x 102.2 MB


def test_every_measured_form_has_a_line_in_the_table() -> None:
    forms = {form for form in plot.SCALE if plot.SCALE[form]}
    source = Path(synthetic.__file__).read_text()
    for form in forms - {f"outputs: scores of the {name} set" for name in ("known", "unknown")}:
        assert f'"{form}"' in source, f"{form} is measured nowhere"
