"""What a network wants its images to be: a property of its weights, not of its layers."""

import math
from dataclasses import dataclass
from typing import Literal

from setriton.checks import check_choice, check_size

INTERPOLATIONS = ("bilinear", "bicubic")
CHANNEL_ORDERS = ("rgb", "bgr")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input; the defaults are torchvision's for ImageNet.

    Raises:
        TypeError, ValueError: a size, interpolation or order of channels that does not exist, a deviation of 0.
    """

    image_size: int = 224
    """Side of the square input, pixels."""
    resize: int = 256
    """Shorter side to which images are scaled before the centre crop of `image_size`, pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted, per channel, from values scaled to [0, 1]; in the order of `channels`."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by, per channel; 1/255 for networks that read values of [0, 255]."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels in the input."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        check_size("image_size", self.image_size)
        check_size("resize", self.resize)
        check_choice("channels", self.channels, CHANNEL_ORDERS)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        # Tuples, whatever JSON made of them.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if len(self.mean) != len(self.std) or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std must have a positive value for each of mean; got {self.mean} and {self.std}")
        if not self.mean or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must have a finite value for each channel; got {self.mean}")
        if self.resize < self.image_size:
            raise ValueError(f"resize must be at least image_size, {self.image_size}; got {self.resize}")
