"""OpenOOD's lists and SSOD's benches: what is read of them, what is refused, what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.writer import Record, Writer
from backmix.train.cli import run as run_command
from backmix.train.evaluate import evaluate
from backmix.train.image_sets import image_sets
from backmix.train.judge import table
from backmix.train.models.build import Model, build
from backmix.train.openood import (
    bench_sizes,
    benchmark_for,
    find_bench,
    find_openood,
    read_list,
)
from backmix.train.options import Augment, EvaluateOptions, Run, TableOptions
from backmix.train.outputs import load_outputs
from backmix.train.results import read_judged
from backmix.train.run_folder import as_document
from backmix.train.table import run_table
from backmix.train.trained import load_model, read_run
from tests.runs import TINY, tiny_images, write_set

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]
TABLE = json.loads((Path(__file__).parents[2] / "train" / "benchmarks.json").read_text())
NEAR, FAR = ("cifar100", "tin"), ("mnist", "svhn", "texture", "places365")


def write_run(run: Path, classes: list[str], side: int = 32) -> Model:
    """Make a run folder with a network of random weights."""
    run.mkdir()
    options = Run(
        data=(Path("train.beton"),),
        out=run,
        model="classifier32-quarter",
        loader=LoaderOptions(size=side, crop="whole"),
        augment=Augment(mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0)),
    )
    config = {
        "run": as_document(options),
        "resolved": {},
        "classes": classes,
        "known": list(range(len(classes))),
        "data": {"files": ["train.beton"], "digest": "0", "samples": 1},
    }
    (run / "config.json").write_text(json.dumps(config))
    torch.manual_seed(len(classes))
    model = build("classifier32-quarter", len(classes), side)
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    return model.eval()


def draw(path: Path, seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Write an image of random pixels; return them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)  # of a JPEG; a PNG has none
    return pixels


def write_list(root: Path, name: str, lines: list[str]) -> Path:
    path = root / "benchmark_imglist" / "cifar10" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_tree(root: Path) -> Path:
    """Make OpenOOD's folder for CIFAR-10, a few images a set; mnist and places365 are not there."""
    images = root / "images_classic"
    lines = []
    for number in range(30):
        label = number * 7 % 10
        draw(images / f"cifar10/test/{CIFAR10[label]}/{number:04}.png", number)
        lines.append(f"cifar10/test/{CIFAR10[label]}/{number:04}.png {label}")
    write_list(root, "test_cifar10", lines)
    for name, group in (("cifar10c", "csid"), *((n, "near") for n in NEAR), ("svhn", "far")):
        lines = []
        for number in range(12):
            label = number % 10 if group == "csid" else -1
            draw(images / f"{name}/{number}_{abs(label)}.png", hash_of(name, number))
            lines.append(f"{name}/{number}_{abs(label)}.png {label}")
        write_list(root, f"test_{name}", lines)
    for number in range(6):
        draw(images / f"texture/banded/{number}.jpg", 900 + number, 60, 97)
    lines = [f"texture/banded/{number}.jpg -1" for number in range(8)]  # two are not there
    write_list(root, "test_texture", lines)
    write_list(root, "test_mnist", [f"mnist/test/{number}.jpg -1" for number in range(5)])
    return root


def hash_of(name: str, number: int) -> int:
    return sum(map(ord, name)) * 1000 + number


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("openood"))


@pytest.fixture(scope="module")
def judged(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    # The run's class order is not OpenOOD's.
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, CIFAR10[::-1])
    return run, evaluate(run, EvaluateOptions(openood=tree, batch=7, threads=1))


def test_one_command_judges_every_set_that_is_there(judged) -> None:
    run, document = judged
    assert document["known"]["n"] == 30
    assert {name: s["group"] for name, s in document["unknown"].items()} == {
        "cifar100": "near",
        "tin": "near",
        "svhn": "far",
        "texture": "far",
    }
    assert list(document["shifted"]) == ["cifar10c"]
    assert document["full_spectrum"]["n"] == 42
    assert json.loads((run / "metrics.json").read_text()) == document


