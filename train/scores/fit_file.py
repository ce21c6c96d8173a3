"""What scores learned from training images, as a file: RUN/fit.safetensors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backmix.train.checkpoint import load_tensors, save_tensors
from backmix.train.models.build import Model
from backmix.train.models.heads import Reconstruction
from backmix.train.scores.cssr import CssrFit, Standard
from backmix.train.scores.features import Gaussians
from backmix.train.scores.fit import Fit, LinearFit
from backmix.train.scores.linear import Residual

FIT = "fit.safetensors"
"""Its name in the run folder."""
_SCHEMA = 1


def write_fit(path: Path, fit: Fit, cssr: CssrFit | None = None) -> None:
    """Write a fit whole or not at all; equal fits give equal bytes.

    Args:
        path: the file.
        fit: of `fit_scores`.
        cssr: what CSSR's figures are made from, after `finish_learning`.

    Raises:
        OSError: naming the file, the bytes needed and the bytes free.
    """
    arrays = {
        "gaussians.mean": fit.gaussians.mean,
        "gaussians.whiten": fit.gaussians.whiten,
        "gaussians.centres": fit.gaussians.centres,
        "gaussians.whiten_all": fit.gaussians.whiten_all,
        "bank": fit.bank,
    }
    meta: dict[str, Any] = {
        "schema": _SCHEMA,
        "images": fit.images,
        "held_out": fit.held_out,
        "temperature": fit.temperature,
        "k": fit.k,
        "notes": list(fit.notes),
    }
    if fit.linear is not None:
        arrays["residual.origin"] = fit.linear.residual.origin
        arrays["residual.basis"] = fit.linear.residual.basis
        meta["linear"] = {"clip": fit.linear.clip, "alpha": fit.linear.residual.alpha}
    if fit.cssr is not None:
        meta["standard"] = {"mean": dict(fit.cssr.mean), "deviation": dict(fit.cssr.deviation)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    if cssr is not None:
        tensors |= {"cssr.images": cssr.images, "cssr.activity": cssr.activity}
        if cssr.grams is not None:
            tensors["cssr.grams"] = cssr.grams
        meta["cssr"] = {"unit": cssr.unit, "without_gram": cssr.without_gram}
    save_tensors(path, tensors, meta)


def read_fit(path: Path, model: Model) -> tuple[Fit, CssrFit | None]:
    """Return what `write_fit` wrote.

    Args:
        path: the file.
        model: the network, on the device where CSSR's figures will be computed.

    Raises:
        ValueError: the file is damaged, or of another network.
        OSError: it cannot be read.
    """
    tensors, meta = load_tensors(path)
    if meta.get("schema") != _SCHEMA:
        raise ValueError(f"{path} is of another version of backmix: calibrate again")
    try:
        return _fit(tensors, meta), _cssr(tensors, meta, model)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no fit of this network: {error!r}") from error


def _fit(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Fit:
    def array(name: str) -> np.ndarray:
        return tensors[name].numpy()

    linear = standard = None
    if "linear" in meta:
        given = meta["linear"]
        residual = Residual(array("residual.origin"), array("residual.basis"), given["alpha"])
        linear = LinearFit(given["clip"], residual)
    if "standard" in meta:
        standard = Standard(meta["standard"]["mean"], meta["standard"]["deviation"])
    return Fit(
        images=meta["images"],
        held_out=meta["held_out"],
        temperature=meta["temperature"],
        gaussians=Gaussians(
            array("gaussians.mean"),
            array("gaussians.whiten"),
            array("gaussians.centres"),
            array("gaussians.whiten_all"),
        ),
        bank=array("bank"),
        k=meta["k"],
        linear=linear,
        cssr=standard,
        notes=tuple(meta["notes"]),
    )


def _cssr(tensors: dict[str, Tensor], meta: dict[str, Any], model: Model) -> CssrFit | None:
    if "cssr" not in meta:
        return None
    if not isinstance(model.head, Reconstruction):
        raise TypeError("it has figures of CSSR")
    device = model.head.encoder.device
    fit = CssrFit(model, most_gram=0)
    for name in ("images", "activity"):
        now, read = getattr(fit, name), tensors[f"cssr.{name}"]
        if now.shape != read.shape:
            raise TypeError(f"cssr.{name} is {list(read.shape)}, the network has {list(now.shape)}")
        setattr(fit, name, read.to(device))
    if "cssr.grams" in tensors:
        fit.grams = tensors["cssr.grams"].to(device)
    fit.unit, fit.without_gram = meta["cssr"]["unit"], meta["cssr"]["without_gram"]
    return fit
