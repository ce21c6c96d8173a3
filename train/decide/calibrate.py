"""Choose the threshold of a run: the score of held-out known images, and what is promised of it.

Everything is opened and checked before the first forward pass. RUN/calibration.safetensors keeps
what the network said of the images, RUN/fit.safetensors what a fitted score learned from the
training images, and RUN/threshold.json, which is written last, the rule and where it comes from.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.loader import MOST_THREADS
from backmix.pipeline.options import refuse_unknown_choices
from backmix.train.checkpoint import locked, write_atomically
from backmix.train.decide.calibration_images import (
    Known,
    absent_note,
    compared_images,
    known_images,
)
from backmix.train.decide.conformal import exact_rate, needed
from backmix.train.decide.options import CalibrateOptions
from backmix.train.decide.overlap import overlap
from backmix.train.decide.record import THRESHOLD, Record, write_record
from backmix.train.decide.rule import (
    Rule,
    conditional_rule,
    global_rule,
    halves,
    shrunk_rule,
    too_few,
)
from backmix.train.decide.scorer import own_score, preprocessing_of, refuse_score, refuse_size
from backmix.train.decide.words import promise
from backmix.train.digests import file_digest, weights_digest
from backmix.train.evaluate import closed_gate
from backmix.train.memory import keep_freed_memory
from backmix.train.models.build import Model
from backmix.train.options import EvaluateOptions, host_of
from backmix.train.outputs import Outputs, store
from backmix.train.passes import Viewing, device_of, learn_cssr, run_pass, seen_at
from backmix.train.run_folder import commit, read_config, versions
from backmix.train.scores import Fit, linear_head, score_of
from backmix.train.scores.cssr import CssrFit
from backmix.train.scores.every import NEED_FIT
from backmix.train.scores.fit import COLDEST, HOTTEST, PRINCIPAL, fit_scores
from backmix.train.scores.fit_file import FIT, write_fit
from backmix.train.scores.linear import ASH_SHARE, DICE_SHARE, NCI_ALPHA, SCALE_SHARE
from backmix.train.trained import Trained, load_model, read_run
from backmix.train.training_images import (
    HELD_OUT,
    TRAIN,
    training_images,
)

CALIBRATION = "calibration.safetensors"
"""What the network said of the calibration images, in the run folder."""


@dataclass(frozen=True, eq=False)
class _Learned:
    """What a fitted score has learned; nothing where it needs nothing."""

    fit: Fit | None = None
    cssr: CssrFit | None = None
    notes: tuple[str, ...] = ()


def calibrate(
    run: Path,
    options: CalibrateOptions,
    command: Sequence[str],
    *,
    say: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Choose the threshold of a run and write it to RUN/threshold.json; return it in words.

    The threshold that was there is kept as threshold.DATE.json, DATE that of its making.

    Args:
        run: folder of a finished run.
        options: how.
        command: the words of the command line, for the record.
        say: called with a line of progress now and then.
        tell: called with a line on each pass when it has ended.

    Raises:
        ValueError: what is wrong with the run, the options or the images, and what to do: too few
            images with the number needed, training images among them, scores that are not finite.
        OSError: what cannot be read or written.
    """
    rate = _checked(options)
    trained = read_run(run)
    score = options.score or own_score(trained)
    device = device_of(options.device)
    keep_freed_memory(device)
    with locked(run):
        model = load_model(run, options.model).to(device)
        refuse_score(score, model)
        if options.size and options.size != trained.loader.size:
            refuse_size(model, options.size, device)
        known = known_images(trained, options)
        known, data = compared_images(trained, known, options, say)
        least = needed(rate, options.confidence) * (2 if options.shrink else 1)
        if len(known.images) < least:
            how = " in two halves" if options.shrink else ""
            raise too_few(len(known.images), least, rate, options.confidence, how)
        passing = EvaluateOptions(
            batch=options.batch,
            precision=options.precision,
            threads=options.threads,
        )
        seen = seen_at(trained, options.size)
        viewing = Viewing(model, seen, passing, device, say, tell)
        try:
            learned = _learned(viewing, known, score, options, say)
            outputs = run_pass(viewing, known.images, run, learned.cssr)
            scores = _scores(outputs, model, score, learned.fit)
            predicted = outputs.logits.argmax(1)
            rule = _rule(scores, predicted, trained.classes, rate, options)
        except ValueError as error:
            raise ValueError(f"{run}: {error}") from error
        outputs = replace(outputs, scores={score: scores})
        notes = [*known.notes, *learned.notes, *closed_gate(trained), *absent_note(known)]
        notes += _ties(rule)
        record = Record(
            score=score,
            parameters=_parameters(score, learned.fit),
            rate=options.reject_rate,
            confidence=options.confidence,
            rule=rule,
            classes=trained.classes,
            preprocessing=preprocessing_of(seen),
            precision=options.precision,
            weights=weights_digest(run),
            fit="",
            data={
                "images": "held_out" if known.own else "given",
                "files": list(outputs.files),
                "digest": outputs.digest,
                "n": len(outputs),
                "bad": len(outputs.bad),
                **data,
                "absent": list(known.absent),
                **_shares(rule, outputs, predicted, scores, options),
                "notes": notes,
            },
            facts=_facts(run, trained, command),
        )
        written = _write(run, record, outputs, learned)
    return promise(written, f"wrote {run / THRESHOLD} and {run / CALIBRATION}")


