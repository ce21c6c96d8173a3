"""Where images come from: class folders, plain tars of them, CIFAR and Tiny-ImageNet as published.

`open_source` lists everything before anything is converted, in an order that depends on names only
(class by class, then by name), and reads no image. Nothing here executes what a file contains: the
pickles of CIFAR's python form are read by an unpickler that knows three inert names.
"""

import os
import pickle
import pickletools
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import numpy as np

from backmix.pipeline import images
from backmix.pipeline.writer import MAX_NAME

SCHEMES = """folder:DIR             class folders of images
tar:FILE//PREFIX       class folders inside a plain tar
cifar:DIR              CIFAR-10 or CIFAR-100, python or binary batches; cifar:DIR//test
tinyimagenet:DIR       Tiny-ImageNet-200 as published; tinyimagenet:DIR//val"""
"""The sources there are, one a line, for help and messages."""

MAX_CLASS_NAME = 255
"""Longest class name [bytes of UTF-8]."""
_MAX_NOTED = 5
_MAX_DEPTH = 100  # folders inside each other


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: its pixels, or where its bytes are."""

    name: str
    """Path inside the source, `/` between the parts."""
    label: int
    """Position in the source's class list."""
    path: str = ""
    """File that holds the bytes; empty where the pixels are here."""
    offset: int = 0
    size: int | None = None
    """Bytes from `offset`; None = the whole file."""
    pixels: np.ndarray | None = None
    """uint8 [h, w, 3] RGB."""

    def read(self, limit: int | None = None) -> bytes:
        """Return the encoded image, or its first `limit` bytes.

        Raises:
            ValueError: it is no regular file, or larger than `images.MAX_BYTES`.
            OSError: the file cannot be read, or is shorter than it was.
        """
        # Before it is opened: that would wait for ever for the other end of a pipe.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError("it is not a regular file")
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            if size > images.MAX_BYTES:
                raise ValueError(f"{size:,} bytes; images may have {images.MAX_BYTES:,} at most")
            wanted = size if limit is None else min(size, limit)
            data = os.pread(file.fileno(), wanted, self.offset)
        if len(data) < wanted:
            raise OSError(f"{self.path} ends before byte {self.offset + wanted}")
        return data


@dataclass(frozen=True)
class Source:
    """A listed source."""

    spec: str
    """As the user wrote it."""
    classes: list[str]
    items: Sequence[Item]
    """In the order in which they are stored; each Item is made when it is asked for."""
    notes: list[str] = field(default_factory=list)
    """What was found and not taken, and classes without images: sentences for people."""
    in_memory: bool = False
    """The items carry pixels; nothing is left to read or decode."""


def open_source(spec: str, classes: list[str] | None = None) -> Source:
    """List a source.

    Args:
        spec: one of `SCHEMES`.
        classes: the class list in label order; None takes the classes that are there, sorted.
            Listed classes may lack a folder; a folder that is not listed is an error.

    Raises:
        ValueError: an unknown spec, a wrong layout or damaged file, no images, or a class list
            that does not fit; the message says where and what to do.
        OSError: something cannot be read.
    """
    scheme, colon, rest = spec.partition(":")
    openers = {
        "folder": _open_folder,
        "tar": _open_tar,
        "cifar": _open_cifar,
        "tinyimagenet": _open_tinyimagenet,
    }
    if not colon or scheme not in openers or not rest:
        hint = f"; did you mean folder:{spec} ?" if os.path.isdir(spec) else ""
        raise ValueError(f"unknown source {spec!r}{hint} Sources are:\n{SCHEMES}")
    return openers[scheme](spec, rest, classes)


def read_classes(path: Path) -> list[str]:
    """Read a class list: one name a line, UTF-8, empty lines left out.

    Raises:
        ValueError: no names, a name twice, or a name that cannot be one.
    """
    names = [line.strip() for line in _lines(path) if line.strip()]
    if not names:
        raise ValueError(f"{path} names no class; write one class name a line")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{path} names a class twice: {_some(twice)}")
    for name in names:
        _check_class_name(name, str(path))
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


