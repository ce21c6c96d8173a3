"""What is timed: shapes, inputs of training's statistics, forms, and how each form is checked.

A case is one kernel at one shape; its forms do the same work, or say in a note what they leave out.
Nothing here looks at a clock but `Compiler`, which has to choose. Sizes come from the dataclasses
below; each has a tiny twin, with which tests walk every line on a CPU.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backmix.kernels.class_reconstruction import class_reconstruction
from backmix.kernels.location_confidence import location_confidence
from backmix.kernels.mix_background import mix_background
from backmix.kernels.mix_draws import mix_draws_on_device
from backmix.kernels.update_cam_bank import update_cam_bank
from bench import baselines
from bench.rows import Call, Clock, Effort, Row, rotate, sets_for

MEAN, STD = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]

# --- forms and cases ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to do the work."""

    calls: Sequence[Call]
    """One per set of inputs; each returns what it made."""
    verify: Call
    """Runs the form and raises AssertionError where its result is not the meaning's."""
    before: Call | None = None
    """Ahead of each call, not timed."""
    capturable: bool = True
    """Whether it may be captured in a CUDA graph: it never waits for the device."""
    config: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One kernel, one shape, one set of forms, made when their turn comes."""

    name: str
    kernel: str
    shape: dict[str, Any]
    bytes: int
    """Read or written at least once."""
    flops: int | None
    """Useful ones."""
    dtype: str
    out_dtype: str
    memory_format: str | None
    note: str
    forms: dict[str, Callable[[], Form]]
    warm: bool = False
    """Whether something goes ahead of each call, not timed: the cache is as that leaves it."""


class Compiler:
    """torch.compile at its best: every way to write it in every mode, the fastest kept.

    Compiling is timed apart. What was found is kept for the cases of one `key`; everything compiled
    before is forgotten when the next comes.
    """

    modes = ("default", "max-autotune-no-cudagraphs")
    patience_s = 100.0
    """After so long nothing more is tried, if something works."""

    def __init__(self, clock: Clock, backend: str = "inductor") -> None:
        self.clock, self.backend = clock, backend
        self.key: object = None
        self.call: Callable[..., Any] = lambda: None
        self.config: Row = {}
        if backend == "inductor":
            from torch._inductor import config

            config.assert_indirect_indexing = False  # our kernels check no index either

    def best(
        self,
        key: object,
        ways: dict[str, Callable[[baselines.Wrap], Callable[..., Any]]],
        arguments: Sequence[Any],
        run: Callable[..., object] | None = None,
    ) -> tuple[Callable[..., Any], Row]:
        """Return the fastest compiled form, and how it was found.

        Args:
            key: of the cases that share it.
            ways: by name, a function that compiles with what it is given.
            arguments: of the call that decides.
            run: what is timed, given the compiled form and the arguments; None = that call.
        """
        run = run or _called
        if key == self.key:
            return self.call, self.config
        self.key = None
        tried: dict[tuple[str, str], Row] = {}
        end = time.perf_counter() + self.patience_s
        for mode, way in itertools.product(self.modes, ways):
            if time.perf_counter() > end and any("ms" in found for found in tried.values()):
                tried[way, mode] = {"failed": "not tried: no time"}
                continue
            try:
                call, seconds = self._compile(ways[way], mode, partial(run, arguments=arguments))
            except Exception as error:  # one mode that fails must not cost the others
                tried[way, mode] = {"failed": f"{type(error).__name__}: {error}"[:200]}
                continue
            effort = Effort(least=10, most=50, seconds=0.5)
            ms = rotate(self.clock, [partial(run, call, arguments)], effort).median
            tried[way, mode] = {"ms": ms, "compile_s": round(seconds, 2)}
        worked = [name for name, found in tried.items() if "ms" in found]
        if not worked:
            raise RuntimeError(f"nothing compiled: {tried}")
        way, mode = min(worked, key=lambda name: tried[name]["ms"])
        self.call, _ = self._compile(ways[way], mode, partial(run, arguments=arguments))
        self.config = {
            "way": way,
            "mode": mode,
            "compile_s": tried[way, mode]["compile_s"],
            "tried": {" / ".join(name): found for name, found in tried.items()},
        }
        self.key = key
        return self.call, self.config

    def _compile(
        self,
        way: Callable[[baselines.Wrap], Callable[..., Any]],
        mode: str,
        run: Callable[..., object],
    ) -> tuple[Callable[..., Any], float]:
        torch._dynamo.reset()
        options: Row = {"mode": mode} if self.backend == "inductor" else {}
        call = way(
            partial(torch.compile, backend=self.backend, fullgraph=True, dynamic=False, **options)
        )
        start = time.perf_counter()
        run(call)
        self.clock.synchronize()
        return call, time.perf_counter() - start


def _called(call: Callable[..., object], arguments: Sequence[Any]) -> object:
    return call(*arguments)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator on a device."""
    return torch.Generator(device).manual_seed(seed)


