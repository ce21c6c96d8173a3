"""What an image shows before any network looks at it: controls of every comparison.

Sets of different origin often differ in brightness, contrast, sharpness or size of their files. A
network that parts such sets no better than one of these has shown nothing. A cue knows no
direction: what counts is the larger of AUROC and 1 - AUROC.
"""

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.views import to_device

CUES = ("brightness", "contrast", "sharpness", "file_size", "feature_norm")
"""Scores without a direction, by name: the cues, and the length of the pooled feature."""
_PIXELS = 1 << 16
"""Pixels that a CPU looks at together, at least one image."""


def image_cues(views: Tensor) -> dict[str, Tensor]:
    """Return brightness, contrast and sharpness of views uint8 [n, H, W, 3], each float32 [n].

    Of the grey 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) in 0 .. 255, before normalising. Mean;
    standard deviation over the pixels; mean of |Laplacian| (4 g - left - right - above - below)
    over all pixels but the border, 0 for a side below 3.
    """
    if views.is_cuda:
        return _cues(views)
    # On a CPU image by image, or as many small ones: what lies between stays in the cache, which is
    # five times as fast; an image's figures are the same bits in any company.
    at_once = max(1, _PIXELS // max(views.shape[1] * views.shape[2], 1))
    parts = [_cues(some) for some in views.split(at_once)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _cues(views: Tensor) -> dict[str, Tensor]:
    # Made on the GPU itself they would be copied there in a way that waits for all its work.
    weights = to_device(np.array([0.299, 0.587, 0.114], np.float32), views.device)
    grey = views.float() @ weights
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    count = max(inner.shape[1] * inner.shape[2], 1)
    return {
        "brightness": grey.mean((1, 2)),
        "contrast": grey.std((1, 2), correction=0),
        "sharpness": (4 * inner - around).abs().sum((1, 2)) / count,
    }
