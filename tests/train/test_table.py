import json
from dataclasses import replace
from pathlib import Path

import pytest

from backmix.train.options import Arpl, BackMix, TableOptions, host_of
from backmix.train.recipes import METHOD_ROWS, RECIPES
from backmix.train.results import read_judged
from backmix.train.table import cells, run_table
from tests.runs import tiny_images, write_set

GRID = TableOptions(out=Path("table"), methods="softmax,backmix", seeds=2, lists=(0, 2))
TINY = (
    "--model classifier32-quarter --epochs 2 --loader.batch 16 --threads 1 --augment.pad 2 "
    "--optim.lr 0.05 --precision fp32 --device cpu"
)


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
        methods=f"softmax,backmix,backmix --method.masks {tmp_path / 'nowhere'}",
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
    for changes, message in (
        ({"methods": "softmax,backmix --method.patch 99"}, "method.patch must be 1 .. 32"),
        ({"methods": "softmax --method.patch 3"}, "options are not understood"),
        ({"options": "--loader.batchh 4"}, "options are not understood"),
        ({"test": (tmp_path / "nope.beton",)}, "nope"),
        ({"unknown": ("textures",)}, "write NAME=PATH"),
        ({"unknown": (f"x={tmp_path / 'nope'}",)}, "write NAME=PATH"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_table("cifar10", replace(fresh, **changes), say=said.append)
    assert not fresh.out.exists()


def test_a_table_needs_its_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data TRAIN\.beton --test TEST\.beton"):
        run_table("cifar10", replace(GRID, out=tmp_path), say=lambda line: None)
