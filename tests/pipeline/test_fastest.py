"""`fastest`: loaders are timed in processes of their own, and the clearly fastest is taken."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backmix.pipeline import fastest, loader
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_set
from backmix.pipeline.loader import choose, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset, select
from tests.pipeline.photos import open_descriptors, write_photos

SOURCES = Path(__file__).parents[2] / "src"
N = 37
OPTIONS = LoaderOptions(loader="fastest", batch=8, size=24, crop="random", threads=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N)


def chosen(path: Path, options: LoaderOptions = OPTIONS) -> tuple[str, list[str]]:
    said: list[str] = []
    with open_set(path) as data:
        subset = Subset(np.arange(data.n), data.labels)
        return choose(data, options, subset, say=said.append), said


@pytest.fixture
def rates(monkeypatch) -> dict[str, float | str]:
    """What the timing of each loader will say; those named here count as installed."""
    said: dict[str, float | str] = {}
    monkeypatch.setattr(fastest, "_installed", lambda: list(said))
    monkeypatch.setattr(fastest, "_rate", lambda *arguments: said[arguments[2]])
    return said


def test_a_signal_to_the_timed_process_ends_the_choice(photos, monkeypatch) -> None:
    killed = subprocess.CompletedProcess([], -signal.SIGINT, stdout="")
    monkeypatch.setattr(fastest, "_installed", lambda: ["turbo", "ffcv"])
    monkeypatch.setattr(fastest.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(KeyboardInterrupt):
        chosen(photos)


CHOOSING = """
import signal, sys
import numpy as np
from backmix.pipeline import fastest
from backmix.pipeline.beton import open_set
from backmix.pipeline.loader import choose
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset

signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does, which looks at it between steps
fastest._installed = lambda: ["turbo", "ffcv"]
fastest.SECONDS = 100.0
options = LoaderOptions(loader="fastest", batch=8, size=24, crop="random", threads=1)
with open_set(sys.argv[1]) as data:
    try:
        choose(data, options, Subset(np.arange(data.n), data.labels))
    except KeyboardInterrupt as interruption:
        sys.exit(str(interruption))
