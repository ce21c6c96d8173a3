"""From a method's options to the network that it trains, and to the method."""

import numpy as np
import torch

from backmix.pipeline.beton import BetonSet
from backmix.pipeline.subset import Subset
from backmix.train.methods.arpl import ArplMethod
from backmix.train.methods.backmix import BackMixMethod, foreground_shares
from backmix.train.methods.confusing import Confusion, pair_norms
from backmix.train.methods.cssr import CssrMethod
from backmix.train.methods.method import HostMethod, Method
from backmix.train.methods.softmax import SoftmaxMethod
from backmix.train.methods.ssod import SsodMethod, freeze, new_rejection
from backmix.train.models.any import AnyModel
from backmix.train.models.blurpool import add_blurpool
from backmix.train.models.build import Model
from backmix.train.models.build import build as build_model
from backmix.train.models.fit import needs_map, refuse_unfit
from backmix.train.models.heads import ReciprocalPoints, Reconstruction, linear_head, put_head
from backmix.train.options import Arpl, BackMix, Cssr, Host, Run, Softmax, Ssod, host_of


def build_network(run: Run, classes: int) -> Model:
    """Make a run's network with the heads of its method, weights drawn from torch's generator."""
    model = build_model(run.model, classes, run.loader.size)
    if run.blurpool:
        add_blurpool(model)
    refuse_unfit(run, model)
    match host_of(run.method):
        case Softmax():
            pass
        case Ssod() as options:
            model.rejection = new_rejection(linear_head(model).in_features)
            if options.train == "head":
                freeze(model)
        case Arpl() as options:
            put_head(model, ReciprocalPoints(classes, linear_head(model).in_features))
            if options.confusing:
                pair_norms(model)
        case Cssr() as options:
            head = Reconstruction(
                classes,
                linear_head(model).in_features,
                options.latent,
                options.gamma,
                reciprocal=options.kind == "reciprocal",
            )
            put_head(model, head)
    if isinstance(model, AnyModel):
        model.maps_in_training = needs_map(run)
        model.tap()
    return model


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
        model: the network that `build_network` made, on its device.
        data: the data set, for the names of the samples (masks).
        subset: the training samples; the bank has one row for each, in this order.
        device: where the method's tensors live.
        views: dtype of the images that the network is given.
    """
    if not isinstance(run.method, BackMix):
        return _host(run.method, run, len(subset), device, views)
    options = run.method
    # The bank has the grid of the largest views; maps of smaller ones are written into it, too.
    grid = model.grid(run.loader.size)
    smallest = run.loader.grow_from
    if smallest and model.grid(smallest) <= (1, 1):
        raise ValueError(
            f"--loader.grow-from {smallest}: {run.model} leaves one cell of such an image, which "
            "cannot show BackMix where a class is; begin with larger views"
        )
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
        host=_host(options.host, run, len(subset), device, views),
        augment=run.augment,
        bank=torch.full((len(subset), *grid), 0.5, dtype=torch.float16, device=device),
        truth=truth,
        row_of=torch.from_numpy(row_of).to(device),
        label_of=label_of,
        side=run.loader.size,
        views=views,
        grid=model.grid,
    )


def _host(
    options: Host, run: Run, samples: int, device: torch.device, views: torch.dtype
) -> HostMethod:
    """Return a method by itself; `samples` is the number of training images."""
    smoothing = run.optim.label_smoothing
    match options:
        case Softmax():
            return SoftmaxMethod(run.augment, smoothing, views)
        case Ssod():
            steps = -(-samples // run.loader.batch)
            return SsodMethod(options, run.augment, smoothing, views, ramp=steps, device=device)
        case Arpl():
            confusion = None
            if options.confusing:
                confusion = Confusion(options, run.augment, run.loader.size, run.seed, device)
            return ArplMethod(options, run.augment, smoothing, views, confusion)
        case Cssr():
            return CssrMethod(run.augment, views)
