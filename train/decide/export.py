"""A run and its threshold as one file: normalisation, network, score, threshold and class names.

`exported.py` is the program in it, `exported_file.py` what stands beside the program. The file is
written beside its place, replays its own self-test from there, and only then is put in its place.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from backmix.train.checkpoint import sync_folder, write_atomically
from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.deployed import needed
from backmix.train.decide.exported import INPUT, OUTPUTS, Exported
from backmix.train.decide.exported_file import (
    KEY,
    ONNX,
    PT2,
    Document,
    document_text,
    metadata_entry,
    program_digest,
)
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.scorer import Scorer
from backmix.train.decide.verify import formula_views, self_test, verified

MOST_ONNX = 2**31 - 2**24
"""Bytes of the numbers in an .onnx file: a message of protocol buffers ends at 2 GiB."""
_CONVERTERS = ("onnx", "onnxscript")


def export(
    run: Path,
    out: Path,
    *,
    model: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Write a calibrated run as one file; return what was written, for people.

    Args:
        run: run folder, or one of its threshold files.
        out: .onnx or .pt2; one that is there is replaced by a whole new one. Of two exports to one
            name at once the later one stays.
        model: of a run of --model MODULE:CALLABLE the same once more.
        say: called with what is being done.

    Raises:
        ValueError: there is no threshold, the score or the network cannot be exported, and why; or
            the file fails its self-test.
        OSError: it cannot be written.
    """
    _refuse_place(run, out)
    decider = open_decider(run, PredictOptions(device="cpu", model=model))
    record, scorer = decider.record, decider.scorer
    assert isinstance(scorer, Scorer)
    if record.precision != "fp32":
        raise ValueError(
            f"the threshold of {run} was chosen for --precision {record.precision}, in which other "
            "runtimes round differently: calibrate with --precision fp32 before exporting"
        )
    network = Exported(scorer.model, record, scorer.fit, scorer.cssr).eval().requires_grad_(False)
    if out.suffix == ONNX:
        _refuse_large(network)
    say("the network's own decisions about the self-test")
    test = self_test(decider)
    say("tracing the network")
    program = _traced(network, record.preprocessing.size)
    say(f"writing {out}")
    # A folder of its own: of two exports to one name at once each verifies what it has written.
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        beside = Path(folder) / out.name
        write_atomically(beside, _file_of(program, decider, test, out.suffix))
        say("replaying the self-test from the file")
        found = verified(beside, out, trust=True)
        size = beside.stat().st_size
        os.replace(beside, out)
    sync_folder(out.parent)
    return f"{found}\n{size:,} bytes"


def _refuse_place(run: Path, out: Path) -> None:
    """Refuse what can be seen at once, before anything slow."""
    if out.suffix not in (ONNX, PT2):
        raise ValueError(f"{out}: the name says what is written, and ends in {ONNX} or {PT2}")
    if run.suffix in (ONNX, PT2) and run.is_file():
        raise ValueError(f"{run} is an exported file already: export takes a run folder")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: it is a folder, or its folder is not there")
    if out.suffix == ONNX:
        for module in (*_CONVERTERS, "onnxruntime"):
            needed(module, f"writing and verifying {out}")


def _refuse_large(network: nn.Module) -> None:
    tensors = [*network.parameters(), *network.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > MOST_ONNX:
        raise ValueError(
            f"the network and its score have {size:,} bytes, and an .onnx file that is whole by "
            f"itself holds {MOST_ONNX:,} at most: export to {PT2}"
        )


def _traced(network: Exported, size: int) -> torch.export.ExportedProgram:
    """Return the network as a program for batches of any size."""
    views = torch.from_numpy(formula_views(size))
    batch = torch.export.Dim("n", min=1)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(network, (views,), dynamic_shapes={INPUT: {0: batch}})
    except Exception as error:  # whatever a network of other people leads to
        raise ValueError(
            f"torch.export cannot trace this network: {_first_line(error)}. Decide with the run "
            "itself (backmix predict RUN)"
        ) from error


def _file_of(
    program: torch.export.ExportedProgram, decider: Decider, test: Mapping[str, Any], suffix: str
) -> bytes:
    """Return a program with its document, which names the program's checksum."""

    def document(data: bytes) -> str:
        digest = program_digest(data, suffix)
        return document_text(Document(decider.record, test, _provenance(suffix), digest))

    if suffix == ONNX:
        data = _onnx_of(program)
        return data + metadata_entry(document(data))
    return _pt2_of(program, {KEY: document(_pt2_of(program, {}))})


def _pt2_of(program: torch.export.ExportedProgram, extra: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with _quiet():
        torch.export.save(program, file, extra_files=extra)
    return file.getvalue()


def _onnx_of(program: torch.export.ExportedProgram) -> bytes:
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                verbose=False,
            )
            assert made is not None
            return made.model_proto.SerializeToString()
    except Exception as error:  # the converter's own types, without a common base
        raise ValueError(
            f"this network cannot be written as ONNX: {_first_line(error)}. Export to {PT2}"
        ) from error


def _provenance(suffix: str) -> dict[str, str]:
    import backmix

    versions = {"backmix": backmix.__version__, "torch": str(torch.__version__)}
    if suffix == ONNX:
        for module in _CONVERTERS:
            versions[module] = needed(module, "exporting").__version__
    return versions | {"on": datetime.now(UTC).isoformat(timespec="seconds")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and the converter say of themselves from people who cannot act on it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).strip().splitlines()[0]
