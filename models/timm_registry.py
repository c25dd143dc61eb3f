"""Networks in timm's registry, for timm's scripts: `timm.create_model("setriton_senet154")`."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .registry import create_model, list_models

# timm takes what stands before a slash for a folder: "setriton/senet154" would be timm's own senet154.
PREFIX = "setriton_"


def register_with_timm() -> list[str]:
    """Make every network known to timm as "setriton_" and its name; calling it again changes nothing.

    ``timm.create_model(name, pretrained=True)`` gives the weights of ``create_model(..., weights="timm")``, and options
    are those of `create_model`. `pretrained_cfg` of the network says which images it wants.

    Returns:
        The names in timm's registry.

    Raises:
        ImportError: timm is not installed.
    """
    from timm.models import is_model, register_model

    names = []
    for name in list_models():
        entrypoint = _entrypoint(name)
        if not is_model(entrypoint.__name__):
            # timm adds the name to what this module exports.
            setattr(sys.modules[__name__], entrypoint.__name__, register_model(entrypoint))
        names.append(entrypoint.__name__)
    return names


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        model = create_model(name, weights="timm" if pretrained else None, **options)
        wanted = getattr(model, "network", model).preprocessing
        size = wanted.image_size
        config = {
            "architecture": f"{PREFIX}{name}",
            "input_size": (len(wanted.mean), size, size),
            "crop_pct": size / wanted.resize,
            "interpolation": wanted.interpolation,
            "mean": wanted.mean,
            "std": wanted.std,
        }
        model.pretrained_cfg = model.default_cfg = config
        return model

    build.__name__ = build.__qualname__ = f"{PREFIX}{name}"
    build.__doc__ = f"setriton's {name}."
    return build
