"""Strong augmentations: Pillow's bytes, the published loops, and their place among the others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from backmix.pipeline import draws
from backmix.pipeline.batch import Batch, Place
from backmix.train import augmentations, loop
from backmix.train.augmentations import Drawn, Op, operate
from backmix.train.check import check
from backmix.train.methods.views import unmixed
from backmix.train.options import Augment, BackMix, Run, Softmax, Ssod
from backmix.train.prepare import prepare_run
from backmix.train.state import State
from tests.runs import tiny_run, tiny_set, views_of
from tests.train.test_loop import NoWaiting, assert_same_bits_when_stopped, start

SIZES = ((32, 32), (33, 47), (5, 7))


def some_images(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Noise, narrow ranges, few levels, slopes, a plain colour: uint8 [n, H, W, 3]."""
    generator = np.random.default_rng(seed)
    height, width = size
    images = generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[1::6] = images[1::6] // 5 + 60
    images[2::6] = images[2::6] // 64 * 80
    slope = np.linspace(0, 255, height * width).reshape(height, width)
    images[3::6] = slope[..., None] * generator.uniform(0.2, 1, 3)
    images[4::6, ..., 1] = 90
    images[5::6] = generator.integers(0, 256, 3)
    return images


def with_pillow(image: Image.Image, op: Op, v: float, centre: tuple[float, float]) -> Image.Image:
    """One operation as the published code calls Pillow; `centre` is Cutout's, x and y [pixels]."""
    affine = Image.Transform.AFFINE
    match op:
        case Op.IDENTITY:
            return image
        case Op.AUTOCONTRAST:
            return ImageOps.autocontrast(image)
        case Op.EQUALIZE:
            return ImageOps.equalize(image)
        case Op.INVERT:
            return ImageOps.invert(image)
        case Op.POSTERIZE:
            return ImageOps.posterize(image, max(1, int(v)))
        case Op.SOLARIZE:
            return ImageOps.solarize(image, v)  # type: ignore[arg-type]
        case Op.SOLARIZE_ADD:
            added = np.clip(np.array(image).astype(int) + v, 0, 255).astype(np.uint8)
            return ImageOps.solarize(Image.fromarray(added), 128)
        case Op.COLOR:
            return ImageEnhance.Color(image).enhance(v)
        case Op.CONTRAST:
            return ImageEnhance.Contrast(image).enhance(v)
        case Op.BRIGHTNESS:
            return ImageEnhance.Brightness(image).enhance(v)
        case Op.SHARPNESS:
            return ImageEnhance.Sharpness(image).enhance(v)
        case Op.ROTATE:
            return image.rotate(v)
        case Op.SHEAR_X:
            return image.transform(image.size, affine, (1, v, 0, 0, 1, 0))
        case Op.SHEAR_Y:
            return image.transform(image.size, affine, (1, 0, 0, v, 1, 0))
        case Op.TRANSLATE_X:
            return image.transform(image.size, affine, (1, 0, v, 0, 1, 0))
        case Op.TRANSLATE_Y:
            return image.transform(image.size, affine, (1, 0, 0, 0, 1, v))
        case Op.CUTOUT:
            return cut_out(image, v, centre, (125, 123, 114))


def cut_out(
    image: Image.Image, v: float, centre: tuple[float, float], colour: tuple[int, int, int]
) -> Image.Image:
    width, height = image.size
    x0 = int(max(0, centre[0] - v / 2.0))
    y0 = int(max(0, centre[1] - v / 2.0))
    image = image.copy()
    xy = (x0, y0, min(width, x0 + v), min(height, y0 + v))
    ImageDraw.Draw(image).rectangle(xy, colour)
    return image


