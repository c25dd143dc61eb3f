"""The modules: parameters in the stock layout, the fused functions as their forward."""

from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from .checks import check_choice, check_ratio, check_size
from .functional import bn_squeeze_excite, bn_squeeze_excite_forked, squeeze_excite
from .reference import ACTS, BN_ACTS, GATES, OUT_ACTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Symbolic tracing sees one call where these stand, and not the checks of arguments inside.
torch.fx.wrap("squeeze_excite")
torch.fx.wrap("bn_squeeze_excite")
torch.fx.wrap("bn_squeeze_excite_forked")

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
        fc1, fc2 = self.fc1, self.fc2
        return squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act=self.act, gate=self.gate)

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
        if not isinstance(fc1, nn.Conv2d) or not isinstance(fc2, nn.Conv2d) or act is None or gate is None:
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


class BatchNormSqueezeExcite(nn.Module):
    """The tail of a block, fused: ``out_act(SE(bn_act(BN(x))) + residual)``, with BN and SE as children `bn` and `se`.

    BN keeps its running statistics exactly as `nn.BatchNorm2d` does; `nn.SyncBatchNorm.convert_sync_batchnorm` works
    on it too, and then the statistics are those of all ranks. Forward hooks of the two children are not called.

    Args:
        channels: C, channels of the feature map.
        rd_ratio, rd_channels, bias, act, gate: of `SqueezeExcite`.
        eps, momentum, affine, track_running_stats: of `nn.BatchNorm2d`.
        bn_act: what stands between BN and SE: identity, relu, silu or hardswish.
        out_act: the last step, after the residual is added: identity or relu.
        device, dtype: of the parameters.

    Raises:
        TypeError: a width that is no int.
        ValueError: a width below 1, or an unknown function.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        bn_act: str = "identity",
        out_act: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("bn_act", bn_act, BN_ACTS)
        check_choice("out_act", out_act, OUT_ACTS)
        check_size("channels", channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(channels, eps, momentum, affine, track_running_stats, **factory)
        self.se = SqueezeExcite(channels, rd_ratio, rd_channels, bias, act, gate, **factory)
        self.bn_act = bn_act
        self.out_act = out_act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return bn_se_forward(self.bn, self.se, x, residual, bn_act=self.bn_act, out_act=self.out_act)

    def extra_repr(self) -> str:
        return f"bn_act={self.bn_act}, out_act={self.out_act}"

    @classmethod
    def from_pair(cls, bn: nn.Module, se: nn.Module, *, bn_act: str = "identity", out_act: str = "identity") -> Self:
        """Both modules as one. They are taken over, not copied: parameters, statistics, modes and keys stay theirs.

        Args:
            bn: nn.BatchNorm2d or nn.SyncBatchNorm.
            se: what `SqueezeExcite.from_module` takes, for as many channels.
            bn_act, out_act: as above.

        Raises:
            TypeError: `bn` or `se` is of another kind.
            ValueError: widths differ, or an option has no fused form.
        """
        # A subclass with a forward of its own, such as timm's BatchNormAct2d, computes something else.
        is_stock = type(bn).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
        if not isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm) or not is_stock:
            raise TypeError(f"bn must be an nn.BatchNorm2d or nn.SyncBatchNorm; got {type(bn).__name__}")
        se = SqueezeExcite.from_module(se)
        if bn.num_features != se.fc1.in_channels:
            raise ValueError(f"se must have the {bn.num_features} channels of bn; got {se.fc1.in_channels}")
        tail = cls(1, bn_act=bn_act, out_act=out_act, device="meta")
        tail.bn, tail.se = bn, se  # type: ignore[assignment]  # SyncBatchNorm is no BatchNorm2d, and has its attributes
        tail.training = bn.training
        return tail

    def to_pair(self) -> tuple[nn.BatchNorm2d, SqueezeExcite]:
        """The two modules, to be called one after the other again."""
        return self.bn, self.se


@overload
def bn_se_forward(
    bn: nn.BatchNorm2d,
    se: SqueezeExcite,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: str = "identity",
    out_act: str = "identity",
    fork: Literal[False] = False,
) -> Tensor: ...
@overload
def bn_se_forward(
    bn: nn.BatchNorm2d,
    se: SqueezeExcite,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: str = "identity",
    out_act: str = "identity",
    fork: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def bn_se_forward(
    bn: nn.BatchNorm2d,
    se: SqueezeExcite,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: str = "identity",
    out_act: str = "identity",
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``out_act(se(bn_act(bn(x))) + residual)`` in one call, with nn.BatchNorm2d's bookkeeping in `bn`.

    Args:
        bn: nn.BatchNorm2d or nn.SyncBatchNorm; in training mode it takes the batch's statistics and keeps account.
        se: the SE block.
        x, residual: feature maps (N, C, H, W).
        bn_act, out_act: of `bn_squeeze_excite`.
        fork: give the result twice, as `bn_squeeze_excite_forked` does.
    """
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    uses_buffers = not bn.training or bn.track_running_stats
    function = bn_squeeze_excite_forked if fork else bn_squeeze_excite
    return function(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean if uses_buffers else None,
        bn.running_var if uses_buffers else None,
        se.fc1.weight,
        se.fc1.bias,
        se.fc2.weight,
        se.fc2.bias,
        residual=residual,
        training=bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum=momentum,
        eps=bn.eps,
        bn_act=bn_act,
        act=se.act,
        gate=se.gate,
        out_act=out_act,
        process_group=_process_group(bn),
    )


def _process_group(bn: nn.Module) -> "ProcessGroup | None":
    """Whose ranks share statistics: nn.SyncBatchNorm's group, by default all ranks, in training mode."""
    import torch.distributed as dist

    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return None
    return bn.process_group or dist.group.WORLD


def _function_name(argument: str, module: nn.Module, names: dict[str, str]) -> str:
    kind = type(module)
    name = names.get(kind.__name__) if kind.__module__.split(".")[0] in ("torch", "timm") else None
    if name is None or getattr(module, "approximate", "none") != "none":
        raise ValueError(f"{argument} must be one of {', '.join(names)}; got {module}")
    return name
