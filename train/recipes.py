"""Recipes: functions that return a complete `Run`. A variant calls another and changes fields.

`data` and `out` are left to the command line.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import tyro

from backmix.pipeline.options import LoaderOptions
from backmix.train.options import (
    Arpl,
    Augment,
    BackMix,
    Cssr,
    Host,
    Method,
    Optim,
    Run,
    Softmax,
    Split,
    Ssod,
    host_of,
)

HALF = (127.5, 127.5, 127.5)
QUARTER = (63.75, 63.75, 63.75)
CIFAR_MEAN = (125.307, 122.961, 113.8575)
CIFAR_STD = (51.5865, 50.847, 51.255)
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def cifar10_softmax() -> Run:
    """Return the plain softmax recipe of the ARPL code: 100 epochs, batch 64, inputs in [0, 1].

    Chen et al., "Adversarial Reciprocal Points Learning for Open Set Recognition" (TPAMI 2021),
    public code: SGD 0.1, momentum 0.9, weight decay on everything, x 0.1 after 30, 60, 90 epochs.
    """
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=100,
        model="classifier32",
        split=Split(protocol="cifar10"),
        loader=LoaderOptions(batch=64, size=32),
        augment=Augment(flip=True, pad=4),
        optim=Optim(lr=0.1, weight_decay=1e-4, decay="all", milestones=(30, 60, 90)),
    )


def svhn_softmax() -> Run:
    """Return the softmax recipe for SVHN: as CIFAR-10, but digits are not mirrored.

    The ARPL code mirrors them, too: --augment.flip.
    """
    base = cifar10_softmax()
    return replace(base, split=Split(protocol="svhn"), augment=replace(base.augment, flip=False))


def cifar_plus_10_softmax() -> Run:
    """Return the softmax recipe for CIFAR+10: four classes of CIFAR-10 against ten of CIFAR-100."""
    return replace(cifar10_softmax(), split=Split(protocol="cifar+10"))


def cifar_plus_50_softmax() -> Run:
    """Return the softmax recipe for CIFAR+50: four classes of CIFAR-10 against fifty."""
    return replace(cifar10_softmax(), split=Split(protocol="cifar+50"))


def tiny_imagenet_softmax() -> Run:
    """Return the ARPL code's Tiny-ImageNet recipe: 64 px, Adam 1e-3, x 0.1 after 30, 60, 90."""
    base = cifar10_softmax()
    return replace(
        base,
        split=Split(protocol="tiny-imagenet"),
        loader=replace(base.loader, size=64),
        optim=Optim(kind="adam", lr=1e-3, weight_decay=0.0, milestones=(30, 60, 90)),
    )


def cifar10_wrn_softmax() -> Run:
    """Return the WRN-40-4 host of the CSSR code without its strong augmentation pool.

    Huang et al., "Class-Specific Semantic Reconstruction for Open Set Recognition" (TPAMI 2022):
    SGD 0.4 without momentum, batch 128, 200 epochs, x 0.1 after 120 and 190, reflect padding.
    """
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=200,
        model="wrn40-4",
        split=Split(protocol="cifar10", family="C"),
        loader=LoaderOptions(batch=128, size=32),
        augment=Augment(flip=True, pad=4, border="reflect", mean=HALF, std=QUARTER),
        optim=Optim(lr=0.4, momentum=0.0, weight_decay=5e-4, decay="all", milestones=(120, 190)),
    )


def cifar10_resnet18_softmax() -> Run:
    """Return the CIFAR ResNet-18 with SGD 0.1, batch 128, 150 epochs, x 0.1 after 130."""
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=150,
        model="resnet18-cifar",
        split=Split(protocol="cifar10", family="B-cac"),
        loader=LoaderOptions(batch=128, size=32),
        augment=Augment(flip=True, pad=4, mean=HALF, std=QUARTER),
        optim=Optim(lr=0.1, weight_decay=1e-5, decay="all", milestones=(130,)),
    )


def cifar10_strong_softmax() -> Run:
    """Return the strong recipe: RandAugment, 600 epochs of cosines with restarts.

    Vaze, Han, Vedaldi, Zisserman: "Open-Set Recognition: A Good Closed-Set Classifier is All You
    Need?" (ICLR 2022), public code and its table of hyperparameters; scored by the largest logit.
    The other methods on it are trained alike; the authors give ARPL strengths of its own (magnitude
    15 on CIFAR-10, Adam 0.001 on Tiny-ImageNet).
    """
    base = cifar10_softmax()
    augment = Augment(
        flip=True,
        pad=4,
        pool="randaugment",
        operations=1,
        magnitude=6,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )
    return replace(
        base,
        epochs=600,
        loader=replace(base.loader, batch=128),
        augment=augment,
        optim=Optim(
            lr=0.1, weight_decay=1e-4, decay="all", schedule="restarts", cycles=3, warmup=10 / 600
        ),
    )


