"""Operations whose launches are compiled for `setriton bench resources`: each kernel in each of its forms."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from setriton.kernels.backward import Saved, backward
from setriton.kernels.config import ForwardConfig, SweepConfig, backward_config, forward_config
from setriton.kernels.forward import BatchNorm, Excitation, forward

# Of an H100, for which the groups of evaluation are cut; the code is the same for any other.
L2_BYTES = 50 << 20


@dataclass(frozen=True)
class Form:
    """What an operation does, and how many launches its forward pass is cut into."""

    has_bn: bool = True
    bn_act: str = "identity"
    residual: bool = False
    training: bool = True
    launches: int = 3


FORMS = {
    "SE": Form(has_bn=False, launches=1),
    "SE, y apart": Form(has_bn=False, launches=2),
    "tail, training": Form(residual=True),
    "tail, training, in one launch": Form(residual=True, launches=1),
    "tail, evaluation": Form(residual=True, training=False, launches=1),
    "BN-SiLU-SE, training": Form(bn_act="silu"),
    "BN-SiLU-SE, evaluation": Form(bn_act="silu", training=False, launches=1),
}


def step(
    form: Form,
    shape: tuple[int, int, int, int] = (32, 256, 28, 28),
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
    forward_as: ForwardConfig | None = None,
    backward_as: SweepConfig | None = None,
) -> Callable[[], None]:
    """The launches of a forward pass and, in training and for SE alone, of a backward pass; for `resources`.

    Args:
        form: the operation.
        shape: of the map; memory for a few is allocated, nothing is computed.
        dtype: of the map; the parameters are float32.
        channels_last: its layout, or contiguous.
        forward_as, backward_as: configurations; None picks them as the launchers do, but for the launches of the form.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, memory_format=layout)
    c = shape[1]
    r = max(1, c // 16)
    w1, b1, w2, b2, vector = (torch.empty(s) for s in ((r, c), (r,), (c, r), (c,), (c,)))
    excitation = Excitation(w1, b1, w2, b2, "relu", "sigmoid")
    bn = BatchNorm(vector, vector, vector, vector, 1e-5, form.bn_act) if form.has_bn else None
    residual = x if form.residual else None
    has_backward = form.training
    chosen = forward_config(x, form.has_bn and form.training, L2_BYTES)
    picked = forward_as or dataclasses.replace(chosen, launches=form.launches)

    def run() -> None:
        relu = "relu" if form.residual else "identity"
        y = forward(
            x, excitation, bn, residual, relu, form.residual and has_backward, form.training, 0.1, config=picked
        )
        if has_backward:
            bits = y.bits if form.residual else None
            saved = Saved(x, bits, vector, vector, y.squeezed, y.z1, y.e)
            config = backward_as or backward_config(x, form.bn_act != "identity")
            backward(x, saved, excitation, bn, residual, form.residual, form.has_bn, config=config)

    return run
