"""Stages: blocks one after the other, recomputed in the backward pass if asked, forked where they are residual."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Forked = Tensor | tuple[Tensor, Tensor | None]


class Stage(nn.Sequential):
    """Blocks of one resolution: what is compiled, sharded and checkpointed block by block."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = self.call(block, x)
        return x

    def call(self, block: nn.Module, *args: Any, **options: Any) -> Any:
        """The block's output; in training, its inputs alone are kept if `grad_checkpointing`."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*args, **options)
        # Of the contexts a compiler takes, none counts statistics: it traces a block once.
        context: dict[str, Any] = {}
        if not torch.compiler.is_compiling():
            context["context_fn"] = _statistics_counted_once(block)
        return checkpoint(block, *args, use_reentrant=False, **context, **options)


class ForkedStage(Stage):
    """Residual blocks, each output handed on twice for the two readers it has in the next block."""

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Forked:  # type: ignore[override]
        """The last block's output; with `fork` a pair, x and skip of the next block (see `ResidualBlock.forward`)."""
        *blocks, last = self
        for block in blocks:
            x, skip = self.call(block, x, skip, fork=True)
        return self.call(last, x, skip, fork=fork)


def _statistics_counted_once(block: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Contexts of the forward pass and of its repetition, which leaves running statistics alone."""
    return lambda: (contextlib.nullcontext(), _unmoved_statistics(block))


@contextlib.contextmanager
def _unmoved_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) and m.training]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
