import json
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from backmix.pipeline.beton import open_set
from backmix.train import table
from backmix.train.checkpoint import locked
from backmix.train.jobs import Job
from backmix.train.options import Arpl, BackMix, TableOptions, host_of
from backmix.train.recipes import METHOD_ROWS, RECIPES, parse_run
from backmix.train.results import read_judged, run_folders
from backmix.train.table import cells, run_table
from backmix.train.table_page import table_page
from tests.runs import TINY, tiny_images, tiny_set, write_set

GRID = TableOptions(out=Path("table"), methods="softmax,backmix", seeds=2, lists=(0, 2))


def option(cell, name: str) -> str | None:
    """Return the last value that a cell gives an option, as the command line takes it."""
    words = list(cell.options)
    places = [at for at, word in enumerate(words) if word == f"--{name}"]
    return words[places[-1] + 1] if places else None


def test_a_grid_goes_by_list_then_seed_then_method() -> None:
    made = cells("cifar10", GRID)
    assert [cell.name for cell in made] == [
        "softmax-A0-seed0",
        "backmix-A0-seed0",
        "softmax-A0-seed1",
        "backmix-A0-seed1",
        "softmax-A2-seed0",
        "backmix-A2-seed0",
        "softmax-A2-seed1",
        "backmix-A2-seed1",
    ]
    assert [cell.recipe for cell in made[:2]] == ["cifar10-softmax", "cifar10-backmix"]
    assert (option(made[6], "split.list"), option(made[6], "seed")) == ("2", "1")
    assert option(made[0], "epochs") is None, "the full budget leaves the recipe as it is"


def test_all_lists_of_a_family_are_taken_where_none_is_named() -> None:
    made = cells("cifar10", replace(GRID, lists=(), seeds=1, family="C"))
    assert {cell.name[8:10] for cell in made if cell.name.startswith("softmax")} == {
        "C0",
        "C1",
        "C2",
        "C3",
        "C4",
    }


def test_a_row_may_have_options_of_its_own_and_they_win() -> None:
    rows = "backmix, backmix --method.patch 16 --epochs 3,arpl-cs"
    made = cells("cifar10", replace(GRID, methods=rows, seeds=1, lists=(0,), budget="small"))
    assert [cell.name for cell in made] == [
        "backmix-A0-seed0",
        "backmix-method-patch-16-epochs-3-A0-seed0",
        "arpl-cs-A0-seed0",
    ]
    assert option(made[1], "method.patch") == "16" and option(made[1], "epochs") == "3"
    assert option(made[0], "epochs") == "12"
    assert option(made[2], "epochs") == "24", "ARPL+CS makes two passes an epoch"


def test_recipes_without_a_protocol_make_one_cell_per_seed_and_method() -> None:
    made = cells("demo", replace(GRID, methods="softmax,backmix", seeds=1, lists=()))
    assert [cell.name for cell in made] == ["softmax-seed0", "backmix-seed0"]


