"""Scores as torch expressions, for files that decide without this package.

Each is the NumPy function of its name in `train/scores/`, which says what it means; here what it
learned is constant. float64, larger = more known. No expression asks how large a batch is or what
is in it, so that a program traced from one batch holds for every other; and every factor that fp32
would round is a tensor, for numbers between operations are written to ONNX as fp32.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from backmix.train.models.heads import Head
from backmix.train.scores import CUES, Fit, LinearHead, linear_head
from backmix.train.scores.cssr import CssrFit
from backmix.train.scores.features import Gaussians
from backmix.train.scores.linear import (
    ASH_SHARE,
    NCI_ALPHA,
    SCALE_SHARE,
    largest_count,
    pruned,
)
from backmix.train.scores.logits import GEN_CLASSES

MOST_NUMBERS = 2**24
"""Of a bank of neighbours, or of CSSR's Gram matrices, in one file: 64 or 128 MiB."""


class TorchScore(nn.Module):
    """One score: a formula, the outputs that it reads, and its constants."""

    def __init__(
        self,
        formula: Callable[..., Tensor],
        reads: tuple[str, ...],
        **constants: ArrayLike | None,
    ):
        """Keep the constants as buffers, which travel in a file and to a device.

        Args:
            formula: takes the outputs in the order of `reads`, and the constants by their names.
            reads: names of outputs.
            constants: None = that one is left out.
        """
        super().__init__()
        self.formula = formula
        self.reads = reads
        for name, value in constants.items():
            if value is not None:
                self.register_buffer(name, torch.from_numpy(np.array(value)))

    def forward(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the score, float64 [n].

        Args:
            outputs: "logits" [n, K] and pooled "features" [n, C], float64; where the network has
                them "rejection" [n], float64, "maps" [n, C, g, g'] and CSSR's "cssr_s0" [n].
        """
        return self.formula(*(outputs[name] for name in self.reads), **dict(self.named_buffers()))


def torch_score(name: str, head: Head, fit: Fit | None, cssr: CssrFit | None) -> TorchScore:
    """Return a score by its name in metrics.json.

    Args:
        name: the score.
        head: the network's class head.
        fit: what scores learned from the training images; None = nothing.
        cssr: what CSSR's did.

    Raises:
        ValueError: the score cannot be written as a program of a reasonable size, and why; or what
            it needs is not there.
    """
    if name == "odin":
        raise ValueError(
            "odin cannot be exported: it moves each image along the network's gradient, and an "
            "exported file runs forward only. Calibrate with another score (--score)"
        )
    if name in CUES and name != "feature_norm":
        raise ValueError(
            f"{name} cannot be exported: it looks at the image and at no network, and is there as "
            "a control only. Calibrate with another score (--score)"
        )
    made = _of_logits(name, fit) or _of_heads(name, fit, cssr) or _of_features(name, head, fit)
    if made is None:
        raise ValueError(
            f"{name} cannot be exported: this run has no such score, or it was fitted to nothing"
        )
    return made


def _of_logits(name: str, fit: Fit | None) -> TorchScore | None:
    match name:
        case "msp":
            return TorchScore(log_odds, ("logits",))
        case "temperature" if fit is not None:
            return TorchScore(_temperature, ("logits",), temperature=fit.temperature)
        case "max_logit" | "arpl":
            return TorchScore(_max_logit, ("logits",))
        case "energy":
            return TorchScore(log_sum_exp, ("logits",))
        case "gen":
            return TorchScore(_gen, ("logits",), gamma=0.1, most=-np.log(2.0))


def _of_heads(name: str, fit: Fit | None, cssr: CssrFit | None) -> TorchScore | None:
    match name:
        case "ssod":
            return TorchScore(_itself, ("rejection",))
        case "ssod_joint":
            return TorchScore(_ssod_joint, ("logits", "rejection"))
        case "arpl_dot":
            return TorchScore(_arpl_dot, ("logits", "features"))
        case "cssr_s0":
            return TorchScore(_itself, ("cssr_s0",))
        case "cssr" if fit is not None and fit.cssr is not None and cssr is not None:
            grams = None
            if cssr.grams is not None:
                _refuse_large("the Gram matrices of cssr", cssr.grams.shape, "cssr_s0")
                grams = (cssr.grams / cssr.unit).cpu().numpy()
            names = [f"cssr_s{number}" for number in range(2 if grams is None else 3)]
            return TorchScore(
                _cssr,
                ("cssr_s0", "logits", "maps"),
                activity=cssr.activity.cpu().numpy(),
                grams=grams,
                mean=[fit.cssr.mean[part] for part in names],
                deviation=[fit.cssr.deviation[part] + 1e-8 for part in names],
            )


def _of_features(name: str, head: Head, fit: Fit | None) -> TorchScore | None:
    match name:
        case "feature_norm":
            return TorchScore(_length, ("features",))
        case "knn" if fit is not None:
            _refuse_large("the training features of knn", fit.bank.shape, "mahalanobis")

            def knn(features: Tensor, bank: Tensor, k: int = fit.k) -> Tensor:
                return _knn(features, bank, k)

            return TorchScore(knn, ("features",), bank=fit.bank)
        case "mahalanobis" if fit is not None:
            return TorchScore(_mahalanobis, ("features",), **_constants(fit.gaussians))
        case "rmds" if fit is not None:
            whiten_all = fit.gaussians.whiten_all
            constants = _constants(fit.gaussians)
            return TorchScore(_rmds, ("features",), **constants, whiten_all=whiten_all)
    linear = linear_head(head)
    return None if linear is None else _of_linear(name, linear, fit)


def _of_linear(name: str, head: LinearHead, fit: Fit | None) -> TorchScore | None:
    weights = {"weight": head.weight, "bias": head.bias}
    match name:
        case "ash_s":
            return TorchScore(_ash_s, ("features",), **weights)
        case "scale":
            return TorchScore(_scale, ("features",), **weights)
    if fit is None or fit.linear is None:
        return None
    mean, residual = fit.gaussians.mean, fit.linear.residual
    match name:
        case "react":
            return TorchScore(_react, ("features",), **weights, clip=fit.linear.clip)
        case "dice":
            kept = pruned(head, mean)
            return TorchScore(_dice, ("features",), weight=kept.weight, bias=kept.bias)
        case "fdbd":
            return TorchScore(_fdbd, ("features",), **weights, mean=mean)
        case "nci":
            return TorchScore(_nci, ("features",), **weights, mean=mean, alpha=NCI_ALPHA)
        case "vim":
            return TorchScore(
                _vim,
                ("features",),
                **weights,
                origin=residual.origin,
                basis=residual.basis,
                alpha=residual.alpha,
            )


def _constants(fit: Gaussians) -> dict[str, ArrayLike]:
    return {"mean": fit.mean, "whiten": fit.whiten, "centres": fit.centres}


def _refuse_large(what: str, shape: tuple[int, ...], instead: str) -> None:
    numbers = int(np.prod(shape))
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"{what} have {numbers:,} numbers, and a file holds at most {MOST_NUMBERS:,}: decide "
            f"with the run itself (backmix predict RUN), or calibrate with another score such as "
            f"--score {instead}"
        )


# --- of logits ---------------------------------------------------------------------------------


def log_sum_exp(z: Tensor) -> Tensor:
    """Return log sum_k exp z_k, [n], of logits [n, K]."""
    top = z.amax(1)
    return top + (z - top[:, None]).exp().sum(1).log()


def log_odds(z: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the top class's softmax, [n], of logits [n, K]."""
    return z.amax(1) - log_sum_exp(z.masked_fill(_is_top(z), -torch.inf))


def log1p(x: Tensor) -> Tensor:
    """Return log(1 + x) to the last digits, from operations that every runtime has.

    Where 1 + x loses digits of x, log(1 + x) / ((1 + x) - 1) loses the same ones of both (Goldberg,
    What Every Computer Scientist Should Know About Floating-Point Arithmetic, 1991, theorem 4).
    ONNX has no log1p, and log(1 + x) is 0 below 1e-16.
    """
    above = 1 + x
    rest = above - 1
    nothing = rest == 0
    return torch.where(nothing, x, x * above.log() / rest.masked_fill(nothing, 1.0))


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp x) to the last digits."""
    return x.clamp(min=0) + log1p((-x.abs()).exp())


def _is_top(z: Tensor) -> Tensor:
    """Return which entry of each row is its largest, the first of several, bool [n, K]."""
    return torch.arange(z.shape[1], device=z.device) == z.argmax(1)[:, None]


def _temperature(z: Tensor, temperature: Tensor) -> Tensor:
    return log_odds(z / temperature)


def _max_logit(z: Tensor) -> Tensor:
    return z.amax(1)


def _gen(z: Tensor, gamma: Tensor, most: Tensor) -> Tensor:
    kept, odds = min(GEN_CLASSES, z.shape[1]) - 1, log_odds(z)
    log_p = (z - log_sum_exp(z)[:, None]).masked_fill(_is_top(z), -torch.inf)
    terms = (gamma * (log_p + log1p(-torch.minimum(log_p, most).exp()))).exp()
    others = terms if kept == z.shape[1] - 1 else terms.topk(kept, 1).values
    first = (-gamma * (softplus(-odds) + softplus(odds))).exp()
    return -(first + others.sum(1))


# --- of methods' own heads ---------------------------------------------------------------------


def _itself(figure: Tensor) -> Tensor:
    return figure


def _ssod_joint(z: Tensor, g: Tensor) -> Tensor:
    return -softplus(-log_odds(z)) - softplus(-g)


def _arpl_dot(z: Tensor, f: Tensor) -> Tensor:
    return z.amax(1) - f.square().sum(1) / f.shape[1]


def _cssr(
    s0: Tensor,
    z: Tensor,
    maps: Tensor,
    activity: Tensor,
    mean: Tensor,
    deviation: Tensor,
    grams: Tensor | None = None,
) -> Tensor:
    own = z.argmax(1)
    figures = [s0, (activity.index_select(0, own) * maps.double().mean((2, 3))).mean(1)]
    if grams is not None:
        figures.append((_gram(maps) * grams.index_select(0, own)).sum((1, 2)))
    return ((torch.stack(figures, 1) - mean) / deviation).sum(1)


def _gram(maps: Tensor) -> Tensor:
    """Return CSSR's Gram matrices of maps [n, C, g, g'], float64 [n, C, C]."""
    cells = maps.flatten(2).abs()
    largest = cells.amax(2, keepdim=True)
    powers = (cells / largest.masked_fill(largest == 0, 1.0)).square().square().square()
    root = (powers @ powers.mT).sqrt().sqrt().sqrt()
    largest = largest.double()
    return root.double() * largest * largest.mT


# --- of features -------------------------------------------------------------------------------


def _length(f: Tensor) -> Tensor:
    return f.square().sum(1).sqrt()


def _over(numerator: Tensor, length: Tensor) -> Tensor:
    nothing = length == 0
    return (numerator / length.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _knn(f: Tensor, bank: Tensor, k: int) -> Tensor:
    length = _length(f)
    own = f / length.masked_fill(length == 0, 1.0)[:, None]
    nearest = (own.float() @ bank.T).topk(k, 1).indices[:, -1]
    return -_length(own - bank.index_select(0, nearest))


def _to_classes(away: Tensor, whiten: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distance of each feature less the mean to its nearest class, [n]."""
    white = away @ whiten.T
    squares = white.square().sum(1)[:, None] + centres.square().sum(1) - 2 * (white @ centres.T)
    return squares.clamp(min=0).amin(1)


