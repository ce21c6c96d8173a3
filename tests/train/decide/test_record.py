"""threshold.json: what is written comes back, and what was changed is refused in words."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from backmix.train.decide.record import (
    THRESHOLD,
    Preprocessing,
    Record,
    read_record,
    record_digest,
    record_document,
    record_of,
    write_record,
)
from backmix.train.decide.rule import conditional_rule, global_rule
from backmix.train.digests import file_digest, weights_digest

NAMES = ("cat", "dog", "ü\u202e")


def a_record(**changes: Any) -> Record:
    scores = np.random.default_rng(0).normal(size=99)
    record = Record(
        score="knn",
        parameters={"neighbour": 50},
        rate="0.10",
        confidence=0.9,
        rule=global_rule(scores, 3, Fraction(1, 10), 0.9),
        classes=NAMES,
        preprocessing=Preprocessing(32, "random", 0.875, (123.675, 116.28, 103.53), (58.4, 57, 1)),
        precision="bf16",
        weights="ab" * 16,
        fit="cd" * 16,
        data={"images": "given", "n": 99, "notes": ["one"]},
        facts={"date": "2026-01-02T03:04:05+00:00", "run": {"method": "Softmax"}},
    )
    return replace(record, **changes)


def test_a_record_comes_back_whole(tmp_path: Path) -> None:
    record = a_record()
    write_record(tmp_path / THRESHOLD, record)
    for path in (tmp_path, tmp_path / THRESHOLD):
        again = read_record(path)
        for name in ("score", "parameters", "rate", "confidence", "classes", "preprocessing"):
            assert getattr(again, name) == getattr(record, name)
        for name in ("precision", "weights", "fit", "data", "facts"):
            assert getattr(again, name) == getattr(record, name)
        assert record_document(again) == record_document(record)
        assert record_digest(again) == record_digest(record)
    document = json.loads((tmp_path / THRESHOLD).read_text())
    assert document["threshold"] == record.rule.categories[0].threshold
    assert document["direction"].startswith("larger = more known")
    assert not list(tmp_path.glob("*.tmp"))


def test_thresholds_by_class_stand_under_their_names() -> None:
    random = np.random.default_rng(1)
    classes = np.repeat([0, 1, 2], 50)
    rule = conditional_rule(random.normal(size=150) + classes, classes, NAMES, Fraction(1, 10))
    found = record_document(a_record(rule=rule))["threshold"]
    assert found == dict(zip(NAMES, rule.thresholds.tolist(), strict=True))


def test_a_digest_follows_every_value() -> None:
    changed = [
        {"score": "msp"},
        {"confidence": None},
        {"precision": "fp32"},
        {"weights": "00"},
        {"data": {"n": 98}},
        {"rule": global_rule(np.arange(99.0), 3, Fraction(1, 10))},
    ]
    digests = {record_digest(a_record(**change)) for change in changed}
    assert len(digests | {record_digest(a_record())}) == len(changed) + 1


def edits() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "the threshold": lambda d: d.update(threshold=0.0),
        "a score of the table": lambda d: d["rule"]["categories"][0]["scores"].__setitem__(3, 0.5),
        "the classes": lambda d: d["classes"].reverse(),
        "the mean": lambda d: d["preprocessing"]["mean"].__setitem__(0, 0.0),
        "an entry more": lambda d: d.update(more=1),
        "no digest": lambda d: d.pop("digest"),
    }


@pytest.mark.parametrize("what", edits())
def test_a_file_that_was_changed_is_refused(tmp_path: Path, what: str) -> None:
    document = record_document(a_record())
    edits()[what](document)
    (tmp_path / THRESHOLD).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="calibrate") as error:
        read_record(tmp_path)
    assert THRESHOLD in str(error.value)


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """A document with the checksum of what it holds, as another program might write it."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"digest": xxhash.xxh3_128_hexdigest(text)}


def wrongs() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "no rule": lambda d: d.update(rule=[]),
        "a class too few": lambda d: d["classes"].pop(),
        "no size": lambda d: d["preprocessing"].pop("size"),
        "a size of 0": lambda d: d["preprocessing"].update(size=0),
        "another crop": lambda d: d["preprocessing"].update(crop="five"),
        "two means": lambda d: d["preprocessing"].update(mean=[1, 2]),
        "a deviation of 0": lambda d: d["preprocessing"].update(std=[1, 0, 1]),
        "a mean of text": lambda d: d["preprocessing"].update(mean="abc"),
        "fp8": lambda d: d.update(precision="fp8"),
        "a rate of 2": lambda d: d.update(rate="2"),
        "a huge rate": lambda d: d.update(rate="1e-999999999"),
        "no weights": lambda d: d.pop("weights"),
        "facts of text": lambda d: d.update(facts="none"),
    }


@pytest.mark.parametrize("what", wrongs())
def test_a_document_that_makes_no_sense_is_refused(what: str) -> None:
    document = record_document(a_record())
    assert record_of(sealed(document), "here").score == "knn"
    wrongs()[what](document)
    with pytest.raises(ValueError, match=r"^here"):
        record_of(sealed(document), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"schema": 1}', "[" * 100_000])
def test_what_is_no_record_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / THRESHOLD).write_text(text)
    with pytest.raises(ValueError, match=THRESHOLD.replace(".", "[.]")):
        read_record(tmp_path)


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / THRESHOLD).write_text(
        json.dumps(sealed(record_document(a_record()) | {"schema": 2}))
    )
    with pytest.raises(ValueError, match="schema 2, this version of backmix reads 1"):
        read_record(tmp_path)


def test_a_folder_without_a_threshold_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no threshold: backmix calibrate"):
        read_record(tmp_path)
    with pytest.raises(ValueError, match="is no file"):
        read_record(tmp_path / "gone.json")


def test_digests_of_weights_follow_bytes_and_names(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = weights_digest(tmp_path)
    (tmp_path / "other").write_bytes(b"no weights")
    assert weights_digest(tmp_path) == first
    (tmp_path / "heads.safetensors").write_bytes(b"two")
    both = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    (tmp_path / "heads.safetensors").write_bytes(b"one")
    assert len({first, both, weights_digest(tmp_path)}) == 3
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 100_000)
    assert file_digest(large) == xxhash.xxh3_128_hexdigest(large.read_bytes())
