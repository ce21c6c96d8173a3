"""class_reconstruction against loops, hand-worked cases, CSSR's own layers, and its meaning."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backmix.kernels import class_reconstruction as module
from backmix.kernels import configs
from backmix.kernels.class_reconstruction import (
    class_reconstruction,
    class_reconstruction_meaning,
)
from backmix.kernels.launch import Launch
from tests.kernels.support import DEVICES, expect_close, poisoned, poisoned_allocations

DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter multiplies the bit patterns of bf16.
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
FORMS = ["torch", "triton"]
LARGE_BLOCKS = configs.ReconstructionBlocks(128, 128, fixed=128, moving=128, group=4, warps=8)
"""Few programs, which is what the interpreter is quick at."""


def arguments(
    n: int = 5,
    classes: int = 3,
    latents: int = 16,
    channels: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """x, encoder and decoder with gradients, of the sizes of trained ones."""
    torch.manual_seed(seed)
    made = (
        torch.randn(n, channels),
        torch.randn(classes, latents, channels) / channels**0.5,
        torch.randn(classes, latents, channels) / latents**0.5,
    )
    return [y.to(dtype).to(device).detach().requires_grad_() for y in made]


def clear_of_zero(tensors: list[Tensor], margin: float = 0.015) -> list[Tensor]:
    """Move features until no difference is nearly 0, where rounding decides about its sign."""
    x, encoder, decoder = (y.detach().double() for y in tensors)
    for _ in range(1000):
        latents = torch.einsum("nc,klc->nkl", x, encoder).tanh()
        difference = torch.einsum("nkl,klc->nkc", latents, decoder) - x[:, None]
        near = (difference.abs() < margin).any(1)
        if not near.any():
            return [x.to(tensors[0].dtype).requires_grad_(), *tensors[1:]]
        x = (x + near * 4 * margin * torch.randn_like(x)).to(tensors[0].dtype).double()
    raise AssertionError("no such features found")


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [y.detach().cpu().double().requires_grad_() for y in tensors]


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], weight: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The errors, and the gradients of sum(errors * weight)."""
    errors = function(*tensors, **options)
    own = weight.to(errors.device, errors.dtype)
    return errors.detach(), list(torch.autograd.grad(errors, tensors, own))


def norm_ratio(found: Tensor, reference: Tensor) -> float:
    assert found.shape == reference.shape and found.isfinite().all()
    difference = found.detach().cpu().double() - reference
    return float(difference.norm() / reference.norm().clamp(min=1e-30))


def by_loops(x: np.ndarray, encoder: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """The definition, one number at a time."""
    n, channels = x.shape
    classes, latents, _ = encoder.shape
    error = np.zeros((n, classes))
    for i in range(n):
        for k in range(classes):
            hidden = [np.tanh((encoder[k, u] * x[i]).sum()) for u in range(latents)]
            for c in range(channels):
                rebuilt = sum(hidden[u] * decoder[k, u, c] for u in range(latents))
                error[i, k] += abs(rebuilt - x[i, c])
    return error


# --- meaning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 2, 5, 7), (4, 3, 16, 9)], ids=lambda s: "x".join(map(str, s))
)
def test_the_meaning_is_the_definition(sizes: tuple[int, int, int, int]) -> None:
    tensors = doubles(arguments(*sizes))
    errors = class_reconstruction_meaning(*tensors).detach().numpy()
    np.testing.assert_allclose(errors, by_loops(*(y.detach().numpy() for y in tensors)), 1e-12)


