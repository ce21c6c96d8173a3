"""Conversions that are killed, starved of disk, or fed with damage leave nothing half done."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backmix.pipeline import convert as module
from backmix.pipeline.beton import open_beton
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
from tests.images import class_folders, jpeg, photograph, tar, write_files

PACKAGE = Path(module.__file__).parents[2]

# Converts with a pause after every image and says how far it is.
SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pathlib import Path
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions

def progress(done, total):
    print(done, flush=True)
    time.sleep(0.03)

try:
    convert(f"folder:{sys.argv[1]}", Path(sys.argv[2]), ConvertOptions(workers=2, force=True),
            progress=progress)
except KeyboardInterrupt as stop:
    print("stopped", stop, flush=True)
    sys.exit(130)
"""

# Is killed in front of the rename with that number: 0 the manifest's, 1 the file's.
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions

replace, numbers = os.replace, iter(range(9))

def killed(*names):
    if next(numbers) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

os.replace = killed
convert(f"folder:{sys.argv[1]}", Path(sys.argv[2]), ConvertOptions(workers=1, force=True))
"""

# A worker that dies by SIGKILL over one file, as the kernel kills when memory runs out.
DYING = """
import os, signal, sys
from backmix.pipeline import convert
store = convert.store
def die(item, *rest):
    if item.name == "dog/1.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return store(item, *rest)
