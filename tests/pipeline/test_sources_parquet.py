"""Image parquet as Hugging Face writes it: columns, class names, order, memory, damage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Source
from tests.images import jpeg, photograph, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "emu"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hugging_face(features: dict[str, Any]) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def class_label(names: list[str] | None = None) -> dict[str, Any]:
    return {"names": names or NAMES, "_type": "ClassLabel"}


def written(
    path: Path,
    columns: dict[str, Any],
    features: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata(hugging_face(features))
    pq.write_table(table, path, **options)
    return path


def pictures(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"bytes": jpeg(photograph(k)) if k % 3 else png(photograph(k)), "path": f"p/{k}.jpg"}
        for k in range(first, first + count)
    ]


def image_parquet(path: Path, count: int = 10, first: int = 0, **options: Any) -> list[bytes]:
    """Write a file in Hugging Face's form and return its encoded images."""
    rows = pictures(count, first)
    labels = [(first + k) % 3 for k in range(count)]
    columns = {"image": pa.array(rows, STRUCT), "label": pa.array(labels, pa.int64())}
    written(path, columns, {"image": {"_type": "Image"}, "label": class_label()}, **options)
    return [row["bytes"] for row in rows]


def streamed(source: Source) -> list[bytes | None]:
    assert source.stream is not None
    return list(source.stream())


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_rows_come_in_order_over_row_groups_and_files(tmp_path: Path, compression: str) -> None:
    expected = image_parquet(
        tmp_path / "train-0.parquet", 70, row_group_size=9, compression=compression
    )
    expected += image_parquet(tmp_path / "train-1.parquet", 40, 70, compression=compression)
    source = open_source(f"parquet:{tmp_path}/train-*.parquet")
    assert source.classes == NAMES
    assert [item.label for item in source.items] == [k % 3 for k in range(110)]
    assert source.items[7].name == "train-0/0000007/7.jpg"
    assert source.items[71].name == "train-1/0000001/71.jpg"
    assert source.items[71].path == f"{tmp_path}/train-1.parquet"
    assert streamed(source) == expected
    assert streamed(source) == expected, "it can be read again"
    assert open_source(f"parquet:{tmp_path}/train-{{0..1}}.parquet").items[71].label == 71 % 3


def test_a_class_list_renumbers_and_its_lack_gives_numbers(tmp_path: Path) -> None:
    image_parquet(tmp_path / "a.parquet", 3)
    source = open_source(f"parquet:{tmp_path}/a.parquet", ["emu", "dog", "cat", "fox"])
    assert [item.label for item in source.items] == [2, 1, 0]
    images = pa.array(pictures(2), STRUCT)
    bare = written(tmp_path / "b.parquet", {"image": images, "label": pa.array([2, 0])})
    assert open_source(f"parquet:{bare}").classes == ["0", "1", "2"]
    assert open_source(f"parquet:{bare}", NAMES).classes == NAMES
    texts = written(tmp_path / "c.parquet", {"image": images, "label": ["dog", "cat"]})
    source = open_source(f"parquet:{texts}")
    assert (source.classes, source.items[0].label) == (["cat", "dog"], 1)
    hidden = {"image": images, "label": pa.array([-1, -1])}
    test = written(tmp_path / "d.parquet", hidden, {"label": class_label()})
    assert open_source(f"parquet:{test}").classes == ["unknown"]


def test_columns_are_found_by_their_kind_or_asked_for(tmp_path: Path) -> None:
    columns = {
        "img": pa.array(pictures(2), STRUCT),
        "width": pa.array([32, 32]),
        "fine_label": pa.array([0, 1]),
        "coarse_label": pa.array([1, 1]),
    }
    both = {"fine_label": class_label(), "coarse_label": class_label(["x", "y"])}
    path = written(tmp_path / "a.parquet", columns, both)
    with pytest.raises(ValueError, match="FILES//COLUMN with one of 'fine_label', 'coarse_label'"):
        open_source(f"parquet:{path}")
    source = open_source(f"parquet:{path}//coarse_label")
    assert (source.classes, [item.label for item in source.items]) == (["x", "y"], [1, 1])
    with pytest.raises(ValueError, match="no column 'colour'"):
        open_source(f"parquet:{path}//colour")
    one = written(tmp_path / "b.parquet", columns, {"fine_label": class_label()})
    assert open_source(f"parquet:{one}").classes == NAMES
    plain = {"jpg": pa.array([jpeg(), png(photograph())]), "label": pa.array([0, 1])}
    source = open_source(f"parquet:{written(tmp_path / 'c.parquet', plain)}")
    assert streamed(source) == [jpeg(), png(photograph())]
    assert source.items[1].name == "c/0000001"