def _checked(options: CalibrateOptions) -> Fraction:
    """Return the rate; refuse options that make no sense together."""
    refuse_unknown_choices(options, "--")
    try:
        rate = exact_rate(options.reject_rate)
    except ValueError as error:
        raise ValueError(f"--reject-rate: {error}") from None
    if options.confidence is not None and not 0.5 <= options.confidence < 1:
        raise ValueError(
            f"--confidence must be in [0.5, 1), such as 0.9, got {options.confidence:g}"
        )
    if options.shrink and not options.per_class:
        raise ValueError("--shrink is a way of --per-class: add --per-class, or leave it out")
    if options.known_only and options.data is None:
        raise ValueError("--known-only chooses among the images of --data, which is not given")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    if not 0 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 to {MOST_THREADS}, got {options.threads}")
    return rate


# --- scores and rule ------------------------------------------------------------------------------


def _learned(
    viewing: Viewing,
    known: Known,
    score: str,
    options: CalibrateOptions,
    say: Callable[[str], None],
) -> _Learned:
    """Fit a score that needs it to the run's training images, as an evaluation does."""
    if score not in NEED_FIT:
        return _Learned()
    own = {
        images.name: images
        for images in training_images(
            viewing.trained, options.train, f"the score {score} is fitted to the training images"
        )
    }
    folder, model, notes = viewing.trained.run, viewing.model, []
    cssr = learn_cssr(viewing, own[TRAIN]) if score == "cssr" else None
    train, held_out = run_pass(viewing, own[TRAIN], folder, cssr), None
    if score == "temperature":
        taken = known.own
        if not taken and HELD_OUT in own:
            taken = overlap(known.images, own[HELD_OUT], options.threads, say).trained_on.any()
        if HELD_OUT not in own:
            notes.append(
                "no image was held out (--val): the temperature is fitted to the training images, "
                "of which the network is too sure"
            )
        elif taken:
            notes.append(
                "the temperature is fitted to the training images, not to the held-out ones as in "
                "an evaluation: on these the threshold is calibrated, and both must not be"
            )
        else:
            held_out = run_pass(viewing, own[HELD_OUT], folder)
    say("fitting scores")
    fit = fit_scores(train, linear_head(model.head), held_out)
    if score == "temperature" and fit.temperature in (COLDEST, HOTTEST):
        notes.append(
            f"the fitted temperature is at its bound, {fit.temperature:g}: the images that it is "
            "fitted to do not determine it"
        )
    if score != "knn":  # by far the largest part of it
        fit = replace(fit, bank=fit.bank[:0])
    elif len(fit.bank) < fit.images:
        notes.append(f"neighbours are looked for among {len(fit.bank):,} of {fit.images:,} images")
    if cssr is not None and cssr.without_gram:
        notes.append(cssr.without_gram)
    return _Learned(fit, cssr, tuple(notes))


def _scores(outputs: Outputs, model: Model, score: str, fit: Fit | None) -> np.ndarray:
    return score_of(score, outputs.logits, outputs.features, outputs.extras, model.head, fit)


def _rule(
    scores: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    rate: Fraction,
    options: CalibrateOptions,
) -> Rule:
    if not options.per_class:
        return global_rule(scores, len(classes), rate, options.confidence)
    if options.shrink:
        return shrunk_rule(scores, predicted, len(classes), rate, options.confidence)
    return conditional_rule(scores, predicted, classes, rate, options.confidence)


