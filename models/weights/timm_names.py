"""What timm calls the networks, and what its configuration of a repository says of one."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..base import POOLS
from ..preprocessing import Preprocessing

# What a repository's weights are called.
REPOSITORY_FILES = ("model.safetensors", "pytorch_model.bin")
# timm's names of networks in layout "caffe", the authors', and of those that it has in its own.
LEGACY = {
    "se_resnet18": "legacy_seresnet18",
    "se_resnet34": "legacy_seresnet34",
    "se_resnet50": "legacy_seresnet50",
    "se_resnet101": "legacy_seresnet101",
    "se_resnet152": "legacy_seresnet152",
    "se_resnext50_32x4d": "legacy_seresnext50_32x4d",
    "se_resnext101_32x4d": "legacy_seresnext101_32x4d",
    "senet154": "legacy_senet154",
}
TIMM = {
    **{ours: theirs.removeprefix("legacy_") for ours, theirs in LEGACY.items()},
    **{name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
    **{name: name for name in ("resnext50_32x4d", "resnext101_32x4d", "inception_resnet_v2")},
}
# Names of weights, in which networks were called before timm had tags.
_AS_TAGS = re.compile(r"(?:tv_|ssl_|swsl_|gluon_)?(.+?)(?:_v1b)?")
# Arguments of timm's networks that change nothing, or show in shapes.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "zero_init_last", "img_size", "pretrained"}


@dataclass(frozen=True)
class TimmConfig:
    """What config.json says of the weights beside it."""

    architecture: str | None = None
    """timm's name of the network."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments with which the network is built otherwise than its name says, and shapes do not show."""
    global_pool: str | None = None
    preprocessing: Preprocessing | None = None

    @classmethod
    def beside(cls, path: Path) -> Self | None:
        """The configuration in the folder of a file that is called as in a repository; None where there is none."""
        config = path.with_name("config.json")
        return cls.read(config) if path.name in REPOSITORY_FILES and config.is_file() else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configuration in a file; what it does not say, or not as timm would, is None."""
        try:
            content = json.loads(path.read_text())
        except (OSError, RecursionError, ValueError):
            content = None
        if not isinstance(content, dict):
            return cls()
        name, pool, arguments = (content.get(key) for key in ("architecture", "global_pool", "model_args"))
        arguments = arguments if isinstance(arguments, dict) else {}
        return cls(
            name if isinstance(name, str) else None,
            {key: value for key, value in arguments.items() if key not in _HARMLESS},
            pool if pool in POOLS else None,
            _preprocessing(content.get("pretrained_cfg")),
        )

    def check(self, network: str) -> bool:
        """Whether it names the network's architecture.

        Raises:
            ValueError: it names another one, or one that is built otherwise.
        """
        if self.architecture is None:
            return False
        match = _AS_TAGS.fullmatch(self.architecture)
        known = {TIMM.get(network), LEGACY.get(network), f"setriton_{network}", *({network} & {"vgg16_bn"})}
        if self.architecture not in known and (match is None or match[1] not in known):
            raise ValueError(
                f"weights must be those of {network}; by their config.json they are of {self.architecture}, "
                "which may have the same keys and compute something else"
            )
        if self.arguments:
            built = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
            raise ValueError(
                f"weights must be those of {network}; by their config.json they are of {self.architecture} with {built}"
            )
        return True


def _preprocessing(fields: Any) -> Preprocessing | None:
    try:
        size = fields["input_size"][-1]
        return Preprocessing(
            image_size=size,
            resize=int(size / fields["crop_pct"]),
            mean=tuple(fields["mean"]),
            std=tuple(fields["std"]),
            interpolation=fields["interpolation"],
        )
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