class Items(Sequence[Item]):
    """Items that are made when asked for: a million of them cost their names and some arrays."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        """Hold `count` items, the i-th of which is `make(i)`."""
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"item {index} of {self._count}")
        return self._make(index % self._count)


def _open_folder(spec: str, rest: str, classes: list[str] | None) -> Source:
    root = rest.rstrip("/") or "/"
    if not os.path.isdir(root):
        kind = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"{root} {kind}; folder:DIR needs a folder with one folder per class")
    folders: list[str] = []
    stray: list[str] = []
    for entry in _entries(root):
        (folders if _is_folder(entry) else stray).append(entry.name)
    listing = _Listing(root)
    for name in sorted(folders):
        listing.add_class(name)
        for path in _walk(root, name):
            listing.add(name, path)
    images_beside = [name for name in stray if _suffix(name) in images.SUFFIXES]
    if not folders and images_beside:
        raise ValueError(
            f"{root} holds images but no class folders ({_some(images_beside)}); move the images "
            "of each class into a folder of its name"
        )
    listing.ignored += stray
    names, labels, known, notes = listing.finish(classes)

    def make(i: int) -> Item:
        return Item(names[i], int(labels[i]), f"{root}/{names[i]}")

    return Source(spec, known, Items(len(names), make), notes)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder, sorted by name."""
    with os.scandir(folder) as found:
        return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: taken for a file, it fails later with its name
        return False


