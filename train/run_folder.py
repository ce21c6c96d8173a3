"""config.json: what a run was asked to be, what that became on this machine, and from what data."""

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

from backmix.pipeline.beton import BetonSet
from backmix.pipeline.options import usable_cores
from backmix.train.checkpoint import newest_step, write_atomically
from backmix.train.options import MAY_CHANGE, METHODS, Run


@dataclass(frozen=True)
class Resolved:
    """What `auto` became."""

    precision: str
    """fp32 or bf16."""
    device: str
    """cpu or cuda."""
    threads: int
    """Threads of CPU arithmetic."""
    loader: str = ""
    """What reads the data; empty where that is still to be found out."""


def resolve(run: Run, cores: int = 0) -> Resolved:
    """Decide device, precision and threads of a run; an unfinished run keeps what it began with.

    `cores` are those that `auto` may use, 0 = all that this process can.

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
    loader = ""
    if before:
        loader = str(before.get("loader", ""))
        threads = threads or int(before["threads"])
        precision = before["precision"] if precision == "auto" else precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    return Resolved(str(precision), device, threads or cores or usable_cores(), loader)


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
    network: dict[str, Any] = field(default_factory=dict)
    """Where the maps of a network that is not our own come from; see `models/fit.py`."""

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
            versions=versions(),
            commit=commit(),
            command=shlex.join(command),
        )


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import backmix

    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy")},
        "backmix": backmix.__version__,
    }


def as_document(run: Run) -> dict[str, Any]:
    """Return a run's options as plain JSON values; a method carries its type's name."""
    return _plain(run)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = {"type": type(value).__name__} if type(value) in METHODS else {}
        return named | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def run_of(document: dict[str, Any]) -> Run:
    """Return the options of a run from the `run` part of its config.json.

    Raises:
        KeyError, TypeError: the document is of another version, or no run's.
    """
    if "method" not in document:  # without, a run of BackMix would pass for one of softmax
        raise KeyError("method")
    return _made(Run, document)


def _made(kind: type[Any], document: Mapping[str, Any]) -> Any:
    """Return a dataclass of options from its document; types are those of its fields."""
    hints = get_type_hints(kind)
    values = {}
    for name, value in document.items():
        if name == "type":
            continue
        hint = hints[name]
        choices = [choice for choice in (hint, *get_args(hint)) if is_dataclass(choice)]
        if choices:
            if not isinstance(value, dict):
                raise TypeError(f"{name} is no section of options: {value!r}")
            named = [c for c in choices if value.get("type", c.__name__) == c.__name__]  # type: ignore[union-attr]
            if not named:
                raise TypeError(f"{name} has no kind {value['type']!r}")
            values[name] = _made(named[0], value)  # type: ignore[arg-type]
        elif value is not None and (hint is Path or Path in get_args(hint)):
            values[name] = tuple(map(Path, value)) if isinstance(value, list) else Path(value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def read_config(run: Path) -> dict[str, Any]:
    """Return config.json of a run folder; ValueError where there is none, or it is no run's."""
    path = run / "config.json"
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} is no run folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    kinds = {"run": dict, "data": dict, "resolved": dict, "classes": list, "known": list}
    wrong = [
        name
        for name, kind in kinds.items()
        if not isinstance(document, dict) or not isinstance(document.get(name), kind)
    ]
    if wrong or not {"digest", "files"} <= set(document["data"]):
        raise ValueError(f"{path} is no configuration of a run: {', '.join(wrong or ['data'])}")
    return document


def _before(out: Path) -> dict[str, Any] | None:
    return read_config(out)["resolved"] if newest_step(out) else None


class OtherRunError(ValueError):
    """The folder holds another run than the one asked for; it is left alone."""


def refuse_other_options(run: Run) -> None:
    """Refuse to continue a run that began with other options.

    A run without any checkpoint has nothing to lose: it begins anew with the new options.

    Raises:
        OtherRunError: naming every option that differs.
    """
    if newest_step(run.out):
        before = read_config(run.out)
        # `fastest` may have been asked for with a share for dali, and have taken another loader.
        idle = set() if before["resolved"].get("loader") == "dali" else {"loader.hw_share"}
        changed = [
            f"{name} was {old}, is {new}"
            for name, old, new in _differences(before["run"], as_document(run))
            if name not in MAY_CHANGE | idle
        ]
        _refuse(run, changed)


def write_config(run: Run, config: Config) -> None:
    """Write config.json."""
    text = json.dumps(asdict(config), indent=1, sort_keys=True) + "\n"
    write_atomically(run.out / "config.json", text.encode())


def refuse_other_data_or_write(run: Run, config: Config) -> None:
    """Write config.json of a fresh run; refuse to continue a run on other data.

    Raises:
        OtherRunError: saying what differs.
    """
    refuse_other_data(run, config)
    if not newest_step(run.out):
        write_config(run, config)


def refuse_other_data(run: Run, config: Config) -> None:
    """Refuse to continue a run on other data.

    Raises:
        OtherRunError: saying what differs.
    """
    if not newest_step(run.out):
        return
    before = read_config(run.out)
    changed = []
    if before["data"]["digest"] != config.data["digest"]:
        changed.append("the data are not the same (their digest differs)")
    if before["classes"] != config.classes:
        changed.append("the list of known classes differs")
    _refuse(run, changed)


def _refuse(run: Run, changed: list[str]) -> None:
    if changed:
        raise OtherRunError(
            f"{run.out} holds a run of another configuration: {'; '.join(changed)}. "
            "Choose another --out, or give the options that it began with."
        )


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old, new) of every value that differs."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if old.get("type") != new.get("type"):  # of methods; the rest follows from it
                found.append((f"{prefix}{name}", old.get("type"), new.get("type")))
                continue
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found


def commit() -> str:
    """Return the commit of the source tree that this runs from, with + where it was changed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not a copy inside somebody else's tree
        return git("describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
