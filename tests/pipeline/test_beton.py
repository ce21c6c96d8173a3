"""The reader, on files laid out here by hand with `struct`: stock ones, and damaged ones."""

import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import xxhash

from backmix.pipeline.beton import JPG, RAW, Beton, open_beton, open_set, printable
from backmix.pipeline.writer import Record, Writer

PAGE = 4096
FLOAT, INT, IMAGE, BYTES, NDARRAY, JSON, TENSOR, CUSTOM = 0, 1, 2, 3, 4, 5, 6, 255


def jpeg(h: int, w: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def image_record(mode: int, h: int, w: int, pointer: int) -> bytes:
    return struct.pack("<BHHQ", mode, w, h, pointer)


def stock_file(
    path: Path,
    fields: list[int],
    records: list[bytes],
    regions: Iterable[tuple[int, int, bytes]],
    *,
    page_size: int = PAGE,
    table_start: int | None = None,
    version: int = 2,
    table: bytes | None = None,
) -> Path:
    """Write a stock file.

    Args:
        fields: type ids; the field k is called `field{k}`.
        records: one sample's metadata each, padded by the caller.
        regions: (sample, pointer, bytes) of the allocation table's rows.
        table_start, table: other than what follows from the regions.
    """
    regions = list(regions)
    end = max((pointer + len(data) for _, pointer, data in regions), default=PAGE)
    start = -(-end // page_size) * page_size
    file = bytearray(start)
    place = start if table_start is None else table_start
    struct.pack_into("<HHIQQ", file, 0, version, len(fields), page_size, len(records), place)
    for k, type_id in enumerate(fields):
        struct.pack_into("<B16s", file, 24 + 1041 * k, type_id, f"field{k}".encode())
    head = 24 + 1041 * len(fields)
    file[head : head + sum(map(len, records))] = b"".join(records)
    for _, pointer, data in regions:
        file[pointer : pointer + len(data)] = data
    rows = [struct.pack("<QQQ", sample, pointer, len(data)) for sample, pointer, data in regions]
    path.write_bytes(file + (b"".join(rows) if table is None else table))
    return path


def two_samples(path: Path, change: Callable[[list, list], None] | None = None, **changes) -> Path:
    """Write a sound stock file (image, label) of a raw and a jpg sample, or one `change`d first."""
    raw, jpg = bytes(range(48)), jpeg(8, 16)
    # mode, h, w, pointer, label of each sample; sample, pointer, bytes of each region
    rows = [[RAW, 4, 4, PAGE, 1], [JPG, 8, 16, PAGE + 48, 0]]
    regions = [[0, PAGE, raw], [1, PAGE + 48, jpg]]
    if change is not None:
        change(rows, regions)
    records = [image_record(*row[:4]) + bytes(3) + struct.pack("<q", row[4]) for row in rows]
    return stock_file(path, [IMAGE, INT], records, [tuple(r) for r in regions], **changes)


def ours(path: Path, classes: list[str] | None = None, count: int = 3) -> Path:
    classes = classes or ["cat", "dog"]
    with Writer(path, samples=count, page_size=1 << 21, classes=classes, options={}) as writer:
        for k in range(count):
            pixels = np.full((4, 5, 3), k, np.uint8)
            writer.append(Record(pixels, RAW, 4, 5, k % 2, k, f"{classes[k % 2]}/{k}.png"))
    return path


# --- what is read ---------------------------------------------------------------------------------


def test_a_stock_file_is_read(tmp_path):
    with open_beton(two_samples(tmp_path / "x.beton")) as data:
        assert data.n == 2
        assert data.labels.tolist() == [1, 0] and data.labels.dtype == np.int64
        assert data.modes.tolist() == [RAW, JPG] and data.modes.dtype == np.uint8
        assert data.sizes.tolist() == [[4, 4], [8, 16]] and data.sizes.dtype == np.int32
        assert data.pointers.tolist() == [PAGE, PAGE + 48] and data.pointers.dtype == np.uint64
        assert data.byte_sizes.tolist() == [48, len(jpeg(8, 16))]
        assert data.pages.tolist() == [1, 1] and data.pages.dtype == np.int64
        assert data.flags is None and data.hashes is None and data.info == {}
        assert data.classes == ["class_0", "class_1"]
        assert bytes(data.region(0)) == bytes(range(48)) and bytes(data.region(1)) == jpeg(8, 16)
        assert data.name(1) == "sample 1"
        assert data.where(1) == f"{tmp_path / 'x.beton'}: sample 1 at byte {PAGE + 48}"


def test_the_regions_may_be_listed_in_any_order(tmp_path):
    path = two_samples(tmp_path / "x.beton", lambda rows, regions: regions.reverse())
    with open_beton(path) as data:
        assert data.byte_sizes.tolist() == [48, len(jpeg(8, 16))]


def test_samples_without_a_region_of_their_own_may_share_one(tmp_path):
    def share(rows, regions):
        rows += [list(rows[1]), list(rows[0])]

    with open_beton(two_samples(tmp_path / "x.beton", share)) as data:
        assert data.n == 4
        assert data.byte_sizes.tolist() == [48, len(jpeg(8, 16)), len(jpeg(8, 16)), 48]


def test_a_sample_with_a_region_of_its_own_may_not_point_at_another_ones(tmp_path):
    def steal(rows, regions):
        rows[1] = list(rows[0])

    with pytest.raises(ValueError, match="sample 1 has no bytes according to the allocation"):
        open_beton(two_samples(tmp_path / "x.beton", steal))


def test_fields_of_every_stock_type_are_passed_over(tmp_path):
    """The record is laid out by C's rules: 8-byte fields on multiples of 8, blobs packed."""
    image, blob, array = jpeg(8, 16), b"blob", bytes(12)
    start = 2 * PAGE  # seven descriptors fill more than one page
    at = [start, start + len(image), start + len(image) + len(blob)]
    record = struct.pack("<q", 7)  # 0: a label
    record += struct.pack("<d", 0.5)  # 8: a float
    record += struct.pack("<QQ", at[1], len(blob))  # 16: bytes
    record += image_record(JPG, 8, 16, at[0])  # 32: the image
    record += struct.pack("<QQ", at[1], len(blob))  # 45: JSON, packed
    record += bytes(3) + struct.pack("<QQ", at[2], at[2])  # 64: arrays
    fields = [INT, FLOAT, BYTES, IMAGE, JSON, NDARRAY, TENSOR]
    regions = [(0, at[0], image), (0, at[1], blob), (0, at[2], array), (0, at[1], b"")]
    with open_beton(stock_file(tmp_path / "x.beton", fields, [record], regions)) as data:
        assert data.labels.tolist() == [7]
        assert bytes(data.region(0)) == image
        assert data.classes[7] == "class_7" and len(data.classes) == 8


def test_an_empty_blob_that_starts_where_the_image_does_is_not_taken_for_it(tmp_path):
    image = jpeg(8, 16)
    record = image_record(JPG, 8, 16, PAGE) + struct.pack("<QQ", PAGE, 0)
    regions = [(0, PAGE, image), (0, PAGE, b"")]
    with open_beton(stock_file(tmp_path / "x.beton", [IMAGE, BYTES], [record], regions)) as data:
        assert bytes(data.region(0)) == image


def test_a_file_without_labels_gets_zeros(tmp_path):
    record, regions = image_record(JPG, 8, 16, PAGE), [(0, PAGE, jpeg(8, 16))]
    with open_beton(stock_file(tmp_path / "x.beton", [IMAGE], [record], regions)) as data:
        assert data.labels.tolist() == [0] and data.classes == ["class_0"]


def test_our_file_tells_names_classes_flags_and_checksums(tmp_path):
    with open_beton(ours(tmp_path / "x.beton")) as data:
        assert data.classes == ["cat", "dog"]
        assert data.flags is not None and data.flags.tolist() == [0, 1, 2]
        assert data.hashes is not None
        assert data.hashes[2] == xxhash.xxh3_64_intdigest(bytes([2] * 60))
        assert data.name(1) == "dog/1.png"
        expected = f"{tmp_path / 'x.beton'}: sample 1 (dog/1.png) at byte {(1 << 21) + 60}"
        assert data.where(1) == expected


def test_a_region_is_read_only(tmp_path):
    with open_beton(ours(tmp_path / "x.beton")) as data:
        with pytest.raises(ValueError, match="read-only"):
            data.region(0)[0] = 1


def test_arrays_and_regions_outlive_the_file(tmp_path):
    data = open_beton(ours(tmp_path / "x.beton"))
    region = data.region(2)
    data.close()
    data.close()
    (tmp_path / "x.beton").unlink()
    assert region.tolist() == [2] * 60
    assert data.flags is not None and data.flags.tolist() == [0, 1, 2]
    assert data.name(2) == "cat/2.png"
    with pytest.raises(ValueError, match="is closed"):
        data.region(2)


@pytest.mark.parametrize("i", [-1, 3])
def test_a_sample_number_outside_is_an_index_error(tmp_path, i):
    with open_set([ours(tmp_path / "x.beton")]) as data:
        for ask in (data.region, data.name, data.where):
            with pytest.raises(IndexError, match="0 to 2"):
                ask(i)


def test_the_digest_tells_data_apart_and_nothing_else(tmp_path):
    one, same = ours(tmp_path / "a.beton"), ours(tmp_path / "b.beton")
    other = ours(tmp_path / "c.beton", classes=["cat", "cow"])
    digests = [open_beton(path).digest for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 32 and int(digests[0], 16) > 0


# --- several files --------------------------------------------------------------------------------


def test_shards_are_one_data_set(tmp_path):
    paths = [ours(tmp_path / "0.beton", count=3), ours(tmp_path / "1.beton", count=2)]
    with open_set(paths) as data:
        assert data.n == 5 and data.paths == paths
        assert data.labels.tolist() == [0, 1, 0, 0, 1]
        assert data.pages.tolist() == [1, 1, 1, 3, 3]
        assert [data.region(i)[0] for i in range(5)] == [0, 1, 2, 0, 1]
        assert data.name(4) == "dog/1.png"
        assert data.where(4).startswith(f"{paths[1]}: sample 1 (dog/1.png)")
        assert data.flags is not None and data.flags.tolist() == [0, 1, 2, 0, 1]


def test_one_file_as_a_set_is_the_file(tmp_path):
    path = ours(tmp_path / "x.beton")
    with open_beton(path) as file, open_set(str(path)) as data:
        assert data.digest == file.digest
        assert data.where(1) == file.where(1)
        for name in ("labels", "modes", "sizes", "pointers", "byte_sizes", "pages", "hashes"):
            assert np.array_equal(getattr(data, name), getattr(file, name))


def test_the_order_of_shards_is_part_of_the_digest(tmp_path):
    paths = [ours(tmp_path / "0.beton"), ours(tmp_path / "1.beton", count=2)]
    with open_set(paths) as one, open_set(paths[::-1]) as other:
        assert one.digest != other.digest


def test_shards_with_other_classes_are_refused(tmp_path):
    paths = [ours(tmp_path / "0.beton"), ours(tmp_path / "1.beton", classes=["cat", "cow"])]
    with pytest.raises(ValueError, match=r"1\.beton has other classes \(2: cat, cow\) than"):
        open_set(paths)


def test_a_stock_file_makes_no_set_with_one_that_names_its_classes(tmp_path):
    paths = [ours(tmp_path / "0.beton"), two_samples(tmp_path / "1.beton")]
    with pytest.raises(ValueError, match="other classes"):
        open_set(paths)


def test_stock_shards_need_not_all_hold_the_last_class(tmp_path):
    def only_class_0(rows, regions):
        rows[0][4] = 0

    paths = [
        two_samples(tmp_path / "0.beton", only_class_0),
        two_samples(tmp_path / "1.beton"),
    ]
    with open_set(paths) as data:
        assert data.classes == ["class_0", "class_1"]
        assert data.labels.tolist() == [0, 0, 1, 0]
        assert data.hashes is None and data.name(3) == "sample 3"


def test_an_empty_list_of_files_is_refused():
    with pytest.raises(ValueError, match=r"no \.beton file"):
        open_set([])


# --- what is refused ------------------------------------------------------------------------------


def change_row(sample: int, **values: int) -> Callable[[list, list], None]:
    def change(rows, regions):
        for key, value in values.items():
            rows[sample][["mode", "h", "w", "pointer", "label"].index(key)] = value

    return change


def change_region(row: int, sample: int | None = None, pointer: int | None = None, data=None):
    def change(rows, regions):
        old = regions[row]
        regions[row] = [
            old[0] if sample is None else sample,
            old[1] if pointer is None else pointer,
            old[2] if data is None else data,
        ]
        if pointer is not None:
            rows[old[0]][3] = pointer

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_row(1, mode=2), r"sample 1 is stored in no known mode"),
        (change_row(0, h=0), "sample 0 has no pixels"),
        (change_row(1, w=0), "sample 1 has no pixels"),
        (change_row(1, h=65535, w=65535), "sample 1 has more than 178956970 pixels"),
        (change_row(0, h=5), "sample 0 has not 3 h w bytes"),
        (change_row(1, mode=RAW), "sample 1 has not 3 h w bytes"),
        (change_row(1, pointer=PAGE + 1), "sample 1 has no bytes"),
        (change_row(1, pointer=0), "sample 1 has no bytes"),
        (change_row(1, pointer=1 << 63), "sample 1 has no bytes"),
        (change_row(1, label=-1), "sample 1 has label -1"),
        (change_row(1, label=1 << 40), "sample 1 has label 1099511627776"),
        (change_region(1, sample=2), "row 1 of the allocation table names a sample that does not"),
        (change_region(1, pointer=2106), "row 1 of the allocation table points outside"),
        (change_region(1, pointer=PAGE + 47), "regions of the allocation table overlap"),
        (change_region(0, data=bytes(49)), "regions of the allocation table overlap"),
        (change_region(1, data=b""), "sample 1 has no bytes"),
        (change_region(1, pointer=2 * PAGE - 1), "row 1 of the allocation table crosses the end"),
    ],
)
def test_a_table_without_sense_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_beton(two_samples(tmp_path / "x.beton", change))
    assert str(tmp_path / "x.beton") in str(caught.value)


