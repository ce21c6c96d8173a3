"""`--dry-run`: what is said is what a run then does, and nothing is written."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from backmix.train.checkpoint import locked
from backmix.train.cli import run as command
from backmix.train.dry_run import activation_bytes, checkpoint_bytes, lines
from backmix.train.options import BackMix, Optim, Run, Softmax
from backmix.train.prepare import prepare_run
from backmix.train.run import train
from tests.runs import tiny_run, tiny_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny.beton")


def said(run: Run) -> str:
    return "\n".join(lines(run, "test", ["backmix", "train"]))


def test_it_says_what_would_be_done_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    words = ["train", "cifar10-backmix", "--data", str(data), "--out", str(tmp_path / "run")]
    words += ["--split.protocol", "None", "--model", "classifier32-half", "--threads", "1"]
    words += ["--precision", "fp32", "--epochs", "5", "--loader.batch", "16", "--dry-run"]
    assert command(words) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and data.read_bytes() == before
    config = json.loads(out[: out.index("\n}\n") + 2])
    assert config["run"]["epochs"] == 5 and config["resolved"]["loader"] == "resident"
    assert config["run"]["dry_run"] is False
    assert "data: 40 images of 4 classes in 1 file" in out and "0 JPEG, 40 raw" in out
    assert "5 epochs of 3 steps: 15 steps of 16 images, the last one of an epoch of 8" in out
    assert "map of 4 x 4 cells" in out and "bank of 40 maps" in out
    assert f"a start would begin {tmp_path / 'run'}; nothing was written" in out


def test_what_it_counts_is_what_a_run_has(data: Path, tmp_path: Path) -> None:
    """Parameters, multiplications by another count, checkpoints, learning rates."""
    run = tiny_run(data, tmp_path / "run", epochs=4, log_every=1, ema=0.9)
    text = said(run)
    _, state, loader = prepare_run(run, "test", [])
    loader.close()
    macs = [0]

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        macs[0] += output[0].numel() * weight[0].numel()

    for layer in state.model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        state.model.eval()(torch.zeros(1, 3, 32, 32))
    parameters = sum(p.numel() for p in state.model.parameters())
    assert f"{parameters:,} parameters, {macs[0] / 1e6:,.1f} million MACs" in text

    assert train(run, "test", []) == 0
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    schedule = re.findall(r"^ +(\d+) +(\d+) +32  ([\d.e-]+)$", text, re.M)
    assert len(schedule) >= 5 and {int(step) for step, _, _ in schedule} >= {0, 11}
    for step, epoch, rate in schedule:
        row = rows[int(step)]
        assert row["step"] == int(step) + 1 and row["epoch"] == int(epoch)
        assert row["lr"] == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize(
    "optim",
    [
        Optim(kind="adam", lr=1e-3),
        Optim(kind="adamw", lr=1e-3, momentum=0),
        Optim(lr=0.01),
        Optim(momentum=0),
    ],
)
def test_the_size_of_a_checkpoint_is_foretold(data: Path, tmp_path: Path, optim: Optim) -> None:
    run = tiny_run(data, tmp_path / "run", epochs=1, optim=optim)
    _, state, loader = prepare_run(run, "test", [])
    loader.close()
    foretold = checkpoint_bytes(run, state)
    assert train(run, "test", []) == 0
    [*_, newest] = sorted((run.out / "checkpoints").iterdir())
    written = newest.read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    # The meters and Adam's count of each parameter's steps are some hundred bytes.
    assert foretold <= len(written) - header < foretold + 1500


def test_activations_are_counted_once_and_per_image(data: Path, tmp_path: Path) -> None:
    """A network of one convolution and a linear head, of which one knows what it keeps."""
    run = tiny_run(data, tmp_path / "run", Softmax())
    config, state, loader = prepare_run(run, "test", [])

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.conv(images).relu()
            return self.head(features.mean((2, 3))), features

    state.model = Small()  # type: ignore[assignment]
    from backmix.train.run_folder import Resolved

    resolved = Resolved(**json.loads(json.dumps(config.resolved.__dict__)))
    with loader:
        found = activation_bytes(run, resolved, state, loader.subset)
    # Kept in fp32: the input, the convolution's output (relu's is the same size and is what relu
    # keeps), the pooled features, and the loss's log-probabilities and few numbers.
    image, features = 4 * 3 * 32 * 32, 4 * 8 * 32 * 32
    assert image + features <= found <= image + features + 200


def test_what_a_start_refuses_is_refused(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", BackMix(patch=12), epochs=1)
    for wrong, match in (
        (replace(run, epochs=0), "--epochs"),
        (replace(run, data=(tmp_path / "no.beton",)), r"no\.beton"),
        (replace(run, accumulate=1000), "--accumulate 1000"),
        (replace(run, graph=True), "--graph does not go with the turbo loader"),
        (replace(run, loader=replace(run.loader, group=1)), "--loader.group 1: .* at least 2"),
        (replace(run, device="cpu", sync_batchnorm=True), "--sync-batchnorm needs GPUs"),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            said(wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        said(replace(run, out=tmp_path / "file" / "run"))
    assert train(run, "test", []) == 0
    files = sorted((path, path.stat().st_mtime_ns) for path in run.out.rglob("*"))
    assert "a start would continue" in said(run)
    with pytest.raises(ValueError, match=r"epochs was 1, is 2"):
        said(replace(run, epochs=2))
    other = tiny_set(tmp_path / "other.beton", seed=1)
    with pytest.raises(ValueError, match="digest"):
        said(replace(run, data=(other,)))
    with locked(run.out), pytest.raises(ValueError, match="in use"):
        said(run)
    changed = sorted((path, path.stat().st_mtime_ns) for path in run.out.rglob("*"))
    assert [f for f in changed if f[0].name != "run.lock"] == [
        f for f in files if f[0].name != "run.lock"
    ]


def test_of_several_processes_one_speaks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(tiny_run(data, tmp_path / "run"), dry_run=True)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert train(run, "test", []) == 0 and not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert train(run, "test", []) == 0
    assert "of each of 2 processes" in capsys.readouterr().out and not run.out.exists()
    monkeypatch.setenv("WORLD_SIZE", "1000")
    with pytest.raises(ValueError, match="1000 processes are too many"):
        train(run, "test", [])


def test_what_is_taken_of_given_weights_is_said(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, tmp_path / "run", Softmax(), epochs=1)
    assert train(run, "test", []) == 0
    assert f"--init {run.out}: " in said(replace(run, out=tmp_path / "next", init=run.out))
