"""Judge a trained run: one pass over known and unknown images, then scores and metrics.

Logits and pooled features of every image go to RUN/scores/NAME.safetensors, so that a later score
or metric needs no second pass; the figures go to RUN/metrics.json. Nothing is fitted, chosen or
stopped on what is read here.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
import xxhash

from backmix.pipeline.batch import Batch, HostRows, Place
from backmix.pipeline.beton import BetonSet, open_set
from backmix.pipeline.decode import cut, decoding_threads
from backmix.pipeline.draws import centre_boxes, whole_boxes
from backmix.pipeline.images import SUFFIXES, decode_rgb
from backmix.pipeline.loader import MOST_THREADS, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.subset import Subset, select
from backmix.train import metrics, protocols
from backmix.train.checkpoint import locked, sync_folder, write_atomically
from backmix.train.methods.views import unmixed
from backmix.train.models.build import Model, build
from backmix.train.options import Augment, EvaluateOptions
from backmix.train.outputs import Outputs, store
from backmix.train.run_folder import read_config
from backmix.train.scores import SCORES

KNOWN, UNKNOWN = "known", "unknown"
"""Names of the known test set, and of the unknown set that the class list or a protocol makes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Trained:
    """What evaluation needs to know of a run, from its config.json."""

    run: Path
    model: str
    classes: tuple[str, ...]
    """Names of the known classes in label order."""
    digest: str
    """Identifies the training file."""
    loader: LoaderOptions
    augment: Augment
    split: protocols.Split | None
    """The published list that the run was trained on, if it was one."""


@dataclass(frozen=True)
class BetonImages:
    """Some samples of a .beton as one set."""

    name: str
    kind: Literal["known", "unknown"]
    files: tuple[Path, ...]
    digest: str
    subset: Subset
    absent: int = 0
    """Classes that were asked for and have no image in the files."""

    def __len__(self) -> int:
        return len(self.subset)


@dataclass(frozen=True)
class FolderImages:
    """All images below a folder as one unknown set."""

    name: str
    folder: Path
    images: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class _Reading:
    """What only reading tells: the images that were left out, and a folder's digest."""

    bad: list[str] = field(default_factory=list)
    digest: str = ""


@dataclass(frozen=True)
class _Read:
    """One file of a folder: its bytes, and its view or what is wrong with it."""

    data: bytes
    view: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    box: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    size: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    problem: str = ""


