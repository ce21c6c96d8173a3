"""The BackMix method: who gives, which cells, what the bank learns."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backmix.kernels.mix_background import box_fractions, mask_views, mix_background
from backmix.kernels.update_cam_bank import update_cam_bank
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import open_set
from backmix.train.check import check, check_donors
from backmix.train.methods.backmix import (
    BackMixMethod,
    _area_average,
    _cell_means,
    _cell_shares,
    patch_at,
)
from backmix.train.methods.method import DeviceDraws
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.methods.views import full_boxes, unmixed
from backmix.train.models.build import Model
from backmix.train.models.heads import linear_head
from backmix.train.options import BackMix, Optim, Run, Softmax, Split, Ssod
from backmix.train.prepare import prepare_run, view_dtype
from backmix.train.run_folder import Resolved
from tests.runs import SIDE, tiny_run, tiny_set, views_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(scope="module")
def masks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of the bright squares: class k lies at y 4 + 12 (k // 2), x 4 + 14 (k % 2), 10 px."""
    folder = tmp_path_factory.mktemp("masks")
    with open_set(data) as stored:
        for sample, label in enumerate(stored.labels.tolist()):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            y, x = 4 + 12 * (label // 2), 4 + 14 * (label % 2)
            mask[y : y + 10, x : x + 10] = 255
            path = folder / Path(stored.name(sample)).with_suffix(".png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
    return folder


def method_and_batch(run: Run, epoch: int = 1) -> tuple[BackMixMethod, Batch, Model]:
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(run.seed, epoch))))
    assert isinstance(state.method, BackMixMethod)
    return state.method, batch, state.model


def run_of(data: Path, **options: object) -> Run:
    base = BackMix(patch=12, warmup=0)
    return tiny_run(data, Path("unused"), replace(base, **options))  # type: ignore[arg-type]


def test_a_donor_never_is_of_an_unknown_class(data: Path) -> None:
    """With a resident pool donors come from anywhere in it, so it must hold the known alone."""
    run = replace(run_of(data), split=Split(known=("a", "c")))
    run = replace(run, loader=replace(run.loader, loader="resident"))
    method, batch, _ = method_and_batch(run)
    views = views_of(method, batch)
    with open_set(data) as stored:
        shown = stored.labels[batch.pool_index[views.drawn.donor].numpy()]
    assert set(shown.tolist()) == {0, 2}
    assert (method.row_of[batch.pool_index] == torch.arange(20)).all()


@pytest.mark.parametrize(("donor", "equal"), [("same", True), ("other", False)])
def test_donors_keep_to_the_classes_asked_for(data: Path, donor: str, equal: bool) -> None:
    method, batch, _ = method_and_batch(run_of(data, donor=donor))
    views = views_of(method, batch)
    drawn = views.drawn
    pasted = drawn.patch[:, 4] > 0
    assert pasted.any()
    same = batch.labels[drawn.donor] == batch.labels
    assert (same[pasted] == equal).all()


def test_grey_patches_lie_where_backmix_pastes(data: Path) -> None:
    """The occlusion control differs from BackMix in what the patches show, in nothing else."""
    backmix, batch, _ = method_and_batch(run_of(data))
    grey, _, _ = method_and_batch(run_of(data, mask="grey"))
    of_one, of_other = views_of(backmix, batch), views_of(grey, batch)
    assert torch.equal(of_one.drawn.patch, of_other.drawn.patch)
    one, other = of_one.images, of_other.images
    filled = torch.isclose(other, torch.full_like(other, 0.5)).all(1)
    areas = filled.flatten(1).sum(1)
    # A patch is 12 x 12 less what the shift of up to 2 px moved out.
    assert ((areas >= 100) & (areas <= 144)).all()
    assert torch.equal(one.permute(0, 2, 3, 1)[~filled], other.permute(0, 2, 3, 1)[~filled])


@pytest.mark.parametrize(("batch", "group", "named"), [(16, 1, "group"), (1, 0, "batch")])
def test_images_without_another_beside_them_are_refused(
    data: Path, tmp_path: Path, batch: int, group: int, named: str
) -> None:
    """Else a run by the name of BackMix would be one of its host."""
    run = tiny_run(data, tmp_path / "run", BackMix(patch=8))
    alone = replace(run, loader=replace(run.loader, batch=batch, group=group))
    with pytest.raises(ValueError, match=f"--loader.{named} 1: .* at least 2"):
        prepare_run(alone, "test", [])
    check_donors(alone, "resident")
    check_donors(replace(alone, method=Softmax()), "turbo")
    check_donors(replace(alone, loader=replace(run.loader, group=2)), "turbo")


