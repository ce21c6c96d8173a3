"""ImageNet-1k (ILSVRC 2012) as people hold it: the tars as published, folders, Kaggle's layout.

Whatever the form, samples come class by class in alphabetical order of the WNIDs, then by name,
and are called WNID/FILE: the same images give the same file. The labels of the flat validation
part are those of the devkit, whose class numbers are not alphabetical, or of Kaggle's table.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backmix.pipeline.sources.classes import Listing
from backmix.pipeline.sources.folder import entries, is_folder, walk
from backmix.pipeline.sources.matfile import read_mat
from backmix.pipeline.sources.source import Item, Items, Source, note, read_lines, split_part
from backmix.pipeline.sources.tar import Member, tar_members

_WNID = re.compile(r"n\d{8}")
_VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_MAX_DEVKIT = 1 << 26  # bytes of one of its files; the official ones have 2 MB
_MAX_DEVKIT_MEMBERS = 10_000


@dataclass(frozen=True, slots=True)
class _Picture:
    wnid: str
    file: str
    """Path below the class; empty tells of a class only."""
    archive: str = ""
    """The tar that holds it; empty where it is a file of its own."""
    offset: int = 0
    size: int = 0


def open_imagenet(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `imagenet:DIR` (the training part) or `imagenet:DIR//val`."""
    root, part = split_part(rest, ("train", "val"))
    root = root.rstrip("/") or "/"
    if not os.path.isdir(root):
        raise ValueError(
            f"{root} is no folder; imagenet:DIR needs the folder with ImageNet's files"
        )
    held = _held(root, part)
    flat = part == "val" and _is_flat(held)
    labels_of_val = _Labels(root) if flat else None
    listed = labels_of_val.wnids if labels_of_val else _listed_wnids(root)
    listing = Listing(held)
    archives: list[str] = []
    places: dict[str, tuple[int, int, int]] = {}
    strange: list[str] = []
    found = _flat(held, labels_of_val, strange) if labels_of_val else _by_class(held, strange)
    for picture in found:
        listing.add_class(picture.wnid)
        name = f"{picture.wnid}/{picture.file}"
        if picture.file and name not in places:
            listing.add(picture.wnid, name)
        if picture.archive:
            if picture.archive not in archives[-1:]:
                archives.append(picture.archive)
            places[name] = (len(archives) - 1, picture.offset, picture.size)
    wanted = classes if classes is not None else listed
    if wanted is None:
        wanted = _folders_of_both(root, held)
    names, labels, known, notes = listing.finish(wanted)
    notes += note("left out (neither a WNID nor an image of the set by its name)", strange)
    if other := _also_held(root, part, held):
        notes.append(f"{other} is there, too; {held} was read")
    table = np.array([places[name] for name in names], np.int64) if places else None
    del places

    def make(i: int) -> Item:
        name, label = names[i], int(labels[i])
        if table is not None:
            archive, offset, size = table[i].tolist()
            return Item(name, label, archives[archive], offset, size)
        return Item(name, label, f"{held}/{name.partition('/')[2] if flat else name}")

    return Source(spec, known, Items(len(names), make), notes, files=archives)


# --- which form there is -------------------------------------------------------------------------


def _forms(root: str, part: str) -> Iterator[str]:
    """Yield the tars and folders of a part that are there, the one to be read first."""
    stem = f"{root}/ILSVRC2012_img_{part}"
    if os.path.isfile(f"{stem}.tar"):
        yield f"{stem}.tar"
    folders = [f"{root}/{part}", stem, *(f"{root}/{below}/{part}" for below in _KAGGLE)]
    yield from (folder for folder in folders if os.path.isdir(folder))


def _held(root: str, part: str) -> str:
    for form in _forms(root, part):
        return form
    raise ValueError(
        f"{root} holds no {part} part of ImageNet: neither ILSVRC2012_img_{part}.tar nor a folder "
        f"{part}, ILSVRC2012_img_{part} or {_KAGGLE[0]}/{part}"
    )


def _also_held(root: str, part: str, held: str) -> str:
    return next((form for form in _forms(root, part) if form != held), "")


def _is_flat(held: str) -> bool:
    """Tell whether the validation part is one heap of images."""
    if held.endswith(".tar"):
        return True
    return not any(_WNID.fullmatch(e.name) and is_folder(e) for e in entries(held))


def _folders_of_both(root: str, held: str) -> list[str] | None:
    """Return the WNIDs that train and val have folders of, so that both get the same numbers."""
    if held.endswith(".tar"):
        return None
    found: set[str] = set()
    for part in ("train", "val"):
        folder = f"{os.path.dirname(held)}/{part}"
        for path in {folder, held}:
            if os.path.isdir(path):
                found |= {name for e in entries(path) if (name := _class_entry(e))}
    return sorted(found) or None