def evaluate(
    run: Path, options: EvaluateOptions, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Evaluate a run and write RUN/scores/ and RUN/metrics.json; return the latter's content.

    All inputs are opened and checked before the first forward pass. An evaluation takes the place
    of the one before, sets that are not named again included, and only when all its figures are
    there: whatever fails before leaves the earlier one as it was. Then metrics.json goes first and
    comes last, so that figures never stand beside scores of another evaluation: whatever fails in
    between leaves a run that is not evaluated.

    Args:
        run: run folder with config.json and model.safetensors.
        options: what to judge it on.
        say: called with a line of progress now and then.

    Raises:
        ValueError: what is wrong with the run, the options or the data, and what to do.
        OSError: what cannot be read or written.
    """
    trained = read_run(run)
    if not options.test:
        raise ValueError(f"what shall {run} be judged on? Name its test set: --test FILE.beton")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    if not 0 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 to {MOST_THREADS}, got {options.threads}")
    device = _device(options.device)
    with locked(run):
        model = load_model(run).to(device)
        sets = _sets(trained, options)
        with _beside(run / "scores") as folder:
            known, *unknown = (
                _stored(folder, _pass(images, model, trained, options, device, say))
                for images in sets
            )
            try:
                document = {**_header(trained, known, sets), **judge(known, unknown)}
            except ValueError as error:
                raise ValueError(f"{run}: {error}") from error
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            # Until the figures are there again the run is not evaluated: never old beside new.
            (run / "metrics.json").unlink(missing_ok=True)
            sync_folder(run)
        write_atomically(run / "metrics.json", text.encode())
    return document


def judge(known: Outputs, unknown: Sequence[Outputs]) -> dict[str, Any]:
    """Return the figures of one known and several unknown sets, each in [0, 1].

    {"known": {"n", "bad", "accuracy"}, "unknown": {SET: {"n", "bad", "scores": {SCORE: {METRIC:
    figure}}}}}; bad = images that could not be read and are in no figure. ValueError names the set
    that has logits which are not finite.
    """
    # Before the accuracy: what is not finite is refused where there is no unknown set, too.
    of_known = {score: _scored(score, known) for score in SCORES}
    correct = known.logits.argmax(1) == known.labels
    result: dict[str, Any] = {
        KNOWN: {"n": len(known), "bad": len(known.bad), "accuracy": metrics.accuracy(correct)},
        UNKNOWN: {},
    }
    for images in unknown:
        figures = {}
        for score in SCORES:
            k, u = of_known[score], _scored(score, images)
            figures[score.__name__] = {
                "auroc": metrics.auroc(k, u),
                "oscr": metrics.oscr(k, correct, u),
                "aupr_known": metrics.aupr_known(k, u),
                "aupr_unknown": metrics.aupr_unknown(k, u),
                "fpr95_unknown_accepted": metrics.fpr95_unknown_accepted(k, u),
                "fpr95_known_rejected": metrics.fpr95_known_rejected(k, u),
                "dtacc": metrics.dtacc(k, u),
            }
        result[UNKNOWN][images.name] = {
            "n": len(images),
            "bad": len(images.bad),
            "scores": figures,
        }
    return result


def table(document: dict[str, Any]) -> str:
    """Return the content of metrics.json as text for a terminal, figures in percent."""
    known = document[KNOWN]
    split = document["split"]
    lines = [
        f"known classes: {', '.join(document['classes'])}",
        *([f"split: {split['protocol']} {split['family']}{split['list']}"] if split else []),
        f"accuracy {100 * known['accuracy']:.2f} % on {known['n']:,} known images" + _bad(known),
    ]
    if document[UNKNOWN]:
        width = max(len("unknown set"), *map(len, document[UNKNOWN]))
        lines += [
            "",
            f"{'':{width}} {'':>7}  {'':9}                  --- AUPR ----  ----- FPR95 ------",
            f"{'unknown set':{width}} {'images':>7}  {'score':9}   AUROC    OSCR  known unknown"
            "  unknown    known  DTACC",
            f"{'':{width}} {'':>7}  {'':9}                               accepted rejected",
        ]
        for name, images in document[UNKNOWN].items():
            head = f"{name:{width}} {images['n']:7,}"
            for score, figures in images["scores"].items():
                f = {metric: 100 * figure for metric, figure in figures.items()}
                lines.append(
                    f"{head}  {score:9} {f['auroc']:7.2f} {f['oscr']:7.2f} {f['aupr_known']:6.2f}"
                    f" {f['aupr_unknown']:7.2f}  {f['fpr95_unknown_accepted']:7.2f}"
                    f" {f['fpr95_known_rejected']:8.2f} {f['dtacc']:6.2f}"
                )
                head = " " * len(head)
            if images["bad"]:
                lines.append(f"{name}:{_bad(images)}")
    return "\n".join([*lines, *(f"note: {note}" for note in document["notes"])])


def read_run(run: Path) -> Trained:
    """Read config.json of a run folder; ValueError says what is missing."""
    config = read_config(run)
    try:
        options = config["run"]
        chosen = options["split"]
        split = None
        if chosen and chosen["protocol"]:
            split = protocols.split(chosen["protocol"], chosen["family"], chosen["list"])
        loader, augment = options["loader"], options["augment"]
        return Trained(
            run=run,
            model=options["model"],
            classes=tuple(config["classes"]),
            digest=config["data"]["digest"],
            loader=LoaderOptions(
                size=loader["size"], crop=loader["crop"], eval_crop=loader["eval_crop"]
            ),
            augment=Augment(mean=tuple(augment["mean"]), std=tuple(augment["std"])),
            split=split,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}/config.json is no configuration of a run: {error!r}") from error


def load_model(run: Path) -> Model:
    """Return a run's network with its final weights, in evaluation mode, on the CPU."""
    trained = read_run(run)
    path = run / "model.safetensors"
    if not path.exists():
        raise ValueError(
            f"{run} has no model.safetensors: the run is not finished; the command that started "
            "it continues it"
        )
    if not path.is_file():
        raise ValueError(f"{path} is no file: the weights of the run should be there")
    # Drawing weights only to replace them must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = build(trained.model, len(trained.classes), trained.loader.size)
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged, or not of a {trained.model} with {len(trained.classes)} classes: "
            f"{error}"
        ) from error
    return model.eval()