def test_family_all_knows_every_class() -> None:
    made = cells("cifar10", replace(GRID, methods="softmax,ssod", seeds=2, lists=(), family="all"))
    assert [cell.name for cell in made] == [
        "softmax-all-seed0",
        "ssod-all-seed0",
        "softmax-all-seed1",
        "ssod-all-seed1",
    ]
    given = ["--data", "train.beton", "--out", "run", *made[1].options]
    assert parse_run(made[1].recipe, given).split.protocol is None


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        ("cifar11", {}, "no recipes are called cifar11-METHOD; there are cifar10, svhn"),
        ("demo", {"methods": "aprl"}, "demo has no aprl; it has softmax, cutout, backmix"),
        ("cifar10", {"methods": " , "}, "at least one method"),
        ("cifar10", {"seeds": 0}, "one seed"),
        ("cifar10", {"lists": (5,)}, "has the lists 0..4, not 5"),
        ("cifar10", {"lists": (1, 1)}, "--lists names a list twice"),
        ("tiny-imagenet", {"family": "F", "lists": (7,)}, "has no lists of family|has the lists"),
        ("cifar10", {"methods": "softmax,softmax"}, "names a row twice"),
        ("demo", {"methods": "softmax", "lists": (0,)}, "--lists: these recipes follow no"),
        ("cifar10", {"family": "all", "lists": (0,)}, "--lists: --family all has no class lists"),
        ("cifar10", {"methods": "ssod --split.protocol None"}, "the table sets it, by --family"),
        ("cifar10", {"methods": "softmax --seed 3"}, "--seed .* sets it, by --seeds"),
        ("cifar10", {"options": "--split.list=3"}, r"--split\.list .* sets it, by --lists"),
        ("cifar10", {"methods": "softmax --out x"}, "--out .* sets it, by --out"),
        ("cifar10", {"methods": 'softmax,"backmix'}, "--methods: .*No closing quotation"),
        ("cifar10", {"options": "--loader.batch '3"}, "--options: .*No closing quotation"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(base: str, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cells(base, replace(GRID, **changes))


def test_every_method_is_a_recipe_of_every_data_set_at_equal_training() -> None:
    for base in ("cifar10", "svhn", "cifar+10", "tiny-imagenet", "cifar10-wrn"):
        plain = RECIPES[f"{base}-softmax"]()
        for name, _, method in METHOD_ROWS:
            run = RECIPES[f"{base}-{name}"]()
            assert type(host_of(run.method)) is type(host_of(method)), (base, name)
            host = host_of(run.method)
            passes = 2 if isinstance(host, Arpl) and host.confusing else 1
            assert run.epochs == passes * plain.epochs
            assert (
                replace(run, method=plain.method, epochs=plain.epochs, optim=plain.optim) == plain
            )
            if isinstance(run.method, BackMix):
                assert run.method.patch == {32: 8, 64: 32}[run.loader.size]


@pytest.mark.timeout(600)  # a dozen processes, one after another
def test_a_table_goes_on_where_it_was_and_names_what_failed(tmp_path: Path) -> None:
    classes = [chr(ord("a") + k) for k in range(10)]
    images, labels = tiny_images(60, 10)
    train = write_set(tmp_path / "train.beton", images, labels % 10, classes)
    images, labels = tiny_images(40, 10, seed=1)
    test = write_set(tmp_path / "test.beton", images, labels % 10, classes)
    options = TableOptions(
        out=tmp_path / "table",
        data=(train,),
        test=(test,),
        methods="softmax,backmix,backmix --method.mask oracle --method.masks "
        f"{tmp_path / 'nowhere'}",
        lists=(0,),
        options=TINY,
        quiet=True,
    )
    said: list[str] = []
    assert run_table("cifar10", options, say=said.append) == 1
    assert "nowhere is no folder" in said[-1] and said[-1].startswith("not in it")
    page = (options.out / "table.md").read_text()
    assert "| softmax | MaxLogit | 1 |" in page and "| BackMix | MaxLogit | 1 |" in page
    rows = json.loads((options.out / "table.json").read_text())["rows"]
    runs = options.out / "runs"
    for row in rows:
        if row["score"] == "max_logit":
            folder = runs / row["runs"][0]
            expected = read_judged(folder).figure("auroc", row["unknown"], "max_logit")
            assert row["figures"]["auroc"] == [expected]
    by_method = {row["method"]: row for row in rows if row["score"] == "max_logit"}
    change = by_method["BackMix"]["differences"]["auroc"][0]
    assert change == pytest.approx(
        by_method["BackMix"]["figures"]["auroc"][0] - by_method["softmax"]["figures"]["auroc"][0]
    )

    before = (runs / "softmax-A0-seed0" / "status.json").stat().st_mtime_ns
    said.clear()
    wider = replace(options, methods="softmax,cutout")
    assert run_table("cifar10", wider, say=said.append) == 0
    assert said[0].startswith("2 cells, 1 of them finished")
    assert (runs / "softmax-A0-seed0" / "status.json").stat().st_mtime_ns == before
    assert "| Cutout |" in (options.out / "table.md").read_text()
    assert said[-1] == f"not in it are runs of other grids in {runs}: 1"

    # The table's folder stands for the runs of its table, and for no others.
    names = [folder.name for folder in run_folders([options.out, tmp_path])]
    assert names == ["softmax-A0-seed0", "cutout-A0-seed0", tmp_path.name]

    # Figures of other images or weights, or that are not there any more, are made again; a run on
    # other training images is refused, and one that cannot be read costs the others nothing.
    images, labels = tiny_images(40, 10, seed=2)
    other = write_set(tmp_path / "other.beton", images, labels % 10, classes)
    stored = runs / "softmax-A0-seed0" / "scores" / "unknown.safetensors"
    figures = runs / "softmax-A0-seed0" / "metrics.json"
    for damage in ("", "lost", "trained anew"):
        if damage == "lost":
            stored.unlink()
        if damage == "trained anew":
            document = json.loads(figures.read_text())
            figures.write_text(json.dumps({**document, "weights": "of other weights"}))
        said.clear()
        run_table("cifar10", replace(wider, test=(other,)), say=said.append)
        assert said[0].startswith(f"2 cells, {1 if damage else 0} of them finished")
        judged = read_judged(runs / "softmax-A0-seed0")
        with open_set([other]) as data:
            assert judged.known.digest == judged.unknown["unknown"].digest == data.digest
    with pytest.raises(ValueError, match=r"another grid: it was trained on other data .*train\.be"):
        run_table("cifar10", replace(wider, data=(other,), test=(other,)), say=said.append)
    for name in ("log.jsonl", "config.json", "status.json"):
        broken = runs / "cutout-A0-seed0" / name
        held = broken.read_bytes()
        broken.write_bytes(b"")
        said.clear()
        assert run_table("cifar10", replace(wider, test=(other,)), say=said.append) == 1
        assert said[-1].startswith("not in it: cutout-A0-seed0: ") and "trains it anew" in said[-1]
        assert "| softmax |" in (options.out / "table.md").read_text()
        assert "| Cutout |" not in (options.out / "table.md").read_text()
        broken.write_bytes(held)
    with locked(options.out), pytest.raises(ValueError, match="in use by process"):
        run_table("cifar10", wider, say=said.append)

    # Finished cells are judged again by what is asked for later, and not trained again.
    said.clear()
    asked = replace(options, methods="softmax", fit=True, unknown=(f"all={test}",))
    assert run_table("cifar10", asked, say=said.append) == 0
    assert said[0].startswith("1 cells, 0 of them finished")
    metrics = json.loads((runs / "softmax-A0-seed0" / "metrics.json").read_text())
    assert "all" in metrics["unknown"] and "knn" in metrics["unknown"]["all"]["scores"]
    assert (runs / "softmax-A0-seed0" / "status.json").stat().st_mtime_ns == before
    for again in ({"flip": True}, {"flip": True, "size": 24}):
        asked = replace(asked, **again)
        assert run_table("cifar10", asked, say=said.append) == 0
        metrics = json.loads((runs / "softmax-A0-seed0" / "metrics.json").read_text())
        assert metrics["views"] == {"size": asked.size or 32, "flip": True}
        assert "averaged over each view" in (options.out / "table.md").read_text()
    said.clear()
    assert run_table("cifar10", asked, say=said.append) == 0
    assert said[0].startswith("1 cells, 1 of them finished")

    with pytest.raises(ValueError, match=r"of another grid: .* this one asks for .* --epochs 7"):
        run_table("cifar10", replace(asked, epochs=7), say=said.append)

    # What cannot be is refused before any cell is trained.
    fresh = replace(asked, out=tmp_path / "fresh")
    short = tiny_set(tmp_path / "short.beton")
    for changes, message in (
        ({"methods": "softmax,backmix --method.patch 99"}, "method.patch must be 1 .. 32"),
        ({"methods": "softmax --method.patch 3"}, "options are not understood"),
        ({"options": "--loader.batchh 4"}, "options are not understood"),
        ({"test": (tmp_path / "nope.beton",)}, "nope"),
        ({"unknown": ("textures",)}, "write NAME=PATH"),
        ({"unknown": (f"x={tmp_path / 'nope'}",)}, "there is no .*nope"),
        ({"unknown": (f"unknown={test}",)}, "there is a set of the name unknown already"),
        ({"unknown": (f"x={test}", f"x={test}")}, "there is a set of the name x already"),
        ({"unknown": (f"train={test}",)}, "name of the run's own images"),
        ({"size": -3}, "--size must be 1 to"),
        ({"test": (short,)}, "lacks the known classes|has 4 classes"),
        ({"methods": "backmix,backmix --method.patch 8"}, "would be the same run twice"),
        ({"family": "all", "lists": (), "unknown": ()}, "name unknown images by --unknown"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_table("cifar10", replace(fresh, **changes), say=said.append)
    assert not fresh.out.exists()


def test_a_table_needs_its_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data TRAIN\.beton, and --test TEST\.beton or"):
        run_table("cifar10", replace(GRID, out=tmp_path), say=lambda line: None)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.5, "about 1 h 45 min"), (7 / 11, "about 1 h 00 min"), (0.99, "about 0 h 01 min")],
)
def test_the_time_left_counts_whole_hours(
    monkeypatch, tmp_path: Path, share: float, said: str
) -> None:
    """105 minutes for the first half leave as many: 1 h 45 min, and not 2 h 45 min."""
    clock, shares, lines = [0.0], [0.0], []
    monkeypatch.setattr(table.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(table._Watch, "_share", lambda self, name: shares[0])
    job = Job("one", deque(), tmp_path / "one.log")
    watch = table._Watch([job], tmp_path, [], quiet=False)
    monkeypatch.setattr(watch.progress, "show", lines.append)
    clock[0], shares[0] = 105 * 60.0, share
    watch([job])
    assert lines[0].endswith(said)


def document(sets: dict[str, int], *, unpaired: str = "") -> dict:
    """Return the document of two softmax runs and two of BackMix, one of them without a pair."""
    runs = [
        {"folder": f"{method}-{seed}", "method": method, "list": None, "seed": seed}
        | {"repeats": False, "model": "net", "epochs": 2, "commit": "c", "torch": "t"}
        | {"device": "cpu", "minutes": 1, "command": "", "notes": []}
        | {"unpaired": unpaired if (method, seed) == ("BackMix", 1) else ""}
        for method in ("softmax", "BackMix")
        for seed in (0, 1)
    ]
    metrics = ("accuracy", "auroc", "oscr", "fpr95_unknown_accepted")
    rows = [
        {"method": method, "unknown": name, "score": score, "own": False}
        | {"runs": [f"{method}-0", f"{method}-1"]}
        | {"figures": {metric: [0.5, 0.7] for metric in metrics}}
        | {"differences": {metric: [0.125] for metric in metrics} if method == "BackMix" else {}}
        for name in sets
        for method in ("softmax", "BackMix")
        for score in ("msp", "max_logit", "energy")
    ]
    found = {
        name: {"known": [9, 9], "unknown": [n, n], "cues": {"contrast": [0.5]}}
        for name, n in sets.items()
    }
    return {"problem": "no protocol", "runs": runs, "sets": found, "means": {}, "rows": rows}


def test_rows_without_all_pairs_say_how_many_and_why() -> None:
    page = table_page(document({"far": 3}, unpaired="the softmax run has epochs 2, not 3"))
    assert (
        "- BackMix (1 of 2 runs) is not compared with softmax: the softmax run has epochs 2, not 3"
    ) in page
    cell = "60.0 ± 14.1 | +12.5 (1 of 2)"
    assert f"| BackMix | MSP | 2 | 60.0 ± 14.1 | {cell} | {cell} | {cell} |" in page
    assert "All unknown sets" not in page and "<details>" not in page


def test_several_unknown_sets_stand_side_by_side_and_each_may_be_folded() -> None:
    grid = document({"far": 3, "near": 1000})
    row = "| BackMix | MSP | 60.0 ± 14.1 | 60.0 ± 14.1 (+12.5) | 60.0 ± 14.1 (+12.5) |"
    plain, folded = table_page(grid), table_page(grid, level=3, folded=True)
    for page in (plain, folded):
        assert "| method | score | accuracy | `far` | `near` |" in page
        assert row in page.splitlines()
    assert "<details>" not in plain and "## Unknown set `near`" in plain
    assert folded.count("<details>\n<summary>Unknown set <code>") == 2
    assert folded.count("<details>") == folded.count("</details>")
    # What is seen without unfolding: every method on every set, once.
    seen = [part.split("</details>")[-1] for part in folded.split("<details>")]
    assert "".join(seen).count("| BackMix | MSP |") == 1
    figures = [line for line in plain.splitlines() if line.startswith("|")]
    assert figures == [line for line in folded.splitlines() if line.startswith("|")]


def test_of_one_unknown_set_the_main_table_is_never_folded() -> None:
    page = table_page(document({"far": 3}), folded=True)
    before, after = page.split("<details>")
    assert "| BackMix | MSP | 2 |" in before and "| Energy |" not in before
    assert after.startswith("\n<summary>AUROC of every score</summary>") and "| Energy |" in after
