"""Checksums of what a run left: which weights, which file."""

from pathlib import Path

import xxhash

from backmix.train.models.weights import HEADS, NETWORK

_CHUNK = 1 << 24


def weights_digest(run: Path) -> str:
    """Return what identifies the weights of a run: names and bytes of their files."""
    digest = xxhash.xxh3_128()
    for name in (NETWORK, HEADS):
        if (run / name).is_file():
            digest.update(f"{name} {file_digest(run / name)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
