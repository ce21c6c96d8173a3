"""One pass of a network over one set of images: what it says of each, and what the image shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.draws import centre_boxes, whole_boxes
from backmix.pipeline.folder_images import (
    Reading,
    Shown,
    box_view,
    central_view,
    digest_of,
    read_batches,
)
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions, usable_cores
from backmix.pipeline.subset import Subset
from backmix.pipeline.turbo import Turbo
from backmix.train.image_sets import BetonImages, FolderImages, ImageSet
from backmix.train.methods.views import unmixed
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.options import EvaluateOptions
from backmix.train.outputs import EXTRA, Outputs, Spool, load_outputs, outputs_of, store
from backmix.train.pace import Moment, OnTheirWay, Pace, moment
from backmix.train.scores import image_cues, odin
from backmix.train.scores.cssr import CssrFit, cell_figures
from backmix.train.trained import Trained
from backmix.train.world import World, gpu

AT_ONCE = 4096
"""Rows that are taken at a time from what another process found."""
NOTHING = {
    "logits": np.empty((0, 0), np.float32),
    "features": np.empty((0, 0), np.float32),
    "labels": np.empty(0, np.int64),
    "index": np.empty(0, np.int64),
}
"""What a process has found whose share holds no image that can be read."""


@dataclass(frozen=True, eq=False)
class Viewing:
    """A network, and how it is shown images."""

    model: Model
    """In evaluation mode, on the device."""
    trained: Trained
    options: EvaluateOptions
    device: torch.device
    say: Callable[[str], None]
    tell: Callable[[str], None]
    """Called with a line on each pass when it has ended."""
    world: World = field(default_factory=World)
    """The processes that share each pass."""
    paces: list[Pace] = field(default_factory=list)
    """How fast each pass was, in their order; `run_pass` adds to it."""


@dataclass(frozen=True, eq=False)
class Side:
    """Views of one batch, and what the network says of them."""

    views: torch.Tensor
    """float32 [n, 3, H, W], normalised."""
    logits: torch.Tensor
    """[n, K]"""
    maps: torch.Tensor
    """[n, C, g, g']"""


@dataclass(frozen=True, eq=False)
class _Seen:
    """One batch as the network sees it."""

    batch: Batch
    sides: tuple[Side, ...]
    """The views and, with --flip, their mirror images."""
    began: Moment
    """Where the device's work on them begins."""


def run_pass(
    viewing: Viewing, images: ImageSet, folder: Path, cssr: CssrFit | None = None
) -> Outputs:
    """Run the network over one set, in stored order.

    Several processes take a contiguous share each, of whole batches, so that every batch is the
    one that a single process would see; the first one gathers what they found. The others return
    their own share.

    Args:
        viewing: the network.
        images: the set.
        folder: on whose disk the outputs wait, in files without a name, until they are stored; the
            returned arrays are maps of them.
        cssr: what CSSR's scores have learned; without it only the first of its figures is computed.

    Raises:
        ValueError: no image of the set can be read.
    """
    reading, pace = Reading(), Pace(images.name)
    world = viewing.world
    mine, before_mine = share(images, viewing.options.batch, world.rank, world.size)
    with Spool(folder) as spool:

        def keep(done: OnTheirWay) -> None:
            arrays, seconds = done.arrays()
            pace.computing += seconds
            spool.add(arrays)

        before: OnTheirWay | None = None
        for seen in _walk(viewing, mine, reading, pace) if len(mine) else ():
            cues = image_cues(seen.batch.pool[seen.batch.rows])
            arrays = {
                **_mean([_said(viewing, side, cssr) for side in seen.sides]),
                "labels": seen.batch.labels,
                "index": seen.batch.index + before_mine,
                **{EXTRA + name: cue for name, cue in cues.items()},
            }
            # A batch is taken off the device when it has the next one to work on.
            now = OnTheirWay(arrays, seen.began, viewing.device)
            if before is not None:
                keep(before)
            before = now
        if before is not None:
            keep(before)
        pace.decoding, pace.threads = reading.decoding, viewing.options.threads or usable_cores()
        if world.size > 1:
            _gather(world, images, folder, spool, reading, pace)
        if not spool.rows and world.first:
            raise ValueError(
                f"the set {images.name} has no image that can be read; the first is "
                f"{reading.bad[0]}"
            )
        stored = spool.arrays() if spool.rows else NOTHING
    pace.end()
    viewing.paces.append(pace)
    viewing.tell(str(pace))
    files = images.files if isinstance(images, BetonImages) else (images.folder,)
    return outputs_of(
        stored | {EXTRA + "file_size": np.array(reading.file_sizes, np.float64)},
        name=images.name,
        kind=images.kind,
        files=tuple(map(str, files)),
        digest=reading.digest,
        bad=tuple(reading.bad),
    )


def seen_at(trained: Trained, size: int) -> Trained:
    """Return a run that is shown views of another side [pixels]; 0 = its own."""
    options = trained.options
    if not size:
        return trained
    return replace(trained, options=replace(options, loader=replace(options.loader, size=size)))


def try_size(model: Model, size: int, device: torch.device) -> None:
    """Refuse views that the network cannot be shown."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"--size {size}: the network takes no such views ({first})") from error


def device_of(asked: str, world: World | None = None) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        ValueError: there is no such device.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    elif asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device, or torch cannot use it")
    if asked == "cuda" and world is not None and world.size > 1:
        torch.cuda.set_device(gpu(world.local_rank))
        return torch.device("cuda", gpu(world.local_rank))
    return torch.device(asked)


def share(images: ImageSet, batch: int, rank: int, size: int) -> tuple[ImageSet, int]:
    """Return one process's share of a set, and what is to be added to the numbers of its images.

    The shares are contiguous, in stored order, of whole batches but for the last one.
    """
    batches = -(-len(images) // batch)
    first, last = (min(batches * r // size * batch, len(images)) for r in (rank, rank + 1))
    match images:
        case BetonImages():
            subset = Subset(images.subset.index[first:last], images.subset.labels[first:last])
            return replace(images, subset=subset), 0
        case FolderImages():
            return replace(images, items=images.items[first:last]), first


def _gather(
    world: World, images: ImageSet, folder: Path, spool: Spool, reading: Reading, pace: Pace
) -> None:
    """Let the first process have what all have found, in stored order, through files.

    Args:
        world: the processes.
        images: the set.
        folder: of a disk that all of them see; the files in it are removed again.
        spool: this process's rows; those of the others are added to the first one's.
        reading: what it read, likewise.
        pace: how fast, likewise.
    """
    paths = [folder / f"{images.name}.part{rank}" for rank in range(world.size)]
    if not world.first:
        arrays = spool.arrays() if spool.rows else NOTHING
        part = outputs_of(
            arrays | {EXTRA + "file_size": np.array(reading.file_sizes, np.float64)},
            name=images.name,
            kind=images.kind,
            files=(),
            digest=bytes(reading.marks).hex(),
            bad=tuple(reading.bad),
        )
        store(paths[world.rank], part)
    figures = world.gathered([pace.images, pace.decoding, pace.threads, pace.computing])
    if not world.first:
        return
    for path in paths[1:]:
        part = load_outputs(path)
        reading.marks += bytes.fromhex(part.digest)
        reading.bad += part.bad
        reading.file_sizes += part.extras["file_size"].astype(np.int64).tolist()
        arrays = {n: a for n, a in part.arrays().items() if n != EXTRA + "file_size"}
        for start in range(0, len(part), AT_ONCE):
            spool.add({name: array[start : start + AT_ONCE] for name, array in arrays.items()})
        path.unlink()
    if isinstance(images, FolderImages):
        reading.digest = digest_of(bytes(reading.marks))
    else:
        reading.digest = images.digest
    sums = [sum(values) for values in zip(*figures, strict=True)]
    pace.images, pace.decoding, pace.threads = int(sums[0]), sums[1], int(sums[2])
    pace.computing = sums[3] / world.size  # they compute beside one another


def learn_cssr(viewing: Viewing, images: ImageSet) -> CssrFit:
    """Return what CSSR's scores learn from training images, in a pass that stores nothing.

    Raises:
        ValueError: no image can be read, or the network's outputs are not finite.
    """
    fit = CssrFit(viewing.model)
    for seen in _walk(viewing, images, Reading(), Pace(images.name)):
        for side in seen.sides:
            fit.learn(side.logits, side.maps)
    fit.finish_learning()
    return fit


def _walk(viewing: Viewing, images: ImageSet, reading: Reading, pace: Pace) -> Iterator[_Seen]:
    """Show the network one set, batch by batch."""
    view, options, device = viewing.trained.loader, viewing.options, viewing.device
    match images:
        case BetonImages():
            batches = _beton_batches(images, view, options, device, reading)
        case FolderImages():
            batches = _folder_batches(images, view, options, device, reading)
    done = 0
    for batch in pace.arriving(batches):
        if not len(batch):  # every image of it was bad
            continue
        began = moment(device)
        with torch.inference_mode():
            views = unmixed(batch, viewing.trained.augment, None)
            shown = (views, views.flip(3)) if options.flip else (views,)
            sides = tuple(see(viewing.model, side, options.precision) for side in shown)
        yield _Seen(batch, sides, began)
        done += len(batch)
        viewing.say(f"{images.name}: {done:,} of {len(images):,} images")


def see(model: Model, views: torch.Tensor, precision: str) -> Side:
    """Show a network views; call it in inference mode.

    Args:
        model: in evaluation mode.
        views: float32 [n, 3, H, W], normalised, on the model's device.
        precision: fp32 or bf16.
    """
    with _autocast(views.device, precision):
        logits, maps = model(views)
    return Side(views, logits, maps)


@torch.inference_mode()
def say_of(
    model: Model, side: Side, cssr: CssrFit | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return what scores are made of: logits, pooled features, and extras by name.

    float32 [n, K], float32 [n, C], and [n] each: the rejection head's logit, and CSSR's figures,
    of which there is but the first where `cssr` is None.
    """
    extras: dict[str, torch.Tensor] = {}
    features = side.maps.float().mean((2, 3))
    if model.rejection is not None:
        extras["rejection"] = model.rejection(features).squeeze(1)
    if isinstance(model.head, Reconstruction):
        if cssr is None:
            extras |= cell_figures(model, side.logits, side.maps)
        else:
            extras |= cssr.figures(side.logits, side.maps)
    return side.logits.float(), features, extras


def _said(viewing: Viewing, side: Side, cssr: CssrFit | None) -> dict[str, torch.Tensor]:
    """Return what is stored of views, by its name in the file: [n, K], [n, C], or [n] each."""
    found, features, extras = say_of(viewing.model, side, cssr)
    if viewing.options.odin:

        def logits(views: torch.Tensor) -> torch.Tensor:
            with _autocast(viewing.device, viewing.options.precision):
                return viewing.model(views)[0]

        extras["odin"] = odin(logits, side.views, viewing.trained.augment.std)
    return {
        "logits": found,
        "features": features,
        **{EXTRA + name: extra for name, extra in extras.items()},
    }


def _mean(sides: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of what was said of each side, name by name."""
    if len(sides) == 1:
        return dict(sides[0])
    return {name: torch.stack([side[name] for side in sides]).mean(0) for name in sides[0]}


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16")


def _beton_batches(
    images: BetonImages,
    view: LoaderOptions,
    options: EvaluateOptions,
    device: torch.device,
    reading: Reading,
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
        for batch in loader.batches(Place(seed=0)):
            reading.file_sizes.extend(loader.plan.data.byte_sizes[batch.host.index].tolist())
            yield batch
        reading.bad.extend(loader.bad)
        assert isinstance(loader.engine, Turbo)
        reading.decoding = loader.engine.decoding


def _folder_batches(
    images: FolderImages,
    view: LoaderOptions,
    options: EvaluateOptions,
    device: torch.device,
    reading: Reading,
) -> Iterator[Batch]:
    """Read the images of a folder or a list as the loaders read those of a file."""

    def show(pixels: np.ndarray) -> Shown:
        if images.share is not None:
            return central_view(pixels, view.size, images.share)
        size = np.array([pixels.shape[:2]], np.int32)
        whole = view.crop == "whole"
        box = whole_boxes(size) if whole else centre_boxes(size, view.eval_crop)
        return box_view(pixels, box[0], view.size)

    return read_batches(
        images.items,
        show,
        reading,
        batch=options.batch,
        threads=options.threads,
        device=device,
    )
