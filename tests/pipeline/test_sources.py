"""What the sources list, in which order, and what they refuse."""

import gzip
import os
import pickle
import struct
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from backmix.pipeline.sources import tar as tar_module
from backmix.pipeline.sources.classes import read_classes
from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Source
from tests.images import class_folders, jpeg, tar, write_files


def names(source: Source) -> list[str]:
    return [item.name for item in source.items]


def labels(source: Source) -> list[int]:
    return [item.label for item in source.items]


# --- class folders -------------------------------------------------------------------------------


def test_a_folder_is_listed_by_class_and_then_by_name(tmp_path: Path) -> None:
    order = ["zebra/b.PNG", "zebra/a.jpeg", "ant/x/2.WebP", "ant/10.jpg", "ant/9.ppm"]
    write_files(tmp_path, {name: b"?" for name in order})
    source = open_source(f"folder:{tmp_path}/")
    assert source.classes == ["ant", "zebra"]
    assert names(source) == [
        "ant/10.jpg",
        "ant/9.ppm",
        "ant/x/2.WebP",
        "zebra/a.jpeg",
        "zebra/b.PNG",
    ]
    assert labels(source) == [0, 0, 0, 1, 1]
    assert source.items[-1].read() == b"?"


def test_hidden_and_foreign_files_are_left_out_and_the_foreign_are_told(tmp_path: Path) -> None:
    files = ["cat/1.jpg", "cat/._1.jpg", "cat/.DS_Store", ".git/x.jpg", "cat/notes.txt", "top.jpg"]
    write_files(tmp_path, {name: b"?" for name in files})
    source = open_source(f"folder:{tmp_path}")
    assert names(source) == ["cat/1.jpg"]
    assert source.classes == ["cat"]
    notes = " ".join(source.notes)
    assert "'cat/notes.txt', 'top.jpg'" in notes
    assert "DS_Store" not in notes


def test_a_class_folder_without_images_is_refused_unless_a_list_decides(tmp_path: Path) -> None:
    """As torchvision's ImageFolder: nothing could be trained on the class."""
    write_files(tmp_path, {"cat/1.jpg": b"?", "masks/1.npy": b"?"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"without images: 'empty', 'masks'; take .* --classes"):
        open_source(f"folder:{tmp_path}")
    assert open_source(f"folder:{tmp_path}", ["cat"]).classes == ["cat"]
    source = open_source(f"folder:{tmp_path}", ["empty", "cat"])
    assert source.classes == ["empty", "cat"] and labels(source) == [1]
    assert "class without images, 1: 'empty'" in source.notes


def test_links_are_followed_and_a_loop_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"store/1.jpg": b"one", "data/cat/0.jpg": b"zero"})
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "cat" / "2.jpg").symlink_to(tmp_path / "store" / "1.jpg")
    source = open_source(f"folder:{tmp_path}/data")
    assert names(source) == ["cat/0.jpg", "cat/2.jpg", "dog/1.jpg"]
    assert source.items[1].read() == b"one"
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data" / "cat")
    with pytest.raises(ValueError, match="cat/loop is a link to a folder that it lies in"):
        open_source(f"folder:{tmp_path}/data")


def test_a_link_to_itself_and_one_to_a_pipe_fail_at_their_turn(tmp_path: Path) -> None:
    write_files(tmp_path, {"data/cat/0.jpg": b"zero"})
    (tmp_path / "data" / "cat" / "1.jpg").symlink_to("1.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data" / "cat" / "2.jpg").symlink_to(tmp_path / "pipe")
    good, loop, pipe = open_source(f"folder:{tmp_path}/data").items
    assert good.read() == b"zero"
    with pytest.raises(OSError, match=r"1\.jpg"):
        loop.read()
    with pytest.raises(ValueError, match="not a regular file"):
        pipe.read()


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(101):
        folder = folder / "a"
    folder.mkdir(parents=True)
    (folder / "x.jpg").write_bytes(b"?")
    with pytest.raises(ValueError, match="more than 100 folders deep"):
        open_source(f"folder:{tmp_path}")
    os.rename(tmp_path / "a" / "a", tmp_path / "b")
    (tmp_path / "a").rmdir()
    assert len(open_source(f"folder:{tmp_path}").items) == 1


