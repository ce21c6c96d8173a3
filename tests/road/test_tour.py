"""The README's tour, run as it is printed: on small data of CIFAR-10's form, and one epoch long."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--epochs", "1", "--model", "classifier32-quarter", "--quiet"]
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar10_binary(folder: Path, per_file: int = 40) -> None:
    """Write random pictures in the form of CIFAR-10's binary version."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(per_file) % 10
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n")


def backmix(*words: str, cwd: Path, code: int = 0) -> str:
    """Run a command as a user does; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "backmix", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def tour() -> list[list[str]]:
    """The commands of the README's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.slow  # seven starts of Python with torch
@pytest.mark.timeout(400)
def test_the_tour_of_the_readme_works(tmp_path: Path) -> None:
    cifar10_binary(tmp_path / "cifar-10-batches-bin")
    commands = tour()
    assert [words[1] for words in commands] == [
        *("convert", "convert", "train", "train", "evaluate", "evaluate", "report")
    ]
    for program, *words in commands:
        assert program == "backmix"
        backmix(*words, *(SHORT if words[0] == "train" else []), cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "backmix" / "metrics.json").read_text())
    assert metrics["split"] == {"protocol": "cifar10", "family": "A", "list": 0}
    assert metrics["classes"] == ["airplane", "frog", "deer", "truck", "automobile", "horse"]
    assert metrics["known"]["n"] == 24 and metrics["unknown"]["unknown"]["n"] == 16
    page = (tmp_path / "report.html").read_text()
    assert (
        "BackMix" in page
        and "<svg" in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )


@pytest.mark.slow  # five starts of Python with torch
def test_a_folder_of_images_goes_the_whole_road(tmp_path: Path) -> None:
    """Class folders, random crops, a preview, a look at how the run stands, a verified file."""
    from tests.images import class_folders

    class_folders(tmp_path / "images", classes=("cat", "dog", "owl"), each=12)
    out = backmix("convert", "folder:images", "all.beton", "--quiet", cwd=tmp_path)
    assert "36" in out
    assert "every sample verified" in backmix("inspect", "all.beton", "--verify", cwd=tmp_path)
    backmix("preview", "all.beton", "-o", "grid.png", cwd=tmp_path)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    names = json.loads((tmp_path / "all.beton.jsonl").read_text().splitlines()[0])["class"]
    train = ["train", "imagenet-rn18-16-backmix", "--data", "all.beton", "--out", "run"]
    train += [
        "--epochs",
        "2",
        "--loader.size",
        "96",
        "--loader.grow-from",
        "64",
        "--loader.grow",
        "0",
        "1",
        "--loader.batch",
        "12",
        "--method.patch",
        "32",
    ]
    backmix(*train, "--quiet", "--save-steps", "1", cwd=tmp_path)
    assert "finished" in backmix("status", "run", cwd=tmp_path)
    assert names in json.loads((tmp_path / "run" / "config.json").read_text())["classes"]