def row(sample: int, pointer: int, size: int) -> bytes:
    return struct.pack("<QQQ", sample, pointer, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "no .beton file of version 2: it starts with version 3"),
        ({"page_size": 5000}, "page size 5000 is no power of two"),
        ({"page_size": 2048}, "page size 2048"),
        ({"table_start": 0}, "allocation table would start at byte 0"),
        ({"table_start": 2 * PAGE + 1}, "no whole allocation table from byte 8193"),
        ({"table_start": 1 << 63}, "no whole allocation table from byte 9223372036854775808"),
        ({"table": row(0, PAGE, 48)}, "sample 1 has no bytes"),
        ({"table": b""}, "sample 0 has no bytes"),
        ({"table": row(0, PAGE, 48) + row(1, PAGE + 48, 1 << 63)}, "row 1 .* ends behind"),
        ({"table": row(0, PAGE, 48) + row(1, (1 << 64) - 8, 48)}, "row 1 .* points outside"),
        ({"table": row(0, PAGE, 48) + row(1, PAGE + 48, (1 << 64) - 1)}, "row 1 .* ends behind"),
    ],
)
def test_a_header_or_table_that_leaves_the_file_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_beton(two_samples(tmp_path / "x.beton", **changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([INT, FLOAT], "holds no RGBImage field"),
        ([CUSTOM, IMAGE], "field 'field0' has type 255 .*whose layout the file does not tell"),
        ([IMAGE, 7], "field 'field1' has type 7"),
        ([], "0 fields"),
        ([INT] * 65, "65 fields"),
    ],
)
def test_fields_that_cannot_be_read_are_refused(tmp_path, fields, message):
    path = stock_file(tmp_path / "x.beton", fields, [bytes(24)], [(0, 20 * PAGE, b"x")])
    with pytest.raises(ValueError, match=message):
        open_beton(path)


