"""Loggers get the log's rows, and whatever they do the run goes on with the same bits."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from backmix.train import loggers
from backmix.train.loggers import LOGGERS, Emit, Loggers, Start
from backmix.train.options import Softmax
from tests.runs import tiny_run, tiny_set
from tests.train.test_loop import fingerprint

ROOT = Path(__file__).resolve().parents[2]
ROW = {"kind": "train", "step": 3, "loss": 0.5, "bad_samples": [7], "warming": True}


def start(run: Path, step: int = 0) -> Start:
    return Start(run, step, {"run": {"epochs": 3, "optim": {"lr": 0.1}}, "classes": ["a", "b"]})


class Taking:
    """A logger that keeps what it gets; `stand_in` puts it in the place of wandb."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.opened: list[Start] = []
        self.closed = threading.Event()
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
        monkeypatch.setitem(LOGGERS, "wandb", self.open)

    def open(self, start: Start) -> tuple[Emit, object]:
        self.opened.append(start)
        return self.emit, self.closed.set

    def emit(self, step: int, figures: Mapping[str, float]) -> None:
        self.rows.append((step, dict(figures)))


def test_rows_arrive_in_order_under_the_same_names_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, said = Taking(monkeypatch), []
    made = Loggers(["wandb", "wandb"], start(tmp_path, 2), said.append)
    made.emit(ROW)
    made.emit({"kind": "time", "step": 3, "images_per_s": 10.0, "event": "resume"})
    made.emit({"kind": "time", "step": 3, "event": "start"})  # holds no figure
    made.emit({"kind": "epoch", "step": 4, "epoch": 1, "train_loss": 0.25})
    made.close()
    assert taking.rows == [
        (3, {"train/loss": 0.5}),
        (3, {"time/images_per_s": 10.0}),
        (4, {"epoch/epoch": 1, "epoch/train_loss": 0.25}),
    ]
    assert taking.opened == [start(tmp_path, 2)] and taking.closed.is_set() and not said


def test_a_package_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    made = Loggers(["wandb"], start(tmp_path), said.append)
    made.emit(ROW)
    made.close()
    assert said == ["--log-to wandb: not installed (pip install wandb); the run goes on without"]


@pytest.mark.parametrize("error", [ValueError("no key"), SystemExit(1), KeyError()])
def test_one_that_cannot_begin_is_said_once_and_loses_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    taking, said = Taking(monkeypatch), []

    def fail(start: Start) -> tuple[Emit, object]:
        raise error

    monkeypatch.setitem(LOGGERS, "wandb", fail)
    made = Loggers(["wandb"], start(tmp_path), said.append)
    for _ in range(3):
        made.emit(ROW)
    made.close()
    assert len(said) == 2 and type(error).__name__ in said[0] and "the run goes on" in said[0]
    assert "3 of 3 rows were lost" in said[1] and not taking.rows


def test_one_that_fails_now_and_then_is_said_once_and_gets_the_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, said = Taking(monkeypatch), []
    real = taking.emit

    def failing(step: int, figures: Mapping[str, float]) -> None:
        if step % 2:
            raise ConnectionError("no server\nand a long story")
        real(step, figures)

    taking.emit = failing  # type: ignore[method-assign]
    made = Loggers(["wandb"], start(tmp_path), said.append)
    for step in range(6):
        made.emit({**ROW, "step": step})
    made.close()
    assert [step for step, _ in taking.rows] == [0, 2, 4]
    assert said[0] == "--log-to wandb: ConnectionError: no server; the run goes on"
    assert len(said) == 2 and "3 of 6 rows were lost;" in said[1]


