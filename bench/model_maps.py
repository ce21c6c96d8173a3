"""Which maps the networks of timm and torchvision have: the table of docs/models.md.

python bench/model_maps.py [--out FILE] [NAME[@SIDE] ...]   without names, all of `NETWORKS`

Weights are random (seed 0), and so are the images: fidelity at random weights says whether the
local head is of any use at all; a run measures it on its own images with its own first weights.
"""

import argparse
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from backmix.train.models.any import AnyModel, any_model

NETWORKS = {
    "timm": """
        resnet18 resnet50 resnet50d resnet50_gn seresnet50 res2net50_26w_4s resnetv2_50
        resnext50_32x4d wide_resnet50_2 regnety_016 regnetx_002 efficientnet_b0
        tf_efficientnetv2_b0 mobilenetv2_100 densenet121 inception_v3 rexnet_100 nfnet_f0
        xception41 hrnet_w18_small repvgg_a0
        coatnet_0_rw_224@224 fastvit_t8 tresnet_m swin_tiny_patch4_window7_224@224
        swinv2_tiny_window8_256@256 mixer_s32_224@224 convnext_tiny convnextv2_atto edgenext_small
        poolformer_s12 maxvit_tiny_tf_224@224 caformer_s18 mobilenetv3_large_100
        mobilenetv3_small_100 mobilenetv4_conv_small ghostnet_100 efficientvit_b0
        vit_small_patch16_224@224 vit_base_patch16_clip_224@224 vit_base_patch16_gap_224@224
        deit_tiny_patch16_224@224 deit_tiny_distilled_patch16_224@224 vgg11 dpn68
    """,
    "torchvision": """
        resnet18 resnet50 resnext50_32x4d densenet121 efficientnet_b0 efficientnet_v2_s
        regnet_y_400mf mobilenet_v2 googlenet inception_v3@299 shufflenet_v2_x1_0 mnasnet1_0 swin_t
        swin_v2_t convnext_tiny mobilenet_v3_large mobilenet_v3_small maxvit_t@224 vit_b_16@224
        alexnet vgg11 squeezenet1_1
    """,
}
"""Networks by library; side of the images after @, else `SIDE`."""
SIDE = 128
CLASSES = 10
IMAGES = 32


@dataclass(frozen=True)
class Row:
    """One network."""

    name: str
    size: int
    maps: str
    fidelity: float | None
    channels: int
    grid: tuple[int, int]
    note: str


def measure(name: str, size: int = SIDE, images: int = IMAGES) -> Row:
    """Make a network with random weights and look at its maps."""
    torch.manual_seed(0)
    model = any_model(name, CLASSES, size)
    generator = torch.Generator().manual_seed(1)
    shown = torch.randn(images, 3, size, size, generator=generator)
    fidelity = None if model.maps == "none" else model.fidelity(shown)
    with torch.inference_mode():
        features = model.eval()(shown[:1])[1]
    return Row(name, size, model.maps, fidelity, features.shape[1], model.grid(size), _note(model))


def _note(model: AnyModel) -> str:
    if model.maps == "none":
        return model.why_not
    spot = model.parts.spot
    assert spot is not None
    tail = (
        f", then {' '.join(layer.module for layer in model.parts.tail)}"
        if model.maps == "local"
        else ""
    )
    return f"{spot.layout}, {spot.side} of `{spot.module}`{tail}"


def table(rows: list[Row]) -> str:
    """Return rows as Markdown."""
    lines = [
        "| network | px | map | fidelity | C x g x g' | where, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        fidelity = (
            "" if row.fidelity is None else "1" if row.maps == "exact" else f"{row.fidelity:.3f}"
        )
        shape = "" if row.maps == "none" else f"{row.channels} x {row.grid[0]} x {row.grid[1]}"
        lines.append(
            f"| `{row.name}` | {row.size} | {row.maps} | {fidelity} | {shape} | {row.note} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the networks that the command names."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    listed = [f"{library}/{name}" for library, names in NETWORKS.items() for name in names.split()]
    rows = []
    for text in asked.names or listed:
        name, _, size = text.partition("@")
        began = time.perf_counter()
        row = measure(name, int(size or SIDE))
        rows.append(row)
        print(f"{time.perf_counter() - began:5.1f} s {row}", flush=True)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "torchvision", "timm"))
    said = f"{table(rows)}\n\n{versions}, Python {platform.python_version()}, seed 0.\n"
    print(said)
    if asked.out:
        asked.out.write_text(said)


if __name__ == "__main__":
    main()
