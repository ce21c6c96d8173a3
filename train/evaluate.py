"""Judge a trained run: one pass over known and unknown images, then scores and metrics.

Logits, pooled features and scores of every image go to RUN/scores/NAME.safetensors, so that a later
score or metric needs no second pass; the figures go to RUN/metrics.json. Scores are fitted to the
run's own training images alone; nothing is fitted, chosen or stopped on known test images or on
unknown ones.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backmix.pipeline.loader import LARGEST_VIEW, MOST_THREADS
from backmix.train import protocols
from backmix.train.checkpoint import locked, sync_folder, write_atomically
from backmix.train.digests import weights_digest
from backmix.train.image_sets import (
    KNOWN,
    UNKNOWN,
    BetonImages,
    ImageSet,
    Sets,
    few,
    image_sets,
)
from backmix.train.judge import Scored, judge, scored
from backmix.train.log import GrowingFile
from backmix.train.memory import keep_freed_memory
from backmix.train.models.heads import Reconstruction
from backmix.train.options import EvaluateOptions, Ssod, host_of
from backmix.train.outputs import Outputs, store
from backmix.train.pace import Pace
from backmix.train.passes import Viewing, device_of, learn_cssr, run_pass, seen_at, try_size
from backmix.train.scores import Fit, fit_scores, linear_head
from backmix.train.scores.cssr import CssrFit
from backmix.train.trained import Trained, load_model, read_run
from backmix.train.training_images import HELD_OUT, TRAIN, training_images
from backmix.train.world import World, cores, joined


def evaluate(
    run: Path,
    options: EvaluateOptions,
    *,
    say: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a run and write RUN/scores/ and RUN/metrics.json; return the latter's content.

    All inputs are opened and checked before the first forward pass. An evaluation takes the place
    of the one before, sets that are not named again included, and only when all its figures are
    there: whatever fails before leaves the earlier one as it was. Then metrics.json goes first and
    comes last, so that figures never stand beside scores of another evaluation: whatever fails in
    between leaves a run that is not evaluated. How fast each pass was goes to RUN/time.jsonl.

    Several processes that a launcher started share every pass; the first one judges and writes,
    and the others return nothing.

    Args:
        run: run folder with config.json and model.safetensors.
        options: what to judge it on.
        say: called with a line of progress now and then.
        tell: called with a line on each pass when it has ended: how fast it was.

    Raises:
        ValueError: what is wrong with the run, the options or the data, and what to do.
        OSError: what cannot be read or written.
    """
    with joined("cpu") as world:  # what they tell one another goes through files and hosts
        return _evaluate(run, options, world, say, tell)