def _walk(root: str, below: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the files below `root/below` as paths relative to `root`, links followed."""
    status = os.stat(f"{root}/{below}")
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{root}/{below} is a link to a folder that it lies in; remove the link")
    if len(above) == _MAX_DEPTH:
        raise ValueError(f"{root}/{below} lies more than {_MAX_DEPTH} folders deep")
    for entry in _entries(f"{root}/{below}"):
        path = f"{below}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(root, path, (*above, here))
        elif entry.is_symlink() or entry.is_file():  # a dangling link fails later, with its name
            yield path


class _Listing:
    """Collects the files of class folders; says in the end what it took and what it left."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.ignored: list[str] = []
        self._names: dict[str, list[str]] = {}

    def add_class(self, name: str) -> None:
        if name not in self._names:
            _check_class_name(name, self.where)
            self._names[name] = []

    def add(self, class_name: str, path: str) -> None:
        if _suffix(path) in images.SUFFIXES:
            self._names[class_name].append(path)
        else:
            self.ignored.append(path)

    def finish(
        self, wanted: list[str] | None
    ) -> tuple[list[str], np.ndarray, list[str], list[str]]:
        """Return names in stored order, their labels, the class list and the notes."""
        if not any(self._names.values()):
            seen = f" ({len(self.ignored)} other files, such as {_some(self.ignored)})"
            raise ValueError(
                f"{self.where} holds no images in class folders{seen if self.ignored else ''}; "
                f"files are taken by their endings: {' '.join(sorted(images.SUFFIXES))}"
            )
        # A folder without images is a class of its own, but nothing that a list has to name.
        found = sorted(name for name, files in self._names.items() if files or wanted is None)
        classes = _class_list(found, wanted, self.where)
        notes = _note("class without images", [c for c in classes if not self._names.get(c)])
        notes += _note("file left out (no image by its ending)", self.ignored)
        names: list[str] = []
        counts: list[int] = []
        for class_name in classes:
            found = sorted(self._names.pop(class_name, []))
            counts.append(len(found))
            names += found
        return names, np.repeat(np.arange(len(classes)), counts), classes, notes


def _class_list(found: list[str], wanted: list[str] | None, where: str) -> list[str]:
    """Return the class list: `wanted` if it covers all that was found, or what was found."""
    if wanted is None:
        return found
    foreign = sorted(set(found) - set(wanted))
    if len(foreign) == len(found):
        raise ValueError(
            f"the class list ({_some(wanted)}) names none of the classes in {where} "
            f"({_some(found)})"
        )
    if foreign:
        raise ValueError(
            f"{where} holds classes that the class list does not name: {_some(foreign)}; add them "
            "to the list, or take their folders away"
        )
    return wanted


def _check_class_name(name: str, where: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{where}: the class name {name!r} is not valid UTF-8") from None
    if size > MAX_CLASS_NAME:
        raise ValueError(f"{where}: the class name {name[:60]!r}... is longer than 255 bytes")
    if not name.isprintable():
        raise ValueError(f"{where}: the class name {name!r} holds characters that do not print")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _note(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}, {len(names)}: {_some(names)}"] if names else []


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_NOTED else ""
    return ", ".join(repr(name) for name in names[:_MAX_NOTED]) + more


# The tar format: POSIX.1-2017, pax "ustar interchange format" and "pax extended header".
_BLOCK = 512
_MAX_TAR_NAME = 1 << 20  # one GNU long name or pax header [bytes]
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def _open_tar(spec: str, rest: str, classes: list[str] | None) -> Source:
    path, prefix = _split_tar(rest)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; write tar:FILE//PREFIX, or tar:FILE")
    where = f"{path}//{prefix}" if prefix else path
    listing = _Listing(where)
    found: dict[str, tuple[int, int]] = {}
    links: list[str] = []
    others: list[str] = []
    inside = prefix + "/" if prefix else ""
    outside = ""
    for member in _tar_members(path):
        name = member.name
        if not name.startswith(inside) or name == inside:
            outside = outside or name
            continue
        name = name[len(inside) :]
        parts = name.split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if member.kind == "folder":
            listing.add_class(parts[0])
        elif member.kind == "link":
            links.append(name)
        elif member.kind == "other":
            others.append(name)
        elif len(parts) == 1:
            listing.ignored.append(name)
        else:
            if name not in found:
                listing.add_class(parts[0])
                listing.add(parts[0], name)
            found[name] = (member.offset, member.size)  # as tar does: the last of a name counts
    if outside and not found:
        raise ValueError(f"{path} holds no files in folders below {prefix}, but {outside!r}, ...")
    names, labels, known, notes = listing.finish(classes)
    notes += _note("link inside the tar left out", links)
    notes += _note("special file inside the tar left out", others)
    places = np.array([found[name] for name in names], np.int64)
    del found

    def make(i: int) -> Item:
        offset, size = places[i].tolist()
        return Item(names[i], int(labels[i]), path, offset, size)

    return Source(spec, known, Items(len(names), make), notes)


def _split_tar(rest: str) -> tuple[str, str]:
    """Split FILE//PREFIX at the first `//` that ends the name of a file."""
    at = rest.find("//")
    while at >= 0:
        if os.path.isfile(rest[:at]):
            return rest[:at], rest[at:].strip("/").removeprefix("./")
        at = rest.find("//", at + 1)
    return rest.partition("//")[0] if not os.path.isfile(rest) else rest, ""


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    kind: str
    """`file`, `folder`, `link` or `other`."""
    offset: int
    size: int


def _tar_members(path: str) -> Iterator[_Member]:
    """Yield the members of a plain tar by reading its headers only.

    Raises:
        ValueError: no tar, compressed, damaged, truncated, or with sparse members or endless names.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        length = os.fstat(descriptor).st_size
        at = 0
        extended: dict[str, str] = {}
        while True:
            header = os.pread(descriptor, _BLOCK, at)
            if len(header) < _BLOCK:
                if at == 0:
                    raise ValueError(f"{path} is not a tar file: {length} bytes are no header")
                raise ValueError(
                    f"{path} is truncated: it ends at byte {length} without the closing block of "
                    "zeros; copy it again"
                )
            if not any(header):
                return
            _check_header(header, path, at)
            kind = header[156:157]
            size = _number(header[124:136], path, at)
            if kind not in b"xgLK" and "size" in extended:
                size = _decimal(extended["size"], path, at)
            body = at + _BLOCK
            # Links and folders carry no data whatever their size says.
            following = body + (0 if kind in b"123456" else -(-size // _BLOCK) * _BLOCK)
            if body + size > length and kind not in b"123456":
                raise ValueError(
                    f"{path} is truncated: the member at byte {at} needs {size} bytes, "
                    f"{max(0, length - body)} are there; copy it again"
                )
            if kind in b"xLKg":
                if size > _MAX_TAR_NAME:
                    raise ValueError(f"{path}: extended header of {size} bytes at byte {at}")
                content = os.pread(descriptor, size, body)
                if kind == b"L":
                    extended["path"] = _text(content.split(b"\0")[0])
                elif kind == b"x":
                    extended |= _pax(content, path, at)
                at = following
                continue
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
                raise ValueError(f"{path}: the member at byte {at} is sparse; repack without -S")
            name = extended.get("path") or _ustar_name(header)
            if len(os.fsencode(name)) > MAX_NAME:
                raise ValueError(
                    f"{path}: the member at byte {at} has a name of more than {MAX_NAME} bytes: "
                    f"{name[:60]!r}..."
                )
            yield _Member(_clean(name), _kind(kind, name), body, size)
            extended = {}
            at = following


def _check_header(header: bytes, path: str, at: int) -> None:
    # The checksum is the sum of all bytes with its own eight read as spaces.
    field_ = header[148:156].strip(b" \0")
    try:
        stored = int(field_, 8)
    except ValueError:
        stored = -1
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if stored == total:
        return
    # Old writers summed signed bytes.
    if stored == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        return
    if at == 0:
        for magic, program in _COMPRESSED.items():
            if header.startswith(magic):
                raise ValueError(
                    f"{path} is compressed with {program}: single images cannot be read from it; "
                    "decompress it, or unpack it and use folder:DIR"
                )
        raise ValueError(f"{path} is not a tar file")
    raise ValueError(f"{path} is damaged: no valid tar header at byte {at}; copy it again")


def _number(raw: bytes, path: str, at: int) -> int:
    """Read a size: octal digits, or GNU's base 256 where the first bit is set."""
    if raw[0] & 0x80:
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        if raw[0] & 0x40 or value >= 1 << 63:
            raise ValueError(f"{path}: impossible size in the tar header at byte {at}")
        return value
    try:
        return int(raw.strip(b" \0") or b"0", 8)
    except ValueError:
        raise ValueError(f"{path}: unreadable size in the tar header at byte {at}") from None


def _decimal(text: str, path: str, at: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{path}: unreadable size in the extended header before byte {at}")
    return int(text)


def _pax(content: bytes, path: str, at: int) -> dict[str, str]:
    """Read pax records: `LENGTH KEY=VALUE\\n`, the length counting itself."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = content[len(digits) + 1 : length]
        if length > len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"{path}: unreadable extended header at byte {at}")
        key, _, value = record[:-1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[length:]
    return records


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _clean(name: str) -> str:
    """Return a member's name without `./`, doubled and outer slashes."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _kind(flag: bytes, name: str) -> str:
    if flag == b"5" or (flag in b"0\0" and name.endswith("/")):
        return "folder"
    if flag in b"0\x007":
        return "file"
    return "link" if flag in b"12" else "other"


# CIFAR: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Both forms
# hold 32 x 32 pictures as a red, a green and a blue plane.
_PLANES = (3, 32, 32)
_PICTURE = 3 * 32 * 32
_MAX_PICKLE = 1 << 30  # the largest official batch has 155 MB


@dataclass(frozen=True)
class _Cifar:
    """One of the two CIFAR sets, as its files name things."""

    name: str
    parts: dict[str, list[str]]
    label_key: str
    names_key: str
    names_pickle: str
    names_text: str
    label_bytes: int
    """Leading bytes of a binary record; the last of them is the label that counts."""


_CIFARS = (
    _Cifar(
        "CIFAR-10",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        "labels",
        "label_names",
        "batches.meta",
        "batches.meta.txt",
        1,
    ),
    _Cifar(
        "CIFAR-100",
        {"train": ["train"], "test": ["test"]},
        "fine_labels",
        "fine_label_names",
        "meta",
        "fine_label_names.txt",
        2,
    ),
)


def _open_cifar(spec: str, rest: str, classes: list[str] | None) -> Source:
    folder, part = _split_part(rest, ("train", "test"))
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; cifar:DIR needs one such as cifar-10-batches-py")
    cifar, ending = _recognise_cifar(root)
    stems = cifar.parts[part]
    missing = [stem + ending for stem in stems if not (root / (stem + ending)).is_file()]
    if missing:
        hint = f"; for the test part write cifar:{folder}//test" if part == "train" else ""
        raise ValueError(f"{root} lacks {_some(missing)} of {cifar.name}'s {part} part{hint}")
    read = _read_binary_batch if ending else _read_pickled_batch
    batches = [read(root / (stem + ending), cifar) for stem in stems]
    found = _cifar_classes(root, cifar, pickled=not ending)
    stored = np.concatenate([labels for labels, _ in batches])
    if stored.max() >= len(found):
        raise ValueError(f"{root}: label {stored.max()}, but only {len(found)} class names")
    known = _class_list(found, classes, str(root))
    labels = np.array([known.index(name) for name in found])[stored]
    ends = np.cumsum([len(labels) for labels, _ in batches])

    def make(i: int) -> Item:
        batch = int(np.searchsorted(ends, i, "right"))
        row = i - (int(ends[batch - 1]) if batch else 0)
        pixels = np.ascontiguousarray(batches[batch][1][row].transpose(1, 2, 0))
        return Item(f"{stems[batch]}/{row:05d}", int(labels[i]), pixels=pixels)

    return Source(spec, known, Items(len(labels), make), in_memory=True)


def _split_part(rest: str, parts: tuple[str, ...]) -> tuple[str, str]:
    """Split DIR//PART; the first of `parts` where none is named."""
    folder, slashes, part = rest.rpartition("//")
    if not slashes:
        return rest, parts[0]
    if part not in parts:
        raise ValueError(f"{rest}: no part {part!r}; write DIR//{' or DIR//'.join(parts)}")
    return folder, part


def _recognise_cifar(root: Path) -> tuple[_Cifar, str]:
    """Return which set a folder holds, and the ending of its batches: none, or `.bin`."""
    there = {path.name for path in root.iterdir()}
    for ending in ("", ".bin"):
        for cifar in _CIFARS:
            if any(stem + ending in there for stems in cifar.parts.values() for stem in stems):
                return cifar, ending
    raise ValueError(
        f"{root} holds no CIFAR batches (data_batch_1, test_batch, train, test, with or without "
        ".bin); unpack the archive and name the folder with the batches"
    )


def _read_binary_batch(path: Path, cifar: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    """Return labels int64 [n] and planes uint8 [n, 3, 32, 32] of a binary batch."""
    record = cifar.label_bytes + _PICTURE
    size = path.stat().st_size
    if size == 0 or size % record:
        raise ValueError(
            f"{path} has {size} bytes, no multiple of {record} as {cifar.name}'s records are; "
            "it is cut or another set's"
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, record)
    labels = rows[:, cifar.label_bytes - 1].astype(np.int64)
    return labels, rows[:, cifar.label_bytes :].reshape(-1, *_PLANES)


def _read_pickled_batch(path: Path, cifar: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    """Return labels int64 [n] and planes uint8 [n, 3, 32, 32] of a python batch."""
    batch = _unpickle(path)
    data, labels = batch.get("data"), batch.get(cifar.label_key)
    if not isinstance(data, _Shell) or not isinstance(labels, list):
        raise ValueError(f"{path} holds no data and {cifar.label_key}; it is no {cifar.name} batch")
    planes = _plain_array(data, path)
    if len(labels) != len(planes) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: {len(planes)} pictures and {len(labels)} labels")
    if min(labels) < 0:
        raise ValueError(f"{path}: label {min(labels)}")
    return np.array(labels, np.int64), planes.reshape(-1, *_PLANES)


def _cifar_classes(root: Path, cifar: _Cifar, *, pickled: bool) -> list[str]:
    path = root / (cifar.names_pickle if pickled else cifar.names_text)
    if not path.is_file():
        raise ValueError(f"{path} is missing; it holds the class names")
    if not pickled:
        return read_classes(path)
    names = _unpickle(path).get(cifar.names_key)
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} holds no {cifar.names_key}")
    decoded = [_string(name) for name in names]
    for name in decoded:
        _check_class_name(name, str(path))
    if len(set(decoded)) < len(decoded):
        raise ValueError(f"{path} names a class twice")
    return decoded


class _Shell:
    """Stands for an array or a dtype in a pickle: keeps what would have been done with it."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR without running anything that they name.

    A pickle acts only through the objects that it looks up by name. Here three names of numpy
    lead to an inert class of our own, and every other name is refused.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        module = module_name.replace("numpy._core", "numpy.core")  # its name since numpy 2
        if (module, global_name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        ):
            return _Shell
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _unpickle(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_PICKLE:
        raise ValueError(f"{path} is no CIFAR batch: it has more than {_MAX_PICKLE:,} bytes")
    data = path.read_bytes()
    try:
        # First without building anything: this finds lengths beyond the end of the file. Numbers
        # of the memo count its entries, yet the unpickler makes room for any.
        for opcode, number, at in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(data):
                raise ValueError(f"memo entry {number} at byte {at}")
        # encoding: the official files were written by Python 2, whose strings are bytes.
        content = _Unpickler(BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        raise ValueError(
            f"{path} is no CIFAR batch, or is damaged ({error}); nothing in it was executed"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no CIFAR batch: it holds no dictionary")
    return {_string(key): value for key, value in content.items()}


def _string(text: object) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _plain_array(shell: _Shell, path: Path) -> np.ndarray:
    """Build the uint8 [n, 3072] array that a shell stands for."""
    match shell.state:
        case (1, (int(n), int(width)), _Shell(arguments=(kind, *_)), order, bytes(content)):
            if width == _PICTURE and _string(kind) == "u1" and not order:
                if n > 0 and len(content) == n * width:
                    return np.frombuffer(content, np.uint8).reshape(n, width)
    raise ValueError(f"{path}: the data is no uint8 array of rows of {_PICTURE}; it is damaged")


def _open_tinyimagenet(spec: str, rest: str, classes: list[str] | None) -> Source:
    root, part = _split_part(rest, ("train", "val"))
    listed = Path(root) / "wnids.txt"
    if not listed.is_file():
        raise ValueError(f"{listed} is missing; tinyimagenet:DIR needs the official layout")
    # Class numbers are places in the sorted list of all classes, whatever of it is here.
    every = sorted(read_classes(listed))
    found = list(_tiny_train(root) if part == "train" else _tiny_val(root))
    for wnid, name in found:
        if wnid not in every:
            raise ValueError(f"{root}/{name}: its class {wnid} is not in {listed}")
    if not found:
        raise ValueError(f"{root}/{part} holds no images")
    present = sorted({wnid for wnid, _ in found})
    known = every if classes is None else _class_list(present, classes, f"{root}/{part}")
    label_of = {wnid: label for label, wnid in enumerate(known)}
    names = [name for _, name in found]
    labels = [label_of[wnid] for wnid, _ in found]
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    notes = _note("class without images", [wnid for wnid in known if wnid not in present])

    def make(i: int) -> Item:
        k = order[i]
        return Item(names[k], labels[k], f"{root}/{names[k]}")

    return Source(spec, known, Items(len(names), make), notes)


def _tiny_train(root: str) -> Iterator[tuple[str, str]]:
    """Yield (class, path below `root`) of the training images: train/WNID/images/FILE."""
    if not os.path.isdir(f"{root}/train"):
        raise ValueError(f"{root}/train is missing; tinyimagenet:DIR needs the official layout")
    for folder in _entries(f"{root}/train"):
        if _is_folder(folder) and os.path.isdir(f"{folder.path}/images"):
            for entry in _entries(f"{folder.path}/images"):
                if _suffix(entry.name) in images.SUFFIXES:
                    yield folder.name, f"train/{folder.name}/images/{entry.name}"


def _tiny_val(root: str) -> Iterator[tuple[str, str]]:
    """Yield (class, path below `root`) of the validation images, by val_annotations.txt."""
    annotations = Path(root) / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(f"{annotations} is missing; it holds the labels of the val part")
    class_of: dict[str, str] = {}
    for number, line in enumerate(_lines(annotations), 1):
        file, *columns = line.split("\t")
        if not columns:
            raise ValueError(
                f"{annotations}, line {number}: expected FILE, tab, class; got {line!r}"
            )
        class_of[file] = columns[0].strip()
    for entry in _entries(f"{root}/val/images"):
        if _suffix(entry.name) in images.SUFFIXES:
            if entry.name not in class_of:
                raise ValueError(f"{annotations} has no line for {entry.name}")
            yield class_of[entry.name], f"val/images/{entry.name}"
