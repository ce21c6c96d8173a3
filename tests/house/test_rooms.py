"""The house keeps its plan: rooms, links, imports, packaging."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "kernels", "train")
MAY_IMPORT = {"pipeline": {"pipeline", "kernels"}, "kernels": {"kernels"}, "train": set(ROOMS)}
SOURCES = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
WITHOUT_TORCH = {
    "pipeline": {
        "beton.py",
        "writer.py",
        "order.py",
        "draws.py",
        "subset.py",
        "options.py",
    },
    "train": {"cli.py", "options.py", "recipes.py"},
}
TOP = {"pipeline", "kernels", "train", "tests", "bench", "docs", "src", ".ci"}


def imported(path: Path, *, top_level_only: bool = False) -> list[str]:
    """Full names of all modules that a file imports, inside functions too unless told otherwise."""
    tree = ast.parse(path.read_text())
    names: list[str] = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += ["." * node.level + (node.module or "")]
    return names


@pytest.mark.parametrize(("room", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_a_room_imports_only_what_it_may(room: str, path: Path) -> None:
    for name in imported(path):
        first, *rest = name.split(".")
        assert first not in (*ROOMS, ""), f"{path}: write backmix.{name.lstrip('.')}, not {name}"
        if first == "backmix" and rest:
            assert rest[0] in MAY_IMPORT[room], f"{path}: {room} may not import {name}"


@pytest.mark.parametrize(
    "path",
    [ROOT / room / name for room, names in WITHOUT_TORCH.items() for name in sorted(names)],
    ids=lambda path: path.name,
)
def test_what_must_start_fast_imports_no_torch(path: Path) -> None:
    heavy = {"torch", "triton", "sklearn", "matplotlib", "ffcv", "simplejpeg", "PIL"}
    found = {name.split(".")[0] for name in imported(path, top_level_only=True)} & heavy
    assert not found, f"{path} imports {found} when it is imported"


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_hangs_in_the_package_as_a_link(room: str) -> None:
    link = ROOT / "src" / "backmix" / room
    assert link.is_symlink() and link.resolve() == ROOT / room


def test_the_name_plate_holds_nothing_else() -> None:
    held = {path.name for path in (ROOT / "src" / "backmix").iterdir()} - {"__pycache__"}
    assert held == {"__init__.py", "__main__.py", "py.typed", *ROOMS}


def test_the_top_level_is_the_floor_plan() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    folders = {name.split("/")[0] for name in listed if "/" in name}
    assert folders <= TOP, f"not in the floor plan: {folders - TOP}"


def test_public_names_resolve_and_are_documented() -> None:
    code = (
        "import backmix\n"
        "for name in backmix.__all__:\n"
        "    assert (getattr(backmix, name).__doc__ or '').strip(), name\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": str(ROOT / "src")}
    )


def test_the_wheel_holds_every_file_of_the_rooms(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    tracked = [name for name in listed if (ROOT / name).exists() and name]
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    code = "import setuptools.build_meta as b; print(b.build_wheel('out'))"
    (clone / "out").mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=clone,
        check=True,
        capture_output=True,
        timeout=100,
    )
    with zipfile.ZipFile(next((clone / "out").glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    wanted = {f"backmix/{name}" for name in tracked if name.split("/")[0] in ROOMS and "." in name}
    assert wanted <= packed, f"missing in the wheel: {sorted(wanted - packed)}"
    assert {"backmix/__init__.py", "backmix/__main__.py", "backmix/py.typed"} <= packed
