"""Whether a run's options mean something, in the words of the command line."""

import math

from backmix.train.options import BackMix, Run


def check(run: Run) -> None:
    """Refuse options outside their ranges before anything is opened or written.

    Raises:
        ValueError: naming the option, its range and what was given. NaN is in no range.
    """
    optim, augment, size = run.optim, run.augment, run.loader.size
    _within("epochs", run.epochs, 1, 1_000_000)
    _within("seed", run.seed, 0, 2**64 - 1)
    _within("threads", run.threads, 0, 1024)
    _within("log-every", run.log_every, 1)
    _within("save-minutes", run.save_minutes, 1e-3)
    _within("save-steps", run.save_steps, 0)
    _within("profile", run.profile, 0, 1000)  # more would fill the memory
    _within("val", run.val, 0, 0.99)
    _within("optim.lr", optim.lr, 0, 1e6)
    _within("optim.momentum", optim.momentum, 0, 0.999999)
    _within("optim.weight-decay", optim.weight_decay, 0, 1e3)
    _within("optim.factor", optim.factor, 0, 1)
    _within("optim.warmup", optim.warmup, 0, 1)
    _within("optim.label-smoothing", optim.label_smoothing, 0, 0.999)
    _within("optim.clip", optim.clip, 0)
    for milestone in optim.milestones:
        _within("optim.milestones", milestone, 0)
    smallest = run.loader.grow_from or size
    if smallest >= 1:  # else the loader says what is wrong
        _within("augment.pad", augment.pad, 0, smallest - 1)
    for mean, std in zip(augment.mean, augment.std, strict=True):
        _within("augment.mean", mean, -1e6, 1e6)
        _within("augment.std", std, 1e-6, 1e6)
    if run.split.protocol and run.split.known:
        raise ValueError(
            f"--split.known names classes, but --split.protocol {run.split.protocol} does so, too: "
            "add --split.protocol None to choose by name"
        )
    if isinstance(run.method, BackMix):
        if run.loader.grow_from:
            raise ValueError(
                "--loader.grow-from: BackMix keeps its activation maps and its patches in one size "
                "of the views; train it at --loader.size alone, or let softmax grow"
            )
        _check_backmix(run.method, size)


def _check_backmix(method: BackMix, size: int) -> None:
    if not 1 <= method.patch <= size:
        raise ValueError(
            f"--method.patch must be 1 .. {size} (--loader.size), got {method.patch}; half "
            f"the side is {max(size // 2, 1)}, a quarter {max(size // 4, 1)}"
        )
    _within("method.probability", method.probability, 0, 1)
    _within("method.mask-ratio", method.mask_ratio, 0, 1)
    _within("method.rate", method.rate, 0, 1)
    _within("method.raw-weight", method.raw_weight, 0, 1e6)
    _within("method.warmup", method.warmup, 0)
    if method.mask == "oracle" and method.masks is None:
        raise ValueError("--method.mask oracle needs the folder of true masks: --method.masks DIR")


def _within(option: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high or value == math.inf:
        allowed = f"{low:g} .. {high:g}" if high < math.inf else f"at least {low:g}, and finite"
        raise ValueError(f"--{option} must be {allowed}, got {value}")
