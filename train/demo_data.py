"""The demo's images: objects of several parts on backgrounds that go with their class.

Made on the spot from scikit-learn's handwritten digits, its two photographs and four procedural
textures, so that nothing is downloaded and the true foreground of every image is known. The
images are composed set by set as whole arrays; nothing here trains or measures.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE = 32
"""Side of an image [pixels]."""
CELL = 8
"""Side of one handwritten digit; an object is a block of 2 x 2 of them [pixels]."""
PLATE = 2 * CELL + 2
"""Side of an object: the block and a rim of one pixel all round [pixels]."""
KNOWN = 6
"""Digits 0 .. KNOWN - 1 are the known classes, the others the unknown ones."""
BACKGROUNDS = ("temple", "flower", "stripes", "checkers", "clouds", "dots")
"""Kinds of background, one for each known class."""
CORRELATION = 0.75
"""Share of the known images that take their class's kind of background for certain; the others
take any of the six, their own one too, so that it is 0.75 + 0.25 / 6 = 79 % in all."""
SIZES = {"train": 2400, "test": 1200, "unknown": 1200, "conflict": 600, "calibration": 600}
"""Images of each set, in the order in which they are drawn."""

_DIGIT_SPLIT = 0.6
_NOISE = 6.0
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Scenes:
    """n images and the truth about them."""

    images: np.ndarray
    """uint8 [n, SIDE, SIDE, 3]."""
    foreground: np.ndarray
    """bool [n, SIDE, SIDE]: the object's plate."""
    digits: np.ndarray
    """int64 [n]: what the object shows, 0 .. 9."""
    backgrounds: np.ndarray
    """int64 [n]: position in `BACKGROUNDS`."""
    parts: np.ndarray
    """int64 [n, 4]: the handwritten samples on the plate, as rows of scikit-learn's digits."""


def digit_pools() -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of scikit-learn's digits for training objects, and those for test objects.

    The split is the same for every seed: a handwriting seen in training is never tested on.
    """
    rows = np.random.default_rng(0).permutation(len(_handwriting()[0]))
    cut = int(_DIGIT_SPLIT * len(rows))
    return rows[:cut], rows[cut:]


def draw_sets(seed: int, correlation: float = CORRELATION) -> tuple[dict[str, Scenes], np.ndarray]:
    """Draw the sets of one seed.

    `train`, `test` and `calibration` hold known classes, mostly on their class's background;
    `unknown` holds the other digits and `conflict` known ones, both with every background equally
    likely.

    Returns (sets by name, kind of background of each known class int64 [KNOWN]).
    """
    rng = np.random.default_rng(1000 + seed)
    own = rng.permutation(KNOWN)
    train_pool, test_pool = digit_pools()
    sets = {}
    for name, count in SIZES.items():
        first, last = (KNOWN, 10) if name == "unknown" else (0, KNOWN)
        digits = np.arange(first, last).repeat(count // (last - first))
        backgrounds = rng.integers(len(BACKGROUNDS), size=count)
        if name in ("train", "test", "calibration"):
            typical = rng.random(count) < correlation
            backgrounds = np.where(typical, own[digits], backgrounds)
        pool = train_pool if name == "train" else test_pool
        sets[name] = compose(rng, digits, backgrounds, pool)
    return sets, own


def compose(
    rng: np.random.Generator, digits: np.ndarray, backgrounds: np.ndarray, pool: np.ndarray
) -> Scenes:
    """Put one object on each background.

    An object is a plate with four different samples of its digit. Its two colours are drawn
    per image (dark and light, either way round), so colour says nothing about the class, and
    its place is uniform with the whole plate inside the image.

    Args:
        rng: source of everything random.
        digits: what each object shows, int64 [n].
        backgrounds: position in `BACKGROUNDS` of each image, int64 [n].
        pool: rows of scikit-learn's digits that may be used, int64.
    """
    count = len(digits)
    images = np.empty((count, SIDE, SIDE, 3), np.float32)
    for kind in range(len(BACKGROUNDS)):
        member = np.flatnonzero(backgrounds == kind)
        images[member] = _background(rng, kind, len(member))

    written, shown = _handwriting()
    parts = np.empty((count, 4), np.int64)
    for digit in np.unique(digits):
        member = np.flatnonzero(digits == digit)
        parts[member] = rng.choice(pool[shown[pool] == digit], (len(member), 4))
    ink = np.zeros((count, PLATE, PLATE, 1), np.float32)
    ink[:, 1:-1, 1:-1, 0] = (
        written[parts]  # [n, 4, CELL, CELL]
        .reshape(count, 2, 2, CELL, CELL)
        .swapaxes(2, 3)
        .reshape(count, 2 * CELL, 2 * CELL)
    )
    dark = rng.uniform(0, 110, (count, 1, 1, 3)).astype(np.float32)
    light = dark + rng.uniform(90, 145, (count, 1, 1, 3)).astype(np.float32)
    ink = np.where(rng.random((count, 1, 1, 1)) < 0.5, ink, 1 - ink)

    corner = rng.integers(SIDE - PLATE + 1, size=(count, 2))
    y = (corner[:, :1] + np.arange(PLATE))[:, :, None]
    x = (corner[:, 1:] + np.arange(PLATE))[:, None, :]
    row = np.arange(count)[:, None, None]
    images[row, y, x] = dark + (light - dark) * ink
    foreground = np.zeros((count, SIDE, SIDE), bool)
    foreground[row, y, x] = True

    images += rng.normal(0, _NOISE, images.shape).astype(np.float32)
    pixels = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    return Scenes(pixels, foreground, digits, backgrounds, parts)


def write_demo_data(folder: Path, seed: int, correlation: float = CORRELATION) -> None:
    """Write the sets of one seed as class folders of JPEGs, all or nothing.

    `correlation` is the share of known images that take their class's kind of background for sure.

    `folder` gets `train`, `test`, `unknown`, `conflict` and `calibration`, each with
    `digitD/NUMBER-BACKGROUND.jpg`, and `masks` with the training images' true foreground under
    the same names as PNG: 255 on the object, 0 elsewhere. The same seed gives the same bytes.

    Raises:
        FileExistsError: `folder` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        sets, _ = draw_sets(seed, correlation)
        for name, scenes in sets.items():
            _write_images(part / name, scenes)
        _write_masks(part / "masks", sets["train"])
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def source_names(scenes: Scenes) -> list[str]:
    """Return each image's name in its set, without the suffix: `digit3/0007-clouds`.

    Numbers count within the class. The background is part of the name so that whoever looks into
    the folder, or at a wrong answer, sees which one it was.
    """
    number = np.arange(len(scenes.digits)) - np.searchsorted(scenes.digits, scenes.digits)
    return [
        f"digit{digit}/{position:04d}-{BACKGROUNDS[kind]}"
        for digit, position, kind in zip(scenes.digits, number, scenes.backgrounds, strict=True)
    ]