def test_one_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a row, once its queue is full, nor at the end."""
    taking, said = Taking(monkeypatch), []
    hung, gone = threading.Event(), threading.Event()

    def hanging(step: int, figures: Mapping[str, float]) -> None:
        hung.set()
        gone.wait(60)

    taking.emit = hanging  # type: ignore[method-assign]
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    monkeypatch.setattr(loggers, "WAITING", 10)
    made = Loggers(["wandb"], start(tmp_path), said.append)
    made.emit(ROW)
    assert hung.wait(60)
    done = threading.Event()

    def give_and_close() -> None:
        for _ in range(50):
            made.emit(ROW)
        made.close()
        done.set()

    threading.Thread(target=give_and_close, daemon=True).start()
    ended = done.wait(60)
    gone.set()
    assert ended and len(said) == 1 and "51 of 51 rows were lost" in said[0]
    assert "has not ended" in said[0] and str(tmp_path) in said[0]


def test_a_run_with_loggers_keeps_its_bits_and_gives_them_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from backmix.train.run import train

    data = tiny_set(tmp_path / "tiny.beton")
    plain = tiny_run(data, tmp_path / "plain", Softmax(), epochs=2)
    assert train(plain, "test", []) == 0
    taking = Taking(monkeypatch)
    logged = replace(plain, out=tmp_path / "logged", log_to=("wandb",), quiet=False)
    assert train(logged, "test", []) == 0
    assert fingerprint(logged.out) == fingerprint(plain.out)
    rows = [json.loads(line) for line in (logged.out / "log.jsonl").read_text().splitlines()]
    losses = [(s, v["train/loss"]) for s, v in taking.rows if "train/loss" in v]
    assert losses == [(row["step"], row["loss"]) for row in rows]
    summary = [line.split(",") for line in (logged.out / "summary.csv").read_text().splitlines()]
    epochs = [(s, v) for s, v in taking.rows if "epoch/train_loss" in v]
    assert [[str(v["epoch/epoch"]), str(s)] for s, v in epochs] == [r[:2] for r in summary[1:]]
    assert [f"{v['epoch/train_loss']:.6g}" for _, v in epochs] == [r[2] for r in summary[1:]]
    assert taking.opened[0].config["classes"] == ["a", "b", "c", "d"]

    def fail(start: Start) -> tuple[Emit, object]:
        raise RuntimeError("broken")

    monkeypatch.setitem(LOGGERS, "wandb", fail)
    broken = replace(logged, out=tmp_path / "broken")
    assert train(broken, "test", []) == 0
    assert fingerprint(broken.out) == fingerprint(plain.out)
    assert "--log-to wandb: RuntimeError: broken; the run goes on" in capsys.readouterr().err


def test_none_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys, backmix.train.run\n"
        "print({'tensorboard', 'wandb', 'mlflow'} & {name.split('.')[0] for name in sys.modules})"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert out.strip() == "set()"


def give(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1 to 3, a kill, and from step 2 rows 3 and 4."""
    monkeypatch.setattr(loggers, "PATIENCE", 60.0)
    said: list[str] = []
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        made = Loggers([name], start(run, begin), said.append)
        for step in steps:
            made.emit({**ROW, "step": step, "loss": 1 / step})
        made.close()
    assert not said


@pytest.mark.filterwarnings("default")  # other people's deprecations
def test_tensorboard_reads_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: not run")
    give("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    events = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert events == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert read.Tags()["scalars"] == ["train/loss"]


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_mlflow_reads_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: not run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    give("mlflow", tmp_path, monkeypatch)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run = client.get_run((tmp_path / "mlflow.id").read_text().strip())
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(m.step, m.value) for m in history} == {(s, 1 / s) for s in (1, 2, 3, 4)}
    assert run.data.params["run.optim.lr"] == "0.1" and run.info.status == "FINISHED"


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_wandb_keeps_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: not run")
    monkeypatch.setenv("WANDB_MODE", "offline")
    give("wandb", tmp_path, monkeypatch)
    number = (tmp_path / "wandb.id").read_text().strip()
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(kept) == 2 and all(b"train/loss" in path.read_bytes() for path in kept)


def test_time_passes_for_slow_ones_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow logger gets all its rows as long as they fit into its queue."""
    taking, said = Taking(monkeypatch), []
    real = taking.emit

    def slow(step: int, figures: Mapping[str, float]) -> None:
        time.sleep(0.01)
        real(step, figures)

    taking.emit = slow  # type: ignore[method-assign]
    made = Loggers(["wandb"], start(tmp_path), said.append)
    for step in range(20):
        made.emit({**ROW, "step": step})
    made.close()
    assert [step for step, _ in taking.rows] == list(range(20)) and not said
