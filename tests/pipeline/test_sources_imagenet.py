"""ImageNet in every form that people hold it in: the same images, the same list."""

import gzip
import os
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Source
from tests.images import jpeg, photograph, tar, write_files

# The devkit's class numbers are not alphabetical: 1 is n00000003, 2 is n00000001, 3 is n00000002.
WNIDS = ["n00000003", "n00000001", "n00000002"]
TRUTH = [2, 1, 3, 3, 2]
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"


def train_files() -> dict[str, bytes]:
    names = [f"{wnid}/{wnid}_{k}.JPEG" for wnid in WNIDS for k in (10, 2)]
    return {name: jpeg(photograph(k)) for k, name in enumerate(names)}


def val_files() -> dict[str, bytes]:
    """Return the heap's files by name; the devkit has their labels in `TRUTH`."""
    return {
        f"ILSVRC2012_val_{k:08}.JPEG": jpeg(photograph(50 + k)) for k in range(1, len(TRUTH) + 1)
    }


def sorted_val() -> dict[str, bytes]:
    wnids = [WNIDS[number - 1] for number in TRUTH]
    return {f"{w}/{name}": data for w, (name, data) in zip(wnids, val_files().items(), strict=True)}


def meta_mat() -> bytes:
    kinds = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")]
    rows = [(k + 1, wnid, "a, b", 0, np.empty((1, 0))) for k, wnid in enumerate(WNIDS)]
    rows.append((4, "n00000000", "above all", 3, np.array([[1, 2, 3]])))
    array = np.empty((len(rows), 1), kinds)
    for i, row in enumerate(rows):
        array[i, 0] = row
    stream = BytesIO()
    savemat(stream, {"synsets": array}, do_compression=True)
    return stream.getvalue()


def devkit() -> dict[str, bytes]:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {f"{DEVKIT}/data/meta.mat": meta_mat(), f"{DEVKIT}/data/{TRUTH_FILE}": truth}


def kaggle_tables() -> dict[str, bytes]:
    rows = ["ImageId,PredictionString"]
    for name in reversed(sorted_val()):
        wnid, _, file = name.partition("/")
        rows.append(f"{file.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 1 1 9 9 ")
    mapping = "".join(f"{wnid} some, names\n" for wnid in sorted(WNIDS))
    return {
        "LOC_val_solution.csv": "\r\n".join(rows).encode(),
        "LOC_synset_mapping.txt": mapping.encode(),
    }


def tar_of_tars(path: Path, files: dict[str, bytes], scratch: Path) -> None:
    outer: dict[str, bytes] = {}
    for wnid in WNIDS:
        members = {k.partition("/")[2]: v for k, v in files.items() if k.startswith(wnid)}
        outer[f"{wnid}.tar"] = tar(scratch, members).read_bytes()
    tar(path, outer)


def lay_out(root: Path, form: str) -> str:
    """Write ImageNet in one form and return the folder to name."""
    root.mkdir(exist_ok=True)
    scratch = root.parent / "scratch.tar"
    if form in ("tars", "tars and packed devkit"):
        tar_of_tars(root / "ILSVRC2012_img_train.tar", train_files(), scratch)
        tar(root / "ILSVRC2012_img_val.tar", val_files())
        if form == "tars":
            write_files(root, devkit())
        else:
            packed = tar(scratch, devkit()).read_bytes()
            (root / f"{DEVKIT}.tar.gz").write_bytes(gzip.compress(packed))
    elif form == "folders":
        write_files(root / "train", train_files())
        write_files(root / "val", sorted_val())
    elif form == "folders, val in a heap":
        write_files(root / "train", train_files())
        write_files(root / "val", val_files())
        write_files(root, devkit())
    elif form == "tars of classes":
        tar_of_tars(scratch, train_files(), root.parent / "inner.tar")
        (root / "train").mkdir()
        with tarfile.open(scratch) as archive:
            for member in archive:
                data = archive.extractfile(member)
                assert data is not None
                (root / "train" / member.name).write_bytes(data.read())
        tar(root / "ILSVRC2012_img_val.tar", val_files())
        write_files(root, devkit())
    else:
        below = "Data/CLS-LOC" if form == "inside Kaggle" else "ILSVRC/Data/CLS-LOC"
        folder = root / "ILSVRC" / "Data" / "CLS-LOC"
        write_files(folder / "train", train_files())
        write_files(folder / "val", val_files())
        write_files(root, kaggle_tables())
        return str(root / "ILSVRC") if below == "Data/CLS-LOC" else str(root)
    return str(root)


FORMS = [
    "tars",
    "tars and packed devkit",
    "folders",
    "folders, val in a heap",
    "tars of classes",
    "Kaggle",
    "inside Kaggle",
]


def content(source: Source) -> list[tuple[str, int, bytes]]:
    return [(item.name, item.label, item.read()) for item in source.items]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_list(tmp_path: Path, form: str) -> None:
    root = lay_out(tmp_path / "set", form)
    for part, files in (("train", train_files()), ("val", sorted_val())):
        source = open_source(f"imagenet:{root}//{part}")
        expected = [(n, sorted(WNIDS).index(n[:9]), files[n]) for n in sorted(files)]
        assert content(source) == expected
        assert source.classes == sorted(WNIDS), "alphabetical, not in the devkit's order"
        assert source.notes == []
    assert content(open_source(f"imagenet:{root}")) == content(
        open_source(f"imagenet:{root}//train")
    )


