"""Weights from one way to write them down into another."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from torch import Tensor

from setriton.checks import check_choice

from ..base import Network
from ..registry import create_model, entry, list_models
from ..saved import Header, save, write_tensors
from ..se import SEBlock, SEOptions
from .fit import LoadReport, Weights
from .headers import FREE
from .load import SAID, load_opened, open_weights, options_for
from .timm_names import LEGACY, TIMM

FORMATS = ("setriton", "timm")

# Options that timm's networks have as well, or whose values the keys and shapes show.
_SHARED = {*FREE, "name", "layout", "bn_act", "rd_ratio", "rd_channels", "rd_divisor", "repeats"}
_LEGACY_KEYS = ((r"\.se\.", ".se_module."), (r"^fc\.", "last_linear."))
_LEGACY_STEM = ((r"^(conv1|bn1)\.", r"layer0.\1."), *_LEGACY_KEYS)
_LEGACY_SENET154 = (
    (r"^bn1\.", "layer0.bn3."),
    (r"^conv1\.6\.", "layer0.conv3."),
    (r"^conv1\.4\.", "layer0.bn2."),
    (r"^conv1\.3\.", "layer0.conv2."),
    (r"^conv1\.1\.", "layer0.bn1."),
    (r"^conv1\.0\.", "layer0.conv1."),
    *_LEGACY_KEYS,
)


def convert(
    path: str | Path,
    out: Path,
    model: str | None = None,
    to: Literal["setriton", "timm"] = "setriton",
    use_ema: bool = True,
) -> tuple[str, LoadReport]:
    """Read weights of any known kind and write them as safetensors.

    Args:
        path: what `load_weights` takes.
        out: the file to write, which ends in .safetensors; it is whole or not there. Values are float32.
        model: the network; None for the one that the weights fit.
        to: setriton: our keys, with a header of the network's name, options and preprocessing. timm: the keys of timm's
            network of the same outputs, which are those of its legacy_* for layout "caffe".
        use_ema: as for `load_weights`.

    Returns:
        The network's name in the format that was written, and what was changed on the way.

    Raises:
        ValueError: the weights fit no network, or timm has none that computes what they need; `out` ends otherwise.
        OSError: `out` cannot be written.
    """
    check_choice("to", to, FORMATS)
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, which is what is written; got {out}")
    opened = open_weights(path, use_ema=use_ema)
    name = model or opened.model or identify(opened)
    network = create_model(name, **options_for(name, opened), device="meta")
    report = load_opened(network, opened)
    if to == "setriton":
        save(out, network.state_dict(), Header.of(network, opened.origin or report.title))
        return name, report
    theirs, tensors, notes = to_timm(network)
    write_tensors(out, tensors, {"format": "pt"})
    report.notes.extend(notes)
    return theirs, report


def identify(weights: Weights) -> str:
    """The network whose parameters weights have.

    Raises:
        ValueError: none has them all.
    """
    shapes = {key: tensor.numel() for key, tensor in weights.state.items() if not _is_head(key)}
    for name in list_models():
        network = create_model(name, **options_for(name, weights), device="meta")
        wanted = {key: p.numel() for key, p in network.named_parameters() if not _is_head(key)}
        # Widths of SE, biases of SE and of convolutions in front of BN may differ: `fit` says what becomes of them.
        if all(shapes.get(key) == size for key, size in wanted.items() if not re.search(r"\.se\.fc.\.bias$", key)):
            extra = [key for key in shapes.keys() - network.state_dict().keys() if not key.endswith(".conv.bias")]
            if not [key for key in extra if not key.endswith("num_batches_tracked")]:
                return name
    raise ValueError(f"weights of {weights.title} fit no network of `setriton models`; --model says which they are of")


def to_timm(network: Network) -> tuple[str, dict[str, Tensor], list[str]]:
    """timm's name of a network, its state dict under timm's keys, and what timm must be told besides them.

    Raises:
        ValueError: timm has no network that computes the same.
    """
    name, config = network.config["name"], network.config
    has_legacy_relu = config.get("bn_act") == "relu"
    is_basic = name in ("se_resnet18", "se_resnet34")
    renames: tuple[tuple[str, str], ...] = ()
    if network.layout == "caffe" and name in LEGACY and is_basic == has_legacy_relu:
        theirs, renames = LEGACY[name], _LEGACY_SENET154 if name == "senet154" else _LEGACY_STEM
    elif network.layout != "caffe" and name in TIMM and not has_legacy_relu:
        theirs = TIMM[name]
        if name == "inception_resnet_v2":
            renames = ((r"^fc\.", "classif."),)
    else:
        layout = f" in layout {network.layout!r}" if network.layout else ""
        relu = " with bn_act='relu'" if has_legacy_relu else ""
        raise ValueError(f"timm has no network that computes what {name}{layout}{relu} does")
    if other := [option for option in config if option not in _SHARED]:
        raise ValueError(f"timm has no {theirs} with {', '.join(f'{option}={config[option]!r}' for option in other)}")
    is_legacy = network.layout == "caffe"
    if is_legacy and config.get("output_stride", 32) != 32:
        raise ValueError(f"timm has no {theirs} with output_stride={config['output_stride']}")
    divisor = 1 if is_legacy else 8
    for module in network.modules():
        if isinstance(module, SEBlock):
            hidden, channels = module.fc1.weight.shape[:2]
            usual = SEOptions(rd_divisor=divisor).hidden(channels)
            if hidden != usual:
                raise ValueError(f"timm's {theirs} has SE blocks {usual} wide at {channels} channels, not {hidden}")
    state = {}
    for key, tensor in network.state_dict().items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor.contiguous()
    return theirs, state, _to_tell(network, theirs)


def _to_tell(network: Network, theirs: str) -> list[str]:
    """What a state dict does not say: options that change outputs, and images other than the network's usual ones."""
    usual = entry(network.config["name"]).options()
    told = {name: value for name in SAID if (value := network.config.get(name, usual.get(name))) != usual.get(name)}
    arguments = "".join(f", {name}={value!r}" for name, value in told.items())
    notes = [f"build it with timm.create_model({theirs!r}{arguments})"] if told else []
    if network.preprocessing != network.usual_preprocessing:
        fields = ", ".join(f"{name}={value!r}" for name, value in asdict(network.preprocessing).items())
        notes.append(f"timm must be told of its images: {fields}")
    return notes


def _is_head(key: str) -> bool:
    return key.startswith("fc.")
