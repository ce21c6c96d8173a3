"""Every shell command of docs/ runs as it is printed, on small stand-ins for its data."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backmix.train.cli import run
from tests.images import class_folders, write_files
from tests.pipeline import test_sources_imagenet as imagenet
from tests.pipeline.test_sources import cifar10, tiny
from tests.pipeline.test_sources_mat import svhn
from tests.pipeline.test_sources_parquet import image_parquet
from tests.pipeline.test_sources_webdataset import shard
from tests.road.test_tour import SHORT, cifar10_binary

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```sh\n" in page.read_text()]

CHANGED = 3
"""What monitor may find, too."""
SHORTER = {"train": SHORT, "table": ["--options=" + " ".join(SHORT)]}
"""What is added to a command that would take long."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the pages name."""
    folder = tmp_path_factory.mktemp("stage")
    for name in ("photos", "scenes", "ILSVRC/train", "ILSVRC/val"):
        class_folders(folder / name)
    cifar10(folder / "both")
    (folder / "both" / "py").rename(folder / "cifar-10-batches-py")
    tiny(folder / "tiny-imagenet-200")
    svhn(folder / "svhn", "test")
    imagenet.lay_out(folder / "imagenet", "tars")
    pictures = class_folders(folder / "images_classic" / "tin", ["a b"])
    lines = "".join(f"tin/{name} {k}\n" for k, name in enumerate(pictures))
    write_files(folder, {"benchmark_imglist/cifar10/test_tin.txt": lines.encode()})
    for name in ("train-000", "train-001"):
        write_files(folder / "shards", {"readme": b"?"})
        shard(folder / "shards" / f"{name}.tar", 0)
        write_files(folder / "data", {"readme": b"?"})
        image_parquet(folder / "data" / f"{name}.parquet")
    cifar10_binary(folder / "cifar", per_file=80)  # a tenth of them suffices to calibrate
    for out, source in (("train", "cifar:cifar"), ("test", "cifar:cifar//test")):
        path = source.replace("cifar:", f"cifar:{folder}/")
        assert run(["convert", path, str(folder / f"{out}.beton"), "--quiet"]) == 0
    assert run(["convert", f"folder:{folder}/scenes", str(folder / "textures.beton")]) == 0
    train = ["train", "cifar10-backmix", "--data", str(folder / "train.beton"), *SHORT]
    assert run([*train, "--out", str(folder / "runs" / "backmix")]) == 0
    return folder


@pytest.mark.slow  # trains and evaluates a small network
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", programs)  # backmix inside a pipe
    here = tmp_path / "here"
    shutil.copytree(stage, here, symlinks=True)
    monkeypatch.chdir(here)
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
        names = re.findall(r"^backmix convert \S+ (\S+)", block, re.M)
        for name in names:  # stand-ins that the page makes itself
            Path(name).unlink(missing_ok=True)
        if "backmix train" in block:
            shutil.rmtree("runs")
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["backmix"]:
                code = run([*words[1:], *SHORTER.get(words[1], [])])
                assert code == 0 or (words[1], code) == ("monitor", CHANGED), line
            elif words:
                subprocess.run(line, shell=True, check=True)
