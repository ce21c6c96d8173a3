"""What is decided about: which images, in which order, by which names."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmix.train.decide.sources import Files, Images, Stored, as_text, find_images, name_of
from tests.images import tar, write_files
from tests.train.decide.calibrated import pictures, write_beton


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two of every kind."""
    monkeypatch.chdir(tmp_path)
    names = ["b/2.JPG", "b/a/10.png", "a.png", "b.webp", ".hidden/x.png", "b/._y.png", "b/notes.md"]
    write_files(tmp_path / "photos", dict.fromkeys(names, b"?"))
    write_files(tmp_path, {"one.png": b"?", "upload": b"?", "-": b"?"})
    members = ["top.jpg", "d/e/f.jpg", "d/readme", ".x/g.jpg", "./c.PNG"]
    tar(tmp_path / "some.tar", {name: name.encode() for name in members})
    write_beton(tmp_path / "set.beton", pictures(3), ["cat/0.png", "x//y", "z"])
    return tmp_path


PHOTOS = ["photos/a.png", "photos/b.webp", "photos/b/2.JPG", "photos/b/a/10.png"]
MEMBERS = ["some.tar//top.jpg", "some.tar//d/e/f.jpg", "some.tar//c.PNG"]
STORED = ["set.beton//cat/0.png", "set.beton//x//y", "set.beton//z"]


def texts(images: Images) -> list[str]:
    return [images.text(i) for i in range(len(images))]


def test_every_kind_in_the_order_given(here: Path) -> None:
    sources = ["some.tar", "photos", "set.beton", "one.png", "upload", "./-"]
    with find_images(sources) as images:
        assert texts(images) == [*MEMBERS, *PHOTOS, *STORED, "one.png", "upload", "./-"]
        assert [type(part) for part in images.parts] == [Files, Stored, Files]
        assert images.starts == (0, 7, 10)
    with find_images(["set.beton", "set.beton"]) as images:
        assert len(images.parts) == 2 and texts(images) == [*STORED, *STORED]


def test_an_item_reads_what_its_name_says(here: Path) -> None:
    with find_images(["some.tar", "one.png", "photos"]) as images:
        part = images.parts[0]
        assert isinstance(part, Files)
        read = {item.name: item.read() for item in part.items}
    assert list(read) == [*MEMBERS, "one.png", *PHOTOS]
    assert [read[name] for name in MEMBERS] == [b"top.jpg", b"d/e/f.jpg", b"./c.PNG"]


def test_of_a_name_that_a_tar_holds_twice_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in (("a.png", b"old"), ("b.png", b"b"), ("a.png", b"new")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with find_images([str(tmp_path / "t.tar")]) as images:
        part = images.parts[0]
        assert isinstance(part, Files)
        assert [(item.name.rpartition("//")[2], item.read()) for item in part.items] == [
            ("b.png", b"b"),
            ("a.png", b"new"),
        ]


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
        (b"a.png\n\nb.png", ["a.png", "b.png"]),
        (b"\xef\xbb\xbfa.png\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"a\nb.png\0c\r\n\0", ["a\nb.png", "c\r\n"]),
        (b"caf\xe9.png\n", ["$'caf\\xe9.png'"]),
    ],
)
def test_names_of_standard_input(listed: bytes, names: list[str]) -> None:
    with find_images(["-"], io.BytesIO(listed)) as images:
        assert texts(images) == names


def test_standard_input_names_images_whatever_they_are_called(here: Path) -> None:
    with find_images(["one.png", "-"], io.BytesIO(b"photos\nsome.tar\ngone\n")) as images:
        assert texts(images) == ["one.png", "photos", "some.tar", "gone"]
        assert len(images.parts) == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "nothing to decide about"),
        (["gone.png"], "there is no gone.png"),
        (["photos/b/a/..//../.hidden/no"], "there is no"),
        (["one.png", "void"], "no image in void or its subfolders"),
        (["void.tar"], "void.tar holds no images"),
        (["-"], "names no file"),
        (["-", "-"], "once only"),
        (["some.tgz"], "compressed with gzip"),
        (["fake.tar"], "not a tar"),
        (["pipe.tar"], "pipe.tar is not a file"),
        (["fake.beton"], "fake.beton"),
    ],
)
def test_what_is_no_source_is_refused(here: Path, sources: list[str], message: str) -> None:
    (here / "void").mkdir()
    write_files(here, {"void/notes.txt": b"?", "fake.beton": b"?", "fake.tar": 512 * b"?"})
    tar(here / "void.tar", {"readme": b"?"})
    os.mkfifo(here / "pipe.tar")
    with tarfile.open(here / "some.tgz", "w:gz") as archive:
        archive.add(write_beton(here / "large.beton", pictures(99)))
    with pytest.raises((ValueError, OSError), match=message):
        find_images(sources, io.BytesIO(b"\n\n"))


def test_a_folder_that_cannot_be_listed_is_refused(here: Path, monkeypatch) -> None:
    real = os.scandir

    def scandir(path):
        if str(path).endswith("photos/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"photos/b cannot be listed \(Permission denied"):
        find_images(["photos"])


def digest(*sources: str) -> str:
    with find_images(sources) as images:
        return images.digest()


def test_the_digest_tells_lists_apart(here: Path) -> None:
    assert digest("photos", "set.beton") == digest("photos", "set.beton")
    lists = [
        ("photos",),
        ("some.tar",),
        ("set.beton",),
        ("one.png", "upload"),
        ("upload", "one.png"),
    ]
    found = [digest(*sources) for sources in lists]
    (here / "photos" / "c.png").write_bytes(b"")
    tar(here / "some.tar", {"longer": b"", **{m.partition("//")[2]: b"" for m in MEMBERS}})
    (here / "set.beton").unlink()
    write_beton(here / "set.beton", pictures(3, seed=1), ["cat/0.png", "x//y", "z"])
    found += [digest(*sources) for sources in lists[:3]]
    assert len(set(found)) == len(found)


@given(st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name))
def test_every_file_name_has_a_text_that_names_it(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = as_text(name)
    text.encode()  # any format can hold it
    assert os.fsencode(name_of(text)) == raw


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1))
def test_names_of_text_stay_as_they_are(name: str) -> None:
    assert name_of(as_text(name)) == name
    assert as_text(name) == name or name.startswith("$'")


def test_a_quoted_name_is_what_bash_reads(tmp_path: Path) -> None:
    import subprocess

    raw = b"caf\xe9 'a' \\x41 \xc3\xa9.png"
    told = subprocess.run(
        ["bash", "-c", f"printf %s {as_text(os.fsdecode(raw))}"], capture_output=True, check=True
    )
    assert told.stdout == raw
