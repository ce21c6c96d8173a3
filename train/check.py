"""Whether a run's options mean something, in the words of the command line."""

import math

from backmix.pipeline.options import refuse_idle
from backmix.train.options import CONFUSING_SIZES, Arpl, BackMix, Cssr, Run, Ssod, host_of


def check(run: Run) -> None:
    """Refuse options outside their ranges before anything is opened or written.

    Raises:
        ValueError: naming the option, its range and what was given. NaN is in no range.
    """
    optim, augment, size = run.optim, run.augment, run.loader.size
    refuse_idle(run.loader)
    _within("epochs", run.epochs, 1, 1_000_000)
    _within("seed", run.seed, 0, 2**64 - 1)
    _within("threads", run.threads, 0, 1024)
    _within("log-every", run.log_every, 1)
    _within("save-minutes", run.save_minutes, 1e-3)
    _within("save-steps", run.save_steps, 0)
    _within("keep", run.keep, 1, 10_000)
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
    _within("optim.cycles", optim.cycles, 1, 1_000_000)
    if optim.schedule == "restarts":
        _check_restarts(run)
    smallest = run.loader.grow_from or size
    if smallest >= 1:  # else the loader says what is wrong
        _within("augment.pad", augment.pad, 0, smallest - 1)
    for mean, std in zip(augment.mean, augment.std, strict=True):
        _within("augment.mean", mean, -1e6, 1e6)
        _within("augment.std", std, 1e-6, 1e6)
    _within("augment.operations", augment.operations, 1, 16)
    _within("augment.magnitude", augment.magnitude, 0, 30)
    if augment.pool != "none" and isinstance(run.method, BackMix):
        _check_pool(augment.pool, run.method)
    _check_step(run)
    if run.pretrained:
        _check_pretrained(run)
    host = host_of(run.method)
    if run.sync_batchnorm and isinstance(host, Arpl) and host.confusing:
        raise ValueError(
            "--sync-batchnorm does not go with the pairs of BatchNorms that confusing images need"
        )
    if run.split.protocol and run.split.known:
        raise ValueError(
            f"--split.known names classes, but --split.protocol {run.split.protocol} does so, too: "
            "add --split.protocol None to choose by name"
        )
    if isinstance(run.method, BackMix):
        _check_backmix(run.method, size)
    host = host_of(run.method)
    if isinstance(host, Ssod):
        _check_ssod(host, run)
    if isinstance(host, Arpl):
        _check_arpl(host, run)
    if isinstance(host, Cssr):
        _check_cssr(host, run)


def check_device(run: Run, device: str) -> None:
    """Refuse what the device (cpu or cuda) cannot do.

    Raises:
        ValueError: saying what.
    """
    if run.sync_batchnorm and device != "cuda":
        raise ValueError("--sync-batchnorm needs GPUs: torch has it for them alone")


def check_loader(run: Run, loader: str, processes: int) -> None:
    """Refuse what does not go with the loader that was chosen; arguments as `check_graph` has them.

    Raises:
        ValueError: saying what stands against it.
    """
    check_donors(run, loader)
    check_parts(run, loader, processes)
    check_graph(run, loader, processes)


def check_graph(run: Run, loader: str, processes: int) -> None:
    """Refuse --graph where a step depends on more than what lies on the device before it.

    Args:
        run: the options.
        loader: what --loader.loader has become.
        processes: that train together.

    Raises:
        ValueError: saying what stands against it.
    """
    host = host_of(run.method)
    against = {
        f"the {loader} loader, which decodes while it trains": loader != "resident",
        f"--augment.pool {run.augment.pool}, drawn anew by the host in every step": (
            run.augment.pool != "none"
        ),
        "--method.onto cool, drawn anew by the host in every step": (
            isinstance(run.method, BackMix) and run.method.onto == "cool"
        ),
        "generated images, drawn anew by the host in every step": (
            isinstance(host, Arpl) and host.confusing
        ),
        f"--accumulate {run.accumulate}": run.accumulate > 1,
        f"--ema-every {run.ema_every}": run.ema_every > 1,
        "--compile": run.compile,
        "--profile": run.profile > 0,
        f"{processes} processes": processes > 1,
    }
    for what, there in against.items():
        if run.graph and there:
            raise ValueError(f"--graph does not go with {what}: leave one of them out")


