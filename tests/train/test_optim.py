import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backmix.train import optim
from backmix.train.check import check
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.models.build import build
from backmix.train.options import Augment, Softmax
from backmix.train.run import train as start
from tests.runs import tiny_run, tiny_set


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def train(optimizer: torch.optim.Optimizer, model: nn.Module, rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_sgd_equals_the_formula_written_out(nesterov, decay):
    model = small_model()
    weights = [p.detach().double().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    rates = [0.1, 0.05, 0.2, 0.01]
    for step, rate in enumerate(rates):
        for w, b, g in zip(weights, buffers, gradients(model, step), strict=True):
            g = g.double() + (0.01 * w if decay == "all" or w.ndim > 1 else 0)
            b.mul_(0.9).add_(g)
            w.sub_(rate * (g + 0.9 * b if nesterov else b))

    optimizer = optim.make_optimizer(
        model.named_parameters(), lr=0.1, nesterov=nesterov, weight_decay=0.01, decay=decay
    )
    train(optimizer, model, rates)
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_adam_equals_the_formula_written_out():
    model = small_model()
    weights = [p.detach().double().clone() for p in model.parameters()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    rates = [0.01, 0.001, 0.02]
    for step, rate in enumerate(rates):
        rows = zip(weights, first, second, gradients(model, step), strict=True)
        for w, m, v, g in rows:
            g = g.double()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            w.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))

    train(optim.make_optimizer(model.named_parameters(), kind="adam", lr=1.0), model, rates)
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_decays_as_torchs_own_does(kind):
    """Second form: torch's plain loop, one group for each parameter."""
    model, other = small_model(), small_model()
    rates = [0.01, 0.001, 0.02]
    form = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    groups = [
        {"params": [p], "weight_decay": 0.3 if p.ndim > 1 else 0.0} for p in other.parameters()
    ]
    reference = form(groups, lr=1.0, foreach=False, fused=False)
    for step, rate in enumerate(rates):
        for parameter, gradient in zip(other.parameters(), gradients(other, step), strict=True):
            parameter.grad = gradient
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    ours = optim.make_optimizer(model.named_parameters(), kind=kind, lr=1.0, weight_decay=0.3)
    train(ours, model, rates)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_masked_step_of_adamw_decays_nothing():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.make_optimizer(
        model.named_parameters(), kind="adamw", lr=0.1, weight_decay=0.5
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
        assert float(optimizer.state[parameter]["step"]) == 0


def test_ffcv_decays_by_name_not_by_shape():
    """By hand, for torchvision's names: what the published script's test for "bn" lets through."""
    model = build("resnet18", 4, 64)
    optimizer = optim.make_optimizer(
        model.named_parameters(), lr=0.1, weight_decay=5e-5, decay="ffcv"
    )
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-5, 0.0}
    spared = {name for name, p in model.named_parameters() if id(p) not in decayed}
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    norms = ["bn1", *(f"{block}.bn{k}" for block in blocks for k in (1, 2))]
    assert spared == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    named = dict(model.named_parameters())
    for name in ("layer2.0.downsample.1.weight", "layer4.0.downsample.1.bias", "fc.bias"):
        assert id(named[name]) in decayed


def test_a_masked_first_step_leaves_parameters_and_buffers_untouched():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.make_optimizer(model.named_parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
        assert (optimizer.state[parameter]["momentum_buffer"] == 0).all()


def test_frozen_parameters_are_left_out():
    model = small_model()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    optimizer = optim.make_optimizer(model.named_parameters(), lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(p is frozen for p in held)
    assert len(held) == len(list(model.parameters())) - 1


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameters"):
        optim.make_optimizer([], lr=0.1)


def test_nesterov_without_momentum_is_an_error():
    with pytest.raises(ValueError, match="momentum above 0"):
        optim.make_optimizer(small_model().named_parameters(), lr=0.1, momentum=0.0, nesterov=True)


def test_the_rate_drops_at_the_first_step_of_a_milestone_epoch():
    # 469 steps an epoch, 100 epochs, as the published open-set runs have it.
    rates = [optim.stepped(step, 469, 0.1, [30, 60, 90]) for step in range(100 * 469)]
    for epoch, expected in ((0, 0.1), (29, 0.1), (30, 0.01), (60, 1e-3), (90, 1e-4), (99, 1e-4)):
        first, last = epoch * 469, epoch * 469 + 468
        assert rates[first] == rates[last] == pytest.approx(expected)


def test_linear_by_hand():
    # 20 steps, warm-up over 4: 1/5 .. 4/5, then 16/16 .. 1/16.
    rates = [optim.linear(step, 20, 1.0, 0.2) for step in range(20)]
    assert rates == pytest.approx([k / 5 for k in range(1, 5)] + [k / 16 for k in range(16, 0, -1)])


def test_cosine_by_hand():
    # 10 steps, warm-up over 2: 1/3, 2/3, then (1 + cos(pi k / 8)) / 2; half the peak in the middle.
    rates = [optim.cosine(step, 10, 2.0, 0.2) for step in range(10)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[6] == pytest.approx(1.0)
    assert rates[4] + rates[8] == pytest.approx(2.0)  # cos(pi/4) = -cos(3 pi/4)


def test_cyclic_equals_interpolation_epoch_by_epoch():
    # Second formula: the published one interpolates inside each epoch between the ends' rates.
    peak, epochs, per_epoch = 1.7, 16, 7
    ends = np.interp(np.arange(epochs + 1), [0, 2, epochs], [1e-4 * peak, peak, 0])
    expected = [
        np.interp(i, [0, per_epoch], ends[epoch : epoch + 2])
        for epoch in range(epochs)
        for i in range(per_epoch)
    ]
    steps = epochs * per_epoch
    rates = [optim.cyclic(step, steps, per_epoch, peak) for step in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(11, 0.3), (100, 0.25), (7, 0.0), (50, 1.0), (40, 0.02), (1, 0.3)]
)
def test_onecycle_is_torchs_scheduler(steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.7, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    expected = []
    for step in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    rates = [
        optim.learning_rate(
            "onecycle", step, peak=0.7, steps=steps, steps_per_epoch=3, warmup=warmup
        )
        for step in range(steps)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_onecycle_where_torchs_divides_by_zero():
    # The rise ends with the first step: it is the peak.
    rates = [optim.onecycle(step, 10, 1.0, 0.1) for step in range(10)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    assert optim.onecycle(0, 1, 1.0, 1.0) == 1.0


def logged(run: Path) -> list[float]:
    """Return the learning rates of a run's log, a step a row."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["lr"] for row in rows]


@pytest.mark.parametrize(
    "schedule", ["milestones", "linear", "cosine", "restarts", "cyclic", "onecycle"]
)
def test_a_stopped_run_and_one_in_parts_have_every_steps_own_rate(tmp_path, schedule):
    """The log's rates are the function's, however the run was stopped and its steps were cut."""
    settings = {"milestones": (1,), "warmup": 0.4, "cycles": 2}
    run = tiny_run(tiny_set(tmp_path / "x.beton"), tmp_path / "run", Softmax(), accumulate=2)
    run = replace(
        run,
        log_every=1,
        save_steps=5,
        optim=replace(run.optim, schedule=schedule, lr=0.03, **settings),
    )
    assert start(run, "test", []) == 0
    expected = [
        optim.learning_rate(schedule, step, peak=0.03, steps=9, steps_per_epoch=3, **settings)
        for step in range(9)
    ]
    assert logged(run.out) == pytest.approx(expected, rel=1e-6)
    # As if it had been killed between its checkpoints at steps 5 and 9.
    newest = max((run.out / "checkpoints").iterdir())
    newest.unlink()
    (run.out / "model.safetensors").unlink()
    assert start(run, "test", []) == 0 and newest.exists()
    assert logged(run.out) == pytest.approx(expected, rel=1e-6)


def test_milestones_with_a_warm_up_by_hand():
    # 5 steps an epoch, one of 20 epochs of warm-up, as CSSR's Tiny-ImageNet recipe has it.
    def rate(step: int) -> float:
        return optim.learning_rate(
            "milestones",
            step,
            peak=0.4,
            steps=100,
            steps_per_epoch=5,
            warmup=1 / 20,
            milestones=(10, 18),
        )

    rates = [rate(step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.4 * k / 6 for k in range(1, 6)] + [0.4])
    assert rates[6:50] == [0.4] * 44
    assert rates[50] == rates[89] == pytest.approx(0.04) and rates[90] == pytest.approx(0.004)


@pytest.mark.parametrize(("epochs", "cycles", "rise"), [(600, 3, 10), (50, 2, 0), (31, 3, 4)])
def test_restarts_are_the_published_stepping_of_torchs_scheduler(epochs, cycles, rise):
    """Second form: torch's scheduler, set after each epoch to that epoch's number.

    The warm-up is the published one: rates worked out beforehand, taken while the finished epoch's
    number is below its length.
    """
    peak, cycle = 0.1, epochs // cycles
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=cycle, eta_min=1e-3 * peak
    )
    optimizer.step()  # torch wants a step before the scheduler's
    low, high = 1e-3 * peak, peak
    target = low + (high - low) * (1 + math.cos(math.pi * rise / cycle)) / 2
    warm = [low + (target - low) / rise * (n + 1) for n in range(rise)]
    expected = [low if rise else peak]
    for finished in range(epochs - 1):
        if finished < rise:
            expected.append(warm[finished])
        else:
            scheduler.step(finished)
            expected.append(optimizer.param_groups[0]["lr"])

    per_epoch = 7
    rates = [
        optim.learning_rate(
            "restarts",
            step,
            peak=peak,
            steps=epochs * per_epoch,
            steps_per_epoch=per_epoch,
            warmup=rise / epochs,
            cycles=cycles,
        )
        for step in range(epochs * per_epoch)
    ]
    np.testing.assert_allclose(rates, np.repeat(expected, per_epoch), rtol=1e-12)


def test_smoothing_of_the_other_classes_alone_is_torchs_with_a_larger_share():
    """Vaze et al. smooth to 1 - s and s / (K - 1), which is torch's with e = s K / (K - 1)."""
    torch.manual_seed(2)
    classes, s = 20, 0.9
    logits, labels = torch.randn(5, classes), torch.arange(5)
    target = torch.full((5, classes), s / (classes - 1))
    target[torch.arange(5), labels] = 1 - s
    expected = -(target * logits.log_softmax(1)).sum(1)
    method = SoftmaxMethod(Augment(), label_smoothing=s * classes / (classes - 1))
    features, model = torch.zeros(5, 1, 1, 1), nn.Identity()
    ours = method.per_sample(logits, features, labels, model)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(ours, expected)


@given(st.integers(1, 400), st.integers(1, 50), st.floats(0, 1), st.data())
def test_no_step_is_wasted_at_rate_zero_and_none_passes_the_peak(steps, per_epoch, warmup, data):
    step = data.draw(st.integers(0, steps - 1))
    schedules: list[optim.Schedule] = ["milestones", "linear", "cosine", "cyclic", "onecycle"]
    if steps >= per_epoch:
        schedules.append("restarts")
    for schedule in schedules:
        rate = optim.learning_rate(
            schedule,
            step,
            peak=0.5,
            steps=steps,
            steps_per_epoch=per_epoch,
            warmup=warmup,
            milestones=(2, 5),
        )
        assert 0 < rate <= 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cycles": 0}, "--optim.cycles must be 1 .. 1e\\+06, got 0"),
        ({"cycles": 4}, r"--optim.cycles 4 are more than the epochs \(3\)"),
        (
            {"cycles": 2, "warmup": 0.6},
            "--optim.warmup 0.6 lasts 2 epochs, longer than one",
        ),
    ],
)
def test_restarts_that_do_not_fit_the_run_are_refused(change, said):
    run = tiny_run(Path("unused"), Path("unused"))
    check(replace(run, optim=replace(run.optim, schedule="restarts", cycles=3, warmup=0.3)))
    with pytest.raises(ValueError, match=said):
        check(replace(run, optim=replace(run.optim, schedule="restarts", **change)))