def equal(got: object, expected: Tensor) -> None:
    """Require the same bits and the same strides."""
    assert isinstance(got, Tensor) and got.dtype == expected.dtype
    assert got.stride() == expected.stride(), f"strides {got.stride()}, not {expected.stride()}"
    different = (got != expected).sum().item()
    assert different == 0, f"{different} of {got.numel()} values differ"


# --- mix_background ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """A batch for `mix_background`."""

    n: int
    side: int
    grid: int
    patch: int
    """Side of the pasted square, pixels; 0 = none."""
    rows: int = 0
    """Of a resident pool; 0 = the pool is the batch."""
    pad: int = 0
    flip: float = 0.5
    """Share of the images."""
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Return the case's name."""
        share = f"{self.patch_share:.0%}".replace("%", " %")
        words = [f"{self.n} x {self.side} px", f"patch {share}"]
        words += ["not flipped" * (self.flip == 0) or "all flipped" * (self.flip == 1)]
        words += ["shifted" if self.pad else "", f"pool of {self.rows:,}" if self.rows else ""]
        return ", ".join(word for word in words if word)

    @property
    def patch_share(self) -> float:
        """Return the pasted share of the view's area."""
        return self.patch**2 / self.side**2

    @property
    def shape(self) -> dict[str, Any]:
        """Return the row's shape."""
        rows = self.rows or self.n
        return {"B": self.n, "H": self.side, "W": self.side, "h": self.grid, "w": self.grid} | {
            "P": rows,
            "patch_share": self.patch_share,
        }

    @property
    def bytes(self) -> int:
        """Return the bytes that are read or written at least once."""
        return self.n * self.side**2 * 3 * (1 + self.dtype.itemsize)

    @property
    def mask_cells(self) -> int:
        """Return how many cells are masked: a quarter."""
        return max(self.grid**2 // 4, 1)

    def tiny(self) -> "Mix":
        """Return the same for a test."""
        side = 16 if self.side > 64 else 8
        patch = round(side * self.patch / self.side)
        rows, pad = min(self.rows, 6), min(self.pad, 2)
        return dataclasses.replace(
            self, n=2, side=side, grid=4, patch=patch, rows=rows, pad=pad, dtype=torch.float16
        )


@dataclass(frozen=True)
class MixInputs:
    """Arguments of the door, on the device."""

    pool: Tensor
    target: Tensor
    donor: Tensor
    bank: Tensor
    draws: dict[str, Any]
    """bank_row, box, patch, flip, shift, tie."""

    def door(self, shape: Mix, backend: str | None, **more: Any) -> Tensor:
        """Call the door."""
        return mix_background(
            self.pool,
            self.target,
            self.donor,
            bank=self.bank,
            mask_cells=shape.mask_cells,
            mean=MEAN,
            std=STD,
            dtype=shape.dtype,
            backend=backend,  # pyright: ignore[reportArgumentType]
            **self.draws,
            **more,
        )


def mix_inputs(shape: Mix, device: torch.device, seed: int, pool: Tensor | None) -> MixInputs:
    """Return random inputs: pixels, maps whose cells are distinct, windows anywhere.

    Args:
        pool: the resident pool, None where the batch is the pool.
    """
    draw = generator(device, seed)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=draw, device=device)

    n, side = shape.n, shape.side
    if pool is None:
        pool = integers(0, 256, n, side, side, 3).to(torch.uint8)
        target, donor = torch.arange(n, device=device), integers(0, n, n)
    else:
        target, donor = integers(0, len(pool), n), integers(0, len(pool), n)
    cells = shape.grid**2
    order = torch.rand(len(pool), cells, generator=draw, device=device).argsort(1)
    patch = integers(0, side - shape.patch + 1, n, 4)
    extent = torch.full((n, 2), shape.patch, device=device)
    return MixInputs(
        pool,
        target,
        donor,
        bank=(order / cells).half().view(len(pool), shape.grid, shape.grid),
        draws={
            "bank_row": donor,
            "box": torch.tensor([[0, 0, 65536, 65536]], dtype=torch.int32, device=device).repeat(
                n, 1
            ),
            "patch": torch.cat((patch, extent), 1).int(),
            "flip": torch.rand(n, generator=draw, device=device) < shape.flip,
            "shift": integers(-shape.pad, shape.pad + 1, n, 2).int() if shape.pad else None,
            "tie": integers(-(2**31), 2**31, n).int(),
        },
    )


