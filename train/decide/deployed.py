"""Exported files, opened and run: .onnx by ONNX Runtime, .pt2 by torch.

An .onnx file is data: whoever wrote it can make it say anything about images, and no more. A .pt2
file is a program: torch unpickles parts of it, so one from a stranger may do whatever its author
wants (https://docs.pytorch.org/docs/stable/notes/serialization.html). It is opened only on demand.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from backmix.train.decide.exported import INPUT, OUTPUTS
from backmix.train.decide.exported_file import ONNX, Document, read_exported
from backmix.train.decide.scorer import Said
from backmix.train.passes import device_of


@dataclass(frozen=True, eq=False)
class Program:
    """The program of an exported file."""

    runtime: str
    """What runs it, with its version."""
    device: torch.device
    """Where the views must lie."""
    run: Callable[[Tensor], Sequence[Any]]

    def __call__(self, views: Tensor) -> dict[str, NDArray[Any]]:
        """Return what it says of views uint8 [n, S, S, 3], by the names in `OUTPUTS`, [n] each."""
        return {
            name: values.cpu().numpy() if isinstance(values, Tensor) else values
            for name, values in zip(OUTPUTS, self.run(views), strict=True)
        }


@dataclass(frozen=True, eq=False)
class DeployedScorer:
    """What an exported file says of views, for a `Decider`."""

    program: Program

    @property
    def device(self) -> torch.device:
        """Where the views must lie."""
        return self.program.device

    def __call__(self, views: Tensor) -> Said:
        """Return what is said of views, uint8 [n, S, S, 3] on the device, n >= 1."""
        found = self.program(views)
        return Said(found["class_index"], found["probability"], found["score"])


def open_exported(
    path: Path, *, device: str = "auto", trust: bool = False
) -> tuple[Document, Program]:
    """Open an exported file.

    Args:
        path: .onnx or .pt2 file of `backmix export`.
        device: auto, cpu or cuda. An .onnx file runs on a GPU where onnxruntime-gpu is installed.
        trust: a .pt2 file may be opened.

    Raises:
        ValueError: it is no such file, was changed, cannot be opened here, or is not trusted.
        OSError: it cannot be read.
    """
    document = read_exported(path)
    opening = _open_onnx if path.suffix == ONNX else _open_pt2
    if path.suffix != ONNX and not trust:
        raise ValueError(
            f"{path} is a program that torch would run, with whatever its author put into it: if "
            "you trust it, add --trust (trust=True in Python). An .onnx file needs no trust"
        )
    return document, opening(path, device, document.provenance)


def needed(module: str, why: str) -> ModuleType:
    """Import a module of the extra `onnx`.

    Raises:
        ValueError: it is not installed, and the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{why} needs {module}, which is not installed here ({error}); install it with: "
            "pip install 'backmix[onnx]'"
        ) from error


def _open_onnx(path: Path, device: str, provenance: Mapping[str, str]) -> Program:
    runtime = needed("onnxruntime", f"running {path}")
    there = runtime.get_available_providers()
    on_gpu = device != "cpu" and "CUDAExecutionProvider" in there
    if device == "cuda" and not on_gpu:
        raise ValueError(
            "--device cuda: the ONNX Runtime that is installed here has no CUDA, but "
            f"{', '.join(there)}: install onnxruntime-gpu in its place, or leave --device out"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # TF32 keeps three digits of a product.
    gpu = [("CUDAExecutionProvider", {"use_tf32": "0"})] if on_gpu else []
    try:
        session = runtime.InferenceSession(path, options, providers=[*gpu, "CPUExecutionProvider"])
    except Exception as error:  # its own types, without a common base
        raise _not_opened(path, f"onnxruntime {runtime.__version__}", provenance, error) from error

    def run(views: Tensor) -> Sequence[Any]:
        return session.run(list(OUTPUTS), {INPUT: views.numpy()})

    return Program(f"ONNX Runtime {runtime.__version__}", torch.device("cpu"), run)


def _open_pt2(path: Path, device: str, provenance: Mapping[str, str]) -> Program:
    from torch.export.passes import move_to_device_pass

    chosen = device_of(device)
    try:
        with warnings.catch_warnings():  # torch warns of its own pickles, and we have asked
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            if chosen.type != "cpu":
                program = move_to_device_pass(program, chosen)
            module = program.module()
    except Exception as error:  # whatever a damaged archive, or one of another version, leads to
        raise _not_opened(path, f"torch {torch.__version__}", provenance, error) from error

    @torch.inference_mode()
    def run(views: Tensor) -> Sequence[Any]:
        return module(views)

    return Program(f"torch {torch.__version__}", chosen, run)


def _not_opened(
    path: Path, runtime: str, provenance: Mapping[str, str], error: Exception
) -> ValueError:
    first = (str(error) or repr(error)).strip().splitlines()[0]
    wrote = ", ".join(f"{name} {version}" for name, version in provenance.items())
    return ValueError(f"{path} cannot be opened by {runtime}: {first}. It was written by {wrote}")
