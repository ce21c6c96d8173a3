"""The launches that training makes, at the shapes that matter, from tensors that hold nothing.

`offline.py` compiles each for every architecture, the tests hold each to its budget, and the bench
prints each one's figures. A launch is made by the door's own function, so it cannot differ from
what runs.
"""

from collections.abc import Callable

import torch

from backmix.kernels import (
    class_reconstruction,
    configs,
    location_confidence,
    mix_background,
    mix_draws,
    update_cam_bank,
)
from backmix.kernels.launch import Launch


def _mix_draws() -> dict[str, Launch]:
    """Return the launches of the bench stage `draws`; no door draws on the device."""
    index = torch.empty(512, dtype=torch.int64, device="meta")
    return {
        "512 x 32 px, resident": mix_draws.launch(
            mix_draws.empty(512, 4, "meta"),
            2**40,
            1,
            index,
            rows=index,
            pool_rows=50_000,
            group=0,
            size=(32, 32),
            patch=8,
            position="inside",
            probability=1.0,
            flip=True,
            pad=4,
        )
    }


def _location_confidence() -> dict[str, Launch]:
    """Return the products and joins of ResNet-50's last map at 224 px, and of CIFAR's networks."""

    def made(images: int, side: int, channels: int, classes: int, dtype: torch.dtype) -> list:
        locations = images * side * side
        out = torch.empty(locations, device="meta")
        return location_confidence.launches(
            out,
            out,
            torch.empty(locations, channels, dtype=dtype, device="meta"),
            torch.empty(classes, channels, dtype=dtype, device="meta"),
            torch.empty(classes, device="meta"),
            torch.empty(images, dtype=torch.int64, device="meta"),
        )

    product, join = made(256, 7, 2048, 1000, torch.bfloat16)
    large, large_join = made(256, 7, 2048, 21_841, torch.bfloat16)
    (small,) = made(512, 4, 128, 10, torch.bfloat16)
    plain, _ = made(256, 7, 2048, 1000, torch.float32)
    return {
        "12544 x 2048 x 1000 bf16": product,
        "12544 x 1000, join": join,
        "12544 x 2048 x 21841 bf16": large,
        "12544 x 21841, join": large_join,
        "8192 x 128 x 10 bf16": small,
        "12544 x 2048 x 1000 fp32": plain,
    }


def _mix_background() -> dict[str, Launch]:
    """Return the mix of ImageNet's batches at 224 px, and of CIFAR's from a resident pool."""

    def made(
        n: int,
        side: int,
        cells: int,
        dtype: torch.dtype,
        pool: int,
        *,
        height: int | None = None,
        shifted: bool = False,
    ) -> Launch:
        int32, int64 = torch.int32, torch.int64

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        height = side if height is None else height
        nhwc = empty(n, height, side, 3, dtype=dtype)
        return mix_background.launch(
            nhwc if dtype == torch.uint8 else nhwc.permute(0, 3, 1, 2),
            empty(pool, height, side, 3, dtype=torch.uint8),
            empty(n, dtype=int64),
            empty(n, dtype=int64),
            empty(pool, cells, cells, dtype=torch.float16),
            empty(n, dtype=int64),
            empty(n, 4, dtype=int32),
            empty(n, 6, dtype=int32),
            empty(n, dtype=torch.bool),
            empty(n, 2, dtype=int32) if shifted else None,
            empty(n, dtype=int32),
            hottest=cells * cells // 4,
            inverted=False,
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
            fill=None,
            fill_colour=(123.675, 116.28, 103.53),
            pad=(0, 0, 0),
        )

    bf16 = torch.bfloat16
    return {
        "1024 x 224 px bf16": made(1024, 224, 7, bf16, 1024),
        "256 x 224 px bf16, 14 x 14 cells": made(256, 224, 14, bf16, 256),
        "256 x 223 x 224 px bf16": made(256, 224, 7, bf16, 256, height=223),
        "256 x 224 px fp32": made(256, 224, 7, torch.float32, 256),
        "1024 x 224 px uint8": made(1024, 224, 7, torch.uint8, 1024),
        "512 x 32 px bf16, resident, shifted": made(512, 32, 4, bf16, 50_000, shifted=True),
    }


