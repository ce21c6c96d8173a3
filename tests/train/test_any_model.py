"""Networks of other people: what the probe finds, what the maps say, training, files in and out."""

import copy
import json
import math
import os
import pickle
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from backmix.pipeline.options import LoaderOptions
from backmix.train import loop
from backmix.train.check import check
from backmix.train.methods.build import build_network
from backmix.train.models import fit, libraries
from backmix.train.models.any import AnyModel, any_model, tapped
from backmix.train.models.heads import CellSums, cam_inputs
from backmix.train.models.weights import begin_with
from backmix.train.options import Arpl, BackMix, Cssr, Method, Run, Softmax, Ssod
from backmix.train.prepare import begin, prepare_run
from backmix.train.run import train
from backmix.train.trained import load_model
from bench.model_maps import measure, table
from tests import nets
from tests.runs import tiny_run, tiny_set

ROOT = Path(__file__).resolve().parents[2]
K = 5

EXACT = [
    ("timm/resnet18", 64, "NCHW"),
    ("timm/resnetv2_18", 64, "NCHW"),  # its classifier is a 1 x 1 convolution
    ("timm/regnetx_002", 64, "NCHW"),
    ("timm/efficientnet_b0", 64, "NCHW"),
    ("timm/densenet121", 64, "NCHW"),
    ("timm/swin_tiny_patch4_window7_224", 64, "NHWC"),
    ("timm/mixer_s32_224", 96, "tokens"),
    ("torchvision/resnet18", 64, "NCHW"),
    ("torchvision/densenet121", 64, "NCHW"),
    ("torchvision/shufflenet_v2_x0_5", 64, "NCHW"),
    ("torchvision/googlenet", 64, "NCHW"),
    ("tests.nets:plain", 32, "NCHW"),
    ("tests.nets:dropped", 32, "NCHW"),
    ("tests.nets:swin", 32, "NHWC"),
    ("tests.nets:mixer", 32, "tokens"),
    ("tests.nets:mean_token", 32, "tokens"),
]
LOCAL = [
    ("timm/mobilenetv3_small_100", 64),
    ("timm/mobilenetv4_conv_small", 64),
    ("timm/convnextv2_atto", 64),
    ("timm/efficientvit_b0", 64),
    ("timm/caformer_s18", 64),
    ("tests.nets:convnext", 32),
]
NONE = [
    ("timm/vit_tiny_patch16_224", 64, "class token"),
    ("timm/deit_tiny_distilled_patch16_224", 64, "not that of one linear layer"),
    ("tests.nets:max_pooled", 32, "pools its last map by the maximum"),
    ("tests.nets:flattened", 32, "flattens its last map"),
    ("tests.nets:class_token", 32, "class token"),
    ("tests.nets:two_heads", 32, "not that of one linear layer"),
    ("timm/test_resnet", 32, "one cell of an image of this size"),
]


@pytest.fixture(autouse=True)
def libraries_at_hand(torchvision: ModuleType) -> None:
    pytest.importorskip("timm", reason="timm is not installed: not run")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