def svhn_strong_softmax() -> Run:
    """Return the strong recipe for SVHN: magnitude 18, no rotations and translations."""
    base = cifar10_strong_softmax()
    augment = replace(base.augment, magnitude=18, moves=False)
    return replace(base, split=Split(protocol="svhn"), augment=augment)


def tiny_imagenet_strong_softmax() -> Run:
    """Return the strong recipe for Tiny-ImageNet: Adam 0.01, magnitude 9, label smoothing 0.9.

    The authors spread the smoothed share over the other 19 classes alone; torch spreads it over all
    20, so that 0.9 there is 0.9 * 20 / 19 here.
    """
    base = cifar10_strong_softmax()
    return replace(
        base,
        split=Split(protocol="tiny-imagenet"),
        loader=replace(base.loader, size=64),
        augment=replace(base.augment, magnitude=9),
        optim=replace(
            base.optim, kind="adam", lr=0.01, weight_decay=0.0, label_smoothing=0.9 * 20 / 19
        ),
    )


def cifar10_cssr_softmax() -> Run:
    """Return the whole recipe of the CSSR code on WRN-40-4, its strong augmentations included.

    As softmax it is that code's linear baseline: published figures of family C are of this recipe.
    """
    base = cifar10_wrn_softmax()
    return replace(base, augment=replace(base.augment, pool="cssr"))


def tiny_imagenet_cssr_softmax() -> Run:
    """Return the recipe of the CSSR code for Tiny-ImageNet: ResNet-18, 235 epochs."""
    base = cifar10_cssr_softmax()
    return replace(
        base,
        epochs=235,
        model="resnet18-cifar",
        split=Split(protocol="tiny-imagenet", family="C"),
        loader=replace(base.loader, size=64),
        augment=replace(base.augment, pad=8),
        optim=replace(base.optim, milestones=(150, 225), warmup=1 / 235),
    )


RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
"""Lengths of the ImageNet recipes [epochs], and when their views grow, as `LoaderOptions.grow`."""


def imagenet_rn18(epochs: int) -> Run:
    """Return ResNet-18 as ffcv-imagenet trains it for N = 16, 24, 32, 40, 56 or 88 epochs.

    The configurations of github.com/libffcv/ffcv-imagenet: SGD 0.5 at batch 1024, views of 160 px
    that grow to 192, BlurPool, label smoothing 0.1, its schedule and its choice of what decays.
    There the last, incomplete batch of an epoch is left out; here it is a step.

    Args:
        epochs: one of `RAMPS`.
    """
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=epochs,
        model="resnet18",
        blurpool=True,
        loader=LoaderOptions(
            loader="turbo",
            batch=1024,
            size=192,
            grow_from=160,
            grow=RAMPS[epochs],
            crop="random",
        ),
        augment=Augment(flip=True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        optim=Optim(
            lr=0.5, weight_decay=5e-5, decay="ffcv", schedule="cyclic", label_smoothing=0.1
        ),
    )


def imagenet_rn50(epochs: int) -> Run:
    """Return ResNet-50 as ffcv-imagenet trains it for N epochs: SGD 1.7, batch 8 x 512."""
    base = imagenet_rn18(epochs)
    return replace(
        base,
        model="resnet50",
        loader=replace(base.loader, batch=4096),
        optim=replace(base.optim, lr=1.7, weight_decay=1e-4),
    )


def imagenet_finetune_softmax() -> Run:
    """Return 30 epochs from weights that are there: --init FILE, or --pretrained.

    As OpenOOD v1.5 (Zhang et al., 2023; github.com/Jingkang50/OpenOOD) trains its methods on
    torchvision's ResNet-50: SGD 0.001 with Nesterov's momentum, batch 2 x 128, weight decay on
    everything, one cosine. The random-resized-crops are ours.
    """
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=30,
        model="resnet50",
        loader=LoaderOptions(loader="turbo", batch=256, size=224, crop="random"),
        augment=Augment(flip=True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        optim=Optim(lr=1e-3, nesterov=True, weight_decay=5e-4, decay="all", schedule="cosine"),
    )


def imagenet_ssod_head() -> Run:
    """Return SSOD's rejection head alone on a network that stays as it is: --init; 5 epochs.

    The values are ours: a logistic regression on fixed features, whose samples are the tenths of
    the locations with most and with least probability, however the network was trained.
    """
    base = imagenet_finetune_softmax()
    return replace(
        base,
        epochs=5,
        optim=replace(base.optim, lr=0.01, weight_decay=0.0),
        method=Ssod(train="head", share=0.1),
    )


