import pytest
import torch
from torch import nn

from backmix.train.models import build as models
from backmix.train.models.heads import linear_head
from backmix.train.models.wrn import WideBlock

# Parameters and multiply-adds of one forward pass, worked by hand from the layer tables.
# name, classes, size, parameters, multiply-adds, channels and side of the map
TABLE = [
    ("classifier32", 6, 32, 999_872, 164.6e6, 128, 4),
    ("classifier32", 20, 64, 1_001_664, 658e6, 128, 8),
    ("classifier32-half", 6, 32, 251_104, 41.6e6, 64, 4),
    ("classifier32-quarter", 6, 32, 63_344, 10.6e6, 32, 4),
    ("resnet18-cifar", 6, 32, 11_171_910, 555e6, 512, 4),
    ("resnet18-cifar", 20, 64, 11_179_092, 2.22e9, 512, 8),
    ("wrn40-4", 6, 32, 8_947_798, 1.30e9, 256, 8),
    ("resnet18", 1000, 224, 11_689_512, 1.82e9, 512, 7),
    ("resnet50", 1000, 224, 25_557_032, 4.09e9, 2048, 7),
]


def multiply_adds(model: nn.Module, size: int) -> int:
    """Count the products of all convolutions and linear layers for one image, by hooks."""
    counted = []

    def count(module, _, output):
        if isinstance(module, nn.Conv2d):
            products = module.weight[0].numel()  # a product for every weight of one output channel
            counted.append(output.numel() * products)
        elif isinstance(module, nn.Linear):
            counted.append(module.weight.numel())

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize(("name", "classes", "size", "parameters", "products", "c", "g"), TABLE)
def test_every_model_has_the_published_size(name, classes, size, parameters, products, c, g):
    model = models.build(name, classes, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds(model, size) == pytest.approx(products, rel=0.005)
    assert model.head.weight.shape == (classes, c)
    assert model.grid(size) == (g, g)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("size", [33, 50, 64])
def test_class_activation_maps_are_exact_and_as_large_as_the_grid_says(name, size):
    model = models.build(name, 5, size).eval()
    head = linear_head(model)
    with torch.inference_mode():
        logits, features = model(torch.randn(2, 3, size, size))
        assert tuple(features.shape[2:]) == model.grid(size)
        # The mean of the class activation map of class k is logit k, up to the bias.
        cam = torch.einsum("kc,nchw->nkhw", head.weight, features)
        bias = 0 if head.bias is None else head.bias
        torch.testing.assert_close(cam.mean((2, 3)) + bias, logits, rtol=1e-4, atol=1e-4)


def test_every_parameter_of_every_model_is_trained():
    for name in models.NAMES:
        model = models.build(name, 3, 64)
        logits, _ = model(torch.randn(2, 3, 64, 64))
        logits.square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_equal_torchvisions_with_the_same_weights(name, torchvision):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name)
    torch.manual_seed(0)
    ours = models.build(name, 1000, 64)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    # Drawn alike, too: the same seed gives the same weights.
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        for training in (True, False):
            logits, _ = ours.train(training)(images)
            torch.testing.assert_close(logits, theirs.train(training)(images), rtol=1e-4, atol=1e-4)


def test_classifier32_drops_whole_colour_channels_of_the_input():
    model = models.build("classifier32", 6, 32)
    seen = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()(torch.ones(400, 3, 32, 32))
    images = seen[0]
    values = images[:, :, 0, 0]
    assert torch.equal(images, values[:, :, None, None].expand_as(images))
    assert sorted(set(values.flatten().tolist())) == [0.0, 1.25]
    # 1200 channels dropped with probability 0.2: five standard deviations are 0.058.
    assert abs((values == 0).double().mean().item() - 0.2) < 0.058
    assert sum(isinstance(module, nn.Dropout2d) for module in model.modules()) == 3


def test_classifier32_starts_from_the_published_distributions():
    torch.manual_seed(0)
    model = models.build("classifier32", 6, 32)
    kernels = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d)])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    gains = torch.cat([m.weight for m in norms])
    # Five standard errors of a mean and of a standard deviation of 997,056 and 1,024 draws.
    assert abs(kernels.mean()) < 2.5e-4 and abs(kernels.std() - 0.05) < 1.8e-4
    assert abs(gains.mean() - 1) < 3.2e-3 and abs(gains.std() - 0.02) < 2.3e-3
    assert all((m.bias == 0).all() for m in norms)
    assert [m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 9


def test_wrn_block_feeds_the_raw_input_to_both_branches_where_the_width_changes():
    model = models.build("wrn40-4", 6, 32).eval()
    blocks = [m for m in model.modules() if isinstance(m, WideBlock)]
    assert len(blocks) == 18
    first_of_stage_2 = blocks[6]
    x = torch.randn(2, 64, 8, 8)
    with torch.inference_mode():
        normalised = torch.nn.functional.batch_norm(
            first_of_stage_2.conv1(x), torch.zeros(128), torch.ones(128)
        )
        inner = first_of_stage_2.conv2(torch.nn.functional.leaky_relu(normalised, 0.1))
        assert first_of_stage_2.shortcut is not None
        expected = inner + first_of_stage_2.shortcut(x)
        torch.testing.assert_close(first_of_stage_2(x), expected)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.001}


def test_an_unknown_model_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r"'resnet19'.*classifier32, .*resnet50"):
        models.build("resnet19", 6, 32)


def test_a_map_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="one cell of an image of 32 x 32"):
        models.build("resnet18", 6, 32)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        models.build("classifier32", 1, 32)