def unsettled(model: AnyModel) -> AnyModel:
    """Give norms statistics and weights as training does; fresh ones hide what they do."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn(module.weight.shape, generator=generator))
                if module.bias is not None:
                    module.bias.add_(0.3 * torch.randn(module.bias.shape, generator=generator))
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean += 0.2 * torch.randn(module.weight.shape, generator=generator)
                module.running_var *= torch.rand(module.weight.shape, generator=generator) + 0.5
        if isinstance(model.head, nn.Linear) and not model.head.weight.any():
            nn.init.normal_(model.head.weight)
    return model


def made(name: str, size: int) -> tuple[AnyModel, Tensor]:
    """A network with seeded weights, and images."""
    torch.manual_seed(0)
    return unsettled(any_model(name, K, size)).eval(), torch.randn(3, 3, size, size)


def weight_and_bias(model: AnyModel) -> tuple[Tensor, Tensor]:
    """The classifier's parameters, from the library's own module."""
    assert model.parts.classifier is not None
    classifier = model.net.get_submodule(model.parts.classifier)
    weight, bias = classifier.weight, classifier.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return weight.flatten(1), bias


@pytest.mark.parametrize(("name", "size", "layout"), EXACT)
@torch.no_grad()
def test_exact_maps_average_to_the_logits(name: str, size: int, layout: str) -> None:
    model, images = made(name, size)
    assert model.maps == "exact" and model.parts.spot is not None
    assert model.parts.spot.layout == layout
    logits, features = model(images)
    torch.testing.assert_close(logits, model.net(images), rtol=0, atol=0)
    weight, bias = weight_and_bias(model)
    maps = torch.einsum("kc,ncyx->nkyx", weight, features)
    torch.testing.assert_close(maps.mean((2, 3)) + bias, logits, rtol=1e-4, atol=1e-4)
    assert tuple(features.shape[2:]) == model.grid(size) > (1, 1)
    assert model.fidelity(images) == 1.0
    seen, weights = cam_inputs(model.head, features)
    torch.testing.assert_close(torch.einsum("kc,ncyx->nkyx", weights, seen), maps)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/efficientnet_b0", "timm/regnetx_002"])
@torch.no_grad()
def test_exact_maps_are_what_timm_calls_features(name: str) -> None:
    model, images = made(name, 64)
    features = model(images)[1]
    torch.testing.assert_close(features, model.net.forward_features(images))  # type: ignore[operator]
    # Its own head on one cell says the map's value there: the local head of an exact network.
    weight, bias = weight_and_bias(model)
    cell = model.net.forward_head(features[:, :, :1, 1:])  # type: ignore[operator]
    torch.testing.assert_close(cell, features[:, :, 0, 1] @ weight.T + bias, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nhwc_maps_lie_as_the_image_does() -> None:
    """Rows are rows: a change in the upper right corner moves the upper right cells most."""
    for name in ("tests.nets:swin", "tests.nets:mean_token"):
        model, images = made(name, 32)
        changed = images.clone()
        changed[:, :, :8, 24:] += 3
        moved = (model(changed)[1] - model(images)[1]).abs().sum((0, 1))
        assert divmod(int(moved.argmax()), moved.shape[1]) == (0, moved.shape[1] - 1)


@pytest.mark.parametrize(("name", "size"), LOCAL)
@torch.no_grad()
def test_local_maps_are_the_networks_own_head_at_each_cell(name: str, size: int) -> None:
    """Up to one constant per image and class, by which their mean is the logit."""
    model, images = made(name, size)
    assert model.maps == "local"
    logits, features = model(images)
    weight, bias = weight_and_bias(model)
    maps = torch.einsum("kc,ncyx->nkyx", weight, features) + bias[:, None, None]
    torch.testing.assert_close(maps.mean((2, 3)), logits, rtol=1e-3, atol=1e-4)

    network: Any = model.net
    raw = network.forward_features(images)
    if name == "timm/efficientvit_b0":  # its head begins with a convolution of the map
        raw = network.head.in_conv(raw)
        head = nn.Sequential(network.head.global_pool, network.head.classifier)
    else:
        head = network.forward_head
    grid = raw.shape[2:]
    local = torch.stack(
        [head(raw[:, :, y : y + 1, x : x + 1]) for y in range(grid[0]) for x in range(grid[1])], 2
    )
    move = logits - local.mean(2)
    expected = local + move[:, :, None]
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-3, atol=2e-4)
    found = float(np.corrcoef(local.mean(2).flatten(), logits.flatten())[0, 1])
    assert model.fidelity(images) == pytest.approx(found, abs=1e-3)
    assert move.abs().max() > 1e-4 and found < 1 - 1e-9  # the test could see a move


@pytest.mark.parametrize(("name", "size", "why"), NONE)
@torch.no_grad()
def test_what_has_no_map_says_why_and_can_be_trained_with_softmax(
    name: str, size: int, why: str, data: Path
) -> None:
    model, images = made(name, size)
    assert model.maps == "none" and model.grid(size) == (1, 1)
    assert why in model.why_not
    logits, features = model(images)
    torch.testing.assert_close(logits, model.net(images))
    if isinstance(model.head, nn.Linear):  # what the classifier reads
        torch.testing.assert_close(model.head(features[:, :, 0, 0]), logits)
    else:
        assert isinstance(model.head, CellSums)
        torch.testing.assert_close(features[:, :, 0, 0], logits)
    run = tiny_run(data, Path("unused"), Softmax(), model=name, loader=LoaderOptions(size=size))
    for method in (BackMix(patch=8), Ssod(), Cssr()):
        with pytest.raises(ValueError, match=rf"--model {name} has no map that says .*{why}"):
            build_network(replace(run, method=method), K)
    pasting = replace(run, method=BackMix(patch=8, mask="none"))
    assert not fit.needs_map(pasting) and build_network(pasting, K).grid(size) == (1, 1)


def test_two_heads_have_no_place_for_another(data: Path) -> None:
    run = tiny_run(data, Path("unused"), Arpl(), model="tests.nets:two_heads")
    with pytest.raises(ValueError, match="one linear layer that gives the logits"):
        build_network(run, K)


@torch.no_grad()
def test_a_norm_that_does_nothing_yet_is_no_exact_map() -> None:
    torch.manual_seed(0)
    model = any_model("tests.nets:normed", K, 32)
    assert model.maps == "local" and [layer.module for layer in model.parts.tail] == ["layers"]
    assert not model.net.layers[0].running_mean.any()  # type: ignore[index, union-attr]
    assert (model.net.layers[0].weight == 1).all()  # type: ignore[index, union-attr]


def test_probing_changes_nothing() -> None:
    for name in ("tests.nets:widened", "tests.nets:two_heads", "timm/test_resnet"):
        torch.manual_seed(0)
        before = libraries.make_network(name, K, 64).state_dict()
        torch.manual_seed(0)
        model = any_model(name, K, 64)
        drawn = torch.get_rng_state()
        assert model.grid(64) <= model.grid(128)
        assert torch.equal(torch.get_rng_state(), drawn)
        after = model.net.state_dict()
        assert before.keys() == after.keys() and model.training
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_tail_sees_no_batch_and_drops_nothing() -> None:
    """In training the cells pass BatchNorm as in evaluation, and count for no statistics."""
    torch.manual_seed(0)
    model = unsettled(any_model("tests.nets:widened", K, 32))
    assert model.maps == "local"
    images = torch.randn(8, 3, 32, 32)
    network: Any = model.net
    norm = network.layers[1]
    counted = int(norm.num_batches_tracked)
    features = model(images)[1]
    assert int(norm.num_batches_tracked) == counted + 1 and norm.training
    torch.manual_seed(1)
    model.train()
    network.body.eval()  # the same maps twice
    first, again = model(images)[1], model(images)[1]
    assert features.shape == (8, 24, 8, 8)
    # The statistics moved between the two calls by the network's own pass alone.
    assert first.shape == again.shape and not torch.equal(first, again)
    norm.momentum = 0.0
    torch.testing.assert_close(model(images)[1], model(images)[1], rtol=0, atol=0)
    model.maps_in_training = False
    assert model(images)[1].shape == (8, 24, 1, 1)
    assert model.eval()(images)[1].shape == (8, 24, 8, 8)


def test_fidelity_of_a_head_that_treats_cells_otherwise_is_low(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = any_model("tests.nets:far_from_linear", K, 32)
    fidelity = model.fidelity(torch.randn(16, 3, 32, 32))
    assert model.maps == "local" and not fidelity >= 0.9
    run = tiny_run(data, tmp_path / "run", epochs=1, model="tests.nets:far_from_linear")
    with pytest.raises(ValueError, match=r"fidelity \S+ with the weights .* --approximate-cam"):
        train(run, "test", [])
    assert train(replace(run, approximate_cam=True), "test", []) == 0
    config = json.loads((run.out / "config.json").read_text())["network"]
    assert config["maps"] == "local" and not config["fidelity"] >= 0.95
    assert train(replace(run, out=tmp_path / "s", method=Softmax()), "test", []) == 0


def test_the_fidelity_in_config_is_that_of_the_training_images_and_first_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(data, tmp_path / "run", epochs=1, model="tests.nets:convnext", quiet=False)
    assert train(run, "test", []) == 0
    found = json.loads((run.out / "config.json").read_text())["network"]
    assert found["tail"] == ["head.norm"] and found["map"]["layout"] == "NCHW"
    said = re.search(r"local maps by head.norm, fidelity ([\d.]+)", capsys.readouterr().err)
    assert said and float(said[1]) == pytest.approx(found["fidelity"], abs=1e-3)
    _, state, loader = prepare_run(replace(run, out=tmp_path / "other"), "test", [])
    with loader:
        batch = next(iter(loader.batches(state.place)))
    mean, std = (torch.tensor(v) for v in (run.augment.mean, run.augment.std))
    views = (batch.pool[batch.rows].float() - mean) / std
    assert isinstance(state.model, AnyModel)
    again = state.model.fidelity(views.permute(0, 3, 1, 2))
    assert found["fidelity"] == pytest.approx(again, abs=0.02)  # 16 of the images


def test_maps_with_a_channel_per_class_are_their_own_head() -> None:
    model, images = made("torchvision/squeezenet1_1", 64)
    with torch.no_grad():
        logits, features = model(images)
        assert model.maps == "exact" and features.shape == (3, K, 3, 3)
        torch.testing.assert_close(features.mean((2, 3)), logits)
        maps, weights = cam_inputs(model.head, features)
        torch.testing.assert_close(torch.einsum("kc,ncyx->nkyx", weights, maps), features)


FRAMES = ["plain", "widened", "swin", "mean_token", "class_token"]


@pytest.mark.parametrize("name", FRAMES)
def test_whole_graphs_compile(name: str) -> None:
    torch.manual_seed(0)
    model = any_model(f"tests.nets:{name}", K, 32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(4, 3, 32, 32)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        grads, expected = [], None
        for run, owner in ((model, model), (compiled, other)):
            owner.zero_grad()
            logits, features = run(images)
            (logits.square().sum() + features.square().sum()).backward()
            grads.append([p.grad for p in owner.parameters()])
            assert all(p is not None for p in grads[-1])
            if run is model:
                expected = logits, features
        torch.testing.assert_close((logits, features), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["plain", "swin", "convnext", "widened", "mixer"])
def test_autocast_and_channels_last_give_the_same_maps(name: str) -> None:
    model, images = made(f"tests.nets:{name}", 32)
    with torch.inference_mode():
        logits, features = model(images)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.autocast("cpu", torch.bfloat16):
            rough, rounded = model(images.contiguous(memory_format=torch.channels_last))
    assert rounded.shape == features.shape
    torch.testing.assert_close(rounded.float(), features, rtol=0.1, atol=0.1)
    torch.testing.assert_close(rough.float(), logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["plain", "swin", "convnext", "class_token"])
def test_a_deep_copy_is_a_network_of_its_own(name: str) -> None:
    model, images = made(f"tests.nets:{name}", 32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images)
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        changed = other(images)
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
        assert not torch.equal(changed[1], before[1])
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(images), before, rtol=0, atol=0)
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))


def test_layers_that_are_replaced_are_hooked_again() -> None:
    model, images = made("torchvision/shufflenet_v2_x0_5", 64)
    with torch.no_grad():
        expected = model(images)
        other = libraries.make_network("torchvision/shufflenet_v2_x0_5", K, 64).conv5
        other.load_state_dict(model.net.conv5.state_dict())  # type: ignore[union-attr, operator]
        model.net.conv5 = other.eval()  # type: ignore[union-attr, operator]
        with pytest.raises(AssertionError):  # the map is its output
            model(images)
        torch.testing.assert_close(model.train().eval()(images), expected)
        model.train()
        assert len(other._forward_hooks) == 1  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def test_synchronised_batchnorm_loses_neither_activation_nor_hook() -> None:
    for name in ("timm/test_efficientnet", "tests.nets:normed"):
        model, images = made(name, 64)
        expected = model(images)
        libraries.synchronise_batchnorm(model)
        assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in model.modules())
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", ["timm/test_resnet", "tests.nets:swin", "tests.nets:convnext"])
@pytest.mark.parametrize(
    "method",
    [
        Softmax(),
        BackMix(patch=12, fill="keep", cam_source="mix"),
        Ssod(),
        BackMix(patch=12, host=Ssod()),
        Arpl(),
        Cssr(latent=8),
    ],
    ids=["softmax", "backmix", "ssod", "backmix-ssod", "arpl", "cssr"],
)
def test_every_method_trains_every_kind(name: str, method: Method, data: Path) -> None:
    size = 64 if name.startswith("timm/") else 32
    loader = LoaderOptions(batch=16, group=8, threads=1, loader="turbo", size=size)
    run = tiny_run(data, Path("unused"), method, model=name, loader=loader, approximate_cam=True)
    _, state, reader = prepare_run(run, "test", [])
    with reader:
        autocast = torch.autocast("cpu", enabled=False)
        for number, step in enumerate(loop.steps(state, reader, run, autocast)):
            assert torch.isfinite(step.loss)
            if number == 1:
                break
    idle = [name for name, p in state.model.named_parameters() if p.grad is None]
    assert idle == [] and int(state.void_steps) == 0
    if isinstance(method, BackMix):
        bank = state.method.tensors()["bank"]
        assert bank.shape[1:] == state.model.grid(size)
        assert ((bank != 0.5).flatten(1).any(1)).sum() >= 32  # two batches have left maps


def test_the_bank_learns_the_map_of_the_own_class(data: Path) -> None:
    """Of a swin: min-max scaled per image, as a formula of its own says."""
    method = BackMix(patch=12, cam_source="raw", rate=1.0)
    run = tiny_run(data, Path("unused"), method, model="tests.nets:swin")
    run = replace(run, optim=replace(run.optim, lr=0.0))
    _, state, reader = prepare_run(run, "test", [])
    with reader:
        first = next(iter(reader.batches(state.place)))
        next(iter(loop.steps(state, reader, run, torch.autocast("cpu", enabled=False))))
    mean, std = (torch.tensor(v) for v in (run.augment.mean, run.augment.std))
    views = ((first.pool[first.rows].float() - mean) / std).permute(0, 3, 1, 2)
    assert isinstance(state.model, AnyModel)
    with torch.no_grad():
        net = state.model.net.eval()
        features = net.forward_features(views)  # type: ignore[operator]
        weight = net.get_classifier().weight  # type: ignore[operator, union-attr]
        heat = torch.einsum("nyxc,nc->nyx", features, weight[first.labels])
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    bank = state.method.tensors()["bank"][first.index]
    torch.testing.assert_close(bank.float(), (heat - low) / (high - low), rtol=0.01, atol=0.01)


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = LoaderOptions(batch=16, group=8, threads=1, loader="turbo", size=64)
    method = BackMix(patch=24, host=Ssod(), fill="keep")
    run = tiny_run(data, tmp_path / "a", method, model="timm/test_resnet", loader=loader, epochs=2)
    assert train(run, "test", []) == 0
    other, real, taken = replace(run, out=tmp_path / "b"), loop.take_step, [0]

    def stopped(*arguments: object) -> Tensor:
        taken[0] += 1
        if taken[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "take_step", stopped)
    assert [train(other, "test", []), train(other, "test", [])] == [75, 0]
    for name in ("model.safetensors", "heads.safetensors", "log.jsonl"):
        assert (other.out / name).read_bytes() == (run.out / name).read_bytes()
    ends = [sorted((r.out / "checkpoints").iterdir())[-1].read_bytes() for r in (run, other)]
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Finished runs by network."""
    torch.set_num_threads(1)
    loader = LoaderOptions(batch=16, group=8, threads=1, loader="turbo", size=64)
    runs = {}
    for name, method in (
        ("timm/test_resnet", BackMix(patch=24, host=Ssod())),
        ("torchvision/shufflenet_v2_x0_5", Ssod()),
        ("classifier32-half", Ssod()),
        ("timm/regnetx_002", Arpl()),
    ):
        out = tmp_path_factory.mktemp("runs") / "run"
        size = (
            LoaderOptions(batch=16, group=8, threads=1) if name == "classifier32-half" else loader
        )
        runs[name] = tiny_run(data, out, method, model=name, loader=size, epochs=1)
        assert train(runs[name], "test", []) == 0
    return runs