def test_nothing_is_pasted_during_the_warm_up(data: Path) -> None:
    method, batch, _ = method_and_batch(run_of(data, warmup=2))
    views = views_of(method, batch)
    assert not views.drawn.patch.any()


@pytest.mark.parametrize("source", ["raw", "raw+loss", "mix"])
def test_the_bank_learns_the_maps_of_the_batch_and_of_nobody_else(data: Path, source: str) -> None:
    method, batch, model = method_and_batch(run_of(data, cam_source=source, rate=1.0))
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    state = {name: value.clone() for name, value in model.named_buffers()}
    method.after_backward(batch, views, out, model, torch.ones(()))  # type: ignore[arg-type]
    if source == "raw":
        assert all(torch.equal(state[name], value) for name, value in model.named_buffers())
    changed = (method.bank != 0.5).flatten(1).any(1)
    assert set(changed.nonzero().flatten().tolist()) == set(method.row_of[batch.index].tolist())
    if source == "raw":
        # Written out once more: the class weights of the label times the map of the plain view.
        model.eval()
        plain = batch.pool[batch.rows].permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            _, features = model(plain)
            heat = torch.einsum("nc,nchw->nhw", linear_head(model).weight[batch.labels], features)
        low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
        expected = (heat - low) / (high - low)
        stored = method.bank[method.row_of[batch.index]].float()
        assert torch.allclose(stored, expected, atol=2e-3)


def test_a_void_step_leaves_the_bank(data: Path) -> None:
    method, batch, model = method_and_batch(run_of(data, rate=1.0))
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    method.after_backward(batch, views, out, model, torch.zeros(()))  # type: ignore[arg-type]
    assert (method.bank == 0.5).all()


@pytest.mark.parametrize("mask", ["none", "grey", "random", "oracle"])
def test_masks_that_need_no_maps_cost_no_pass(data: Path, masks: Path, mask: str) -> None:
    method, batch, model = method_and_batch(
        run_of(data, mask=mask, masks=masks if mask == "oracle" else None)
    )
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    method.after_backward(batch, views, out, model, torch.ones(()))  # type: ignore[arg-type]
    assert (method.bank == 0.5).all() and not method.learns


def test_the_oracle_hits_more_foreground_than_chance_and_the_log_says_so(
    data: Path, masks: Path
) -> None:
    hits = {}
    for mask in ("oracle", "inverse", "random"):
        method, batch, model = method_and_batch(run_of(data, mask=mask, masks=masks))
        if mask == "inverse":  # the coolest cells of a perfect bank
            assert method.truth is not None
            method.bank.copy_(method.truth)
        views = views_of(method, batch)
        out = method.loss(views, batch, model)  # type: ignore[arg-type]
        hits[mask] = float(out.scalars["mask_hit"])
    # A 10 px square covers 100 px, of which 4 of 16 cells of 8 px can hold at most 100.
    assert hits["oracle"] > 0.9
    assert hits["inverse"] < 0.05
    assert 0.1 < hits["random"] < 0.45


