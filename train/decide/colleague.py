"""What a calibrated run does, for readers who know nothing of it: a part of the report.

In plain words and tables: what share of good images is refused and how sure that is, how many of
the unknown test images are caught, what holds for each class, and pictures of the hardest errors
both ways. Everything is taken from the run's record and its stored evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backmix.pipeline.beton import open_set, printable
from backmix.pipeline.decode import read_image
from backmix.pipeline.folder_images import problem_of
from backmix.pipeline.images import decode_rgb
from backmix.train.claims import stored_images
from backmix.train.decide.conformal import Floats, exact_rate, share_interval
from backmix.train.decide.decider import fit_file
from backmix.train.decide.drift import Counts, at_thresholds, comparable, rejected_of
from backmix.train.decide.record import THRESHOLD, Record, read_record
from backmix.train.decide.rule import Category
from backmix.train.decide.thumbnails import Thumbnail, Tile, thumbnail
from backmix.train.decide.words import percent
from backmix.train.digests import weights_digest
from backmix.train.image_sets import image_files
from backmix.train.models.heads import Head
from backmix.train.outputs import Outputs
from backmix.train.results import SCORE_NAMES, Group, Judged
from backmix.train.scores import SCORES, Fit, score_of
from backmix.train.scores.fit_file import read_fit
from backmix.train.trained import load_model

Learned = tuple[Head, Fit]
"""What a fitted score is made with, beside the stored outputs."""
_FUNCTIONS = {score.__name__: score for score in SCORES}
_MOST_CLASSES = 20
"""Classes up to which the whole confusion matrix is shown; of more the commonest confusions."""
_MOST_ROWS = 20
_MOST_PICTURES = 8
"""Of each kind of error."""
_MOST_SETS = 3
"""Unknown sets of which pictures are shown."""
_MOST_RUNS = 6
"""Runs of which pictures are shown."""


@dataclass(frozen=True, eq=False)
class Decided:
    """A stored set, and what the record decides about its n images."""

    outputs: Outputs
    predicted: Counts
    """int64 [n]"""
    scores: Floats
    """float64 [n]"""
    p_values: Floats
    """float64 [n]"""
    accepted: np.ndarray
    """bool [n]"""


@dataclass(frozen=True)
class Share:
    """A share of some images with its interval, as text."""

    count: str
    """`12 of 300`"""
    percent: str
    """`4.0 %`; a dash where there are no images."""
    interval: str
    """`2.1 to 6.9 %`"""


@dataclass(frozen=True)
class Pictures:
    """The hardest errors of one kind."""

    title: str
    text: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Colleague:
    """What there is to say of one run."""

    title: str
    promise: tuple[str, ...]
    """The guarantee, in words; empty where the record cannot be read."""
    categories: tuple[tuple[str, ...], ...]
    """Of a rule with several: name, calibration images, mean share, interval."""
    missing: str
    """Why there are no figures; empty where there are."""
    caution: str = ""
    """Why the figures may flatter the threshold; empty where there is no reason."""
    summary: tuple[tuple[str, Share, str], ...] = ()
    """What is counted, its share, and a remark."""
    classes: tuple[tuple[str, Share, Share], ...] = ()
    """Name, share refused, and share right among the accepted."""
    confusion: tuple[tuple[str, ...], ...] = ()
    """A row per true class and unknown set: name, then counts."""
    columns: tuple[str, ...] = ()
    """Heads of the confusion matrix."""
    confused: tuple[tuple[str, str, str], ...] = ()
    """Where there are too many classes: what it is, what it was accepted as, how often."""
    pictures: tuple[Pictures, ...] = ()


def for_colleagues(groups: Sequence[Group], program: str = "") -> list[Colleague]:
    """Return what there is to say of every run that has a threshold.

    Args:
        groups: the runs.
        program: as in `trained.load_model`; the figures of a fitted score need the network.
    """
    runs = [
        (group, run) for group in groups for run in group.runs if (run.folder / THRESHOLD).is_file()
    ]
    return [
        _of_run(f"{group.label}, {run.name}", run, program, pictures=number < _MOST_RUNS)
        for number, (group, run) in enumerate(runs)
    ]


def _of_run(title: str, run: Judged, program: str, *, pictures: bool) -> Colleague:
    try:
        record = read_record(run.folder)
    except (ValueError, OSError) as error:
        return Colleague(title, (), (), printable(str(error)))
    promise, categories = _promise(record), _categories(record)
    try:
        _check(run, record)
        learned = _learned(run.folder, record, program)
        known = _decided(run.known, record, learned)
        unknown = [_decided(outputs, record, learned) for outputs in run.unknown.values()]
    except (ValueError, OSError) as error:
        return Colleague(title, promise, categories, printable(str(error)))
    names = tuple(map(printable, record.classes))
    small = len(names) <= _MOST_CLASSES
    return Colleague(
        title,
        promise,
        categories,
        "",
        _caution(run, record),
        _summary(record, known, unknown),
        _classes(names, known),
        _confusion(names, known, unknown) if small else (),
        (*names, "refused") if small else (),
        () if small else _confused(names, known, unknown),
        _pictures(names, known, unknown) if pictures else (),
    )


def _check(run: Judged, record: Record) -> None:
    """Refuse an evaluation that is not of what the record decides about.

    Raises:
        ValueError: why there are no figures.
    """
    if tuple(run.metrics["classes"]) != record.classes:
        raise ValueError("The threshold was chosen for other classes than the evaluation's.")
    if record.weights != weights_digest(run.folder):
        raise ValueError(
            "The threshold was chosen for other weights than the run has now: calibrate again."
        )
    if run.metrics.get("weights", record.weights) != record.weights:
        raise ValueError(
            "The run was evaluated with other weights than it has now: evaluate it again."
        )
    precision = run.metrics.get("precision", record.precision)
    if precision != record.precision:
        raise ValueError(
            f"The run was evaluated in {precision}, the threshold was chosen in "
            f"{record.precision}: scores differ, so these figures would not be those of the "
            f"threshold. Evaluate with --precision {record.precision}."
        )
    views = run.metrics.get("views", {})
    size = views.get("size", run.config["run"]["loader"]["size"])
    flip = views.get("flip", False)
    if size != record.preprocessing.size or flip:
        mirrored = " and with mirror images" if flip else ""
        raise ValueError(
            f"The run was evaluated at {size} px{mirrored}, the threshold was chosen at "
            f"{record.preprocessing.size} px without mirror images: scores differ, so these "
            "figures would not be those of the threshold. Evaluate as it was calibrated."
        )


def _decided(outputs: Outputs, record: Record, learned: Learned | None) -> Decided:
    scores = np.asarray(_scores(outputs, record.score, learned), np.float64)
    predicted = np.asarray(outputs.logits).argmax(1)
    accepted, p = record.rule.decide(predicted, scores)
    return Decided(outputs, predicted, scores, p, accepted)


def _learned(run: Path, record: Record, program: str) -> Learned | None:
    """Return what a fitted score is made with, as it was when the threshold was chosen."""
    path = fit_file(run, record)
    if path is None:
        return None
    model = load_model(run, program)
    fit, _ = read_fit(path, model)
    return model.head, fit


def _scores(outputs: Outputs, score: str, learned: Learned | None) -> np.ndarray:
    """Return the score that decides, [n].

    A fitted one by the threshold's own fit, which need not be the evaluation's: the temperature,
    for one, is another where the threshold was chosen on the held-out images.
    """
    # Figures of CSSR are only there where the evaluation had learned what they are made from.
    if learned is not None and (score != "cssr" or score in outputs.scores):
        return score_of(score, outputs.logits, outputs.features, outputs.extras, *learned)
    if score in outputs.scores:
        return outputs.scores[score]
    if score not in _FUNCTIONS:
        raise ValueError(
            f"The evaluation has no {SCORE_NAMES.get(score, score)} scores, by which the threshold "
            "decides: evaluate with --fit."
        )
    return _FUNCTIONS[score](outputs.logits)


# --- words and tables -----------------------------------------------------------------------------


def _promise(record: Record) -> tuple[str, ...]:
    rule, rate = record.rule, f"{100 * float(exact_rate(record.rate)):g} %"
    n = sum(category.n for category in rule.categories)
    what = {
        "off": f"Of good images, {rate} at most are refused",
        "conditional": f"Of the good images of each category below, {rate} at most are refused",
        "shrunk": (
            f"Of good images, all classes together, {rate} at most are refused (thresholds differ "
            "by class; of a single class nothing is promised)"
        ),
    }[rule.per_class]
    if record.confidence is None:
        how = (
            "on the average over choices of calibration images. This very threshold refuses more "
            "or less than that by chance"
        )
    else:
        how = (
            f"and that holds for this very threshold, with {100 * record.confidence:g} % confidence"
        )
    apart = "that nothing was trained on"
    if not record.data.get("compared", True):
        apart = "(nobody has checked that nothing was trained on them)"
    words = [
        f"{what}, {how}. Good images are images of the {len(record.classes):,} known classes that "
        "come about like the calibration images."
    ]
    if len(rule.categories) == 1:
        (category,) = rule.categories
        low, high = category.interval
        words.append(
            f"The threshold comes from {n:,} such images {apart}: with 95 % confidence "
            f"it refuses between {percent(low, 1)} and {percent(high, 1)} of good images."
        )
    else:
        words.append(f"The thresholds come from {n:,} such images {apart}.")
    words.append(
        "Of unknown images nothing can be promised: how many are caught depends on how unlike the "
        "known classes they are. What was measured stands below."
    )
    return tuple(words)


def _caution(run: Judged, record: Record) -> str:
    words = []
    if record.data.get("digest") == run.known.digest:
        words.append(
            "The threshold was chosen on images of the same file as these test images, so the "
            "figures may flatter it. Judge it on others."
        )
    if "precision" not in run.metrics:
        words.append(
            "This evaluation is of an earlier version, which did not note in which precision (fp32 "
            f"or bf16) and with which weights it was made: it is not known whether they are those "
            f"of the threshold, {record.precision} and the run's present weights. Evaluate again "
            "to know."
        )
    return " ".join(words)


def _categories(record: Record) -> tuple[tuple[str, ...], ...]:
    def row(category: Category) -> tuple[str, ...]:
        low, high = category.interval
        ends = f"{percent(low, 1)} to {percent(high, 1)}"
        return printable(category.name), f"{category.n:,}", percent(category.mean_rate, 1), ends

    categories = record.rule.categories
    return tuple(map(row, categories)) if len(categories) > 1 else ()


def _summary(
    record: Record, known: Decided, unknown: Sequence[Decided]
) -> tuple[tuple[str, Share, str], ...]:
    n, accepted = len(known.outputs), known.accepted
    refused = int(np.count_nonzero(~accepted))
    right = known.predicted == known.outputs.labels
    compared = comparable(record.rule, known.predicted)
    _, low, high = rejected_of(record.rule, known.predicted[compared], 0.01)
    below, upto = (
        int(np.count_nonzero(each & compared))
        for each in at_thresholds(record.rule, known.predicted, known.scores)
    )
    if not compared.any():
        remark = "not compared: all are predicted as classes with few calibration images"
    elif below > high:
        remark = "more than promised: the test images are not like the calibration images"
    elif upto < low:
        remark = "fewer than promised: the test images are easier than the calibration images"
    else:
        remark = "as promised"
    rows = [
        ("Good images refused", _share(refused, n), remark),
        (
            "Accepted good images in the right class",
            _share(int(right[accepted].sum()), n - refused),
            f"without refusing any: {percent(right.mean(), 1)}",
        ),
    ]
    for images in unknown:
        caught = int(np.count_nonzero(~images.accepted))
        name = f"Unknown images caught, “{printable(images.outputs.name)}”"
        rows.append((name, _share(caught, len(images.outputs)), ""))
    return tuple(rows)


def _classes(names: Sequence[str], known: Decided) -> tuple[tuple[str, Share, Share], ...]:
    """Return a row per true class, those with the greatest share of refused images first."""
    labels, count = known.outputs.labels, len(names)
    images = np.bincount(labels, minlength=count)
    accepted = np.bincount(labels[known.accepted], minlength=count)
    right = np.bincount(labels[known.accepted & (known.predicted == labels)], minlength=count)
    refused = images - accepted
    order: list[int] = np.argsort(-refused / np.maximum(images, 1), kind="stable").tolist()
    return tuple(
        (
            names[k],
            _share(int(refused[k]), int(images[k])),
            _share(int(right[k]), int(accepted[k])),
        )
        for k in order
    )


def _counts(names: Sequence[str], known: Decided, unknown: Sequence[Decided]) -> Counts:
    """Return a row per true class, then one per unknown set: accepted as each class, refused."""
    count = len(names)
    truth = [known.outputs.labels]
    truth += [np.full(len(each.outputs), count + at) for at, each in enumerate(unknown)]
    said = [np.where(each.accepted, each.predicted, count) for each in (known, *unknown)]
    rows, columns = count + len(unknown), count + 1
    place = np.concatenate(truth) * columns + np.concatenate(said)
    return np.bincount(place, minlength=rows * columns).reshape(rows, columns)


def _truths(names: Sequence[str], unknown: Sequence[Decided]) -> list[str]:
    return [*names, *(f"unknown: {printable(each.outputs.name)}" for each in unknown)]


def _confusion(
    names: Sequence[str], known: Decided, unknown: Sequence[Decided]
) -> tuple[tuple[str, ...], ...]:
    counts = _counts(names, known, unknown).tolist()
    return tuple(
        (name, *(f"{count:,}" for count in row))
        for name, row in zip(_truths(names, unknown), counts, strict=True)
    )


def _confused(
    names: Sequence[str], known: Decided, unknown: Sequence[Decided]
) -> tuple[tuple[str, str, str], ...]:
    """Return the commonest ways to be accepted as something else."""
    counts = _counts(names, known, unknown)[:, :-1]
    np.fill_diagonal(counts, 0)  # known classes come first
    truths = _truths(names, unknown)
    order: list[int] = np.argsort(-counts, axis=None, kind="stable")[:_MOST_ROWS].tolist()
    return tuple(
        (truths[row], names[column], f"{counts[row, column]:,}")
        for row, column in (divmod(place, len(names)) for place in order)
        if counts[row, column]
    )


def _share(count: int, n: int) -> Share:
    if not n:
        return Share("0 of 0", "-", "-")
    low, high = share_interval(count, n)
    return Share(
        f"{count:,} of {n:,}", percent(count / n, 1), f"{percent(low, 1)} to {percent(high, 1)}"
    )


# --- pictures -------------------------------------------------------------------------------------


def _pictures(
    names: Sequence[str], known: Decided, unknown: Sequence[Decided]
) -> tuple[Pictures, ...]:
    """Return the good images that are least known, and the unknown ones that are most."""
    refused = np.flatnonzero(~known.accepted)
    order = np.lexsort((known.scores[refused], known.p_values[refused]))
    found = [
        Pictures(
            "Good images that are refused",
            "Those with the lowest scores.",
            _tiles(names, known, refused[order][:_MOST_PICTURES]),
        )
    ]
    for images in unknown[:_MOST_SETS]:
        accepted = np.flatnonzero(images.accepted)
        order = np.lexsort((-images.scores[accepted], -images.p_values[accepted]))
        found.append(
            Pictures(
                f"Unknown images of “{printable(images.outputs.name)}” that are accepted",
                "Those with the highest scores.",
                _tiles(names, images, accepted[order][:_MOST_PICTURES]),
            )
        )
    return tuple(found)


def _tiles(names: Sequence[str], images: Decided, rows: Counts) -> tuple[Tile, ...]:
    outputs, tiles = images.outputs, []
    if not len(rows):
        return ()
    try:
        with _opened(outputs) as read:
            pictures = [_thumbnail(read, row) for row in rows.tolist()]
    except (ValueError, OSError) as error:
        pictures = [Thumbnail(problem=problem_of(error))] * len(rows)
    for row, picture in zip(rows.tolist(), pictures, strict=True):
        label, said = int(outputs.labels[row]), names[int(images.predicted[row])]
        truth = names[label] if label >= 0 else "unknown"
        number = f"image {int(outputs.index[row])}"
        score = f"score {images.scores[row]:.4g}, p-value {images.p_values[row]:.2g}"
        what = f"is {truth}, most like {said}" if label >= 0 else f"taken for {said}"
        alt = f"{number} of {printable(outputs.name)}: {what}, {score}"
        tiles.append(Tile(picture.source, printable(picture.problem), alt, (what, score, number)))
    return tuple(tiles)


def _thumbnail(read: Callable[[int], np.ndarray], row: int) -> Thumbnail:
    try:
        return thumbnail(read(row))
    except (ValueError, OSError) as error:
        return Thumbnail(problem=problem_of(error))


@contextmanager
def _opened(outputs: Outputs) -> Iterator[Callable[[int], np.ndarray]]:
    """Give what returns the image of a row, uint8 [h, w, 3].

    Raises:
        ValueError: the set's files are not there, or not the same any more.
    """
    folder = Path(outputs.files[0]) if len(outputs.files) == 1 else None
    if folder is not None and folder.is_dir():
        items = image_files(folder)
        if len(items) != len(outputs) + len(outputs.bad):
            raise ValueError(f"{folder} no longer holds the images that were judged")
        sizes: Any = outputs.extras.get("file_size")

        def of_folder(row: int) -> np.ndarray:
            data = items[int(outputs.index[row])].read()
            if sizes is not None and len(data) != int(sizes[row]):
                raise ValueError("not the image that was judged any more")
            return decode_rgb(data)

        yield of_folder
        return
    stored_images(outputs, 1)  # refuses files that have gone or changed
    with open_set(outputs.files) as data:
        yield lambda row: read_image(data, int(outputs.index[row]))[0]