def resident_pool(shape: Mix, device: torch.device) -> Tensor | None:
    """Return a pool of random pixels, None where the batch is the pool."""
    if not shape.rows:
        return None
    size = (shape.rows, shape.side, shape.side, 3)
    return torch.randint(
        0, 256, size, dtype=torch.uint8, device=device, generator=generator(device, 1)
    )


def mix_case(shape: Mix, clock: Clock, compiler: Compiler) -> Case:
    """Return `mix_background` at a shape, with everything it is compared with."""
    device = clock.device
    pool = resident_pool(shape, device)
    sets = [mix_inputs(shape, device, seed, pool) for seed in range(sets_for(clock, shape.bytes))]
    first = sets[0]
    expected = first.door(shape, "torch", check=True)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    inverse = torch.tensor([1 / s for s in STD], device=device)

    def form(call: Callable[[MixInputs], Tensor], **more: Any) -> Form:
        return Form(
            [partial(call, inputs) for inputs in sets],
            lambda: equal(call(first), expected),
            **more,
        )

    def doors(backend: str) -> Form:
        return form(lambda inputs: inputs.door(shape, backend))

    def compiled() -> Form:
        pad = -mean * inverse if shape.pad else None  # the door's default: black
        options = {"side": shape.side, "mask_cells": shape.mask_cells}

        def arguments(inputs: MixInputs) -> tuple[Any, ...]:
            drawn = inputs.draws
            draws = (inputs.target, inputs.donor, inputs.bank, drawn["bank_row"], drawn["box"])
            draws += (drawn["patch"], drawn["flip"], drawn["shift"])
            return draws, options, inputs.pool, mean, inverse, pad, shape.dtype

        ways = {
            "one graph": baselines.mix_in_one_graph,
            "two graphs": baselines.mix_in_two_graphs,
        }
        key = dataclasses.replace(shape, patch=0, flip=0.5)  # values change nothing compiled
        call, config = compiler.best(key, ways, arguments(first))
        return form(lambda inputs: call(*arguments(inputs)), config=config)

    def torchvision() -> Form:
        if first.draws["shift"] is not None and shape.pad > 4:
            raise ValueError(f"the steps pad by 4, got a shift up to {shape.pad}")

        def call(inputs: MixInputs) -> Tensor:
            drawn = inputs.draws
            tensors = (inputs.target, inputs.donor, inputs.bank, drawn["bank_row"])
            tensors += (drawn["patch"], drawn["flip"], drawn["shift"])
            return baselines.mix_with_torchvision(
                inputs.pool, *tensors, MEAN, STD, shape.mask_cells, shape.dtype
            )

        call(first)  # ImportError before anything is timed, where it is not installed
        # Its normalisation copies its constants from the host: no graph.
        return Form(
            [partial(call, inputs) for inputs in sets],
            lambda: _near(call(first), expected),
            capturable=False,
        )

    def kornia() -> Form:
        steps = baselines.kornia_steps(MEAN, STD, device)
        calls = [partial(steps, inputs.pool, inputs.target, shape.dtype) for inputs in sets]

        def verify() -> None:
            got = calls[0]()
            assert got.shape == expected.shape and bool(got.isfinite().all())
            assert bool((got.amax() > 1) & (got.amin() < -1)), "not normalised"

        return Form(calls, verify, capturable=False, config={"draws": "its own", "mask": False})

    def timm() -> Form:
        means, stds = (x.to(shape.dtype).view(1, 3, 1, 1) for x in (mean, std))
        wanted = (first.pool.permute(0, 3, 1, 2)[:8].float() - mean.view(1, 3, 1, 1)) / std.view(
            1, 3, 1, 1
        )
        calls = [partial(baselines.timm_prefetch, inputs.pool, means, stds) for inputs in sets]
        return Form(
            calls, lambda: _near(calls[0]()[:8], wanted.to(shape.dtype)), config={"mask": False}
        )

    forms = {"triton": partial(doors, "triton"), "compile": compiled}
    forms["eager"] = partial(doors, "torch")
    if 0 < shape.patch < shape.side:
        forms["steps_torchvision"] = torchvision
        forms["steps_kornia"] = kornia
        if not shape.rows:  # it takes the batch as it lies
            forms["timm_prefetch"] = timm
    return Case(
        shape.name,
        "mix_background",
        shape.shape,
        shape.bytes,
        None,
        "uint8",
        str(shape.dtype).removeprefix("torch."),
        "channels_last",
        "steps_kornia and timm_prefetch mask nothing; kornia draws by itself",
        forms,
    )


