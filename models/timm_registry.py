"""Networks in timm's registry, for timm's scripts: `timm.create_model("setriton_senet154")`."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import FeatureExtractor, Network
from .preprocessing import Preprocessing
from .registry import create_model, entry, list_models
from .weights.download import RELEASES, REPOSITORIES

# timm takes what stands before a slash for a folder: "setriton/senet154" would be timm's own senet154.
PREFIX = "setriton_"
_EXTRACTORS = {
    "getter": "FeatureGetterNet",
    "list": "FeatureListNet",
    "dict": "FeatureDictNet",
    "hook": "FeatureHookNet",
    "fx": "FeatureGraphNet",
}

# What timm knows of a name before the network is built; `register_model` looks for it in this module.
default_cfgs: dict[str, Any] = {}


def register_with_timm() -> list[str]:
    """Make every network known to timm as "setriton_" and its name; calling it again changes nothing.

    ``timm.create_model(name, pretrained=True)`` gives the weights of ``create_model(..., weights="timm")``. Options are
    those of `create_model`, and timm's `feature_cls`. `pretrained_cfg` of the network says which images it wants, and
    how its first and last layers are called.

    Returns:
        The names in timm's registry.

    Raises:
        ImportError: timm is not installed.
    """
    from timm.models import generate_default_cfgs, is_model, register_model

    names = []
    for name in list_models():
        entrypoint = _entrypoint(name)
        if not is_model(entrypoint.__name__):
            known = _config(name, entry(name).builder.usual_preprocessing)
            default_cfgs.update(generate_default_cfgs({f"{PREFIX}{name}": known}))
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
        features_only: bool = False,
        out_indices: Any = None,
        feature_cls: Any = None,
        feature_cfg: dict[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        for argument, value in (
            ("pretrained_cfg", pretrained_cfg),
            ("pretrained_cfg_overlay", pretrained_cfg_overlay),
            ("cache_dir", cache_dir),
        ):
            if value:
                raise ValueError(f"{argument} must be left out for {PREFIX}{name}, or give weights=...; got {value!r}")
        options.setdefault("weights", "timm" if pretrained else None)
        network = create_model(name, **options)
        config = _config(name, network.preprocessing) | _layers(name, network.preprocessing.image_size)
        model: Any = network
        if features_only:
            asked = {"out_indices": out_indices, "feature_cls": feature_cls} | (feature_cfg or {})
            model = _extractor(network, **asked)
        model.pretrained_cfg = model.default_cfg = config
        return model

    build.__name__ = build.__qualname__ = f"{PREFIX}{name}"
    build.__doc__ = f"setriton's {name}."
    return build


def _extractor(network: Network, out_indices: Any, feature_cls: Any, **options: Any) -> nn.Module:
    """The network as timm's extractor of a name or class; by default as ours."""
    from timm.models import _features, _features_fx

    if feature_cls is None and not options:
        return FeatureExtractor(network, out_indices)
    if isinstance(feature_cls, str) and feature_cls.lower() not in _EXTRACTORS:
        raise ValueError(f"feature_cls must be one of {', '.join(_EXTRACTORS)}; got {feature_cls!r}")
    name = feature_cls or "getter"
    if isinstance(name, str):
        name = getattr(_features_fx if name.lower() == "fx" else _features, _EXTRACTORS[name.lower()])
    return name(network, out_indices=network.take_indices(out_indices), **options)


def _config(name: str, wanted: Preprocessing) -> dict[str, Any]:
    """What timm's tables say of a network: its images, classes and classifier, and where its weights are."""
    size = wanted.image_size
    return {
        "architecture": f"{PREFIX}{name}",
        "hf_hub_id": REPOSITORIES.get(name),
        "url": None if name in REPOSITORIES else RELEASES.get(name),
        "input_size": (len(wanted.mean), size, size),
        "crop_pct": size / wanted.resize,
        "interpolation": wanted.interpolation,
        "mean": wanted.mean,
        "std": wanted.std,
        "num_classes": entry(name).options()["num_classes"],
        "classifier": "fc",
        "pool_size": None,
        "first_conv": None,
    }


@functools.cache
def _layers(name: str, size: int) -> dict[str, Any]:
    """The size of a network's last map for images of `size`, and its first convolution, of a copy without memory."""
    network = create_model(name, device="meta").eval()
    with torch.no_grad():
        last = network.forward_features(torch.empty(1, network.in_chans, size, size, device="meta"))
    convolutions = (key for key, module in network.named_modules() if isinstance(module, nn.Conv2d))
    return {"pool_size": tuple(last.shape[2:]), "first_conv": next(convolutions)}
