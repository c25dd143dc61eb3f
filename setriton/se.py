"""The Squeeze-and-Excitation block as a module: parameters in the stock layout, the fused function as its forward."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import check_choice, check_ratio, check_size
from .functional import squeeze_excite
from .reference import ACTS, GATES
from .stock import Conv2d, count_entries, is_stock, must_call, report_calls, weight_and_bias, why_called

# Classes of torch and timm by name: timm has its own of some, such as Sigmoid and HardSigmoid.
_ACT_CLASSES = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu", "GELU": "gelu", "Identity": "identity"}
_GATE_CLASSES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}


class SqueezeExcite(nn.Module):
    """The Squeeze-and-Excitation block, fused: reads and writes feature maps (N, C, H, W).

    Parameters are those of two 1x1 convolutions `fc1` (R, C, 1, 1) and `fc2` (C, R, 1, 1), the state dict of timm's
    `SEModule` and torchvision's `SqueezeExcitation`; pass the class to timm as ``block_args=dict(attn_layer=...)``.
    timm rounds R to a multiple of 8: where C / 16 is none (C = 64: 8 there, 4 here), give `rd_channels`.

    Args:
        channels: C, channels of the feature map.
        rd_ratio: hidden width R over C, rounded down, at least 1. The paper's r = 16 (section 6.1) is 1/16.
        rd_channels: R itself; overrides `rd_ratio`.
        bias: whether the two layers have biases, as in the authors' released networks.
        act: relu, silu, gelu, hardswish or identity.
        gate: sigmoid or hardsigmoid.
        device, dtype: of the parameters.

    Raises:
        TypeError: a width that is no int, a ratio that is no number.
        ValueError: a width below 1, a ratio of 0 or less, or an unknown `act` or `gate`.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("act", act, ACTS)
        check_choice("gate", gate, GATES)
        check_size("channels", channels)
        if rd_channels is None:
            check_ratio("rd_ratio", rd_ratio)
            rd_channels = max(1, int(channels * rd_ratio))
        check_size("rd_channels", rd_channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=bias, **factory)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=bias, **factory)
        self.act = act
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        if not must_call(x) and self.is_readable():
            return squeeze_excite(x, *self.weights(), act=self.act, gate=self.gate)
        report_calls(self, self.why_called(), x)
        act: Any = ACTS[self.act].function if isinstance(self.act, str) else self.act
        gate: Any = GATES[self.gate].function if isinstance(self.gate, str) else self.gate
        return x * gate(self.fc2(act(self.fc1(x.mean((2, 3), keepdim=True)))))

    def is_readable(self) -> bool:
        """Whether a fused forward may read the layers and functions rather than call them."""
        children = self._modules
        is_named = type(self.act) is str and type(self.gate) is str
        return is_named and is_pointwise(children["fc1"]) and is_pointwise(children["fc2"])

    def why_called(self) -> dict[str, str | None]:
        """Of what is not readable, the reason."""
        return {
            "fc1": why_convolved(self.fc1),
            "fc2": why_convolved(self.fc2),
            "act": None if isinstance(self.act, str) else f"{self.act!r} in place of a name",
            "gate": None if isinstance(self.gate, str) else f"{self.gate!r} in place of a name",
        }

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights and biases of the two layers, if `is_readable`."""
        children: Any = self._modules
        return *weight_and_bias(children["fc1"]), *weight_and_bias(children["fc2"])

    def extra_repr(self) -> str:
        return f"act={self.act}, gate={self.gate}"

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """`module` itself if it is one, else a SqueezeExcite around the layers of a stock SE block.

        Args:
            module: timm's `SEModule` or torchvision's `SqueezeExcitation`; `fc1` and `fc2` are taken over, not copied.

        Raises:
            TypeError: `module` is neither.
            ValueError: it has an option that the fused block has not: a normalization, a max pool, other functions.
        """
        if isinstance(module, cls):
            return module
        name, children = type(module).__name__, dict(module.named_children())
        fc1, fc2 = children.get("fc1"), children.get("fc2")
        act = children.get("act", children.get("activation"))
        gate = children.get("gate", children.get("scale_activation"))
        if not isinstance(fc1, Conv2d) or not isinstance(fc2, Conv2d) or act is None or gate is None:
            raise TypeError(f"module must be an SE block with convolutions fc1 and fc2, an act and a gate; got {name}")
        if not isinstance(children.get("bn", nn.Identity()), nn.Identity) or getattr(module, "add_maxpool", False):
            raise ValueError(f"module must have no normalization and no max pool; got {module}")
        for fc in (fc1, fc2):
            if (fc.kernel_size, fc.stride, fc.padding, fc.groups) != ((1, 1), (1, 1), (0, 0), 1):
                raise ValueError(f"module must have 1x1 convolutions of one group; got {fc}")
        ours = cls(
            fc1.in_channels,
            rd_channels=fc1.out_channels,
            act=_function_name("act", act, _ACT_CLASSES),
            gate=_function_name("gate", gate, _GATE_CLASSES),
            device="meta",
        )
        ours.fc1, ours.fc2 = fc1, fc2
        return ours.train(module.training)


count_entries(SqueezeExcite(1, device="meta"))


def is_pointwise(layer: Any) -> bool:
    """Whether a layer is a stock convolution of 1x1 windows and one group: a product with its weight."""
    return is_stock(layer, Conv2d) and _is_product(layer)


def why_convolved(layer: Any) -> str | None:
    """Why a layer is not `is_pointwise`; None if it is."""
    reason = why_called(layer, Conv2d)
    return reason or (None if _is_product(layer) else f"{layer!r} in place of a 1x1 convolution")


def _is_product(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.stride == (1, 1) and conv.groups == 1


def _function_name(argument: str, module: nn.Module, names: dict[str, str]) -> str:
    kind = type(module)
    name = names.get(kind.__name__) if kind.__module__.split(".")[0] in ("torch", "timm") else None
    if name is None or getattr(module, "approximate", "none") != "none":
        raise ValueError(f"{argument} must be one of {', '.join(names)}; got {module}")
    return name
