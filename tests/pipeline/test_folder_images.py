"""Files as batches: what a view shows, what is left out, and how it is named."""

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backmix.pipeline.folder_images import (
    AHEAD,
    Reading,
    Shown,
    box_view,
    central_view,
    read_batches,
    read_views,
)
from backmix.pipeline.sources.source import Item
from tests.images import jpeg, photograph


def pillow_view(pixels: np.ndarray, size: int, short: int) -> np.ndarray:
    """Return what torchvision's Resize(short) and CenterCrop(size) make of a Pillow image."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if width <= height:
        new = short, int(short * height / width)
    else:
        new = int(short * width / height), short
    image = image.resize(new, Image.Resampling.BILINEAR)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    ("height", "width"),
    [(300, 451), (333, 256), (240, 240), (40, 57), (500, 120), (33, 32), (32, 32), (7, 9)],
)
@pytest.mark.parametrize(("size", "short"), [(32, 32), (28, 32), (56, 64)])
def test_the_test_view_is_that_of_resize_and_centre_crop(height, width, size, short) -> None:
    pixels = photograph(height + width, height, width)
    view, box = central_view(pixels, size, size / short)
    expected = pillow_view(pixels, size, short)
    assert view.shape == (size, size, 3)
    # Both round once per axis, not at the same places.
    assert np.abs(view.astype(int) - expected).max() <= 2
    assert np.abs(view.astype(int) - expected).mean() < 0.3
    y0, x0, h, w = box.tolist()
    assert h == w <= min(height, width)
    assert abs(2 * y0 + h - height) <= 1 and abs(2 * x0 + w - width) <= 1


def test_an_image_of_the_views_size_is_not_resampled() -> None:
    pixels = photograph(1, 32, 32)
    assert np.array_equal(central_view(pixels, 32, 1.0)[0], pixels)
    assert np.array_equal(box_view(pixels, np.array([0, 0, 32, 32]), 32)[0], pixels)


def test_an_image_too_long_to_be_resized_is_refused() -> None:
    with pytest.raises(ValueError, match="pixels"):
        central_view(np.zeros((1, 60_000, 3), np.uint8), 224, 224 / 256)


def read(items: list[Item], batch: int = 2) -> tuple[list, Reading]:
    reading = Reading()
    batches = read_batches(
        items,
        lambda pixels: central_view(pixels, 8, 1.0),
        reading,
        batch=batch,
        threads=2,
        device="cpu",
    )
    return list(batches), reading


def test_what_cannot_be_read_is_left_out_and_named_with_its_line(tmp_path: Path) -> None:
    whole = jpeg(photograph(3))
    Image.fromarray(photograph(4)).save(tmp_path / "a.png")
    (tmp_path / "cut.jpg").write_bytes(whole[: 2 * len(whole) // 3])
    (tmp_path / "b.jpg").write_bytes(whole)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    names = ["a.png", "cut.jpg", "gone.jpg", "b.jpg", "text.jpg", "folder.jpg"]
    items = [
        Item(name, label, str(tmp_path / name), listed=f"list.txt, line {label + 1}")
        for label, name in enumerate(names)
    ]
    batches, reading = read(items)
    # The batch of text.jpg and folder.jpg is not given out.
    assert [batch.index.tolist() for batch in batches] == [[0], [3]]
    assert [batch.labels.tolist() for batch in batches] == [[0], [3]]
    bad = "\n".join(reading.bad)
    assert len(reading.bad) == 4
    assert f"{tmp_path}/gone.jpg: No such file or directory (list.txt, line 3)" in reading.bad
    assert "cut.jpg: JPEG ends inside" in bad
    assert "folder.jpg: it is not a regular file (list.txt, line 6)" in bad
    assert reading.file_sizes == [(tmp_path / "a.png").stat().st_size, len(whole)]


def test_an_image_for_which_memory_does_not_suffice_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backmix.pipeline import folder_images

    items = [Item(name, -1, str(tmp_path / name)) for name in ("a.jpg", "b.jpg")]
    for number, item in enumerate(items):
        Path(item.path).write_bytes(jpeg(photograph(number, 20, 20)))
    real = folder_images.decode_rgb

    def decode(data: bytes, *more: int) -> np.ndarray:
        if data == Path(items[1].path).read_bytes():
            raise MemoryError
        return real(data, *more)

    monkeypatch.setattr(folder_images, "decode_rgb", decode)
    show = lambda pixels: box_view(pixels, np.array([0, 0, 20, 20], np.int32), 20)  # noqa: E731
    (read,) = read_views(items, show, batch=2, threads=1)
    assert [image.problem for image in read] == [
        "",
        "too little memory to decode it: fewer --threads may do",
    ]


def test_the_next_batch_is_decoded_while_one_is_in_hand(tmp_path: Path) -> None:
    items = []
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(photograph(number)))
        items.append(Item(f"{number}.jpg", number, str(tmp_path / f"{number}.jpg")))
    shown = threading.Semaphore(0)

    def show(pixels: np.ndarray) -> Shown:
        shown.release()
        return central_view(pixels, 8, 1.0)

    reading = Reading()
    batches = read_batches(items, show, reading, batch=2, threads=1, device="cpu")
    first = next(batches)
    for number in range(2 + 2 * AHEAD):  # nobody asks for the batches behind the first
        assert shown.acquire(timeout=30), f"image {number} waits until its batch is asked for"
    rest = list(batches)
    assert [batch.index.tolist() for batch in (first, *rest)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [batch.labels.tolist() for batch in (first, *rest)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert reading.decoding > 0


def test_images_that_wait_for_their_batch_hold_their_view_alone(tmp_path: Path) -> None:
    Image.fromarray(photograph(1, 700, 700)).save(tmp_path / "x.bmp")
    items = [Item("x.bmp", 0, str(tmp_path / "x.bmp"))] * 24
    shown = threading.Semaphore(0)

    def show(pixels: np.ndarray) -> Shown:
        shown.release()
        return central_view(pixels, 8, 1.0)

    tracemalloc.start()
    try:
        batches = read_views(items, show, batch=12, threads=2)
        begun = next(batches)
        for _ in items:
            assert shown.acquire(timeout=30)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    file_size = (tmp_path / "x.bmp").stat().st_size
    assert [image.file_size for image in [*begun, *next(batches)]] == [file_size] * 24
    assert held < 12 * file_size  # the last two may still be at work


def test_a_reading_that_is_left_early_ends_its_threads(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(photograph(1)))
    items = [Item("x.jpg", 0, str(tmp_path / "x.jpg"))] * 40
    before = threading.active_count()
    batches = read_batches(
        items,
        lambda pixels: central_view(pixels, 8, 1.0),
        Reading(),
        batch=2,
        threads=3,
        device="cpu",
    )
    next(batches)
    assert threading.active_count() == before + 3
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_truncated_image_of_every_kind_is_refused(tmp_path: Path) -> None:
    items = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        path = tmp_path / f"x.{kind.lower()}"
        Image.fromarray(photograph(5, 40, 50)).save(path, kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
        items.append(Item(path.name, -1, str(path)))
    batches, reading = read(items)
    assert batches == [] and len(reading.bad) == len(items)


def test_the_digest_tells_names_and_bytes(tmp_path: Path) -> None:
    for name, seed in (("a.jpg", 1), ("b.jpg", 2)):
        (tmp_path / name).write_bytes(jpeg(photograph(seed)))

    def digest(*names: str) -> str:
        return read([Item(name, -1, str(tmp_path / name)) for name in names])[1].digest

    first = digest("a.jpg", "b.jpg")
    assert first == digest("a.jpg", "b.jpg")
    assert len({first, digest("b.jpg", "a.jpg"), digest("a.jpg")}) == 3
    (tmp_path / "c.jpg").write_bytes(jpeg(photograph(2)))
    assert digest("a.jpg", "c.jpg") != first
    (tmp_path / "b.jpg").write_bytes(jpeg(photograph(3)))
    assert digest("a.jpg", "b.jpg") != first


def test_the_batch_size_changes_no_view(tmp_path: Path) -> None:
    items = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        Image.fromarray(photograph(number, 20 + number, 30)).save(path)
        items.append(Item(path.name, -1, str(path)))
    one, all_of_them = read(items, batch=1)[0], read(items, batch=9)[0]
    assert len(one) == 5 and len(all_of_them) == 1
    views = np.concatenate([batch.pool.numpy() for batch in one])
    assert np.array_equal(views, all_of_them[0].pool.numpy())
    for number, view in enumerate(views):
        assert np.array_equal(view, central_view(photograph(number, 20 + number, 30), 8, 1.0)[0])
