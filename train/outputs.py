"""What a network said of every image of one set, as a file: any score or metric from one pass.

RUN/scores/NAME.safetensors: the tensors logits, features, labels and index of `Outputs`, and as
metadata `backmix` a JSON document with the rest.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy

from backmix.train.checkpoint import write_atomically

TENSORS = ("logits", "features", "labels", "index")


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

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in TENSORS}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the outputs of {self.name} have unequal lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.labels)


def store(path: Path, outputs: Outputs) -> None:
    """Write the outputs of one set, whole or not at all."""
    document = {
        "name": outputs.name,
        "kind": outputs.kind,
        "files": list(outputs.files),
        "digest": outputs.digest,
        "bad": list(outputs.bad),
    }
    tensors = {name: getattr(outputs, name) for name in TENSORS}
    plain = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    note = {"backmix": json.dumps(document, sort_keys=True)}
    write_atomically(path, safetensors.numpy.save(plain, note))


def load_outputs(path: Path) -> Outputs:
    """Read the outputs of one set as `store` wrote them; ValueError where they are damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["backmix"])
            arrays = {name: file.get_tensor(name) for name in TENSORS}
        return Outputs(
            name=document["name"],
            kind=document["kind"],
            files=tuple(document["files"]),
            digest=document["digest"],
            bad=tuple(document["bad"]),
            **arrays,
        )
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or holds no outputs of backmix: {error}") from error
