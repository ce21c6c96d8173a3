"""What a network said of every image of one set, as a file: any score or metric from one pass.

RUN/scores/NAME.safetensors: the tensors logits, features, labels and index of `Outputs`, extra.NAME
and score.NAME for its extras and scores, and as metadata `backmix` a JSON document with the rest.
Neither writing nor reading takes memory for a whole set: a pass appends to a `Spool`, `store`
copies it chunk by chunk, and `load_outputs` maps the file.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import safetensors

from backmix.train.checkpoint import write_parts

TENSORS = ("logits", "features", "labels", "index")
EXTRA, SCORE = "extra.", "score."
"""Prefixes of extras and scores in the file."""
_DTYPES = {np.dtype("<f8"): "F64", np.dtype("<f4"): "F32", np.dtype("<i8"): "I64"}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Outputs:
    """What the network said of every image of one set; n images, K classes, C channels."""

    name: str
    kind: Literal["known", "unknown"]
    logits: np.ndarray
    """float32 [n, K]."""
    features: np.ndarray
    """float32 [n, C]: the last feature map's mean over its cells."""
    labels: np.ndarray
    """int64 [n]: position in the run's class list, -1 = unknown."""
    index: np.ndarray
    """int64 [n]: sample number; of a folder, the position in its sorted list of images."""
    files: tuple[str, ...]
    digest: str
    """Identifies the files."""
    bad: tuple[str, ...] = ()
    """Images that could not be read and were left out."""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 or float64 [n] or [n, d]: what scores need beyond logits and features, by name."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float64 [n] by the score's name, larger = more known; empty where none were computed."""

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.arrays().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the outputs of {self.name} have unequal lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every array by its name in the file."""
        return (
            {name: getattr(self, name) for name in TENSORS}
            | {EXTRA + name: array for name, array in self.extras.items()}
            | {SCORE + name: array for name, array in self.scores.items()}
        )


class Spool:
    """Arrays that grow row by row on disk, in files without a name, which vanish with the arrays.

    The first rows added fix the arrays' names, dtypes and columns. `with` closes the files; arrays
    that were taken before stay valid.
    """

    def __init__(self, folder: Path) -> None:
        """Begin without rows; the files lie on the disk of `folder`."""
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._columns: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.rows = 0

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append rows, [m, ...] each, with one m."""
        for name, array in arrays.items():
            if self.rows == 0:
                self._files[name] = tempfile.TemporaryFile(dir=self.folder)
                self._columns[name] = (array.dtype, array.shape[1:])
            assert self._columns[name] == (array.dtype, array.shape[1:])
            self._files[name].write(np.ascontiguousarray(array).data)
        self.rows += len(next(iter(arrays.values())))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all rows as maps of the files."""
        found = {}
        for name, file in self._files.items():
            file.flush()
            dtype, columns = self._columns[name]
            shape = (self.rows, *columns)
            if 0 in shape:  # nothing can be mapped
                found[name] = np.empty(shape, dtype)
            else:
                found[name] = np.asarray(np.memmap(file, dtype, mode="c", shape=shape))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()


def store(path: Path, outputs: Outputs) -> None:
    """Write the outputs of one set, whole or not at all.

    Raises OSError naming the file, the bytes needed and the bytes free, and leaves nothing behind.
    """
    document = {
        "name": outputs.name,
        "kind": outputs.kind,
        "files": list(outputs.files),
        "digest": outputs.digest,
        "bad": list(outputs.bad),
    }
    # Widest first: then every tensor lies at a multiple of its entries' size.
    arrays = sorted(outputs.arrays().items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"backmix": json.dumps(document, sort_keys=True)}}
    end = 0
    for name, array in arrays:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, array in arrays:
            step = max(1, _CHUNK * len(array) // max(array.nbytes, 1))
            for row in range(0, len(array), step):
                yield np.ascontiguousarray(array[row : row + step]).data

    write_parts(path, parts(), end)


def load_outputs(path: Path) -> Outputs:
    """Read the outputs of one set as `store` wrote them; ValueError where they are damaged.

    The arrays are maps of the file; what is written into them stays in memory.
    """
    try:
        # As torch reads it: the file is mapped, and no descriptor stays open for the many arrays.
        with safetensors.safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["backmix"])
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
        return outputs_of(
            arrays,
            name=document["name"],
            kind=document["kind"],
            files=tuple(document["files"]),
            digest=document["digest"],
            bad=tuple(document["bad"]),
        )
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or holds no outputs of backmix: {error}") from error


def outputs_of(arrays: Mapping[str, np.ndarray], **facts: Any) -> Outputs:
    """Return the outputs with these arrays, by their names in the file, and these other fields."""
    return Outputs(
        **{name: arrays[name] for name in TENSORS},
        extras=_under(EXTRA, arrays),
        scores=_under(SCORE, arrays),
        **facts,
    )


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