"""


def timed_process(parent: int) -> int | None:
    """The process that times a loader for another one, once its decoding thread runs."""
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in path.read_text().splitlines())
            if int(status["PPid"]) == parent and int(status["Threads"]) > 1:
                return int(path.parent.name)
    return None


def ended(process: int | None) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()  # nobody reaps it
    except OSError:
        return True


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_this_process_alone_ends_the_timing_at_once(photos, number) -> None:
    """Whatever this process does with it otherwise; and the timed process ends with it."""
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", CHOOSING, str(photos)], env=environment, stderr=subprocess.PIPE
    ) as choosing:
        try:
            wait_until(lambda: timed_process(choosing.pid))
            timed = timed_process(choosing.pid)
            choosing.send_signal(number)
            _, said = choosing.communicate(timeout=30)  # of the 200 that it has still to do
            wait_until(lambda: ended(timed), 30)
        finally:
            choosing.kill()
    if number == signal.SIGTERM:
        assert said.decode().strip() == "terminated by SIGTERM" and choosing.returncode == 1
    else:
        assert choosing.returncode == -number


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"turbo": 100.0, "ffcv": 80.0, "dali": 300.0}, "dali"),
        ({"turbo": 100.0, "ffcv": 120.0, "dali": 110.0}, "ffcv"),
        ({"turbo": 100.0, "ffcv": 104.0}, "turbo"),  # no more than two timings differ by
        ({"turbo": 100.0, "ffcv": "its process ended with code 1"}, "turbo"),
        ({"turbo": "it did not answer in 120 s", "ffcv": 10.0}, "ffcv"),
        ({"turbo": "no", "ffcv": "no"}, "turbo"),
    ],
)
def test_the_clearly_fastest_is_taken_and_every_figure_is_said(photos, rates, found, expected):
    rates.update(found)
    taken, said = chosen(photos)
    assert taken == expected
    assert len(said) == len(found) + 1 and said[-1] == f"fastest: taking {expected}"
    for line, (name, rate) in zip(said, found.items(), strict=False):
        figure = f"{rate:,.0f} images per second" if isinstance(rate, float) else rate
        assert line.startswith(f"{name}: ") and line.endswith(figure)


def test_alone_turbo_is_taken_without_timing(photos, monkeypatch):
    monkeypatch.setattr(fastest, "_installed", lambda: ["turbo"])
    monkeypatch.setattr(fastest, "_rate", lambda *arguments: pytest.fail("it was timed"))
    assert chosen(photos) == ("turbo", ["fastest: taking turbo, no other is installed"])


def test_what_auto_keeps_resident_and_evaluation_are_not_timed(photos, monkeypatch):
    monkeypatch.setattr(loader, "fastest", lambda *arguments: pytest.fail("it was timed"))
    assert chosen(photos, dataclasses.replace(OPTIONS, crop="whole")) == ("resident", [])
    assert chosen(photos, dataclasses.replace(OPTIONS, loader="auto")) == ("turbo", [])
    with open_loader(photos, OPTIONS, split="eval") as opened:
        assert sum(len(batch) for batch in opened.batches(Place(0))) == N


def test_several_processes_would_choose_differently_and_are_refused(photos):
    with pytest.raises(ValueError, match=r"--loader.loader fastest is for one process"):
        open_loader(photos, dataclasses.replace(OPTIONS, group=4), rank=1, world=2)


def test_turbo_is_always_a_candidate_and_first():
    assert fastest._installed()[0] == "turbo"


def test_a_timed_loader_delivers_in_a_process_of_its_own(photos):
    """With growing views, too, and on a subset; the timing leaves nothing behind here."""
    with open_set(photos) as data:
        index = select(data.labels, [0, 2]).index
    options = dataclasses.replace(OPTIONS, grow_from=16, grow=(0, 1))
    before = threading.active_count(), open_descriptors(), torch.get_num_threads()
    request = (options, "turbo", index, torch.device("cpu"))
    seconds, fastest.SECONDS = fastest.SECONDS, 0.1
    try:
        rate = fastest._rate([photos], *request)
        assert isinstance(rate, float) and rate > 0
        missing = fastest._rate([photos.with_name("missing.beton")], *request)
    finally:
        fastest.SECONDS = seconds
    assert isinstance(missing, str) and "missing.beton" in missing
    assert before == (threading.active_count(), open_descriptors(), torch.get_num_threads())


def test_a_process_that_dies_or_hangs_is_told(photos, monkeypatch):
    def killed(*arguments, **options):
        return subprocess.CompletedProcess([], -11, stdout="")

    def hung(*arguments, **options):
        raise subprocess.TimeoutExpired("python", 120)

    request = ([photos], OPTIONS, "dali", np.arange(N), torch.device("cpu"))
    monkeypatch.setattr(subprocess, "run", killed)
    assert fastest._rate(*request) == "its process ended with code -11"
    monkeypatch.setattr(subprocess, "run", hung)
    assert fastest._rate(*request) == "it did not answer in 120 s"


def test_a_rate_counts_images_after_the_first_batches(photos, monkeypatch):
    """By a clock that advances one second a batch: 8 images a second, the short ones fewer."""
    seconds = iter(range(10_000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr(fastest, "time", clock)  # the loader's own timers go on as ever
    request = {
        "paths": [str(photos)],
        "options": dataclasses.asdict(dataclasses.replace(OPTIONS, loader="turbo", prefetch=1)),
        "index": list(range(32)),
        "device": "cpu",
        "seconds": 12,
    }
    assert fastest.measure(request) == 8


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_installed_loader_is_timed_for_real(photos, monkeypatch):
    monkeypatch.setattr(fastest, "SECONDS", 0.3)
    taken, said = chosen(photos)
    timed = [line.partition(":")[0] for line in said[:-1]]
    assert timed == (fastest._installed() if len(fastest._installed()) > 1 else [])
    assert all(line.endswith("images per second") for line in said[:-1]), said
    assert said[-1].startswith(f"fastest: taking {taken}")


def test_a_loader_s_process_answers_a_foolish_request_with_an_error():
    done = subprocess.run(
        [sys.executable, "-c", fastest.PROGRAM],
        input="nothing",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        timeout=100,
    )
    assert done.returncode == 0 and done.stdout.startswith('{"error"')