DEMO_MIX = BackMix(
    patch=16, probability=0.5, mask_ratio=0.4, fill="mean", cam_source="mix", rate=1.0
)
"""How the demo mixes."""


def demo_softmax() -> Run:
    """Return the demo's baseline: a quarter-width classifier32, 16 epochs, one CPU thread."""
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=16,
        model="classifier32-quarter",
        threads=1,
        loader=LoaderOptions(batch=64, size=32),
        augment=Augment(flip=False, mean=(114.75, 114.75, 114.75), std=QUARTER),
        optim=Optim(lr=0.1, nesterov=True, weight_decay=5e-4, schedule="linear", warmup=0.15),
        method=Softmax(),
    )


def demo_backmix() -> Run:
    """Return the demo's BackMix: half-side patches on half of the images, 6 of 16 cells masked."""
    return replace(demo_softmax(), method=DEMO_MIX)


def demo_cutout() -> Run:
    """Return the demo's occlusion control: the same patches in plain fill."""
    return replace(demo_softmax(), method=BackMix(patch=16, probability=0.5, mask="grey"))


METHOD_ROWS: tuple[tuple[str, str, Method], ...] = (
    ("softmax", "cross-entropy alone: the baseline", Softmax()),
    ("cutout", "BackMix's patches, at the same places, in plain fill", BackMix(mask="grey")),
    ("backmix", "BackMix, with the values of the released mixing code", BackMix()),
    ("ssod", "a rejection head that learns from locations (SSOD)", Ssod()),
    ("arpl", "reciprocal points (ARPL)", Arpl()),
    ("arpl-cs", "ARPL with generated samples of 32 or 64 px; two passes", Arpl(confusing=True)),
    ("pcssr", "auto-encoders, the least error wins (PCSSR)", Cssr()),
    ("rcssr", "auto-encoders, the greatest error wins (RCSSR)", Cssr(kind="reciprocal")),
    ("backmix-ssod", "SSOD on mixes, pasted background as unknown", BackMix(host=Ssod())),
    ("backmix-arpl", "ARPL on mixes", BackMix(host=Arpl())),
    ("backmix-arpl-cs", "ARPL+CS on mixes", BackMix(host=Arpl(confusing=True))),
    ("backmix-pcssr", "PCSSR on mixes", BackMix(host=Cssr())),
    ("backmix-rcssr", "RCSSR on mixes", BackMix(host=Cssr(kind="reciprocal"))),
)
"""Every method at equal training: name, what it is, options."""


