"""WebDataset shards: how members become samples, and what is never decoded."""

import os
import pickle
from pathlib import Path

import pytest

from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Source, expand_files
from tests.images import jpeg, photograph, png, tar


def samples(source: Source) -> list[tuple[str, int]]:
    return [(item.name, item.label) for item in source.items]


def shard(path: Path, first: int, count: int = 3) -> dict[str, bytes]:
    """Write a shard of `count` samples and return its images by sample name."""
    files: dict[str, bytes] = {}
    found: dict[str, bytes] = {}
    for k in range(first, first + count):
        image = jpeg(photograph(k))
        files[f"{k:06}.jpg"] = image
        files[f"{k:06}.cls"] = b"%d\n" % (k % 4)
        files[f"{k:06}.json"] = b'{"label": 99, "width": 32}'
        found[f"{path.stem}/{k:06}.jpg"] = image
    tar(path, files)
    return found


def test_shards_are_read_in_the_order_of_the_pattern(tmp_path: Path) -> None:
    expected: dict[str, bytes] = {}
    for k in (8, 9, 10):
        expected |= shard(tmp_path / f"data-{k:03}.tar", 10 * k)
    for pattern in ("data-{008..010}.tar", "data-*.tar", "data-{008,009,010}.tar", "data-0[01]*"):
        source = open_source(f"webdataset:{tmp_path}/{pattern}")
        assert {item.name: item.read() for item in source.items} == expected
        assert [item.label for item in source.items] == [0, 1, 2, 2, 3, 0, 0, 1, 2]
        assert [item.name for item in source.items] == sorted(expected)
    assert source.classes == ["0", "1", "2", "3"]
    backwards = open_source(f"webdataset:{tmp_path}/data-{{010..008}}.tar")
    assert backwards.items[0].name == "data-010/000100.jpg"
    named = open_source(f"webdataset:{tmp_path}/data-008.tar", ["ant", "bee", "cat", "dog"])
    assert named.classes[named.items[1].label] == "bee"


def test_braces_expand_as_in_a_shell(tmp_path: Path) -> None:
    for name in ("a1.x", "a2.x", "b1.x", "b2.x", "a{1}.x"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [Path(path).name for path in expand_files(f"{tmp_path}/{pattern}", "shard")]

    assert names("{b,a}{1..2}.x") == ["b1.x", "b2.x", "a1.x", "a2.x"]
    assert names("a{1}.x") == ["a{1}.x"], "a file of this very name"
    with pytest.raises(ValueError, match=r"no shard .*a3\.x, of .*a\{1\.\.3\}\.x"):
        names("a{1..3}.x")
    with pytest.raises(ValueError, match=r"neither \{FIRST\.\.LAST\} nor \{ONE,OTHER\}"):
        names("{a}1.x")
    for pattern in ("{1..999999999}.x", "{1..999}{1..999}.x"):
        with pytest.raises(ValueError, match=r"more than 100,000 files|no shard"):
            names(pattern)


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    image = jpeg()
    files = {
        "v1.0/a.b.jpg": b"not an image by its kind, b.jpg",
        "v1.0/a.JPG": image,
        "v1.0/a.cls": b"2",
        "v1.0/b.jpeg": image,
        "v1.0/b.json": b'{"label": 1}',
        "v1.0/c.png": png(photograph()),
        "v1.0/c.cls": b" 0 ",
        "v1.0/._c.cls": b"companion",
        "README": b"?",
    }
    source = open_source(f"webdataset:{tar(tmp_path / 's.tar', files)}")
    assert samples(source) == [("s/v1.0/a.jpg", 2), ("s/v1.0/b.jpeg", 1), ("s/v1.0/c.png", 0)]
    assert source.notes == [
        "member left out (no image, cls or json), 2: 'v1.0/a.b.jpg', 'README'",
    ]


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def test_no_pickled_member_is_ever_decoded(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    attack = pickle.dumps(Touch(proof))
    kinds = ("pyd", "pkl", "pickle", "pth", "meta.pkl", "PT", "npy")
    files = {"0.jpg": jpeg(), "0.cls": b"0"} | {f"0.{kind}": attack for kind in kinds}
    source = open_source(f"webdataset:{tar(tmp_path / 's.tar', files)}")
    assert samples(source) == [("s/0.jpg", 0)]
    (note,) = source.notes
    assert note.startswith("pickled member left out, never decoded, 7: '0.pyd', '0.pkl'")
    assert not proof.exists()
    # Nor where it stands in for a label.
    path = tar(tmp_path / "t.tar", {"0.jpg": jpeg(), "0.cls": attack, "1.cls": attack})
    with pytest.raises(ValueError, match=r"0\.cls at byte \d+ h(as|olds)"):
        open_source(f"webdataset:{path}")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.jpg": b"?"}, r"sample of '0\.jpg' at byte 512 has no label"),
        ({"0.jpg": b"?", "0.json": b'{"label": "cat"}'}, "has no label"),
        ({"0.jpg": b"?", "0.json": b'{"label": true}'}, "has no label"),
        ({"0.jpg": b"?", "0.json": b"[1]"}, "has no label"),
        ({"0.jpg": b"?", "0.json": b"{"}, r"0\.json at byte 1536 is no JSON"),
        ({"0.jpg": b"?", "0.json": 100_000 * b"["}, "is no JSON"),
        ({"0.jpg": b"?", "0.json": b"9" * 5000}, "is no JSON"),
        ({"0.jpg": b"?", "0.json": b" " * (1 << 20 | 1)}, "has 1048577 bytes"),
        ({"0.jpg": b"?", "0.cls": b"cat"}, r"0\.cls at byte 1536 holds b'cat'; expected a class"),
        ({"0.jpg": b"?", "0.cls": b"1" * 65}, "has 65 bytes"),
        ({"0.jpg": b"?", "0.cls": b"1" * 30}, "holds b'1111"),
        ({"0.jpg": b"?", "0.png": b"?", "0.cls": b"0"}, "'0' has two images, jpg and png"),
        ({"0.jpg": b"?", "0.JPG": b"?", "0.cls": b"0"}, r"two members \.jpg, the second at byte"),
        ({"0.cls": b"0", "0.CLS": b"0"}, r"two members \.cls"),
        ({"0.jpg": b"?", "1.txt": b"?", "0.cls": b"0"}, "has no label"),
        ({"0.txt": b"?"}, r"no samples with an image; it holds '0\.txt'"),
        ({"../0.jpg": b"?", "../0.cls": b"0"}, "leads out of the archive"),
    ],
)
def test_a_shard_that_cannot_be_meant_is_named(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    path = tar(tmp_path / "s.tar", files)
    with pytest.raises(ValueError, match=message):
        open_source(f"webdataset:{path}")


def test_samples_without_an_image_are_told(tmp_path: Path) -> None:
    files = {"0.jpg": jpeg(), "0.cls": b"0", "1.cls": b"1", "2.json": b"broken, but not read"}
    source = open_source(f"webdataset:{tar(tmp_path / 's.tar', files)}")
    assert source.notes == ["sample without an image left out, 2: '1', '2'"]


def test_a_missing_or_compressed_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", 0)
    with pytest.raises(ValueError, match=r"no shard .*; it is a folder: write .*/\*"):
        open_source(f"webdataset:{tmp_path}")
    with pytest.raises(ValueError, match=r"no shard .*/1\.tar, of"):
        open_source(f"webdataset:{tmp_path}/{{0..1}}.tar")
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + 600 * b"\0")
    with pytest.raises(ValueError, match=r"0\.tar is compressed with gzip.*decompress it once"):
        open_source(f"webdataset:{tmp_path}/0.tar")
