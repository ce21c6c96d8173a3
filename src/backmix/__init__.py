"""Open-set recognition regularised by image backgrounds."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Decision",
    "Predictor",
    "auroc",
    "class_reconstruction",
    "convert",
    "load",
    "location_confidence",
    "mix_background",
    "open_loader",
    "oscr",
    "update_cam_bank",
]

if TYPE_CHECKING:
    from backmix.kernels.class_reconstruction import class_reconstruction as class_reconstruction
    from backmix.kernels.location_confidence import location_confidence as location_confidence
    from backmix.kernels.mix_background import mix_background as mix_background
    from backmix.kernels.update_cam_bank import update_cam_bank as update_cam_bank
    from backmix.pipeline.batch import Batch as Batch
    from backmix.pipeline.convert import convert as convert
    from backmix.pipeline.loader import open_loader as open_loader
    from backmix.train.decide.decision import Decision as Decision
    from backmix.train.decide.door import Predictor as Predictor
    from backmix.train.decide.door import load as load
    from backmix.train.metrics import auroc as auroc
    from backmix.train.metrics import oscr as oscr

_HOMES = {
    "Batch": "backmix.pipeline.batch",
    "Decision": "backmix.train.decide.decision",
    "Predictor": "backmix.train.decide.door",
    "auroc": "backmix.train.metrics",
    "class_reconstruction": "backmix.kernels.class_reconstruction",
    "convert": "backmix.pipeline.convert",
    "load": "backmix.train.decide.door",
    "location_confidence": "backmix.kernels.location_confidence",
    "mix_background": "backmix.kernels.mix_background",
    "open_loader": "backmix.pipeline.loader",
    "oscr": "backmix.train.metrics",
    "update_cam_bank": "backmix.kernels.update_cam_bank",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use, so that `import backmix` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'backmix' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