def with_method(base: Run, method: Method, mix: BackMix | None = None) -> Run:
    """Return a recipe with another method, at equal training.

    Where BackMix is asked for, `mix` says how it mixes; without one as released, with a patch of a
    quarter of the side of views of 32 px, and of half of it in larger ones, as in the paper's
    pictures. ARPL+CS makes two passes an epoch: twice the epochs, and the rate falls after twice as
    many. CSSR's loss knows no label smoothing; on ResNet-50, with four times the channels of
    ResNet-18, its gamma is a quarter. Where smoothing keeps SSOD's gamma out of reach, its samples
    are the tenths of the locations with most and with least probability.
    """
    side = base.loader.size
    if isinstance(method, BackMix):
        mix = mix or BackMix(patch=side // 4 if side <= 32 else side // 2)
        method = replace(mix, host=method.host, mask=method.mask)
        if base.augment.pool != "none" and isinstance(method.host, Ssod):
            # A pool moves pixels after the mix, which then knows no longer where background lies.
            method = replace(method, host=replace(method.host, pasted=False))
    host, optim, epochs = host_of(method), base.optim, base.epochs
    if _is_confusing(method):
        optim = replace(optim, milestones=tuple(2 * m for m in optim.milestones))
        epochs *= 2
    if isinstance(host, Cssr):
        optim = replace(optim, label_smoothing=0.0)
        if base.model == "resnet50":
            host = replace(host, gamma=host.gamma / 4)
    if isinstance(host, Ssod) and optim.label_smoothing >= 1 - host.gamma:
        host = replace(host, share=0.1)
    return replace(base, method=_with_host(method, host), optim=optim, epochs=epochs)


def _with_host(method: Method, host: Host) -> Method:
    """Return a method that does something else to the network."""
    return replace(method, host=host) if isinstance(method, BackMix) else host


def _is_confusing(method: Method) -> bool:
    host = host_of(method)
    return isinstance(host, Arpl) and host.confusing


def _on(
    name: str,
    base: Callable[[], Run],
    mix: BackMix | None = None,
    rows: Sequence[tuple[str, str, Method]] = METHOD_ROWS,
) -> dict[str, Callable[[], Run]]:
    """Return a data set's recipes, NAME-METHOD, one for each method; `mix` as in `with_method`."""

    def recipe(what: str, method: Method) -> Callable[[], Run]:
        def make() -> Run:
            return with_method(base(), method, mix)

        make.__doc__ = f"Return the recipe of {name}-softmax with {what}."
        return make

    made = {f"{name}-{method}": recipe(what, options) for method, what, options in rows}
    return made | {f"{name}-softmax": base}


def _imagenet() -> dict[str, Callable[[], Run]]:
    """Return ImageNet's recipes: networks by lengths by methods, and those of fine-tuning.

    ARPL+CS is not among them: it generates images of at most 64 pixels.
    """
    rows = [row for row in METHOD_ROWS if not _is_confusing(row[2])]
    # Whoever trained the weights may have smoothed the labels, so that gamma is out of reach.
    by_share = [
        (name, what, _with_host(method, Ssod(share=0.1)))
        if isinstance(host_of(method), Ssod)
        else (name, what, method)
        for name, what, method in rows
    ]
    made: dict[str, Callable[[], Run]] = {}
    for network, base in (("rn18", imagenet_rn18), ("rn50", imagenet_rn50)):
        for epochs in RAMPS:
            of_length = partial(base, epochs)
            of_length.__doc__ = base.__doc__
            made |= _on(f"imagenet-{network}-{epochs}", of_length, rows=rows)
    return made | _on("imagenet-finetune", imagenet_finetune_softmax, rows=by_share)


RECIPES: dict[str, Callable[[], Run]] = {
    **_on("cifar10", cifar10_softmax),
    **_on("svhn", svhn_softmax),
    **_on("cifar+10", cifar_plus_10_softmax),
    **_on("cifar+50", cifar_plus_50_softmax),
    **_on("tiny-imagenet", tiny_imagenet_softmax),
    **_on("cifar10-wrn", cifar10_wrn_softmax),
    **_on("cifar10-resnet18", cifar10_resnet18_softmax),
    **_on("cifar10-strong", cifar10_strong_softmax),
    **_on("svhn-strong", svhn_strong_softmax),
    **_on("tiny-imagenet-strong", tiny_imagenet_strong_softmax),
    **_on("cifar10-cssr", cifar10_cssr_softmax),
    **_on("tiny-imagenet-cssr", tiny_imagenet_cssr_softmax),
    **_imagenet(),
    "imagenet-ssod-head": imagenet_ssod_head,
    **_on("demo", demo_softmax, DEMO_MIX),
    "demo-cutout": demo_cutout,
    "demo-backmix": demo_backmix,
}
"""What `backmix train RECIPE` knows."""


def parse_run(recipe: str, options: Sequence[str]) -> Run:
    """Return a recipe's run with options from the command line; a mistake ends the process (2)."""
    run = tyro.cli(
        Run,
        prog=f"backmix train {recipe}",
        description=first_line(RECIPES[recipe]),
        default=RECIPES[recipe](),
        args=list(options),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
    if recipe.startswith("imagenet-finetune-") and run.init is None and not run.pretrained:
        raise ValueError(
            f"{recipe} begins with weights that are there: add --init FILE or --init "
            "RUN, or --model timm/NAME (or torchvision/NAME) with --pretrained"
        )
    return run


def listed() -> tuple[dict[str, str], dict[str, str]]:
    """Return what comes before -METHOD, and the recipes that stand alone; with what they are.

    The lengths of ImageNet's recipes are one N.
    """
    methods = [name for name, _, _ in METHOD_ROWS]
    bases = [name.removesuffix("-softmax") for name in RECIPES if name.endswith("-softmax")]
    of_a_base = {f"{base}-{method}" for base in bases for method in methods}
    alone = {name: first_line(made) for name, made in RECIPES.items() if name not in of_a_base}
    before = {}
    for base in bases:
        network, _, epochs = base.rpartition("-")
        lengths = epochs.isdecimal()
        text = first_line(RECIPES[f"{base}-softmax"])
        before[f"{network}-N" if lengths else base] = text
    return before, alone


def first_line(recipe: Callable[..., object]) -> str:
    """Return what a recipe is, from its docstring's first line."""
    text = (recipe.__doc__ or "").split("\n")[0].removeprefix("Return ")
    return text[:1].upper() + text[1:]
