"""Which form runs, and what a wish that cannot be met is told."""

import subprocess
import sys

import pytest
import torch

from backmix.kernels import dispatch


@pytest.mark.parametrize(
    ("backend", "environment"),
    [(None, None), (None, "torch"), ("torch", None), ("torch", "triton")],
)
def test_the_argument_outranks_the_environment(
    backend: str | None, environment: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", environment)
    assert dispatch.choose(backend, "mix_background") == "torch"


@pytest.mark.parametrize(
    ("backend", "environment", "message"),
    [
        ("triton", None, "backend=triton: the Triton form of mix_background is not part"),
        (None, "triton", "BACKMIX_KERNELS=triton: the Triton form of mix_background is not part"),
        ("cuda", "torch", "backend must be torch or triton, got 'cuda'"),
        (None, "fast", "BACKMIX_KERNELS must be torch or triton, got 'fast'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_by_its_source(
    backend: str | None, environment: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", environment)
    with pytest.raises(ValueError, match=message):
        dispatch.choose(backend, "mix_background")


def test_the_environment_is_read() -> None:
    code = "from backmix.kernels import dispatch; dispatch.choose(None, 'mix_background')"
    path = [entry for entry in sys.path if entry.endswith("src")]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"BACKMIX_KERNELS": "triton", "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "BACKMIX_KERNELS=triton: the Triton form" in found.stderr


def test_an_empty_environment_variable_is_no_wish() -> None:
    code = "from backmix.kernels import dispatch; print(dispatch.choose(None, 'mix_background'))"
    path = [entry for entry in sys.path if entry.endswith("src")]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"BACKMIX_KERNELS": "", "PYTHONPATH": ":".join(path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.stdout == "torch\n", found.stderr


def test_a_letter_stands_for_any_length() -> None:
    cpu = torch.device("cpu")
    for rows in (0, 3):
        dispatch.expect("x", torch.zeros(rows, 2), (torch.float32,), ("n", 2), cpu)
    with pytest.raises(ValueError, match=r"x must have shape \[n, 2\], got \[2\]"):
        dispatch.expect("x", torch.zeros(2), (torch.float32,), ("n", 2), cpu)
