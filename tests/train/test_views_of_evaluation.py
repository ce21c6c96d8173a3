"""`backmix evaluate --size` and `--flip`: what is stored is what the formula says, and is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from backmix.pipeline.beton import open_beton
from backmix.pipeline.options import LoaderOptions
from backmix.train.evaluate import evaluate
from backmix.train.judge import table
from backmix.train.methods.build import build_network
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.options import Arpl, Augment, Cssr, EvaluateOptions, Method, Run, Softmax, Ssod
from backmix.train.outputs import Outputs, load_outputs
from backmix.train.run_folder import as_document
from backmix.train.scores import odin
from backmix.train.scores.cssr import CssrFit
from tests.runs import SIDE, tiny_images, write_set

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)


def make_run(folder: Path, method: Method | None = None, **loader: object) -> tuple[Run, Model]:
    """Make a finished run of random weights on classes a and b of four, and its test file."""
    images, labels = tiny_images(20, 4, seed=3)
    test = write_set(folder / "test.beton", images, labels, ["a", "b", "c", "d"])
    out = folder / "run"
    out.mkdir()
    run = Run(
        data=(test,),
        out=out,
        model="classifier32-quarter",
        loader=LoaderOptions(**{"size": SIDE, **loader}),  # type: ignore[arg-type]
        augment=Augment(mean=MEAN, std=STD),
        method=method or Softmax(),
    )
    with open_beton(test) as data:
        digest = data.digest
    document = {
        "run": as_document(run),
        "resolved": {},
        "classes": ["a", "b"],
        "known": [0, 1],
        "data": {"files": [str(test)], "digest": digest, "samples": 10},
    }
    (out / "config.json").write_text(json.dumps(document))
    torch.manual_seed(4)
    model = build_network(run, 2)
    for module in model.modules():  # drawn so small that every logit would be as good as 0
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    safetensors.torch.save_file(model.state_dict(), out / "model.safetensors")
    return run, model.eval()


def judge(run: Run, **options: object) -> tuple[dict, Outputs]:
    """Evaluate on the run's own file; return metrics.json and the stored known set."""
    asked = replace(EvaluateOptions(test=run.data, batch=4, threads=1), **options)  # type: ignore[arg-type]
    document = evaluate(run.out, asked)
    assert json.loads((run.out / "metrics.json").read_text()) == document
    return document, load_outputs(run.out / "scores" / "known.safetensors")