def background_of(name: str) -> int:
    """Return the position in `BACKGROUNDS` that a source name tells, with suffix or without."""
    return BACKGROUNDS.index(Path(name).stem.partition("-")[2])


def _write_images(folder: Path, scenes: Scenes) -> None:
    import simplejpeg

    for digit in np.unique(scenes.digits):
        (folder / f"digit{digit}").mkdir(parents=True)
    for name, image in zip(source_names(scenes), scenes.images, strict=True):
        # The strokes are one or two pixels wide: halved colour resolution would smear them.
        data = simplejpeg.encode_jpeg(image, quality=_JPEG_QUALITY, colorsubsampling="444")
        (folder / f"{name}.jpg").write_bytes(data)


def _write_masks(folder: Path, scenes: Scenes) -> None:
    from PIL import Image

    for digit in np.unique(scenes.digits):
        (folder / f"digit{digit}").mkdir(parents=True)
    for name, foreground in zip(source_names(scenes), scenes.foreground, strict=True):
        Image.fromarray(foreground.astype(np.uint8) * 255).save(folder / f"{name}.png")


def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in 0 .. 1, [1797, CELL, CELL], and what they show, [1797]."""
    from sklearn.datasets import load_digits

    ink, shown = load_digits(return_X_y=True)
    return ink.reshape(-1, CELL, CELL) / 16, np.asarray(shown)


def _background(rng: np.random.Generator, kind: int, count: int) -> np.ndarray:
    """Return `count` backgrounds of one kind, float32 [count, SIDE, SIDE, 3] in 0 .. 255."""
    match BACKGROUNDS[kind]:
        case "temple":
            return _photo_windows(rng, 0, count)
        case "flower":
            return _photo_windows(rng, 1, count)
        case "stripes":
            pattern = _stripes(rng, count)
        case "checkers":
            pattern = _checkers(rng, count)
        case "clouds":
            pattern = _clouds(rng, count)
        case _:
            pattern = _dots(rng, count)
    one, other = _two_colours(rng, count)
    return one + (other - one) * pattern[..., None]


def _photo_windows(rng: np.random.Generator, photo: int, count: int) -> np.ndarray:
    """Cut square windows of two to four image sides, half of them mirrored, and shrink them.

    The shrunk pixel is the mean of the photograph over its square. Bilinear interpolation of a
    summed-area table gives that mean exactly, at fractional borders too, for all windows at once.
    """
    from sklearn.datasets import load_sample_images

    pixels = load_sample_images().images[photo]
    height, width, _ = pixels.shape
    table = np.zeros((height + 1, width + 1, 3))
    table[1:, 1:] = pixels.cumsum(0, dtype=np.float64).cumsum(1)

    side = rng.integers(2 * SIDE, 4 * SIDE, count)
    border = np.arange(SIDE + 1) / SIDE * side[:, None]
    y = rng.integers(height - side + 1)[:, None] + border  # [count, SIDE + 1]
    x = rng.integers(width - side + 1)[:, None] + border
    y_low, x_low = np.floor(y).astype(int), np.floor(x).astype(int)
    # The last border lies on the table's last line: its upper neighbour has weight 0.
    y_high, x_high = np.minimum(y_low + 1, height), np.minimum(x_low + 1, width)
    y_share, x_share = (y - y_low)[:, :, None, None], (x - x_low)[:, None, :, None]
    row, column = (slice(None), slice(None), None), (slice(None), None)
    upper = table[y_low[row], x_low[column]] * (1 - x_share)
    upper += table[y_low[row], x_high[column]] * x_share
    lower = table[y_high[row], x_low[column]] * (1 - x_share)
    lower += table[y_high[row], x_high[column]] * x_share
    total = upper * (1 - y_share) + lower * y_share
    windows = np.diff(np.diff(total, axis=1), axis=2) / (side / SIDE)[:, None, None, None] ** 2
    mirrored = rng.random(count) < 0.5
    windows[mirrored] = windows[mirrored, :, ::-1]
    return windows.astype(np.float32)


def _stripes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sinusoids of any direction with a period of 4 to 7 pixels, [count, SIDE, SIDE] in 0 .. 1."""
    angle, period, phase = rng.uniform([0, 4, 0], [np.pi, 7, 2 * np.pi], (count, 3)).T
    y, x = np.mgrid[:SIDE, :SIDE]
    across = np.multiply.outer(np.cos(angle), x) + np.multiply.outer(np.sin(angle), y)
    turn = 2 * np.pi * across / period[:, None, None] + phase[:, None, None]
    return (0.5 + 0.5 * np.sin(turn)).astype(np.float32)


