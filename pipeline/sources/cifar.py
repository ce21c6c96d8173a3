"""CIFAR-10 and CIFAR-100 as published, python or binary batches.

The pickles of the python form are read by an unpickler that knows three inert names.
"""

import pickle
import pickletools
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.sources.classes import check_class_names, class_list, read_classes
from backmix.pipeline.sources.source import Item, Items, Source, some, split_part

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


def open_cifar(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `cifar:DIR` or a part of it."""
    folder, part = split_part(rest, ("train", "test"))
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; cifar:DIR needs one such as cifar-10-batches-py")
    cifar, ending = _recognise_cifar(root)
    stems = cifar.parts[part]
    missing = [stem + ending for stem in stems if not (root / (stem + ending)).is_file()]
    if missing:
        hint = f"; for the test part write cifar:{folder}//test" if part == "train" else ""
        raise ValueError(f"{root} lacks {some(missing)} of {cifar.name}'s {part} part{hint}")
    read = _read_binary_batch if ending else _read_pickled_batch
    batches = [read(root / (stem + ending), cifar) for stem in stems]
    found = _cifar_classes(root, cifar, pickled=not ending)
    stored = np.concatenate([labels for labels, _ in batches])
    if stored.max() >= len(found):
        raise ValueError(f"{root}: label {stored.max()}, but only {len(found)} class names")
    known = class_list(found, classes, str(root))
    labels = np.array([known.index(name) for name in found])[stored]
    ends = np.cumsum([len(labels) for labels, _ in batches])

    def make(i: int) -> Item:
        batch = int(np.searchsorted(ends, i, "right"))
        row = i - (int(ends[batch - 1]) if batch else 0)
        pixels = np.ascontiguousarray(batches[batch][1][row].transpose(1, 2, 0))
        return Item(f"{stems[batch]}/{row:05d}", int(labels[i]), pixels=pixels)

    return Source(spec, known, Items(len(labels), make), in_memory=True)


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
    check_class_names(decoded, str(path))
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
