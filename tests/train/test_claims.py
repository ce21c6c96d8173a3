"""What the methods claim of background: evidence, SSOD's samples, features side by side."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from backmix.pipeline.beton import open_set
from backmix.pipeline.subset import Subset
from backmix.train import claims
from backmix.train.claims import (
    Network,
    Seen,
    background_evidence,
    cell_means,
    class_evidence,
    coolest,
    embedding,
    open_network,
    pasted_features,
    ssod_locations,
    stored_images,
    surrogate_features,
)
from backmix.train.evaluate import evaluate
from backmix.train.image_sets import BetonImages
from backmix.train.models.heads import ReciprocalPoints, Reconstruction, linear_head
from backmix.train.options import (
    Arpl,
    BackMix,
    Cssr,
    EvaluateOptions,
    PreviewOptions,
    Softmax,
    Ssod,
)
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.preview import run_examples
from backmix.train.run import train
from tests.runs import tiny_run, tiny_set

METHODS = {
    "softmax": Softmax(),
    "ssod": Ssod(),
    "mix": BackMix(patch=20, fill="keep", host=Ssod()),
    "grey": BackMix(patch=20, mask="grey"),
    "arpl": Arpl(),
    "pcssr": Cssr(gamma=0.3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished and evaluated run of each method; classes c and d are unknown."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    data, test = tiny_set(root / "train.beton"), tiny_set(root / "test.beton", seed=1)
    found = {}
    for name, method in METHODS.items():
        run = tiny_run(data, root / name, method, model="classifier32-quarter", save_steps=0)
        run = replace(run, split=replace(run.split, known=("a", "b")))
        assert train(run, "test", []) == 0
        evaluate(run.out, EvaluateOptions(test=(test,), threads=1, device="cpu"))
        found[name] = run.out
    return found


def outputs(run: Path, name: str) -> Outputs:
    return load_outputs(run / "scores" / f"{name}.safetensors")


def seen(run: Path, name: str = "known", count: int = 99) -> tuple[Network, Seen]:
    network = open_network(run)
    return network, claims.look(network, stored_images(outputs(run, name), count))


# --- evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_evidence_of_a_linear_head_is_the_logit(bias: bool) -> None:
    torch.manual_seed(0)
    head, maps = nn.Linear(5, 3, bias=bias), torch.randn(4, 5, 2, 3)
    cells = class_evidence(head, maps)
    assert cells.shape == (4, 3, 2, 3)
    torch.testing.assert_close(cells.mean((2, 3)), head(maps.mean((2, 3))))


def test_the_mean_evidence_of_reciprocal_points_is_the_logit_but_for_the_common_term() -> None:
    torch.manual_seed(0)
    head, maps = ReciprocalPoints(3, 5), torch.randn(4, 5, 2, 3)
    common = maps.mean((2, 3)).square().mean(1, keepdim=True)
    torch.testing.assert_close(class_evidence(head, maps).mean((2, 3)) + common, head(maps))


def test_the_evidence_of_auto_encoders_makes_log_p() -> None:
    torch.manual_seed(0)
    head, maps = Reconstruction(3, 5, 2, 0.4, reciprocal=True), torch.randn(4, 5, 2, 3)
    p = class_evidence(head, maps).softmax(1).mean((2, 3))
    torch.testing.assert_close(p.log(), head(maps))


def test_another_head_has_no_evidence() -> None:
    with pytest.raises(ValueError, match="not defined for a Identity head"):
        class_evidence(nn.Identity(), torch.zeros(1, 2, 2, 2))


def test_evidence_by_hand() -> None:
    """Class 0 reads channel 1, class 1 channel 0; the prediction is class 1."""
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2).flip(0))
    model = nn.Module()
    model.head = head
    maps = torch.tensor([[[[9.0, 1.0], [2.0, 8.0]], [[0.0, 5.0], [1.0, 0.0]]]])
    logits = head(maps.mean((2, 3))).detach()
    shown = Seen(np.zeros((1, 4, 4, 3), np.uint8), np.array([0]), logits, maps)
    network = Network(None, model)  # type: ignore[arg-type]
    found = background_evidence(network, shown)
    # Of four cells the coolest quarter by class 1 is the one with 1, which class 0 gives 5.
    np.testing.assert_array_equal(found.cells[0], [[9, 5], [2, 8]])
    np.testing.assert_array_equal(found.background[0], [[False, True], [False, False]])
    assert found.of_background.tolist() == [5] and found.of_rest.tolist() == [9, 2, 8]
    assert found.largest.tolist() == [5]  # the mean of 9, 1, 2 and 8
    by_mask = background_evidence(network, shown, np.array([[[0.5, 0.1], [0.0, 0.0]]]))
    assert by_mask.of_background.tolist() == [2, 8]
    with pytest.raises(ValueError, match=re.escape("foreground has shape (1, 3, 3)")):
        background_evidence(network, shown, np.zeros((1, 3, 3)))


def test_coolest_cells_by_hand() -> None:
    heat = np.array([[[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]], [[0.0] * 3] * 2])
    found = coolest(heat, 0.5)
    assert found[0].tolist() == [[False, True, False], [True, False, True]]
    assert found[1].tolist() == [[True] * 3, [False] * 3]  # equal: the first
    assert coolest(heat, 0.01).sum((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_looked_at_as_it_was_judged(runs: dict[str, Path], method: str) -> None:
    for name in ("known", "unknown"):
        stored = outputs(runs[method], name)
        network, shown = seen(runs[method], name)
        np.testing.assert_allclose(shown.logits.numpy(), stored.logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(shown.labels, stored.labels)
        found = background_evidence(network, shown)
        assert found.cells.shape == (len(stored), 4, 4)
        assert (found.background.sum((1, 2)) == 4).all()
        assert np.isfinite(found.cells).all()


def test_stored_images_are_spread_over_the_set(runs: dict[str, Path]) -> None:
    stored = outputs(runs["softmax"], "known")
    some = stored_images(stored, 5)
    np.testing.assert_array_equal(some.subset.index, stored.index[[0, 4, 8, 12, 16]])
    np.testing.assert_array_equal(some.subset.labels, stored.labels[[0, 4, 8, 12, 16]])
    assert len(stored_images(stored, 10**6)) == len(stored) == 20


def test_images_that_moved_or_changed_or_lie_in_folders_are_named(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    stored = outputs(runs["softmax"], "known")
    for changed, said in (
        ({"files": (str(tmp_path / "gone.beton"),)}, "gone.beton is not there any more"),
        ({"files": (str(tmp_path),)}, "is a folder; this is measured on sets in .beton files"),
        ({"digest": "other"}, "test.beton is not what the run was judged on"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            stored_images(replace(stored, **changed), 5)


def test_true_foreground_comes_from_masks(runs: dict[str, Path], tmp_path: Path) -> None:
    stored = outputs(runs["softmax"], "known")
    images = stored_images(stored, 4)
    with open_set(images.files) as data:
        for sample in images.subset.index:
            mask = np.zeros((32, 32), np.uint8)
            mask[:8, : 8 if sample else 4] = 255
            path = tmp_path / Path(data.name(int(sample))).with_suffix(".png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
    shares = claims.true_foreground(tmp_path, images, (4, 4))
    assert shares[0, 0, 0] == 0.5 and shares[1, 0, 0] == 1 and shares.sum() == 3.5


# --- SSOD's samples -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [Ssod(), Ssod(gamma=0.6), Ssod(share=0.2), Ssod(gamma=0.55, require_correct=True)],
    ids=["gamma", "low gamma", "share", "correct"],
)
def test_the_samples_are_those_of_the_rule(runs: dict[str, Path], options: Ssod) -> None:
    network = open_network(runs["ssod"])
    other = replace(network.trained.options, method=options)
    network = replace(network, trained=replace(network.trained, options=other))
    with torch.no_grad():
        linear_head(network.model).weight.mul_(100)  # sure of something
    found = ssod_locations(network, 20)  # all there are
    p = found.p_true
    if options.share:
        ascending, count = np.sort(p.ravel()), int(options.share * p.size)
        known, unknown = p >= ascending[-count], p <= ascending[count - 1]
    else:
        known, unknown = p >= options.gamma, p <= 1 - options.gamma
    if options.require_correct:
        pooled = torch.from_numpy(found.features.mean((1, 2)))
        predicted = linear_head(network.model)(pooled).argmax(1).tolist()
        right = np.array([found.names[i] == "ab"[k] for i, k in enumerate(predicted)])
        assert 0 < right.sum() < 20 and unknown[~right].any()
        unknown &= right[:, None, None]
    assert known.any() and unknown.any()
    assert found.known.dtype == found.unknown.dtype == bool
    np.testing.assert_array_equal(found.known, known)
    np.testing.assert_array_equal(found.unknown, unknown)


def test_locations_are_those_of_the_network(runs: dict[str, Path]) -> None:
    found = ssod_locations(open_network(runs["ssod"]), 3)
    assert found.views.shape == (3, 32, 32, 3) and found.features.shape == (3, 4, 4, 32)
    assert set(found.names) <= {"a", "b"} and "at least 0.95" in found.rule
    model = open_network(runs["ssod"]).model
    cells = torch.from_numpy(found.features)
    p = model.head(cells).softmax(-1).detach().numpy()
    own = np.array([["a", "b"].index(name) for name in found.names])
    np.testing.assert_allclose(found.p_true, p[np.arange(3), :, :, own], atol=1e-5)
    assert model.rejection is not None and found.rejection is not None
    rejected = model.rejection(cells).detach().numpy()[..., 0]
    np.testing.assert_allclose(found.rejection, rejected, atol=1e-5)
    assert not (found.known & found.unknown).any()


def test_a_softmax_run_has_locations_but_no_rejection(runs: dict[str, Path]) -> None:
    found = ssod_locations(open_network(runs["softmax"]), 2)
    assert found.rejection is None and found.known.shape == (2, 4, 4)


def test_heads_without_a_rule_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="linear class head"):
        ssod_locations(open_network(runs["arpl"]), 2)


def test_training_data_that_have_gone_are_named(runs: dict[str, Path], tmp_path: Path) -> None:
    network = open_network(runs["ssod"])
    moved = replace(network.trained, files=(tmp_path / "gone.beton",))
    with pytest.raises(ValueError, match=r"training data: .*gone\.beton is not there"):
        ssod_locations(replace(network, trained=moved), 2)
    moved = replace(network.trained, files=(Path("gone.beton"),))
    with pytest.raises(ValueError, match=r"seen from .*where the run was called"):
        ssod_locations(replace(network, trained=moved), 2)
    other = replace(network.trained, digest="other")
    with pytest.raises(ValueError, match="is not what the run was trained on"):
        ssod_locations(replace(network, trained=other), 2)


# --- what stands in for the unknown ---------------------------------------------------------------


def test_pasted_pixels_are_those_that_the_mix_took_from_the_donor(runs: dict[str, Path]) -> None:
    examples = run_examples(runs["mix"], None, PreviewOptions(rows=20))
    pasted = examples.pasted
    changed = (examples.mixes != examples.targets).any(-1)
    # Fill is `keep`: nothing but the donor's pixels can differ, and random pixels mostly do.
    assert not (changed & ~pasted).any()
    assert changed[pasted].mean() > 0.9 and pasted.any((1, 2)).all()
    ty, tx, dy, dx = examples.patch[0, :4]
    y, x = np.argwhere(pasted[0])[0]
    want = examples.donors[0, y - ty + dy, x - tx + dx]
    np.testing.assert_array_equal(examples.mixes[0, y, x], want)


def test_the_map_of_a_donor_is_the_one_that_its_mask_is_read_from(runs: dict[str, Path]) -> None:
    examples = run_examples(runs["mix"], None, PreviewOptions(rows=20))
    assert examples.heat is not None
    assert examples.heat.min((1, 2)).tolist() == [0] * 20
    assert examples.heat.max((1, 2)).tolist() == [1] * 20
    for heat, masked in zip(examples.heat, examples.masked, strict=True):
        assert heat[masked].min() >= heat[~masked].max()
    assert run_examples(runs["grey"], None, PreviewOptions(rows=2)).heat is None


def test_features_of_pasted_cells(runs: dict[str, Path]) -> None:
    """The whole path once more by hand, with torch's own pooling."""
    network = open_network(runs["mix"])
    examples = run_examples(runs["mix"], None, PreviewOptions(rows=20))
    shares = nn.functional.avg_pool2d(torch.from_numpy(examples.pasted).float()[:, None], 8)[:, 0]
    std = torch.tensor(network.trained.augment.std)
    views = torch.from_numpy(examples.mixes).float() / std  # the mean is 0
    with torch.inference_mode():
        maps = network.model(views.permute(0, 3, 1, 2))[1]
    want = maps.permute(0, 2, 3, 1)[shares >= 0.5].numpy()
    assert len(want) > 5
    np.testing.assert_allclose(pasted_features(network, 20), want, rtol=1e-4, atol=1e-5)