def test_a_program_that_a_run_names_is_imported_only_on_demand(data: Path, tmp_path: Path) -> None:
    """Of a stranger's run folder no code is run; nor is another program than the one named."""
    run = tiny_run(data, tmp_path / "run", Softmax(), epochs=1, model="tests.nets:plain")
    assert train(run, "test", []) == 0
    for program in ("", "tests.nets:swin"):
        with pytest.raises(ValueError, match=r"if you trust it, add --model tests\.nets:plain"):
            load_model(run.out, program)
    assert load_model(run.out, "tests.nets:plain").training is False


def test_timm_takes_the_weights_of_a_run_as_they_are(finished: dict[str, Run]) -> None:
    import timm

    out = finished["timm/test_resnet"].out
    file = str(out / "model.safetensors")
    theirs = timm.create_model("test_resnet", num_classes=4, checkpoint_path=file).eval()
    model = load_model(out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images)[0], rtol=1e-4, atol=1e-5)
    with safetensors.safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    assert about["format"] == "pt" and about["arch"] == "test_resnet"
    assert about["num_classes"] == "4"
    beside = safetensors.torch.load_file(out / "heads.safetensors")
    assert beside.keys() == {"rejection.weight", "rejection.bias"}
    assert model.rejection is not None
    torch.testing.assert_close(model.rejection.weight, beside["rejection.weight"])


