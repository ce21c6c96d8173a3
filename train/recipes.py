"""Recipes: functions that return a complete `Run`. A variant calls another and changes fields.

`data` and `out` are left to the command line.
"""

from collections.abc import Callable
from dataclasses import replace

import tyro

from backmix.pipeline.options import LoaderOptions
from backmix.train.options import Augment, BackMix, Optim, Run, Softmax, Split

HALF = (127.5, 127.5, 127.5)
QUARTER = (63.75, 63.75, 63.75)
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


def cifar10_backmix() -> Run:
    """Return BackMix on the softmax recipe, with the values of the released mixing code."""
    return replace(cifar10_softmax(), method=BackMix())


def cifar10_cutout() -> Run:
    """Return the occlusion control: BackMix's patches, at the same places, in plain fill."""
    return replace(cifar10_softmax(), method=BackMix(mask="grey"))


def svhn_softmax() -> Run:
    """Return the softmax recipe for SVHN: as CIFAR-10, but digits are not mirrored."""
    base = cifar10_softmax()
    return replace(base, split=Split(protocol="svhn"), augment=replace(base.augment, flip=False))


def svhn_backmix() -> Run:
    """Return BackMix on the SVHN recipe."""
    return replace(svhn_softmax(), method=BackMix())


def tiny_imagenet_softmax() -> Run:
    """Return the ARPL code's Tiny-ImageNet recipe: 64 px, Adam 1e-3, x 0.1 after 30, 60, 90."""
    base = cifar10_softmax()
    return replace(
        base,
        split=Split(protocol="tiny-imagenet"),
        loader=replace(base.loader, size=64),
        optim=Optim(kind="adam", lr=1e-3, weight_decay=0.0, milestones=(30, 60, 90)),
    )


def tiny_imagenet_backmix() -> Run:
    """Return BackMix on the Tiny-ImageNet recipe; patches of half the side, as published."""
    return replace(tiny_imagenet_softmax(), method=BackMix(patch=32))


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


def cifar10_wrn_backmix() -> Run:
    """Return BackMix on WRN-40-4, whose 8 x 8 map has the grid of the released mixing code."""
    return replace(cifar10_wrn_softmax(), method=BackMix())


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


def cifar10_resnet18_backmix() -> Run:
    """Return BackMix on the CIFAR ResNet-18."""
    return replace(cifar10_resnet18_softmax(), method=BackMix())


def imagenet_rn18() -> Run:
    """Return ResNet-18 for 16 epochs with random-resized-crops, SGD 0.5 at batch 1024.

    Rate, decay, smoothing and schedule of ffcv-imagenet's 16-epoch configuration, at one
    resolution and without BlurPool.
    """
    return Run(
        data=tyro.MISSING,
        out=tyro.MISSING,
        epochs=16,
        model="resnet18",
        loader=LoaderOptions(loader="turbo", batch=1024, size=160, crop="random"),
        augment=Augment(flip=True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        optim=Optim(lr=0.5, weight_decay=5e-5, schedule="cyclic", label_smoothing=0.1),
    )


def imagenet_rn18_backmix() -> Run:
    """Return BackMix on ResNet-18; patches of half the side, as in the paper's pictures."""
    return replace(imagenet_rn18(), method=BackMix(patch=80))


def imagenet_rn50() -> Run:
    """Return ResNet-50 for 16 epochs, otherwise as `imagenet_rn18`."""
    base = imagenet_rn18()
    return replace(base, model="resnet50", optim=replace(base.optim, weight_decay=1e-4))


def imagenet_rn50_backmix() -> Run:
    """Return BackMix on ResNet-50."""
    return replace(imagenet_rn50(), method=BackMix(patch=80))


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
    method = BackMix(
        patch=16, probability=0.5, mask_ratio=0.4, fill="mean", cam_source="mix", rate=1.0
    )
    return replace(demo_softmax(), method=method)


def demo_cutout() -> Run:
    """Return the demo's occlusion control: the same patches in plain fill."""
    return replace(demo_softmax(), method=BackMix(patch=16, probability=0.5, mask="grey"))


RECIPES: dict[str, Callable[[], Run]] = {
    "cifar10-softmax": cifar10_softmax,
    "cifar10-backmix": cifar10_backmix,
    "cifar10-cutout": cifar10_cutout,
    "cifar10-wrn-softmax": cifar10_wrn_softmax,
    "cifar10-wrn-backmix": cifar10_wrn_backmix,
    "cifar10-resnet18-softmax": cifar10_resnet18_softmax,
    "cifar10-resnet18-backmix": cifar10_resnet18_backmix,
    "svhn-softmax": svhn_softmax,
    "svhn-backmix": svhn_backmix,
    "tiny-imagenet-softmax": tiny_imagenet_softmax,
    "tiny-imagenet-backmix": tiny_imagenet_backmix,
    "imagenet-rn18": imagenet_rn18,
    "imagenet-rn18-backmix": imagenet_rn18_backmix,
    "imagenet-rn50": imagenet_rn50,
    "imagenet-rn50-backmix": imagenet_rn50_backmix,
    "demo-softmax": demo_softmax,
    "demo-cutout": demo_cutout,
    "demo-backmix": demo_backmix,
}
"""What `backmix train RECIPE` knows."""
