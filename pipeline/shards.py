"""Shards: one data set in several .beton files, joined by one manifest.

Which samples a shard holds, what it is called, what the manifest says of it, and what is refused
when only some of the shards, or foreign ones, are given. `convert.py` writes by these rules, and
`beton.open_set` reads by them. The manifest is not trusted more than any other file.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

MOST = 500
"""Most shards that are written: each is one open file, and many systems allow 1,024."""
MANIFEST_SUFFIX = ".jsonl"
_LAST_LINE = 1 << 24
"""Longest last line of a manifest [bytes]."""


@dataclass(frozen=True)
class Listed:
    """What a manifest says of one file."""

    path: Path
    samples: int
    digest: str


@dataclass(frozen=True)
class Position:
    """What a shard says of itself, in the note of its extension block."""

    number: int
    """0 .. count - 1."""
    count: int
    """Number of shards of the set."""
    previous: str
    """Digest of the shard before; empty for the first. So shards of different runs never mix."""

    def note(self) -> dict[str, Any]:
        """Return it as it stands in the file."""
        return {"number": self.number, "count": self.count, "previous": self.previous}


class Opened(Protocol):
    """The part of an open .beton file that is looked at here."""

    path: Path
    info: dict[str, Any]
    digest: str

    @property
    def n(self) -> int:
        """Number of samples."""
        ...


def paths(out: Path, count: int) -> list[Path]:
    """Return the files of a set: `out` itself for one, else OUT-00000-of-00003.beton and so on."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{k:05}-of-{count:05}{out.suffix}") for k in range(count)]


def ranges(total: int, count: int) -> list[range]:
    """Return which of `total` samples each shard holds: neighbours, numbers equal but for one."""
    return [range(total * k // count, total * (k + 1) // count) for k in range(count)]


def siblings(out: Path, parts: bool = False) -> list[Path]:
    """Return the shards of `out`, of any number of them, that are there, or that part files name.

    Args:
        out: name of the set; it need not exist.
        parts: return the names that unfinished files were to get.
    """
    name = f"{re.escape(out.stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(out.suffix)}"
    ending = r"\.part-[0-9]+" if parts else ""
    found = [re.fullmatch(f"({name}){ending}", path.name) for path in out.parent.iterdir()]
    return sorted({out.with_name(match[1]) for match in found if match})


def joint_digest(digests: Sequence[str]) -> str:
    """Return the digest of a set: a single file's own, else one over those of all, in order."""
    if len(digests) == 1:
        return digests[0]
    return xxhash.xxh3_128_hexdigest("".join(digests).encode())


# --- the manifest ---------------------------------------------------------------------------------


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a manifest rather than a .beton file."""
    return os.fspath(path).endswith(MANIFEST_SUFFIX)


def read_manifest(path: Path) -> list[Listed]:
    """Return the files that a manifest lists, in order; they lie beside it.

    Reads the last line only. Raises ValueError for what is no whole manifest, and OSError for what
    cannot be read.
    """
    # Looked at before it is opened: opening a pipe would wait for its writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_LINE))
        last = file.read(_LAST_LINE).rstrip().rpartition(b"\n")[2]
    try:
        row = json.loads(last)
        total = row["total"]
        if "shards" not in total:
            own = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX))
            return [_listed(own.name, total["written"], total["digest"], path)]
        listed = [
            _listed(shard["file"], shard["samples"], shard["digest"], path)
            for shard in total["shards"]
        ]
        names = {shard.path for shard in listed}
        if not listed or len(names) < len(listed):
            raise ValueError("a shard twice, or none")
        if sum(shard.samples for shard in listed) != total["written"]:
            raise ValueError("another number of samples")
        if joint_digest([shard.digest for shard in listed]) != total["digest"]:
            raise ValueError("another digest")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is no whole manifest: its last line does not say which files belong to it, "
            "with samples and digest; give the .beton files themselves, or convert again"
        ) from None
    return listed


def _listed(name: Any, samples: Any, digest: Any, manifest: Path) -> Listed:
    """Return a manifest's entry; ValueError for one that makes no sense or leaves the folder."""
    if not (isinstance(name, str) and isinstance(digest, str) and type(samples) is int):
        raise ValueError("wrong types")
    if name in ("", "..") or Path(name).name != name or "\0" in name or samples < 1:
        raise ValueError("no file beside the manifest")
    os.fsencode(name)  # UnicodeEncodeError, a ValueError, for what no file can be called
    return Listed(manifest.with_name(name), samples, digest)


def missing(manifest: Path, listed: Listed) -> ValueError:
    """Return the error for a listed file that is not there."""
    return ValueError(
        f"{manifest} lists {listed.path.name!r}, which is not beside it: copy it there, or convert "
        "again"
    )


def check_listed(manifest: Path, listed: Sequence[Listed], k: int, found: Opened) -> None:
    """Raise ValueError unless an open file is the one that the manifest lists as number k."""
    expected = listed[k]
    if (found.digest, found.n) == (expected.digest, expected.samples):
        return
    others = [other.path.name for other in listed if other.digest == found.digest]
    what = (
        f"the contents of {others[0]!r}: the files were renamed"
        if others and found.digest != expected.digest
        else f"{found.n} samples and digest {found.digest}, not {expected.samples} and "
        f"{expected.digest}: it belongs to another conversion"
    )
    raise ValueError(
        f"{found.path} is not the file that {manifest} lists under its name; it has {what}. Copy "
        "all files of one conversion together, or convert again"
    )


# --- files given one by one -----------------------------------------------------------------------


def position(file: Opened) -> Position | None:
    """Return what a file says of its place in a set; None for one that is no shard."""
    note = file.info.get("shard")
    if note is None:
        return None
    if isinstance(note, dict):
        number, count, previous = (note.get(key) for key in ("number", "count", "previous"))
        if type(number) is int and type(count) is int and isinstance(previous, str):
            if 0 <= number < count <= 99_999:
                return Position(number, count, previous)
    raise ValueError(f"{file.path}: its note on its place among shards makes no sense")


def refuse_parts(files: Sequence[Opened]) -> None:
    """Raise ValueError where shards are given that are not one whole set, each once.

    Their order does not matter, and files that are no shards may be among them.
    """
    shards = [(file, place) for file in files if (place := position(file))]
    if not shards:
        return
    first, count = shards[0][0], shards[0][1].count
    given = Counter(place.number for _, place in shards)
    digests = {place.number: file.digest for file, place in shards}
    for file, place in shards:
        before = digests.get(place.number - 1, "" if place.number == 0 else place.previous)
        if place.count != count or given[place.number] > 1 or before != place.previous:
            raise ValueError(
                f"{file.path} and {first.path} are shards of two conversions, or one was given "
                "twice: give the shards of one set, each once; to join sets, give their manifests"
            )
    absent = [k for k in range(count) if k not in digests]
    if absent:
        names = [f"{k:05}-of-{count:05}" for k in absent]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{first.path} is one of {count} shards, and {len(absent)} of them were not given: "
            f"{shown}; give all, or the manifest"
        )
