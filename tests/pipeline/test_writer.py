"""The writer: the layout by a second reading with `struct`, and all or nothing at every fault."""

import errno
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import xxhash

from backmix.pipeline import writer as writer_module
from backmix.pipeline.beton import JPG, RAW, Flag, open_beton
from backmix.pipeline.writer import Record, Writer, page_size_for

PAGE = 1 << 21


def raw_record(h: int, w: int, label: int = 0, name: str = "a/x.png") -> Record:
    pixels = np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, 3), np.uint8)
    return Record(pixels, RAW, h, w, label, 0, name)


def jpeg_record(h: int, w: int, label: int = 0, name: str = "a/x.jpg") -> Record:
    pixels = np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, 3), np.uint8)
    return Record(simplejpeg.encode_jpeg(pixels), JPG, h, w, label, int(Flag.HARDWARE), name)


def write(path: Path, records: list[Record], samples: int | None = None, **changes) -> Path:
    arguments = {"page_size": PAGE, "classes": ["a", "b"], "options": {"mode": "auto"}} | changes
    with Writer(path, samples=samples or len(records), **arguments) as writer:
        for record in records:
            writer.append(record)
    return path


def mixed_records() -> list[Record]:
    return [raw_record(9, 7), jpeg_record(24, 32, 1), raw_record(5, 3, 1), jpeg_record(8, 8)]


def test_the_layout_is_the_documented_one(tmp_path):
    """Read the file by `struct` and the numbers of docs/format.md, not by our own dtypes."""
    records = mixed_records()
    data = write(tmp_path / "x.beton", records).read_bytes()
    version, fields, page_size, n, table_start = struct.unpack_from("<HHIQQ", data, 0)
    assert (version, fields, page_size, n) == (2, 2, PAGE, 4)
    assert data[24] == 2 and data[25:41] == b"image".ljust(16, b"\0")
    assert data[1065] == 1 and data[1066:1082] == b"label".ljust(16, b"\0")
    assert not any(data[41 + 40 : 1065]) and not any(data[1082:2106])
    end = PAGE  # the images lie side by side from the first page on
    for k, record in enumerate(records):
        mode, width, height, pointer = struct.unpack_from("<BHHQ", data, 2106 + 24 * k)
        (label,) = struct.unpack_from("<q", data, 2106 + 24 * k + 16)
        assert (mode, width, height) == (record.mode, record.width, record.height)
        assert (label, pointer) == (record.label, end)
        row = struct.unpack_from("<QQQ", data, table_start + 24 * k)
        stored = bytes(memoryview(record.data).cast("B"))
        assert row == (k, end, len(stored))
        assert data[end : end + len(stored)] == stored
        end += len(stored)
    assert len(data) == table_start + 24 * 4
    assert not any(data[2106 + 24 * 4 : PAGE]) and not any(data[end : 2 * PAGE])


def test_the_extension_is_the_documented_one(tmp_path):
    records = mixed_records()
    data = write(tmp_path / "x.beton", records).read_bytes()
    table_start = struct.unpack_from("<Q", data, 16)[0]
    magic, start, length, body_hash, own_hash = struct.unpack_from("<8sQQQQ", data, 41)
    assert magic == b"BMIXEXT1"
    assert own_hash == xxhash.xxh3_64_intdigest(data[41:73])
    assert (start, start + length) == (2 * PAGE, table_start)
    body = data[start : start + length]
    assert body_hash == xxhash.xxh3_64_intdigest(body)
    assert struct.unpack_from("<8sII", body, 0) == (b"BMIXEXT1", 1, 7)
    tables = {}
    for k in range(7):
        name, code, count, offset, checksum = struct.unpack_from("<16s8sQQQ", body, 16 + 48 * k)
        size = {b"<u8": 8, b"<u4": 4, b"|u1": 1}[code.rstrip(b"\0")]
        table = body[offset : offset + size * count]
        assert offset % 64 == 0 and checksum == xxhash.xxh3_64_intdigest(table)
        tables[name.rstrip(b"\0").decode()] = table
    stored = [bytes(memoryview(record.data).cast("B")) for record in records]
    hashes = [xxhash.xxh3_64_intdigest(image) for image in stored]
    assert struct.unpack("<4Q", tables["sample_hash"]) == tuple(hashes)
    assert struct.unpack("<4Q", tables["size"]) == tuple(len(image) for image in stored)
    assert struct.unpack("<4I", tables["flags"]) == tuple(record.flags for record in records)
    assert struct.unpack("<Q", tables["page_hash"])[0] == xxhash.xxh3_64_intdigest(
        data[PAGE : 2 * PAGE]
    )
    head = data[:41] + bytes(40) + data[81:2106]
    parts = (head, data[2106 : 2106 + 24 * 4], data[table_start:])
    expected = tuple(xxhash.xxh3_64_intdigest(part) for part in parts)
    assert struct.unpack("<3Q", tables["head_hash"]) == expected
    note = json.loads(tables["json"])
    assert note["classes"] == ["a", "b"] and note["options"] == {"mode": "auto"}
    assert struct.unpack_from("<5Q", tables["names"]) == (0, 7, 14, 21, 28)
    assert tables["names"][40:] == b"a/x.pnga/x.jpga/x.pnga/x.jpg"


