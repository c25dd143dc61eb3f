"""What is published of the networks: their sizes, and the errors the paper reports for them."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .registry import create_model, entry
from .se import SEBlock


@dataclass(frozen=True)
class Counts:
    """Sizes of a network; None where nothing is published."""

    parameters: int | None = None
    """Learnable ones; running statistics are none."""
    macs: int | None = None
    """Multiply-adds of convolutions and fully connected layers for one image of `crop(name)` pixels. The paper's GFLOPs
    are these: its 3.86 for ResNet-50 is the authors' definition's 3,857,973,248."""
    se_blocks: int | None = None


@dataclass(frozen=True)
class Published(Counts):
    """What is published of one network with default options, so in the authors' layout where there are two.

    Sizes are those of the authors' Caffe definitions (github.com/hujie-frank/SENet), which have biases in SE blocks, or
    of the paper a network is from.
    """

    top1: float | None = None
    """Error of one centre crop, %: on ImageNet's validation images (for plain networks the SE paper's own training,
    "re-implementation"), on CIFAR-10's test images where `crop(name)` is 32."""
    top5: float | None = None
    source: str = ""
    """Where the errors are: tables of arXiv 1709.01507v4."""
    macs_unit: int = 1
    """`macs` is published as a multiple of it, rounded."""


PUBLISHED = {
    "resnet50": Published(25_557_032, 3_857_973_248, 0, 24.80, 7.48, "Table 2"),
    "resnet101": Published(44_549_160, 7_570_194_432, 0, 23.17, 6.52, "Table 2"),
    "resnet152": Published(60_192_808, 11_282_415_616, 0, 22.42, 6.34, "Table 2"),
    "resnext50_32x4d": Published(25_028_904, 4_230_479_872, 0, 22.11, 5.90, "Table 2"),
    "resnext101_32x4d": Published(44_177_704, 7_969_996_800, 0, 21.18, 5.57, "Table 2"),
    "resnext152_64x4d": Published(114_971_944, 22_939_303_936, 0),
    "resnext152_64x4d_modified": Published(108_459_944, 20_681_785_344, 0),
    "se_resnet50": Published(28_088_024, 3_860_488_192, 16, 23.29, 6.62, "Table 2"),
    "se_resnet101": Published(49_326_872, 7_574_937_600, 33, 22.38, 6.07, "Table 2"),
    "se_resnet152": Published(66_821_848, 11_288_993_792, 50, 21.57, 5.73, "Table 2"),
    "se_resnext50_32x4d": Published(27_559_896, 4_232_994_816, 16, 21.10, 5.49, "Table 2"),
    "se_resnext101_32x4d": Published(48_955_416, 7_974_739_968, 33, 20.70, 5.01, "Table 2"),
    "senet154": Published(115_088_984, 20_688_363_520, 50, 18.68, 4.47, "Table 8"),
    "bn_inception": Published(11_285_224, 2_032_600_064, 0, 25.38, 7.89, "Table 2"),
    "se_bn_inception": Published(11_931_622, 2_033_239_424, 10, 24.23, 7.14, "Table 2"),
    # TF-slim's form, and SE on its 40 residual branches: the paper's 11.75 G is another form's, which it does not give.
    "inception_resnet_v2": Published(55_843_464, 13_155_794_016, 0, 20.37, 5.21, "Table 2"),
    "se_inception_resnet_v2": Published(64_387_444, 13_164_289_376, 40, 19.80, 4.79, "Table 2"),
    "vgg16_bn": Published(None, 15_470_000_000, 0, 27.02, 8.81, "Table 2", macs_unit=10_000_000),
    "se_vgg16_bn": Published(None, None, None, 25.22, 7.70, "Table 2"),
    "mobilenet": Published(4_231_976, 568_700_000, 0, 28.4, 9.4, "Table 3", macs_unit=100_000),
    "se_mobilenet": Published(4_718_044, None, 13, 25.3, 7.7, "Table 3"),
    "shufflenet_g3": Published(1_865_728, 137_500_000, 0, 32.6, 12.5, "Table 3", macs_unit=100_000),
    "se_shufflenet_g3": Published(2_484_533, None, None, 31.0, 11.1, "Table 3"),
    "preact_resnet110": Published(1_730_522, 253_100_000, 0, 6.37, None, "Table 4", macs_unit=100_000),
    "preact_resnet164": Published(1_703_258, None, 0, 5.46, None, "Table 4"),
    "wrn16_8": Published(None, None, 0, 4.27, None, "Table 4"),
    "se_preact_resnet110": Published(1_744_760, None, None, 5.21, None, "Table 4"),
    "se_preact_resnet164": Published(1_905_362, None, None, 4.39, None, "Table 4"),
    "se_wrn16_8": Published(None, None, None, 3.88, None, "Table 4"),
    "resnet110": Published(1_727_962, 252_900_000, 0, macs_unit=100_000),
    "se_resnet110": Published(1_742_200),
}


def crop(name: str) -> int:
    """Side of the images that a network is counted for, pixels: what its kind usually reads."""
    return entry(name).builder.usual_preprocessing.image_size


def count(name: str, **options: Any) -> Counts:
    """Sizes of a network, counted on the meta device: no weights are made, nothing is computed.

    Args:
        name: one of `list_models()`.
        options: of `create_model`.

    Raises:
        TypeError, ValueError: as from `create_model`.
    """
    model = create_model(name, device="meta", **options).eval()
    side = crop(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, model.in_chans, side, side, device="meta"))
    blocks = sum(isinstance(module, SEBlock) for module in model.modules())
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, blocks)


def differences(name: str, counted: Counts) -> list[str]:
    """What of a network's sizes differs from what is published, one line each."""
    known = PUBLISHED.get(name, Published())
    found = []
    for size in fields(Counts):
        published, here = getattr(known, size.name), getattr(counted, size.name)
        unit = known.macs_unit if size.name == "macs" else 1
        if published is not None and 2 * abs(here - published) > unit:
            about = "about " if unit > 1 else ""
            found.append(f"{name}: {here:,} {size.name}, published are {about}{published:,}")
    return found
