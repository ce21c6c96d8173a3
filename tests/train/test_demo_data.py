import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from backmix.train import demo_data
from backmix.train.demo_data import (
    BACKGROUNDS,
    KNOWN,
    PLATE,
    SIDE,
    Scenes,
    compose,
    digit_pools,
    draw_sets,
    source_names,
    write_demo_data,
)


@pytest.fixture(scope="module")
def drawn() -> tuple[dict[str, Scenes], np.ndarray]:
    return draw_sets(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(folder, 0)
    return folder


def digest(folder: Path) -> str:
    """Return one hash over all names and bytes below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "again", 0)
    assert digest(tmp_path / "again") == digest(written)


def test_another_seed_gives_other_images_and_another_background_map(
    drawn: tuple[dict[str, Scenes], np.ndarray],
) -> None:
    sets, own = drawn
    other, other_own = draw_sets(1)
    assert not np.array_equal(own, other_own)
    equal = (sets["train"].images == other["train"].images).all((1, 2, 3))
    assert not equal.any()


def test_the_sets_have_their_sizes_and_classes(written: Path) -> None:
    counts = {
        folder.relative_to(written).as_posix(): len(list(folder.iterdir()))
        for folder in written.glob("*/*")
    }
    expected = {f"{name}/digit{digit}": 400 for name in ("train", "masks") for digit in range(6)}
    expected |= {f"test/digit{digit}": 200 for digit in range(6)}
    expected |= {f"unknown/digit{digit}": 300 for digit in (6, 7, 8, 9)}
    expected |= {
        f"{name}/digit{digit}": 100 for name in ("conflict", "calibration") for digit in range(6)
    }
    assert counts == expected


def test_files_are_full_colour_jpegs_of_32_pixels(written: Path) -> None:
    for path in [next(folder.iterdir()) for folder in written.glob("train/*")]:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
            # Sampling factors 1 x 1 of all three components: chroma is not subsampled.
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_jpeg_moves_pixels_by_less_than_the_noise_does(
    drawn: tuple[dict[str, Scenes], np.ndarray], written: Path
) -> None:
    scenes = drawn[0]["train"]
    errors = []
    for row, name in list(enumerate(source_names(scenes)))[::40]:
        with Image.open(written / "train" / f"{name}.jpg") as image:
            errors.append(np.asarray(image, np.float64) - scenes.images[row])
    assert np.sqrt(np.mean(np.square(errors))) < 6.0


def test_masks_are_the_plates_exactly(
    drawn: tuple[dict[str, Scenes], np.ndarray], written: Path
) -> None:
    scenes = drawn[0]["train"]
    for row, name in list(enumerate(source_names(scenes)))[::40]:
        mask = np.asarray(Image.open(written / "masks" / f"{name}.png"))
        assert np.array_equal(mask, np.where(scenes.foreground[row], 255, 0))
        y, x = np.nonzero(mask)
        assert (np.ptp(y) + 1, np.ptp(x) + 1, len(y)) == (PLATE, PLATE, PLATE * PLATE)


def test_every_training_image_has_its_mask(written: Path) -> None:
    images = {
        path.relative_to(written / "train").with_suffix("") for path in written.glob("train/*/*")
    }
    masks = {
        path.relative_to(written / "masks").with_suffix("") for path in written.glob("masks/*/*")
    }
    assert images == masks


def test_plates_reach_every_border_and_stay_inside(
    drawn: tuple[dict[str, Scenes], np.ndarray],
) -> None:
    foreground = drawn[0]["train"].foreground
    assert (foreground.sum((1, 2)) == PLATE * PLATE).all()
    covered = foreground.any(0)
    assert covered.all()


@pytest.mark.parametrize("seed", range(4))
def test_79_percent_of_known_images_lie_on_their_class_background(seed: int) -> None:
    sets, own = draw_sets(seed)
    assert sorted(own) == list(range(KNOWN))
    share = 0.75 + 0.25 / 6
    for name in ("train", "test"):
        typical = sets[name].backgrounds == own[sets[name].digits]
        deviation = np.sqrt(share * (1 - share) / len(typical))
        assert abs(typical.mean() - share) < 4 * deviation


@pytest.mark.parametrize("name", ["unknown", "conflict"])
def test_unknown_and_conflict_images_lie_on_any_background(
    drawn: tuple[dict[str, Scenes], np.ndarray], name: str
) -> None:
    scenes = drawn[0][name]
    counts = np.bincount(scenes.backgrounds, minlength=6)
    expected = len(scenes.digits) / 6
    # Chi-squared with 5 degrees of freedom: 20.5 is passed once in a thousand draws.
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_no_handwriting_is_both_trained_and_tested_on(
    drawn: tuple[dict[str, Scenes], np.ndarray],
) -> None:
    train_pool, test_pool = digit_pools()
    assert sorted([*train_pool, *test_pool]) == list(range(1797))
    assert len(train_pool) == int(0.6 * 1797)
    sets, _ = drawn
    trained = set(sets["train"].parts.flat)
    for name in ("test", "unknown", "conflict"):
        assert trained.isdisjoint(sets[name].parts.flat)


def test_an_object_shows_four_samples_of_its_digit(
    drawn: tuple[dict[str, Scenes], np.ndarray],
) -> None:
    _, target = load_digits(return_X_y=True)
    for scenes in drawn[0].values():
        assert np.array_equal(target[scenes.parts], scenes.digits[:, None].repeat(4, 1))


def test_the_plate_shows_its_digits_in_reading_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "_NOISE", 0.0)
    _, pool = digit_pools()
    scenes = compose(np.random.default_rng(5), np.array([2, 7]), np.array([3, 0]), pool)
    digits = load_digits(return_X_y=True)[0].reshape(-1, 8, 8)
    for image, foreground, parts in zip(
        scenes.images, scenes.foreground, scenes.parts, strict=True
    ):
        plate = image[foreground].reshape(PLATE, PLATE, 3).astype(float)
        rim = plate[0, 0]
        block = np.block(
            [[digits[parts[0]], digits[parts[1]]], [digits[parts[2]], digits[parts[3]]]]
        )
        strongest = plate[1:-1, 1:-1][np.unravel_index(block.argmax(), block.shape)]
        # Between the two colours every pixel is a mixture by its ink, 0 .. 16.
        mixture = rim + block[..., None] / 16 * (strongest - rim)
        assert np.abs(plate[1:-1, 1:-1] - mixture).max() <= 1.01  # three roundings
        assert (plate[[0, -1]] == rim).all() and (plate[:, [0, -1]] == rim).all()


def test_photographs_are_shrunk_by_the_mean_of_the_square_under_a_pixel() -> None:
    class Windows:
        """A source of randomness that says where the windows lie."""

        def integers(self, low: int | np.ndarray, high: int | None = None, size: int = 0):
            if high is not None:
                return np.array([64, 80])  # sides: 2 and 2.5 pixels for one
            return np.array([5, 0])  # corners, y and x

        def random(self, size: int):
            return np.array([0.9, 0.1])  # the second one is mirrored

    windows = demo_data._photo_windows(Windows(), 0, 2)  # type: ignore[arg-type]
    photo = load_sample_images().images[0].astype(float)
    exact = photo[5:69, 5:69].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(windows[0] - exact).max() < 1e-3
    # Doubled five-fold, half a pixel becomes a whole one: 80 pixels become 160, and 160 / 32 = 5.
    doubled = photo[:80, :80].repeat(2, 0).repeat(2, 1)
    exact = doubled.reshape(32, 5, 32, 5, 3).mean((1, 3))[:, ::-1]
    assert np.abs(windows[1] - exact).max() < 1e-3


def test_textures_use_two_colours_that_can_be_told_apart() -> None:
    one, other = demo_data._two_colours(np.random.default_rng(3), 500)
    assert np.abs(one - other).sum((1, 2, 3)).min() >= 150
    assert min(one.min(), other.min()) >= 20 and max(one.max(), other.max()) <= 235


def test_checkers_change_colour_every_field() -> None:
    boards = demo_data._checkers(np.random.default_rng(0), 50)
    for board in boards:
        line = board[0]
        runs = np.diff(np.flatnonzero(np.diff(line, prepend=line[0] + 1, append=line[-1] + 1)))
        assert set(runs[1:-1]) in ({3}, {4}, {5})
        assert np.array_equal(board, (board[:1] != (board[:, :1] != board[0, 0])).astype(float))


def test_clouds_fall_off_with_frequency_to_the_power_of_1_6() -> None:
    clouds = demo_data._clouds(np.random.default_rng(0), 400)
    assert clouds.min() == 0 and clouds.max() == 1
    # The stretch to 0 .. 1 scales every image by itself: compare within images.
    amplitude = np.abs(np.fft.fft2(clouds))
    ratio = amplitude[:, 0, 2] ** 2 / (amplitude[:, 0, 2] ** 2 + amplitude[:, 0, 8] ** 2)
    # |z1|^2 / (|z1|^2 + |z2|^2) of two complex normals exceeds s1 / (s1 + s2) half of the time.
    threshold = 1 / (1 + (2 / 8) ** 3.2)
    assert abs((ratio > threshold).mean() - 0.5) < 0.1


def test_dots_cover_their_share_of_the_image() -> None:
    dots = demo_data._dots(np.random.default_rng(0), 2000)
    assert abs(dots.mean() - np.pi * 0.3**2) < 0.01


def test_all_backgrounds_of_a_kind_differ() -> None:
    _, pool = digit_pools()
    for kind in range(len(BACKGROUNDS)):
        scenes = compose(np.random.default_rng(kind), np.zeros(40, int), np.full(40, kind), pool)
        flat = scenes.images.reshape(40, SIDE * SIDE * 3)
        assert len(np.unique(flat, axis=0)) == 40


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        write_demo_data(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, scenes: Scenes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(demo_data, "_write_masks", full)
    with pytest.raises(OSError, match="no space left"):
        write_demo_data(tmp_path / "data", 0)
    assert list(tmp_path.iterdir()) == []
