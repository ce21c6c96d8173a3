"""BackMix: paste patches of other images' backgrounds, found by class activation maps.

Wang, Mu, Huang, Wang, Zhu, Hu: "BackMix: Regularizing Open Set Recognition by Removing Underlying
Fore-Background Priors" (TPAMI 2025). The two operations are `kernels/mix_background.py` and
`kernels/update_cam_bank.py`; this file draws, calls them in order, and keeps the bank.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.mix_background import (
    Mode,
    box_fractions,
    mask_views,
    mix_background,
    view_heat,
)
from backmix.kernels.update_cam_bank import update_cam_bank
from backmix.pipeline import draws
from backmix.pipeline.batch import Batch
from backmix.pipeline.beton import BetonSet
from backmix.pipeline.subset import Subset
from backmix.pipeline.views import to_device as pinned_to_device
from backmix.train.exchange import Exchange
from backmix.train.methods.method import DeviceDraws, HostMethod, Out, Regions, Views
from backmix.train.methods.views import (
    border_of,
    full_boxes,
    to_device,
    unmixed,
    with_pool,
)
from backmix.train.models.build import Model
from backmix.train.models.heads import cam_inputs
from backmix.train.options import Augment, BackMix, Ssod

COOL_TRIES = 8
"""Places tried for `onto = cool`."""


@dataclass
class BackMixMethod:
    """Mix, train on the mix under the target's label, keep the activation maps of all images."""

    options: BackMix
    host: HostMethod
    """What is trained on the mixes."""
    augment: Augment
    bank: Tensor
    """fp16 [N, g, g']: one map per training sample, in the frame of the stored image."""
    truth: Tensor | None
    """fp16 [N, g, g']: true share of foreground per cell, where masks are given."""
    row_of: Tensor
    """int64 [samples]: bank row of a sample number, -1 outside the training subset."""
    label_of: np.ndarray
    """int64 [samples], on the host: label of a sample number, -1 outside the training subset."""
    side: int | None = None
    """Side of the views that `options.patch` is given for [pixels]; in smaller ones, while views
    grow, the patch keeps its share of the side. None = patches have that side in all views."""
    views: torch.dtype = torch.float32
    """dtype of the images that the network is given."""
    grid: Callable[[int], tuple[int, int]] | None = None
    """Cells of the network's last map by the side of the views, for hosts that ask what lies in
    them. None = the bank's, whatever the side."""
    exchange: Exchange | None = None
    """How the rows that are written here reach the other processes that train with this one."""

    @property
    def learns(self) -> bool:
        """Whether anything depends on the bank, so that it must be kept up to date."""
        masked = self.options.mask in ("cam", "inverse")
        return masked or self.options.onto == "cool" or self._asked_for_regions()

    def draw(self, batch: Batch) -> DeviceDraws:
        """Draw donor, patch, flip and shift for every image."""
        options = self.options
        pool_index = batch.host.pool_index
        height, width = batch.pool.shape[1:3]
        epoch = batch.place.epoch
        return to_device(
            draws.mix_draws(
                batch.place.seed,
                epoch,
                batch.host.index,
                rows=batch.host.rows,
                pool_rows=len(pool_index),
                group=batch.group,
                size=(height, width),
                patch=patch_at(options.patch, self.side or height, height),
                position=options.position,
                probability=options.probability if epoch >= options.warmup else 0.0,
                flip=self.augment.flip,
                pad=self.augment.pad,
                donor_class=options.donor,
                labels=self.label_of[pool_index] if options.donor != "any" else None,
            ),
            batch.pool.device,
        )

    def prepare(self, batch: Batch, drawn: DeviceDraws) -> Views:
        """Return the mixed, flipped, shifted, normalised views."""
        if self.options.onto == "cool":
            drawn = self._onto_cool_cells(batch, drawn)
        bank = self.masking_bank()
        bank_row, box = self._donor_views(batch, drawn)
        cells = self.mask_cells()

        def mix(flip: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
            return mix_background(
                batch.pool,
                batch.rows,
                drawn.donor,
                bank=bank,
                bank_row=bank_row,
                box=box,
                patch=drawn.patch,
                flip=flip,
                shift=shift,
                tie=drawn.tie,
                mask_cells=cells,
                mean=self.augment.mean,
                std=self.augment.std,
                fill=self._fill(batch, drawn),
                pad=border_of(self.augment),
                mode=self.mode(),
                dtype=dtype,
            )

        twice = self.options.cam_source == "raw+loss"
        return Views(
            with_pool(mix, batch, self.augment, drawn, self.views),
            drawn,
            plain=unmixed(batch, self.augment, None, self.views) if twice else None,
            regions=self._regions(batch, drawn) if self._asked_for_regions() else None,
            scalars=self._hits(bank, bank_row, cells, drawn),
        )

    def loss(self, views: Views, batch: Batch, model: Model) -> Out:
        """Return the host's loss of the mix; with raw+loss, plus that of the plain views."""
        options = self.options
        if views.plain is not None:
            n = len(batch)
            both = torch.cat([views.images, views.plain])
            both = both.contiguous(memory_format=torch.channels_last)
            logits, features = model(both)
            per_sample = self.host.per_sample(logits, features, batch.labels.repeat(2), model)
            mixed, raw = per_sample[:n], per_sample[n:]
            loss = mixed.mean() + options.raw_weight * raw.mean()
            per_sample = (mixed + options.raw_weight * raw).detach()
            return Out(loss, logits[:n], features[n:], per_sample, views.scalars)
        out = self.host.loss(views, batch, model)
        return replace(out, scalars={**out.scalars, **views.scalars})

    def after_backward(
        self, batch: Batch, views: Views, out: Out, model: Model, alive: Tensor
    ) -> None:
        """Write the images' activation maps into the bank, with the weights that made them."""
        self.host.after_backward(batch, views, out, model, alive)
        learns = self.learns and self.host.learns_maps(batch.place.epoch)
        if not learns or not batch.images:
            return
        options = self.options
        features = out.features.detach()
        if options.cam_source == "raw":
            # Evaluation mode: neither dropout nor a second update of the BatchNorm statistics.
            model.eval()
            with torch.no_grad():
                _, features = model(unmixed(batch, self.augment, None, self.views))
            model.train()
        mixed = options.cam_source == "mix"
        # A replaced image may also be in the batch itself: its row has one writer only.
        rows = torch.where(batch.status == 2, -1, self.row_of[batch.index])
        drawn = views.drawn if mixed else None
        self._write(features, batch, model, rows, options.rate * alive, drawn)

    @torch.no_grad()
    def fill_bank(self, batches: Iterable[Batch], model: Model) -> None:
        """Write the maps of plain views as they are, before a trained network is trained further.

        Args:
            batches: of training images, each in one of them at most.
            model: the network; its head must have been trained.
        """
        training = model.training
        model.eval()
        for batch in batches:
            if len(batch):
                _, features = model(unmixed(batch, self.augment, None, self.views))
                self._write(features, batch, model, self.row_of[batch.index], 1.0, None)
        model.train(training)

    def _write(
        self,
        features: Tensor,
        batch: Batch,
        model: Model,
        rows: Tensor,
        rate: Tensor | float,
        drawn: DeviceDraws | None,
    ) -> None:
        """Write maps into rows of the bank: with `drawn` those of the mix, else of plain views."""
        maps, weights = cam_inputs(model.head, features)
        update_cam_bank(
            self.bank,
            maps,
            weights,
            batch.labels,
            rows,
            box=box_fractions(batch.boxes, batch.sizes),
            flip=drawn and drawn.flip,
            shift=drawn and drawn.shift,
            patch=drawn and drawn.patch,
            size=(batch.pool.shape[1], batch.pool.shape[2]),
            rate=rate,
            normalise=self.options.normalise,
        )
        if self.exchange is not None:
            self.exchange.wrote(rows)

    def after_step(self, figures: dict[str, Tensor], alive: Tensor) -> None:
        """Let the host learn from the step."""
        self.host.after_step(figures, alive)

    def tensors(self) -> dict[str, Tensor]:
        """Return the bank, which masks of the next epoch are read from, and the host's state."""
        return {"bank": self.bank, **{f"host.{k}": v for k, v in self.host.tensors().items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the bank and the host's state back."""
        self.bank.copy_(tensors["bank"])
        own = {k.removeprefix("host."): v for k, v in tensors.items() if k.startswith("host.")}
        self.host.load(own)

    def _asked_for_regions(self) -> bool:
        """Return whether the host learns from what the mix knows of its cells."""
        host = self.options.host
        return isinstance(host, Ssod) and host.pasted

    def _regions(self, batch: Batch, drawn: DeviceDraws) -> Regions:
        """Return what the mix knows of its cells."""
        height, width = batch.pool.shape[1:3]
        # The mix of a donor that is 1 everywhere with a target that is 0 is what was pasted.
        pool = torch.zeros(2, height, width, 3, dtype=torch.uint8, device=batch.pool.device)
        pool[1] = 1
        target = torch.zeros_like(batch.rows)
        bank_row, box = self._donor_views(batch, drawn)
        reflect = self.augment.border == "reflect"
        pasted = mix_background(
            pool,
            target,
            target + 1,
            bank=self.masking_bank(),
            bank_row=bank_row,
            box=box,
            patch=drawn.patch,
            flip=drawn.flip,
            shift=drawn.shift,
            tie=drawn.tie,
            mask_cells=self.mask_cells(),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            fill="keep",
            pad="reflect" if reflect else (0, 0, 0),
            mode=self.mode(),
            dtype=torch.uint8,
        )
        cells = self.bank.shape[1], self.bank.shape[2]
        grid = self.grid(height) if self.grid else cells
        heat = mix_heat(
            self.bank,
            self.row_of[batch.index],
            box_fractions(batch.boxes, batch.sizes),
            flip=drawn.flip,
            shift=drawn.shift,
            size=(height, width),
            grid=grid,
            reflect=reflect,
        )
        return Regions(_cell_means(pasted[..., 0], grid), heat)

    def _donor_views(self, batch: Batch, drawn: DeviceDraws) -> tuple[Tensor, Tensor]:
        """Return the donors' bank rows, int64 [n], and what their pool rows show, int32 [n, 4]."""
        # A batch pool shows crops, row i of the pool being image i; a resident one whole images.
        boxes = box_fractions(batch.boxes, batch.sizes)
        box = boxes[drawn.donor] if batch.group else full_boxes(len(batch), boxes.device)
        return self.row_of[batch.pool_index[drawn.donor]], box

    def mask_cells(self) -> int:
        """Return how many cells of a donor are masked."""
        cells = self.bank.shape[1] * self.bank.shape[2]
        return int(self.options.mask_ratio * cells + 1e-9)

    def masking_bank(self) -> Tensor:
        """Return what masks are read from: maps, true foreground, or nothing but ties."""
        if self.options.mask == "oracle":
            assert self.truth is not None
            return self.truth
        return torch.zeros_like(self.bank) if self.options.mask == "random" else self.bank

    def mode(self) -> Mode:
        """Return which cells `mix_background` takes as the foreground."""
        match self.options.mask:
            case "none" | "grey" | "inverse":
                return self.options.mask
            case "cam" | "random" | "oracle":
                return "cam"

    def _fill(
        self, batch: Batch, drawn: DeviceDraws
    ) -> tuple[float, float, float] | Tensor | Literal["keep"] | None:
        match self.options.fill:
            case "grey":
                return (127.5, 127.5, 127.5)
            case "mean":
                return None
            case "keep":
                return "keep"
            case "donor":
                return batch.pool[drawn.donor].float().mean((1, 2))

    def _hits(
        self, bank: Tensor, bank_row: Tensor, cells: int, drawn: DeviceDraws
    ) -> dict[str, Tensor]:
        """Return the share of true foreground that the donors' masks cover, on whole images."""
        if self.truth is None or self.options.mask in ("none", "grey"):
            return {}
        masked = mask_views(
            bank,
            bank_row,
            full_boxes(len(bank_row), bank.device),
            drawn.tie,
            cells,
            mode=self.mode(),
        )
        truth = self.truth[bank_row].float()
        return {"mask_hit": (masked * truth).sum() / truth.sum().clamp(min=1e-9)}

    def _onto_cool_cells(self, batch: Batch, drawn: DeviceDraws) -> DeviceDraws:
        """Move every patch to the drawn place where the target's own map is coolest."""
        seed, epoch = batch.place.seed, batch.place.epoch
        index = batch.host.index
        tries = np.stack(
            [
                draws.block(seed, epoch, index, "patch", number)[:, :2]
                for number in range(1, COOL_TRIES + 1)
            ],
            axis=1,
        )  # uint32 [n, tries, 2]
        words = pinned_to_device(tries.astype(np.int64), batch.pool.device)
        sides = tuple(batch.pool.shape[1:3])
        extent = drawn.patch[:, None, 4:6].long()
        heat = view_heat(
            self.bank, self.row_of[batch.index], box_fractions(batch.boxes, batch.sizes)
        ).float()
        corners, shares = [], []
        for axis, side in enumerate(sides):
            corner = (words[..., axis] * (side - extent[..., axis] + 1)) >> 32
            corners.append(corner)
            shares.append(_cell_shares(corner, extent[..., axis], side, heat.shape[axis + 1]))
        under = torch.einsum("nti,nij,ntj->nt", shares[0], heat, shares[1])
        best = under.argmin(1)[:, None]
        corner = torch.cat([places.gather(1, best) for places in corners], dim=1).to(torch.int32)
        patch = torch.cat([corner, drawn.patch[:, 2:]], dim=1).contiguous()
        return DeviceDraws(drawn.flip, drawn.shift, drawn.donor, patch, drawn.tie)


def patch_at(patch: int, full: int, side: int) -> int:
    """Return the side of a patch in views of another side, at the same share of it [pixels].

    Rounded to nearest, halves up, and at least 1.

    Args:
        patch: side of the patch in views of side `full`, 1 .. full.
        full: side of the views that `patch` is given for.
        side: side of the views at hand, at least 1.
    """
    return max(1, (2 * patch * side + full) // (2 * full))


def mix_heat(
    bank: Tensor,
    bank_row: Tensor,
    box: Tensor,
    *,
    flip: Tensor,
    shift: Tensor | None,
    size: tuple[int, int],
    grid: tuple[int, int],
    reflect: bool,
) -> Tensor:
    """Return maps of the bank in the frame of the training views, float32 [n, *grid].

    A cell takes the value of the stored cell that its centre shows, through shift, flip and crop;
    NaN where it shows the border. The centre is a pixel, the lower right one of the middle four.

    Args:
        bank: maps in the frame of the stored images, fp16 or fp32 [m, g, g'].
        bank_row: the images' rows of it, int64 [n].
        box: the images' crops as 16.16 fractions of the stored image, int32 [n, 4] as y0, x0, h, w.
        flip: whether the view was mirrored, bool [n].
        shift: which pixel of the flipped view the output's first one shows, int32 [n, 2]; None = 0.
        size: height and width of the view [pixels].
        grid: cells of the last feature map.
        reflect: whether the border mirrors the view, so that every cell shows something.
    """
    y0, x0, height, width = box.long()[:, :, None].unbind(1)
    none = torch.zeros_like(y0)
    sy, sx = (none, none) if shift is None else shift.long()[:, :, None].unbind(1)
    places = []
    for start, length, moved, mirrored, pixels, cells, stored in (
        (y0, height, sy, None, size[0], grid[0], bank.shape[1]),
        (x0, width, sx, flip, size[1], grid[1], bank.shape[2]),
    ):
        cell = torch.arange(cells, device=bank.device)
        pixel = (2 * cell + 1) * pixels // (2 * cells) + moved
        if reflect:
            pixel = (pixels - 1) - ((pixels - 1) - pixel.abs()).abs()
        shown = (pixel >= 0) & (pixel < pixels)
        if mirrored is not None:
            pixel = torch.where(mirrored[:, None], pixels - 1 - pixel, pixel)
        centre = 2 * pixels * start + (2 * pixel + 1) * length
        place = (centre * stored // (2 * pixels * 65536)).clamp(0, stored - 1)
        places.append((place, shown))
    (row, row_shown), (column, column_shown) = places
    sample = torch.arange(len(bank_row), device=bank.device)[:, None, None]
    heat = bank.index_select(0, bank_row)[sample, row[:, :, None], column[:, None, :]].float()
    return torch.where(row_shown[:, :, None] & column_shown[:, None, :], heat, torch.nan)


def _cell_means(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean of each cell's pixels, float32 [n, *grid] of small integers [n, H, W].

    Pixel y belongs to cell (y * cells) // H. The sums are exact.
    """
    owned = []
    for side, cells in zip(pixels.shape[1:], grid, strict=True):
        cell = torch.arange(side, device=pixels.device) * cells // side
        owned.append((cell == torch.arange(cells, device=pixels.device)[:, None]).float())
    rows, columns = owned
    with torch.autocast(pixels.device.type, enabled=False):
        sums = rows @ pixels.float() @ columns.T
    return sums / (rows.sum(1)[:, None] * columns.sum(1))


def _cell_shares(corner: Tensor, extent: Tensor, side: int, cells: int) -> Tensor:
    """Return how many rows of each cell a window covers, float32 [n, tries, cells].

    Pixel y belongs to cell (y * cells) // side.
    """
    edges = (torch.arange(cells + 1, device=corner.device) * side + cells - 1) // cells
    low = torch.maximum(corner[..., None], edges[:-1])
    high = torch.minimum((corner + extent)[..., None], edges[1:])
    return (high - low).clamp(min=0).float()


def foreground_shares(
    folder: Path, data: BetonSet, subset: Subset, grid: tuple[int, int]
) -> np.ndarray:
    """Read the foreground masks of a training subset, float16 [N, g, g'].

    The mask of source `x/1.jpg` is `folder/x/1.png`; pixels above 0 are foreground. A cell's value
    is its share of foreground (area average).

    Raises:
        ValueError: a mask is missing, is no image, or has another size than its image.
    """
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise ValueError(f"--method.masks: {folder} is no folder")
    shares = np.empty((len(subset), *grid), np.float16)
    for row, sample in enumerate(subset.index):
        path = folder / Path(data.name(int(sample))).with_suffix(".png")
        try:
            with Image.open(path) as image:
                mask = np.asarray(image.convert("L")) > 0
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: every training image needs a mask") from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is no readable mask: {error}") from error
        if mask.shape != tuple(data.sizes[sample]):
            raise ValueError(
                f"{path} is {mask.shape[0]} x {mask.shape[1]}, but {data.where(int(sample))} is "
                f"{data.sizes[sample][0]} x {data.sizes[sample][1]}"
            )
        shares[row] = _area_average(mask, grid)
    return shares


def _area_average(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Average a bool image over the cells of a grid, exactly; float64 [g, g']."""
    for axis, cells in enumerate(grid):
        side = mask.shape[axis]
        edges = np.arange(cells + 1) * side / cells
        summed = np.concatenate(
            [
                np.zeros((1, *np.moveaxis(mask, axis, 0).shape[1:])),
                np.cumsum(np.moveaxis(mask, axis, 0), 0),
            ]
        )
        whole = np.minimum(edges.astype(int), side - 1)
        at_edges = summed[whole] + (edges - whole)[:, None] * (summed[whole + 1] - summed[whole])
        mask = np.moveaxis(np.diff(at_edges, axis=0) * cells / side, 0, axis)
    return mask
