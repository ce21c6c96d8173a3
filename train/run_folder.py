"""config.json: what a run was asked to be, what that became on this machine, and from what data."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from backmix.pipeline.beton import BetonSet
from backmix.train.checkpoint import write_atomically
from backmix.train.options import MAY_CHANGE, Run


@dataclass(frozen=True)
class Resolved:
    """What `auto` became."""

    precision: str
    """fp32 or bf16."""
    device: str
    """cpu or cuda."""
    threads: int
    """Threads of CPU arithmetic."""


def resolve(run: Run) -> Resolved:
    """Decide device, precision and threads of a run; an unfinished run keeps what it began with.

    Raises:
        ValueError: what is asked for, or what the run began with, cannot be had here.
    """
    import torch

    before = _before(run.out)
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise ValueError("--device cuda: there is no CUDA device here")
    device = run.device if run.device != "auto" else "cuda" if cuda else "cpu"
    threads, precision = run.threads, run.precision
    if before:
        threads = threads or int(before["threads"])
        precision = before["precision"] if precision == "auto" else precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    return Resolved(str(precision), device, threads or len(os.sched_getaffinity(0)))


def has_bf16(device: str) -> bool:
    """Return whether the device computes bf16 in hardware; emulated it is slower than fp32."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(
        "avx512" in torch.backends.cpu.get_cpu_capability().lower()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and _cpu_flag("avx512_bf16", "amx_bf16")
    )


def _cpu_flag(*names: str) -> bool:
    """Return whether the processor has one of these features (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {name}" in text for name in names)


@dataclass(frozen=True)
class Config:
    """The content of config.json."""

    run: dict[str, Any]
    recipe: str
    resolved: Resolved
    classes: list[str]
    known: list[int]
    data: dict[str, Any]
    versions: dict[str, str]
    commit: str
    command: str

    @staticmethod
    def of(
        run: Run,
        recipe: str,
        command: list[str],
        resolved: Resolved,
        data: BetonSet,
        known: list[int],
        samples: int,
    ) -> "Config":
        """Collect the document of a run; `samples` is the number of training images."""
        return Config(
            run=as_document(run),
            recipe=recipe,
            resolved=resolved,
            classes=[data.classes[number] for number in known],
            known=known,
            data={
                "files": [str(path) for path in run.data],
                "digest": data.digest,
                "samples": samples,
            },
            versions={
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("torch", "numpy")},
                "backmix": _version(),
            },
            commit=_commit(),
            command=" ".join(command),
        )


def _version() -> str:
    import backmix

    return backmix.__version__


def as_document(run: Run) -> dict[str, Any]:
    """Return a run's options as plain JSON values; the method carries its type's name."""
    document = json.loads(json.dumps(asdict(run), default=str))
    document["method"] = {"type": type(run.method).__name__, **document["method"]}
    return document


def read_config(run: Path) -> dict[str, Any]:
    """Return config.json of a run folder; ValueError where there is none."""
    try:
        return json.loads((run / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is no run folder: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{run}/config.json cannot be read: {error}") from error


def _before(out: Path) -> dict[str, Any] | None:
    return read_config(out)["resolved"] if (out / "config.json").exists() else None


def compare_and_write(run: Run, config: Config) -> None:
    """Write config.json of a fresh run; refuse to continue a run of another configuration.

    Raises:
        ValueError: naming every option that differs, or the data.
    """
    path = run.out / "config.json"
    if path.exists():
        before = read_config(run.out)
        changed = [
            f"{name} was {old}, is {new}"
            for name, old, new in _differences(before["run"], config.run)
            if name not in MAY_CHANGE
        ]
        if before["data"]["digest"] != config.data["digest"]:
            changed.append("the data are not the same (their digest differs)")
        if before["classes"] != config.classes:
            changed.append("the list of known classes differs")
        if changed:
            raise ValueError(
                f"{run.out} holds a run of another configuration: {'; '.join(changed)}. "
                "Choose another --out, or give the options that it began with."
            )
        return
    document = {**asdict(config)}
    write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old, new) of every value that differs."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found


def _commit() -> str:
    """Return the commit of the source tree that this runs from, with + where it was changed."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 and found.stdout.strip() else "unknown"
