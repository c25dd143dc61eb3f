"""Tensors into a network: what differs in form is brought into its form, what differs in kind is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Network
from ..preprocessing import Preprocessing
from ..se import SEOptions
from .files import State
from .tensors import cast, dtype_note, is_plain
from .timm_names import TimmConfig

# Classes of TensorFlow's ImageNet networks: class 0 is the background.
BACKGROUND_TOO = 1001


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and all that was changed on the way or left out."""

    title: str
    """Where the weights are from."""
    tensors: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.tensors} tensors of {self.title}", *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class Weights:
    """A state dict under our keys, and what is known of it."""

    state: State
    title: str
    needs: dict[str, Any]
    """Options the network must have."""
    preprocessing: Preprocessing | None
    published_dropout: bool
    model: str | None = None
    """The network's name, where the file says it."""
    options: dict[str, Any] | None = None
    """All options the network was built with, where the file says them."""
    origin: str | None = None
    """The images it was trained with, or where its weights are from, where the file says it."""
    notes: tuple[str, ...] = ()
    """What was chosen in the file, and left out."""
    untold: str = ""
    """What their keys cannot tell."""
    config: TimmConfig | None = None
    """What is said of them in the file beside them."""


def fit(model: Network, weights: Weights) -> LoadReport:
    """Load tensors whose names, shapes and values agree with the network's, once all are known to."""
    target = model.state_dict()
    if not all(map(is_plain, target.values())):
        raise ValueError("model must be loaded before it is sharded or quantised")
    state, notes = adapt(model, weights)
    for key, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"model must have values where it keeps its own weights: its {key} is on the meta device, without any"
            )
        state[key] = cast(key, tensor, target[key], weights.title)
    on_meta = any(tensor.is_meta for tensor in target.values())
    # A network without memory of its own must not share the caller's, nor one be written that is still to be read.
    own = {tensor.untyped_storage().data_ptr() for tensor in target.values()}
    state = {k: t.clone() if on_meta or t.untyped_storage().data_ptr() in own else t for k, t in state.items()}
    model.load_state_dict(state, assign=on_meta)
    if weights.preprocessing is not None:
        model.preprocessing = _for_channels(weights.preprocessing, model.in_chans)
    return LoadReport(weights.title, len(state), notes)


def adapt(model: Network, weights: Weights) -> tuple[State, list[str]]:
    """The tensors under a network's names and in its shapes, and what was changed; their values are not looked at.

    Raises:
        ValueError: there are others than the network has, or of other shapes.
    """
    notes = list(weights.notes)
    target = model.state_dict()
    state = dict(weights.state)
    _fit_classifier(model, state, target, notes)
    _fit_first_convolution(model, state, target, notes)
    _fold_biases(state, target, notes)
    _add_missing(state, target, notes)
    missing, unexpected = target.keys() - state.keys(), state.keys() - target.keys()
    for kind, keys in (("has no", missing), ("has", unexpected)):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            other = "in the network" if kind == "has no" else "not in the network"
            raise ValueError(
                f"weights of {weights.title} are not those of {model.config['name']}: the file {kind} {some}, which "
                f"{'is' if len(keys) == 1 else 'are'} {other} ({len(keys)} such)"
            )
    notes += dtype_note(state, target)
    for key, tensor in state.items():
        wanted = target[key]
        if not _is_same(tensor.shape, wanted.shape):
            raise ValueError(_shape_message(model, weights, key, tensor, wanted))
        state[key] = tensor.reshape(wanted.shape)
    return state, notes