# --- which images ---------------------------------------------------------------------------------


def _sets(trained: Trained, options: EvaluateOptions) -> list[BetonImages | FolderImages]:
    """Return the known test set first, then every unknown set; none of them empty."""
    with open_set(options.test) as test:
        where = ", ".join(map(str, options.test))
        known = _known(trained, test, where, options.test)
        sets: list[BetonImages | FolderImages] = [known]
        split = trained.split
        if split is not None and split.unknown_source == "cifar100":
            sets.append(_cifar100(split, options))
        else:
            if options.unknown_data:
                raise ValueError(
                    "--unknown-data belongs to the protocols cifar+10 and cifar+50; other unknown "
                    "sets are given as --unknown NAME=PATH"
                )
            if split is not None and len(test.classes) != split.classes:
                raise ValueError(
                    f"{where} has {len(test.classes)} classes, but {split.protocol} splits "
                    f"{split.classes}: the test file must hold the unknown classes, too"
                )
            others = [n for n, name in enumerate(test.classes) if name not in trained.classes]
            rest = _samples(UNKNOWN, options.test, test, others)
            if len(rest):
                sets.append(rest)
    for given in options.unknown:
        images = _named(given)
        if images.name in {earlier.name for earlier in sets}:
            raise ValueError(f"--unknown {given}: there is a set of this name already")
        sets.append(images)
    return sets


def _known(trained: Trained, test: BetonSet, where: str, files: tuple[Path, ...]) -> BetonImages:
    missing = [name for name in trained.classes if name not in test.classes]
    if missing:
        raise ValueError(
            f"{where} lacks the known classes {_few(missing)}; its classes are "
            f"{_few(test.classes)}. The test file needs the class names of the training file "
            "(backmix convert --classes FILE fixes a class list)"
        )
    subset = select(test.labels, [test.classes.index(name) for name in trained.classes])
    if not len(subset):
        raise ValueError(f"{where} has no image of the known classes {_few(trained.classes)}")
    return BetonImages(KNOWN, "known", files, test.digest, subset)


def _cifar100(split: protocols.Split, options: EvaluateOptions) -> BetonImages:
    if not options.unknown_data:
        raise ValueError(
            f"{split.protocol} takes its unknown images from CIFAR-100: name the .beton of its "
            "test set with --unknown-data FILE"
        )
    with open_set(options.unknown_data) as data:
        where = ", ".join(map(str, options.unknown_data))
        if len(data.classes) != 100:
            raise ValueError(f"{where} has {len(data.classes)} classes, CIFAR-100 has 100")
        images = _samples(UNKNOWN, options.unknown_data, data, split.unknown)
    if not len(images):
        raise ValueError(f"{where} has no image of the unknown classes of {split.protocol}")
    return images