def test_the_errors_are_those_of_cssrs_layers() -> None:
    """A 1 x 1 convolution, tanh and a 1 x 1 convolution per class, in a loop over classes."""
    torch.manual_seed(1)
    features, classes, latents = torch.randn(2, 12, 3, 4), 4, 6
    down = [torch.nn.Conv2d(12, latents, 1, bias=False) for _ in range(classes)]
    up = [torch.nn.Conv2d(latents, 12, 1, bias=False) for _ in range(classes)]
    expected = torch.stack(
        [
            (b(torch.tanh(a(features))) - features).abs().sum(1)
            for a, b in zip(down, up, strict=True)
        ],
        1,
    )  # [b, K, h, w]
    encoder = torch.stack([a.weight[:, :, 0, 0] for a in down])
    decoder = torch.stack([b.weight[:, :, 0, 0].T for b in up])
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    errors = class_reconstruction(rows, encoder, decoder)
    torch.testing.assert_close(errors.view(2, 3, 4, classes).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("elements", [2**25, 60])
def test_the_gradients_of_the_meaning_are_differences(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MEANING_ELEMENTS", elements)
    tensors = doubles(arguments(4, 3, 5, 6))
    assert torch.autograd.gradcheck(class_reconstruction_meaning, tensors, eps=1e-7, atol=1e-5)


def test_chunks_of_the_meaning_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weight = doubles(arguments(4, 7, 5, 6)), torch.randn(4, 7)
    whole = gradients(class_reconstruction_meaning, tensors, weight)
    monkeypatch.setattr(module, "_MEANING_ELEMENTS", 60)  # two classes at a time
    parts = gradients(class_reconstruction_meaning, tensors, weight)
    torch.testing.assert_close(parts, whole)
    with torch.no_grad():
        torch.testing.assert_close(class_reconstruction_meaning(*tensors), whole[0])


class Peak(TorchDispatchMode):
    """The most bytes that lived at a time of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.known.add(tensor.untyped_storage()._cdata)
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_the_meaning_never_holds_all_reconstructions(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = arguments(16, 64, 4, 128)
    monkeypatch.setattr(module, "_MEANING_ELEMENTS", 2 * 16 * 128)
    with Peak() as peak:
        class_reconstruction_meaning(*tensors).sum().backward()
    assert peak.most < 16 * 64 * 128 * 4


# --- kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_case_by_hand(form: str, device: str) -> None:
    """z = 3*0 + 0*2 = 0, so t = 0, the differences are (0, -2) and their signs (0, -1)."""
    x = torch.tensor([[0.0, 2.0]], device=device, requires_grad=True)
    encoder = torch.tensor([[[3.0, 0.0]]], device=device, requires_grad=True)
    decoder = torch.tensor([[[5.0, 7.0]]], device=device, requires_grad=True)
    error = class_reconstruction(x, encoder, decoder, backend=form)  # type: ignore[arg-type]
    error.backward(torch.tensor([[0.5]], device=device))
    assert error.tolist() == [[2.0]]
    assert x.grad is not None and encoder.grad is not None and decoder.grad is not None
    assert decoder.grad.tolist() == [[[0.0, 0.0]]]  # t g s
    assert encoder.grad.tolist() == [[[0.0, -7.0]]]  # g (s . decoder) (1 - t^2) x
    assert x.grad.tolist() == [[-10.5, 0.5]]  # g (s . decoder) (1 - t^2) encoder - g s


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (3, 5, 16, 40), (33, 2, 7, 17), (130, 3, 20, 131), (2, 6, 64, 128)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_the_kernels_agree_with_the_meaning(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":
        monkeypatch.setattr(configs, "reconstruction_blocks", lambda *_: LARGE_BLOCKS)
    plain = clear_of_zero(arguments(*sizes, dtype=dtype))
    tensors = [poisoned(y.detach(), device).requires_grad_() for y in plain]
    weight = torch.randn(sizes[0], sizes[1])
    reference, reference_gradients = gradients(class_reconstruction_meaning, doubles(plain), weight)
    with poisoned_allocations():
        errors, found = gradients(class_reconstruction, tensors, weight, backend="triton")
    assert errors.dtype == torch.float32 and errors.is_contiguous()
    assert [y.dtype for y in found] == [dtype] * 3
    relative = float(((errors.cpu() - reference) / reference).abs().max())
    assert relative <= {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    expect_close(errors, reference, class_reconstruction_meaning(*plain), dtype)
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for mine, theirs in zip(found, reference_gradients, strict=True):
        assert norm_ratio(mine, theirs) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_sign_of_zero_is_zero(dtype: torch.dtype, device: str) -> None:
    """A feature of zeros is rebuilt exactly; beside it one that is not."""
    tensors = arguments(2, 2, 3, 5, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[0][0] = 0
    errors, (dx, dencoder, ddecoder) = gradients(
        class_reconstruction, tensors, torch.ones(2, 2), backend="triton"
    )
    alone = [tensors[0][1:].detach().requires_grad_(), *tensors[1:]]
    _, expected = gradients(class_reconstruction, alone, torch.ones(1, 2), backend="triton")
    assert not errors[0].any() and not dx[0].any()
    torch.testing.assert_close([dx[1:], dencoder, ddecoder], expected)


@pytest.mark.parametrize(
    "blocks",
    [
        configs.ReconstructionBlocks(16, 64, fixed=32, moving=16, group=1, warps=4),
        configs.ReconstructionBlocks(64, 16, fixed=16, moving=32, group=2, warps=4),
    ],
)
@pytest.mark.parametrize("programs", [1, 10**6])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_and_programs_change_only_roundings(
    blocks: configs.ReconstructionBlocks,
    programs: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, weight = arguments(40, 3, 16, 70, device=device), torch.randn(40, 3)
    reference = gradients(class_reconstruction_meaning, doubles(tensors), weight)
    monkeypatch.setattr(configs, "reconstruction_blocks", lambda *_: blocks)
    monkeypatch.setattr(configs, "PROGRAMS", programs)
    errors, found = gradients(class_reconstruction, tensors, weight, backend="triton")
    for mine, theirs in zip([errors, *found], [reference[0], *reference[1]], strict=True):
        assert norm_ratio(mine, theirs) <= 1e-5


@pytest.mark.parametrize("kept", [0, 2**29])
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_change_only_roundings(
    kept: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, weight = arguments(20, 5, 10, 33, device=device), torch.randn(20, 5)
    reference = gradients(class_reconstruction_meaning, doubles(tensors), weight)
    if device == "cpu":  # on a GPU they take too much shared memory in fp32
        monkeypatch.setattr(configs, "reconstruction_blocks", lambda *_: LARGE_BLOCKS)
    rows = configs.reconstruction_blocks(16, 4).padding
    monkeypatch.setattr(module, "_KEPT_BYTES", kept)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * rows * 16 * 4)  # two classes, then one
    chunks = list(module._chunks(torch.empty(rows, 64), torch.empty(5, 16, 64)))
    assert [(c.start, c.stop) for c in chunks] == [(0, 2), (2, 4), (4, 5)]
    errors, found = gradients(class_reconstruction, tensors, weight, backend="triton")
    for mine, theirs in zip([errors, *found], [reference[0], *reference[1]], strict=True):
        assert norm_ratio(mine, theirs) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_twice_the_same_bits(device: str) -> None:
    """Also where the rows and the classes are shared out to many programs."""
    tensors = arguments(70, 3, 16, 40, dtype=torch.float16, device=device)
    weight = torch.randn(70, 3)
    first = gradients(class_reconstruction, tensors, weight, backend="triton")
    again = gradients(class_reconstruction, tensors, weight, backend="triton")
    for one, other in zip(tree_leaves(first), tree_leaves(again), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch(form: str, device: str) -> None:
    x, encoder, decoder = arguments(0, device=device)
    errors = class_reconstruction(x, encoder, decoder, backend=form)  # type: ignore[arg-type]
    assert errors.shape == (0, 3) and errors.dtype == torch.float32
    errors.sum().backward()
    assert x.grad is not None and encoder.grad is not None and decoder.grad is not None
    assert x.grad.shape == (0, 40) and not encoder.grad.any() and not decoder.grad.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_memory_in_another_order_gives_the_same(form: str, device: str) -> None:
    x, encoder, decoder = arguments(6, 3, 16, 10, device=device)
    turned = [x.T.contiguous().T, encoder.mT.contiguous().mT, decoder.transpose(0, 1)]
    turned[2] = turned[2].contiguous().transpose(0, 1)
    torch.testing.assert_close(
        class_reconstruction(*turned, backend=form),  # type: ignore[arg-type]
        class_reconstruction(x, encoder, decoder, backend=form),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_backbone_costs_no_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weight = arguments(device=device), torch.randn(5, 3, device=device)
    _, (_, dencoder, ddecoder) = gradients(class_reconstruction, tensors, weight, backend="triton")
    monkeypatch.delattr(module, "sign_sum_launch")
    x, encoder, decoder = tensors[0].detach(), *tensors[1:]
    errors = class_reconstruction(x, encoder, decoder, backend="triton")
    found = torch.autograd.grad(errors, [encoder, decoder], weight)
    assert found[0].equal(dencoder) and found[1].equal(ddecoder)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_kept_without_gradients(device: str) -> None:
    x, encoder, decoder = arguments(device=device)
    kept: list[int] = []
    op = module._class_reconstruction_triton

    def watched(*args: Any) -> Any:
        made = op(*args)
        kept.append(made[1].numel())
        return made

    with mock.patch.object(module, "_class_reconstruction_triton", watched):
        class_reconstruction(x, encoder, decoder, backend="triton")
        with torch.no_grad():
            class_reconstruction(x, encoder, decoder, backend="triton")
        class_reconstruction(x.detach(), encoder.detach(), decoder.detach(), backend="triton")
    assert kept == [32 * 3 * 16, 0, 0]  # rows padded to a block


@pytest.mark.parametrize(
    ("latents", "channels", "most"), [(16, 512, 0.64e9), (64, 512, 0.34e9), (64, 2048, 0.58e9)]
)
def test_the_memory_that_the_docstring_names(latents: int, channels: int, most: float) -> None:
    """Of tensors that hold nothing: what lives at a time, without arguments and results."""
    with FakeTensorMode(), mock.patch.object(Launch, "run", lambda _: None):
        x = torch.empty(12_544, channels, dtype=torch.bfloat16)
        encoder = torch.empty(1000, latents, channels, dtype=torch.bfloat16)
        decoder = torch.empty_like(encoder)
        gradient = torch.empty(12_544, 1000)
        with Peak() as peak:
            error, kept = module._class_reconstruction_triton._init_fn(x, encoder, decoder, True)
            assert peak.most - error.nbytes <= most
            peak.most = peak.now
            made = module._class_reconstruction_backward._init_fn(
                gradient, x, encoder, decoder, kept, True
            )
            assert peak.most - error.nbytes - sum(y.nbytes for y in made) <= most
    assert most < 2**30


class Zeros(TorchDispatchMode):
    """The shapes of the zeros that autograd makes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if "zeros" in str(func):
            self.shapes.append(list(result.shape))
        return result


@pytest.mark.parametrize("device", DEVICES)
def test_backward_makes_no_gradient_of_the_latents_that_were_kept(device: str) -> None:
    errors = class_reconstruction(*arguments(device=device), backend="triton")
    with Zeros() as zeros:
        errors.sum().backward()
    assert zeros.shapes == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_derivative_is_refused(device: str) -> None:
    tensors = arguments(device=device)
    errors = class_reconstruction(*tensors, backend="triton")
    (slope,) = torch.autograd.grad(errors.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="class_reconstruction_backward"):
        slope.sum().backward()


# --- autocast, compile, registration -----------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_decides_the_dtype(form: str, device: str) -> None:
    """fp32 parameters: products in autocast's dtype, errors and gradients fp32."""
    tensors, weight = arguments(device=device), torch.randn(5, 3)
    with torch.autocast(device, dtype=torch.float16):
        errors, found = gradients(class_reconstruction, tensors, weight, backend=form)
    halves = [y.detach().half().requires_grad_() for y in tensors]
    expected, halved = gradients(class_reconstruction, halves, weight, backend=form)
    assert errors.equal(expected) and errors.dtype == torch.float32
    for mine, theirs in zip(found, halved, strict=True):
        assert mine.dtype == torch.float32 and mine.equal(theirs.float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_parameters_take_the_dtype_of_x(form: str, device: str) -> None:
    x, encoder, decoder = arguments(dtype=torch.float16, device=device)
    wide = [encoder.detach().float().requires_grad_(), decoder.detach().float().requires_grad_()]
    errors = class_reconstruction(x, *wide, backend=form)  # type: ignore[arg-type]
    expected = class_reconstruction(x, encoder, decoder, backend=form)  # type: ignore[arg-type]
    assert errors.equal(expected)
    errors.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(wide, (encoder, decoder), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert mine.grad.dtype == torch.float32 and mine.grad.equal(theirs.grad.float())


class Head(torch.nn.Module):
    """CSSR's classifier on a feature map, and its loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3)
        _, encoder, decoder = arguments(1, 3, 4, 8)
        self.encoder, self.decoder = torch.nn.Parameter(encoder), torch.nn.Parameter(decoder)
        self.form: Any = form

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.stem(images).relu()
        n, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        errors = class_reconstruction(rows, self.encoder, self.decoder, backend=self.form)
        logits = (-0.1 * errors).clamp(-100, 100).view(n, height * width, -1)
        chances = logits.log_softmax(2).logsumexp(1)
        return torch.nn.functional.nll_loss(chances, labels)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_compiles_whole(device: str, form: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Head(form).to(device)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3, 5):
        images, labels = torch.randn(n, 3, 5, 4).to(device), torch.arange(n, device=device) % 3
        mine, theirs = compiled(images, labels), plain(images, labels)
        torch.testing.assert_close(mine, theirs)
        mine.backward()
        theirs.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch._dynamo.utils.counters["graph_break"].total() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_are_registered_as_they_behave(device: str) -> None:
    tensors = arguments(3, 2, 5, 7, device=device)
    torch.library.opcheck(module._class_reconstruction_triton, (*tensors, True))
    plain = [y.detach() for y in tensors]
    _, kept = module._class_reconstruction_triton(*plain, True)
    gradient = torch.randn(3, 2, device=device)
    for for_x in (True, False):
        torch.library.opcheck(
            module._class_reconstruction_backward, (gradient, *plain, kept, for_x)
        )


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_fakes_have_the_real_strides(device: str, n: int, keep: bool) -> None:
    plain = [y.detach() for y in arguments(n, 3, 20, 40, device=device)]
    real = module._class_reconstruction_triton(*plain, keep)
    gradient = torch.randn(n, 3, device=device)
    real += module._class_reconstruction_backward(gradient, *plain, real[1], keep)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(y) for y in plain]
        fake = module._class_reconstruction_triton(*fakes, keep)
        fake += module._class_reconstruction_backward(
            mode.from_tensor(gradient), *fakes, fake[1], keep
        )
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 40).double()}, TypeError, "x must be float32 or bfloat16 or float16"),
        ({"x": torch.zeros(5, 4, 10)}, ValueError, r"x must have shape \[n, C\], got \[5, 4, 10\]"),
        ({"encoder": torch.zeros(3, 16, 41)}, ValueError, r"encoder must have shape \[K, L, 40\]"),
        (
            {"decoder": torch.zeros(3, 40, 16)},
            ValueError,
            r"decoder must have shape \[3, 16, 40\], got \[3, 40, 16\]",
        ),
        (
            {"encoder": torch.zeros(0, 16, 40), "decoder": torch.zeros(0, 16, 40)},
            ValueError,
            r"encoder must have classes, latents and channels, got shape \[0, 16, 40\]",
        ),
        ({"decoder": None}, TypeError, "decoder must be a tensor, got NoneType"),
        ({"decoder": torch.zeros(3, 16, 40).int()}, TypeError, "decoder must be float32"),
        ({"backend": "cuda"}, ValueError, "backend must be torch or triton"),
        (
            {"x": torch.tensor([[0.0, 0.0], [0.0, torch.nan]]).repeat(1, 20), "check": True},
            ValueError,
            r"x\[1\] must be finite",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, encoder, decoder = (y.detach() for y in arguments())
    options = {"x": x, "encoder": encoder, "decoder": decoder, **changes}
    with pytest.raises(error, match=message):
        class_reconstruction(**options)


@pytest.mark.parametrize("device", DEVICES)
def test_too_large_problems_are_refused_by_the_kernels_alone(device: str) -> None:
    tensors = arguments(2, 2, 65, 5, device=device)
    with pytest.raises(ValueError, match="65 latents, the most are 64"):
        class_reconstruction(*tensors, backend="triton")
    assert class_reconstruction(*tensors, backend="torch").shape == (2, 2)
    many = torch.zeros(1, 5, device=device).expand(65_535 * 32 + 1, 5)
    with pytest.raises(ValueError, match="2,097,121 features, the most are 2,097,120"):
        class_reconstruction(many, *(y[:, :1] for y in tensors[1:]), backend="triton")


# --- with a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    n, channels = 2_200_000, 1024  # 2^31 and a little
    x = torch.randn(n, channels, device="cuda", dtype=torch.bfloat16)
    encoder, decoder = (
        torch.randn(4, 16, channels, device="cuda", dtype=torch.bfloat16) / 16 for _ in range(2)
    )
    errors = class_reconstruction(x, encoder, decoder, backend="triton")
    tail = class_reconstruction(x[-128:], encoder, decoder, backend="triton")
    torch.testing.assert_close(errors[-128:], tail, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("classes", "latents", "channels"), [(1000, 16, 512), (100, 64, 2048)])
def test_the_shapes_of_training(classes: int, latents: int, channels: int) -> None:
    tensors = arguments(12_544, classes, latents, channels, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(12_544, classes)
    mine = gradients(class_reconstruction, tensors, weight, backend="triton")
    wide = [y.detach().float().requires_grad_() for y in tensors]
    theirs = gradients(class_reconstruction_meaning, wide, weight)
    for one, other in zip(tree_leaves(mine), tree_leaves(theirs), strict=True):
        assert norm_ratio(one, other.cpu().double()) <= 5e-2
