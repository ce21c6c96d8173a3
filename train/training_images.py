"""The images that a run was trained on, found again for what is fitted to them."""

from pathlib import Path

from backmix.pipeline.beton import open_set
from backmix.pipeline.subset import hold_out, select
from backmix.train.image_sets import BetonImages
from backmix.train.trained import Trained

TRAIN, HELD_OUT = "train", "val"
"""Names of the sets of training and of held-out images."""


class MissingImagesError(ValueError):
    """The training file is not where it was, and nobody has said where it is."""


def training_images(
    trained: Trained,
    moved: tuple[Path, ...] = (),
    purpose: str = "scores are fitted to the training images",
) -> list[BetonImages]:
    """Return the images that a run learned from, and where --val held some out, these as well.

    Args:
        trained: the run.
        moved: its training file or files, where they no longer lie where the run read them.
        purpose: what they are needed for, for the message where they are not there.

    Raises:
        MissingImagesError: the files are not there.
        ValueError: they are not those of the run, or damaged.
    """
    files = moved or trained.files
    where = ", ".join(map(str, files))
    try:
        data = open_set(files)
    except FileNotFoundError as error:
        raise MissingImagesError(
            f"{error.filename} is not there, and {purpose}: name the file with --train FILE"
        ) from error
    with data:
        if data.digest != trained.digest:
            raise ValueError(
                f"{where} is not what {trained.run} was trained on (its digest differs): name the "
                "run's own training set with --train FILE"
            )
        run = trained.options
        known = select(data.labels, trained.known)
        rest, held = hold_out(known, run.val, run.seed)
    return [
        BetonImages(name, "known", files, data.digest, subset)
        for name, subset in ((TRAIN, rest), (HELD_OUT, held))
        if len(subset)
    ]