convert.store = die
convert.work(*sys.argv[1:])
"""


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SLOWLY, str(folder), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE)},
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while (found := process.stdout.readline().strip()) != line:
        assert found, "the conversion ended early"


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_worker_that_is_killed_ends_the_run_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "set", each=30)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(module, "_WORKER", DYING)
    with pytest.raises(ChildProcessError, match=r"killed by SIGKILL while .*dog/1\.jpg"):
        convert(
            f"folder:{tmp_path}/set",
            tmp_path / "out" / "o.beton",
            ConvertOptions(workers=2, on_error="skip"),
        )
    assert names(tmp_path / "out") == []


def test_a_worker_that_cannot_start_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path / "set", each=1)
    monkeypatch.setattr(module, "_WORKER", "raise SystemExit(3)")
    with pytest.raises(ChildProcessError, match=r"ended with code 3 .*cat/0\.jpg"):
        convert(f"folder:{tmp_path}/set", tmp_path / "o.beton", ConvertOptions(workers=1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_removes_what_was_written(tmp_path: Path, number: int) -> None:
    class_folders(tmp_path / "set", each=40)
    (tmp_path / "out").mkdir()
    process = start(tmp_path / "set", tmp_path / "out" / "o.beton")
    wait_for(process, "7")
    assert len(names(tmp_path / "out")) == 2, "both part files are there"
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in output
    assert names(tmp_path / "out") == []


def test_a_killed_run_leaves_parts_only_and_the_next_one_removes_them(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=40)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "o.beton"
    process = start(tmp_path / "set", out)
    wait_for(process, "7")
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=60)
    assert names(out.parent) == [
        f"o.beton.jsonl.part-{process.pid}",
        f"o.beton.part-{process.pid}",
    ]
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their master"
        time.sleep(0.05)
    convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
    assert names(out.parent) == ["o.beton", "o.beton.jsonl"]


@pytest.mark.parametrize(("moment", "samples", "fits"), [(0, 2, True), (1, 2, False), (2, 8, True)])
def test_a_kill_between_the_two_names_is_seen_by_the_digest(
    tmp_path: Path, moment: int, samples: int, fits: bool
) -> None:
    class_folders(tmp_path / "old", each=1)
    class_folders(tmp_path / "new", each=4)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "o.beton"
    convert(f"folder:{tmp_path}/old", out, ConvertOptions(workers=1))
    ran = subprocess.run(
        [sys.executable, "-P", "-c", KILLED_AT, str(tmp_path / "new"), str(out), str(moment)],
        env=os.environ | {"PYTHONPATH": str(PACKAGE)},
        timeout=60,
    )
    assert ran.returncode == (0 if moment == 2 else -signal.SIGKILL)
    with open_beton(out) as data:
        assert data.n == samples
        assert (noted_digest(out) == data.digest) == fits
    convert(f"folder:{tmp_path}/new", out, ConvertOptions(workers=1, force=True))
    with open_beton(out) as data:
        assert noted_digest(out) == data.digest
    assert names(out.parent) == ["o.beton", "o.beton.jsonl"]


def noted_digest(out: Path) -> str:
    last = Path(f"{out}.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["total"]["digest"]


def test_a_failed_run_keeps_the_file_it_was_to_replace(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=2)
    out = tmp_path / "o.beton"
    convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
    before = out.read_bytes(), Path(f"{out}.jsonl").read_bytes()
    write_files(tmp_path / "set", {"dog/9.jpg": b"no image"})
    with pytest.raises(ValueError, match=r"dog/9\.jpg: not an image of a known format; --on-error"):
        convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1, force=True))
    assert (out.read_bytes(), Path(f"{out}.jsonl").read_bytes()) == before
    assert names(tmp_path) == ["o.beton", "o.beton.jsonl", "set"]


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=1)
    out = tmp_path / "o.beton"
    out.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"exists already.*--force"):
        convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
    assert out.read_bytes() == b"mine"
    convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1, force=True))
    with open_beton(out) as data:
        assert data.n == 2
    with pytest.raises(ValueError, match="is not a folder; create it first"):
        convert(f"folder:{tmp_path}/set", tmp_path / "no" / "o.beton", ConvertOptions())


def test_a_manifest_is_kept_without_force_unless_a_killed_run_left_it(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=1)
    out, manifest = tmp_path / "o.beton", tmp_path / "o.beton.jsonl"
    for mine in ("my notes\n", 9999 * "[", '{"a": 1}\n', "[1]\n", ""):
        manifest.write_text(mine)
        with pytest.raises(ValueError, match=r"o\.beton\.jsonl exists already.*--force"):
            convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
        assert manifest.read_text() == mine
    convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1, force=True))
    out.unlink()
    convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
    assert names(tmp_path) == ["o.beton", "o.beton.jsonl", "set"]


def test_a_name_that_cannot_be_written_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    missing = f"folder:{tmp_path}/nowhere"
    for name in ("a.beton", "b.beton.jsonl"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is a folder"):
            convert(missing, tmp_path / name.removesuffix(".jsonl"), ConvertOptions(force=True))
    with pytest.raises(OSError, match="File name too long"):
        convert(missing, tmp_path / (250 * "x"), ConvertOptions())


def test_the_tar_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    source = tar(tmp_path / "set.tar", {"a/0.jpg": jpeg()})
    before = source.read_bytes()
    (tmp_path / "o.beton").symlink_to(source)
    with pytest.raises(ValueError, match="is the source itself"):
        convert(f"tar:{source}", tmp_path / "o.beton", ConvertOptions(force=True))
    assert source.read_bytes() == before


def test_the_error_of_the_first_bad_image_wins_whatever_the_workers(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=30)
    write_files(tmp_path / "set", {"cat/20.jpg": b"", "cat/25.jpg": b"", "dog/0.jpg": b""})
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"cat/20\.jpg: the file is empty"):
            convert(f"folder:{tmp_path}/set", tmp_path / "o.beton", ConvertOptions(workers=workers))


def test_a_source_of_nothing_but_damage_writes_no_file(tmp_path: Path) -> None:
    write_files(tmp_path / "set", {"a/0.jpg": b"x", "a/1.png": b""})
    with pytest.raises(ValueError, match=r"none of the 2 images .* the first, a/0\.jpg"):
        convert(f"folder:{tmp_path}/set", tmp_path / "o.beton", ConvertOptions(on_error="skip"))
    assert names(tmp_path) == ["set"]


def test_a_file_that_vanishes_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "set", each=2)
    (tmp_path / "set" / "cat" / "5.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"cat/5\.jpg: .*No such file"):
        convert(f"folder:{tmp_path}/set", tmp_path / "o.beton", ConvertOptions(workers=1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here: not run")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path, small_disk: Path) -> None:
    large = {f"a/{i}.jpg": jpeg(photograph(i, 700, 700), quality=100) for i in range(6)}
    write_files(tmp_path / "set", large)
    assert sum(map(len, large.values())) > 2**20
    out = small_disk / "o.beton"
    with pytest.raises(OSError, match=r"o\.beton.*No space left") as caught:
        convert(f"folder:{tmp_path}/set", out, ConvertOptions(workers=1))
    assert "nothing was left behind" in str(caught.value)
    assert names(small_disk) == []


LIMITED = """
import resource, sys
from pathlib import Path
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    convert(f"folder:{sys.argv[1]}", Path(sys.argv[2]), ConvertOptions(workers=1))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [1 << 10, 1 << 21, 3 << 20, (4 << 20) + 10])
def test_a_refused_write_anywhere_leaves_nothing(tmp_path: Path, limit: int) -> None:
    # Two pages of 2 MiB and the tables: the limits fall into the head, at the first image,
    # between images, and into the tables at the end.
    class_folders(tmp_path / "set", each=40)
    (tmp_path / "out").mkdir()
    script = [sys.executable, "-P", "-c", LIMITED, str(tmp_path / "set")]
    ran = subprocess.run(
        [*script, str(tmp_path / "out" / "o.beton"), str(limit)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE)},
        timeout=60,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    assert os.strerror(errno.EFBIG) in ran.stdout
    assert names(tmp_path / "out") == []
