"""The authors' Caffe blobs as a state dict (layers are named as in the prototxts of hujie-frank/SENet)."""

import json
import re
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor

from ..preprocessing import Preprocessing

# Means of the prototxts' headers, blue first; no deviation.
PREPROCESSING = Preprocessing(
    mean=(104 / 255, 117 / 255, 123 / 255), std=(1 / 255,) * 3, channels="bgr", interpolation="bilinear"
)

_LAYERS = {
    "1x1_reduce": "conv1",
    "3x3": "conv2",
    "1x1_increase": "conv3",
    "1x1_proj": "downsample.0",
    "1x1_down": "se.fc1",
    "1x1_up": "se.fc2",
}
_NORMS = {"1x1_reduce": "bn1", "3x3": "bn2", "1x1_increase": "bn3", "1x1_proj": "downsample.1"}


def _block(names: dict[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda match: f"layer{int(match[1]) - 1}.{int(match[2]) - 1}.{names[match[3]]}."


RENAMES = (
    (rf"^conv(\d)_(\d+)_({'|'.join(_LAYERS)})\.", _block(_LAYERS)),
    (rf"^conv(\d)_(\d+)_({'|'.join(_NORMS)})/bn\.", _block(_NORMS)),
    (r"^conv1/7x7_s2\.", "conv1."),
    (r"^conv1/7x7_s2/bn\.", "bn1."),
    (r"^conv1_1/3x3_s2\.", "conv1.0."),
    (r"^conv1_1/3x3_s2/bn\.", "conv1.1."),
    (r"^conv1_2/3x3\.", "conv1.3."),
    (r"^conv1_2/3x3/bn\.", "conv1.4."),
    (r"^conv1_3/3x3\.", "conv1.6."),
    (r"^conv1_3/3x3/bn\.", "bn1."),
    (r"^classifier\.", "fc."),
)


def to_state_dict(blobs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blobs "layer:index" as tensors "layer.weight", "layer.bias", "layer/bn.running_mean", ...

    Caffe's BatchNorm keeps sums and what to divide them by; its Scale layer has the affine part. The classifier's rows
    are put from the authors' order of classes into the one everybody else has.
    """
    layers: dict[str, dict[int, Tensor]] = {}
    for key, blob in blobs.items():
        if (match := re.fullmatch(r"(.+):(\d{1,4})", key)) is None:
            raise ValueError(f"blobs must be called layer:index; got {key[:200]!r}")
        layers.setdefault(match[1], {})[int(match[2])] = blob
    state: dict[str, Tensor] = {}
    for layer, found in layers.items():
        numbers, wanted = sorted(found), (3,) if layer.endswith("/bn") else (1, 2)
        if numbers != list(range(len(numbers))) or len(numbers) not in wanted:
            raise ValueError(f"layer {layer} must have {' or '.join(map(str, wanted))} blobs; it has numbers {numbers}")
        if layer.endswith("/bn"):
            state |= {f"{layer}.{name}": value for name, value in _statistics(layer, found).items()}
        else:
            names = ("weight", "bias")
            state |= {f"{layer.removesuffix('/scale')}.{names[index]}": blob for index, blob in found.items()}
    order = torch.tensor(authors_labels())
    for key in {"classifier.weight", "classifier.bias"} & state.keys():
        blob = state[key]
        if blob.dim() == 0:
            raise ValueError(f"{key} must have a row for each class; it is a number")
        rows = blob.reshape(-1, blob.shape[-1]) if key.endswith("weight") else blob.flatten()
        # Networks trained on other classes have an order of their own.
        state[key] = rows[order] if len(rows) == len(order) else rows
    return state


def _statistics(layer: str, blobs: dict[int, Tensor]) -> dict[str, Tensor]:
    """Mean and variance out of sums and what to divide them by."""
    mean, variance, factor = (blobs[index] for index in range(3))
    if factor.numel() != 1 or mean.shape != variance.shape:
        raise ValueError(
            f"layer {layer} must have sums of one shape and one factor; got shapes "
            f"{', '.join(str(tuple(blob.shape)) for blob in blobs.values())}"
        )
    factor = factor.reshape(())
    if not 0 < factor < torch.inf:
        raise ValueError(f"layer {layer} has no statistics: what its sums are divided by is {factor.item():g}")
    return {"running_mean": mean / factor, "running_var": variance / factor}


def authors_labels() -> list[int]:
    """For each ImageNet class in the usual order, that of the sorted WordNet ids, its number in the authors' order."""
    return json.loads(resources.files(__package__).joinpath("authors_labels.json").read_text())