def test_true_foreground_is_averaged_exactly() -> None:
    mask = np.zeros((5, 6), bool)
    mask[:3, :2] = True
    # Rows are cut at 2.5, columns at 2 and 4: the upper left cell is full, the one below 1/5 full.
    expected = [[1, 0, 0], [0.2, 0, 0]]
    assert np.allclose(_area_average(mask, (2, 3)), expected)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        ("remove", "every training image needs a mask"),
        ("resize", "is 8 x 9"),
        ("spoil", "no readable"),
    ],
)
def test_wrong_masks_are_named(
    data: Path, masks: Path, tmp_path: Path, break_it: str, said: str
) -> None:
    import shutil

    copy = shutil.copytree(masks, tmp_path / "masks")
    victim = copy / "a" / "0.png"
    if break_it == "remove":
        victim.unlink()
    elif break_it == "resize":
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(victim)
    else:
        victim.write_text("no image")
    with pytest.raises(ValueError, match=said) as refused:
        prepare_run(run_of(data, mask="oracle", masks=copy), "test", [])
    assert str(victim) in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch": 33}, "--method.patch"),
        ({"mask": "oracle"}, "--method.masks"),
        ({"probability": 1.5}, "--method.probability"),
        ({"mask_ratio": -0.1}, "--method.mask-ratio"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    data: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check(run_of(data, **options))


def test_cool_places_are_cooler_than_drawn_ones(data: Path, masks: Path) -> None:
    """With true masks as maps, the target's object is covered less."""
    covered = {}
    for onto in ("anywhere", "cool"):
        method, batch, _ = method_and_batch(run_of(data, onto=onto, masks=masks))
        assert method.truth is not None
        method.bank.copy_(method.truth)
        views = views_of(method, batch)
        patch = views.drawn.patch.long()
        assert (patch[:, :2] >= 0).all() and (patch[:, :2] + patch[:, 4:] <= SIDE).all()
        assert (patch[:, 4:] == 12).all()
        shares = [
            _cell_shares(patch[:, None, axis], patch[:, None, axis + 4], SIDE, 4) for axis in (0, 1)
        ]
        heat = method.truth[method.row_of[batch.index]].float()
        covered[onto] = float(torch.einsum("nti,nij,ntj->nt", shares[0], heat, shares[1]).mean())
    assert covered["cool"] < 0.5 * covered["anywhere"]


def test_window_shares_count_every_pixel_once() -> None:
    corner, extent = torch.tensor([[0, 3, 29]]), torch.tensor([[32, 5, 3]])
    shares = _cell_shares(corner, extent, 32, 7)
    assert shares.sum(-1).tolist() == [[32.0, 5.0, 3.0]]
    assert shares[0, 0].tolist() == [5.0, 5.0, 4.0, 5.0, 4.0, 5.0, 4.0]  # rows y with y * 7 // 32


def test_a_held_out_image_has_no_row_in_the_bank(data: Path) -> None:
    method, _, _ = method_and_batch(replace(run_of(data), val=0.2))
    assert len(method.bank) == 32 and int((method.row_of < 0).sum()) == 8


def cropped(data: Path, **options: object) -> Run:
    """A run whose views are crops of a tenth to a half of the image, all different."""
    run = run_of(data, **options)
    return replace(run, loader=replace(run.loader, crop="random", scale=(0.1, 0.5)))


def test_a_donors_mask_is_read_through_the_donors_own_crop(data: Path) -> None:
    method, batch, _ = method_and_batch(cropped(data))
    method.bank.copy_(torch.rand(method.bank.shape, generator=torch.Generator().manual_seed(0)))
    views = views_of(method, batch)
    images, drawn = views.images, views.drawn
    assert drawn.shift is not None

    def mixed(box: torch.Tensor) -> torch.Tensor:
        return mix_background(
            batch.pool,
            torch.arange(16),
            drawn.donor,
            bank=method.bank,
            bank_row=batch.index[drawn.donor],  # all samples are known: row = sample
            box=box,
            patch=drawn.patch,
            flip=drawn.flip,
            shift=drawn.shift,
            tie=drawn.tie,
            mask_cells=4,
            mean=(0, 0, 0),
            std=(255, 255, 255),
            fill=(127.5, 127.5, 127.5),
        )

    boxes = box_fractions(batch.boxes, batch.sizes)
    assert torch.equal(images, mixed(boxes[drawn.donor]))
    assert not torch.equal(images, mixed(boxes))
    assert not torch.equal(images, mixed(full_boxes(16, torch.device("cpu"))))


@pytest.mark.parametrize("source", ["raw", "mix"])
def test_maps_enter_the_bank_where_the_network_saw_the_image(data: Path, source: str) -> None:
    """Through the crop, and for maps of the mix through flip, shift and patch as well."""
    method, batch, model = method_and_batch(cropped(data, cam_source=source, rate=0.5))
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    features, drawn = out.features.detach(), views.drawn
    if source == "raw":
        model.eval()
        with torch.no_grad():
            _, features = model(unmixed(batch, method.augment, None))
        model.train()
    expected = method.bank.clone()
    update_cam_bank(
        expected,
        features,
        linear_head(model).weight.detach(),
        batch.labels,
        batch.index,
        box=box_fractions(batch.boxes, batch.sizes),
        flip=drawn.flip if source == "mix" else None,
        shift=drawn.shift if source == "mix" else None,
        patch=drawn.patch if source == "mix" else None,
        size=(SIDE, SIDE),
        rate=0.5,
    )
    method.after_backward(batch, views, out, model, torch.ones(()))
    assert torch.equal(method.bank, expected)


def growing(run: Run) -> Run:
    """Views of 16 pixels in the first epoch, 32 in the others; maps of 2 x 2 and 4 x 4 cells."""
    return replace(run, loader=replace(run.loader, size=32, grow_from=16, grow=(0, 1)))


@pytest.mark.parametrize(("epoch", "side", "cells"), [(0, 16, 2), (1, 32, 4)])
def test_maps_of_any_size_enter_one_bank_through_the_crop(
    data: Path, epoch: int, side: int, cells: int
) -> None:
    """A cell of the bank takes the map's cell that its centre lies in, here by exact fractions."""
    run = growing(cropped(data, cam_source="raw", rate=0.5))
    method, batch, model = method_and_batch(run, epoch)
    assert batch.pool.shape[1:3] == (side, side) and method.bank.shape[1:] == (4, 4)
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    model.eval()
    with torch.no_grad():
        _, features = model(unmixed(batch, method.augment, None))
    model.train()
    assert features.shape[2:] == (cells, cells)
    method.after_backward(batch, views, out, model, torch.ones(()))
    weight = linear_head(model).weight[batch.labels].detach()
    heat = torch.einsum("nc,nchw->nhw", weight, features).double().numpy()
    shown = 0
    for n, (y0, x0, height, width) in enumerate(batch.boxes.tolist()):
        for row in range(4):
            for column in range(4):
                stored = float(method.bank[batch.index[n], row, column])
                # The centre, in shares of the crop; the stored image has 32 pixels.
                y = (Fraction(2 * row + 1, 8) * 32 - y0) / height
                x = (Fraction(2 * column + 1, 8) * 32 - x0) / width
                if not (0 <= y < 1 and 0 <= x < 1):
                    assert stored == 0.5
                    continue
                value = heat[n, int(y * cells), int(x * cells)]
                value = (value - heat[n].min()) / (heat[n].max() - heat[n].min())
                assert stored == pytest.approx(0.5 + 0.5 * (value - 0.5), abs=1e-3)
                shown += 1
    assert 16 < shown < 16 * 16


@pytest.mark.parametrize("position", ["inside", "clipped"])
def test_patches_grow_with_the_views(data: Path, position: str) -> None:
    for epoch, side in ((0, 6), (1, 12)):
        method, batch, _ = method_and_batch(growing(run_of(data, position=position)), epoch)
        views = views_of(method, batch)
        sides = views.drawn.patch[:, 4:]
        assert sides.max() == side and (position == "clipped" or (sides == side).all())


@pytest.mark.parametrize(
    ("patch", "full", "side", "expected"),
    [
        (112, 224, 160, 80),  # half stays half
        (112, 224, 224, 112),
        (8, 32, 16, 4),  # a quarter stays a quarter
        (5, 32, 16, 3),  # 2.5
        (75, 160, 128, 60),
        (1, 224, 32, 1),  # 0.14
        (224, 224, 160, 160),
    ],
)
def test_a_patch_keeps_its_share_of_the_view(
    patch: int, full: int, side: int, expected: int
) -> None:
    assert patch_at(patch, full, side) == expected


def view_pixel(place: int, shift: int, side: int, *, flip: bool, reflect: bool) -> int | None:
    """The pixel of the view that a pixel of the output shows along one side, None at the border."""
    place += shift
    if reflect:
        place = -place if place < 0 else place
        place = 2 * (side - 1) - place if place >= side else place
    if not 0 <= place < side:
        return None
    return side - 1 - place if flip else place


def slow_regions(
    method: BackMixMethod, batch: Batch, drawn: DeviceDraws, cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a mix knows of its cells, pixel by pixel, with fractions for all places."""
    side, stored = batch.pool.shape[1], method.bank.shape[1]
    assert drawn.shift is not None
    boxes = box_fractions(batch.boxes, batch.sizes)
    box = boxes[drawn.donor] if batch.group else full_boxes(len(batch), torch.device("cpu"))
    donors = method.row_of[batch.pool_index[drawn.donor]]
    masked = mask_views(
        method.masking_bank(), donors, box, drawn.tie, method.mask_cells(), method.mode()
    )
    reflect = method.augment.border == "reflect"
    pasted = np.zeros((len(batch), cells, cells))
    heat = np.full((len(batch), cells, cells), np.nan)
    owned = np.zeros((cells, cells))
    for n in range(len(batch)):
        sy, sx = drawn.shift[n].tolist()
        flip = bool(drawn.flip[n])
        ty, tx, dy, dx, height, width = drawn.patch[n].tolist()
        for y in range(side):
            for x in range(side):
                cell = (n, y * cells // side, x * cells // side)
                owned[cell[1:]] += n == 0
                yv = view_pixel(y, sy, side, flip=False, reflect=reflect)
                xv = view_pixel(x, sx, side, flip=flip, reflect=reflect)
                if yv is None or xv is None:
                    continue
                if not (ty <= yv < ty + height and tx <= xv < tx + width):
                    continue
                yd, xd = yv - ty + dy, xv - tx + dx
                pasted[cell] += not masked[n, yd * stored // side, xd * stored // side]
        y0, x0, box_height, box_width = batch.boxes[n].tolist()
        for i in range(cells):
            for j in range(cells):
                y, x = ((2 * k + 1) * side // (2 * cells) for k in (i, j))
                yv = view_pixel(y, sy, side, flip=False, reflect=reflect)
                xv = view_pixel(x, sx, side, flip=flip, reflect=reflect)
                if yv is None or xv is None:
                    continue
                # In shares of the stored image, whose sides are 32 pixels.
                y_stored = (y0 + (yv + Fraction(1, 2)) / side * box_height) / SIDE
                x_stored = (x0 + (xv + Fraction(1, 2)) / side * box_width) / SIDE
                row = method.row_of[batch.index[n]]
                heat[n, i, j] = method.bank[row, int(y_stored * stored), int(x_stored * stored)]
    return pasted / owned, heat


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("whole", {}),
        ("whole", {"fill": "keep", "mask_ratio": 0.6, "patch": 17}),
        ("whole", {"mask": "none", "position": "clipped"}),
        ("whole", {"mask": "grey"}),
        ("whole", {"warmup": 9}),
        ("resident", {"mask": "inverse"}),
        ("crops", {"patch": 20}),
        ("reflect", {"patch": 20}),
        ("growing", {}),
    ],
)
def test_a_mix_knows_where_it_pasted_and_where_the_targets_map_is_hot(
    data: Path, change: str, options: dict[str, object]
) -> None:
    run = run_of(data, host=Ssod(), **options)
    run = replace(run, augment=replace(run.augment, pad=6))
    if change == "resident":
        run = replace(run, loader=replace(run.loader, loader="resident"))
    if change in ("crops", "growing"):
        run = cropped(data, host=Ssod(), **options)
    if change == "reflect":
        run = replace(run, augment=replace(run.augment, border="reflect"))
    if change == "growing":
        run = growing(run)
    method, batch, _ = method_and_batch(run, epoch=0)
    method.bank.copy_(torch.rand(method.bank.shape, generator=torch.Generator().manual_seed(0)))
    views = views_of(method, batch)
    assert views.drawn.flip.any() and not views.drawn.flip.all()
    regions = views.regions
    assert regions is not None
    cells = 2 if change == "growing" else 4
    pasted, heat = slow_regions(method, batch, views.drawn, cells)
    assert regions.pasted.dtype == regions.heat.dtype == torch.float32
    assert np.allclose(regions.pasted.numpy(), pasted, rtol=1e-6, atol=0)
    assert np.array_equal(regions.heat.numpy(), heat, equal_nan=True)
    nothing = options in ({"mask": "grey"}, {"warmup": 9})
    assert (pasted.sum() == 0) == nothing
    assert np.isnan(heat).any() == (change in ("whole", "resident"))


def test_a_mixs_cells_may_differ_by_a_pixel() -> None:
    """22 pixels in 4 cells: 6, 5, 6 and 5 rows; each cell is measured by its own."""
    pixels = torch.zeros(1, 22, 22, dtype=torch.uint8)
    pixels[0, 5:11] = 1
    means = _cell_means(pixels, (4, 4))
    assert means[0].tolist() == [pytest.approx([share] * 4) for share in (1 / 6, 1.0, 0.0, 0.0)]


def test_pixels_are_counted_exactly_under_autocast() -> None:
    """The method's loss runs under it, and bf16 holds no odd number above 256."""
    pixels = torch.ones(1, 64, 64, dtype=torch.uint8)
    pixels[0, 0, 0] = 0
    with torch.autocast("cpu", torch.bfloat16):
        means = _cell_means(pixels, (2, 2))
    assert means[0].tolist() == [[1023 / 1024, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(("pasted", "moves"), [(True, True), (False, False)])
def test_the_bank_learns_where_only_the_host_asks_for_it(
    data: Path, pasted: bool, moves: bool
) -> None:
    method, batch, model = method_and_batch(run_of(data, mask="grey", host=Ssod(pasted=pasted)))
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    method.after_backward(batch, views, out, model, torch.ones(()))
    assert bool((method.bank != 0.5).any()) == moves
    assert (views.regions is not None) == moves


def test_a_replaced_image_writes_no_map(data: Path) -> None:
    """It may be in the batch itself, and a row has one writer."""
    method, batch, model = method_and_batch(run_of(data, cam_source="mix", rate=1.0))
    status = torch.zeros(16, dtype=torch.uint8)
    status[3] = 2
    batch = replace(batch, status=status)
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    method.after_backward(batch, views, out, model, torch.ones(()))
    row = method.bank[batch.index]
    assert (row[3] == 0.5).all() and (row[4] != 0.5).any()


def test_the_raw_views_count_with_their_weight_and_give_the_maps(data: Path) -> None:
    run = replace(
        run_of(data, cam_source="raw+loss", raw_weight=0.25),
        model="classifier32-quarter",  # no dropout: the same views give the same logits
        optim=Optim(label_smoothing=0.2),
    )
    method, batch, model = method_and_batch(run)
    views = views_of(method, batch)
    out = method.loss(views, batch, model)
    both = torch.cat([views.images, unmixed(batch, method.augment, None)])
    logits, features = model(both)
    loss = [F.cross_entropy(half, batch.labels, label_smoothing=0.2) for half in logits.split(16)]
    assert out.loss.item() == pytest.approx((loss[0] + 0.25 * loss[1]).item(), rel=1e-5)
    assert torch.allclose(out.features, features[16:], atol=1e-5)


def test_shifts_bring_in_the_border_that_was_asked_for(data: Path) -> None:
    run = run_of(data)
    mean = (100.0, 110.0, 120.0)
    for border, outside in (("mean", 0.0), ("black", -100 / 50)):
        augment = replace(run.augment, border=border, mean=mean, std=(50.0, 50.0, 50.0))
        method, batch, _ = method_and_batch(replace(run, augment=augment))
        views = views_of(method, batch)
        images = views.images
        assert views.drawn.shift is not None
        down = views.drawn.shift[:, 0] < 0  # the first output row lies above the image
        assert down.any()
        assert torch.allclose(images[down][:, 0, 0], torch.tensor(outside))


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_the_host_knows_the_same_rows_as_the_device(data: Path, loader: str) -> None:
    run = run_of(data)
    _, batch, _ = method_and_batch(replace(run, loader=replace(run.loader, loader=loader)))
    assert np.array_equal(batch.host.pool_index, batch.pool_index)
    assert np.array_equal(batch.host.rows, batch.rows)
    assert np.array_equal(batch.host.index, batch.index)


@pytest.mark.parametrize("method", [Softmax(), BackMix(patch=12)], ids=["softmax", "backmix"])
def test_views_in_bf16_are_the_fp32_views_rounded(data: Path, method: Softmax | BackMix) -> None:
    """So a GPU run in bf16 sees the numbers that autocast would have made of the fp32 views."""
    run = tiny_run(data, Path("unused"), method)
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        batch = next(iter(loader.batches(Place(run.seed, 1))))
    exact = views_of(state.method, batch).images
    assert exact.dtype == torch.float32
    made = state.method
    assert isinstance(made, SoftmaxMethod | BackMixMethod)
    narrow = views_of(replace(made, views=torch.bfloat16), batch).images
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, exact.bfloat16())
    assert torch.equal(
        unmixed(batch, run.augment, None, torch.bfloat16),
        unmixed(batch, run.augment, None).bfloat16(),
    )


def test_the_extra_pass_gets_views_of_the_same_type(data: Path) -> None:
    method, batch, model = method_and_batch(run_of(data, cam_source="raw"))
    method = replace(method, views=torch.bfloat16)
    seen: list[torch.dtype] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        views = views_of(method, batch)
        out = method.loss(views, batch, model)
        method.after_backward(batch, views, out, model, torch.ones(()))
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    ("device", "precision", "views"),
    [
        ("cuda", "bf16", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
        ("cpu", "bf16", torch.float32),
    ],
)
def test_only_a_gpu_in_bf16_gets_bf16_views(
    device: str, precision: str, views: torch.dtype
) -> None:
    assert view_dtype(Resolved(precision, device, 1)) == views
