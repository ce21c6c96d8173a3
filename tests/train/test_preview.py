import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backmix.pipeline.beton import RAW, open_beton
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer
from backmix.train import preview
from backmix.train.checkpoint import save_checkpoint
from backmix.train.options import Augment, BackMix, PreviewOptions, Run, Softmax, Split
from backmix.train.run_folder import as_document, run_of

CLASSES = ["cat", "dog", "owl"]


def write_beton(path: Path, side: int = 32, count: int = 12) -> Path:
    """Write images of one colour each, so that every pixel of a mix tells where it came from."""
    with Writer(path, samples=count, page_size=1 << 21, classes=CLASSES, options={}) as writer:
        for i in range(count):
            pixels = np.full((side, side, 3), (20 * i + 5, 255 - 20 * i, 7), np.uint8)
            writer.append(Record(pixels.tobytes(), RAW, side, side, i % 3, 0, f"{i}.png"))
    return path


def write_run(folder: Path, data: Path, method: Softmax | BackMix, bank: np.ndarray) -> Path:
    run = Run(
        data=(data,),
        out=folder,
        epochs=3,
        model="classifier32-quarter",
        split=Split(known=("cat", "owl")),
        loader=LoaderOptions(batch=4, size=32),
        augment=Augment(flip=True, pad=4, mean=(100.0, 90.0, 80.0), std=(50.0, 60.0, 70.0)),
        method=method,
    )
    folder.mkdir()
    with open_beton(data) as beton:
        digest = beton.digest
    config = {
        "run": as_document(run),
        "resolved": {},
        "classes": ["cat", "owl"],
        "known": [0, 2],
        "data": {"files": [str(data)], "digest": digest, "samples": 8},
    }
    (folder / "config.json").write_text(json.dumps(config))
    place = {"seed": 0, "epoch": 3, "consumed": 0}
    save_checkpoint(folder, 6, {"method.bank": torch.from_numpy(bank)}, {"place": place})
    return folder


def expected_mix(examples: preview.Examples, fill: tuple[int, int, int] | None) -> np.ndarray:
    """Paste pixel by pixel; `fill` None keeps the target under masked cells."""
    mixes = examples.targets.copy()
    n, height, width, _ = mixes.shape
    for i in range(n):
        ty, tx, dy, dx, ph, pw = examples.patch[i]
        for y in range(ph):
            for x in range(pw):
                cells = examples.masked[i]
                row = (dy + y) * cells.shape[0] // height
                column = (dx + x) * cells.shape[1] // width
                if not cells[row, column]:
                    mixes[i, ty + y, tx + x] = examples.donors[i, dy + y, dx + x]
                elif fill is not None:
                    mixes[i, ty + y, tx + x] = fill
    return mixes


def test_random_examples_are_mixed_as_their_own_masks_and_patches_say(tmp_path):
    examples = preview.random_examples(
        write_beton(tmp_path / "a.beton"), PreviewOptions(rows=8, seed=3)
    )
    assert examples.masked.shape == (8, 4, 4) and (examples.masked.sum((1, 2)) == 4).all()
    assert (examples.patch[:, 4:] == 8).all()
    np.testing.assert_array_equal(examples.mixes, expected_mix(examples, (128, 128, 128)))
    assert "random" in examples.caption