def test_a_picture_that_is_not_there_is_none_of_the_others_business(tmp_path: Path) -> None:
    rows = [{"bytes": jpeg(), "path": "../../x/..\\evil\x07"}, None, {"bytes": None, "path": "p"}]
    columns = {"image": pa.array(rows, STRUCT), "label": pa.array([0, 0, 0])}
    source = open_source(f"parquet:{written(tmp_path / 'a.parquet', columns)}")
    assert streamed(source) == [jpeg(), None, None]
    assert [item.name for item in source.items] == ["a/0000000", "a/0000001", "a/0000002/p"]


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"label": [0]}, None, "no column of images; its columns are 'label'"),
        ({"a": [b"?"], "b": [b"?"], "label": [0]}, None, "could hold images: 'a', 'b'"),
        ({"image": [b"?"]}, None, "which column holds the labels"),
        ({"image": [b"?"], "label": pa.array([None], pa.int64())}, None, r"parquet, row 0: no lab"),
        ({"image": 2 * [b"?"], "label": [0, -1]}, None, "row 1: label -1 beside others"),
        ({"image": 2 * [b"?"], "label": [0, 3]}, {"label": class_label()}, "row 1: label 3, but"),
        ({"image": [b"?"], "label": [1 << 62]}, None, "row 0: label 46116"),
        ({"image": [b"?"], "label": [0]}, {"label": class_label(["a", "a"])}, "a class twice"),
        ({"image": [b"?"], "label": [0]}, {"label": {"names": [1]}}, "names that are no texts"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, None, "no rows"),
    ],
)
def test_a_table_that_cannot_be_meant_is_named(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any] | None, message: str
) -> None:
    path = written(tmp_path / "a.parquet", columns, features)
    with pytest.raises(ValueError, match=message):
        open_source(f"parquet:{path}")


def test_files_of_different_classes_are_refused(tmp_path: Path) -> None:
    image_parquet(tmp_path / "0.parquet")
    columns = {"image": pa.array(pictures(1), STRUCT), "label": pa.array([0])}
    written(tmp_path / "1.parquet", columns, {"label": class_label(["other"])})
    with pytest.raises(ValueError, match=r"1\.parquet has other columns or class names than .*/0"):
        open_source(f"parquet:{tmp_path}/*.parquet")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    image_parquet(path, 200, row_group_size=50)
    good = path.read_bytes()
    for data in (b"", b"PAR1", good[:-3], good[: len(good) // 2], good[:-200] + good[-100:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet: .*is no Parquet file, or is damaged"):
            open_source(f"parquet:{path}")
    damaged = bytearray(good)
    damaged[4:60] = bytes(56)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.parquet, after row 0: .* is damaged"):
        streamed(open_source(f"parquet:{path}"))


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install 'backmix\[parquet\]'"):
        open_source(f"parquet:{tmp_path}/a.parquet")


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    # 160 MB in one row group, in pages of 4 MB: what is held follows the pages and batches.
    noise = [bytes([k]) + photograph(k, 577, 577).tobytes()[:1_000_000] for k in range(8)]
    columns = {"image": [noise[k % 8] for k in range(160)], "label": pa.array(160 * [0])}
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    written(path, columns, row_group_size=160, **options)
    source = open_source(f"parquet:{path}")
    assert source.stream is not None
    before = pa.total_allocated_bytes()
    most = 0
    for k, data in enumerate(source.stream()):
        assert data == noise[k % 8]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 80e6, f"{most / 1e6:.0f} MB"
