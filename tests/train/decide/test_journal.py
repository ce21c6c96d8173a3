"""The journal of a prediction: what is kept, what is cut off, who may go on."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backmix.train.decide import journal as module
from backmix.train.decide.decision import Decision, failed
from backmix.train.decide.journal import Journal

ENDS = np.array([4, 8, 11, 15])
BELONGS: dict[str, Any] = {"record": "r", "images": "i", "batch": 4, "limit_pixels": 9}


def text(i: int) -> str:
    return f"a, {i}\n.png"


def rows(first: int, end: int) -> list[dict]:
    found = []
    for i in range(first, end):
        one = Decision("accept", "cat", 0.1 * i, i / 3, 1e-300, 0.5)
        found.append((failed(f"no image {i}") if i % 5 == 3 else one).row(text(i)))
    return found


def opened(out: Path, **changes: Any) -> Journal:
    return Journal(out, {**BELONGS, **changes}, ENDS, text)


def filled(out: Path, batches: int) -> bytes:
    with opened(out) as journal:
        first = 0
        for end in ENDS[:batches].tolist():
            journal.append(rows(first, end))
            first = end
    return (out.parent / f"{out.name}.part").read_bytes()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    filled(tmp_path / "o.csv", 2)
    with opened(tmp_path / "o.csv") as journal:
        assert journal.rows == 8
        journal.append(rows(8, 11))
        assert list(journal.read()) == rows(0, 11)
        journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_reason_with_a_path_that_is_no_utf8_can_be_written(tmp_path: Path) -> None:
    with opened(tmp_path / "o.csv") as journal:
        journal.append([failed("caf\udce9.tar ends before byte 9").row("a")])
        assert next(journal.read())["reason"] == r"caf\udce9.tar ends before byte 9"


def test_cut_anywhere_whole_batches_are_kept(tmp_path: Path) -> None:
    whole = filled(tmp_path / "o.csv", 3)
    part, note = tmp_path / "o.csv.part", tmp_path / "o.csv.part.json"
    belongs = note.read_bytes()
    lines = whole.splitlines(keepends=True)
    sizes = [sum(map(len, lines[:end])) for end in (0, 4, 8, 11)]
    for length in [*range(0, len(whole), 37), *sizes, *(size - 1 for size in sizes[1:])]:
        part.write_bytes(whole[:length])
        note.write_bytes(belongs)
        with opened(tmp_path / "o.csv") as journal:
            assert journal.rows == max(
                end for end, size in zip((0, 4, 8, 11), sizes, strict=True) if size <= length
            )
            assert list(journal.read()) == rows(0, journal.rows)
            journal.append([])  # keeps the length
            assert part.stat().st_size == sizes[[0, 4, 8, 11].index(journal.rows)]


def damaged(whole: bytes, kind: str) -> bytes:
    lines = whole.splitlines(keepends=True)
    start = sum(map(len, lines[:6]))
    match kind:
        case "zeros":  # as a file system leaves them that lost power
            return whole[:start] + bytes(len(whole) - start)
        case "another":
            return b"".join([*lines[:6], lines[7], *lines[7:]])
        case "twice":
            return b"".join([*lines[:6], *lines[5:]])
        case "text":
            return whole[:start] + b"\xff" + whole[start + 1 :]
        case _:
            return whole + lines[0]


@pytest.mark.parametrize(
    ("kind", "kept"), [("zeros", 4), ("another", 4), ("twice", 4), ("text", 4), ("more", 15)]
)
def test_rows_behind_damage_are_done_again(tmp_path: Path, kind: str, kept: int) -> None:
    whole = filled(tmp_path / "o.csv", 4)
    (tmp_path / "o.csv.part").write_bytes(damaged(whole, kind))
    with opened(tmp_path / "o.csv") as journal:
        assert journal.rows == kept
        assert list(journal.read()) == rows(0, kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"record": "s"}, "another threshold:"),
        ({"images": "j"}, "another list of images:"),
        ({"batch": 5, "limit_pixels": 8}, "another --batch and another --limit-pixels:"),
    ],
)
def test_rows_of_something_else_are_refused_and_kept(tmp_path: Path, changes, words) -> None:
    whole = filled(tmp_path / "o.csv", 2)
    with pytest.raises(ValueError, match=f"of {words} delete .*o.csv.part, or choose another -o"):
        opened(tmp_path / "o.csv", **changes)
    assert (tmp_path / "o.csv.part").read_bytes() == whole
    with opened(tmp_path / "o.csv") as journal:
        assert journal.rows == 8


def test_rows_without_a_note_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "o.csv", 2)
    for content in (None, b"", b"[1]", b'{"schema": 1}'):
        note = tmp_path / "o.csv.part.json"
        note.unlink() if content is None else note.write_bytes(content)
        with pytest.raises(ValueError, match="of something else"):
            opened(tmp_path / "o.csv")


def test_killed_between_the_two_files_it_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "o.csv.part").touch()
    with opened(tmp_path / "o.csv") as journal:
        journal.append(rows(0, 4))
    (tmp_path / "o.csv.part").unlink()
    with opened(tmp_path / "o.csv", record="s") as journal:
        assert journal.rows == 0
    assert not list(tmp_path.iterdir())  # nothing was done, so nothing is left


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "o.csv") as journal:
        journal.append(rows(0, 4))
        with pytest.raises(ValueError, match="being written by another process"):
            opened(tmp_path / "o.csv")
        with opened(tmp_path / "p.csv"):
            pass
    with opened(tmp_path / "o.csv") as journal:
        assert journal.rows == 4


def test_removing_takes_nothing_from_the_next_writer(tmp_path: Path, monkeypatch) -> None:
    real, following = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok=missing_ok)
        if path.suffix == ".part":
            following.append(opened(tmp_path / "o.csv"))

    with opened(tmp_path / "o.csv") as journal:
        journal.append(rows(0, 4))
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            journal.remove()
    with following[0]:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv.part", "o.csv.part.json"]


def test_a_full_disk_keeps_whole_batches(tmp_path: Path, monkeypatch) -> None:
    real = os.pwrite
    length = len(filled(tmp_path / "o.csv", 1))
    for fail in (True, False):  # an error, and a write that is cut short
        with opened(tmp_path / "o.csv") as journal:

            def pwrite(descriptor: int, data: bytes, offset: int, fail: bool = fail) -> int:
                if fail:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(descriptor, data[: len(data) // 2], offset)

            monkeypatch.setattr(os, "pwrite", pwrite)
            with pytest.raises(OSError, match=r"o.csv.part: No space.*4 rows are kept"):
                journal.append(rows(4, 8))
            assert list(journal.read()) == rows(0, 4)
            assert journal.path.stat().st_size == length  # the half of a batch takes no room
            monkeypatch.undo()
    with opened(tmp_path / "o.csv") as journal:
        assert journal.rows == 4
        journal.append(rows(4, 8))
        assert list(journal.read()) == rows(0, 8)


def test_rows_reach_the_disk_about_once_a_second(tmp_path: Path, monkeypatch) -> None:
    now, synced = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with opened(tmp_path / "o.csv") as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now[0]))
        for first, end, now[0] in ((0, 4, 0.4), (4, 8, 1.1), (8, 11, 1.9), (11, 15, 2.2)):
            journal.append(rows(first, end))
        monkeypatch.undo()
    assert synced == [1.1, 2.2]
