"""What an image shows before any network looks at it: controls of every comparison.

Sets of different origin often differ in brightness, contrast, sharpness or size of their files. A
network that parts such sets no better than one of these has shown nothing. A cue knows no
direction: what counts is the larger of AUROC and 1 - AUROC.
"""

import torch
from torch import Tensor

CUES = ("brightness", "contrast", "sharpness", "file_size", "feature_norm")
"""Scores without a direction, by name: the cues, and the length of the pooled feature."""


def image_cues(views: Tensor) -> dict[str, Tensor]:
    """Return brightness, contrast and sharpness of views uint8 [n, H, W, 3], each float32 [n].

    Of the grey 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) in 0 .. 255, before normalising. Mean;
    standard deviation over the pixels; mean of |Laplacian| (4 g - left - right - above - below)
    over all pixels but the border, 0 for a side below 3.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=views.device)
    grey = views.float() @ weights
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    count = max(inner.shape[1] * inner.shape[2], 1)
    return {
        "brightness": grey.mean((1, 2)),
        "contrast": grey.std((1, 2), correction=0),
        "sharpness": (4 * inner - around).abs().sum((1, 2)) / count,
    }