def test_torchvision_takes_the_weights_of_a_run_as_they_are(
    finished: dict[str, Run], torchvision: ModuleType
) -> None:
    out = finished["torchvision/shufflenet_v2_x0_5"].out
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    theirs.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = load_model(out)(images)[0]
        torch.testing.assert_close(theirs.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_the_rejection_head_of_our_own_networks_lies_beside_them(finished: dict[str, Run]) -> None:
    out = finished["classifier32-half"].out
    names = safetensors.torch.load_file(out / "model.safetensors").keys()
    assert "head.weight" in names and not any(name.startswith("rejection") for name in names)
    model = load_model(out)
    beside = safetensors.torch.load_file(out / "heads.safetensors")
    assert model.rejection is not None
    assert torch.equal(model.rejection.weight, beside["rejection.weight"])


def test_timm_takes_the_body_under_another_head(finished: dict[str, Run]) -> None:
    import timm

    out = finished["timm/regnetx_002"].out
    file = str(out / "model.safetensors")
    body = timm.create_model("regnetx_002", num_classes=0, checkpoint_path=file).eval()
    model = load_model(out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = model(images)
        torch.testing.assert_close(body(images), features.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.head(features), logits)
    beside = safetensors.torch.load_file(out / "heads.safetensors")
    assert beside.keys() == {"method_head.points", "method_head.radius"}


def fresh(
    data: Path, name: str, init: Path | None, **changes: object
) -> tuple[AnyModel, list[str]]:
    """The network that a run begins with, and what is said about its weights."""
    loader = LoaderOptions(batch=16, group=8, threads=1, loader="turbo", size=64)
    run = tiny_run(data, Path("unused"), Softmax(), model=name, init=init, loader=loader)
    _, state, reader = prepare_run(replace(run, **changes), "test", [])  # type: ignore[arg-type]
    with reader:
        said = begin(state, replace(run, **changes)).said  # type: ignore[arg-type]
    assert isinstance(state.model, AnyModel)
    return state.model, said


@pytest.mark.parametrize("kind", ["bare", "wrapped", "parallel", "safetensors"])
def test_files_of_other_programs_are_begun_with(kind: str, data: Path, tmp_path: Path) -> None:
    """A head of 1,000 classes stays fresh, as the run's seed draws it."""
    import timm

    torch.manual_seed(5)
    theirs = timm.create_model("test_resnet", num_classes=1000)
    weights = {name: value for name, value in theirs.state_dict().items() if "tracked" not in name}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    match kind:
        case "bare":
            torch.save(theirs.state_dict(), path)
        case "wrapped":
            torch.save({"epoch": 3, "state_dict": weights, "optimizer": {"lr": 0.1}}, path)
        case "parallel":
            named = {f"module._orig_mod.{name}": value for name, value in weights.items()}
            torch.save({"model": named}, path)
        case "safetensors":
            safetensors.torch.save_file(theirs.state_dict(), path)
    untouched, _ = fresh(data, "timm/test_resnet", None)
    model, said = fresh(data, "timm/test_resnet", path)
    assert any("left fresh: fc.weight ([1000, 96] there, [4, 96] here), fc.bias" in s for s in said)
    for name, value in model.net.state_dict().items():
        if "tracked" not in name:
            owner = untouched.net.state_dict() if name.startswith("fc.") else weights
            assert torch.equal(value, owner[name]), name


def test_runs_of_the_same_network_are_begun_with(
    finished: dict[str, Run], data: Path, tmp_path: Path
) -> None:
    """The rejection head of a run of SSOD too, and by softmax it is left out."""
    before = finished["timm/test_resnet"]
    run = replace(before, out=tmp_path / "run", method=Ssod(train="head"), init=before.out)
    _, state, reader = prepare_run(run, "test", [])
    with reader:
        begin(state, run)
    theirs = load_model(before.out).state_dict()
    assert all(torch.equal(theirs[n], v) for n, v in state.model.state_dict().items())
    model, said = fresh(data, "timm/test_resnet", before.out)
    assert torch.equal(model.state_dict()["net.fc.weight"], theirs["net.fc.weight"])
    assert not any("left" in line for line in said)


def test_what_does_not_fit_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("test_resnet", num_classes=4).state_dict()
    path = tmp_path / "w.pt"

    def refused(weights: object, pattern: str, **options: object) -> None:
        torch.save(weights, path)
        with pytest.raises(ValueError, match=pattern):
            fresh(data, "timm/test_resnet", path, **options)

    some = {name: value for name, value in weights.items() if not name.startswith("layer4.")}
    refused(some, r"w\.pt does not fit the network: lacks layer4\.0\.bn1\.bias|lacks layer4")
    refused({**weights, "conv1.0.weight": torch.zeros(2)}, r"conv1\.0\.weight is \[2\], the netw")
    refused({"epoch": 3}, r"holds the keys epoch, and no weights by name")
    refused([1, 2], r"no weights by name")
    head = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    refused(head, r"lacks fc\.weight", method=Ssod(train="head"))
    torch.save({**weights, "aux.weight": torch.zeros(2)}, path)
    assert "left over: aux.weight" in fresh(data, "timm/test_resnet", path)[1][0]


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_file_is_unpickled(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for write in (lambda v: torch.save(v, path), lambda v: path.write_bytes(pickle.dumps(v))):
        write({"state_dict": {}, "trap": Trap(tmp_path / "sprung")})
        with pytest.raises(ValueError, match=r"w\.pt is damaged, or holds more than weights"):
            fresh(data, "timm/test_resnet", path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"w\.pt is damaged"):
        fresh(data, "timm/test_resnet", path)
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_holds_itself_or_odd_tensors_is_refused(tmp_path: Path) -> None:
    model, path = tapped(nets.plain(K), 32), tmp_path / "w.pt"
    weights = model.net.state_dict()
    round_and_round: dict[str, object] = {"a": torch.zeros(1)}
    round_and_round["model"] = round_and_round
    torch.save(round_and_round, path)
    with pytest.raises(ValueError, match="does not fit the network"):
        begin_with(model, path)
    name = "classifier.weight"
    for odd in (weights[name].to("meta"), weights[name].to_sparse(), weights[name] * 1j):
        torch.save({**weights, name: odd}, path)
        with pytest.raises(ValueError, match=rf"{name} is sparse, quantised, complex or without"):
            begin_with(model, path)


def test_heads_of_another_width_stay_fresh_where_no_single_layer_gives_the_logits(
    tmp_path: Path,
) -> None:
    path = tmp_path / "w.pt"
    torch.save(nets.two_heads(K + 1).state_dict(), path)
    model = tapped(nets.two_heads(K), 32)
    [said] = begin_with(model, path)
    assert "left fresh: " in said and "other.weight ([6, 16] there, [5, 16] here)" in said
    weights = nets.two_heads(K).state_dict()
    torch.save({n: v for n, v in weights.items() if n != "body.0.weight"}, path)
    with pytest.raises(ValueError, match=r"lacks body\.0\.weight"):
        begin_with(model, path)


def test_a_convolution_that_classifies_counts_as_a_trained_head(data: Path, tmp_path: Path) -> None:
    """BackMix fills its bank before the first step where a head was trained before."""
    path = tmp_path / "w.pt"
    torch.save(any_model("timm/resnetv2_18", 4, 64).net.state_dict(), path)
    loader = LoaderOptions(batch=16, group=8, threads=1, loader="turbo", size=64)
    run = tiny_run(data, Path("unused"), model="timm/resnetv2_18", init=path, loader=loader)
    for given, trained in ((run, True), (replace(run, init=None), False)):
        _, state, reader = prepare_run(given, "test", [])
        with reader:
            assert begin(state, given).head is trained


def test_networks_that_would_turn_their_views_want_them_turned(torchvision: ModuleType) -> None:
    """With its weights torchvision's GoogLeNet takes ImageNet's normalisation, ours does not."""
    network = any_model("torchvision/googlenet", K, 64).net.eval()
    published = libraries.published_views("torchvision/googlenet", network)
    assert published is not None
    pixels = 255 * torch.rand(2, 3, 64, 64)
    read: list[Tensor] = []
    network.conv1.register_forward_pre_hook(lambda _, given: read.append(given[0]))  # type: ignore[operator, union-attr]

    def shown(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """What the first layer reads of pixels that are normalised so."""
        per_channel = [torch.tensor(values)[:, None, None] for values in (mean, std)]
        network((pixels - per_channel[0]) / per_channel[1])
        return read[-1]

    ours = shown(published.mean, published.std)
    network.transform_input = True  # type: ignore[assignment]
    theirs = shown((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_every_head_of_published_weights_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's distilled transformers have two."""
    make = libraries._timm_network

    def offline(name: str, classes: int, size: int, *, pretrained: bool) -> nn.Module:
        return make(name, classes, size, pretrained=False)

    monkeypatch.setattr(libraries, "_timm_network", offline)
    name = "timm/deit_tiny_distilled_patch16_224"
    weights = libraries.published_weights(name, K, 64)
    assert "norm.weight" in weights and not any(n.startswith("head") for n in weights)


def test_a_tuple_in_training_is_refused_in_words() -> None:
    model = any_model("tests.nets:returns_a_tuple_in_training", K, 32)
    with pytest.raises(ValueError, match="returns a tuple in training"):
        model.train()(torch.randn(2, 3, 32, 32))


def test_own_networks_take_a_head_of_another_width_as_fresh(tmp_path: Path) -> None:
    from backmix.train.models.build import build

    torch.manual_seed(0)
    safetensors.torch.save_file(
        build("classifier32-half", 7, 32).state_dict(), tmp_path / "w.safetensors"
    )
    model = build("classifier32-half", 4, 32)
    head = model.head.weight.clone()  # type: ignore[union-attr]
    said = begin_with(model, tmp_path / "w.safetensors")
    assert "left fresh: head.weight ([7, 64] there, [4, 64] here)" in said[0]
    assert torch.equal(model.head.weight, head)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=r"head\.weight is \[7, 64\], the network's \[4, 64\]"):
        begin_with(model, tmp_path / "w.safetensors", head=True)


def test_published_weights_of_torchvision_come_through_its_own_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision: ModuleType
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save(theirs, file)
    model, said = fresh(data, "torchvision/shufflenet_v2_x0_5", None, pretrained=True)
    assert torch.equal(model.net.state_dict()["conv5.0.weight"], theirs["conv5.0.weight"])
    assert model.net.fc.weight.shape == (4, 1024)  # type: ignore[union-attr]
    assert "left fresh: fc.weight ([1000, 1024] there" in said[0]
    # tiny_run normalises as CIFAR-10 does; torchvision as ImageNet.
    assert "--augment.mean 123.675 116.28 103.53 --augment.std 58.395 57.12 57.375" in said[1]
    assert "224 pixels" in said[1]
    from backmix.train.options import Augment

    right = Augment(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    _, said = fresh(data, "torchvision/shufflenet_v2_x0_5", None, pretrained=True, augment=right)
    assert len(said) == 1


def test_published_weights_of_timm_come_through_its_own_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg("test_resnet")
    assert config is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"the weights of timm/test_resnet cannot be had here"):
        fresh(data, "timm/test_resnet", None, pretrained=True)
    home = tmp_path / f"models--timm--{config.architecture}.{config.tag}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    folder = home / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    theirs = timm.create_model("test_resnet").state_dict()
    safetensors.torch.save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    untouched, _ = fresh(data, "timm/test_resnet", None)
    model, said = fresh(data, "timm/test_resnet", None, pretrained=True)
    found = model.net.state_dict()
    assert torch.equal(found["layer4.0.conv1.weight"], theirs["layer4.0.conv1.weight"])
    assert torch.equal(found["fc.weight"], untouched.net.state_dict()["fc.weight"])
    assert "left fresh: fc.weight, fc.bias" in said[0]


def test_pretrained_wants_a_library(data: Path) -> None:
    run = tiny_run(data, Path("unused"), Softmax(), model="classifier32", pretrained=True)
    with pytest.raises(ValueError, match=r"--pretrained .* is classifier32: .* --init FILE"):
        check(run)
    with pytest.raises(ValueError, match="--pretrained and --init"):
        check(replace(run, model="timm/resnet18", init=Path("x.pt")))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("timm/resnet_18", r"timm 1\S+ has no network 'resnet_18'; the nearest are .*resnet18"),
        ("torchvision/reznet50", r"torchvision \S+ has no network .* nearest are .*resnet50"),
        ("torchvision/fasterrcnn_resnet50_fpn", r"has no network"),
        ("timm/resnet18.nope", r"Invalid pretrained tag .* There are .*resnet18\.a1_in1k"),
        ("tests.nets:has_a_typo", r"does not take images of 50 x 50 pixels: KeyError: 'maen'"),
        ("keras/resnet50", r"are named timm/NAME, torchvision/NAME or MODULE:CALLABLE"),
        ("no.such:thing", r"there is no module no, neither installed nor in .*PYTHONPATH"),
        ("tests.no_nets:plain", r"there is no module tests.no_nets"),
        ("tests.nets:plan", r"tests.nets has no plan; the nearest are plain"),
        ("tests.nets:K", r"has no K"),
        ("tests.nets:not_a_network", r"returned a int, not a torch.nn.Module"),
        ("tests.nets:broken", r"KeyError: 'no weights for 5 classes' \(.*nets\.py, line \d+\)"),
        ("tests.nets:leaves", r"called with 5: SystemExit: usage: nets\.py 5 \(.*nets\.py, line"),
        ("tests.nets:wants_two", r"must take the number of classes as its only argument: missing"),
        ("tests.nets:wrong_width", r"gives 6 logits, but there are 5 classes"),
        ("tests.nets:returns_a_tuple", r"must return logits \[n, K\] .* returned a tuple"),
        ("tests.nets:swin", r"tests.nets:swin does not take images of 50 x 50 pixels: "),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_explained(name: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        any_model(name, K, 50)


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_a_missing_package_is_answered_with_the_line_that_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = rf"{missing} is not installed here .* pip install 'backmix\[timm\]'"
    with pytest.raises(ValueError, match=line):
        any_model("timm/resnet18", K, 32)


def test_a_network_made_elsewhere_is_tapped() -> None:
    torch.manual_seed(0)
    network = nets.plain(3)
    model = tapped(network, 32)
    assert model.net is network and model.classes == 3 and math.prod(model.grid(48)) == 144
    logits, features = model(torch.randn(2, 3, 48, 48))
    assert logits.shape == (2, 3) and features.shape == (2, 16, 12, 12)
    with pytest.raises(ValueError, match="does not take images of 8 x 8"):
        tapped(nets.swin(3), 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_says_what_is_measured() -> None:
    """Every sixth row of docs/models.md with images of 128 px; in `make soak` all rows."""
    page = (ROOT / "docs" / "models.md").read_text().splitlines()
    found = (re.match(r"\| `((?:timm|torchvision)/\S+)` \| (\d+) \|", line) for line in page)
    rows = [match for match in found if match]
    assert len(rows) > 60
    if os.environ.get("HYPOTHESIS_PROFILE") != "soak":
        rows = [row for row in rows if row[2] == "128"][::6]
    for row in rows:
        given = row.string.split(" | ")
        measured = table([measure(row[1], int(row[2]))]).splitlines()[-1].split(" | ")
        assert given[:3] + given[4:] == measured[:3] + measured[4:]
        if given[3].strip():
            assert float(given[3]) == pytest.approx(float(measured[3]), abs=0.02)
