"""Exported files that were changed, are damaged, of something else, or cannot be opened here."""

import copy
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backmix.train.decide.decider import open_decider
from backmix.train.decide.deployed import Program, open_exported
from backmix.train.decide.exported_file import metadata_entry, program_digest, read_exported
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import record_document, record_of
from backmix.train.decide.verify import (
    FORMULA,
    IMAGES,
    TOLERANCE,
    formula_views,
    replay,
    score_range,
    verify_export,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def files(exported: dict[str, Path]) -> dict[str, Path]:
    return exported


def text_of(path: Path) -> str:
    """Return the document of a file as a stranger reads it: by onnx, or as a ZIP archive."""
    if path.suffix == ".onnx":
        import onnx

        (entry,) = [x for x in onnx.load(path).metadata_props if x.key == "backmix"]
        return entry.value
    with zipfile.ZipFile(path) as archive:
        return archive.read("archive/extra/backmix").decode()


def with_text(path: Path, out: Path, text: str) -> Path:
    """Write a file with another document."""
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        del model.metadata_props[:]
        out.write_bytes(model.SerializeToString() + metadata_entry(text))
        return out
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as new:
        for member in archive.infolist():
            extra = member.filename.endswith("extra/backmix")
            new.writestr(member.filename, text if extra else archive.read(member))
    return out


def signed(document: dict[str, Any]) -> str:
    """Return a document with the checksum that it ought to have."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())
    return json.dumps(rest | {"digest": digest})


@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
def test_a_whole_file_is_right(suffix: str, files: dict[str, Path]) -> None:
    said = verify_export(files[suffix], trust=True)
    runtime = {".onnx": "ONNX Runtime", ".pt2": "torch"}[suffix]
    assert f"{files[suffix]}: the self-test of 4 images is right under {runtime}" in said
    assert "max_logit of 3 classes, threshold" in said


def test_the_images_of_the_self_test_are_those_of_the_formula() -> None:
    views = formula_views(11)
    assert views.shape == (IMAGES, 11, 11, 3) and views.dtype == np.uint8
    for i in range(IMAGES):
        for y, x, c in ((0, 0, 0), (10, 10, 2), (3, 9, 1), (7, 2, 0)):
            assert views[i, y, x, c] == eval(FORMULA)
    flat = views.reshape(IMAGES, -1).astype(int)
    assert len(np.unique(flat, axis=0)) == IMAGES


@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
def test_what_a_file_says_of_itself_is_read_by_others(suffix: str, files: dict[str, Path]) -> None:
    document = json.loads(text_of(files[suffix]))
    own = read_exported(files[suffix])
    assert document["record"] == record_document(own.record)
    assert document["self_test"] == own.self_test and document["schema"] == 1
    assert document["views"]["layout"] == "uint8 [n, 16, 16, 3], RGB; the program normalises"


@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
def test_a_changed_document_is_found(suffix: str, files: dict[str, Path], tmp_path: Path) -> None:
    """Whoever makes up the checksums, too, still has to change the program."""
    path, out = files[suffix], tmp_path / f"changed{suffix}"
    true = json.loads(text_of(path))
    with_text(path, out, json.dumps(true))  # so far only written anew
    verify_export(out, trust=True)

    changed = copy.deepcopy(true)
    (category,) = changed["record"]["rule"]["categories"]
    category["threshold"], category["k"] = category["scores"][0], 1
    with pytest.raises(ValueError, match="A threshold is changed by calibrating and exporting"):
        verify_export(with_text(path, out, json.dumps(changed)), trust=True)
    with pytest.raises(ValueError, match="changed or damaged after it was written"):
        verify_export(with_text(path, out, signed(changed)), trust=True)  # the record's checksum
    changed["record"] = json.loads(signed(changed["record"]))
    assert record_of(changed["record"], "").rule.thresholds[0] == category["scores"][0]
    with pytest.raises(ValueError, match="fails its self-test: threshold of image 0 is "):
        verify_export(with_text(path, out, signed(changed)), trust=True)

    for scores, name in ((1e-3, "score"), (0.2, "probability")):
        changed = copy.deepcopy(true)
        figures = changed["self_test"]["outputs"][name]
        figures[1] += scores * (changed["self_test"]["range"] if name == "score" else 1)
        figures[1] *= 1 + 2 * TOLERANCE
        with pytest.raises(ValueError, match=f"fails its self-test: {name} of image 1 is "):
            verify_export(with_text(path, out, signed(changed)), trust=True)


@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
def test_a_file_of_another_version_or_program_is_refused(
    suffix: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path, out = files[suffix], tmp_path / f"other{suffix}"
    document = json.loads(text_of(path))
    with pytest.raises(ValueError, match="is of schema 2, this version of backmix reads 1"):
        read_exported(with_text(path, out, signed(document | {"schema": 2})))
    for text in ("", "[]", "{}", "1e999", '{"schema": 1', "[" * 100_000):
        with pytest.raises(ValueError, match="holds no document of backmix export"):
            read_exported(with_text(path, out, text))
    for name in ("record", "self_test", "provenance", "program"):
        rest = {key: value for key, value in document.items() if key != name}
        with pytest.raises(ValueError, match=r"no document|is no record"):
            read_exported(with_text(path, out, signed(rest)))
    rest = document | {"self_test": {}}
    with pytest.raises(ValueError, match="has no self-test"):
        verify_export(with_text(path, out, signed(rest)), trust=True)


def test_files_of_other_programs_are_no_exports(files: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(files[".onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    with zipfile.ZipFile(tmp_path / "plain.pt2", "w") as archive:
        archive.writestr("archive/version", "0")
    for name in ("plain.onnx", "plain.pt2"):
        with pytest.raises(ValueError, match="was not written by backmix export"):
            read_exported(tmp_path / name)
    for name, data in (
        ("text.onnx", b"this is no network"),
        ("empty.onnx", b""),
        ("empty.pt2", b""),
        ("text.pt2", b"this is no network"),
        ("endless.onnx", b"\x80" * 20),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged, or no \.(onnx|pt2) file"):
            read_exported(tmp_path / name)
    with pytest.raises(ValueError, match=r"their names end in \.onnx or \.pt2"):
        read_exported(tmp_path / "model.pth")
    with pytest.raises(OSError, match="No such file"):
        read_exported(tmp_path / "none.onnx")


@pytest.mark.parametrize("suffix", (".onnx", ".pt2"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_file_can_change(
    data: st.DataObject, suffix: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """A flipped bit or a cut: an error in words, or a file that says and decides the same."""
    whole = bytearray(files[suffix].read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del whole[at:]
    changed = tmp_path / f"changed{suffix}"
    changed.write_bytes(whole)
    true = read_exported(files[suffix])
    try:
        found = read_exported(changed)
    except ValueError as error:
        assert str(changed) in str(error)
    else:  # padding, names of folders and the like
        assert found.program == true.program == program_digest(bytes(whole), suffix)
        assert record_document(found.record) == record_document(true.record)


def test_a_pt2_file_is_not_touched_without_trust(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("torch was asked to open it")

    monkeypatch.setattr(torch.export, "load", load)
    for opening in (
        lambda: verify_export(files[".pt2"]),
        lambda: open_decider(files[".pt2"], PredictOptions()),
        lambda: open_exported(files[".pt2"]),
    ):
        with pytest.raises(ValueError, match="if you trust it, add --trust"):
            opening()


def test_what_cannot_be_opened_here_says_why(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ValueError, match=r"onnxruntime.*pip install 'backmix\[onnx\]'"):
            verify_export(files[".onnx"])

    def load(*arguments: object, **options: object) -> None:
        raise RuntimeError("schema version 99\nof a long story")

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(ValueError, match=r"by torch .*: schema version 99\. It was written by"):
        verify_export(files[".pt2"], trust=True)
    if not torch.cuda.is_available():
        for path in files.values():
            with pytest.raises(ValueError, match="--device cuda: "):
                open_decider(path, PredictOptions(device="cuda", trust=True))


def test_a_program_for_one_size_of_batch_fails(files: dict[str, Path]) -> None:
    """As a network would that was traced with a fixed batch."""
    document, program = open_exported(files[".onnx"])
    replay(files[".onnx"], document, program)

    def fixed(views: torch.Tensor) -> Any:
        if len(views) != IMAGES:
            raise RuntimeError("Got invalid dimensions for input")
        return program.run(views)

    with pytest.raises(ValueError, match=r"does not run under .*: Got invalid dimensions"):
        replay(files[".onnx"], document, replace(program, run=fixed))

    def mean(change: Callable[[Any], Any], output: int) -> Program:
        def run(views: torch.Tensor) -> Any:
            outputs = list(program.run(views))
            outputs[output] = change(outputs[output])
            return outputs

        return replace(program, run=run)

    for change, output, name in (
        (lambda x: (x + 1) % 3, 0, "class_index"),
        (lambda x: x + 1e-3, 1, "probability"),
        (lambda x: x * np.nan, 2, "score"),
        (lambda x: x + 1e-9, 3, "threshold"),
        (lambda x: x + 1e-9, 4, "p_value"),
        (lambda x: ~x, 5, "accept"),
    ):
        with pytest.raises(ValueError, match=f"fails its self-test: {name} of image 0 is "):
            replay(files[".onnx"], document, mean(change, output))


def test_the_range_of_scores_is_over_all_tables(files: dict[str, Path]) -> None:
    rule = read_exported(files[".onnx"]).record.rule
    (only,) = rule.categories
    assert score_range(rule) == only.table.values.max() - only.table.values.min() > 0
    moved = replace(only, table=replace(only.table, values=only.table.values + 100))
    assert score_range(replace(rule, categories=(only, moved))) == pytest.approx(
        100 + score_range(rule)
    )
