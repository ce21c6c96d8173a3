"""How fast a pass was: the rates by hand, what is written, and that nobody waits for a batch."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from backmix.train import passes
from backmix.train.evaluate import evaluate
from backmix.train.models.build import build
from backmix.train.options import EvaluateOptions, Run
from backmix.train.pace import OnTheirWay, Pace, moment, seconds_between
from backmix.train.run_folder import as_document
from backmix.train.scores import image_cues
from tests.runs import tiny_set

CPU = torch.device("cpu")


def finished_run(out: Path) -> Path:
    """Make a run folder with a network of random weights that knows the classes a and b."""
    out.mkdir()
    options = Run(data=(Path("train.beton"),), out=out, model="classifier32-quarter")
    config = {
        "run": as_document(options),
        "resolved": {},
        "classes": ["a", "b"],
        "known": [0, 1],
        "data": {"files": ["train.beton"], "digest": "0", "samples": 1},
    }
    (out / "config.json").write_text(json.dumps(config))
    model = build("classifier32-quarter", 2, 32)
    safetensors.torch.save_file(model.state_dict(), out / "model.safetensors")
    return out


def test_the_rates_are_what_each_part_would_do_alone() -> None:
    pace = Pace("known", 600, seconds=4, waited=1, decoding=6, threads=3, computing=2)
    # 3 threads in 6 thread-seconds: 2 seconds if none of them ever rests.
    assert pace.rates == {
        "images_per_s": 150,
        "loader_images_per_s": 300,
        "network_images_per_s": 300,
    }
    assert pace.row["waiting"] == 0.25
    assert "600 images in 4.0 s, 150 a second" in str(pace) and "25% of the time" in str(pace)


def test_only_the_time_until_a_batch_is_there_is_waiting() -> None:
    def slowly() -> Iterator[Any]:
        for _ in range(3):
            time.sleep(0.02)
            yield range(7)

    pace = Pace("x")
    for _ in pace.arriving(slowly()):
        time.sleep(0.05)
    pace.end()
    assert pace.images == 21
    assert 0.06 <= pace.waited <= pace.seconds - 0.15


def test_on_a_cpu_tensors_are_there_at_once() -> None:
    begin = moment(CPU)
    time.sleep(0.02)
    tensors = {"logits": torch.arange(6.0).reshape(2, 3), "index": torch.tensor([4, 5])}
    arrays, seconds = OnTheirWay(tensors, begin, CPU).arrays()
    assert arrays["logits"].tolist() == [[0, 1, 2], [3, 4, 5]] and arrays["index"].tolist() == [
        4,
        5,
    ]
    assert 0.02 <= seconds <= seconds_between(begin, moment(CPU))


def test_every_pass_leaves_a_row_and_a_line_and_no_figure_depends_on_them(tmp_path: Path) -> None:
    test = tiny_set(tmp_path / "test.beton", 20)
    run = finished_run(tmp_path / "run")
    (run / "time.jsonl").write_text('{"event": "start"}\n')
    said: list[str] = []
    options = EvaluateOptions(test=(test,), unknown=(f"again={test}",), batch=7, threads=2)
    evaluate(run, options, tell=said.append)
    first, *rows = map(json.loads, (run / "time.jsonl").read_text().splitlines())
    assert first == {"event": "start"}
    assert [(row["event"], row["set"], row["images"]) for row in rows] == [
        ("evaluate", "known", 10),
        ("evaluate", "unknown", 10),
        ("evaluate", "again", 20),
    ]
    for row in rows:
        assert 0 < row["images_per_s"] and 0 <= row["waiting"] <= 1
        # Each part alone is at least as fast as both together.
        assert row["images_per_s"] <= row["network_images_per_s"]
    assert [line.split(":")[0] for line in said] == ["known", "unknown", "again"]
    metrics = (run / "metrics.json").read_bytes()
    evaluate(run, options)
    assert (run / "metrics.json").read_bytes() == metrics
    assert len((run / "time.jsonl").read_text().splitlines()) == 7


def test_a_batch_is_taken_to_the_host_when_the_next_one_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Watched(OnTheirWay):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.number = sum(word.startswith("begin") for word in order)
            order.append(f"begin {self.number}")

        def arrays(self) -> tuple[dict[str, np.ndarray], float]:
            order.append(f"take {self.number}")
            return super().arrays()

    monkeypatch.setattr(passes, "OnTheirWay", Watched)
    test = tiny_set(tmp_path / "test.beton", 24, classes=2)
    run = finished_run(tmp_path / "run")
    document = evaluate(run, EvaluateOptions(test=(test,), batch=8, threads=1))
    assert document["known"]["n"] == 24
    assert order == ["begin 0", "begin 1", "take 0", "begin 2", "take 1", "take 2"]


@pytest.mark.gpu
def test_nobody_waits_before_the_arrays_are_asked_for() -> None:
    device = torch.device("cuda")
    a = torch.randn(2048, 2048, device=device)
    expected = (a @ a).cpu()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin = moment(device)
        product = a @ a
        for _ in range(50):
            product = a @ a
        way = OnTheirWay({"product": product}, begin, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    arrays, seconds = way.arrays()
    assert np.array_equal(arrays["product"], expected.numpy())
    assert 0 < seconds < 60


@pytest.mark.parametrize(("count", "side"), [(150, 32), (3, 300), (1, 8)])
def test_the_cues_of_an_image_are_the_same_in_any_company(count: int, side: int) -> None:
    views = torch.from_numpy(
        np.random.default_rng(side).integers(0, 256, (count, side, side, 3), np.uint8)
    )
    together = image_cues(views)
    for name, figures in together.items():
        alone = torch.cat([image_cues(view[None])[name] for view in views])
        assert torch.equal(figures, alone), name
    grey = views.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(
        together["brightness"].double(), grey.mean((1, 2)), rtol=1e-5, atol=1e-3
    )