def test_cells_that_divide_no_pixel_evenly() -> None:
    pixels = np.arange(5 * 7, dtype=float).reshape(1, 5, 7)
    means = cell_means(pixels, (2, 3))
    # Rows 0..2 and 3..4, columns 0..2, 3..4 and 5..6, by (y * cells) // H.
    want = [[pixels[0, a, b].mean() for b in (slice(0, 3), slice(3, 5), slice(5, 7))]
            for a in (slice(0, 3), slice(3, 5))]  # fmt: skip
    np.testing.assert_allclose(means[0], want)


def test_what_stands_in_for_the_unknown(runs: dict[str, Path]) -> None:
    features, what = surrogate_features(open_network(runs["mix"]), 7)
    assert features.shape == (7, 32) and what == "cells of pasted background"
    with pytest.raises(ValueError, match="no cells of pasted background were found"):
        surrogate_features(open_network(runs["grey"]), 7)
    with pytest.raises(ValueError, match="linear class head"):
        surrogate_features(open_network(runs["pcssr"]), 7)


def test_a_layout_by_hand() -> None:
    """Known images point north or east, unknown ones south, surrogates too; lengths say nothing."""
    rng = np.random.default_rng(0)

    def around(angle: float, count: int, length: float) -> np.ndarray:
        angles = angle + rng.uniform(-0.05, 0.05, count)
        return length * np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)

    known = np.concatenate([around(0, 20, 1), around(np.pi / 2, 20, 5)])
    unknown, surrogate = around(-np.pi / 2, 20, 3), around(-np.pi / 2, 20, 40)
    found = embedding(known, unknown, surrogate)
    assert found.nearer == {"known": 0.0, "unknown": 1.0}
    assert found.explained == pytest.approx(1)  # the third channel is empty
    for points in (found.pca, found.tsne):
        assert {kind: len(value) for kind, value in points.items()} == {
            "known": 40,
            "unknown": 20,
            "surrogate": 20,
        }
        # Unknown and surrogate ones lie together, away from the known ones.
        near = np.linalg.norm(points["unknown"].mean(0) - points["surrogate"].mean(0))
        far = np.linalg.norm(points["unknown"].mean(0) - points["known"].mean(0))
        assert near < far / 2
    # One known image among the surrogates is nearer to them than to any other known image.
    strange = embedding(np.concatenate([known, unknown[:1]]), unknown, surrogate)
    assert strange.nearer["known"] == pytest.approx(1 / 41)
    again = embedding(known, unknown, surrogate)
    np.testing.assert_array_equal(found.tsne["known"], again.tsne["known"])
    alone = embedding(known, unknown, None)
    assert alone.nearer == {} and set(alone.pca) == {"known", "unknown"}


def test_features_that_cannot_be_laid_out_are_refused() -> None:
    one, two = np.ones((1, 3)), np.ones((2, 3))
    with pytest.raises(ValueError, match="two known and two unknown"):
        embedding(two, one, None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        embedding(two, np.full((2, 3), np.nan), None)


def test_a_set_by_another_name_is_looked_at(runs: dict[str, Path]) -> None:
    """`look` needs no evaluation: any images of a .beton will do."""
    network = open_network(runs["softmax"])
    stored = outputs(runs["softmax"], "known")
    subset = Subset(np.array([3]), np.array([-1]))
    images = BetonImages("x", "unknown", tuple(map(Path, stored.files)), stored.digest, subset)
    shown = claims.look(network, images)
    assert shown.views.shape == (1, 32, 32, 3) and shown.labels.tolist() == [-1]