def test_a_part_of_the_classes_keeps_its_places_in_the_whole_list(tmp_path: Path) -> None:
    files = {name: data for name, data in train_files().items() if "n00000003" in name}
    write_files(tmp_path / "train", files)
    write_files(tmp_path, devkit())
    source = open_source(f"imagenet:{tmp_path}")
    assert [item.label for item in source.items] == [2, 2]
    assert source.notes == ["class without images, 2: 'n00000001', 'n00000002'"]
    chosen = open_source(f"imagenet:{tmp_path}", ["n00000003"])
    assert (chosen.classes, chosen.items[0].label) == (["n00000003"], 0)


def test_without_a_list_train_and_val_folders_share_their_numbers(tmp_path: Path) -> None:
    write_files(tmp_path / "train", train_files())
    write_files(tmp_path / "val", {n: d for n, d in sorted_val().items() if "n00000003" in n})
    source = open_source(f"imagenet:{tmp_path}//val")
    assert source.classes == sorted(WNIDS)
    assert [item.label for item in source.items] == [2]


def test_two_forms_at_once_are_told(tmp_path: Path) -> None:
    lay_out(tmp_path, "tars")
    write_files(tmp_path / "val", sorted_val())
    (note,) = open_source(f"imagenet:{tmp_path}//val").notes
    assert note == f"{tmp_path}/val is there, too; {tmp_path}/ILSVRC2012_img_val.tar was read"


def test_strangers_are_left_out_and_told(tmp_path: Path) -> None:
    lay_out(tmp_path, "folders, val in a heap")
    write_files(tmp_path, {"val/readme.txt": b"?", "train/other/1.JPEG": b"?"})
    assert "'readme.txt'" in open_source(f"imagenet:{tmp_path}//val").notes[0]
    assert "'other'" in open_source(f"imagenet:{tmp_path}").notes[0]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        open_source(f"imagenet:{tmp_path}/no")
    with pytest.raises(ValueError, match=r"neither ILSVRC2012_img_val\.tar nor a folder val"):
        open_source(f"imagenet:{tmp_path}//val")
    with pytest.raises(ValueError, match="no part 'test'"):
        open_source(f"imagenet:{tmp_path}//test")
    write_files(tmp_path / "val", val_files())
    with pytest.raises(ValueError, match="labels are missing; put the devkit"):
        open_source(f"imagenet:{tmp_path}//val")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_source(f"imagenet:{tmp_path}")


def test_labels_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_files(tmp_path / "val", val_files() | {"ILSVRC2012_val_00000077.JPEG": b"?"})
    write_files(tmp_path, devkit())
    data = tmp_path / DEVKIT / "data"
    with pytest.raises(ValueError, match=r"val_00000077\.JPEG has no label in .*ground_truth"):
        open_source(f"imagenet:{tmp_path}//val")
    (data / TRUTH_FILE).write_text("1\n2\n9\n")
    with pytest.raises(ValueError, match="line 3: class 9 is not in meta"):
        open_source(f"imagenet:{tmp_path}//val")
    (data / TRUTH_FILE).write_text("1\ntwo\n")
    with pytest.raises(ValueError, match="line 2: expected a class number; got b'two'"):
        open_source(f"imagenet:{tmp_path}//val")
    (data / "meta.mat").write_bytes(meta_mat()[:200])
    with pytest.raises(ValueError, match=r"data/meta\.mat is truncated"):
        open_source(f"imagenet:{tmp_path}//val")
    write_files(tmp_path, {"LOC_val_solution.csv": b"ImageId,PredictionString\nx,dog 1 2\n"})
    with pytest.raises(ValueError, match="line 2: expected IMAGE,WNID"):
        open_source(f"imagenet:{tmp_path}//val")


def test_damaged_archives_are_named_with_their_byte(tmp_path: Path) -> None:
    lay_out(tmp_path, "tars and packed devkit")
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer) as archive:
        inner = archive.getmembers()[1]
    data = bytearray(outer.read_bytes())
    data[inner.offset_data + 3] ^= 1
    outer.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.tar \(n00000001\.tar inside it\) is not a tar"):
        open_source(f"imagenet:{tmp_path}")
    # An inner tar that claims more than it has must not read its neighbour.
    data[inner.offset_data + 3] ^= 1
    size = inner.offset_data + 124
    data[size : size + 12] = b"00000777777\0"
    head = data[inner.offset_data : inner.offset_data + 512]
    head[148:156] = 8 * b" "
    data[inner.offset_data + 148 : inner.offset_data + 156] = f"{sum(head):06o}\0 ".encode()
    outer.write_bytes(data)
    with pytest.raises(ValueError, match=f"truncated: the member at byte {inner.offset_data} "):
        open_source(f"imagenet:{tmp_path}")
    packed = tmp_path / f"{DEVKIT}.tar.gz"
    packed.write_bytes(packed.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"devkit_t12\.tar\.gz cannot be read"):
        open_source(f"imagenet:{tmp_path}//val")
    packed.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"devkit_t12\.tar\.gz cannot be read"):
        open_source(f"imagenet:{tmp_path}//val")


@pytest.mark.real
def test_real_imagenet_pictures_are_found_in_a_tar_of_tars(tmp_path: Path) -> None:
    sample = Path(os.environ["BACKMIX_DATA"]) / "imagenet-sample"
    outer: dict[str, bytes] = {}
    expected: dict[str, bytes] = {}
    for folder in sorted(sample.iterdir())[:40]:
        (picture,) = folder.iterdir()
        wnid, data = folder.name[:9], picture.read_bytes()
        outer[f"{wnid}.tar"] = tar(tmp_path / "x", {f"{wnid}_1.JPEG": data}).read_bytes()
        expected[f"{wnid}/{wnid}_1.JPEG"] = data
    tar(tmp_path / "ILSVRC2012_img_train.tar", outer)
    source = open_source(f"imagenet:{tmp_path}")
    assert {item.name: item.read() for item in source.items} == expected
