"""Options of the commands that lead from a run to a decision; standard library only.

The attribute docstrings are the help texts of the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How a threshold is chosen."""

    reject_rate: str = "0.05"
    """Share of known images that may be rejected, between 0 and 1."""
    data: Path | None = None
    """Held-out known images: a .beton file, or a folder. Without it those that --val held out of
    the run's training."""
    known_only: bool = False
    """--data: leave out images of classes that the run does not know, or of a folder those that lie
    outside of its subfolders named as known classes; else they are an error."""
    score: str = ""
    """Score that decides, by its name in metrics.json; empty = the method's own, or max_logit."""
    confidence: float | None = None
    """Keep the rate with this confidence (such as 0.9), not only on the average over calibration
    sets: a lower threshold. Recommended where the threshold goes into a product."""
    per_class: bool = False
    """A threshold for each predicted class that has enough calibration images; the others share
    one."""
    shrink: bool = False
    """--per-class: thresholds between the class's own and that of all, where classes are small. The
    rate is then promised over all images together, no more for each class."""
    train: tuple[Path, ...] = ()
    """The training set, where it no longer lies where the run read it: calibration images are
    compared with it, and fitted scores are fitted to it."""
    unchecked: bool = False
    """Do not compare the calibration images with the training images, where these are gone; the
    record says so."""
    model: str = ""
    """The --model of a run of MODULE:CALLABLE once more: calibrating imports that program."""
    size: int = 0
    """Side of the views, where another than the run's is wanted; 0 = the run's [pixels]. Predicting
    uses the same."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; predicting uses the same."""
    batch: int = 256
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Decoding threads; 0 = one per core."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How images are decided about."""

    fdr: float | None = None
    """Reject as many images as possible while at most this share of the rejected ones is expected
    to be known (Benjamini-Hochberg over all images of this call), instead of by the threshold."""
    batch: int = 256
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int = 0
    """Decoding threads; 0 = one per core."""
    model: str = ""
    """The --model of a run of MODULE:CALLABLE once more: predicting imports that program."""
    trust: bool = False
    """Open a .pt2 file: torch runs what is in it, so only your own or a trusted party's."""
    limit_pixels: int = 178_956_970
    """Larger images are not decoded [pixels]."""


@dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """How predictions are watched."""

    against: Path
    """threshold.json, or the run folder that holds it."""
    out: Path = Path("monitor.html")
    """The page to write."""
    window: int = 0
    """Images per window of the rejection rate; 0 = chosen so that a window expects ten rejected, or
    more where that makes more than 512 windows."""
    level: float = 0.01
    """Probability of a false alarm over everything that is watched."""
    pictures: int = 48
    """Rejected images that are shown, the least known first; 1,000 at most."""