def _mahalanobis(f: Tensor, mean: Tensor, whiten: Tensor, centres: Tensor) -> Tensor:
    return -_to_classes(f - mean, whiten, centres)


def _rmds(f: Tensor, mean: Tensor, whiten: Tensor, centres: Tensor, whiten_all: Tensor) -> Tensor:
    away = f - mean
    return (away @ whiten_all.T).square().sum(1) - _to_classes(away, whiten, centres)


# --- of a linear head --------------------------------------------------------------------------


def _logits(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return f @ weight.T + bias


def _energy(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return log_sum_exp(_logits(f, weight, bias))


def _factor(f: Tensor, largest: Tensor) -> Tensor:
    """Return exp(S1 / S2), [n, 1], S1 the sum of all entries, S2 of the largest; 1 where S2 = 0."""
    some = largest.sum(1)
    nothing = some == 0
    ratio = (f.sum(1) / some.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
    return ratio.exp()[:, None]


def _ash_s(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    f = f.clamp(min=0)
    largest, places = f.topk(largest_count(f.shape[1], ASH_SHARE), 1)
    kept = torch.zeros_like(f).scatter(1, places, largest)
    return _energy(kept * _factor(f, largest), weight, bias)


def _scale(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    f = f.clamp(min=0)
    largest = f.topk(largest_count(f.shape[1], SCALE_SHARE), 1).values
    return _energy(f * _factor(f, largest), weight, bias)


def _react(f: Tensor, weight: Tensor, bias: Tensor, clip: Tensor) -> Tensor:
    return _energy(torch.minimum(f, clip), weight, bias)


def _dice(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _energy(f, weight, bias)


def _fdbd(f: Tensor, weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    z = _logits(f, weight, bias)
    sizes, own = weight.square().sum(1), z.argmax(1)
    both = sizes.index_select(0, own)[:, None] + sizes
    squares = both - 2 * (weight.index_select(0, own) @ weight.T)
    apart = squares > 1e-14 * both  # what rounding leaves of two equal rows is no distance
    distances = (z.amax(1)[:, None] - z) / torch.where(apart, squares, 1.0).sqrt()
    return _over(distances.masked_fill(~apart, 0.0).sum(1), _length(f - mean))


def _nci(f: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, alpha: Tensor) -> Tensor:
    away = f - mean
    own = weight.index_select(0, _logits(f, weight, bias).argmax(1))
    return _over((own * away).sum(1), _length(away)) + alpha * f.abs().sum(1)


def _vim(
    f: Tensor, weight: Tensor, bias: Tensor, origin: Tensor, basis: Tensor, alpha: Tensor
) -> Tensor:
    return _energy(f, weight, bias) - alpha * _length((f - origin) @ basis)