def test_a_sample_that_does_not_fit_starts_the_next_page(tmp_path):
    # Three of 699,000 bytes fit 2 MiB, 152 bytes are left over; the fifth fills its page alone.
    sides = [(466, 500)] * 3 + [(200, 100), (590, 1183), (1, 1)]
    path = write(tmp_path / "x.beton", [raw_record(h, w) for h, w in sides])
    with open_beton(path) as data:
        first, end, pointers = PAGE, 0, []
        for h, w in sides:
            size = 3 * h * w
            if end + size > PAGE:
                first, end = first + PAGE, 0
            pointers.append(first + end)
            end += size
        assert data.pointers.tolist() == pointers
        assert sorted(set(data.pages.tolist())) == [1, 2, 3]
        assert data.page_hashes is not None and list(data.damaged_pages()) == []


def test_a_sample_may_fill_a_page_to_the_last_byte(tmp_path):
    full = Record(bytes(range(256)) * (PAGE // 256), JPG, 9, 9, 0, 0, "full.jpg")
    path = write(tmp_path / "x.beton", [full, raw_record(2, 2)])
    with open_beton(path) as data:
        assert data.pointers.tolist() == [PAGE, 2 * PAGE]
        assert bytes(data.region(0)) == full.data


def test_the_same_samples_give_the_same_bytes(tmp_path):
    (tmp_path / "other").mkdir()
    one = write(tmp_path / "x.beton", mixed_records()).read_bytes()
    other = write(tmp_path / "other" / "y.beton", mixed_records()).read_bytes()
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


def test_fewer_samples_than_announced_leave_the_images_where_they_were(tmp_path):
    records = mixed_records()
    announced = PAGE // 24  # so many that the metadata reaches into a second page
    with open_beton(write(tmp_path / "x.beton", records, samples=announced)) as data:
        assert data.n == 4
        assert data.pointers[0] == 2 * PAGE
        assert [data.name(i) for i in range(4)] == [record.name for record in records]


def test_nothing_is_under_the_name_before_the_end(tmp_path):
    path = tmp_path / "x.beton"
    with Writer(path, samples=1, page_size=PAGE, classes=["a"], options={}) as writer:
        writer.append(raw_record(4, 4))
        assert [p.name for p in tmp_path.iterdir()] == [f"x.beton.part-{os.getpid()}"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_an_exception_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(error),
        Writer(
            tmp_path / "x.beton", samples=2, page_size=PAGE, classes=["a"], options={}
        ) as writer,
    ):
        writer.append(raw_record(4, 4))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_no_samples_at_all_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no sample was stored"):
        write(tmp_path / "x.beton", [], samples=3)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"exists already.*--force"):
        write(path, mixed_records())
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "x.beton"
    with (
        pytest.raises(ValueError, match="exists already"),
        Writer(path, samples=1, page_size=PAGE, classes=["a"], options={}) as writer,
    ):
        writer.append(raw_record(4, 4))
        path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_kept_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "x.beton"
    with pytest.raises(ValueError, match="exists already"):
        with Writer(path, samples=1, page_size=PAGE, classes=["a"], options={}) as writer:
            writer.append(raw_record(4, 4))
            path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's"
    path.unlink()
    write(path, mixed_records())
    with open_beton(path) as data:
        assert data.n == 4


def test_force_replaces_at_the_end_and_only_then(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with Writer(
            path, samples=1, page_size=PAGE, classes=["a"], options={}, force=True
        ) as writer:
            writer.append(raw_record(4, 4))
            assert path.read_bytes() == b"old"
            raise RuntimeError
    assert path.read_bytes() == b"old"
    write(path, mixed_records(), force=True)
    with open_beton(path) as data:
        assert data.n == 4


def test_a_folder_under_the_name_is_refused(tmp_path):
    (tmp_path / "x.beton").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write(tmp_path / "x.beton", mixed_records(), force=True)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write(tmp_path / "nowhere" / "x.beton", mixed_records())


def test_part_files_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    path = tmp_path / "x.beton"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = tmp_path / f"x.beton.part-{child.pid}"
    living = tmp_path / f"x.beton.part-{os.getppid()}"
    foreign = [tmp_path / name for name in ("y.beton.part-1", "x.beton.part-old", "x.beton.part-")]
    for part in (dead, living, *foreign):
        part.write_bytes(b"")
    write(path, mixed_records())
    assert not dead.exists()
    assert living.exists() and all(part.exists() for part in foreign)


def test_a_part_file_of_an_earlier_process_with_our_number_is_in_nobodys_way(tmp_path):
    (tmp_path / f"x.beton.part-{os.getpid()}").write_bytes(b"from before the container restarted")
    write(tmp_path / "x.beton", mixed_records())
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]


def test_two_writers_of_one_name_never_publish_a_half_file(tmp_path):
    arguments = {"samples": 1, "page_size": PAGE, "classes": ["a"], "options": {}}
    first = Writer(tmp_path / "x.beton", **arguments)
    first.append(raw_record(4, 4))
    second = Writer(tmp_path / "x.beton", **arguments)
    with pytest.raises(ValueError, match="another run"):
        first.close()
    assert not (tmp_path / "x.beton").exists()
    second.abort()


def test_a_killed_writer_leaves_its_part_file_only_and_the_next_one_cleans_up(tmp_path):
    code = (
        "import sys, time; from backmix.pipeline.writer import *\n"
        f"w = Writer(sys.argv[1], samples=9, page_size={PAGE}, classes=['a'], options={{}})\n"
        "w.append(Record(bytes(48), 1, 4, 4, 0, 0, 'x'))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    path = tmp_path / "x.beton"
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [p.name for p in tmp_path.iterdir()] == [f"x.beton.part-{child.pid}"]
    write(path, mixed_records())
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "backmix-test", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command: not run")
    if done.returncode:
        pytest.skip("no permission to mount a small file system: not run")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing(small_disk):
    records = [raw_record(500, 1000, name=f"{k}.png") for k in range(9)]
    with pytest.raises(OSError, match=r"x\.beton: No space left on device after \d of 9") as caught:
        write(small_disk / "x.beton", records)
    assert caught.value.errno == errno.ENOSPC
    assert "bytes are free" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_in_the_last_step_leaves_nothing(small_disk):
    # The page fits the 3 MiB, the extension block with these names does not.
    records = [raw_record(1, 1, name=f"{k}".ljust(4000, "x")) for k in range(400)]
    with pytest.raises(OSError, match="No space left on device after 400 of 400"):
        write(small_disk / "x.beton", records)
    assert list(small_disk.iterdir()) == []


def test_a_limit_of_the_file_size_is_named_and_leaves_nothing(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, old[1]))
    try:
        with pytest.raises(OSError, match="File too large after"):
            write(tmp_path / "x.beton", [raw_record(500, 1000) for _ in range(9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fail_at", range(1, 31))
def test_a_system_call_that_fails_leaves_the_old_file_or_the_new_one(
    tmp_path, monkeypatch, fail_at
):
    """Fail at the N-th call, for every N that there is."""
    calls = 0

    def failing(real):
        def call(*arguments, **names):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **names)

        return call

    path = tmp_path / "x.beton"
    old = write(path, mixed_records()[:1]).read_bytes()
    new = write(tmp_path / "new", mixed_records()).read_bytes()
    (tmp_path / "new").unlink()
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "open", "stat", "fstat"):
            patch.setattr(os, name, failing(getattr(os, name)))
        real_open = open

        def open_failing(*arguments, **names):
            file = real_open(*arguments, **names)
            return _Failing(file, failing)

        patch.setattr(writer_module, "open", open_failing, raising=False)
        try:
            write(path, mixed_records(), force=True)
        except OSError as error:
            assert "Input/output error" in str(error)
            failed = True
        else:
            failed = False
    found = path.read_bytes()
    assert found in (old, new) and [p.name for p in tmp_path.iterdir()] == ["x.beton"]
    if not failed:
        assert found == new and calls < fail_at
    assert not failed or fail_at < 30, "there are more calls than are made to fail here"


class _Failing:
    """A file whose writes, seeks and flushes are counted and may fail."""

    def __init__(self, file, failing):
        self.file = file
        self.write, self.seek, self.flush = (
            failing(call) for call in (file.write, file.seek, file.flush)
        )

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": b"", "mode": JPG}, "has 0 bytes"),
        ({"data": bytes(47)}, "of 4 x 4 pixels has 47 bytes"),
        ({"mode": 2}, "mode 2"),
        ({"height": 0}, "0 x 4 pixels"),
        ({"width": 65536}, "4 x 65536 pixels"),
        ({"height": 60000, "width": 60000, "mode": JPG}, "60000 x 60000 pixels"),
        ({"label": 2}, "label 2, there are 2 classes"),
        ({"label": -1}, "label -1"),
        ({"flags": 1 << 32}, "flags 4294967296"),
        ({"name": "n" * 4097}, "name of more than 4096 bytes"),
        ({"data": bytes(PAGE + 1), "mode": JPG}, "choose a page size of 16777216 bytes"),
    ],
)
def test_a_record_that_no_reader_would_take_is_refused_by_name(tmp_path, change, message):
    good = {"data": bytes(48), "mode": RAW, "height": 4, "width": 4, "label": 0, "flags": 0}
    record = Record(**{**good, "name": "cats/x.png", **change})
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x.beton", [raw_record(2, 2), record])
    assert list(tmp_path.iterdir()) == []