def test_the_masks_of_a_run_are_the_hottest_cells_of_its_bank(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    bank = np.zeros((8, 4, 4), np.float16)
    bank[:, 1:3, 1:3] = 1  # the middle of every image is hottest
    method = BackMix(mask_ratio=0.25, fill="keep", probability=0.1, warmup=9)
    run = write_run(tmp_path / "run", data, method, bank)
    examples = preview.run_examples(run, None, PreviewOptions(rows=4))
    middle = np.zeros((4, 4), bool)
    middle[1:3, 1:3] = True
    assert (examples.masked == middle).all()
    assert (examples.patch[:, 4:] == 8).all()  # every example shows a patch
    np.testing.assert_array_equal(examples.mixes, expected_mix(examples, None))
    assert set(examples.target_names) == {"cat", "owl"}  # dog is not known in this run
    assert "class activation maps" in examples.caption and "10%" in examples.caption


def test_wishes_go_before_the_options_of_the_run(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    run = write_run(tmp_path / "run", data, BackMix(), np.zeros((8, 4, 4), np.float16))
    examples = preview.run_examples(run, data, PreviewOptions(size=64, patch=10))
    assert examples.targets.shape[1:] == (64, 64, 3) and examples.masked.shape[1:] == (4, 4)
    assert (examples.patch[:, 4:] == 10).all()
    np.testing.assert_array_equal(examples.mixes, expected_mix(examples, (128, 128, 128)))


@pytest.mark.parametrize(("fill", "colour"), [("grey", (128, 128, 128)), ("mean", (100, 90, 80))])
def test_masked_donor_pixels_show_the_fill_of_the_run(tmp_path, fill, colour):
    data = write_beton(tmp_path / "a.beton")
    bank = np.zeros((8, 4, 4), np.float16)
    run = write_run(tmp_path / "run", data, BackMix(mask="grey", fill=fill), bank)
    examples = preview.run_examples(run, None, PreviewOptions())
    assert examples.masked.all()
    np.testing.assert_array_equal(examples.mixes, expected_mix(examples, colour))


def test_the_picture_shows_every_pixel_enlarged_by_a_whole_number(tmp_path):
    examples = preview.random_examples(write_beton(tmp_path / "a.beton"), PreviewOptions(rows=2))
    plain = dataclasses.replace(
        examples, patch=np.zeros_like(examples.patch), masked=np.zeros_like(examples.masked)
    )
    with Image.open(io.BytesIO(preview.grid_picture(plain))) as image:
        pixels = np.asarray(image.convert("RGB"))
    enlarged = examples.targets[0].repeat(5, axis=0).repeat(5, axis=1)
    assert enlarged.shape[0] >= 128
    rows, columns = np.nonzero((pixels == enlarged[0, 0]).all(-1))
    y, x = rows.min(), columns.min()
    np.testing.assert_array_equal(pixels[y : y + 160, x : x + 160], enlarged)


def test_patches_are_framed_and_masked_cells_hatched(tmp_path):
    examples = preview.random_examples(write_beton(tmp_path / "a.beton"), PreviewOptions(rows=1))
    masked = np.zeros((1, 4, 4), bool)
    masked[0, 0, 0] = True
    examples = dataclasses.replace(examples, patch=np.array([[20, 12, 8, 16, 8, 8]]), masked=masked)
    target, donor, mix = (np.asarray(tile) for tile in preview._tiles(examples, 0, 5))
    yellow = np.array(preview._YELLOW)
    for tile, (y, x) in ((target, (20, 12)), (donor, (8, 16)), (mix, (20, 12))):
        rows, columns = np.nonzero((tile == yellow).all(-1))
        assert (rows.min(), columns.min()) == (5 * y + 1, 5 * x + 1)
        assert (rows.max(), columns.max()) == (5 * y + 38, 5 * x + 38)
    changed = (donor != examples.donors[0].repeat(5, 0).repeat(5, 1)).any(-1)
    assert changed[:40, :40].all() and not changed[:40, 40:].any() and not changed[80:].any()


def test_the_file_is_whole_and_the_same_twice(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    for name in ("one.png", "two.png"):
        preview.write_preview(data, tmp_path / name, PreviewOptions(rows=3, seed=5))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        image.load()
        assert image.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.beton", "one.png", "two.png"]


def test_large_images_are_shown_at_224_pixels_with_patches_of_half_the_side(tmp_path):
    examples = preview.random_examples(
        [write_beton(tmp_path / "a.beton", side=300, count=2)], PreviewOptions()
    )
    assert examples.targets.shape[1:] == (224, 224, 3)
    assert (examples.patch[:, 4:] == 112).all()
    assert examples.masked.shape[1:] == (7, 7)


def test_a_long_class_name_is_cut(tmp_path):
    examples = preview.random_examples(write_beton(tmp_path / "a.beton"), PreviewOptions(rows=1))
    long = dataclasses.replace(examples, target_names=("x" * 500,))
    short = dataclasses.replace(examples, target_names=("x",))
    sizes = [Image.open(io.BytesIO(preview.grid_picture(e))).size for e in (long, short)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 40}, r"--patch must be in 1 \.\. 32"),
        ({"rows": 0}, "--rows must be at least 1"),
        ({"size": 16, "patch": 17}, r"--patch must be in 1 \.\. 16"),
        ({"patch": -1}, r"--patch must be in 1 \.\. 32"),
        ({"size": -5}, "--size must be 0 to 16384 pixels, got -5"),
        ({"size": 20_000}, "--size must be 0 to 16384 pixels, got 20000"),
        ({"seed": -1}, r"--seed must be in 0 \.\. 2\^64 - 1, got -1"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path, arguments, message):
    data = write_beton(tmp_path / "a.beton")
    with pytest.raises(ValueError, match=message):
        preview.write_preview(data, tmp_path / "out.png", PreviewOptions(**arguments))


@pytest.mark.parametrize(
    ("name", "said"), [("x.jpg", r"x\.jpg"), ("", "an empty name"), ("png", "png")]
)
def test_a_name_that_is_not_of_a_png_file_is_refused(tmp_path, name, said):
    data = write_beton(tmp_path / "a.beton")
    with pytest.raises(ValueError, match=rf"^-o must name a \.png file; {said} is none"):
        preview.write_preview(data, Path(name), PreviewOptions())


@pytest.mark.parametrize("rows", [65, 130])
def test_any_number_of_examples_is_drawn(tmp_path, rows):
    data = write_beton(tmp_path / "a.beton", count=rows)
    examples = preview.random_examples(data, PreviewOptions(rows=rows, size=8))
    assert len(examples.targets) == rows
    np.testing.assert_array_equal(examples.mixes, expected_mix(examples, (128, 128, 128)))


@pytest.mark.parametrize("patch", range(1, 8))
@pytest.mark.parametrize("size", [32, 160])  # enlarged five times, and not at all
def test_a_frame_stays_inside_a_patch_of_any_size(tmp_path, patch, size):
    data = write_beton(tmp_path / "a.beton", count=2)
    examples = preview.random_examples(data, PreviewOptions(rows=2, size=size, patch=patch))
    factor = 160 // size
    target = np.asarray(preview._tiles(examples, 0, factor)[0])
    ty, tx = examples.patch[0, :2]
    plain = examples.targets[0].repeat(factor, 0).repeat(factor, 1)
    rows, columns = np.nonzero((target != plain).any(-1))
    for found, corner in ((rows, ty), (columns, tx)):
        assert (found.min(), found.max()) == (factor * corner, factor * (corner + patch) - 1)
    preview.grid_picture(examples)


def test_a_softmax_run_has_nothing_to_show(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    bank = np.zeros((8, 4, 4), np.float16)
    run = write_run(tmp_path / "run", data, Softmax(), bank)
    with pytest.raises(ValueError, match="not trained with BackMix"):
        preview.run_examples(run, None, PreviewOptions())


def test_other_data_than_the_runs_are_refused(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    other = write_beton(tmp_path / "b.beton", count=9)
    run = write_run(tmp_path / "run", data, BackMix(), np.zeros((8, 4, 4), np.float16))
    with pytest.raises(ValueError, match=r"b\.beton is not what .*run was trained on"):
        preview.run_examples(run, other, PreviewOptions())


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    data = write_beton(tmp_path / "a.beton")
    run = write_run(tmp_path / "run", data, BackMix(), np.zeros((8, 4, 4), np.float16))
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint"):
        preview.run_examples(run, None, PreviewOptions())


def damaged(document, change):
    """Return config.json with one part replaced, by dotted name."""
    name, value = change
    *sections, last = name.split(".")
    part = document
    for section in sections:
        part = part[section]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return document


@pytest.mark.parametrize(
    "change",
    [
        ("run", []),
        ("run", {}),
        ("run.method", None),
        ("run.method", ["BackMix"]),
        ("run.method.type", None),
        ("run.method.masks", 5),
        ("run.method.colour", "red"),
        ("run.loader", [1]),
        ("run.loader.size", "32"),
        ("run.data", 3),
        ("run.out", None),
        ("run.augment.std", 1),
        ("data.digest", None),
        ("known", [0]),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_named(tmp_path, change):
    data = write_beton(tmp_path / "a.beton")
    run = write_run(tmp_path / "run", data, BackMix(), np.zeros((8, 4, 4), np.float16))
    path = run / "config.json"
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), change)))
    with pytest.raises(ValueError, match=r"run/config\.json is (no configuration|damaged)"):
        preview.run_examples(run, None, PreviewOptions())


@pytest.mark.parametrize("text", ["[]", "{}", "3", "null"])
def test_a_configuration_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a run"):
        preview.run_examples(tmp_path, None, PreviewOptions())


@pytest.mark.parametrize("tensors", [{}, {"method.bank": torch.zeros(3, 4, 4)}])
def test_a_checkpoint_of_another_run_is_named(tmp_path, tensors):
    data = write_beton(tmp_path / "a.beton")
    run = write_run(tmp_path / "run", data, BackMix(), np.zeros((8, 4, 4), np.float16))
    save_checkpoint(run, 7, tensors, {"place": {"seed": 0, "epoch": 3, "consumed": 0}})
    with pytest.raises(ValueError, match=r"step-00000007\.safetensors holds no masks of this run"):
        preview.run_examples(run, None, PreviewOptions())


def test_the_options_of_a_run_come_back_from_its_document():
    run = Run(
        data=(Path("a.beton"), Path("b.beton")),
        out=Path("out"),
        split=Split(known=("cat", "dog")),
        loader=LoaderOptions(scale=(0.2, 1.0)),
        method=BackMix(masks=Path("masks"), mask="oracle"),
    )
    assert run_of(json.loads(json.dumps(as_document(run)))) == run
    softmax = dataclasses.replace(run, method=Softmax())
    assert run_of(as_document(softmax)) == softmax