def _ties(rule: Rule) -> list[str]:
    """Return a note where many calibration images share a threshold's very score."""
    notes = []
    for part in rule.categories:
        at = int(np.searchsorted(part.table.values, part.threshold))
        ties = int(part.table.upto[at] - part.table.below[at])
        if ties > 1:
            notes.append(
                f"{ties:,} calibration images of {part.name} have the very score of the threshold: "
                "fewer images will be rejected than the rate allows, and fewer than intervals say"
            )
    return notes


def _shares(
    rule: Rule,
    outputs: Outputs,
    predicted: np.ndarray,
    scores: np.ndarray,
    options: CalibrateOptions,
) -> dict[str, Any]:
    """Return what the rule does to the calibration images: figures to look at, no promise.

    `labelled`, `right`, `accepted`, `accepted_right`: images whose class is known, those classified
    right, those accepted, both. Of a shrunk rule `by_class` besides: images of the half that the
    threshold was calibrated on, and how many of these are rejected, by predicted class.
    """
    accepted, _ = rule.decide(predicted, scores)
    labelled = outputs.labels >= 0
    right = labelled & (predicted == outputs.labels)
    found: dict[str, Any] = {
        "labelled": int(labelled.sum()),
        "right": int(right.sum()),
        "accepted": int((accepted & labelled).sum()),
        "accepted_right": int((accepted & right).sum()),
    }
    if options.shrink:
        second = halves(len(scores))[1]
        rejected = predicted[second][~accepted[second]]
        found["by_class"] = [
            np.bincount(classes, minlength=len(rule.category)).tolist()
            for classes in (predicted[second], rejected)
        ]
    return found


def _parameters(score: str, fit: Fit | None) -> dict[str, Any]:
    """Return what a score depends on, for people."""
    match score:
        case "energy":
            return {"temperature": 1.0}
        case "gen":
            return {"gamma": 0.1}
        case "ash_s":
            return {"pruned_share": ASH_SHARE}
        case "scale":
            return {"left_out_share": SCALE_SHARE}
    if fit is None:
        return {}
    found: dict[str, Any] = {"fitted_to": fit.images}
    match score:
        case "temperature":
            found |= {"temperature": fit.temperature, "held_out": fit.held_out}
        case "knn":
            found |= {"neighbour": fit.k, "features": len(fit.bank)}
        case "react" if fit.linear is not None:
            found |= {"clip": fit.linear.clip}
        case "dice":
            found |= {"pruned_share": DICE_SHARE}
        case "vim":
            found |= {"principal": PRINCIPAL}
        case "nci":
            found |= {"alpha": NCI_ALPHA}
    return found


# --- what is written ------------------------------------------------------------------------------


def _facts(run: Path, trained: Trained, command: Sequence[str]) -> dict[str, Any]:
    config = read_config(run)
    host = host_of(trained.options.method)
    return {
        "run": {
            "folder": str(run),
            "method": type(trained.options.method).__name__,
            "host": type(host).__name__,
            "recipe": str(config.get("recipe", "")),
            "commit": str(config.get("commit", "")),
            "data": trained.digest,
        },
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def _write(run: Path, record: Record, outputs: Outputs, learned: _Learned) -> Record:
    """Write the files of a calibration, the record last; return it.

    Who is killed in between has the earlier threshold, which is refused where it belongs to the
    earlier fit.
    """
    store(run / CALIBRATION, outputs)
    if learned.fit is not None:
        write_fit(run / FIT, learned.fit, learned.cssr)
        record = replace(record, fit=file_digest(run / FIT))
    _keep(run)
    write_record(run / THRESHOLD, record)
    return record


def _keep(run: Path) -> None:
    """Keep the threshold that is there under the date of its making."""
    path = run / THRESHOLD
    if not path.is_file():
        return
    made = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # damaged, or of anybody
        made = datetime.fromisoformat(json.loads(path.read_bytes())["facts"]["date"])
    stem = f"threshold.{made.astimezone(UTC):%Y-%m-%dT%H-%M-%SZ}"
    number = 1
    kept = run / f"{stem}.json"
    while kept.exists():
        number += 1
        kept = run / f"{stem}-{number}.json"
    write_atomically(kept, path.read_bytes())