def _near(got: Tensor, expected: Tensor) -> None:
    """Require values that differ by roundings to 8 bits, in another order of arithmetic."""
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-5)


# --- update_cam_bank ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """A batch for `update_cam_bank`."""

    n: int
    grid: int
    channels: int
    classes: int
    rows: int
    channels_last: bool = True
    boxes: bool = True
    """Whether views are crops, half of them flipped; else they are the whole images."""
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Return the case's name."""
        order = "channels last" if self.channels_last else "channels first"
        whole = "" if self.boxes else ", whole images"
        return f"{self.n} x {self.grid} x {self.grid} x {self.channels}, {order}{whole}"

    @property
    def shape(self) -> dict[str, Any]:
        """Return the row's shape."""
        return {"B": self.n, "h": self.grid, "w": self.grid, "C": self.channels} | {
            "K": self.classes,
            "P": self.rows,
        }

    @property
    def bytes(self) -> int:
        """Return the bytes that are read or written at least once."""
        cells = self.n * self.grid**2
        return cells * self.channels * self.dtype.itemsize + 2 * 2 * cells

    def tiny(self) -> "Bank":
        """Return the same for a test."""
        return dataclasses.replace(
            self, n=3, channels=16, classes=5, rows=9, dtype=torch.float16, grid=min(self.grid, 4)
        )


def bank_case(shape: Bank, clock: Clock, compiler: Compiler) -> Case:
    """Return `update_cam_bank` at a shape, with everything it is compared with."""
    device, n, rate = clock.device, shape.n, 0.1
    draw = generator(device, 0)
    weight = 0.05 * torch.randn(shape.classes, shape.channels, generator=draw, device=device)
    weight = weight.to(shape.dtype)
    bank = torch.rand(shape.rows, shape.grid, shape.grid, generator=draw, device=device).half()

    def inputs() -> dict[str, Any]:
        size = (n, shape.channels, shape.grid, shape.grid)
        features = torch.randn(size, generator=draw, device=device).relu().to(shape.dtype)
        if shape.channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        sides = torch.randint(16384, 65537, (n, 2), generator=draw, device=device)
        sides = sides if shape.boxes else torch.full_like(sides, 65536)
        corners = (torch.rand(n, 2, generator=draw, device=device) * (65536 - sides)).long()
        return {
            "features": features,
            "labels": torch.randint(0, shape.classes, (n,), generator=draw, device=device),
            "bank_row": torch.randperm(shape.rows, generator=draw, device=device)[:n],
            "box": torch.cat((corners, sides), 1).int(),
            "flip": torch.rand(n, generator=draw, device=device) < 0.5 * shape.boxes,
        }

    sets = [inputs() for _ in range(sets_for(clock, shape.bytes))]
    first, before = sets[0], bank.clone()
    # The meaning in float64 is the tests' matter; here: the same, by our own second formula.
    expected = before.clone()
    update_cam_bank(expected, weight=weight, **first, rate=rate, backend="torch", check=True)

    def form(call: Callable[..., object], **more: Any) -> Form:
        def verify() -> None:
            bank.copy_(before)
            call(**first)
            moved = (expected != before).sum().item()
            assert moved > 0, "the meaning writes nothing"
            torch.testing.assert_close(bank.float(), expected.float(), rtol=4e-3, atol=1e-4)

        return Form([partial(call, **inputs) for inputs in sets], verify, **more)

    def doors(backend: str) -> Form:
        return form(
            partial(update_cam_bank, bank, weight=weight, rate=rate, backend=backend)  # pyright: ignore[reportArgumentType]
        )

    def compiled() -> Form:
        def arguments(features: Tensor, labels: Tensor, bank_row: Tensor, **rest: Tensor) -> Any:
            return bank, features, weight, labels, bank_row, rest["box"], rest["flip"], rate

        def way(wrap: baselines.Wrap) -> Callable[..., None]:
            rows_after = wrap(baselines.bank_rows_after)

            def update(bank: Tensor, *rest: Any) -> None:
                bank.index_copy_(0, rest[3], rows_after(bank, *rest))

            return update

        call, config = compiler.best(shape, {"rows, then one write": way}, arguments(**first))
        return form(lambda **inputs: call(*arguments(**inputs)), config=config)

    def whole() -> Form:
        def call(features: Tensor, labels: Tensor, bank_row: Tensor, **_: Tensor) -> None:
            baselines.bank_for_whole_images(bank, features, weight, labels, bank_row, rate)

        return form(call)

    forms = {"triton": partial(doors, "triton"), "compile": compiled}
    forms["eager"] = partial(doors, "torch")
    note = "boxes of 25 to 100 % of each side, half of the images flipped"
    if not shape.boxes:
        forms = {"plain_whole_images": whole, **forms}
        note = "plain_whole_images knows no boxes"
    return Case(
        shape.name,
        "update_cam_bank",
        shape.shape,
        shape.bytes,
        None,
        str(shape.dtype).removeprefix("torch."),
        "float16",
        "channels_last" if shape.channels_last else "contiguous",
        note,
        forms,
    )