def normalised(pixels: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def known_pixels() -> np.ndarray:
    images, labels = tiny_images(20, 4, seed=3)
    return images[labels < 2]


def both(model: Model) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return views, logits and maps of the known images, and of images mirrored in NumPy."""
    shown = [normalised(known_pixels()), normalised(known_pixels()[:, :, ::-1])]
    with torch.inference_mode():
        return [(views, *model(views)) for views in shown]


def close(stored: np.ndarray, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    assert expected.abs().mean() > 1e-2
    np.testing.assert_allclose(stored, expected.numpy(), rtol=rtol, atol=1e-5)


def test_flip_averages_logits_and_features_of_the_two_images(tmp_path: Path) -> None:
    run, model = make_run(tmp_path)
    document, known = judge(run, flip=True)
    (_, z, f), (_, mirrored, g) = both(model)
    close(known.logits, (z + mirrored) / 2)
    close(known.features, (f + g).mean((2, 3)) / 2)
    assert not np.allclose(z, mirrored, atol=1e-2)
    assert document["views"] == {"size": SIDE, "flip": True}
    assert "averaged over each view and its mirror image" in table(document)
    _, plain = judge(run)
    close(plain.logits, z)


def test_the_unknown_images_are_averaged_too_and_cues_are_not_changed(tmp_path: Path) -> None:
    run, model = make_run(tmp_path)
    document, _ = judge(run, flip=True)
    unknown = load_outputs(run.out / "scores" / "unknown.safetensors")
    images, labels = tiny_images(20, 4, seed=3)
    with torch.inference_mode():
        z = [model(normalised(images[labels >= 2][:, :, ::k]))[0] for k in (1, -1)]
    close(unknown.logits, (z[0] + z[1]) / 2)
    flipped = document["unknown"]["unknown"]["cues"]
    plain = judge(run)[0]["unknown"]["unknown"]["cues"]
    for cue in ("brightness", "contrast", "sharpness"):
        assert flipped[cue] == plain[cue]


def test_flip_averages_the_rejection_logit(tmp_path: Path) -> None:
    run, model = make_run(tmp_path, Ssod())
    _, known = judge(run, flip=True)
    assert model.rejection is not None
    with torch.inference_mode():
        said = [model.rejection(maps.mean((2, 3))).squeeze(1) for _, _, maps in both(model)]
    close(known.extras["rejection"], (said[0] + said[1]) / 2)
    close(known.scores["ssod"], (said[0] + said[1]) / 2)


def test_flip_averages_the_logits_of_reciprocal_points(tmp_path: Path) -> None:
    run, model = make_run(tmp_path, Arpl())
    _, known = judge(run, flip=True)
    (_, z, _), (_, mirrored, _) = both(model)
    close(known.logits, (z + mirrored) / 2)
    close(known.scores["arpl"], ((z + mirrored) / 2).amax(1))


def test_flip_averages_odin_of_the_two_images(tmp_path: Path) -> None:
    run, model = make_run(tmp_path)
    _, known = judge(run, flip=True, odin=True)
    said = [odin(lambda x: model(x)[0], views.clone(), STD) for views, _, _ in both(model)]
    close(1000 * known.extras["odin"], 500 * (said[0] + said[1]))  # T = 1000 makes it small


def test_flip_averages_cssrs_figures_each_of_its_own_prediction(tmp_path: Path) -> None:
    run, model = make_run(tmp_path, Cssr())
    assert isinstance(model.head, Reconstruction)
    _, known = judge(run, flip=True, fit=True)
    sides = both(model)
    fit = CssrFit(model)
    for _, logits, maps in sides:  # the run's training images are those of its test file
        fit.learn(logits, maps)
    fit.finish_learning()
    said = [fit.figures(logits, maps) for _, logits, maps in sides]
    for name in ("cssr_s0", "cssr_s1", "cssr_s2"):
        close(known.extras[name], (said[0][name] + said[1][name]) / 2, rtol=1e-3)


def test_another_size_resizes_the_same_crop(tmp_path: Path) -> None:
    """Second formula: Pillow's bilinear filter, which is antialiased, too."""
    run, model = make_run(tmp_path)
    document, known = judge(run, size=16)
    small = np.array(
        [
            np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BILINEAR))
            for p in known_pixels()
        ]
    )
    with torch.inference_mode():
        expected = model(normalised(small))[0]
    close(known.logits, expected)
    assert document["views"] == {"size": 16, "flip": False}
    assert "views of 16 pixels; the run was trained on views of 32" in table(document)


def test_a_centre_crop_keeps_its_share_at_another_size(tmp_path: Path) -> None:
    """At twice its size the centre half is the middle 16 pixels, shown at 16."""
    run, model = make_run(tmp_path, crop="random", eval_crop=0.5)
    _, known = judge(run, size=16)
    with torch.inference_mode():
        expected = model(normalised(known_pixels()[:, 8:24, 8:24]))[0]
    close(known.logits, expected)


def test_the_runs_own_size_is_no_news(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    document, asked = judge(run, size=SIDE)
    plain, usual = judge(run)
    assert document == plain and np.array_equal(asked.logits, usual.logits)
    assert plain["views"] == {"size": SIDE, "flip": False}
    assert not any("views" in note or "mirror" in note for note in plain["notes"])


@pytest.mark.parametrize("size", [-1, 20_000])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: int) -> None:
    run, _ = make_run(tmp_path)
    with pytest.raises(ValueError, match=f"--size must be 1 to 16384 pixels, got {size}"):
        judge(run, size=size)


def test_views_that_the_network_does_not_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a transformer with as many positions as it was trained with."""
    run, model = make_run(tmp_path)
    kind = type(model)
    forward: Any = kind.forward

    def fixed(self: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.shape[2] == SIDE, "Input height (64) doesn't match model (32).\nat line 3"
        return forward(self, images)

    monkeypatch.setattr(kind, "forward", fixed)
    with pytest.raises(ValueError, match=r"--size 64: .* takes no such views \(Input height") as e:
        judge(run, size=64)
    assert "line 3" not in str(e.value)
    judge(run)
