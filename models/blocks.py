"""What every residual network here is made of: convolutions, blocks with SE in one of its places, initialisation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from setriton.checks import check_choice, check_rate
from setriton.functional import bn_squeeze_excite, bn_squeeze_excite_forked
from setriton.modules import SqueezeExcite
from setriton.reference import accumulate_dtype
from setriton.stock import is_stock, is_traced, leaf, must_call, report_calls, why_called

from .se import ACTS, SEOptions, StockSqueezeExcite, bn_se
from .stages import Forked, only_reads

POSITIONS = ("standard", "pre", "post", "identity", "3x3")
STAGES = (2, 3, 4, 5)


def conv3x3(in_chans: int, out_chans: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)


@dataclass(frozen=True)
class BlockSEOptions(SEOptions):
    """SE blocks in residual blocks, and where (arXiv 1709.01507, sections 6.4 and 6.5).

    Raises:
        ValueError: also for a place or a stage that does not exist.
    """

    se_position: Literal["standard", "pre", "post", "identity", "3x3"] = "standard"
    """standard: on the residual branch, after its last BN. pre: before the branch, on the block's input; the shortcut
    reads the input as it was. post: after the sum and ReLU. identity: on the shortcut, behind its projection. 3x3:
    after the 3x3 convolution's BN, before its ReLU. The shortcut of pre, the projection of identity and the BN and ReLU
    of 3x3 are choices made here: the paper does not say."""
    se_stages: Sequence[int] = STAGES
    """The stages that have SE, as the paper counts them: 2 to 5, the first convolution being stage 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("se_position", self.se_position, POSITIONS)
        stages = self.se_stages
        if not isinstance(stages, Collection) or not stages or not all(stage in STAGES for stage in stages):
            raise ValueError(f"se_stages must be some of {STAGES}; got {stages!r}")


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, an image's map becomes 0 with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) and (call := leaf(self, x)) is not None:
            return call
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def passes(drop_path: nn.Module) -> bool:
    """Whether a call of `drop_path` would give its argument back."""
    return is_stock(drop_path, DropPath) and (drop_path.rate == 0 or not drop_path.training)


