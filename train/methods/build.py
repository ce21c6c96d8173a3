"""From a method's options to the method."""

import numpy as np
import torch

from backmix.pipeline.beton import BetonSet
from backmix.pipeline.subset import Subset
from backmix.train.methods.backmix import BackMixMethod, foreground_shares
from backmix.train.methods.method import Method
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.models.build import Model
from backmix.train.options import BackMix, Run, Softmax


def build(
    run: Run,
    model: Model,
    data: BetonSet,
    subset: Subset,
    device: torch.device,
    views: torch.dtype = torch.float32,
) -> Method:
    """Return the method that a run's options ask for.

    Args:
        run: the options.
        model: the network, for the grid of its last feature map.
        data: the data set, for the names of the samples (masks).
        subset: the training samples; the bank has one row for each, in this order.
        device: where the bank lives.
        views: dtype of the images that the network is given.
    """
    match run.method:
        case Softmax():
            return SoftmaxMethod(run.augment, run.optim.label_smoothing, views)
        case BackMix() as options:
            grid = model.grid(run.loader.size)
            truth = None
            if options.masks:
                shares = foreground_shares(options.masks, data, subset, grid)
                truth = torch.from_numpy(shares).to(device)
            row_of = np.full(data.n, -1, np.int64)
            row_of[subset.index] = np.arange(len(subset))
            label_of = np.full(data.n, -1, np.int64)
            label_of[subset.index] = subset.labels
            return BackMixMethod(
                options=options,
                augment=run.augment,
                label_smoothing=run.optim.label_smoothing,
                bank=torch.full((len(subset), *grid), 0.5, dtype=torch.float16, device=device),
                truth=truth,
                row_of=torch.from_numpy(row_of).to(device),
                label_of=label_of,
                views=views,
            )