def test_a_file_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        open_beton(stock_file(tmp_path / "x.beton", [IMAGE], [], []))


@pytest.mark.parametrize("content", [b"", b"\2\0", b"PK\3\4" * 100, b"\xff\xd8\xff" * 100])
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.beton is no \.beton file"):
        open_beton(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        open_beton(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.beton"):
        open_beton(tmp_path / "x.beton")


@pytest.mark.parametrize("n", [3, 1 << 20, 1 << 32, 1 << 60, (1 << 64) - 1])
def test_a_number_of_samples_beyond_the_file_allocates_nothing(tmp_path, n):
    path = two_samples(tmp_path / "x.beton")
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 8, n)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            open_beton(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- the extension --------------------------------------------------------------------------------


def test_a_damaged_image_is_found_where_it_is_read(tmp_path):
    path = ours(tmp_path / "x.beton")
    content = bytearray(path.read_bytes())
    content[(1 << 21) + 60] ^= 1
    path.write_bytes(content)
    with open_beton(path) as data:
        assert data.region(0)[0] == 0 and data.region(2)[0] == 2
        assert data.region(1, verify=False)[0] == 0
        with pytest.raises(ValueError, match=r"sample 1 \(dog/1.png\) at byte .* checksum"):
            data.region(1)
        assert list(data.damaged_pages()) == [1]


def test_a_file_stripped_of_its_extension_is_a_stock_file(tmp_path):
    path = ours(tmp_path / "x.beton")
    content = bytearray(path.read_bytes())
    content[41:81] = bytes(40)
    path.write_bytes(content)
    with open_beton(path) as data:
        assert data.hashes is None and data.classes == ["class_0", "class_1"]
        assert data.labels.tolist() == [0, 1, 0] and data.region(2)[0] == 2


def forge(path: Path, change: Callable[[dict[str, tuple[bytes, int, bytes]]], None]) -> None:
    """Rewrite the extension's tables {name: (dtype, count, bytes)} with all checksums right."""
    content = path.read_bytes()
    _, start, length, _, _ = struct.unpack_from("<8sQQQQ", content, 41)
    body = content[start : start + length]
    tables = {}
    for k in range(struct.unpack_from("<I", body, 12)[0]):
        name, code, count, offset, _ = struct.unpack_from("<16s8sQQQ", body, 16 + 48 * k)
        code = code.rstrip(b"\0")
        table = body[offset : offset + int(code[-1:]) * count]
        tables[name.rstrip(b"\0").decode()] = (code, count, table)
    change(tables)
    parts, directory = b"", b""
    first = 16 + 48 * len(tables)
    for name, (code, count, table) in tables.items():
        checksum = xxhash.xxh3_64_intdigest(table)
        directory += struct.pack(
            "<16s8sQQQ", name.encode(), code, count, first + len(parts), checksum
        )
        parts += table
    body = struct.pack("<8sII", b"BMIXEXT1", 1, len(tables)) + directory + parts
    # The header's checksum covers the table's place: the forged body fills the old one's exactly.
    assert len(body) <= length
    body = body.ljust(length, b"\0")
    locator = struct.pack("<8sQQQ", b"BMIXEXT1", start, length, xxhash.xxh3_64_intdigest(body))
    locator += struct.pack("<Q", xxhash.xxh3_64_intdigest(locator))
    path.write_bytes(content[:41] + locator + content[81:start] + body + content[start + length :])


def replaced(name: str, code: bytes, count: int, table: bytes):
    def change(tables):
        tables[name] = (code, count, table)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tables: tables.pop("size"), r"lacks the tables \['size'\]"),
        (replaced("size", b"<u8", 2, bytes(16)), "table size has 2 rows, not 3"),
        (replaced("size", b"<u8", 3, bytes(24)), "sizes contradict the allocation table"),
        (replaced("sample_hash", b"<u8", 2, bytes(16)), "table sample_hash has 2 rows"),
        (replaced("flags", b"<u8", 1, bytes(8)), "names table flags wrongly"),
        (replaced("flags", b"<u4", 2, bytes(8)), "table flags has 2 rows"),
        (replaced("page_hash", b"<u8", 0, b""), "table page_hash has 0 rows, not 1"),
        (replaced("head_hash", b"<u8", 0, b""), "header and field descriptors do not match"),
        (replaced("head_hash", b"<u8", 1, bytes(8)), "header and field descriptors do not match"),
        (replaced("json", b"|u1", 0, b""), "note is no JSON"),
        (replaced("json", b"|u1", 9, b"[" * 9), "note is no JSON"),
        (replaced("json", b"|u1", 2, b"[]"), "note has no list of classes"),
        (replaced("json", b"|u1", 14, b'{"classes":[]}'), "note has no list of classes"),
        (replaced("json", b"|u1", 15, b'{"classes":[1]}'), "class whose name is no text"),
        (replaced("json", b"|u1", 17, b'{"classes":["a"]}'), "sample 1 has label 1, not 0 to 0"),
        (replaced("names", b"|u1", 0, b""), "0 bytes hold no names of 3 samples"),
        (replaced("names", b"|u1", 32, struct.pack("<4Q", 0, 9, 0, 0)), "do not ascend"),
        (replaced("names", b"|u1", 32, struct.pack("<4Q", 0, 0, 0, 9)), "do not ascend"),
        (replaced("names", b"|u1", 32, struct.pack("<4Q", 1, 1, 1, 1)), "do not ascend"),
        (replaced("names", b"|u1", 1 << 62, b""), "table names would leave the extension"),
        (replaced("names", b"|u1", (1 << 64) - 1, b""), "table names would leave"),
    ],
)
def test_an_extension_without_sense_is_refused_though_its_checksums_are_right(
    tmp_path, change, message
):
    path = ours(tmp_path / "x.beton")
    forge(path, lambda tables: None)
    open_beton(path).close()
    forge(path, change)
    with pytest.raises(ValueError, match=message):
        open_beton(path)