def _update_cam_bank() -> dict[str, Launch]:
    """Return the updates from ResNet-50's last map at 224 px, and from mixed views of CIFAR.

    The last one is of views of 160 px on their way to 224 px.
    """

    def made(
        n: int,
        cells: int,
        channels: int,
        classes: int,
        side: int,
        *,
        map_cells: int | None = None,
        mixed: bool = False,
    ) -> Callable[..., Launch]:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def of(dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> Launch:
            across = map_cells or cells
            features = empty(n, channels, across, across, dtype=dtype)
            return update_cam_bank.launch(
                empty(50_000, cells, cells, dtype=torch.float16),
                features.contiguous(memory_format=layout),
                empty(classes, channels, dtype=torch.float32),
                empty(n, dtype=torch.int64),
                empty(n, dtype=torch.int64),
                box=empty(n, 4, dtype=torch.int32),
                flip=empty(n, dtype=torch.bool) if mixed else None,
                shift=empty(n, 2, dtype=torch.int32) if mixed else None,
                patch=empty(n, 6, dtype=torch.int32) if mixed else None,
                size=(side, side),
                rate=0.1,
                normalise="image",
            )

        return of

    imagenet = made(1024, 7, 2048, 1000, 224)
    return {
        "1024 x 7 x 7 x 2048 bf16": imagenet(torch.bfloat16),
        "1024 x 7 x 7 x 2048 fp16": imagenet(torch.float16),
        "1024 x 7 x 7 x 2048 fp32": imagenet(torch.float32),
        "1024 x 7 x 7 x 2048 bf16, NCHW": imagenet(torch.bfloat16, torch.contiguous_format),
        "512 x 4 x 4 x 128 bf16, mixed": made(512, 4, 128, 10, 32, mixed=True)(torch.bfloat16),
        "1024 x 5 x 5 x 2048 bf16, into 7 x 7, mixed": made(
            1024, 7, 2048, 1000, 160, map_cells=5, mixed=True
        )(torch.bfloat16),
    }


def _class_reconstruction() -> dict[str, Launch]:
    """Return the four kernels of CSSR at ImageNet's shape, with many latents, and in fp32."""

    def made(n: int, classes: int, latents: int, channels: int, dtype: torch.dtype) -> list:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, z = empty(n, channels), empty(n, classes * latents)
        decoder = empty(classes, latents, channels)
        gradient = empty(classes, n, dtype=torch.float32)
        blocks = configs.reconstruction_blocks(latents, dtype.itemsize)
        arguments = (z, decoder, gradient, blocks)
        return [
            class_reconstruction.error_launch(gradient, x, z, decoder, blocks),
            class_reconstruction.decoder_gradient_launch(empty(channels, n), *arguments)[0],
            class_reconstruction.latent_gradient_launch(empty(*z.shape), x, *arguments),
            class_reconstruction.sign_sum_launch(x, *arguments)[0],
        ]

    names = ("errors", "decoder's gradient", "latents' gradient", "sums of signs")
    shapes = {
        "12544, K 1000, L 16, C 512 bf16": (12_544, 1000, 16, 512, torch.bfloat16),
        "12544, K 1000, L 64, C 2048 bf16": (12_544, 1000, 64, 2048, torch.bfloat16),
    }
    launches = {
        f"{shape}, {name}": launch
        for shape, sizes in shapes.items()
        for name, launch in zip(names, made(*sizes), strict=True)
    }
    errors, of_decoder, *_ = made(8192, 10, 64, 256, torch.float32)
    shape = "8192, K 10, L 64, C 256 fp32"
    return {**launches, f"{shape}, errors": errors, f"{shape}, decoder's gradient": of_decoder}


SHIPPED: dict[str, Callable[[], dict[str, Launch]]] = {
    "class_reconstruction": _class_reconstruction,
    "location_confidence": _location_confidence,
    "mix_background": _mix_background,
    "mix_draws": _mix_draws,
    "update_cam_bank": _update_cam_bank,
}
"""By door: the launches by the name of the case."""
