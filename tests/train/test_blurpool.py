"""BlurPool against its definition written out, on our networks and on a library's own classes."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from backmix.train.methods.build import build_network
from backmix.train.models.blurpool import add_blurpool
from backmix.train.models.build import build
from tests.runs import tiny_run

KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


def blurred(images: Tensor) -> Tensor:
    """Blur every channel of every image by itself, with zeros around, in float64."""
    planes = images.detach().double().numpy()
    done = [[ndimage.correlate(p, KERNEL, mode="constant") for p in image] for image in planes]
    return torch.from_numpy(np.array(done))


def published(model: nn.Module) -> int:
    """Put a blur before the strided convolutions as ffcv's script does: a module around each.

    Returns how many there are.
    """

    class Around(nn.Module):
        def __init__(self, inner: nn.Conv2d):
            super().__init__()
            self.conv = inner
            kernel = torch.from_numpy(KERNEL).to(inner.weight)
            self.register_buffer("filter", kernel.expand(inner.in_channels, 1, 3, 3).clone())

        def forward(self, x: Tensor) -> Tensor:
            kernel = self.get_buffer("filter")
            return self.conv(F.conv2d(x, kernel, None, 1, (1, 1), 1, self.conv.in_channels))

    found = 0
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Conv2d) and np.max(child.stride) > 1 and child.in_channels >= 16:
            setattr(model, name, Around(child))
            found += 1
        else:
            found += published(child)
    return found


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "height", "width"),
    [
        (16, 3, 2, 1, 9, 12),
        (24, 1, 2, 1, 8, 8),  # a shortcut
        (32, 3, 2, 4, 7, 7),  # grouped, as ResNeXt has it
        (32, 3, 2, 32, 6, 5),  # depthwise
        (16, 3, (2, 1), 1, 6, 6),
    ],
)
def test_a_strided_convolution_reads_the_blur_written_out(
    channels, kernel, stride, groups, height, width
):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 32, kernel, stride, padding=kernel // 2, groups=groups)
    ).double()
    images = torch.randn(2, channels, height, width, dtype=torch.float64)
    expected = model(blurred(images))
    add_blurpool(model)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18-cifar", "wrn40-4"])
def test_a_network_and_its_gradients_are_those_of_the_published_form(name):
    torch.manual_seed(1)
    side = 64 if name in ("resnet18", "resnet50") else 16
    ours = build(name, 5, side).double()
    theirs = copy.deepcopy(ours)
    add_blurpool(ours)
    # Strided 3 x 3 convolutions and their shortcuts, but not the stem: three stages of each.
    assert published(theirs) == {"wrn40-4": 4}.get(name, 6)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    for model in (ours, theirs):
        logits, features = model(images)
        (logits.square().sum() + features.square().mean()).backward()
    torch.testing.assert_close(ours(images), theirs(images))
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, mine), (other, its) in pairs:
        assert other.replace(".conv.", ".", 1) == name or other == name
        torch.testing.assert_close(mine.grad, its.grad, msg=name)


def test_weights_fit_with_and_without_and_names_stay():
    torch.manual_seed(2)
    plain, other = build("resnet18", 4, 64).eval(), build("resnet18", 4, 64).eval()
    names = list(other.state_dict())
    parameters = [name for name, _ in other.named_parameters()]
    add_blurpool(other)
    assert list(other.state_dict()) == names == list(plain.state_dict())
    assert [name for name, _ in other.named_parameters()] == parameters
    other.load_state_dict(plain.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.allclose(plain(images)[0], other(images)[0], atol=1e-3)
    back = build("resnet18", 4, 64).eval()
    back.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(back(images)[0], plain(images)[0])


def test_a_copy_blurs_too_and_moves_with_its_dtype():
    torch.manual_seed(3)
    model = build("resnet18", 4, 64).eval()
    add_blurpool(model)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images))
    assert copy.deepcopy(model).double()(images.double())[0].dtype == torch.float64


def test_channels_last_stays_and_changes_nothing():
    torch.manual_seed(4)
    model = build("resnet18", 4, 64).eval()
    add_blurpool(model)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)[1]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = model(images.contiguous(memory_format=torch.channels_last))[1]
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_autocast_rounds_the_blur_once():
    torch.manual_seed(5)
    convolution = nn.Conv2d(16, 16, 1, 2, bias=False)
    model = nn.Sequential(convolution)
    add_blurpool(model)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(16)[:, :, None, None])
    images = torch.randn(2, 16, 9, 9).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        shown = model(images)
    assert shown.dtype == torch.bfloat16
    assert torch.equal(shown, blurred(images)[:, :, ::2, ::2].bfloat16())


def test_it_compiles_without_a_graph_break():
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, 2), nn.Conv2d(16, 8, 1, 2)
    )
    add_blurpool(model)
    images = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(model)(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)


def test_a_librarys_own_convolution_keeps_its_forward_pass(torchvision):
    """timm's Conv2dSame pads as TensorFlow does: it is blurred, and still does."""
    layers = pytest.importorskip("timm.layers", reason="timm is not installed: not run")
    torch.manual_seed(7)
    model = nn.Sequential(layers.Conv2dSame(16, 8, 3, 2)).double()
    images = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    expected = model(blurred(images))
    add_blurpool(model)
    torch.testing.assert_close(model(images), expected)
    assert type(model[0]) is layers.Conv2dSame


def test_a_network_without_strided_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"--blurpool: .* nothing to blur: leave it out"):
        add_blurpool(nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.Conv2d(64, 64, 3)))


def test_a_run_asks_for_it_by_its_option():
    run = replace(tiny_run(Path("x"), Path("y")), model="resnet18-cifar")
    models = []
    for blurpool in (False, True):
        torch.manual_seed(8)
        models.append(build_network(replace(run, blurpool=blurpool), 3).eval())
    plain, blurs = models
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(plain(images)[0], blurs(images)[0], atol=1e-3)
    add_blurpool(plain)
    assert torch.equal(plain(images)[0], blurs(images)[0])
