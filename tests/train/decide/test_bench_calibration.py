"""The bench of random halves: what it says of scores whose law is known."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from backmix.train.outputs import Outputs, store
from bench import calibration
from bench.calibration import Judged, Scores, halves, main, read, table

RATE = Fraction(1, 20)


def known(n: int, seed: int = 0, spread: tuple[float, ...] = (0.0, 0.0)) -> Scores:
    random = np.random.default_rng(seed)
    predicted = random.integers(0, len(spread), n)
    return Scores(predicted, random.normal(np.asarray(spread)[predicted]), len(spread))


def of(judged: list[Judged], name: str) -> Judged:
    return next(row for row in judged if row.name.startswith(name))


def test_halves_keep_the_rate_where_a_quantile_is_above_it() -> None:
    judged = halves(known(400), RATE, 400, seed=1)
    one, quantile = of(judged, "one threshold"), of(judged, "np.quantile")
    assert (one.n, one.m, one.k) == (200, 200, 10) and one.promised == 10 / 201
    # Each half is a draw of the Beta-binomial, of standard deviation 2.2 %: its mean is exact.
    assert np.mean(one.seen) == pytest.approx(10 / 201, abs=0.0035)
    assert one.inside is not None and one.inside >= 0.92 * 400
    assert np.mean(quantile.seen) > np.mean(one.seen) + 0.001
    strict = of(judged, "one, confidence")
    assert strict.k == 6 and strict.above < one.above


def test_by_class_no_class_rejects_more_than_was_asked() -> None:
    judged = halves(known(2_000, spread=(0.0, 3.0, -3.0)), RATE, 50, seed=2)
    assert of(judged, "by predicted class").worst < 0.06
    assert of(judged, "one threshold").worst > 0.1
    assert of(judged, "by class, shrunk").worst < of(judged, "one threshold").worst


def stored(path: Path, n: int, seed: int, shift: float = 0.0) -> Path:
    random = np.random.default_rng(seed)
    logits = random.normal(shift, 1, (n, 3)).astype(np.float32)
    outputs = Outputs(
        name="known",
        kind="known",
        logits=logits,
        features=random.normal(size=(n, 4)).astype(np.float32),
        labels=logits.argmax(1),
        index=np.arange(n),
        files=(),
        digest="",
        scores={"mine": random.normal(size=n)},
    )
    store(path, outputs)
    return path


def test_stored_scores_are_read_and_others_computed(tmp_path: Path) -> None:
    path = stored(tmp_path / "known.safetensors", 50, 0)
    assert read(path, "mine").score.tolist() != read(path, "max_logit").score.tolist()
    assert read(path, "energy").classes == 3
    with pytest.raises(ValueError, match="has no score knn"):
        read(path, "knn")


def test_the_table_has_a_row_for_each_rule_and_rate(tmp_path: Path, capsys) -> None:
    path = stored(tmp_path / "known.safetensors", 400, 0)
    assert main([str(path), "--rate", "0.05", "0.1", "--halves", "3"]) == 0
    rows = [line for line in capsys.readouterr().out.split("\n") if line.startswith("| one thr")]
    assert len(rows) == 2 and "| 5 | 200 | 200 | 4.98 |" in rows[0]
    assert rows[1].startswith("| one threshold | 10 | 200 | 200 | 9.95 |")


def test_another_set_is_judged_by_the_thresholds_of_the_first(tmp_path: Path, capsys) -> None:
    path = stored(tmp_path / "known.safetensors", 400, 0)
    shifted = stored(tmp_path / "other.safetensors", 300, 1, shift=-1.0)
    main([str(path), "--test", str(shifted), "--rate", "0.05"])
    (row,) = (line for line in capsys.readouterr().out.split("\n") if line.startswith("| one thr"))
    assert "| 400 | 300 |" in row and "0 of 1 | 1 of 1" in row  # far outside, and above


def test_of_a_rule_without_a_promise_none_is_shown() -> None:
    text = table([Judged("np.quantile", 0.05, 100, 100, 0, (0.04, 0.08), 0.1)])
    assert "| np.quantile | 5 | 100 | 100 |  | 6.00 | 4.00 to 8.00 |  | 1 of 2 | 10.00 |" in text
    assert calibration.CONFIDENCE == 0.9
