"""One pass of a network over one set of images: what it says of each, and what the image shows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    read_batches,
)
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.train.image_sets import BetonImages, FolderImages, ImageSet
from backmix.train.methods.views import unmixed
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.options import EvaluateOptions
from backmix.train.outputs import EXTRA, Outputs, Spool, outputs_of
from backmix.train.scores import image_cues, odin
from backmix.train.scores.cssr import CssrFit, cell_figures
from backmix.train.trained import Trained


@dataclass(frozen=True, eq=False)
class Viewing:
    """A network, and how it is shown images."""

    model: Model
    """In evaluation mode, on the device."""
    trained: Trained
    options: EvaluateOptions
    device: torch.device
    say: Callable[[str], None]


@dataclass(frozen=True, eq=False)
class _Seen:
    """One batch, and what the network says of it."""

    batch: Batch
    views: torch.Tensor
    """float32 [n, 3, H, W], normalised."""
    logits: torch.Tensor
    """[n, K]"""
    maps: torch.Tensor
    """[n, C, g, g']"""


def run_pass(
    viewing: Viewing, images: ImageSet, folder: Path, cssr: CssrFit | None = None
) -> Outputs:
    """Run the network over one set, in stored order.

    Args:
        viewing: the network.
        images: the set.
        folder: on whose disk the outputs wait, in files without a name, until they are stored; the
            returned arrays are maps of them.
        cssr: what CSSR's scores have learned; without it only the first of its figures is computed.

    Raises:
        ValueError: no image of the set can be read.
    """
    reading = Reading()
    with Spool(folder) as spool:
        for seen in _walk(viewing, images, reading):
            arrays = {
                "logits": seen.logits.float(),
                "features": seen.maps.float().mean((2, 3)),
                "labels": seen.batch.labels,
                "index": seen.batch.index,
                **{EXTRA + name: extra for name, extra in _extras(viewing, seen, cssr).items()},
            }
            spool.add({name: array.cpu().numpy() for name, array in arrays.items()})
        if not spool.rows:
            raise ValueError(
                f"the set {images.name} has no image that can be read; the first is "
                f"{reading.bad[0]}"
            )
        stored = spool.arrays()
    files = images.files if isinstance(images, BetonImages) else (images.folder,)
    return outputs_of(
        stored | {EXTRA + "file_size": np.array(reading.file_sizes, np.float64)},
        name=images.name,
        kind=images.kind,
        files=tuple(map(str, files)),
        digest=reading.digest,
        bad=tuple(reading.bad),
    )


def learn_cssr(viewing: Viewing, images: ImageSet) -> CssrFit:
    """Return what CSSR's scores learn from training images, in a pass that stores nothing.

    Raises:
        ValueError: no image can be read, or the network's outputs are not finite.
    """
    fit = CssrFit(viewing.model)
    for seen in _walk(viewing, images, Reading()):
        fit.learn(seen.logits, seen.maps)
    fit.finish_learning()
    return fit


def _walk(viewing: Viewing, images: ImageSet, reading: Reading) -> Iterator[_Seen]:
    """Show the network one set, batch by batch."""
    view, options, device = viewing.trained.loader, viewing.options, viewing.device
    match images:
        case BetonImages():
            batches = _beton_batches(images, view, options, device, reading)
        case FolderImages():
            batches = _folder_batches(images, view, options, device, reading)
    done = 0
    for batch in batches:
        if not len(batch):  # every image of it was bad
            continue
        with torch.inference_mode():
            views = unmixed(batch, viewing.trained.augment, None)
            with _autocast(viewing):
                logits, maps = viewing.model(views)
        yield _Seen(batch, views, logits, maps)
        done += len(batch)
        viewing.say(f"{images.name}: {done:,} of {len(images):,} images")


def _extras(viewing: Viewing, seen: _Seen, cssr: CssrFit | None) -> dict[str, torch.Tensor]:
    """Return what scores need beyond logits and features, [n] each."""
    model = viewing.model
    with torch.inference_mode():
        extras = image_cues(seen.batch.pool[seen.batch.rows])
        if model.rejection is not None:
            extras["rejection"] = model.rejection(seen.maps.float().mean((2, 3))).squeeze(1)
        if isinstance(model.head, Reconstruction):
            if cssr is None:
                extras |= cell_figures(model, seen.logits, seen.maps)
            else:
                extras |= cssr.figures(seen.logits, seen.maps)
    if viewing.options.odin:

        def logits(views: torch.Tensor) -> torch.Tensor:
            with _autocast(viewing):
                return model(views)[0]

        extras["odin"] = odin(logits, seen.views, viewing.trained.augment.std)
    return extras


def _autocast(viewing: Viewing) -> torch.autocast:
    return torch.autocast(viewing.device.type, torch.bfloat16, viewing.options.precision == "bf16")


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
