"""The command line starts at once, and a user's mistake is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from backmix.train.cli import COMMANDS, run
from backmix.train.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *[[name, "--help"] for name in COMMANDS],
        ["train", "cifar10-backmix", "--help"],
    ],
    ids=" ".join,
)
def test_help_is_instant(argv: list[str]) -> None:
    code = (
        "import sys\nfrom backmix.train.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        "print('HEAVY', {'torch', 'numpy', 'triton', 'sklearn', 'matplotlib', 'ffcv', 'PIL'}"
        " & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert out.stdout.strip().endswith("HEAVY set()"), out.stdout[-300:]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_complete_run(name: str) -> None:
    from dataclasses import replace

    from backmix.train.check import check

    complete = replace(RECIPES[name](), data=(Path("x.beton"),), out=Path("run"))
    if name == "imagenet-ssod-head":
        complete = replace(complete, init=Path("trained"))
    check(complete)
    assert complete.epochs > 0 and complete.loader.batch % 2 == 0


@pytest.mark.parametrize(
    ("argv", "code", "hint"),
    [
        (["trian"], 2, "did you mean train"),
        ([], 2, ""),
        (["inspect", "/nowhere.beton"], 1, "/nowhere.beton"),
        (["status", "/nowhere"], 2, "no status.json"),
        (["report", "/nowhere"], 1, "/nowhere"),
        (["evaluate", "/nowhere"], 1, "/nowhere"),
        (["convert", "folder:/nowhere", "/tmp/never.beton"], 1, "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    argv: list[str], code: int, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == code
    said = capsys.readouterr().err
    assert hint in said and "Traceback" not in said
    assert len(said.strip().splitlines()) <= 1


def test_a_misspelt_option_is_answered_with_the_right_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", "cifar10-backmix", "--data", "x", "--out", "y", "--method.ptach", "3"]
    with pytest.raises(SystemExit) as stopped:
        run(argv)
    assert stopped.value.code == 2
    assert "--method.patch" in capsys.readouterr().err
