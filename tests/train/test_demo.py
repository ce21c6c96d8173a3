import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backmix.train import demo
from backmix.train.demo import (
    METHODS,
    Result,
    final_mask_hit,
    fixed_mask_hit,
    jobs,
    outcome,
)
from backmix.train.jobs import Job, run_jobs
from backmix.train.log import write_status

RESULT = Result(
    auroc=0.8, auroc_msp=0.79, accuracy=0.96, conflict=0.9, to_background=0.25, mask_hit=None
)


def results(softmax: list[float], cutout: list[float], backmix: list[float]):
    """Return results with these AUROCs."""
    given = {"softmax": softmax, "cutout": cutout, "backmix": backmix}
    return {
        method: [
            replace(RESULT, auroc=auroc, mask_hit=0.75 if method == "backmix" else None)
            for auroc in aurocs
        ]
        for method, aurocs in given.items()
    }


def test_differences_are_paired_by_seed() -> None:
    text = outcome(results([0.80, 0.90], [0.82, 0.88], [0.85, 0.93]), fixed_hit=0.64)
    lines = {line[:7]: line.split() for line in text.splitlines()[:5]}
    assert lines["softmax"] == ["softmax", "80.0", "90.0", "85.0"]
    assert lines["Cutout "][3:] == "82.0 88.0 85.0 +2.0 -2.0, mean +0.0".split()
    assert lines["BackMix"][3:] == "85.0 93.0 89.0 +5.0 +3.0, mean +4.0".split()


def test_a_backmix_that_loses_is_said_to_lose() -> None:
    text = outcome(results([0.80, 0.90], [0.95, 0.95], [0.70, 0.95]), fixed_hit=0.64)
    # -10 and +5, and -25 and 0: deviations of 7.5 sqrt(2) and 12.5 sqrt(2).
    assert "-2.5 points in the mean (standard deviation 10.6), ahead in 1 of 2 seeds" in text
    assert "-12.5 points in the mean (standard deviation 17.7), ahead in 0 of 2 seeds" in text


def test_the_mask_is_compared_with_chance_and_with_the_best_fixed_mask() -> None:
    text = outcome(results([0.8], [0.8], [0.8]), fixed_hit=0.64)
    assert "cover 75 % of the true foreground" in text.replace("covering", "cover")
    share = demo.mask_cells() / 16
    assert f"Chance would cover {100 * share:.0f} %" in text and "looks at the image 64 %" in text


def test_use_of_the_background_is_reported_either_way() -> None:
    table = results([0.8], [0.8], [0.8])
    assert "Neither method makes unknown images follow their background less" in outcome(table, 0.6)
    table["cutout"] = [replace(RESULT, to_background=0.2)]
    assert "mislead less than with softmax: Cutout (grey patch)." in outcome(table, 0.6)


def test_the_best_fixed_mask_takes_the_cells_with_most_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "mask_cells", lambda: 1)
    (tmp_path / "digit0").mkdir()
    for name, columns in (("0000", slice(0, 8)), ("0001", slice(0, 24))):
        mask = np.zeros((32, 32), np.uint8)
        mask[:8, columns] = 255
        Image.fromarray(mask).save(tmp_path / "digit0" / f"{name}.png")
    # Foreground of 1 + 3 cells, two of them in the first cell.
    assert fixed_mask_hit(tmp_path) == pytest.approx(2 / 4)


def test_the_mask_hit_is_that_of_the_last_epoch_weighted_by_images(tmp_path: Path) -> None:
    rows = [
        {"epoch": 14, "samples": 64, "mask_hit": 0.1},
        {"epoch": 15, "samples": 300, "mask_hit": 0.6},
        {"epoch": 15, "samples": 100, "mask_hit": 0.8},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert final_mask_hit(tmp_path) == pytest.approx(0.65)
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 15, "samples": 64}) + "\n")
    assert final_mask_hit(tmp_path) is None


def job(tmp_path: Path, name: str, *commands: list[str]) -> Job:
    """Return a job of commands of the real command line."""
    return Job(name, deque(commands), tmp_path / f"{name}.log")


def test_a_failed_command_is_quoted_and_the_others_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\n[ "$3" = sleep ] && exec sleep 100\necho "error: $3 $4" >&2; exit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    waiting = [job(tmp_path, "long", ["sleep"]), job(tmp_path, "wrong", ["train", "nothing"])]
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"`backmix train nothing` ended with code 1: error: train"
    ):
        run_jobs(waiting, 2, lambda line: None)
    assert time.monotonic() - began < 20
    assert waiting[0].process is not None and waiting[0].process.returncode == -15


def test_the_commands_of_a_job_run_in_order_and_every_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$3"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    said: list[str] = []
    waiting = [job(tmp_path, name, ["train"], ["evaluate"]) for name in ("a", "b", "c")]
    run_jobs(waiting, 2, said.append)
    assert [(tmp_path / f"{name}.log").read_text() for name in "abc"] == ["train\nevaluate\n"] * 3
    assert [line.split()[0] for line in said] == ["1/3", "2/3", "3/3"]


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    runs = {method: tmp_path / "runs" / method for method in METHODS}
    for run in runs.values():
        run.mkdir(parents=True)
    write_status(runs["softmax"], "finished", 608)
    (runs["softmax"] / "metrics.json").write_text("{}")
    write_status(runs["cutout"], "finished", 608)
    write_status(runs["backmix"], "stopped", 371)
    left = jobs(tmp_path, 2)
    assert [[command[0] for command in job.commands] for job in left] == [
        ["evaluate"],
        ["train", "evaluate"],
    ]
    train = left[1].commands[0]
    assert train[1] == "demo-backmix" and train[train.index("--seed") + 1] == "2"
    assert train[train.index("--method.masks") + 1] == str(tmp_path / "images" / "masks")


def test_a_stopped_demo_stops_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    waiting = [job(tmp_path, "long", ["train"])]
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(waiting, 1, lambda line: None)
    assert waiting[0].process is not None and waiting[0].process.returncode == -15
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_a_killed_demo_stops_its_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")  # `backmix status` waits for someone to write there
    program = (
        "import sys; from collections import deque; from pathlib import Path;"
        "from backmix.train.jobs import Job, run_jobs; out = Path(sys.argv[1]);"
        "run_jobs([Job('long', deque([['status', str(out)]]), out / 'log')], 1, print)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    writer = os.open(tmp_path / "status.json", os.O_WRONLY)  # waits until the command reads
    try:
        process.kill()
        process.wait()
        reader_left = select.poll()
        reader_left.register(writer, 0)  # an end without readers is always told
        assert reader_left.poll(30_000), "the command outlived the demo"
    finally:
        os.close(writer)
