"""The tables of bench/questions.py, by hand-made figures."""

import sys

import pytest

from backmix.train.check import check
from backmix.train.options import TableOptions
from backmix.train.recipes import parse_run
from backmix.train.table import cells
from bench import questions
from bench.questions import QUESTIONS, added, facts, page, row

FACTS = {"commit": "0123456789abcdef", "torch": "2.13.0"}


def figure(name: str, seed: int, auroc: float, **more: float) -> dict[str, str | float]:
    return {"row": name, "correlation": 0.75, "epochs": 16, "seed": seed, "auroc": auroc, **more}


def test_differences_are_means_over_pairs() -> None:
    found = [
        figure("softmax", 0, 0.80),
        figure("softmax", 1, 0.70),
        figure("BackMix", 0, 0.85, hit=0.6),
        figure("BackMix", 1, 0.71, hit=0.8),
        # A longer training has a pair in one seed alone.
        figure("softmax", 0, 0.90, epochs=30),
        figure("BackMix", 0, 0.88, epochs=30, hit=0.5),
    ]
    lines = page({**FACTS, "figures": found}).split("\n")
    assert lines[0] == (
        "| method | 16 epochs (2 seeds) | 30 epochs (1 seed) | hit 16 epochs | hit 30 epochs |"
    )
    assert lines[2] == "| softmax | 75.0 | 90.0 |  |  |"
    assert lines[3] == "| BackMix | 78.0 (+3.0) | 88.0 (\u22122.0) | 70 % | 50 % |"
    assert lines[-1] == "Seeds 0, 1; 16, 30 epochs; commit 0123456789ab; torch 2.13.0; CPU."


def test_three_seeds_have_a_spread_and_one_column_no_number() -> None:
    pairs = [(0.70, 0.71), (0.70, 0.73), (0.80, 0.85)]  # differences 1, 3, 5
    found = [figure("softmax", seed, base) for seed, (base, _) in enumerate(pairs)]
    found += [figure("Cutout", seed, value) for seed, (_, value) in enumerate(pairs)]
    lines = page({**FACTS, "figures": found}).split("\n")
    assert lines[0] == "| method | AUROC |"
    assert lines[3] == "| Cutout | 76.3 (+3.0 ± 2.0) |"


def test_columns_of_other_commands_are_added(tmp_path) -> None:
    path = tmp_path / "length.json"
    short = {**FACTS, "figures": [figure("softmax", 0, 0.8), figure("BackMix", 0, 0.7)]}
    # A column more, and one cell of the old one anew.
    more = [figure("softmax", 0, 0.9, epochs=30), figure("BackMix", 0, 0.85)]
    both = added(short, {**FACTS, "figures": more}, path)
    assert both == {**FACTS, "figures": [short["figures"][0], more[1], more[0]]}
    assert page(both).split("\n")[2:4] == [
        "| softmax | 80.0 | 90.0 |",
        "| BackMix | 85.0 (+5.0) |  |",
    ]
    for other in ({"commit": "fedcba"}, {"torch": "2.14.0"}):
        with pytest.raises(ValueError, match=rf"length\.json has figures of {next(iter(other))} "):
            added(short, {**FACTS, **other, "figures": more}, path)


def test_runs_of_several_commits_are_no_table() -> None:
    one, other = ({"commit": c, "versions": {"torch": "2.13.0"}} for c in ("a" * 40, "b" * 40))
    assert facts([one, one]) == {"commit": "a" * 40, "torch": "2.13.0"}
    with pytest.raises(ValueError, match=r"aaaaaaaaaaaa with .*, bbbbbbbbbbbb with"):
        facts([one, other])


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_rows_are_rows_of_a_table(question: questions.Question, tmp_path) -> None:
    for text in question.rows.values():
        (cell,) = cells("demo", TableOptions(out=tmp_path, methods=row(text, tmp_path)))
        check(parse_run(cell.recipe, ["--data", "train.beton", "--out", "run", *cell.options]))
    assert len(set(question.rows.values())) == len(question.rows)


def test_a_row_that_is_not_there_is_named(monkeypatch, capsys, tmp_path) -> None:
    given = ["questions.py", "length", "--out", str(tmp_path), "--rows", "softmax", "Backmix"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        questions.main()
    assert "no row 'Backmix'; there are softmax, Cutout, BackMix" in capsys.readouterr().err
