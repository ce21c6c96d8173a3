"""What scores learned, as a file: the same scores again, bit for bit; damage is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backmix.train.checkpoint import load_tensors, save_tensors
from backmix.train.models.build import Model, build
from backmix.train.models.heads import Reconstruction, put_head
from backmix.train.outputs import Outputs
from backmix.train.scores import every_score, fit_scores, linear_head
from backmix.train.scores.cssr import CssrFit
from backmix.train.scores.fit_file import read_fit, write_fit

K, C = 3, 32


def outputs(n: int, seed: int, **extras: np.ndarray) -> Outputs:
    random = np.random.default_rng(seed)
    return Outputs(
        name="train",
        kind="known",
        logits=random.normal(0, 3, (n, K)).astype(np.float32),
        features=random.normal(0, 1, (n, C)).astype(np.float32),
        labels=random.integers(0, K, n),
        index=np.arange(n),
        files=(),
        digest="",
        extras=extras,
    )


def of_cssr() -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    model = build("classifier32-quarter", K, 16)
    put_head(model, Reconstruction(K, C, 4, 0.1, reciprocal=False))
    return model.eval(), torch.rand(40, C, 2, 2)


def test_scores_of_a_linear_head_are_the_same_after_reading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(C, K)
    fit = fit_scores(outputs(200, 0), linear_head(head), outputs(50, 1))
    write_fit(tmp_path / "fit", fit)
    again, cssr = read_fit(tmp_path / "fit", build("classifier32-quarter", K, 16))
    assert cssr is None
    assert (again.images, again.held_out, again.notes) == (200, 50, fit.notes)
    new = outputs(70, 2)
    before, after = every_score(new, head, fit), every_score(new, head, again)
    assert list(before) == list(after) and {"knn", "vim", "react", "rmds"} <= set(before)
    for name, score in before.items():
        assert score.tobytes() == after[name].tobytes(), name


def test_equal_fits_give_equal_bytes(tmp_path: Path) -> None:
    fit = fit_scores(outputs(60, 0), None)
    for name in ("one", "two"):
        write_fit(tmp_path / name, fit)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("most", [2**26, 1])
def test_figures_of_cssr_are_the_same_after_reading(tmp_path: Path, most: int) -> None:
    model, maps = of_cssr()
    cssr = CssrFit(model, most)
    with torch.no_grad():
        logits = model.head(maps)
        cssr.learn(logits, maps)
        cssr.finish_learning()
        figures = {k: v.numpy() for k, v in cssr.figures(logits, maps).items()}
    fit = fit_scores(outputs(40, 0, **figures), None)
    write_fit(tmp_path / "fit", fit, cssr)
    other, _ = of_cssr()
    again, learned = read_fit(tmp_path / "fit", other)
    assert learned is not None and learned.without_gram == cssr.without_gram
    assert (learned.grams is None) == (most == 1)
    with torch.no_grad():
        found = {k: v.numpy() for k, v in learned.figures(logits, maps).items()}
    assert found.keys() == figures.keys()
    for name, values in figures.items():
        assert values.tobytes() == found[name].tobytes()
    assert again.cssr == fit.cssr


def test_a_fit_of_another_network_is_refused(tmp_path: Path) -> None:
    model, maps = of_cssr()
    cssr = CssrFit(model)
    with torch.no_grad():
        cssr.learn(model.head(maps), maps)
    cssr.finish_learning()
    write_fit(tmp_path / "fit", fit_scores(outputs(40, 0), None), cssr)
    with pytest.raises(ValueError, match="no fit of this network"):
        read_fit(tmp_path / "fit", build("classifier32-quarter", K, 16))
    torch.manual_seed(0)
    wider = build("classifier32-quarter", K, 16)
    put_head(wider, Reconstruction(K + 1, C, 4, 0.1, reciprocal=False))
    with pytest.raises(ValueError, match="no fit of this network"):
        read_fit(tmp_path / "fit", wider)


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    write_fit(path, fit_scores(outputs(60, 0), None))
    whole = bytearray(path.read_bytes())
    model = build("classifier32-quarter", K, 16)
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_fit(path, model)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged"):
        read_fit(path, model)


@pytest.mark.parametrize("change", [{"schema": 2}, {"k": None, "temperature": None}])
def test_other_versions_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "fit"
    write_fit(path, fit_scores(outputs(60, 0), None))
    tensors, meta = load_tensors(path)
    changed = {k: v for k, v in {**meta, **change}.items() if v is not None}
    save_tensors(path, tensors, changed)
    with pytest.raises(ValueError, match=r"another version|no fit of this network"):
        read_fit(path, build("classifier32-quarter", K, 16))