class _Apart(torch.autograd.Function):
    """The same memory with an axis of 1 in front, which autograd does not know as a view.

    Inductor returns two outputs of one layout and memory as one tensor: their gradients would be summed outside of the
    compiled block, and one of them read as zeros inside. The extra axis keeps them apart.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.unsqueeze(0).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.squeeze(0)


def kept_apart(y: Tensor, y_skip: Tensor) -> tuple[Tensor, Tensor]:
    """The two results of a forked tail as a block gives them; the reader of the second takes it as ``.view_as(y)``."""
    return y, _Apart.apply(y_skip) if torch.compiler.is_compiling() else y_skip


def may_fuse(se: Any, owner: nn.Module, x: Tensor, **others: tuple[Any, type[nn.Module]]) -> TypeGuard[SqueezeExcite]:
    """Whether `affine_se` may read `se` of a block; a message says why not, if `se` was made to be fused.

    Args:
        se: the SE block, or None.
        owner: the block around it.
        x: what goes in.
        others: layers that are read as well, and the classes that they should be of.
    """
    if se is None or isinstance(se, StockSqueezeExcite):
        return False
    is_readable = (
        is_stock(se, SqueezeExcite) and se.is_readable() and all(is_stock(*other) for other in others.values())
    )
    if is_readable and not must_call(x):
        return True
    reasons = {name: why_called(*other) for name, other in (others | {"se": (se, SqueezeExcite)}).items()}
    if isinstance(se, SqueezeExcite):
        reasons |= {f"se.{name}": reason for name, reason in se.why_called().items()}
    report_calls(owner, reasons, x)
    return False


def affine_se(
    se: SqueezeExcite,
    x: Tensor,
    shortcut: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    w1_scale: float = 1.0,
    out_act: str = "identity",
    fork: bool = False,
) -> Forked:
    """``out_act(se(weight * x + bias) + shortcut)``, without BN before SE: the fused tail with one that is affine.

    Args:
        se: the SE block, readable.
        x, shortcut: feature maps (N, C, H, W).
        weight, bias: (C); None for 1 and 0.
        w1_scale: what the first weight of `se` is divided by.
        out_act: identity or relu.
        fork: give the pair that the next block takes (see `ResidualBlock.forward`).
    """
    # Made here, not kept: as buffers they would be lost in a network built on the meta device. Variance 0 and eps 1,
    # not the reverse: a kernel's lanes past the last channel read 0 as the variance. Two, for Dynamo takes none twice.
    mean, var = (x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    w1, *others = se.weights()
    if w1_scale != 1:
        # In this dtype, lest the division rounds a weight of lower precision once more.
        w1 = w1.to(accumulate_dtype(x.dtype)) / w1_scale
    options: dict[str, Any] = {"residual": shortcut, "training": False, "eps": 1.0, "act": se.act, "gate": se.gate}
    tensors: tuple[Any, ...] = (x, weight, bias, mean, var, w1, *others)
    if not fork:
        return bn_squeeze_excite(*tensors, **options, out_act=out_act)
    y, y_skip = bn_squeeze_excite_forked(*tensors, **options, out_act=out_act)
    return kept_apart(y, y_skip)


class ResidualBlock(nn.Module):
    """A block whose branch ends ``BN -> SE -> + shortcut -> ReLU``, one fused call; a plain network leaves the SE out.

    The shortcut is `downsample(x)` where the shape changes, else x itself.

    Args:
        in_chans, mid_chans, out_chans: of the block, its 3x3 convolution's output, and its output.
        downsample: projects the shortcut, or None.
        se: how and where its SE block is, at the end of the branch unless these are `BlockSEOptions`; or None.
        bn_act: what stands between the last BN and SE: identity or relu.
        drop_path: probability that an image skips the branch in training.
    """

    takes_forks = True
    conv1: nn.Module

    def __init__(
        self,
        in_chans: int,
        mid_chans: int,
        out_chans: int,
        *,
        downsample: nn.Module | None = None,
        se: SEOptions | None = None,
        bn_act: str = "identity",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.se_position = se.se_position if isinstance(se, BlockSEOptions) else "standard"
        width = {"pre": in_chans, "3x3": mid_chans}.get(self.se_position, out_chans)
        self.se = None if se is None else se.make(width)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path)
        self.bn_act = bn_act

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The BN at the end of the residual branch."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, up to `last_bn`."""
        raise NotImplementedError

    def only_reads(self) -> bool:
        """Whether the block leaves its input as it is: only then may its shortcut be another tensor than x."""
        return only_reads(self.conv1) and only_reads(self.downsample)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:
        """The block's output; with `fork` a pair, x and skip of the next block, whose shortcut reads `skip`.

        A forked output has two gradients, which the fused tail sums as it reads them: a pass over the map more, where
        a sum of its own takes three. Where the block does not end in a fused tail `skip` is None.
        """
        if is_traced(x):
            skip, fork = None, False
        se, position = self.se, self.se_position
        shortcut = x if skip is None or not self.only_reads() else skip.view_as(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if se is not None and position == "pre":
            x = se(x)
        elif se is not None and position == "identity":
            shortcut = se(shortcut)
        y = self.branch(x)
        if se is None or position != "standard":
            y = self.relu(self.drop_path(ACTS[self.bn_act](self.last_bn(y))) + shortcut)
            y = se(y) if se is not None and position == "post" else y
        elif passes(self.drop_path) and not is_traced(x):
            bn = self.last_bn
            y, y_skip = bn_se(self, bn, se, y, shortcut, bn_act=self.bn_act, out_act=self.relu, fork=fork)
            if y_skip is not None:
                return kept_apart(y, y_skip)
        else:
            y = self.relu(self.drop_path(bn_se(self, self.last_bn, se, y, bn_act=self.bn_act)[0]) + shortcut)
        return (y, None) if fork else y


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the stride is in the first."""

    def __init__(
        self, in_chans: int, out_chans: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1), **options: Any
    ) -> None:
        super().__init__(in_chans, out_chans, out_chans, **options)
        if self.se_position == "3x3":
            raise ValueError("se_position must not be 3x3 in basic blocks, which have two such convolutions")
        self.conv1 = conv3x3(in_chans, out_chans, stride, dilations[0])
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = conv3x3(out_chans, out_chans, 1, dilations[1])
        self.bn2 = nn.BatchNorm2d(out_chans)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class Bottleneck(ResidualBlock):
    """1x1, grouped 3x3 and 1x1 convolutions; the stride is in the first 1x1 (`stride_in_1x1`) or in the 3x3."""

    def __init__(
        self,
        in_chans: int,
        reduced: int,
        mid_chans: int,
        out_chans: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        stride_in_1x1: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_chans, mid_chans, out_chans, **options)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_chans, reduced, stride_1x1)
        self.bn1 = nn.BatchNorm2d(reduced)
        self.conv2 = conv3x3(reduced, mid_chans, stride_3x3, dilation, groups)
        self.bn2 = nn.BatchNorm2d(mid_chans)
        self.conv3 = conv1x1(mid_chans, out_chans)
        self.bn3 = nn.BatchNorm2d(out_chans)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv2(self.relu(self.bn1(self.conv1(x))))
        if self.se is not None and self.se_position == "3x3":
            return self.conv3(bn_se(self, self.bn2, self.se, x, out_act=self.relu)[0])
        return self.conv3(self.relu(self.bn2(x)))


def init_weights(model: nn.Module, zero_init_last: bool = False) -> None:
    """He et al. (arXiv 1502.01852) for convolutions, fan out; each block's last BN starts at 0 if `zero_init_last`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif zero_init_last and isinstance(module, ResidualBlock):
            nn.init.zeros_(module.last_bn.weight)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that grow linearly over `depth` blocks, from 0 to `rate`.

    Raises:
        TypeError: `rate` is no number.
        ValueError: it is not in [0, 1).
    """
    check_rate("drop_path_rate", rate)
    return [rate * index / max(1, depth - 1) for index in range(depth)]