def values_of(op: Op) -> list[float]:
    """Every value that a recipe can give to an operation, both signs, and some beyond."""
    ranges = {op: (low, high) for op, low, high in augmentations.RANDAUGMENT}
    if op in ranges:
        low, high = ranges[op]
        values = [m / 30 * (high - low) + low for m in range(31)]
    else:
        values = [0.0]
    for other, slope, base in augmentations.CSSR:
        if other == op:
            values += [v * slope / 10 + base for v in range(1, 10)]
    if op in augmentations.WARP:
        values += [-v for v in values] + [45.0, 90.0, -180.0, 270.0]
    if op in (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS):
        values += [0.0, 1.0]
    if op == Op.POSTERIZE:
        values = [float(max(1, int(v))) for v in values] + [8.0]
    return values


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", Op, ids=lambda op: op.name.lower())
def test_an_operation_gives_pillows_bytes(op: Op, size: tuple[int, int]) -> None:
    height, width = size
    values = np.array([v for v in values_of(op) for _ in range(6)])
    images = some_images(len(values), size)
    place = 1 - np.random.default_rng(1).random((len(values), 2))
    drawn = Drawn(np.full(len(values), op), values, place)
    ours = operate(torch.from_numpy(images.copy()), drawn).numpy()
    for image, v, (y, x), result in zip(images, values.tolist(), place, ours, strict=True):
        centre = 1 + x * (width - 1), 1 + y * (height - 1)
        expected = np.array(with_pillow(Image.fromarray(image), op, v, centre))
        assert (result == expected).all(), (op, v, abs(result.astype(int) - expected).max())


# --- the published loops, image by image -------------------------------------------------------

RANDAUGMENT = [
    (Op.AUTOCONTRAST, 0, 1),
    (Op.EQUALIZE, 0, 1),
    (Op.INVERT, 0, 1),
    (Op.ROTATE, 0, 30),
    (Op.POSTERIZE, 0, 4),
    (Op.SOLARIZE, 0, 256),
    (Op.SOLARIZE_ADD, 0, 110),
    (Op.COLOR, 0.1, 1.9),
    (Op.CONTRAST, 0.1, 1.9),
    (Op.BRIGHTNESS, 0.1, 1.9),
    (Op.SHARPNESS, 0.1, 1.9),
    (Op.SHEAR_X, 0, 0.3),
    (Op.SHEAR_Y, 0, 0.3),
    (Op.CUTOUT, 0, 40),
    (Op.TRANSLATE_X, 0, 100),
    (Op.TRANSLATE_Y, 0, 100),
]
SIGNED = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)


def words(epoch: int, sample: int, number: int) -> list[int]:
    return draws.block(3, epoch, np.array([sample]), "strong", number)[0].tolist()


def share(word: int) -> float:
    return (word >> 8) / 2**24


def randaugment_by_image(
    image: np.ndarray, epoch: int, sample: int, n: int, m: int, moves: bool
) -> np.ndarray:
    pool = RANDAUGMENT
    if not moves:
        left_out = (Op.ROTATE, Op.TRANSLATE_X, Op.TRANSLATE_Y)
        pool = [line for line in RANDAUGMENT if line[0] not in left_out]
    shown = Image.fromarray(image)
    height, width = image.shape[:2]
    for layer in range(n):
        which, sign, y, x = words(epoch, sample, layer)
        op, low, high = pool[which * len(pool) >> 32]
        value = m / 30 * (high - low) + low
        if op in SIGNED and sign >= 2**31:
            value = -value
        # As numpy.random.uniform(side): between `side` and 1.
        centre = width + (1 - width) * share(x), height + (1 - height) * share(y)
        shown = with_pillow(shown, op, value, centre)
    return np.array(shown)


def cssr_by_image(image: np.ndarray, epoch: int, sample: int) -> np.ndarray:
    shown = Image.fromarray(image)
    height, width = image.shape[:2]
    for layer in range(2):
        which, sign, strength, applied = words(epoch, sample, layer)
        if applied < 2**31:
            continue
        v = 1 + (strength * 9 >> 32)
        side = -1 if sign >= 2**31 else 1
        op, value = [
            (Op.BRIGHTNESS, v * 1.8 / 10 + 0.1),
            (Op.COLOR, v * 0.9 / 10 + 0.05),
            (Op.EQUALIZE, 0),
            (Op.IDENTITY, 0),
            (Op.POSTERIZE, int(v * 4 / 10) + 4),
            (Op.ROTATE, side * int(v * 15 / 10)),
            (Op.SHARPNESS, v * 1.8 / 10 + 0.05),
            (Op.SHEAR_X, side * v * 0.3 / 10),
            (Op.SHEAR_Y, side * v * 0.3 / 10),
            (Op.SOLARIZE, 256 - int(v * 256 / 10)),
        ][which * 10 >> 32]
        shown = with_pillow(shown, op, value, (0, 0))
    y, x, _, _ = words(epoch, sample, 2)
    half = int(min(height, width) * 0.5)
    centre = width * share(x), height * share(y)
    return np.array(cut_out(shown, half, centre, (127, 127, 127)))