def _evaluate(
    run: Path,
    options: EvaluateOptions,
    world: World,
    say: Callable[[str], None],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Do this process's part; returns nothing but in the first one."""
    trained = read_run(run)
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    if not 0 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 to {MOST_THREADS}, got {options.threads}")
    if options.size and not 1 <= options.size <= LARGEST_VIEW:
        raise ValueError(f"--size must be 1 to {LARGEST_VIEW} pixels, got {options.size}")
    if options.train and not options.fit:
        raise ValueError("--train names the images that scores are fitted to: add --fit")
    device = device_of(options.device, world)
    keep_freed_memory(device)
    if world.size > 1:
        options = replace(options, threads=options.threads or cores(world))
    with locked(run) if world.first else nullcontext():
        model = load_model(run, options.model).to(device)
        trained_at, trained = trained.loader.size, seen_at(trained, options.size)
        if trained.loader.size != trained_at:
            try_size(model, trained.loader.size, device)
        sets = image_sets(trained, options)
        refuse_names(sets.images)
        own = training_images(trained, options.train) if options.fit else []
        if not world.first:
            say = tell = lambda text: None
        viewing = Viewing(model, trained, options, device, say, tell, world)
        if not world.first:
            _help(viewing, own, sets.images, run / "scores")
            return {}
        with _beside(run / "scores") as folder:
            world.barrier()  # the folder is there
            judged, header = [], {}
            try:
                learned = _learned(viewing, own, folder)
                for images in sets.images:
                    outputs = run_pass(viewing, images, folder, learned.cssr)
                    say(f"{images.name}: scores")
                    judged.append(scored(outputs, images.group, model.head, learned.fit))
                    outputs = replace(outputs, scores=judged[-1].scores)
                    store(folder / f"{outputs.name}.safetensors", outputs)
                    if images.name == KNOWN:
                        header = _header(viewing, trained_at, outputs, sets, learned.fit)
            except ValueError as error:
                raise ValueError(f"{run}: {error}") from error
            document = {**header, **judge(judged[0], judged[1:], learned.held_out)}
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            # Until the figures are there again the run is not evaluated: never old beside new.
            (run / "metrics.json").unlink(missing_ok=True)
            sync_folder(run)
        write_atomically(run / "metrics.json", text.encode())
        _note_times(run, viewing.paces)
    return document


def _help(
    viewing: Viewing, own: Sequence[BetonImages], sets: Sequence[ImageSet], scores: Path
) -> None:
    """Take this process's share of every pass, in the order of the first process's."""
    viewing.world.barrier()
    folder = beside(scores)
    cssr = None
    if own and isinstance(viewing.model.head, Reconstruction):
        cssr = learn_cssr(viewing, own[0])  # of all images: the same sums in every process
    for images in [*own, *sets]:
        run_pass(viewing, images, folder, cssr)


def _note_times(run: Path, paces: Sequence[Pace]) -> None:
    """Append how fast the passes were to time.jsonl; what fails there costs no evaluation."""
    path = run / "time.jsonl"
    with suppress(OSError):
        times = GrowingFile(path, path.stat().st_size if path.exists() else None)
        try:
            times.append("".join(json.dumps(pace.row) + "\n" for pace in paces))
        finally:
            times.close()


@dataclass(frozen=True, eq=False)
class _Own:
    """What the run's own images teach; nothing where they are not asked."""

    fit: Fit | None = None
    cssr: CssrFit | None = None
    held_out: Scored | None = None


def _learned(viewing: Viewing, own: Sequence[BetonImages], folder: Path) -> _Own:
    """Show the network its own images, fit the scores to them, store what it says of them.

    Args:
        viewing: the network.
        own: the training images and, where there are, the held-out ones; none = nothing is fitted.
        folder: where their outputs are stored.
    """
    if not own:
        return _Own()
    head = viewing.model.head
    cssr = learn_cssr(viewing, own[0]) if isinstance(head, Reconstruction) else None
    found = {images.name: run_pass(viewing, images, folder, cssr) for images in own}
    viewing.say("fitting scores")
    fit = fit_scores(found[TRAIN], linear_head(head), found.get(HELD_OUT))
    if cssr is not None and cssr.without_gram:
        fit = replace(fit, notes=(*fit.notes, cssr.without_gram))
    held_out = None
    if HELD_OUT in found:
        held_out = scored(found[HELD_OUT], "", head, fit)
        found[HELD_OUT] = replace(found[HELD_OUT], scores=held_out.scores)
    for name, outputs in found.items():
        store(folder / f"{name}.safetensors", outputs)
    return _Own(fit, cssr, held_out)


def refuse_names(sets: Sequence[ImageSet]) -> None:
    """Refuse sets whose files would have the names of those of the training images."""
    for images in sets:
        if images.name in (TRAIN, HELD_OUT):
            raise ValueError(
                f"--unknown {images.name}=...: {images.name} is the name of the run's own images; "
                "choose another one"
            )


def beside(folder: Path) -> Path:
    """Return the folder that an evaluation fills, before it takes the place of `folder`."""
    return folder.with_name(folder.name + ".new")


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; its files take the place of all those in `folder` at the end.

    An exception inside leaves `folder` as it was.
    """
    new = beside(folder)
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


def _header(
    viewing: Viewing, trained_at: int, known: Outputs, sets: Sets, fit: Fit | None
) -> dict[str, Any]:
    """Return what metrics.json says before its figures; `trained_at` is the run's own view."""
    trained, flip = viewing.trained, viewing.options.flip
    split, size = trained.split, trained.loader.size
    notes = list(fit.notes) if fit is not None else []
    absent = sorted(set(range(len(trained.classes))) - set(known.labels.tolist()))
    if absent:
        names = few([trained.classes[label] for label in absent])
        notes.append(f"the known test set has no image of {names}")
    for images in sets.images:
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
    if len(sets.images) == 1:
        notes.append(
            "there is no unknown set: the test file has no other classes; name one with "
            "--unknown NAME=PATH"
        )
    if size != trained_at:
        notes.append(f"views of {size} pixels; the run was trained on views of {trained_at}")
    if flip:
        notes.append(
            "what the network says is averaged over each view and its mirror image, which "
            "published open-set figures are not"
        )
    notes += closed_gate(trained)
    notes += sets.notes
    notes += [f"the set {name} is missing: {why}" for name, why in sets.missing.items()]
    return {
        "split": split
        and {"protocol": split.protocol, "family": split.family, "list": split.number},
        "classes": list(trained.classes),
        "views": {"size": size, "flip": flip},
        "precision": viewing.options.precision,
        "weights": weights_digest(trained.run),
        "notes": notes,
        "missing": dict(sets.missing),
        "fit": fit
        and {
            "images": fit.images,
            "held_out": fit.held_out,
            "temperature": fit.temperature,
            "neighbour": fit.k,
        },
    }


def closed_gate(trained: Trained) -> list[str]:
    """Return a note where a rejection head never learned, because its gate stayed closed."""
    if not isinstance(host_of(trained.options.method), Ssod):
        return []
    try:
        last = (trained.run / "log.jsonl").read_text().splitlines()[-1]
        gate = float(json.loads(last).get("gate", 1.0))
    except (OSError, ValueError, IndexError, TypeError, AttributeError):
        return []
    if gate > 0:
        return []
    return [
        "the rejection head has learned nothing: its gate never opened (gate and known_share in "
        "log.jsonl), so its scores mean nothing; train longer, or begin with --init"
    ]