def _class_entry(entry: os.DirEntry[str]) -> str:
    """Return the WNID of a class folder or a class's tar, or nothing."""
    name = entry.name if is_folder(entry) else entry.name.removesuffix(".tar")
    shaped = name != entry.name or is_folder(entry)
    return name if shaped and _WNID.fullmatch(name) else ""


# --- images by class: the training part, and a validation part that was sorted -------------------


def _by_class(held: str, strange: list[str]) -> Iterator[_Picture]:
    if held.endswith(".tar"):
        for member in tar_members(held):
            wnid = os.path.basename(member.name).removesuffix(".tar")
            if member.kind == "file" and member.name.endswith(".tar") and _WNID.fullmatch(wnid):
                yield _Picture(wnid, "")
                yield from _of_class_tar(held, wnid, member, strange)
            elif member.kind != "folder":
                strange.append(member.name)
        return
    for entry in entries(held):
        wnid = _class_entry(entry)
        if not wnid:
            strange.append(entry.name)
            continue
        yield _Picture(wnid, "")
        if is_folder(entry):
            for path in walk(held, entry.name):
                yield _Picture(wnid, path.partition("/")[2])
        else:
            yield from _of_class_tar(entry.path, wnid, None, strange)


def _of_class_tar(
    path: str, wnid: str, within: Member | None, strange: list[str]
) -> Iterator[_Picture]:
    for member in tar_members(path, within):
        base = os.path.basename(member.name)
        if member.kind == "file" and not base.startswith("."):
            yield _Picture(wnid, base, path, member.offset, member.size)
        elif member.kind not in ("folder", "file"):
            strange.append(f"{wnid}/{member.name}")


# --- images in one heap: the validation part -----------------------------------------------------


def _flat(held: str, labels: "_Labels", strange: list[str]) -> Iterator[_Picture]:
    if held.endswith(".tar"):
        for member in tar_members(held):
            base = os.path.basename(member.name)
            if member.kind == "file" and _VAL_FILE.fullmatch(base):
                wnid = labels.wnid_of(base, held)
                yield _Picture(wnid, base, held, member.offset, member.size)
            elif member.kind != "folder":
                strange.append(member.name)
        return
    for entry in entries(held):
        if _VAL_FILE.fullmatch(entry.name):
            yield _Picture(labels.wnid_of(entry.name, held), entry.name)
        else:
            strange.append(entry.name)


class _Labels:
    """The classes of the validation images, from Kaggle's table or from the devkit."""

    def __init__(self, root: str) -> None:
        self._of_file: dict[str, str] = {}
        self._of_number: list[str] = []
        self.wnids: list[str] | None = None
        table = _first_file(root, "LOC_val_solution.csv")
        if table:
            self.where = table
            self._of_file = _kaggle_labels(table)
            self.wnids = _listed_wnids(root) or sorted(set(self._of_file.values()))
            return
        devkit = _devkit(root)
        if devkit is None:
            raise ValueError(
                f"{root}: the validation images lie in one heap, and their labels are missing; put "
                f"the devkit ({_DEVKIT}.tar.gz or its folder) or Kaggle's LOC_val_solution.csv "
                "beside them"
            )
        self.where = f"{devkit.where}/{_TRUTH}"
        wnid_of_id = devkit.wnids()
        self.wnids = sorted(wnid_of_id.values())
        for line, number in enumerate(devkit.truth(), 1):
            if number not in wnid_of_id:
                raise ValueError(f"{self.where}, line {line}: class {number} is not in meta.mat")
            self._of_number.append(wnid_of_id[number])

    def wnid_of(self, file: str, held: str) -> str:
        """Return the class of `ILSVRC2012_val_NNNNNNNN.JPEG`."""
        if self._of_file:
            wnid = self._of_file.get(file.partition(".")[0], "")
        else:
            number = int(file[15:23])  # images count from 1
            known = 1 <= number <= len(self._of_number)
            wnid = self._of_number[number - 1] if known else ""
        if not wnid:
            raise ValueError(f"{held}: {file} has no label in {self.where}")
        return wnid


def _first_file(root: str, name: str) -> str:
    """Return a file that lies in the folder, or above it where that is Kaggle's ILSVRC."""
    above = [os.path.dirname(os.path.abspath(root))] if _in_kaggle(root) else []
    return next((f"{f}/{name}" for f in [root, *above] if os.path.isfile(f"{f}/{name}")), "")


def _in_kaggle(root: str) -> bool:
    return os.path.isdir(f"{root}/Data/CLS-LOC")