def test_class_numbers_become_the_runs_labels(judged) -> None:
    run, document = judged
    known = load_outputs(run / "scores" / "known.safetensors")
    numbers = np.arange(30) * 7 % 10
    assert known.labels.tolist() == (9 - numbers).tolist()
    assert known.kind == "known"
    shifted = load_outputs(run / "scores" / "cifar10c.safetensors")
    assert shifted.labels.tolist() == [9 - number % 10 for number in range(12)]
    assert shifted.kind == "known"
    right = (known.logits.argmax(1) == known.labels).mean()
    assert document["known"]["accuracy"] == right
    tin = load_outputs(run / "scores" / "tin.safetensors")
    assert (tin.labels == -1).all() and tin.kind == "unknown"


def test_a_group_is_the_plain_mean_over_its_sets(judged) -> None:
    _, document = judged
    for group, names in (("near", NEAR), ("far", ("svhn", "texture"))):
        found = document["groups"][group]
        assert tuple(found["sets"]) == names
        for metric in ("auroc", "fpr95_known_rejected", "ccr_fpr5"):
            values = [document["unknown"][name]["scores"]["msp"][metric] for name in names]
            assert found["scores"]["msp"][metric] == pytest.approx(np.mean(values))
        cues = [document["unknown"][name]["cues"]["brightness"] for name in names]
        assert found["cues"]["brightness"] == pytest.approx(np.mean(cues))


def test_what_is_missing_is_said(judged) -> None:
    _, document = judged
    assert set(document["missing"]) == {"mnist", "places365"}
    text = table(document)
    assert "the set mnist is missing: none of the 5 images of" in text
    assert "the set places365 is missing: there is no" in text
    assert "texture: (2 could not be read and were left out)" in text
    assert "svhn (far): test_svhn.txt lists 12 images, the published list 26,032" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("note")) <= 100


def test_a_listed_image_that_is_not_there_is_named_with_its_line(judged) -> None:
    run, document = judged
    bad = load_outputs(run / "scores" / "texture.safetensors").bad
    assert len(bad) == document["unknown"]["texture"]["bad"] == 2
    assert bad[0].endswith("test_texture.txt, line 7)") and "6.jpg: No such file" in bad[0]


def test_a_view_is_the_central_square_not_the_squeezed_image(judged, tree: Path) -> None:
    run, _ = judged
    stored = load_outputs(run / "scores" / "texture.safetensors").logits[0]
    image = Image.open(tree / "images_classic" / "texture" / "banded" / "0.jpg").convert("RGB")
    width, height = image.size
    resized = image.resize((int(32 * width / height), 32), Image.Resampling.BILINEAR)
    left = round((resized.size[0] - 32) / 2)
    pixels = torch.from_numpy(np.array(resized.crop((left, 0, left + 32, 32)))).float()
    mean, std = torch.tensor([100.0, 110.0, 120.0]), torch.tensor([50.0, 60.0, 70.0])
    with torch.no_grad():
        expected = load_model(run)(((pixels - mean) / std).permute(2, 0, 1)[None])[0][0]
        squeezed = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BILINEAR)))
        other = load_model(run)(((squeezed.float() - mean) / std).permute(2, 0, 1)[None])[0][0]
    # Single levels of the pixels may differ by one.
    away = np.abs(stored - other.numpy()).max()
    assert np.abs(stored - expected.numpy()).max() < 0.05 * away


def test_the_command_prints_the_table(tree: Path, tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "run", CIFAR10)
    argv = ["evaluate", str(tmp_path / "run"), "--openood", str(tree), "--quiet"]
    assert run_command([*argv, "--benchmark", "cifar10"]) == 0
    said = capsys.readouterr().out
    assert "near: mean over cifar100, tin" in said and "known under shift" in said
    assert run_command([*argv, "--test", "x.beton"]) == 1
    assert "leave out --test" in capsys.readouterr().err


