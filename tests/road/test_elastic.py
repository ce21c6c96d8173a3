"""Several processes under the real torchrun: killed, stopped, orphaned, and going on.

They are started by the scripts of docs/examples as these stand there.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.runs import tiny_set
from tests.train.test_loop import fingerprint

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150.0
OPTIONS = (
    "--model classifier32-quarter --epochs 40 --loader.batch 20 --loader.group 4 "
    "--loader.loader turbo --loader.threads 1 --threads 1 --precision fp32 --device cpu "
    "--method.patch 12 --save-steps 5 --log-every 10 --quiet"
).split()
"""120 steps, three an epoch of 48 images: five mix groups over two processes, two in the last."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton", count=80, classes=10)


def command(script: str, data: Path, out: Path) -> list[str]:
    words = ["bash", str(ROOT / "docs" / "examples" / script), str(out), "cifar10-backmix"]
    return [*words, "--data", str(data), *OPTIONS]


def environment() -> dict[str, str]:
    python = {"PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    here = {"MACHINES": "1:1", "PROCESSES": "2", "RESTARTS": "3", "PORT": str(free_port())}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **python, **here, "GLOO_SOCKET_IFNAME": "lo", "PATH": path}


Begin = Callable[..., subprocess.Popen]


@pytest.fixture
def begin(data: Path) -> Iterator[Begin]:
    """Start the job; whatever is left of it at the end is ended."""
    begun: list[subprocess.Popen] = []

    def start(out: Path, script: str = "elastic.sh", **more: str) -> subprocess.Popen:
        log = open(out.with_name(out.name + ".txt"), "ab")
        job = subprocess.Popen(
            command(script, data, out),
            env=environment() | more,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        begun.append(job)
        return job

    yield start
    for job in begun:
        for pid in [*workers(job.pid).values(), job.pid] if job.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait(SECONDS)


def workers(launcher: int) -> dict[int, int]:
    """The processes that a torchrun has started, by rank."""
    found = {}
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for child in children:
            said = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(word[5:]) for word in said if word.startswith(b"RANK=")]
            found |= {rank: int(child) for rank in ranks}
    except OSError:
        pass
    return found


def wait_for(what: Callable[[], bool], job: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert job.poll() is None, out.with_name(out.name + ".txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_saved(out: Path) -> int:
    names = [path.name for path in (out / "checkpoints").glob("step-*.safetensors")]
    return int(max(names)[5:13]) if names else 0


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run of two processes ends with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    words = command("elastic.sh", data, out)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out


@pytest.mark.slow  # starts of torchrun with two processes each
@pytest.mark.timeout(400)
def test_killed_processes_are_replaced_and_the_bits_are_the_same(
    whole: Path, begin: Begin, tmp_path: Path
) -> None:
    """One is killed, then the one that writes the run folder: both times all start anew."""
    out = tmp_path / "run"
    job = begin(out)
    for rank, steps in ((1, 15), (0, 60)):
        wait_for(lambda steps=steps: steps_saved(out) >= steps, job, out)
        os.kill(workers(job.pid)[rank], signal.SIGKILL)
    assert job.wait(SECONDS) == 0, out.with_name("run.txt").read_text()[-3000:]
    events = [json.loads(line) for line in (out / "time.jsonl").read_text().splitlines()]
    begun = [(row["event"], row["step"]) for row in events if row.get("processes") == 2]
    assert [event for event, _ in begun] == ["start", "resume", "resume"]
    assert 15 <= begun[1][1] <= 60 <= begun[2][1] < 120
    assert fingerprint(out) == fingerprint(whole)


STAND_INS = {
    "srun": 'exec "$@"\n',
    "scontrol": """case $1 in
  show) echo localhost ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
""",
}
"""Of Slurm, as far as a job script on one machine sees it."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slurm_job_stops_in_time_and_queues_itself_until_it_is_finished(
    whole: Path, begin: Begin, tmp_path: Path
) -> None:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / name).chmod(0o755)
    out, requeued = tmp_path / "run", tmp_path / "requeued"
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "REQUEUED": str(requeued),
        "PATH": f"{tmp_path}:{environment()['PATH']}",
    }
    job = begin(out, "slurm.sbatch", **slurm)
    wait_for(lambda: steps_saved(out) >= 10, job, out)
    job.send_signal(signal.SIGTERM)  # what --signal=B:TERM@120 does
    job.wait(SECONDS)
    stopped = status(out)
    assert (stopped["state"], stopped["why"]) == ("stopped", "SIGTERM")
    assert stopped["step"] == steps_saved(out) < 120
    assert requeued.read_text() == "7\n"
    begin(out, "slurm.sbatch", **slurm).wait(SECONDS)
    assert status(out)["state"] == "finished"
    assert requeued.read_text() == "7\n"
    assert fingerprint(out) == fingerprint(whole)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_that_lose_their_torchrun_stop_by_themselves(
    begin: Begin, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = begin(out)
    wait_for(lambda: steps_saved(out) >= 5, job, out)
    left = workers(job.pid)
    job.kill()
    job.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in left.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped = status(out)
    assert (stopped["state"], stopped["why"]) == ("stopped", "its launcher is gone")
    assert stopped["step"] == steps_saved(out) < 120


RAY = """
import os
from dataclasses import dataclass


@dataclass
class FailureConfig:
    max_failures: int


@dataclass
class RunConfig:
    failure_config: FailureConfig


@dataclass
class ScalingConfig:
    num_workers: int
    use_gpu: bool


@dataclass
class TorchConfig:
    backend: str


@dataclass
class TorchTrainer:
    train_loop_per_worker: object
    train_loop_config: dict
    torch_config: TorchConfig
    scaling_config: ScalingConfig
    run_config: RunConfig

    def fit(self):
        assert self.torch_config.backend == "gloo" and not self.scaling_config.use_gpu
        os.environ |= {"RANK": "0", "WORLD_SIZE": str(self.scaling_config.num_workers)}
        self.train_loop_per_worker(self.train_loop_config)
"""


@pytest.mark.slow
def test_the_example_for_ray_asks_for_what_a_worker_then_does(data: Path, tmp_path: Path) -> None:
    """With a stand-in for Ray that has one worker: the arguments are those of Ray Train 2.60."""
    for name in ("ray", "ray/train", "ray/train/torch"):
        (tmp_path / "stand-in" / name).mkdir(parents=True)
        (tmp_path / "stand-in" / name / "__init__.py").write_text(RAY if "/" in name else "")
    example, out = ROOT / "docs" / "examples" / "ray_train.py", tmp_path / "run"
    words = ["1", "cifar10-backmix", "--data", str(data), "--out", str(out), *OPTIONS]
    more = {"PYTHONPATH": f"{tmp_path / 'stand-in'}:{ROOT / 'src'}"}
    done = subprocess.run(
        [sys.executable, str(example), *words, "--epochs", "1"],
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert status(out)["state"] == "finished"