@pytest.mark.parametrize(("n", "m", "moves"), [(1, 6, True), (2, 9, True), (3, 18, False)])
def test_randaugment_is_the_published_loop(n: int, m: int, moves: bool) -> None:
    images, index = some_images(200, (32, 32)), np.arange(900, 1100)
    given = torch.from_numpy(images.copy())
    ours = augmentations.randaugment(
        given, 3, 2, index, operations=n, magnitude=m, moves=moves
    ).numpy()
    for image, sample, result in zip(images, index.tolist(), ours, strict=True):
        assert (result == randaugment_by_image(image, 2, sample, n, m, moves)).all()
    assert np.shares_memory(given.numpy(), ours)


@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_the_cssr_pool_is_the_published_loop(size: tuple[int, int]) -> None:
    images, index = some_images(200, size), np.arange(900, 1100)
    ours = augmentations.cssr(torch.from_numpy(images.copy()), 3, 2, index).numpy()
    for image, sample, result in zip(images, index.tolist(), ours, strict=True):
        assert (result == cssr_by_image(image, 2, sample)).all()


def test_cutout_of_side_16_covers_17_rows_and_columns_away_from_the_far_border() -> None:
    """The published rectangle includes its last row; worked by hand for a view of 32 px."""
    side, places = np.full(4, 16.0), np.array([[16.0, 16.0], [0, 0], [31.9, 3], [20.5, 8.2]])
    boxes = augmentations.cutout_boxes(side, places, 32, 32)
    assert boxes.tolist() == [[8, 8, 24, 24], [0, 0, 16, 16], [23, 0, 32, 16], [12, 0, 28, 16]]


def test_every_operation_is_drawn_as_often_as_its_rule_says() -> None:
    index = np.arange(40_000)
    drawn = augmentations.draw_randaugment(1, 0, index, 0, 15, True)
    counts = [(drawn.op == op).mean() for op, _, _ in RANDAUGMENT]
    np.testing.assert_allclose(counts, 1 / 16, atol=0.006)
    for op in SIGNED:
        assert (drawn.value[drawn.op == op] < 0).mean() == pytest.approx(0.5, abs=0.05)
    assert (drawn.value[~np.isin(drawn.op, SIGNED)] >= 0).all()
    drawn = augmentations.draw_randaugment(1, 0, index, 1, 15, False)
    assert not np.isin(drawn.op, (Op.ROTATE, Op.TRANSLATE_X, Op.TRANSLATE_Y)).any()
    drawn = augmentations.draw_cssr(1, 0, index, 0)
    # Half are not applied; of the other half a tenth each.
    assert (drawn.op == Op.IDENTITY).mean() == pytest.approx(0.55, abs=0.01)
    values = np.unique(drawn.value[drawn.op == Op.COLOR])
    np.testing.assert_allclose(values, 0.09 * np.arange(1, 10) + 0.05)
    scale = augmentations.cssr_contrast(1, 0, index)
    assert 0.1 <= scale.min() < 0.101 and 1.999 < scale.max() < 2
    assert scale.mean() == pytest.approx(1.05, abs=0.01)


# --- among the other steps of a view -----------------------------------------------------------

