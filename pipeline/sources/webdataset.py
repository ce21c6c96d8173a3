"""WebDataset shards: plain tars whose neighbouring members of one key form a sample.

The key of a member is its path up to the first dot of the base name, the rest its kind: an image
(by the endings of `images.SUFFIXES`), `cls` (an integer) or `json` (an object with an integer
`label`). Everything else is left where it is; members that hold pickles are named.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from backmix.pipeline import images
from backmix.pipeline.sources.classes import by_number
from backmix.pipeline.sources.source import Item, Items, Source, expand_files, note
from backmix.pipeline.sources.tar import Member, tar_members

PICKLED = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "ten", "tb", "npy", "npz", "joblib"})
"""Endings of members that are pickles or may hold some."""
_MAX_CLS = 64  # bytes
_MAX_JSON = 1 << 20


@dataclass
class _Sample:
    key: str
    images: list[tuple[str, Member]] = field(default_factory=list)
    """Kind and place; a sample should have one."""
    label: Member | None = None
    facts: Member | None = None
    """The JSON member."""


@dataclass
class _Left:
    """What is not taken, for the notes."""

    pickled: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)


def open_webdataset(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `webdataset:SHARDS`, in the order of the shards and of their members."""
    shards = expand_files(rest, "shard")
    names: list[str] = []
    stored: list[int] = []
    places: list[tuple[int, int, int]] = []
    left = _Left()
    for number, shard in enumerate(shards):
        stem = os.path.splitext(os.path.basename(shard))[0]
        with open(shard, "rb", buffering=0) as file:
            for sample in _samples(shard, left):
                if not sample.images:
                    left.without_image.append(sample.key)
                    continue
                (kind, image), *more = sample.images
                if more:
                    raise ValueError(
                        f"{shard}: the sample {sample.key!r} has two images, {kind} and "
                        f"{more[0][0]}"
                    )
                stored.append(_label(file.fileno(), shard, sample, image))
                names.append(f"{stem}/{sample.key}.{kind}")
                places.append((number, image.offset, image.size))
    if not names:
        raise ValueError(f"{rest} holds no samples with an image{_hint(left)}")

    def where(i: int) -> str:
        return f"{shards[places[i][0]]}, the sample of {names[i]!r}"

    labels, known, notes = by_number(np.array(stored, np.int64), classes, where)
    notes += note("pickled member left out, never decoded", left.pickled)
    notes += note("member left out (no image, cls or json)", left.others)
    notes += note("link or special file inside the tar left out", left.links)
    notes += note("sample without an image left out", left.without_image)
    table = np.array(places, np.int64)

    def make(i: int) -> Item:
        shard, offset, size = table[i].tolist()
        return Item(names[i], int(labels[i]), shards[shard], offset, size)

    return Source(spec, known, Items(len(names), make), notes, files=shards)


def _hint(left: _Left) -> str:
    seen = left.others or left.pickled or left.without_image
    return f"; it holds {seen[0]!r}, ..." if seen else ""


def _samples(shard: str, left: _Left) -> Iterator[_Sample]:
    """Yield the samples of a shard: neighbouring members with the same key."""
    sample: _Sample | None = None
    for member in tar_members(shard):
        if member.kind == "folder":
            continue
        if member.kind != "file":
            left.links.append(member.name)
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem:  # hidden files, and macOS's companions of others
            continue
        if not dot:
            left.others.append(member.name)
            continue
        key = folder + slash + stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        _add(shard, sample, kind.lower(), member, left)
    if sample is not None:
        yield sample


def _add(shard: str, sample: _Sample, kind: str, member: Member, left: _Left) -> None:
    if kind.rpartition(".")[2] in PICKLED:
        left.pickled.append(member.name)
        return
    if kind == "cls":
        again, sample.label = sample.label is not None, member
    elif kind == "json":
        again, sample.facts = sample.facts is not None, member
    elif f".{kind}" in images.SUFFIXES:
        again = any(kind == other for other, _ in sample.images)
        sample.images.append((kind, member))
    else:
        left.others.append(member.name)
        return
    if again:
        raise ValueError(
            f"{shard}: the sample {sample.key!r} has two members .{kind}, the second at byte "
            f"{member.offset}"
        )


def _label(descriptor: int, shard: str, sample: _Sample, image: Member) -> int:
    """Return the number in the sample's cls member, or else the label of its JSON."""
    if sample.label is not None:
        text = _content(descriptor, shard, sample.label, _MAX_CLS).strip()
        digits = text.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > 18:
            raise ValueError(
                f"{shard}: {sample.label.name} at byte {sample.label.offset} holds {text[:40]!r}; "
                "expected a class number, counted from 0"
            )
        return int(text)
    if sample.facts is not None:
        facts = sample.facts
        try:
            content = json.loads(_content(descriptor, shard, facts, _MAX_JSON))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{shard}: {facts.name} at byte {facts.offset} is no JSON: {error}"
            ) from error
        label = content.get("label") if isinstance(content, dict) else None
        if type(label) is int and abs(label) < 1 << 62:
            return label
    raise ValueError(
        f"{shard}: the sample of {image.name!r} at byte {image.offset} has no label: neither a "
        'member .cls nor one .json with an integer "label"'
    )


def _content(descriptor: int, shard: str, member: Member, most: int) -> bytes:
    if member.size > most:
        raise ValueError(
            f"{shard}: {member.name} at byte {member.offset} has {member.size} bytes; expected "
            f"{most} at most"
        )
    return os.pread(descriptor, member.size, member.offset)
