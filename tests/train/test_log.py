"""What a scheduler and a person read while a run goes on."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmix.train import log
from backmix.train.checkpoint import locked
from backmix.train.cli import run as command
from backmix.train.log import Beat, Log, read_status, status_line, write_status
from backmix.train.run_folder import read_config

FACTS = {"epoch": 2, "epochs": 9, "steps": 90, "images_per_s": 1234.5}


def test_a_status_says_what_a_scheduler_asks(tmp_path: Path) -> None:
    write_status(tmp_path, "stopped", 20, "SIGTERM", FACTS)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.items() >= {"state": "stopped", "step": 20, "why": "SIGTERM", **FACTS}.items()
    assert status["pid"] == os.getpid() and status["host"] == os.uname().nodename
    assert status["time"].endswith("+00:00") and read_status(tmp_path) == status
    assert status_line(status) == "stopped at step 20 of 90, epoch 2 of 9 done: SIGTERM"


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("stopped", 75), ("failed", 1), ("running", 3)]
)
def test_the_command_answers_by_its_exit_code(
    tmp_path: Path, state: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(tmp_path, state, 20, facts=FACTS)  # type: ignore[arg-type]
    with locked(tmp_path):
        assert command(["status", str(tmp_path)]) == code
    assert capsys.readouterr().out.startswith(f"{state} at step 20 of 90, epoch 2 of 9 done")


def test_a_run_that_writes_nothing_any_more_may_be_stuck(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 20, facts=FACTS)
    with locked(tmp_path):
        fresh = read_status(tmp_path)
        assert fresh["silent"] < 60 and "stuck" not in status_line(fresh)
        assert f"process {os.getpid()} on" in status_line(fresh)
        assert "1,234 img/s" in status_line(fresh)
        old = time.time() - log.SILENT - 60
        os.utime(tmp_path / "status.json", (old, old))
        (tmp_path / "time.jsonl").write_text("")
        assert "stuck" not in status_line(read_status(tmp_path))  # any file is a sign of life
        os.utime(tmp_path / "time.jsonl", (old, old))
        stuck = read_status(tmp_path)
        assert stuck["silent"] > log.SILENT and "stuck" in status_line(stuck)


def test_a_running_status_is_renewed_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    beat = Beat(tmp_path)

    def step(number: int) -> int:
        beat.beat(number, FACTS)
        return json.loads((tmp_path / "status.json").read_text())["step"]

    assert step(1) == 1
    now[0] += 59
    assert step(2) == 1
    now[0] += 1
    assert step(3) == 3
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json.tmp").mkdir()  # no room, as it were
    now[0] += 60
    beat.beat(4, FACTS)


def test_a_log_that_lacks_what_its_checkpoint_counts_says_what_to_do(tmp_path: Path) -> None:
    Log(tmp_path, None).close()
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl has 3 bytes, but the checkpoint counts 7"):
        Log(tmp_path, {"log.jsonl": 7, "summary.csv": 0})
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(ValueError, match=r"log\.jsonl is not there.*put it back, or remove .*chec"):
        Log(tmp_path, {"log.jsonl": 7, "summary.csv": 0})


@pytest.mark.parametrize("read", [read_status, read_config])
def test_lists_within_lists_end_in_words(
    read: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("status.json", "config.json"):
        (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"json cannot be read"):
        read(tmp_path)
