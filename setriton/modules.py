"""The tail of a block as a module: BN, SE and what stands around them, fused where the layers may be read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from .checks import check_choice, check_size
from .functional import bn_squeeze_excite, bn_squeeze_excite_forked
from .reference import ACTS, BN_ACTS, OUT_ACTS
from .se import SqueezeExcite as SqueezeExcite
from .stock import BatchNorm2d, ReLU, SyncBatchNorm, is_stock, must_call, report_calls, weight_and_bias, why_called

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Step = str | Callable[[Tensor], Tensor]
"""An element-wise function: a name of `setriton.reference.ACTS`, or a module or function."""


class BatchNormSqueezeExcite(nn.Module):
    """The tail of a block, fused: ``out_act(SE(bn_act(BN(x))) + residual)``, with BN and SE as children `bn` and `se`.

    BN keeps its running statistics exactly as `nn.BatchNorm2d` does; `nn.SyncBatchNorm.convert_sync_batchnorm` works
    on it too, and then the statistics are those of all ranks. Where a child is no stock layer (hooks, adapters, another
    class), the children are called one after the other, and a message says so once.

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
        return tail(self, self.bn, self.se, x, residual, bn_act=self.bn_act, out_act=self.out_act)[0]

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
        is_stock = type(bn).forward in (BatchNorm2d.forward, SyncBatchNorm.forward)
        if not isinstance(bn, BatchNorm2d | SyncBatchNorm) or not is_stock:
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


def tail(
    owner: nn.Module,
    bn: Any,
    se: Any,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: Step = "identity",
    out_act: Step = "identity",
    fork: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``out_act(se(bn_act(bn(x))) + residual)`` of a module's layers, in one call where they may be read.

    Args:
        owner: the module whose forward it is, for the message where they may not.
        bn, se: a normalization and an SE block; any modules.
        x, residual: feature maps (N, C, H, W).
        bn_act, out_act: names, or layers of `owner`.
        fork: give the result twice, as `bn_squeeze_excite_forked` does; None in the second place where it is not fused.
    """
    bn_act_name, out_act_name = _name(bn_act), _name(out_act)
    is_readable = is_stock(bn, _norm_class(bn)) and is_stock(se, SqueezeExcite) and se.is_readable()
    if is_readable and not must_call(x) and bn_act_name is not None and out_act_name is not None:
        if fork:
            return bn_se_forward(bn, se, x, residual, bn_act=bn_act_name, out_act=out_act_name, fork=True)
        return bn_se_forward(bn, se, x, residual, bn_act=bn_act_name, out_act=out_act_name), None
    _report(owner, bn, se, x, {"bn_act": bn_act, "out_act": out_act})
    return called_tail(bn, se, x, residual, bn_act=bn_act, out_act=out_act), None


def called_tail(
    bn: Any,
    se: Any,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    bn_act: Step = "identity",
    out_act: Step = "identity",
) -> Tensor:
    """`tail` without the fused call: one layer after the other."""
    y = se(_function(bn_act, x)(bn(x)))
    return _function(out_act, x)(y if residual is None else y + residual)


def _name(step: Step) -> str | None:
    """What a fused forward calls a function; None where it has to be called."""
    if type(step) is str:
        return step
    return "relu" if is_stock(step, ReLU) else None


def _function(step: Step, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A stock layer too is a function, not in place: a hook on the layer before it may be looking at its result."""
    if not isinstance(step, str) and (must_call(x) or _name(step) is None):
        return step
    return ACTS[_name(step) or ""].function


def _norm_class(bn: Any) -> type[nn.Module]:
    return SyncBatchNorm if isinstance(bn, SyncBatchNorm) else BatchNorm2d


def _report(owner: nn.Module, bn: Any, se: Any, x: Tensor, steps: dict[str, Step]) -> None:
    reasons = {"bn": why_called(bn, _norm_class(bn)), "se": why_called(se, SqueezeExcite)}
    if isinstance(se, SqueezeExcite):
        reasons |= {f"se.{name}": reason for name, reason in se.why_called().items()}
    reasons |= {name: why_called(step, ReLU) for name, step in steps.items() if _name(step) is None}
    report_calls(owner, reasons, x)


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
    running_mean, running_var, count = _statistics(bn)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and count is not None:
        count.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(count)
    uses_buffers = not bn.training or bn.track_running_stats
    function = bn_squeeze_excite_forked if fork else bn_squeeze_excite
    return function(
        x,
        *weight_and_bias(bn),
        running_mean if uses_buffers else None,
        running_var if uses_buffers else None,
        *se.weights(),
        residual=residual,
        training=bn.training or (running_mean is None and running_var is None),
        momentum=momentum,
        eps=bn.eps,
        bn_act=bn_act,
        act=se.act,
        gate=se.gate,
        out_act=out_act,
        process_group=_process_group(bn),
    )


def _statistics(bn: nn.Module) -> Any:
    names, own = ("running_mean", "running_var", "num_batches_tracked"), bn._buffers
    return (own[name] if name in own else getattr(bn, name) for name in names)


def _process_group(bn: nn.Module) -> "ProcessGroup | None":
    """Whose ranks share statistics: nn.SyncBatchNorm's group, by default all ranks, in training mode."""
    import torch.distributed as dist

    if not isinstance(bn, SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return None
    return bn.process_group or dist.group.WORLD