def _named(given: str) -> BetonImages | FolderImages:
    name, equals, text = given.partition("=")
    if not equals or not text or not _NAME.fullmatch(name):
        raise ValueError(
            f"--unknown {given}: write NAME=PATH, the name of letters, digits and . _ + -"
        )
    path = Path(text)
    if path.is_dir():
        images = tuple(_image_files(path))
        if not images:
            raise ValueError(f"--unknown {given}: no image in {path} or its subfolders")
        return FolderImages(name, path, images)
    if not path.exists():
        raise ValueError(f"--unknown {given}: there is no {path}")
    with open_set([path]) as data:
        if not data.n:
            raise ValueError(f"--unknown {given}: {path} has no samples")
        return _samples(name, (path,), data, range(len(data.classes)))


def _samples(
    name: str, files: tuple[Path, ...], data: BetonSet, classes: Sequence[int]
) -> BetonImages:
    index = np.flatnonzero(np.isin(data.labels, list(classes)))
    subset = Subset(index, np.full(len(index), -1, np.int64))
    absent = len(classes) - len(np.unique(data.labels[index]))
    return BetonImages(name, "unknown", files, data.digest, subset, absent)


def _image_files(folder: Path) -> list[Path]:
    """Return the images below a folder by relative path; hidden files are passed over."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                found.append(Path(root, name))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# --- one pass -------------------------------------------------------------------------------------


def _pass(
    images: BetonImages | FolderImages,
    model: Model,
    trained: Trained,
    options: EvaluateOptions,
    device: torch.device,
    say: Callable[[str], None],
) -> Outputs:
    """Run the network over one set, in stored order."""
    reading = _Reading()
    match images:
        case BetonImages():
            batches = _beton_batches(images, trained.loader, options, device, reading)
            kind, files = images.kind, images.files
        case FolderImages():
            batches = _folder_batches(images, trained.loader, options, device, reading)
            kind, files = "unknown", (images.folder,)
    parts: dict[str, list[np.ndarray]] = {"logits": [], "features": [], "labels": [], "index": []}
    done = 0
    with torch.inference_mode():
        for batch in batches:
            if not len(batch):  # every image of it was bad
                continue
            views = unmixed(batch, trained.augment, None)
            with torch.autocast(device.type, torch.bfloat16, options.precision == "bf16"):
                logits, maps = model(views)
            parts["logits"].append(logits.float().cpu().numpy())
            parts["features"].append(maps.float().mean((2, 3)).cpu().numpy())
            parts["labels"].append(batch.labels.cpu().numpy())
            parts["index"].append(batch.index.cpu().numpy())
            done += len(batch)
            say(f"{images.name}: {done:,} of {len(images):,} images")
    if not done:
        raise ValueError(
            f"the set {images.name} has no image that can be read; the first is {reading.bad[0]}"
        )
    return Outputs(
        name=images.name,
        kind=kind,
        files=tuple(map(str, files)),
        digest=reading.digest,
        bad=tuple(reading.bad),
        **{name: np.concatenate(arrays) for name, arrays in parts.items()},
    )


def _beton_batches(
    images: BetonImages,
    view: LoaderOptions,
    options: EvaluateOptions,
    device: torch.device,
    reading: _Reading,
) -> Iterator[Batch]:
    chosen = LoaderOptions(
        loader="turbo",
        batch=options.batch,
        size=view.size,
        crop=view.crop,
        eval_crop=view.eval_crop,
        threads=options.threads,
    )
    reading.digest = images.digest
    with open_loader(
        images.files, chosen, split="eval", subset=images.subset, device=str(device)
    ) as loader:
        yield from loader.batches(Place(seed=0))
        reading.bad.extend(loader.bad)


def _folder_batches(
    images: FolderImages,
    view: LoaderOptions,
    options: EvaluateOptions,
    device: torch.device,
    reading: _Reading,
) -> Iterator[Batch]:
    """Read the images of a folder as the loaders read those of a file, batch by batch."""
    digest = xxhash.xxh3_128()

    def read(path: Path) -> _Read:
        data = b""
        try:
            data = path.read_bytes()
            pixels = decode_rgb(data)
        except (ValueError, OSError) as error:
            return _Read(data, problem=f"{path}: {error}")
        sizes = np.array([pixels.shape[:2]], np.int32)
        whole = view.crop == "whole"
        box = (whole_boxes(sizes) if whole else centre_boxes(sizes, view.eval_crop))[0]
        shown = np.empty((view.size, view.size, 3), np.uint8)
        cut(pixels, box, shown)
        return _Read(data, shown, box, sizes[0])

    with decoding_threads(options.threads) as threads:
        for start in range(0, len(images), options.batch):
            paths = images.images[start : start + options.batch]
            good: list[tuple[int, _Read]] = []
            for number, image in enumerate(threads.map(read, paths), start):
                name = images.images[number].relative_to(images.folder).as_posix()
                digest.update(f"{name}\0{len(image.data)}\0".encode() + image.data)
                if image.problem:
                    reading.bad.append(image.problem)
                else:
                    good.append((number, image))
            if good:
                yield _batch_of(good, device)
    reading.digest = digest.hexdigest()


def _batch_of(images: Sequence[tuple[int, _Read]], device: torch.device) -> Batch:
    """Return numbered images of a folder as a batch of unknown ones."""

    def tensor(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(values)).to(device)

    n = len(images)
    index = torch.tensor([number for number, _ in images], device=device)
    return Batch(
        pool=tensor([image.view for _, image in images]),
        pool_index=index,
        rows=torch.arange(n, device=device),
        index=index,
        labels=torch.full((n,), -1, device=device),
        boxes=tensor([image.box for _, image in images]),
        sizes=tensor([image.size for _, image in images]),
        status=torch.zeros(n, dtype=torch.uint8, device=device),
        group=n,
        place=Place(seed=0),
        host=HostRows(np.array([number for number, _ in images]), np.arange(n)),
    )


# --- figures --------------------------------------------------------------------------------------


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; its files take the place of all those in `folder` at the end.

    An exception inside leaves `folder` as it was.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of an evaluation that was killed
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    folder.mkdir(exist_ok=True)
    names = {path.name for path in new.iterdir()}
    for name in names:
        os.replace(new / name, folder / name)
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    sync_folder(folder)
    new.rmdir()


def _stored(folder: Path, outputs: Outputs) -> Outputs:
    """Store outputs; return them without the features, which many sets would fill memory with."""
    store(folder / f"{outputs.name}.safetensors", outputs)
    return replace(outputs, features=outputs.features[:, :0].copy())


def _scored(score: Callable[[np.ndarray], np.ndarray], outputs: Outputs) -> np.ndarray:
    try:
        return score(outputs.logits)
    except ValueError as error:
        raise ValueError(f"set {outputs.name}: {error}") from error


def _header(
    trained: Trained, known: Outputs, sets: Sequence[BetonImages | FolderImages]
) -> dict[str, Any]:
    split = trained.split
    notes = []
    absent = sorted(set(range(len(trained.classes))) - set(known.labels.tolist()))
    if absent:
        names = _few([trained.classes[label] for label in absent])
        notes.append(f"the known test set has no image of {names}")
    for images in sets:
        if split is not None and isinstance(images, BetonImages) and images.name == UNKNOWN:
            if images.absent:
                notes.append(
                    f"{images.absent} of the protocol's unknown classes have no image in the test "
                    "files: this is not the published problem"
                )
    if known.digest == trained.digest:
        notes.append("the known test set is the training file itself: not a test")
    if split is not None:
        first = protocols.repeats(split)
        if first is not None:
            notes.append(
                f"list {split.name} poses the same problem as {split.family}{first}: a mean over "
                "the five lists weighs it more than once"
            )
    return {
        "split": split
        and {"protocol": split.protocol, "family": split.family, "list": split.number},
        "classes": list(trained.classes),
        "notes": notes,
    }


def _bad(images: dict[str, Any]) -> str:
    return f" ({images['bad']:,} could not be read and were left out)" if images["bad"] else ""


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _device(asked: str) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    elif asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device, or torch cannot use it")
    return torch.device(asked)