POOLS = {
    "randaugment": Augment(
        pad=3, pool="randaugment", operations=2, magnitude=7, mean=(120, 110, 100), std=(60, 50, 40)
    ),
    "cssr": Augment(
        pad=4, border="reflect", pool="cssr", mean=(127.5, 127.5, 127.5), std=(63.75, 63.75, 63.75)
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def state_and_batch(run: Run, epoch: int = 1) -> tuple[State, Batch]:
    _, state, loader = prepare_run(run, "test", [])
    with loader:
        return state, next(iter(loader.batches(Place(run.seed, epoch))))


def cropped(image: np.ndarray, augment: Augment, epoch: int, sample: int) -> np.ndarray:
    """Pad, crop and flip an image, float64 [H, W, 3]."""
    height, width = image.shape[:2]
    pad = augment.pad
    mode = "reflect" if augment.border == "reflect" else "constant"
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode)
    which = np.array([sample])
    y, x = draws.below(draws.block(3, epoch, which, "shift")[0, :2], 2 * pad + 1).tolist()
    flip = int(draws.block(3, epoch, which, "flip")[0, 0]) >= 2**31
    if flip:  # the shift is that of the flipped view
        padded = padded[:, ::-1]
    return padded[y : y + height, x : x + width]


def by_image(image: np.ndarray, name: str, sample: int) -> np.ndarray:
    """What a view of the first epoch shows, float64 [H, W, 3], in the order of the recipes.

    RandAugment, crop, flip, normalise; or crop, flip, CSSR's pool, normalise, contrast.
    """
    augment, scale = POOLS[name], 1.0
    if name == "randaugment":
        shown = cropped(randaugment_by_image(image, 1, sample, 2, 7, True), augment, 1, sample)
    else:
        moved = np.ascontiguousarray(cropped(image, augment, 1, sample))
        shown = cssr_by_image(moved, 1, sample)
        scale = 0.1 + 1.9 * share(words(1, sample, 2)[2])
    return (shown - np.array(augment.mean)) / np.array(augment.std) * scale


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_pool_stands_where_its_recipe_has_it(data: Path, name: str, loader: str) -> None:
    run = replace(tiny_run(data, Path("unused"), Softmax(), seed=3), augment=POOLS[name])
    run = replace(run, loader=replace(run.loader, loader=loader))
    state, batch = state_and_batch(run)
    views = views_of(state.method, batch).images
    assert views.is_contiguous(memory_format=torch.channels_last)
    raw = batch.pool[batch.rows].numpy()
    for image, sample, view in zip(raw, batch.host.index.tolist(), views, strict=True):
        expected = by_image(image, name, sample)
        np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POOLS)
def test_the_pool_meets_the_mix_and_the_bank_the_raw_view(data: Path, name: str) -> None:
    augment = POOLS[name]
    run = tiny_run(data, Path("unused"), BackMix(patch=12, rate=1.0), seed=3)
    state, batch = state_and_batch(replace(run, augment=augment))
    still = replace(augment, pool="none", flip=False, pad=0)
    other, _ = state_and_batch(replace(run, augment=still))
    shown = views_of(state.method, batch), views_of(other.method, batch)
    views, mixes = (of.images for of in shown)
    mean, std = (torch.tensor(t)[:, None, None] for t in (augment.mean, augment.std))
    pixels = (mixes * std + mean).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (pixels != batch.pool[batch.rows].numpy()).any((1, 2, 3)).all()
    for mix, sample, view in zip(pixels, batch.host.index.tolist(), views, strict=True):
        expected = by_image(mix, name, sample)
        np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-5)

    weights = {name: value.clone() for name, value in state.model.state_dict().items()}
    for one, of in zip((state, other), shown, strict=True):
        out = one.method.loss(of, batch, one.model)
        one.model.load_state_dict(weights)  # less what the pass did to the BatchNorm statistics
        one.method.after_backward(batch, of, out, one.model, torch.ones(()))
    banks = [one.method.tensors()["bank"] for one in (state, other)]
    assert (banks[0] != 0.5).any() and torch.equal(*banks)


@pytest.mark.parametrize("name", POOLS)
def test_a_view_depends_on_seed_epoch_and_sample_alone(data: Path, name: str) -> None:
    """Another batch size, another order and another loader show a sample the same."""
    run = replace(tiny_run(data, Path("unused"), Softmax(), seed=3), augment=POOLS[name])
    shown: list[dict[int, bytes]] = []
    for size, loader in ((16, "turbo"), (5, "turbo"), (16, "resident")):
        _, state, opened = prepare_run(
            replace(run, loader=replace(run.loader, batch=size, group=1, loader=loader)), "test", []
        )
        with opened:
            views = {
                sample: view.numpy().tobytes()
                for batch in opened.batches(Place(3, 2))
                for sample, view in zip(
                    batch.index.tolist(), views_of(state.method, batch).images, strict=True
                )
            }
        shown.append(views)
    assert len(shown[0]) == 40 and shown[0] == shown[1] == shown[2]
    state, batch = state_and_batch(run, epoch=2)
    assert (
        views_of(state.method, batch).images[0].numpy().tobytes() == shown[0][int(batch.index[0])]
    )
    _, later = state_and_batch(run, epoch=3)
    after = views_of(state.method, later).images[0].numpy().tobytes()
    assert after != shown[0][int(later.index[0])]


