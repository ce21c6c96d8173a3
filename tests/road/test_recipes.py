"""The ImageNet recipes from the command line at tiny size: begun, stopped by SIGTERM, continued.

Networks, schedules, growing views, BlurPool and methods are the recipes' own; only epochs, batch,
sizes and data are small.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from backmix.train.cli import run
from tests.images import class_folders
from tests.train.test_loop import fingerprint

SECONDS = 100.0
CLASSES = ("ant", "bee", "cat", "dog")
TINY = [
    *("--loader.batch", "8", "--loader.threads", "1", "--threads", "1", "--log-every", "1"),
    *("--precision", "fp32", "--device", "cpu", "--quiet"),
]
GROWING = [
    *("--epochs", "2", "--loader.size", "96", "--loader.grow-from", "64"),
    *("--loader.grow", "0", "1"),
]
TUNING = ["--epochs", "2", "--loader.size", "64"]

Train = Callable[..., BaseProcess]


def command(argv: list[str]) -> None:
    """`backmix ARGV` in a process of its own, with nothing on its streams."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    from backmix.train.cli import main

    main(argv)


@pytest.fixture(scope="module")
def start() -> Train:
    """Start `backmix train`; torch is imported once, in the server that forks the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backmix.train.run", "backmix.train.cli"])

    def begin(*argv: object) -> BaseProcess:
        words = ["train", *(str(word) for word in argv)]
        process = context.Process(target=command, args=(words,))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of 28 JPEGs of four classes: steps of 8, 8, 8 and 4 images an epoch."""
    folder = tmp_path_factory.mktemp("recipes")
    class_folders(folder / "images", CLASSES, each=7, height=100, width=120)
    argv = ["convert", f"folder:{folder / 'images'}", str(folder / "all.beton"), "--quiet"]
    assert run(argv) == 0
    return folder


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stop_and_go_on(start: Train, out: Path, *argv: object) -> list[dict]:
    """Train, stop with SIGTERM after the first row of the log, go on to the end; return the log."""
    first = start(*argv, "--out", out)
    log, deadline = out / "log.jsonl", time.monotonic() + SECONDS
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        assert first.is_alive(), "ended before its first step"
        time.sleep(0.005)
    os.kill(first.pid or 0, signal.SIGTERM)
    first.join(SECONDS)
    assert first.exitcode == 75
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "stopped" and not (out / "model.safetensors").exists()
    before = rows_of(out)
    second = start(*argv, "--out", out)
    second.join(SECONDS)
    assert second.exitcode == 0
    rows = rows_of(out)
    assert rows[: len(before)] == before and len(rows) > len(before)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["bad_steps"] == 0 and row["loss"] > 0 for row in rows)
    return rows


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def trained(start: Train, place: Path) -> Path:
    """A run of imagenet-rn18-16-softmax that was stopped and went on."""
    out = place / "softmax"
    argv = ["imagenet-rn18-16-softmax", "--data", place / "all.beton", *TINY, *GROWING]
    rows = stop_and_go_on(start, out, *argv)
    assert len(rows) == 2 * 4
    return out


def test_softmax_ends_as_torchvisions_resnet18(trained: Path, torchvision) -> None:
    from torchvision.models import resnet18

    resnet18(num_classes=4).load_state_dict(weights(trained), strict=True)
    config = json.loads((trained / "config.json").read_text())
    assert config["run"]["blurpool"] and config["run"]["optim"]["decay"] == "ffcv"


@pytest.mark.slow  # three starts
def test_backmix_stopped_and_continued_has_the_bits_of_one_go(start: Train, place: Path) -> None:
    argv = ["imagenet-rn18-16-backmix", "--data", place / "all.beton", *TINY, *GROWING]
    argv += ["--method.patch", "48"]
    whole = start(*argv, "--out", place / "whole")
    rows = stop_and_go_on(start, place / "stopped", *argv)
    whole.join(SECONDS)
    assert whole.exitcode == 0
    assert fingerprint(place / "stopped") == fingerprint(place / "whole")
    assert all(row["mixed"] > 0 for row in rows if "mixed" in row)