# --- location_confidence -----------------------------------------------------------------------


@dataclass(frozen=True)
class Locations:
    """A batch for `location_confidence`."""

    n: int
    """Images."""
    grid: int
    channels: int
    classes: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        """Return the locations of all images."""
        return self.n * self.grid**2

    @property
    def name(self) -> str:
        """Return the case's name."""
        return f"{self.rows:,} x {self.channels} x {self.classes:,}"

    @property
    def shape(self) -> dict[str, Any]:
        """Return the row's shape."""
        return {"B": self.n, "h": self.grid, "w": self.grid, "C": self.channels} | {
            "K": self.classes
        }

    @property
    def bytes(self) -> int:
        """Return the bytes that are read or written at least once."""
        inputs = (self.rows + self.classes) * self.channels + self.classes
        return inputs * self.dtype.itemsize + 8 * self.rows

    @property
    def flops(self) -> int:
        """Return the operations of the product."""
        return 2 * self.rows * self.channels * self.classes

    def tiny(self) -> "Locations":
        """Return the same for a test."""
        return Locations(2, 3, 32, 40 if self.classes > 10_000 else 10, torch.float16)


def confidence_case(shape: Locations, clock: Clock, compiler: Compiler) -> Case:
    """Return `location_confidence` at a shape, with everything it is compared with."""
    device = clock.device
    draw = generator(device, 0)
    weight = 0.05 * torch.randn(shape.classes, shape.channels, generator=draw, device=device)
    weight = weight.to(shape.dtype)
    bias = (0.1 * torch.randn(shape.classes, generator=draw, device=device)).to(shape.dtype)

    def inputs() -> tuple[Tensor, Tensor]:
        size = (shape.n, shape.channels, shape.grid, shape.grid)
        features = torch.randn(size, generator=draw, device=device).relu().to(shape.dtype)
        labels = torch.randint(0, shape.classes, (shape.n,), generator=draw, device=device)
        return features.contiguous(memory_format=torch.channels_last), labels

    sets = [inputs() for _ in range(sets_for(clock, shape.bytes))]
    true, most = _confidence_in_float64(*sets[0], weight, bias)

    def plain(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the locations as rows, with a label each; no copy of the features."""
        return features.permute(0, 2, 3, 1).flatten(0, 2), labels.repeat_interleave(shape.grid**2)

    lines = [plain(*inputs) for inputs in sets]

    def form(calls: Sequence[Callable[[], Any]], allowed: float, **more: Any) -> Form:
        def verify() -> None:
            p_true, p_max = calls[0]()
            for got, wanted in ((p_true, true), (p_max, most)):
                error = (got.double().flatten() - wanted).abs().amax().item()
                assert error <= allowed, f"a probability is off by {error:.2g}"

        return Form(calls, verify, **more)

    # Logits that are stored are rounded to 8 bits, which moves a probability by 2 % of itself.
    ours, stored = 2e-3, 2e-2

    def doors(backend: Any) -> Form:
        door = partial(location_confidence, backend=backend)
        return form([partial(door, x, weight, bias, y) for x, y in sets], ours)

    def eager() -> Form:
        softmax = baselines.softmax_of_logits
        return form([partial(softmax, x, weight, bias, y) for x, y in lines], stored)

    def compiled() -> Form:
        ways = {
            "product, then rows": baselines.product_then_rows,
            "one graph": baselines.product_and_rows,
        }
        call, config = compiler.best(shape, ways, (lines[0][0], weight, bias, lines[0][1]))
        return form([partial(call, x, weight, bias, y) for x, y in lines], stored, config=config)

    def matmul() -> Form:
        def verify() -> None:
            logits = torch.mm(lines[0][0], weight.T)[:4].double()
            wanted = lines[0][0][:4].double() @ weight.double().T
            error = ((logits - wanted).norm() / wanted.norm()).item()
            assert error < 2e-2, f"the product is off by {error:.2g}"

        return Form([partial(torch.mm, x, weight.T) for x, _ in lines], verify)

    return Case(
        shape.name,
        "location_confidence",
        shape.shape,
        shape.bytes,
        shape.flops,
        str(shape.dtype).removeprefix("torch."),
        "float32",
        "channels_last",
        "matmul: the product alone, its logits stored; plain_softmax: logits, softmax, two reads",
        {
            "triton": partial(doors, "triton"),
            "matmul": matmul,
            "compile": compiled,
            "plain_softmax": eager,
            "eager": partial(doors, "torch"),
        },
    )


def _confidence_in_float64(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return p(true), p(max) of the inputs as they are, float64 [n], a few rows at a time."""
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    own = labels.repeat_interleave(len(rows) // len(labels))
    true, most = [], []
    for x, y in zip(rows.split(1024), own.split(1024), strict=True):
        p = (x.double() @ weight.double().T + bias.double()).softmax(1)
        true.append(p.gather(1, y[:, None])[:, 0])
        most.append(p.amax(1))
    return torch.cat(true), torch.cat(most)


# --- class_reconstruction ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """Locations and classes for `class_reconstruction`."""

    rows: int
    classes: int
    channels: int
    latent: int
    what: str = "forward"
    """forward, backward or both."""
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Return the case's name."""
        return (
            f"{self.rows:,} x {self.classes:,} classes, C {self.channels}, L {self.latent}, "
            f"{self.what}"
        )

    @property
    def shape(self) -> dict[str, Any]:
        """Return the row's shape."""
        return {"B": self.rows, "K": self.classes, "C": self.channels, "L": self.latent}

    @property
    def bytes(self) -> int:
        """Return the bytes that are read or written at least once, nothing kept between passes."""
        parameters = 2 * self.classes * self.latent * self.channels
        inputs = (self.rows * self.channels + parameters) * self.dtype.itemsize
        errors = 4 * self.rows * self.classes
        return {
            "forward": inputs + errors,
            "backward": 2 * inputs + errors,
            "both": 3 * inputs + 2 * errors,
        }[self.what]

    @property
    def flops(self) -> int:
        """Return the useful operations: two products forward, four backward, none done again."""
        unit = 2 * self.rows * self.classes * self.channels * self.latent
        return {"forward": 2, "backward": 4, "both": 6}[self.what] * unit

    def tiny(self) -> "Reconstruction":
        """Return the same for a test."""
        return dataclasses.replace(
            self, rows=20, classes=6, channels=64, latent=16, dtype=torch.float16
        )


def reconstruction_case(shape: Reconstruction, clock: Clock, compiler: Compiler) -> Case:
    """Return `class_reconstruction` at a shape, with everything it is compared with."""
    device = clock.device
    draw = generator(device, 0)

    def leaf(scale: float, *size: int) -> Tensor:
        values = scale * torch.randn(size, generator=draw, device=device)
        return values.to(shape.dtype).requires_grad_()

    k, latent, channels = shape.classes, shape.latent, shape.channels
    x = torch.randn(shape.rows, channels, generator=draw, device=device).relu()
    x = x.to(shape.dtype).requires_grad_()
    encoder = leaf(channels**-0.5, k, latent, channels)
    decoder = leaf(latent**-0.5, k, latent, channels)
    leaves = (x, encoder, decoder)
    gradient = torch.randn(shape.rows, k, generator=draw, device=device) / shape.rows
    expected = _reconstruction_reference(leaves, gradient, shape.what)

    def passes(function: Callable[..., Tensor], **more: Any) -> Form:
        """Return the form of the pass that is timed."""
        state: dict[str, Tensor] = {}

        def forward() -> tuple[Tensor, ...]:
            return (function(*leaves).detach(),)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), leaves, gradient)

        def ahead() -> None:
            state["error"] = function(*leaves)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(state.pop("error"), leaves, gradient)

        def verify() -> None:
            if shape.what == "backward":
                ahead()
            names = ("error",) if shape.what == "forward" else ("x", "encoder", "decoder")
            # Rounding to 8 bits turns the sign of differences near 0, each by twice its gradient:
            # a share f of them moves a gradient by 2 sqrt(f) of its norm.
            allowed = 1e-2 if shape.what == "forward" else 0.1
            for name, got, wanted in zip(names, call(), expected, strict=True):
                error = ((got.float() - wanted).norm() / wanted.norm()).item()
                assert error <= allowed, f"{name} is off by {error:.2g} of its norm"

        call = {"forward": forward, "backward": backward, "both": both}[shape.what]
        return Form(
            [call],
            verify,
            before=ahead if shape.what == "backward" else None,
            capturable=False,
            **more,
        )

    def doors(backend: Any) -> Form:
        return passes(partial(class_reconstruction, backend=backend))

    def sizes() -> list[int]:
        """Return how many classes at once: what a third of the cache holds, 4 and 16 times that.

        Divisors of the number of classes, so that every chunk has the same shape.
        """
        one = shape.rows * channels * shape.dtype.itemsize
        wanted = [max(1, m * clock.l2_bytes // (3 * one)) for m in (1, 4, 16)]
        divisors = [d for d in range(1, k + 1) if k % d == 0]
        return sorted({max(d for d in divisors if d <= size) for size in wanted})

    def chunked() -> Form:
        forms = {
            size: passes(
                baselines.in_chunks(baselines.reconstruct_chunk, size),
                config={"classes_at_once": size},
            )
            for size in sizes()
        }
        ms = {size: _glance(clock, form) for size, form in forms.items()}
        return forms[min(ms, key=lambda size: ms[size])]

    def compiled() -> Form:
        def gradients(call: Callable[..., Tensor], arguments: Sequence[Tensor]) -> object:
            """Run both passes: the second is compiled when the first gradient is asked for."""
            return torch.autograd.grad(call(*arguments), arguments, gradient)

        ways = {f"{size} classes at once": partial(_compiled_chunks, size) for size in sizes()[-2:]}
        key = dataclasses.replace(shape, what="both")
        call, config = compiler.best(key, ways, leaves, gradients)
        return passes(call, config=config)

    return Case(
        shape.name,
        "class_reconstruction",
        shape.shape,
        shape.bytes,
        shape.flops,
        str(shape.dtype).removeprefix("torch."),
        "float32",
        None,
        "loop: class by class as CSSR's code; chunked: the fastest of three chunk sizes",
        {
            "triton": partial(doors, "triton"),
            "compile": compiled,
            "chunked": chunked,
            "loop": lambda: passes(baselines.reconstruct_class_by_class),
            "eager": partial(doors, "torch"),
        },
        warm=shape.what == "backward",
    )


def _compiled_chunks(classes: int, wrap: baselines.Wrap) -> Callable[..., Tensor]:
    return baselines.in_chunks(wrap(baselines.reconstruct_chunk), classes)


def _glance(clock: Clock, form: Form) -> float:
    """Return the median of a few calls, ms: enough to choose among forms."""
    (call,) = form.calls
    return sorted(clock.laps([call] * 4, form.before)[1:])[1]


def _reconstruction_reference(
    leaves: Sequence[Tensor], gradient: Tensor, what: str
) -> tuple[Tensor, ...]:
    """Return the error, or the gradients for all leaves, in fp32 from the inputs as they are."""
    x, encoder, decoder = (leaf.detach().float() for leaf in leaves)
    error, dx = torch.empty_like(gradient), torch.zeros_like(x)
    d_encoder, d_decoder = torch.empty_like(encoder), torch.empty_like(decoder)
    for k in range(len(encoder)):
        t = torch.tanh(x @ encoder[k].T)
        r = t @ decoder[k] - x
        error[:, k] = r.abs().sum(1)
        s = r.sign() * gradient[:, k, None]
        dz = (s @ decoder[k].T) * (1 - t * t)
        d_decoder[k], d_encoder[k] = t.T @ s, dz.T @ x
        dx += dz @ encoder[k] - s
    return (error,) if what == "forward" else (dx, d_encoder, d_decoder)


# --- draws on the device -----------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """A batch whose draws are made: the arguments of `mix_draws`."""

    n: int
    side: int
    patch: int
    pad: int
    rows: int
    """Of the pool."""

    @property
    def name(self) -> str:
        """Return the case's name."""
        shift = f", shift up to {self.pad}" if self.pad else ""
        return f"{self.n} x {self.side} px, patch {self.patch}{shift}"

    @property
    def shape(self) -> Row:
        """Return the row's shape."""
        return {"B": self.n, "H": self.side, "W": self.side, "P": self.rows}

    @property
    def bytes(self) -> int:
        """Return the bytes of index and row read, of flip, shift, donor, patch and tie written."""
        return self.n * (8 + 8 + 1 + 8 * bool(self.pad) + 8 + 24 + 4)

    def tiny(self) -> "Draws":
        """Return the same for a test."""
        return dataclasses.replace(self, n=4, rows=9)


def draws_case(shape: Draws, clock: Clock, _compiler: Compiler) -> Case:
    """Return drawing on the device against drawing on the host and sending it."""
    from backmix.pipeline import draws  # numpy only

    device = clock.device
    index = torch.randperm(shape.rows)[: shape.n]
    there, here = index.to(device), index.numpy()
    side = (shape.side, shape.side)
    options: Row = {"pool_rows": shape.rows, "group": 0, "size": side}
    options |= {"patch": shape.patch, "pad": shape.pad}
    names = ("flip", "shift", "donor", "patch", "tie")

    def on_host() -> list[Tensor | None]:
        drawn = draws.mix_draws(1, 2, here, rows=here, **options)
        arrays = [getattr(drawn, name) for name in names]
        return [
            None
            if array is None
            else torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
            for array in arrays
        ]

    def on_device() -> list[Tensor | None]:
        drawn = mix_draws_on_device(1, 2, there, rows=there, **options)
        return [getattr(drawn, name) for name in names]

    def verify() -> None:
        for name, got, wanted in zip(names, on_device(), on_host(), strict=True):
            if got is None or wanted is None:
                assert got is wanted, f"{name} is there in one form only"
            else:
                assert torch.equal(got, wanted), f"{name} differs from the host's"

    return Case(
        shape.name,
        "mix_draws",
        shape.shape,
        shape.bytes,
        None,
        "int64",
        "int32",
        None,
        "host: numpy, then a copy of each array; its time is that of both",
        {
            "triton": lambda: Form([on_device], verify),
            "host": lambda: Form([on_host], verify, capturable=False),
        },
    )


Shape = Mix | Bank | Locations | Reconstruction | Draws
CASES: dict[type, Callable[..., Case]] = {
    Mix: mix_case,
    Bank: bank_case,
    Locations: confidence_case,
    Reconstruction: reconstruction_case,
    Draws: draws_case,
}
"""What makes a shape's case."""

# --- candidates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """What the stage `tune` tries of a kernel's configuration."""

    config: str
    """Name in `kernels/configs.py`: a configuration, or a function of the shape."""
    fields: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    """By field, its values, the most promising field first."""
    candidates: str | None = None
    """Name in `kernels/configs.py`: a function of the same arguments that lists them all."""


CANDIDATES = {
    "mix_background": Tuning("mix_background_blocks", candidates="mix_background_candidates"),
    "update_cam_bank": Tuning(
        "update_cam_bank",
        {
            "channels": (32, 64, 128, 256),
            "unroll": (1, 2, 4),
            "warps": (4, 8, 16),
            "stages": (1, 2, 3),
            "maxnreg": (64, 96, 128, None),
        },
    ),
    "location_confidence": Tuning(
        "confidence_blocks",
        {
            "locations": (64, 128),
            "classes": (128, 256),
            "channels": (32, 64, 128),
            "stages": (2, 3, 4),
            "warps": (4, 8),
            "group": (8, 16, 32, 64),
        },
    ),
    "class_reconstruction": Tuning(
        "reconstruction_blocks",
        {
            "rows": (64, 128),
            "channels": (64, 128),
            "warps": (4, 8),
            "stages": (2, 3, 4),
            "fixed": (64, 128),
            "moving": (32, 64, 128),
            "group": (1, 2, 4),
        },
    ),
}
"""By door."""