def test_one_sample_too_many_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sample 1 \(a/x.png\) is one more than the 1 announced"):
        write(tmp_path / "x.beton", [raw_record(2, 2)] * 2, samples=1)


@pytest.mark.parametrize("page_size", [0, 1 << 20, 3 << 20, (1 << 21) + 1, 1 << 31, -(1 << 21)])
def test_a_page_size_that_stock_readers_cannot_use_is_refused(tmp_path, page_size):
    with pytest.raises(ValueError, match="power of two"):
        write(tmp_path / "x.beton", mixed_records(), page_size=page_size)


@pytest.mark.parametrize("classes", [[], ["a", "a"]])
def test_a_class_list_without_sense_is_refused(tmp_path, classes):
    with pytest.raises(ValueError, match="different class names"):
        write(tmp_path / "x.beton", mixed_records(), classes=classes)


@pytest.mark.parametrize(
    ("largest", "page_size"),
    [
        (0, 1 << 21),
        (1 << 19, 1 << 21),
        ((1 << 19) + 1, 1 << 22),
        (10_000_000, 1 << 26),
        (1 << 28, 1 << 30),
        (1 << 30, 1 << 30),
    ],
)
def test_the_page_is_four_times_the_largest_sample(largest, page_size):
    assert page_size_for(largest) == page_size