def test_a_rejection_head_beside_a_trained_network(
    start: Train, place: Path, trained: Path
) -> None:
    argv = ["imagenet-ssod-head", "--data", place / "all.beton", "--init", trained, *TINY, *TUNING]
    argv += ["--model", "resnet18", "--blurpool"]
    rows = stop_and_go_on(start, place / "head", *argv)
    assert len(rows) == 2 * 4
    before, after = weights(trained), weights(place / "head")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    heads = place / "head" / "heads.safetensors"
    learned = safetensors.torch.load_file(heads) if heads.exists() else after
    assert learned["rejection.weight"].abs().sum() > 0


def test_ssod_joint_from_a_trained_network(start: Train, place: Path, trained: Path) -> None:
    argv = ["imagenet-finetune-ssod", "--data", place / "all.beton", "--init", trained]
    argv += [*TINY, *TUNING, "--model", "resnet18", "--blurpool"]
    argv += ["--method.gate-accuracy", "0"]
    rows = stop_and_go_on(start, place / "joint", *argv)
    assert rows[-1]["gate"] > 0
    before, after = weights(trained), weights(place / "joint")
    # A rate of 0.001 for eight steps: away from where it began, and not far.
    moved = (after["layer4.1.conv2.weight"] - before["layer4.1.conv2.weight"]).norm()
    assert 0 < moved < 0.1 * before["layer4.1.conv2.weight"].norm()


def test_backmix_from_a_checkpoint_file_of_another_library(
    start: Train, place: Path, torchvision
) -> None:
    """A torchvision state_dict of other classes: all but the class head is taken."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    given = resnet18(num_classes=10).state_dict()
    safetensors.torch.save_file(given, place / "resnet18.safetensors")
    argv = ["imagenet-finetune-backmix", "--data", place / "all.beton", *TINY, *TUNING]
    argv += ["--model", "resnet18", "--init", place / "resnet18.safetensors"]
    argv += ["--method.patch", "32"]
    rows = stop_and_go_on(start, place / "tuned", *argv)
    assert len(rows) == 2 * 4
    after = weights(place / "tuned")
    moved = (after["conv1.weight"] - given["conv1.weight"]).norm()
    assert 0 < moved < 0.1 * given["conv1.weight"].norm()
    assert len(after["fc.weight"]) == 4


@pytest.mark.slow  # ResNet-50, and checkpoints of 200 MB
def test_resnet50_with_ssod_on_mixes(start: Train, place: Path) -> None:
    argv = ["imagenet-rn50-88-backmix-ssod", "--data", place / "all.beton", *TINY, *GROWING]
    rows = stop_and_go_on(start, place / "rn50", *argv, "--method.patch", "48")
    assert len(rows) == 2 * 4
    assert {"gate", "known_share"} <= set(rows[-1])
    assert len(weights(place / "rn50")["fc.weight"]) == 4


@pytest.mark.slow  # timm is imported in each of two starts
def test_a_timm_checkpoint_is_tuned_in_timms_own_network(
    start: Train, place: Path, torchvision
) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: not run")
    torch.manual_seed(1)
    given = timm.create_model("resnet18", num_classes=10).state_dict()
    torch.save(given, place / "timm.pth")
    argv = ["imagenet-finetune-backmix", "--data", place / "all.beton", *TINY, *TUNING]
    argv += ["--model", "timm/resnet18", "--init", place / "timm.pth", "--method.patch", "32"]
    stop_and_go_on(start, place / "timm", *argv)
    network = timm.create_model("resnet18", num_classes=4)
    network.load_state_dict(weights(place / "timm"), strict=True)


def test_weights_of_a_network_that_blurs_are_for_networks_that_blur(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "imagenet-finetune-backmix", "--data", str(place / "all.beton")]
    argv += ["--init", str(trained), "--model", "resnet18", *TINY, *TUNING]
    argv += ["--method.patch", "32", "--out", str(place / "plain")]
    assert run(argv) == 1
    assert "was trained with --blurpool, this run is not" in capsys.readouterr().err
    assert not (place / "plain").exists()


def test_it_is_judged_as_ffcv_does(place: Path, trained: Path) -> None:
    argv = ["evaluate", str(trained), "--test", str(place / "all.beton"), "--device", "cpu"]
    assert run([*argv, "--size", "128", "--flip", "--quiet", "--threads", "1"]) == 0
    document = json.loads((trained / "metrics.json").read_text())
    assert document["views"] == {"size": 128, "flip": True}
    assert document["known"]["n"] == 28