def _checkers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Checkerboards with fields of 3 to 5 pixels, [count, SIDE, SIDE], 0 or 1."""
    field = rng.integers(3, 6, (count, 1))
    # A whole period of two fields is drawn from: both colours are equally likely in the corner.
    y, x = ((np.arange(SIDE) + rng.integers(2 * field)) // field for _ in range(2))
    return ((y[:, :, None] + x[:, None, :]) % 2).astype(np.float32)


def _clouds(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise with amplitude 1/frequency^1.6, stretched to 0 .. 1, [count, SIDE, SIDE]."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = np.inf  # no constant part: the stretch would remove it anyway
    noise = np.fft.rfft2(rng.standard_normal((count, SIDE, SIDE)))
    clouds = np.fft.irfft2(noise * frequency**-1.6, s=(SIDE, SIDE))
    low, high = (bound(clouds, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
    return ((clouds - low) / (high - low)).astype(np.float32)


def _dots(rng: np.random.Generator, count: int) -> np.ndarray:
    """Grids of dots, pitch 5 to 7 pixels, radius 0.3 pitch, [count, SIDE, SIDE], 0 or 1."""
    pitch = rng.integers(5, 8, (count, 1))
    y, x = ((np.arange(SIDE) + rng.uniform(0, pitch)) % pitch - pitch / 2 for _ in range(2))
    apart = y[:, :, None] ** 2 + x[:, None, :] ** 2
    return (apart <= (0.3 * pitch[:, :, None]) ** 2).astype(np.float32)


def _two_colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs of colours that differ by at least 150 in the sum of the channels' distances.

    Returns two float32 [count, 1, 1, 3] in 20 .. 235.
    """
    pairs = np.empty((2, count, 3))
    close = np.arange(count)
    while len(close):
        pairs[:, close] = rng.uniform(20, 235, (2, len(close), 3))
        close = close[np.abs(pairs[0, close] - pairs[1, close]).sum(1) < 150]
    one, other = pairs.astype(np.float32)[:, :, None, None, :]
    return one, other