def test_a_sample_beyond_the_largest_page_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        page_size_for((1 << 30) + 1)


def test_a_repeated_sample_shows_the_same_bytes_under_a_label_and_name_of_its_own(tmp_path):
    first, second = jpeg_record(24, 32, 1), raw_record(9, 7)
    with Writer(tmp_path / "x", samples=9, page_size=PAGE, classes=["a", "b"], options={}) as w:
        w.append(first)
        w.repeat(0, 0, "a/again.jpg")
        w.append(second)
        w.repeat(2, 1, "b/again.png")
        w.repeat(1, 1, "b/a copy of a copy.jpg")
    plain = write(tmp_path / "plain", [first, second])
    # Three records and checksums more, and not one byte of images.
    assert (tmp_path / "x").stat().st_size - plain.stat().st_size < 3 * 100 + 300
    with open_beton(tmp_path / "x") as data, open_beton(plain) as both:
        assert data.n == 5 and data.labels.tolist() == [1, 0, 0, 1, 1]
        for k, of in enumerate([0, 0, 1, 1, 0]):
            assert data.region(k).tobytes() == both.region(of).tobytes()
            assert data.sizes[k].tolist() == both.sizes[of].tolist()
            assert data.modes[k] == both.modes[of]
            assert data.flags is not None and both.flags is not None
            assert data.flags[k] == both.flags[of]
        assert [data.name(k) for k in (1, 3, 4)] == [
            "a/again.jpg", "b/again.png", "b/a copy of a copy.jpg"
        ]  # fmt: skip
        assert not list(data.damaged_pages())


def test_only_what_is_stored_is_repeated(tmp_path):
    with Writer(tmp_path / "x", samples=2, page_size=PAGE, classes=["a"], options={}) as writer:
        writer.append(raw_record(2, 2))
        for missing in (1, -1):
            with pytest.raises(ValueError, match=f"no sample {missing} to repeat, 1 were stored"):
                writer.repeat(missing, 0, "a/y.png")
        with pytest.raises(ValueError, match="label 1, there are 1 classes"):
            writer.repeat(0, 1, "a/y.png")
        writer.repeat(0, 0, "a/y.png")
        with pytest.raises(ValueError, match="one more than the 2 announced"):
            writer.repeat(0, 0, "a/z.png")


def test_samples_need_no_names(tmp_path):
    with open_beton(write(tmp_path / "x.beton", [raw_record(2, 2, name="")])) as data:
        assert data.name(0) == ""


def test_names_that_are_no_text_are_stored_as_escapes(tmp_path):
    undecodable = os.fsdecode(b"caf\xe9/\xff.png")
    records = [raw_record(2, 2, name=name) for name in ("café/ü.png", undecodable, "")]
    path = write(tmp_path / "x.beton", records, classes=["café", os.fsdecode(b"caf\xe9")])
    with open_beton(path) as data:
        assert data.name(0) == "café/ü.png"
        assert data.name(1) == "caf\\udce9/\\udcff.png"
        assert data.name(2) == ""
        assert data.classes == ["café", os.fsdecode(b"caf\xe9")]
