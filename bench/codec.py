"""nvImageCodec without DALI, for the bench: it decodes boxes, torch resizes them one by one."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backmix.pipeline import draws
from backmix.pipeline.beton import open_set
from backmix.pipeline.decode import read_image
from bench import bench_loaders

REGION = 64
"""Side of the boxes whose pixels are compared."""

Decode = Callable[[list[np.ndarray], np.ndarray], list[Tensor]]
"""From stored JPEGs and boxes, int [n, 4], to pixels, uint8 [h, w, 3] each."""


def decoder(threads: int, device: torch.device, share: float, whole: bool) -> Decode:
    """Return nvImageCodec's decoder of boxes.

    Args:
        threads: of the host.
        device: where it decodes.
        share: of the JPEGs, for the engine.
        whole: decode the whole image and cut afterwards.
    """
    codec: Any = import_module("nvidia.nvimgcodec")
    kind, gpu = codec.BackendKind, device.type == "cuda"
    backends = [codec.Backend(kind.CPU_ONLY)]
    if gpu:
        gpus = [codec.Backend(kind.GPU_ONLY), codec.Backend(kind.HYBRID_CPU_GPU)]
        engine = [codec.Backend(kind.HW_GPU_ONLY, share)] if share else []
        backends = engine + gpus + backends
    native = codec.Decoder(
        device_id=torch.cuda.current_device() if gpu else codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=threads,
        backends=backends,
        options=":fancy_upsampling=1",
    )
    rgb = {"sample_format": codec.SampleFormat.I_RGB, "color_spec": codec.ColorSpec.SRGB}
    params = codec.DecodeParams(apply_exif_orientation=False, **rgb)

    def decode(stored: list[np.ndarray], boxes: np.ndarray) -> list[Tensor]:
        streams = [codec.CodeStream(one) for one in stored]
        corners = boxes.tolist()
        if not whole:
            streams = [
                one.get_sub_code_stream(region=codec.Region(y, x, y + h, x + w))
                for one, (y, x, h, w) in zip(streams, corners, strict=True)
            ]
        stream = torch.cuda.current_stream(device).cuda_stream if gpu else 0
        images = native.decode(streams, params=params, cuda_stream=stream)
        if any(image is None for image in images):
            raise ValueError(f"{sum(image is None for image in images)} images do not decode")
        if gpu:
            pixels = [torch.from_dlpack(image.to_dlpack(stream)) for image in images]
        else:  # DLPack asks for a driver here, even where the pixels are the host's
            pixels = [torch.from_numpy(np.array(image)) for image in images]
        if whole:
            pixels = [
                one[y : y + h, x : x + w] for one, (y, x, h, w) in zip(pixels, corners, strict=True)
            ]
        return pixels

    return decode


def views(
    decode: Decode, data: Path, side: int, batch: int, device: torch.device
) -> Generator[int]:
    """Deliver views that a decoder's thread decodes a batch ahead, and torch resizes singly."""
    index = bench_loaders.jpegs(data)
    with open_set(data) as stored, ThreadPoolExecutor(1) as thread:

        def begin(turn: int) -> list[Tensor]:
            samples = index[np.arange(turn * batch, (turn + 1) * batch) % len(index)]
            boxes = draws.crop_boxes(
                0,
                turn * batch // len(index),
                samples,
                stored.sizes[samples],
                bench_loaders.SCALE,
                bench_loaders.RATIO,
            )
            return decode([stored.region(sample) for sample in samples.tolist()], boxes)

        ahead = thread.submit(begin, 0)
        for turn in count(1):
            images, ahead = ahead.result(), thread.submit(begin, turn)
            made = torch.empty(batch, 3, side, side, dtype=torch.uint8, device=device)
            for view, image in zip(made, images, strict=True):
                planes = image.permute(2, 0, 1)[None].float()
                resized = functional.interpolate(
                    planes, (side, side), mode="bilinear", antialias=True
                )
                view.copy_(resized[0].round_())
            yield batch


def distances(decode: Decode, data: Path, batch: int, most: int) -> np.ndarray:
    """Return how far decoded boxes are from the stated pixels, no resize: uint8 [n, h, h, 3].

    Args:
        decode: from `decoder`.
        data: a .beton file.
        batch: images decoded at once.
        most: images; smaller ones than the boxes are left out.
    """
    random, away = np.random.default_rng(0), []
    with open_set(data) as stored:
        index = bench_loaders.jpegs(data)
        index = index[(stored.sizes[index] >= REGION).all(1)][:most]
        corners = random.integers(0, stored.sizes[index] - REGION + 1)
        boxes = np.concatenate([corners, np.full_like(corners, REGION)], 1)
        for first in range(0, len(index), batch):
            samples, some = index[first : first + batch].tolist(), boxes[first : first + batch]
            parts = decode([stored.region(sample) for sample in samples], some)
            for sample, (y, x, h, w), part in zip(samples, some.tolist(), parts, strict=True):
                a, b = read_image(stored, sample)[0][y : y + h, x : x + w], part.cpu().numpy()
                away.append(np.maximum(a, b) - np.minimum(a, b))
    return np.stack(away)