# --- the lists ----------------------------------------------------------------------------------


def test_a_whole_table_is_judged_on_a_benchmark(tree: Path, tmp_path: Path) -> None:
    images, labels = tiny_images(40, 10)
    write_beton(tmp_path / "textures.beton", 5)
    options = TableOptions(
        out=tmp_path / "table",
        data=(write_set(tmp_path / "train.beton", images, labels % 10, CIFAR10),),
        openood=tree,
        bench=("ssod-cifar10", tmp_path),
        unknown=(f"more={tmp_path / 'textures.beton'}",),
        methods="softmax,cutout",
        family="all",
        options=TINY,
        quiet=True,
    )
    said: list[str] = []
    assert run_table("cifar10", options, say=said.append) == 0
    document = json.loads((options.out / "table.json").read_text())
    near, far = "near: cifar100, tin", "far: svhn, texture"
    assert list(document["sets"]) == ["cifar100", "tin", "svhn", "texture", "more", "textures"]
    plain = {near: ["cifar100", "tin"], far: ["svhn", "texture"], "ssod: textures": ["textures"]}
    full = {name.replace(":", ", full spectrum:"): sets for name, sets in plain.items()}
    assert document["means"] == plain | full
    rows = {
        row["unknown"]: row["figures"]["auroc"]
        for row in document["rows"]
        if (row["method"], row["score"]) == ("Cutout", "msp")
    }
    (folder,) = (run["folder"] for run in document["runs"] if run["method"] == "Cutout")
    metrics = read_judged(options.out / "runs" / folder).metrics
    for mean, name in ((near, "near"), (far, "far")):
        assert rows[mean] == [metrics["groups"][name]["scores"]["msp"]["auroc"]]
        assert rows[mean][0] == pytest.approx(
            np.mean([rows[unknown][0] for unknown in document["means"][mean]])
        )
        judged = metrics["full_spectrum"]["groups"][name]["scores"]["msp"]["auroc"]
        assert rows[mean.replace(":", ", full spectrum:")] == [judged]
    page = (options.out / "table.md").read_text()
    columns = "".join(f" `{name}` |" for name in ("texture", "more", "textures", *plain, *full))
    assert columns in page
    assert f"## Mean over `{far}`\n\nunweighted, set by set.\n" in page
    assert "the set mnist is missing" in page
    said.clear()
    assert run_table("cifar10", options, say=said.append) == 0
    assert said[0].startswith("2 cells, 2 of them finished")

    fresh = replace(options, out=tmp_path / "fresh")
    for changes, message in (
        ({"test": options.data}, "leave out --test"),
        ({"openood": None}, "--test TEST.beton or --openood DIR"),
        ({"family": "A"}, "the run knows 6 classes"),
        ({"openood": tmp_path}, "benchmark_imglist"),
        ({"openood": None, "test": options.data, "benchmark": "cifar10"}, "needs OpenOOD's data"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_table("cifar10", replace(fresh, **changes), say=said.append)
    assert not fresh.out.exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png 0", "b.png"], "line 2: expected a path, a space and a class number, got 'b.png'"),
        (["a.png x"], "line 1: expected a path, a space and a class number"),
        (["a b.png 0"], "line 1: expected a path, a space and a class number, got 'a b.png 0'"),
        (['a.png {"group_label": 0}'], "line 1: expected a path"),
        (["a.png 0", "", "../b.png 1"], r"line 3: '\.\./b\.png' is no path below"),
        (["x/../../b.png 1"], "line 1: .* is no path below"),
        (["/etc/passwd 1"], "line 1: '/etc/passwd' is no path below"),
        (["./ 1"], "line 1: './' is no path below"),
        (["a\0.png 1"], "line 1: .* is no path below"),
        (["a.png 0", "b.png 1", "./a.png 0"], "line 3: a.png again, which line 1 lists already"),
        (["x//a.png 0", "x/a.png 1"], "line 2: x/a.png again, which line 1 lists already"),
        (["a.png 2"], r"line 1: class number 2, but there are the classes 0 \.\. 1"),
        (["a.png -1"], r"line 1: class number -1, but there are the classes 0 \.\. 1"),
        (["a.png 1e3"], "line 1: expected a path"),
        (["test/dog/a.png 0"], "line 1: class number 0 is cat, but the path says dog"),
        ([" ", ""], "lists no image"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(tmp_path: Path, lines, message) -> None:
    path = write_list(tmp_path, "x", lines)
    with pytest.raises(ValueError, match=message):
        read_list(path, tmp_path, [0, 1], ["cat", "dog"])


def test_a_list_of_unknown_images_says_that_they_are(tmp_path: Path) -> None:
    path = write_list(tmp_path, "x", ["a.png -1", "b.png 3"])
    with pytest.raises(ValueError, match="line 2: class number 3 in a list of unknown images"):
        read_list(path, tmp_path, None)


def test_ends_of_lines_and_blanks_are_no_part_of_a_list(tmp_path: Path) -> None:
    # ImageNet-200's own list ends its lines with a blank, and copies have the ends of Windows.
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffx/a.png 1 \r\n\r\nx/b.png 0 \r\nx/c.png 1".encode())
    items = read_list(path, tmp_path / "data", [7, 3])
    assert [(item.name, item.label) for item in items] == [
        ("x/a.png", 3),
        ("x/b.png", 7),
        ("x/c.png", 3),
    ]
    assert items[1].path == f"{tmp_path}/data/x/b.png"
    assert items[2].listed == f"{path}, line 4"


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00 1\n")
    with pytest.raises(ValueError, match=r"x\.txt is not UTF-8 text"):
        read_list(tmp_path / "x.txt", tmp_path, None)


# --- classes and benchmarks ---------------------------------------------------------------------


def test_the_benchmark_follows_from_the_number_of_classes() -> None:
    names = {10: "cifar10", 100: "cifar100", 200: "imagenet200", 1000: "imagenet"}
    for number, name in names.items():
        assert benchmark_for([""] * number) == name
    with pytest.raises(ValueError, match=r"knows 6 classes, but .* cifar10 10, cifar100 100"):
        benchmark_for([""] * 6)


def test_a_run_with_other_classes_is_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match="cifar10 has 10 known classes, the run 6"):
        find_openood(tree, "cifar10", CIFAR10[:6], 32)
    with pytest.raises(ValueError, match=r"not those of OpenOOD's cifar10 .*: plane are none"):
        find_openood(tree, "cifar10", ["plane", *CIFAR10[1:]], 32)


def test_classes_that_are_called_by_number_are_taken_by_it(tree: Path) -> None:
    names = [str(k) for k in (3, 1, 0, 2, 4, 5, 6, 7, 9, 8)]
    known = find_openood(tree, "cifar10", names, 32).sets[0]
    assert [item.label for item in known.items] == [names.index(str(n * 7 % 10)) for n in range(30)]


def test_a_folder_called_by_a_number_is_no_class(tmp_path: Path) -> None:
    # Severity 1 of ImageNet-C in a run whose classes are called 0 and 1.
    path = write_list(tmp_path, "x", ["fog/1/a.png 0"])
    assert read_list(path, tmp_path, [0, 1], ["0", "1"])[0].label == 0


def imagenet_tree(root: Path, name: str, lines: list[str]) -> Path:
    path = root / "benchmark_imglist" / name / f"test_{name}.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    for line in lines:
        draw(root / "images_largescale" / line.split()[0], 1)
    return root


def test_imagenet_goes_by_the_sorted_wordnet_ids(tmp_path: Path) -> None:
    classes = [f"n{number:08}" for number in range(2000, 1000, -1)]
    root = imagenet_tree(tmp_path, "imagenet", ["val/a.png 0", "val/b.png 999"])
    found = find_openood(root, "imagenet", classes, 224)
    assert [item.label for item in found.sets[0].items] == [999, 0]
    assert not [note for note in found.notes if "WordNet" in note]
    other = [f"class {number}" for number in range(1000)]
    found = find_openood(root, "imagenet", other, 192)
    assert [item.label for item in found.sets[0].items] == [0, 999]
    assert "not called by WordNet ids" in found.notes[0]
    assert "OpenOOD's views for imagenet have 224 px, those of this run 192" in found.notes[1]
    with pytest.raises(ValueError, match="not those of OpenOOD's imagenet200"):
        find_openood(
            imagenet_tree(tmp_path / "2", "imagenet200", ["a.png 0"]),
            "imagenet200",
            classes[:200],
            224,
        )


def test_corrupted_imagenet_is_not_cropped(tmp_path: Path) -> None:
    root = imagenet_tree(tmp_path, "imagenet", ["val/a.png 0"])
    lists = root / "benchmark_imglist" / "imagenet"
    for name in ("c", "v2"):
        (lists / f"test_imagenet_{name}.txt").write_text("val/a.png 0\n")
    classes = [f"n{number:08}" for number in range(1000)]
    sets = find_openood(root, "imagenet", classes, 224).sets
    assert {found.name: found.share for found in sets} == {
        "known": 0.875,
        "imagenet_v2": 0.875,
        "imagenet_c": 1.0,
    }


def test_the_benchmarks_are_whole() -> None:
    openood = TABLE["openood"]
    for name, benchmark in openood.items():
        assert len(set(benchmark["classes"])) == len(benchmark["classes"])
        assert benchmark["classes"] == sorted(benchmark["classes"])
        assert len(benchmark["classes"]) in (benchmark["number"], 0)
        names = [entry["name"] for entry in benchmark["sets"]]
        assert names[0] == "known" and len(set(names)) == len(names)
        groups = [entry["group"] for entry in benchmark["sets"]]
        assert groups.count("near") == 2 and groups.count("far") == (4 if "cifar" in name else 3)
    # The sizes that the benchmark's paper quotes.
    sizes = {entry["name"]: entry["images"] for entry in openood["cifar10"]["sets"]}
    assert sizes["known"] == 9000 and sizes["tin"] == 7793 and sizes["places365"] == 35195
    sizes = {entry["name"]: entry["images"] for entry in openood["imagenet"]["sets"]}
    assert (sizes["known"], sizes["ssb_hard"], sizes["ninco"]) == (45000, 49000, 5879)
    assert (sizes["inaturalist"], sizes["textures"], sizes["openimage_o"]) == (10000, 5160, 15869)


def test_a_folder_without_lists_or_known_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds benchmark_imglist/, images_classic/ and"):
        find_openood(tmp_path, "cifar10", CIFAR10, 32)
    write_list(tmp_path, "test_cifar10", ["a.png 0"])
    with pytest.raises(ValueError, match="known test set of cifar10 is missing: none of the 1 im"):
        find_openood(tmp_path, "cifar10", CIFAR10, 32)


# --- SSOD's benches, and all together -----------------------------------------------------------


def write_beton(path: Path, count: int) -> None:
    pixels = np.zeros((count, 32, 32, 3), np.uint8)
    with Writer(path, samples=count, page_size=1 << 21, classes=["x"], options={}) as writer:
        for number, image in enumerate(pixels):
            writer.append(Record(image.tobytes(), 1, 32, 32, 0, 0, f"{number}.png"))


def test_a_bench_finds_its_sets_by_their_names(tmp_path: Path) -> None:
    for name in ("SVHN", "LSUN_resize", "dtd", "other"):
        draw(tmp_path / name / "deep" / "1.png", 1)
    write_beton(tmp_path / "Places365.beton", 3)
    found, missing = find_bench(tmp_path, "ssod-cifar10")
    assert {name: path.name for name, (path, _) in found.items()} == {
        "svhn": "SVHN",
        "lsun": "LSUN_resize",
        "textures": "dtd",
        "places365": "Places365.beton",
    }
    assert {group for _, group in found.values()} == {"ssod"}
    assert list(missing) == ["isun"]
    draw(tmp_path / "LSUN-C" / "1.png", 1)
    with pytest.raises(ValueError, match="LSUN-C, LSUN_resize could each be the set lsun"):
        find_bench(tmp_path, "ssod-cifar10")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of its sets is there: inaturalist, sun, places"):
        find_bench(tmp_path / "empty", "ssod-imagenet")
    with pytest.raises(ValueError, match="there is no such folder"):
        find_bench(tmp_path / "nowhere", "ssod-imagenet")
    assert bench_sizes("ssod-imagenet")["openimage_o"] == 17632


def test_a_bench_and_named_sets_join_the_test_file(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["x", "y"])
    root = tmp_path / "bench"
    draw(root / "svhn" / "1.png", 1)
    write_beton(root / "isun.beton", 4)
    with Writer(
        tmp_path / "test.beton", samples=2, page_size=1 << 21, classes=["x", "y"], options={}
    ) as writer:
        for label in (0, 1):
            writer.append(Record(bytes(32 * 32 * 3), 1, 32, 32, label, 0, f"{label}.png"))
    trained = read_run(tmp_path / "run")
    options = EvaluateOptions(
        test=(tmp_path / "test.beton",),
        unknown=(f"more={root / 'svhn'}",),
        bench=("ssod-cifar10", root),
    )
    sets = image_sets(trained, options)
    assert [(s.name, s.group, len(s)) for s in sets.images] == [
        ("known", "", 2),
        ("more", "", 1),
        ("svhn", "ssod", 1),
        ("isun", "ssod", 4),
    ]
    assert set(sets.missing) == {"lsun", "textures", "places365"}
    assert "svhn has 1 images, the usual set 26,032" in sets.notes
    twice = replace(options, unknown=(f"svhn={root / 'svhn'}",))
    with pytest.raises(ValueError, match="--bench ssod-cifar10: there is a set of the name svhn"):
        image_sets(trained, twice)


def test_an_unknown_set_with_images_of_known_classes_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["x", "y", "3"])

    def of(name: str, *labels: int) -> Path:
        path = tmp_path / f"{name}.beton"
        classes = ["z", "y", "3", "x"]
        with Writer(
            path, samples=len(labels), page_size=1 << 21, classes=classes, options={}
        ) as writer:
            for number, label in enumerate(labels):
                record = Record(bytes(32 * 32 * 3), 1, 32, 32, label, 0, f"{number}.png")
                writer.append(record)
        return path

    test, other, mixed = of("test", 0, 1, 2, 3), of("other", 0, 2), of("mixed", 0, 2, 3)
    sets = image_sets(
        read_run(tmp_path / "run"),
        EvaluateOptions(test=(test,), unknown=(f"other={other}", f"mixed={mixed}")),
    )
    # A class without an image there does not count, and a number names no class.
    assert sets.notes == (
        "the unknown set mixed has images of the run's known classes x, which count as unknown "
        "there",
    )


def test_wrong_combinations_are_said(tree: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", CIFAR10)
    trained = read_run(tmp_path / "run")
    for options, message in (
        (EvaluateOptions(), "Name its test set: --test FILE.beton, or OpenOOD's data: --openood"),
        (EvaluateOptions(openood=tree, test=(Path("x"),)), "leave out --test"),
        (EvaluateOptions(openood=tree, benchmark="cifar100"), "has 100 known classes, the run 10"),
        (EvaluateOptions(openood=tree, unknown=(f"tin={tree}",)), "a set of the name tin already"),
        (EvaluateOptions(test=(Path("x"),), benchmark="cifar10"), "--benchmark cifar10 needs Open"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            image_sets(trained, options)
