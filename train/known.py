"""Which classes and images a run may learn from."""

import numpy as np

from backmix.pipeline.beton import BetonSet
from backmix.pipeline.subset import Subset, hold_out, select
from backmix.train import protocols
from backmix.train.options import BackMix, Run, Ssod, host_of
from backmix.train.trained import read_run


def known_classes(run: Run, classes: list[str]) -> list[int]:
    """Return the stored class numbers of the known classes, in label order."""
    split = run.split
    if split.protocol:
        published = protocols.split(split.protocol, split.family, split.list)
        if published.classes != len(classes):
            raise ValueError(
                f"protocol {split.protocol} splits {published.classes} classes, but the data have "
                f"{len(classes)}: {', '.join(classes[:10])}"
            )
        return list(published.known)
    missing = [name for name in split.known if name not in classes]
    if missing:
        raise ValueError(
            f"--split.known: the data have no class {', '.join(missing)}; "
            f"their classes are {', '.join(classes[:20])}{' ...' if len(classes) > 20 else ''}"
        )
    known = [classes.index(name) for name in split.known] or list(range(len(classes)))
    if len(set(known)) != len(known):
        raise ValueError("--split.known names a class twice")
    return known


def refuse_unfit_init(run: Run, known: list[str], data: BetonSet) -> None:
    """Refuse to begin with a run that has learned what this one must not, or other classes.

    Args:
        run: the options.
        known: names of the known classes in label order.
        data: the training set.

    Raises:
        ValueError: it knows classes that are unknown here, or was trained on images that --val
            holds out here; or the class head is kept, and the class lists differ.
    """
    if run.init is None or not (run.init / "config.json").is_file():
        return
    before = read_run(run.init)
    if before.options.model != run.model:
        raise ValueError(
            f"--init {run.init} is a {before.options.model}, this run a {run.model}: add --model "
            f"{before.options.model}"
        )
    if before.options.blurpool != run.blurpool:
        was, here = ("was", "is not") if before.options.blurpool else ("was not", "is")
        raise ValueError(
            f"--init {run.init} {was} trained with --blurpool, this run {here}: its weights belong "
            f"to what they were trained with; add --{'' if was == 'was' else 'no-'}blurpool"
        )
    host = host_of(run.method)
    if isinstance(host, Ssod) and host.train == "head" and list(before.classes) != known:
        raise ValueError(
            f"--init {run.init} knows the classes {', '.join(before.classes[:10])}, this run "
            f"{', '.join(known[:10])}: a rejection head is trained beside the class head that is "
            "there, so both need the same --split"
        )
    smoothing = before.options.optim.label_smoothing
    if (
        isinstance(host, Ssod)
        and host.train == "head"
        and not host.share
        and smoothing > 1 - host.gamma - 1e-9
    ):
        name = "method.host" if isinstance(run.method, BackMix) else "method"
        raise ValueError(
            f"--init {run.init} was trained with --optim.label-smoothing {smoothing:g}, which "
            f"keeps the probability of the true class below --{name}.gamma {host.gamma:g}: hardly "
            "any location would be known, and the head would learn to refuse everything; lower "
            f"gamma, or use --{name}.share 0.1"
        )
    seen = [name for name in before.classes if name in data.classes and name not in known]
    if seen:
        raise ValueError(
            f"--init {run.init} was trained on {', '.join(seen[:10])}, unknown in this run, which "
            "would then be tested on what it has learned: begin with a run of the same --split"
        )
    options = before.options
    held_out_then = options.seed == run.seed and options.val >= run.val
    if run.val and before.digest == data.digest and not held_out_then:
        raise ValueError(
            f"--val {run.val:g} holds images out that --init {run.init} was trained on (--val "
            f"{options.val:g} --seed {options.seed}): begin with a run of this --seed and at least "
            "this --val, or leave --val out"
        )


def training_subset(run: Run, labels: np.ndarray, known: list[int], classes: list[str]) -> Subset:
    """Return the training samples: those of the known classes, less what --val holds out."""
    rest, _ = hold_out(select(labels, known), run.val, run.seed)
    absent = sorted(set(range(len(known))) - set(rest.labels.tolist()))
    if absent:
        names = ", ".join(classes[known[label]] for label in absent[:10])
        raise ValueError(
            f"no training image is left of {len(absent)} of the {len(known)} known classes: {names}"
            + (" ..." if len(absent) > 10 else "")
            + (f" (--val {run.val})" if run.val else "")
            + "; --split.known names the classes to train on"
        )
    return rest