def test_deep_nesting_in_the_note_is_refused(tmp_path):
    path = tmp_path / "x.beton"
    options = {"pad": "x" * 200_000}  # room for the forged note
    with Writer(path, samples=1, page_size=1 << 21, classes=["a"], options=options) as writer:
        writer.append(Record(bytes(48), RAW, 4, 4, 0, 0, "x"))
    forge(path, replaced("json", b"|u1", 100_000, b"[" * 100_000))
    with pytest.raises(ValueError, match="note is no JSON"):
        open_beton(path)


def test_tables_of_later_writers_are_passed_over(tmp_path):
    def rename(tables):
        tables["later"] = tables.pop("names")

    path = ours(tmp_path / "x.beton")
    forge(path, rename)
    with open_beton(path) as data:
        assert data.name(1) == "sample 1" and data.classes == ["cat", "dog"]


def test_a_name_cannot_command_the_terminal(tmp_path):
    path = tmp_path / "x.beton"
    with Writer(path, samples=1, page_size=1 << 21, classes=["a"], options={}) as writer:
        writer.append(Record(bytes(48), RAW, 4, 4, 0, 0, "é/\x1b[2J\n.png"))
    with open_beton(path) as data:
        assert data.name(0) == "é/\x1b[2J\n.png"
        assert "(é/\\x1b[2J\\n.png)" in data.where(0)


def test_printable_escapes_what_is_invisible():
    assert printable("a b\té\u202e\0") == "a b\\té\\u202e\\x00"


def test_opening_makes_no_object_per_sample(tmp_path):
    """A second of start-up and half a gigabyte at ImageNet's size is what this forbids."""
    n, image = 50_000, jpeg(8, 8)
    record = image_record(JPG, 8, 8, 1 << 21) + bytes(11)
    path = stock_file(
        tmp_path / "x.beton", [IMAGE, INT], [record] * n, [(0, 1 << 21, image)], page_size=1 << 21
    )
    tracemalloc.start()
    try:
        data: Beton = open_beton(path)
        size, blocks = tracemalloc.get_traced_memory()[0], len(tracemalloc.take_snapshot().traces)
    finally:
        tracemalloc.stop()
    assert size < 60 * n and blocks < 1000
    data.close()
