"""Bad input through the command line: one message that says what and where, no traceback."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backmix.train.cli import run
from tests.images import class_folders, jpeg, photograph, write_files
from tests.runs import tiny_set

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--epochs", "1", "--model", "classifier32-quarter", "--loader.batch", "8", "--quiet"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; returns its one message."""

    def check(*argv: object, code: int = 1) -> str:
        assert run([str(word) for word in argv]) == code
        said = capsys.readouterr().err.strip()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in said, said
        return lines[0]

    return check


def test_a_folder_without_images(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    said = refused("convert", f"folder:{tmp_path / 'empty'}", tmp_path / "x.beton", "--quiet")
    assert str(tmp_path / "empty") in said and "no image" in said
    assert not list(tmp_path.glob("x.beton*"))


def test_a_file_that_is_no_image_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    class_folders(tmp_path / "images")
    (tmp_path / "images" / "cat" / "bad.jpg").write_text("no image")
    said = refused("convert", f"folder:{tmp_path / 'images'}", tmp_path / "x.beton", "--quiet")
    assert "cat/bad.jpg" in said and "--on-error skip" in said
    assert not list(tmp_path.glob("x.beton*"))


def test_a_truncated_jpeg_is_named_or_left_out(
    tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = jpeg(photograph(0))
    write_files(tmp_path / "images", {"cat/a.jpg": whole, "cat/b.jpg": whole[: len(whole) // 2]})
    argv = ["convert", f"folder:{tmp_path / 'images'}", str(tmp_path / "x.beton"), "--quiet"]
    assert "cat/b.jpg" in refused(*argv)
    assert run([*argv, "--on-error", "skip"]) == 0
    assert "left out 1" in capsys.readouterr().out


def test_classes_with_one_image_are_fine(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", each=1)
    data = str(tmp_path / "x.beton")
    assert run(["convert", f"folder:{tmp_path / 'images'}", data, "--quiet"]) == 0
    argv = ["train", "demo-backmix", "--data", data, "--out", str(tmp_path / "run"), *TRAIN]
    assert run(argv) == 0


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_file(tmp_path: Path, refused: Callable[..., str], share: float) -> None:
    path = tiny_set(tmp_path / "x.beton")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for argv in (
        ["inspect", path],
        ["train", "demo-softmax", "--data", path, "--out", tmp_path / "r"],
    ):
        assert str(path) in refused(*argv)


@pytest.mark.parametrize("byte", [0, 2, 5, 9, 17, 30, 1500, 2110, 2120, -5, -20, -2000])
def test_a_flipped_byte_in_header_or_tables(
    tmp_path: Path, refused: Callable[..., str], byte: int
) -> None:
    path = tiny_set(tmp_path / "x.beton")
    content = bytearray(path.read_bytes())
    content[byte] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in refused("inspect", path)


def test_a_class_list_that_names_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tiny_set(tmp_path / "x.beton")
    argv = [
        "train",
        "demo-softmax",
        "--data",
        path,
        "--out",
        tmp_path / "r",
        "--split.known",
        "zebra",
    ]
    assert "zebra" in refused(*argv)
    class_folders(tmp_path / "images")
    (tmp_path / "list").write_text("lion\ntiger\n")
    argv = ["convert", f"folder:{tmp_path / 'images'}", tmp_path / "y.beton"]
    assert "cat" in refused(*argv, "--classes", tmp_path / "list", "--quiet")


def test_a_run_folder_of_another_configuration(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tiny_set(tmp_path / "x.beton")
    argv = ["train", "demo-softmax", "--data", str(path), "--out", str(tmp_path / "r"), *TRAIN]
    assert run(argv) == 0
    said = refused(*argv, "--optim.lr", "0.3")
    assert "optim.lr was 0.1, is 0.3" in said
    said = refused("train", "demo-backmix", *argv[2:])
    assert "method was Softmax, is BackMix. Choose" in said


def test_evaluating_what_is_not_finished_or_does_not_fit(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tiny_set(tmp_path / "x.beton")
    argv = ["train", "demo-softmax", "--data", str(path), "--out", str(tmp_path / "r"), *TRAIN]
    assert run(argv) == 0
    other = tmp_path / "other.beton"
    class_folders(tmp_path / "images")
    assert run(["convert", f"folder:{tmp_path / 'images'}", str(other), "--quiet"]) == 0
    assert "lacks the known classes a, b" in refused("evaluate", tmp_path / "r", "--test", other)
    (tmp_path / "r" / "model.safetensors").unlink()
    assert "not finished" in refused("evaluate", tmp_path / "r", "--test", path)
    assert "has not been evaluated" in refused("report", tmp_path / "r")


def test_a_full_disk_in_training_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the full disk."""
    path = tiny_set(tmp_path / "x.beton")
    argv = ["train", "demo-backmix", "--data", str(path), "--out", str(tmp_path / "r"), *TRAIN]

    def limited(size: int) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return subprocess.run(
            [sys.executable, "-m", "backmix", *argv, "--save-steps", "2"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"},
            preexec_fn=limit if size else None,
            capture_output=True,
            text=True,
            timeout=110,
        )

    failed = limited(100_000)
    assert failed.returncode == 1
    assert "bytes needed" in failed.stderr and "Traceback" not in failed.stderr
    assert not list((tmp_path / "r" / "checkpoints").glob("*"))
    assert limited(0).returncode == 0