METHODS = {
    "softmax": Softmax(),
    "raw": BackMix(patch=12, rate=0.5),
    "raw+loss": BackMix(patch=12, cam_source="raw+loss"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", POOLS)
def test_a_stopped_run_with_a_pool_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    run = tiny_run(data, tmp_path / "whole", METHODS[method], seed=3)
    schedule = replace(run.optim, schedule="restarts", cycles=2, warmup=0.3)
    run = replace(run, augment=POOLS[name], optim=schedule, model="classifier32-quarter")
    assert start(run) == 0
    assert_same_bits_when_stopped(run, tmp_path / "stopped", monkeypatch, (1, 3, 99))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", POOLS)
def test_a_step_with_a_pool_does_not_wait_for_the_device(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    monkeypatch.setattr("backmix.kernels.mix_background._reading_is_free", lambda tensor: False)
    run = replace(tiny_run(data, Path("unused"), METHODS[method]), augment=POOLS[name])
    _, state, opened = prepare_run(run, "test", [])

    def waits(self: torch.Tensor, *_: object) -> None:
        raise AssertionError("a copy to the host waits for the device")

    with opened:
        batches = list(opened.batches(Place(0)))
        for copy in ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, copy, waits)
        with NoWaiting():
            for batch in batches:
                loop.take_step(state, batch, run, 0.1, torch.autocast("cpu", enabled=False))


def test_bf16_views_are_rounded_once_more(data: Path) -> None:
    """CSSR's factor meets the normalised view; in bf16 the result is within two roundings."""
    run = replace(tiny_run(data, Path("unused"), Softmax()), augment=POOLS["cssr"])
    state, batch = state_and_batch(run)
    exact = views_of(state.method, batch).images
    state.method.views = torch.bfloat16  # type: ignore[attr-defined]
    rounded = views_of(state.method, batch).images
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


def test_evaluation_and_the_raw_view_know_no_pool(data: Path) -> None:
    run = replace(tiny_run(data, Path("unused"), Softmax()), augment=POOLS["cssr"])
    _, batch = state_and_batch(run)
    plain = replace(run.augment, pool="none")
    assert torch.equal(unmixed(batch, run.augment, None), unmixed(batch, plain, None))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"augment": Augment(operations=0)}, "--augment.operations must be 1 .. 16, got 0"),
        ({"augment": Augment(magnitude=31)}, "--augment.magnitude must be 0 .. 30, got 31"),
        ({"method": BackMix(cam_source="mix")}, "--method.cam-source mix takes activation maps"),
        ({"method": BackMix(host=Ssod())}, "--method.host.pasted needs to know where"),
    ],
)
@pytest.mark.parametrize("name", POOLS)
def test_what_a_pool_cannot_be_joined_with_is_refused(
    data: Path, name: str, change: dict[str, object], said: str
) -> None:
    run = replace(tiny_run(data, Path("unused")), augment=POOLS[name])
    check(replace(run, method=BackMix(host=Ssod(pasted=False))))
    with pytest.raises(ValueError, match=said):
        check(replace(run, **change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("op", Op, ids=lambda op: op.name.lower())
def test_a_gpu_gives_the_same_bytes(op: Op) -> None:
    values = np.array([v for v in values_of(op) for _ in range(6)])
    images = torch.from_numpy(some_images(len(values), (33, 47)))
    place = 1 - np.random.default_rng(1).random((len(values), 2))
    drawn = Drawn(np.full(len(values), op), values, place)
    there = operate(images.cuda(), drawn)
    assert torch.equal(there.cpu(), operate(images.clone(), drawn))