def check_donors(run: Run, loader: str) -> None:
    """Refuse BackMix where no image has another one beside it, so that nothing would be mixed.

    Args:
        run: the options.
        loader: what --loader.loader has become; of a resident pool all images are donors.

    Raises:
        ValueError: with what would do.
    """
    if isinstance(run.method, BackMix) and loader != "resident" and run.loader.mix_group == 1:
        cause = "group" if run.loader.group else "batch"
        raise ValueError(
            f"--loader.{cause} 1: an image's patch comes from another image of its mix group, and "
            "there is none in a group of one, so that BackMix would mix nothing: at least 2, or "
            "--loader.loader resident"
        )


def check_parts(run: Run, loader: str, processes: int) -> None:
    """Refuse to cut a step into more parts than can be had.

    Args:
        run: the options.
        loader: what --loader.loader has become.
        processes: that train together; each has its share of a step's images.

    Raises:
        ValueError: with what would do.
    """
    if run.accumulate == 1:
        return
    images = run.loader.batch // processes
    if loader == "resident":
        if run.accumulate > images:
            raise ValueError(
                f"--accumulate {run.accumulate} cuts a step into more parts than a process has "
                f"images of it ({images}): at most {images}"
            )
        return
    group = run.loader.mix_group
    groups = run.loader.batch // group // processes
    if run.accumulate > groups:
        raise ValueError(
            f"--accumulate {run.accumulate}: a step is cut between mix groups, and a process has "
            f"{groups} of them in one ({run.loader.batch} images, groups of {group}, {processes} "
            f"process{'es' if processes > 1 else ''}): at most --accumulate {max(groups, 1)}, or "
            f"smaller groups, such as --loader.group {max(images // run.accumulate, 1)}"
        )


def _check_step(run: Run) -> None:
    _within("accumulate", run.accumulate, 1, 4096)
    if not 0 <= run.ema < 1:
        raise ValueError(f"--ema must be 0 (off) or a decay below 1, such as 0.999, got {run.ema}")
    _within("ema-every", run.ema_every, 1)
    if run.ema_every > 1 and run.ema == 0:
        raise ValueError(f"--ema-every {run.ema_every} does nothing without --ema")
    host = host_of(run.method)
    if isinstance(host, Arpl) and host.confusing:
        name = "method.host" if isinstance(run.method, BackMix) else "method"
        for option, given in (("accumulate", run.accumulate > 1), ("compile", run.compile)):
            if given:
                raise ValueError(
                    f"--{option} with --{name}.confusing: discriminator and generator take steps "
                    "of their own amid the forward pass, which can neither be cut into parts nor "
                    f"compiled as one; leave --{option} out"
                )


def _check_pretrained(run: Run) -> None:
    if not run.model.startswith(("timm/", "torchvision/")):
        raise ValueError(
            f"--pretrained downloads published weights of timm/NAME and torchvision/NAME, and "
            f"--model is {run.model}: begin with a file, --init FILE"
        )
    if run.init is not None:
        raise ValueError("--pretrained and --init both say what to begin with: leave one out")


def _check_restarts(run: Run) -> None:
    cycle, rise = run.epochs // run.optim.cycles, round(run.optim.warmup * run.epochs)
    if cycle < 1:
        raise ValueError(
            f"--optim.cycles {run.optim.cycles} are more than the epochs ({run.epochs}): "
            "a cycle of --optim.schedule restarts lasts one epoch at least (--optim.cycles 1)"
        )
    if rise > cycle:
        raise ValueError(
            f"--optim.warmup {run.optim.warmup:g} lasts {rise} epochs, longer than one of the "
            f"{run.optim.cycles} cycles of --optim.schedule restarts ({cycle} epochs)"
        )