def _kaggle_labels(path: str) -> dict[str, str]:
    """Return image to WNID from `ImageId,PredictionString`, whose first word is the WNID."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(Path(path)), 1):
        image, comma, rest = line.partition(",")
        if not line.strip() or (number == 1 and image == "ImageId"):
            continue
        words = rest.split()
        if not comma or not words or not _WNID.fullmatch(words[0]):
            raise ValueError(f"{path}, line {number}: expected IMAGE,WNID ...; got {line[:80]!r}")
        found[image] = words[0]
    if not found:
        raise ValueError(f"{path} holds no labels")
    return found


# --- the class list ------------------------------------------------------------------------------


def _listed_wnids(root: str) -> list[str] | None:
    """Return all WNIDs in alphabetical order where Kaggle's table or the devkit tells them."""
    path = _first_file(root, "LOC_synset_mapping.txt")
    if path:
        found = []
        for number, line in enumerate(read_lines(Path(path)), 1):
            wnid = line.partition(" ")[0]
            if not _WNID.fullmatch(wnid):
                raise ValueError(f"{path}, line {number}: expected WNID, names; got {line[:80]!r}")
            found.append(wnid)
        return sorted(set(found)) or None
    devkit = _devkit(root)
    return sorted(devkit.wnids().values()) if devkit else None


@dataclass
class _Devkit:
    where: str
    meta: BinaryIO
    truth_text: bytes

    def truth(self) -> list[int]:
        """Return the class number of each validation image, in the devkit's own order."""
        numbers = []
        for number, line in enumerate(self.truth_text.splitlines(), 1):
            if not line.strip().isdigit() or len(line) > 16:
                raise ValueError(
                    f"{self.where}/{_TRUTH}, line {number}: expected a class number; got "
                    f"{line[:40]!r}"
                )
            numbers.append(int(line))
        return numbers

    def wnids(self) -> dict[int, str]:
        """Return ILSVRC2012_ID to WNID of the classes: the synsets that have none below them."""
        where = f"{self.where}/meta.mat"
        synsets = read_mat(self.meta, where, {"synsets"}).get("synsets")
        if not isinstance(synsets, list) or not synsets or not isinstance(synsets[0], dict):
            raise ValueError(f"{where} holds no structure 'synsets'")
        found: dict[int, str] = {}
        for row, synset in enumerate(synsets):
            number, children = (_integer(synset.get(k)) for k in ("ILSVRC2012_ID", "num_children"))
            wnid = synset.get("WNID")
            if number is None or children is None or not isinstance(wnid, str):
                raise ValueError(f"{where}: synset {row} lacks ILSVRC2012_ID, WNID or num_children")
            if children:
                continue
            if not _WNID.fullmatch(wnid) or number in found or wnid in found.values():
                raise ValueError(f"{where}: synset {row} ({number}, {wnid[:20]!r}) is no class")
            found[number] = wnid
        if not found:
            raise ValueError(f"{where} names no class")
        return found


def _integer(value: object) -> int | None:
    if isinstance(value, np.ndarray) and value.size == 1 and value.item() == value.item() // 1:
        return int(value.item())
    return None


def _devkit(root: str) -> _Devkit | None:
    """Find the devkit: its folder, its packed form, or its two files themselves."""
    for folder in (f"{root}/{_DEVKIT}/data", f"{root}/data", root):
        meta, truth = Path(folder, "meta.mat"), Path(folder, _TRUTH)
        if meta.is_file() and truth.is_file():
            return _Devkit(folder, BytesIO(_small(meta)), _small(truth))
    packed = Path(root, f"{_DEVKIT}.tar.gz")
    return _packed_devkit(packed) if packed.is_file() else None


def _small(path: Path) -> bytes:
    if path.stat().st_size > _MAX_DEVKIT:
        raise ValueError(f"{path} has more than {_MAX_DEVKIT:,} bytes; the devkit's are smaller")
    return path.read_bytes()


def _packed_devkit(path: Path) -> _Devkit:
    """Read two members of the devkit's archive, which is small, from start to end."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for count, member in enumerate(archive):
                if count > _MAX_DEVKIT_MEMBERS or member.size > _MAX_DEVKIT:
                    raise ValueError(f"{path} is larger than the devkit")
                base = os.path.basename(member.name)
                content = archive.extractfile(member) if base in ("meta.mat", _TRUTH) else None
                if content is not None and member.isreg():
                    found[base] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    if len(found) < 2:
        raise ValueError(f"{path} lacks meta.mat or {_TRUTH}")
    return _Devkit(str(path), BytesIO(found["meta.mat"]), found[_TRUTH])
