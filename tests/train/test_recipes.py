"""The ImageNet recipes against the published configurations, and what the list of recipes says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backmix.pipeline.options import size_at
from backmix.train.cli import run
from backmix.train.models.build import build
from backmix.train.optim import learning_rate, make_optimizer
from backmix.train.options import BackMix, Cssr, Softmax, Ssod, host_of
from backmix.train.recipes import METHOD_ROWS, RECIPES, listed

# ffcv-imagenet's files rn18_configs/ and rn50_configs/: epochs, start_ramp, end_ramp; the other
# values are the same in all files of a network.
PUBLISHED = ((16, 11, 13), (24, 17, 20), (32, 23, 27), (40, 29, 34), (56, 41, 48), (88, 65, 76))
NETWORKS = {
    "rn18": {"model": "resnet18", "batch": 1 * 1024, "lr": 0.5, "weight_decay": 5e-5},
    "rn50": {"model": "resnet50", "batch": 8 * 512, "lr": 1.7, "weight_decay": 1e-4},
}


def published_size(epoch: int, start: int, end: int) -> int:
    """The script's own rule, from 160 to 192."""
    if epoch <= start:
        return 160
    if epoch >= end:
        return 192
    return int(np.round(np.interp([epoch], [start, end], [160, 192])[0] / 32)) * 32


def published_rates(epochs: int, steps: int, peak: float) -> list[float]:
    """The script's own rule: between the rates of an epoch's two ends, linearly."""
    ends = np.interp(np.arange(epochs + 1), [0, 2, epochs], [1e-4 * peak, peak, 0])
    each = [np.interp(np.arange(steps), [0, steps], ends[e : e + 2]) for e in range(epochs)]
    return list(np.concatenate(each))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("epochs", "start", "end"), PUBLISHED)
def test_an_imagenet_recipe_is_the_published_one(
    network: str, epochs: int, start: int, end: int
) -> None:
    recipe = RECIPES[f"imagenet-{network}-{epochs}-softmax"]()
    values = NETWORKS[network]
    assert (recipe.epochs, recipe.model, recipe.loader.batch) == (
        epochs,
        values["model"],
        values["batch"],
    )
    optim = recipe.optim
    assert (optim.kind, optim.momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (optim.weight_decay, optim.decay) == (values["weight_decay"], "ffcv")
    assert (optim.label_smoothing, optim.clip, recipe.blurpool) == (0.1, 0, True)
    assert (recipe.loader.crop, recipe.loader.scale) == ("random", (0.08, 1.0))
    assert recipe.augment.flip and recipe.augment.pad == 0 and recipe.augment.pool == "none"
    assert recipe.loader.eval_crop == 224 / 256
    np.testing.assert_allclose(recipe.augment.mean, 255 * np.array([0.485, 0.456, 0.406]))
    np.testing.assert_allclose(recipe.augment.std, 255 * np.array([0.229, 0.224, 0.225]))
    sizes = [size_at(recipe.loader, epoch) for epoch in range(epochs)]
    assert sizes == [published_size(epoch, start, end) for epoch in range(epochs)]
    assert sizes[0] == 160 and sizes[-1] == 192
    rates = [
        learning_rate(
            optim.schedule,
            step,
            peak=optim.lr,
            steps=5 * epochs,
            steps_per_epoch=5,
            warmup=optim.warmup,
        )
        for step in range(5 * epochs)
    ]
    np.testing.assert_allclose(rates, published_rates(epochs, 5, values["lr"]), rtol=1e-12)


def test_what_decays_in_resnet50_is_what_the_published_script_decays() -> None:
    recipe = RECIPES["imagenet-rn50-16-softmax"]()
    model = build("resnet50", 1000, 192)
    optimizer = make_optimizer(
        model.named_parameters(),
        lr=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        decay=recipe.optim.decay,
    )
    counts = {
        group["weight_decay"]: sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    }
    # By hand: two values a channel of bn1 of the stem and of bn1, bn2, bn3 of 3, 4, 6, 3 blocks.
    spared = 2 * (64 + sum(n * (w + w + 4 * w) for n, w in ((3, 64), (4, 128), (6, 256), (3, 512))))
    assert counts == {0.0: spared, 1e-4: 25_557_032 - spared}


@pytest.mark.parametrize("base", ["imagenet-rn18-16", "imagenet-rn50-88", "imagenet-finetune"])
def test_every_method_but_arpl_cs_is_there_at_equal_training(base: str) -> None:
    plain = RECIPES[f"{base}-softmax"]()
    assert isinstance(plain.method, Softmax)
    for name, _, method in METHOD_ROWS:
        if "arpl-cs" in name:
            assert f"{base}-{name}" not in RECIPES
            continue
        made = RECIPES[f"{base}-{name}"]()
        assert type(made.method) is type(method)
        assert replace(made, method=plain.method, optim=plain.optim) == plain
        host = host_of(made.method)
        assert type(host) is type(host_of(method))
        smoothing = 0.0 if isinstance(host, Cssr) else plain.optim.label_smoothing
        assert made.optim == replace(plain.optim, label_smoothing=smoothing)
        if isinstance(made.method, BackMix):
            assert made.method.patch == plain.loader.size // 2
        if isinstance(host, Ssod):
            assert host.share == 0.1  # gamma is out of reach of smoothed labels
        if isinstance(host, Cssr):
            assert host.gamma == (0.025 if plain.model == "resnet50" else 0.1)


def test_the_rejection_head_alone_keeps_the_network() -> None:
    recipe = RECIPES["imagenet-ssod-head"]()
    assert isinstance(recipe.method, Ssod) and recipe.method.train == "head"
    assert recipe.model == RECIPES["imagenet-finetune-ssod"]().model == "resnet50"


def test_fine_tuning_without_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(tmp_path / "x.beton"), "--out", str(tmp_path / "run")]
    assert run(["train", "imagenet-finetune-backmix", *argv]) == 1
    assert "begins with weights that are there: add --init" in capsys.readouterr().err
    assert run(["train", "imagenet-ssod-head", *argv]) == 1
    assert "add --init RUN" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_list_names_every_recipe_once_and_stays_short() -> None:
    before, alone = listed()
    methods = [name for name, _, _ in METHOD_ROWS]
    bases = {base: [base] for base in before}
    for network in NETWORKS:
        bases[f"imagenet-{network}-N"] = [f"imagenet-{network}-{e}" for e, _, _ in PUBLISHED]
    named = {f"{base}-{m}" for members in bases.values() for base in members for m in methods}
    assert set(RECIPES) <= named | set(alone) and not named & set(alone)
    assert set(before) == set(bases) and len(before) + len(alone) < 25
    for text in (*before.values(), *alone.values()):
        assert text.endswith(".") and len(text) <= 85, text
