"""A finished run, as evaluation needs it: its options, its classes, its network."""

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch

from backmix.pipeline.options import LoaderOptions
from backmix.train import protocols
from backmix.train.methods.build import build_network
from backmix.train.models.build import Model
from backmix.train.models.weights import read_weights
from backmix.train.options import Augment, Run
from backmix.train.run_folder import read_config, run_of


@dataclass(frozen=True)
class Trained:
    """What a run's config.json says."""

    run: Path
    options: Run
    classes: tuple[str, ...]
    """Names of the known classes in label order."""
    known: tuple[int, ...]
    """Their numbers in the training file."""
    files: tuple[Path, ...]
    """The training file, or files, where they lay then."""
    digest: str
    """Identifies the training file."""
    split: protocols.Split | None
    """The published list that the run was trained on, if it was one."""

    @property
    def loader(self) -> LoaderOptions:
        """How an evaluation cuts its views: size and crops of the run's loader."""
        chosen = self.options.loader
        return LoaderOptions(size=chosen.size, crop=chosen.crop, eval_crop=chosen.eval_crop)

    @property
    def augment(self) -> Augment:
        """The run's normalisation, without flip and shift."""
        return replace(Augment(), mean=self.options.augment.mean, std=self.options.augment.std)


def read_run(run: Path) -> Trained:
    """Read config.json of a run folder; ValueError says what is missing."""
    config = read_config(run)
    try:
        options = run_of(config["run"])
        chosen = options.split
        split = None
        if chosen.protocol:
            split = protocols.split(chosen.protocol, chosen.family, chosen.list)
        return Trained(
            run=run,
            options=options,
            classes=tuple(config["classes"]),
            known=tuple(config["known"]),
            files=tuple(map(Path, config["data"]["files"])),
            digest=config["data"]["digest"],
            split=split,
        )
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{run}/config.json is no configuration of a run: {error!r}") from error


def load_model(run: Path, program: str = "") -> Model:
    """Return a run's network with its final weights, in evaluation mode, on the CPU.

    Args:
        run: run folder.
        program: of a run of --model MODULE:CALLABLE the same once more. Without it such a run is
            refused: what code is imported here is not for a stranger's config.json to say.

    Raises:
        ValueError: saying what is missing or damaged.
    """
    trained = read_run(run)
    if ":" in trained.options.model and trained.options.model != program:
        raise ValueError(
            f"{run} is of --model {trained.options.model}, a program that would be imported and "
            f"called: if you trust it, add --model {trained.options.model}"
        )
    path = run / "model.safetensors"
    if not path.exists():
        raise ValueError(
            f"{run} has no model.safetensors: the run is not finished; the command that started "
            "it continues it"
        )
    if not path.is_file():
        raise ValueError(f"{path} is no file: the weights of the run should be there")
    # Drawing weights only to replace them must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = build_network(trained.options, len(trained.classes))
    try:
        model.load_state_dict(read_weights(run, model))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged, or not of a {trained.options.model} with "
            f"{len(trained.classes)} classes: {error}"
        ) from error
    return model.eval()