def _is_same(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether shapes differ in axes of 1 behind alone, as linear layers and 1x1 convolutions do, or in Caffe's before.

    Axes of 1 elsewhere say something: a grouped convolution's weight is no transposed one's.
    """
    core = _without_ones_behind(wanted)
    of_caffe = len(shape) == 4 and list(shape) == [1] * (4 - len(core)) + core
    return _without_ones_behind(shape) == core or of_caffe


def _without_ones_behind(shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _fit_classifier(model: Network, state: State, target: State, notes: list[str]) -> None:
    if "fc.weight" not in state:
        return
    classes = state["fc.weight"].shape[0]
    if classes == model.num_classes:
        return
    if classes == model.num_classes + 1 == BACKGROUND_TOO:
        state |= {key: state[key][1:] for key in ("fc.weight", "fc.bias") if key in state}
        notes.append("fc: class 0 of 1,001, the background, is left out")
        return
    for key in ("fc.weight", "fc.bias"):
        state.pop(key, None)
        if key in target:
            state[key] = target[key]
    if model.num_classes:
        notes.append(f"fc: as it was; the weights have {classes:,} classes, the network {model.num_classes:,}")


def _fit_first_convolution(model: Network, state: State, target: State, notes: list[str]) -> None:
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    key = f"{name}.weight"
    if key not in state or state[key].dim() != 4 or state[key].shape[1] == model.in_chans:
        return
    weight, wanted = state[key], model.in_chans
    given = weight.shape[1]
    if wanted == 1:
        state[key] = weight.sum(1, keepdim=True)
        notes.append(f"{key}: summed over its {given} input channels")
        return
    # Scaled, so that images of equal channels give what they gave (of other multiples than whole ones, about that).
    repeats = -(-wanted // given)
    state[key] = weight.repeat(1, repeats, 1, 1)[:, :wanted] * (given / wanted)
    notes.append(f"{key}: its {given} input channels repeated to {wanted}, times {given}/{wanted}")


def _fold_biases(state: State, target: State, notes: list[str]) -> None:
    """A bias in front of BN moves its mean, and nothing else."""
    folded = 0
    for key in [key for key in state if key.endswith(".conv.bias") and key not in target]:
        mean = key.removesuffix("conv.bias") + "bn.running_mean"
        if mean in state and state[mean].shape == state[key].shape:
            state[mean] = state[mean] - state.pop(key)
            folded += 1
    if folded:
        notes.append(f"{folded} biases of convolutions are folded into the means of the BN behind them")


def _add_missing(state: State, target: State, notes: list[str]) -> None:
    for key, tensor in target.items():
        if key not in state and key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=tensor.dtype)
    biases = [key for key in target if key.endswith((".se.fc1.bias", ".se.fc2.bias"))]
    if biases and not any(key in state for key in biases) and all(_weight_of(key) in state for key in biases):
        state.update({key: torch.zeros_like(target[key], device="cpu") for key in biases})
        notes.append("se: the weights have no biases, the network's are 0")
    for key in [key for key in state if key.endswith("num_batches_tracked") and key not in target]:
        del state[key]


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


def _shape_message(model: Network, weights: Weights, key: str, got: Tensor, wanted: Tensor) -> str:
    name = model.config["name"]
    message = f"weights of {weights.title} do not fit {name}: {key} is {_shape(got)}, in the network {_shape(wanted)}"
    options = se_options(weights.state)
    if ".se.fc" in key and options:
        wants = ", ".join(f"{option}={value!r}" for option, value in options.items())
        message += f"; their SE blocks have other hidden widths: create_model({name!r}, {wants})"
    return message


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def se_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `create_model` for SE blocks as wide as those of a state dict; {} for the defaults, or if none do."""
    layers = [tensor for key, tensor in state.items() if key.endswith(".se.fc1.weight") and tensor.dim() > 1]
    widths = {tensor.shape[1]: tensor.shape[0] for tensor in layers}
    if not widths:
        return {}
    widest = max(widths)
    candidates: list[dict[str, Any]] = [{}, {"rd_divisor": 8}, {"rd_ratio": widths[widest] / widest}]
    if len(widths) > 1:
        candidates.insert(1, {"rd_channels": widths[widest]})
    for options in candidates:
        of_se = SEOptions(**options)
        if all(of_se.hidden(channels) == hidden for channels, hidden in widths.items()):
            return options
    return {}


def _for_channels(preprocessing: Preprocessing, in_chans: int) -> Preprocessing:
    """Mean and deviation for images of another number of channels: their averages."""
    if in_chans == len(preprocessing.mean):
        return preprocessing
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=(mean,) * in_chans, std=(std,) * in_chans)