def _check_pool(pool: str, method: BackMix) -> None:
    if method.cam_source == "mix":
        raise ValueError(
            f"--method.cam-source mix takes activation maps from views whose pixels --augment.pool "
            f"{pool} has moved, so that nobody knows which cell is where: use raw or raw+loss"
        )
    if isinstance(method.host, Ssod) and method.host.pasted:
        raise ValueError(
            f"--method.host.pasted needs to know where the pasted background lies, but "
            f"--augment.pool {pool} moves pixels after the mix: add --method.host.no-pasted, or "
            "--augment.pool none"
        )


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


def _check_ssod(ssod: Ssod, run: Run) -> None:
    mixes = isinstance(run.method, BackMix)
    name = "method.host" if mixes else "method"
    _within(f"{name}.weight", ssod.weight, 0, 1e6)
    _within(f"{name}.gamma", ssod.gamma, 0.5, 1)
    _within(f"{name}.share", ssod.share, 0, 0.5)
    _within(f"{name}.gate-known", ssod.gate_known, 0, 1)
    _within(f"{name}.gate-accuracy", ssod.gate_accuracy, 0, 1)
    if isinstance(run.method, BackMix) and run.method.cam_source == "raw+loss":
        raise ValueError(
            "--method.cam-source raw+loss needs a loss that is a mean over images; that of SSOD is "
            "a mean over the locations of a batch: use raw or mix"
        )
    if ssod.train == "head":
        if run.init is None:
            raise ValueError(
                f"--{name}.train head trains the rejection head of a network that is there "
                "already: add --init RUN (or FILE.safetensors)"
            )
        return
    smoothing = run.optim.label_smoothing
    if not ssod.share and smoothing > 1 - ssod.gamma - 1e-9:
        raise ValueError(
            f"--optim.label-smoothing {smoothing:g} keeps the probability of the true class below "
            f"--{name}.gamma {ssod.gamma:g}, so that hardly any location would be known: "
            f"smooth by less than {1 - ssod.gamma:g}, lower gamma, or use --{name}.share 0.1"
        )


def _check_arpl(arpl: Arpl, run: Run) -> None:
    mixes = isinstance(run.method, BackMix)
    name = "method.host" if mixes else "method"
    _within(f"{name}.weight", arpl.weight, 0, 1e6)
    _within(f"{name}.temperature", arpl.temperature, 1e-6, 1e6)
    _within(f"{name}.beta", arpl.beta, 0, 1e6)
    if not arpl.confusing:
        return
    if run.loader.size not in CONFUSING_SIZES:
        sizes = " or ".join(map(str, CONFUSING_SIZES))
        raise ValueError(
            f"--{name}.confusing generates images of {sizes} pixels, but --loader.size is "
            f"{run.loader.size}: choose one of those sizes, or leave it out"
        )
    if run.loader.grow_from:
        raise ValueError(
            f"--{name}.confusing generates images of one size: leave --loader.grow-from out"
        )
    if run.epochs % 2:
        raise ValueError(
            f"ARPL+CS (--{name}.confusing) trains in pairs of epochs, with generated images and "
            f"without: --epochs must be even, got {run.epochs}"
        )
    if isinstance(run.method, BackMix) and run.method.cam_source == "raw+loss":
        raise ValueError(
            "--method.cam-source raw+loss needs a loss that is a mean over images; that of ARPL "
            "with generated images is not: use raw or mix"
        )


def _check_cssr(cssr: Cssr, run: Run) -> None:
    name = "method.host" if isinstance(run.method, BackMix) else "method"
    _within(f"{name}.latent", cssr.latent, 1, 4096)
    _within(f"{name}.gamma", cssr.gamma, 1e-6, 1e6)
    if run.optim.label_smoothing:
        raise ValueError(
            f"--optim.label-smoothing {run.optim.label_smoothing:g}: the loss of CSSR, -log p of "
            "the true class, knows no smoothing: leave it at 0"
        )


def _within(option: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high or value == math.inf:
        allowed = f"{low:g} .. {high:g}" if high < math.inf else f"at least {low:g}, and finite"
        raise ValueError(f"--{option} must be {allowed}, got {value}")
