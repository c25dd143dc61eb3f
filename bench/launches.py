"""Operations whose launches are compiled for `setriton bench resources`: each kernel in each of its forms, and those of
real networks' SE blocks."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch

from setriton.kernels.backward import Saved, backward
from setriton.kernels.cases import H200, Case, kind_of, pick
from setriton.kernels.config import ForwardConfig, SweepConfig
from setriton.kernels.forward import BatchNorm, Excitation, forward

from .cases import EFFICIENTNET, MOBILENETV3, RESNET, Shape


@dataclass(frozen=True)
class Form:
    """What an operation does, and how many launches its forward pass is cut into."""

    has_bn: bool = True
    bn_act: str = "identity"
    residual: bool = False
    training: bool = True
    launches: int = 3
    act: str = "relu"
    gate: str = "sigmoid"


FORMS = {
    "SE": Form(has_bn=False, launches=1),
    "SE, y apart": Form(has_bn=False, launches=2),
    "tail, training": Form(residual=True),
    "tail, training, in one launch": Form(residual=True, launches=1),
    "tail, evaluation": Form(residual=True, training=False, launches=1),
    "BN-SiLU-SE, training": Form(bn_act="silu"),
    "BN-SiLU-SE, evaluation": Form(bn_act="silu", training=False, launches=1),
}


# Blocks of networks: their forms and maps. SENet-154 and SE-ResNet-152 have those of SE-ResNet-50.
_RELU = Form(bn_act="relu", gate="hardsigmoid")
_HARDSWISH = Form(bn_act="hardswish", gate="hardsigmoid")
_SILU = Form(bn_act="silu", act="silu")
# `bench ops` leaves out the maps behind EfficientNet's strides.
_EFFICIENTNET = (*EFFICIENTNET, Shape(144, 28, 6), Shape(240, 14, 10), Shape(672, 7, 28))
NETWORKS: dict[str, list[tuple[Form, tuple[Shape, ...]]]] = {
    "SE-ResNet-50, SENet-154": [(FORMS[name], RESNET) for name in ("tail, training", "tail, evaluation", "SE")],
    "EfficientNet-B0": [
        (_SILU, _EFFICIENTNET),
        (dataclasses.replace(_SILU, training=False, launches=1), _EFFICIENTNET),
    ],
    "MobileNetV3-large": [
        (dataclasses.replace(form, training=training, launches=3 if training else 1), shapes)
        for training in (True, False)
        for form, shapes in ((_RELU, MOBILENETV3[:2]), (_HARDSWISH, MOBILENETV3[2:]))
    ],
}
# Tiles of the excitation's products are of 16, 32 and 64 images.
BATCHES = (1, 32, 128)


def step(
    form: Form,
    shape: tuple[int, int, int, int] = (32, 256, 28, 28),
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
    hidden: int | None = None,
    forward_as: ForwardConfig | None = None,
    backward_as: SweepConfig | None = None,
) -> Callable[[], None]:
    """The launches of a forward pass and, in training and for SE alone, of a backward pass; for `resources`.

    Args:
        form: the operation.
        shape: of the map; no memory is allocated, nothing is computed.
        dtype: of the map; the parameters are float32.
        channels_last: its layout, or contiguous.
        hidden: width of the excitation; None is a sixteenth of the channels.
        forward_as, backward_as: configurations; None picks an H200's, but for the launches of the form.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    c = shape[1]
    r = hidden or max(1, c // 16)
    w1, b1, w2, b2, vector = (torch.empty(s, device="meta") for s in ((r, c), (r,), (c, r), (c,), (c,)))
    excitation = Excitation(w1, b1, w2, b2, form.act, form.gate)
    bn = BatchNorm(vector, vector, vector, vector, 1e-5, form.bn_act) if form.has_bn else None
    residual = x if form.residual else None
    has_backward = form.training

    def picked(is_forward: bool) -> SweepConfig:
        kind = kind_of(form.bn_act if form.has_bn else None, form.training or not is_forward, is_forward)
        name = str(dtype).removeprefix("torch.")
        return pick(Case.of(kind, shape, name, "channels_last" if channels_last else "contiguous"), H200)

    forward_config = forward_as or dataclasses.replace(cast(ForwardConfig, picked(True)), launches=form.launches)
    backward_config = backward_as or picked(False)

    def run() -> None:
        relu = "relu" if form.residual else "identity"
        y = forward(
            x, excitation, bn, residual, relu, form.residual and has_backward, form.training, 0.1,
            config=forward_config,
        )  # fmt: skip
        if has_backward:
            bits = y.bits if form.residual else None
            saved = Saved(x, bits, vector, vector, y.squeezed, y.z1, y.e)
            backward(x, saved, excitation, bn, residual, form.residual, form.has_bn, config=backward_config)

    return run


def steps_of(
    network: str,
    batches: tuple[int, ...] = BATCHES,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> Iterator[Callable[[], None]]:
    """`step` of every block of a network in `NETWORKS`, in both layouts.

    Raises:
        ValueError: no such network.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {'; '.join(NETWORKS)}; got {network!r}")
    for form, shapes in NETWORKS[network]:
        for n, dtype, channels_last, map_ in itertools.product(batches, dtypes, (True, False), shapes):
            yield step(form, (n, map_.channels, map_.size, map_.size), dtype, channels_last, map_.reduced)