def test_a_class_list_fixes_the_labels(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog"], each=1)
    source = open_source(f"folder:{tmp_path}", ["dog", "emu", "cat"])
    assert source.classes == ["dog", "emu", "cat"]
    assert dict(zip(names(source), labels(source), strict=True)) == {"dog/0.jpg": 0, "cat/0.jpg": 2}
    (tmp_path / "unused").mkdir()
    assert open_source(f"folder:{tmp_path}", ["dog", "cat"]).classes == ["dog", "cat"]
    assert source.notes == ["class without images, 1: 'emu'"]


def test_a_class_list_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog"], each=1)
    with pytest.raises(ValueError, match="does not name: 'dog'"):
        open_source(f"folder:{tmp_path}", ["cat"])
    with pytest.raises(ValueError, match="names none of the classes"):
        open_source(f"folder:{tmp_path}", ["airplane"])


def test_a_class_list_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("potter's wheel\n\n  dog \n")
    assert read_classes(path) == ["potter's wheel", "dog"]
    for content, message in [
        ("\n", "names no class"),
        ("a\nb\na\n", "twice"),
        ("a\x07b\n", "print"),
        ("x" * 300, "longer"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_classes(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_classes(path)
    path.write_text("\n".join([*map(str, range(20_000)), "77"]))
    with pytest.raises(ValueError, match="twice: '77'"):
        read_classes(path)


def test_folders_without_images_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_source(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="holds no images in class folders"):
        open_source(f"folder:{tmp_path}")
    write_files(tmp_path, {"1.jpg": b"?"})
    with pytest.raises(ValueError, match="images but no class folders"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(f"folder:{tmp_path}/1.jpg")


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, each=1)
    (tmp_path / "dog" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:  # the tests may run as root, whom no mode stops
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"the folder .*dog/locked cannot be listed \(Permission"):
        open_source(f"folder:{tmp_path}")


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tinyimagenet:DIR"):
        open_source("zip:x.zip")
    with pytest.raises(ValueError, match=f"did you mean folder:{tmp_path}"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("imagnet:data//val", "imagenet:data//val"),
        ("Folder:data", "folder:data"),
        ("tiny-imagenet:data", "tinyimagenet:data"),
        ("CIFAR10:data", "cifar:data"),
        ("tar:", "tar:..."),
    ],
)
def test_a_mistyped_kind_of_source_is_told_the_nearest(spec: str, meant: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_source(spec)
    assert str(caught.value).startswith(f"unknown source {spec!r}; did you mean {meant} ? Sources")


def test_a_kind_like_no_other_gets_no_guess() -> None:
    with pytest.raises(ValueError, match=r"^unknown source 'xyz:data'\. Sources are:"):
        open_source("xyz:data")


def test_a_million_items_cost_no_objects(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat"], each=3)
    items = open_source(f"folder:{tmp_path}").items
    assert items[0] is not items[0]
    assert items[-1] == items[2] == items[1:][1]
    with pytest.raises(IndexError):
        items[3]


# --- tar -----------------------------------------------------------------------------------------

LONG = "long" * 40


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_lists_what_its_unpacked_folder_lists(tmp_path: Path, form: int) -> None:
    files = {
        "set/train/dog/1.jpg": b"one",
        "set/train/cat/2.jpg": b"",
        f"set/train/cat/{'x' * 60}/{'y' * 60}.png": b"deep" * 300,  # ustar's prefix field
        "set/train/cat/notes.txt": b"n",
        "set/train/cat/._2.jpg": b"fork",
        "set/val/dog/3.jpg": b"no",
    }
    if form != tarfile.USTAR_FORMAT:
        files[f"set/train/{LONG}/é.jpg"] = b"long"  # GNU long name or pax path
    path = tar(tmp_path / "data.tar", files, form)
    source = open_source(f"tar:{path}//set/train")
    with tarfile.open(path) as archive:
        # An attribute: Python 3.11.2 knows no argument `filter`, and later ones warn without one.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path / "out")
    folder = open_source(f"folder:{tmp_path}/out/set/train")
    assert names(source) == names(folder)
    assert source.classes == folder.classes
    assert [item.read() for item in source.items] == [item.read() for item in folder.items]
    assert len(names(source)) == (3 if form == tarfile.USTAR_FORMAT else 4)


def test_the_prefix_may_be_empty_and_paths_may_start_with_a_dot(tmp_path: Path) -> None:
    path = tar(tmp_path / "data.tar", {"./cat/1.jpg": b"1", "dog//2.jpg": b"2"})
    assert names(open_source(f"tar:{path}")) == ["cat/1.jpg", "dog/2.jpg"]
    with pytest.raises(ValueError, match="no files in folders below nothing"):
        open_source(f"tar:{path}//nothing")


def test_of_a_name_that_occurs_twice_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as archive:
        for content in (b"old", b"newer"):
            member = tarfile.TarInfo("cat/1.jpg")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    (item,) = open_source(f"tar:{path}").items
    assert item.read() == b"newer"


def test_links_and_empty_classes_of_a_tar_are_told(tmp_path: Path) -> None:
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("cat/1.jpg", b"0"),
            ("cat/2.jpg", b"2"),
            ("cat/3.jpg", b"6"),
            ("emu", b"5"),
        ]:
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    with pytest.raises(ValueError, match="class folders without images: 'emu'"):
        open_source(f"tar:{path}")
    source = open_source(f"tar:{path}", ["cat", "emu"])
    assert names(source) == ["cat/1.jpg"]
    assert source.notes == [
        "class without images, 1: 'emu'",
        "link inside the tar left out, 1: 'cat/2.jpg'",
        "special file inside the tar left out, 1: 'cat/3.jpg'",
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_no_file_can_have_is_named_by_its_byte(tmp_path: Path, form: int) -> None:
    longest = "cat/" + 4088 * "x" + ".jpg"
    assert names(open_source(f"tar:{tar(tmp_path / 'a.tar', {longest: b'?'}, form)}")) == [longest]
    endless = "cat/" + 4089 * "x" + ".jpg"
    path = tar(tmp_path / "b.tar", {"cat/1.jpg": b"?", endless: b"?"}, form)
    # A header and its block, the long name's header and its nine blocks.
    with pytest.raises(ValueError, match="member at byte 6144 has a name of more than 4096 bytes"):
        open_source(f"tar:{path}")


def test_sizes_in_base_256_and_in_pax_headers_are_read(tmp_path: Path) -> None:
    path = tar(tmp_path / "data.tar", {"cat/1.jpg": b"x" * 1000, "cat/2.jpg": b"y" * 10})
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (1000).to_bytes(11, "big")
    raw[148:156] = b"        "
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    path.write_bytes(raw)
    assert [len(item.read()) for item in open_source(f"tar:{path}").items] == [1000, 10]

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("cat/1.jpg")
        member.size = 700
        member.pax_headers = {"size": "700", "comment": "a=b\nc"}
        archive.addfile(member, BytesIO(b"z" * 700))
    assert open_source(f"tar:{path}").items[0].size == 700


def test_every_cut_of_a_tar_is_an_error(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", {"cat/1.jpg": b"x" * 700, f"{LONG}/2.jpg": b"y" * 10})
    data = whole.read_bytes()
    end = data.rindex(b"y") // 512 * 512 + 512  # where the closing zeros begin
    path = tmp_path / "cut.tar"
    for length in [*range(0, end, 37), 512, 1024, 1536, end, end + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|not a tar file"):
            open_source(f"tar:{path}")


@pytest.mark.parametrize("name", ["/cat/1.jpg", "cat/../../1.jpg", "../cat/1.jpg"])
def test_names_that_lead_out_of_a_tar_are_refused(tmp_path: Path, name: str) -> None:
    path = tar(tmp_path / "data.tar", {"cat/0.jpg": b"?", name: b"?"})
    with pytest.raises(ValueError, match="member at byte 1024 has a name that leads out"):
        open_source(f"tar:{path}")


def test_a_tar_has_a_largest_number_of_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "data.tar", {f"cat/{i}.jpg": b"" for i in range(4)})
    monkeypatch.setattr(tar_module, "MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match="more than 3 members"):
        open_source(f"tar:{path}")


def test_what_is_no_plain_tar_says_so(tmp_path: Path) -> None:
    path = tar(tmp_path / "data.tar", {"cat/1.jpg": b"x" * 700})
    compressed = tmp_path / "data.tar.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes() * 3, compresslevel=0))
    with pytest.raises(ValueError, match="compressed with gzip"):
        open_source(f"tar:{compressed}")
    damaged = bytearray(path.read_bytes())
    damaged[3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="not a tar file"):
        open_source(f"tar:{path}")
    with pytest.raises(ValueError, match="is not a file"):
        open_source(f"tar:{tmp_path}//x")


def test_a_damaged_header_in_the_middle_is_named_by_its_byte(tmp_path: Path) -> None:
    path = tar(tmp_path / "data.tar", {"cat/1.jpg": b"x" * 700, "cat/2.jpg": b"y"})
    data = bytearray(path.read_bytes())
    data[1536 + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no valid tar header at byte 1536"):
        open_source(f"tar:{path}")


# --- CIFAR ---------------------------------------------------------------------------------------


def cifar_planes(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def python2_pickle(content: Mapping[bytes, object]) -> bytes:
    """Pickle as Python 2 did for CIFAR: byte strings, and the array's module by its old name."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def dump(value: object) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        assert isinstance(value, np.ndarray)
        shape = dump(value.shape[0]) + dump(value.shape[1]) + b"\x86"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R"
        kind += b"(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
        return made + b"(K\x01" + shape + kind + b"\x89" + text(value.tobytes()) + b"tb"

    pairs = b"".join(dump(key) + dump(value) for key, value in content.items())
    return b"\x80\x02}(" + pairs + b"u."


def cifar10(root: Path, n: int = 3) -> None:
    """Write a small CIFAR-10 in both forms, the same pictures in each."""
    (root / "py").mkdir(parents=True)
    (root / "bin").mkdir()
    stems = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for k, stem in enumerate(stems):
        planes = cifar_planes(n, k)
        label = [(k + i) % 10 for i in range(n)]
        batch = {b"batch_label": b"x", b"labels": label, b"data": planes}
        (root / "py" / stem).write_bytes(python2_pickle(batch))
        rows = np.concatenate([np.array(label, np.uint8)[:, None], planes], axis=1)
        (root / "bin" / f"{stem}.bin").write_bytes(rows.tobytes())
    classes = [f"class{i}" for i in range(10)]
    meta = {b"num_vis": 3072, b"label_names": [name.encode() for name in classes]}
    (root / "py" / "batches.meta").write_bytes(python2_pickle(meta))
    (root / "bin" / "batches.meta.txt").write_text("\n".join(classes) + "\n\n")


def test_the_handmade_pickles_are_what_numpy_would_read() -> None:
    planes = cifar_planes(2, 0)
    content = pickle.loads(python2_pickle({b"data": planes, b"labels": [1, 2]}), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], planes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_forms_of_cifar_give_the_same_items_in_official_order(tmp_path: Path) -> None:
    cifar10(tmp_path)
    python, binary = (open_source(f"cifar:{tmp_path}/{form}") for form in ("py", "bin"))
    assert names(python) == names(binary)
    assert names(python)[:4] == [*(f"data_batch_1/0000{i}" for i in range(3)), "data_batch_2/00000"]
    assert labels(python) == labels(binary) == [(k + i) % 10 for k in range(5) for i in range(3)]
    for one, other in zip(python.items, binary.items, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    # Row 4 of the third batch's first picture: its red, green and blue values lie a plane apart.
    planes = cifar_planes(3, 2)[0]
    pixels = python.items[6].pixels
    assert pixels is not None
    assert pixels[4, 7].tolist() == [planes[4 * 32 + 7 + 1024 * c] for c in range(3)]
    assert names(open_source(f"cifar:{tmp_path}/bin//test")) == [
        f"test_batch/0000{i}" for i in range(3)
    ]


def test_cifar100_counts_the_fine_label(tmp_path: Path) -> None:
    planes = cifar_planes(2, 0)
    batch = {b"coarse_labels": [4, 5], b"fine_labels": [1, 0], b"data": planes}
    (tmp_path / "test").write_bytes(python2_pickle(batch))
    meta = {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"x"]}
    (tmp_path / "meta").write_bytes(python2_pickle(meta))
    source = open_source(f"cifar:{tmp_path}//test")
    assert labels(source) == [1, 0]
    assert source.classes == ["apple", "bear"]
    binary = tmp_path / "bin"
    binary.mkdir()
    heads = np.array([[4, 1], [5, 0]], np.uint8)
    (binary / "test.bin").write_bytes(np.concatenate([heads, planes], axis=1).tobytes())
    (binary / "fine_label_names.txt").write_text("apple\nbear\n")
    assert labels(open_source(f"cifar:{binary}//test")) == [1, 0]
    with pytest.raises(ValueError, match=r"lacks 'train\.bin' .* for the test part write cifar:"):
        open_source(f"cifar:{binary}")


class Touch:
    """A pickle of this runs a program when it is read by the stock unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    cifar10(tmp_path)
    proof = tmp_path / "proof"
    attack = pickle.dumps({"labels": [0], "data": Touch(proof)}, protocol=2)
    (tmp_path / "py" / "data_batch_2").write_bytes(attack)
    with pytest.raises(ValueError, match=r"data_batch_2 .*system.*nothing in it was executed"):
        open_source(f"cifar:{tmp_path}/py")
    assert not proof.exists()
    pickle.loads(attack)
    assert proof.exists(), "the attack itself works"


@pytest.mark.parametrize("name", ["os.path join", "builtins eval", "numpy load", "numpy.f2py run"])
def test_the_unpickler_knows_three_names_only(tmp_path: Path, name: str) -> None:
    cifar10(tmp_path)
    module, attribute = name.split()
    attack = f"c{module}\n{attribute}\n.".encode()
    (tmp_path / "py" / "test_batch").write_bytes(attack)
    with pytest.raises(ValueError, match="it asks for"):
        open_source(f"cifar:{tmp_path}/py//test")


def test_damaged_cifar_batches_are_named(tmp_path: Path) -> None:
    cifar10(tmp_path)
    batch = tmp_path / "py" / "test_batch"
    good = batch.read_bytes()
    planes = cifar_planes(2, 0)
    for data, message in [
        (good[:500], "is damaged"),
        (python2_pickle({b"labels": [0]}), "holds no data"),
        (python2_pickle({b"labels": [0], b"data": planes}), "2 pictures and 1 labels"),
        (python2_pickle({b"labels": [0, 10], b"data": planes}), "label 10, but only 10 class"),
        (python2_pickle({b"labels": [0, -1], b"data": planes}), "label -1"),
        (python2_pickle({b"labels": [0, 1], b"data": planes[:, :300]}), "no uint8 array"),
        (b"\x80\x02].", "holds no dictionary"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "memo entry 2147483647 at byte 3"),
        (b"\x80\x02]T\xff\xff\xff\x7fx.", "is damaged"),
        (b"\x80\x04\x8e" + 7 * b"\xff" + b"\x7f.", "is damaged"),
    ]:
        batch.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_source(f"cifar:{tmp_path}/py//test")
    with open(batch, "wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match=r"test_batch .* more than 1,073,741,824 bytes"):
        open_source(f"cifar:{tmp_path}/py//test")
    binary = tmp_path / "bin" / "test_batch.bin"
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(ValueError, match="9218 bytes, no multiple of 3073"):
        open_source(f"cifar:{tmp_path}/bin//test")
    (tmp_path / "bin" / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks 'data_batch_3\.bin'"):
        open_source(f"cifar:{tmp_path}/bin")
    with pytest.raises(ValueError, match="no CIFAR batches"):
        open_source(f"cifar:{tmp_path}")
    with pytest.raises(ValueError, match="no part 'val'"):
        open_source(f"cifar:{tmp_path}/bin//val")


# --- Tiny-ImageNet -------------------------------------------------------------------------------


def tiny(root: Path) -> None:
    image = jpeg()
    write_files(
        root,
        {
            "wnids.txt": b"n3\nn1\nn2\n",
            "train/n2/images/n2_1.JPEG": image,
            "train/n2/images/n2_0.JPEG": image,
            "train/n2/n2_boxes.txt": b"n2_0.JPEG\t0\t0\t5\t5\n",
            "train/n3/images/n3_0.JPEG": image,
            "val/images/val_0.JPEG": image,
            "val/images/val_1.JPEG": image,
            "val/val_annotations.txt": b"val_0.JPEG\tn3\t0\t0\t5\t5\nval_1.JPEG\tn1\t0\t0\t5\t5\n",
        },
    )


def test_tiny_imagenet_numbers_its_classes_by_the_sorted_list_of_all(tmp_path: Path) -> None:
    tiny(tmp_path)
    train = open_source(f"tinyimagenet:{tmp_path}")
    assert train.classes == ["n1", "n2", "n3"]
    assert names(train) == [
        "train/n2/images/n2_0.JPEG",
        "train/n2/images/n2_1.JPEG",
        "train/n3/images/n3_0.JPEG",
    ]
    assert labels(train) == [1, 1, 2]
    assert train.notes == ["class without images, 1: 'n1'"]
    val = open_source(f"tinyimagenet:{tmp_path}//val")
    assert names(val) == ["val/images/val_1.JPEG", "val/images/val_0.JPEG"]
    assert labels(val) == [0, 2]
    assert labels(open_source(f"tinyimagenet:{tmp_path}", ["n3", "n2"])) == [0, 1, 1]


def test_tiny_imagenet_refuses_what_its_lists_do_not_name(tmp_path: Path) -> None:
    tiny(tmp_path)
    write_files(tmp_path, {"val/images/val_7.JPEG": b"?"})
    with pytest.raises(ValueError, match=r"no line for val_7\.JPEG"):
        open_source(f"tinyimagenet:{tmp_path}//val")
    write_files(tmp_path, {"train/n9/images/x.JPEG": b"?"})
    with pytest.raises(ValueError, match=r"class n9 is not in .*wnids\.txt"):
        open_source(f"tinyimagenet:{tmp_path}")
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"val_annotations\.txt is not UTF-8"):
        open_source(f"tinyimagenet:{tmp_path}//val")
    (tmp_path / "wnids.txt").unlink()
    with pytest.raises(ValueError, match=r"wnids\.txt is missing"):
        open_source(f"tinyimagenet:{tmp_path}")


# --- the real sets -------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("part", ["", "//test"])
def test_real_cifar10_is_the_same_in_both_forms(part: str) -> None:
    root = os.environ["BACKMIX_DATA"]
    python = open_source(f"cifar:{root}/cifar-10-batches-py{part}")
    binary = open_source(f"cifar:{root}/cifar-10-batches-bin{part}")
    assert python.classes == binary.classes
    assert python.classes[0] == "airplane"
    assert len(python.items) == (10_000 if part else 50_000)
    assert labels(python) == labels(binary)
    assert np.bincount(labels(python)).tolist() == 10 * [len(python.items) // 10]
    for i in range(0, len(python.items), 97):
        np.testing.assert_array_equal(python.items[i].pixels, binary.items[i].pixels)


@pytest.mark.real
def test_real_tiny_imagenet_has_its_places_in_the_full_list() -> None:
    root = os.environ["BACKMIX_DATA"]
    train = open_source(f"tinyimagenet:{root}/tiny-imagenet-200")
    assert len(train.classes) == 200
    places = [1, 14, 17, 44, 58, 66, 72, 75, 81, 108, 123, 133, 134, 144, 147, 152, 167, 171, 193]
    assert sorted(set(labels(train))) == sorted([*places, 197])
    assert len(open_source(f"tinyimagenet:{root}/tiny-imagenet-200//val").items) == 400
