"""Which form runs, and what a wish that cannot be met is told."""

import subprocess
import sys
import warnings

import pytest
import torch

from backmix.kernels import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CUDA device, which nothing here touches, can run the Triton forms."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(dispatch, "_said", set())


@pytest.mark.parametrize(
    ("backend", "environment"),
    [(None, None), (None, "torch"), ("torch", None), ("torch", "triton")],
)
def test_the_argument_outranks_the_environment(
    backend: str | None, environment: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", environment)
    assert dispatch.choose(backend, "mix_background", CPU) == "torch"


@pytest.mark.parametrize(
    ("backend", "environment", "message"),
    [
        ("triton", None, "backend=triton: the Triton form of mix_background cannot run here: the "),
        (None, "triton", "BACKMIX_KERNELS=triton: .* the tensors are on cpu, not on a CUDA device"),
        ("cuda", "torch", "backend must be torch or triton, got 'cuda'"),
        (None, "fast", "BACKMIX_KERNELS must be torch or triton, got 'fast'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_by_its_source(
    backend: str | None, environment: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", environment)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=message):
        dispatch.choose(backend, "mix_background", CPU)


def test_triton_runs_on_a_gpu_unless_told_otherwise(ampere: None) -> None:
    assert dispatch.choose(None, "mix_background", GPU) == "triton"
    assert dispatch.choose("torch", "mix_background", GPU) == "torch"


def test_the_interpreter_serves_only_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.choose(None, "mix_background", CPU) == "torch"
    assert dispatch.choose("triton", "mix_background", CPU) == "triton"


def test_a_slow_choice_on_a_gpu_is_said_once(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="update_cam_bank runs its plain .* sides above 1,023"):
        form = dispatch.choose(None, "update_cam_bank", GPU, unsupported="sides above 1,023 px")
    assert form == "torch"
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", "torch")
    with pytest.warns(RuntimeWarning, match="update_cam_bank .* BACKMIX_KERNELS=torch asks for it"):
        assert dispatch.choose(None, "update_cam_bank", GPU) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(None, "update_cam_bank", GPU)
        monkeypatch.setattr(dispatch, "_ENVIRONMENT", None)
        dispatch.choose(None, "update_cam_bank", GPU, unsupported="sides above 1,023 px")


def test_a_gpu_older_than_ampere_runs_the_plain_form(
    ampere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5 is below 8\.0"):
        assert dispatch.choose(None, "mix_background", GPU) == "torch"
    with pytest.raises(
        ValueError, match=r"backend=triton: .* 7\.5 is below 8\.0; leave the choice"
    ):
        dispatch.choose("triton", "mix_background", GPU)


def test_arguments_that_the_kernel_cannot_take_are_said_when_it_is_forced(ampere: None) -> None:
    with pytest.raises(ValueError, match="cannot run here: sides above 1,023 px"):
        dispatch.choose("triton", "update_cam_bank", GPU, unsupported="sides above 1,023 px")


def test_override_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with dispatch.override("triton"):
        assert dispatch.choose(None, "mix_background", CPU) == "triton"
    assert dispatch.choose(None, "mix_background", CPU) == "torch"


@pytest.mark.parametrize(
    ("value", "said"), [("triton", "error"), ("", "torch"), ("torch", "torch")]
)
def test_the_environment_is_read(value: str, said: str) -> None:
    code = (
        "import torch\nfrom backmix.kernels import dispatch\n"
        "try: print(dispatch.choose(None, 'mix_background', torch.device('cpu')))\n"
        "except ValueError as error: print('error', error)"
    )
    path = [entry for entry in sys.path if entry.endswith("src")]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"BACKMIX_KERNELS": value, "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.stdout.split()[0] == said, found.stderr


def test_a_letter_stands_for_any_length() -> None:
    for rows in (0, 3):
        dispatch.expect("x", torch.zeros(rows, 2), (torch.float32,), ("n", 2), CPU)
    with pytest.raises(ValueError, match=r"x must have shape \[n, 2\], got \[2\]"):
        dispatch.expect("x", torch.zeros(2), (torch.float32,), ("n", 2), CPU)
