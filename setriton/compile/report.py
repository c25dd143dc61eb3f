"""What was found in compiled graphs: `setriton.compile_report()`."""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .block import Block
from .spelling import fake


@dataclass(frozen=True)
class Match:
    """One SE block, or what looks like one.

    Attributes:
        kind: "se", "bn_se" or "bn_act_se", then "+add" and "+relu" where the residual and the ReLU belong to it.
        module: path of the module that the block is written in; "" where it is in none.
        source: file and line.
        shape: (N, C, H, W) of the map; a size that may change is a symbol's name.
        hidden: R, the width of the excitation's hidden layer; None where it is unknown.
        training: whether BN takes the batch's statistics.
        differentiated: whether there will be a backward pass.
        reason: why the block was left alone; None where it was replaced.
        note: why a replaced block's tail ends where it does, where more might have belonged to it.
        error: the largest relative difference between the block and its replacement, both run in float64; None where
            that was not asked for.
    """

    kind: str
    module: str
    source: str
    shape: tuple[int | str, ...]
    hidden: int | None = None
    training: bool = False
    differentiated: bool = False
    reason: str | None = None
    note: str | None = None
    error: float | None = None

    @property
    def where(self) -> str:
        """The module's path, or the source line."""
        return self.module or self.source


class CompileReport(list[Match]):
    """Matches in the order in which they were found; its `str` is a table."""

    @property
    def replaced(self) -> list[Match]:
        """Those that were replaced."""
        return [match for match in self if match.reason is None]

    @property
    def left(self) -> list[Match]:
        """Those that were left alone."""
        return [match for match in self if match.reason is not None]

    def __str__(self) -> str:
        if not self:
            return "no SE blocks were found"
        rows = [("block", "where", "map", "R", "")]
        for match in self:
            checked = "" if match.error is None else f"error {match.error:.0e}"
            told = f"left alone: {match.reason}" if match.reason else "; ".join(filter(None, [checked, match.note]))
            hidden = "" if match.hidden is None else str(match.hidden)
            rows.append((match.kind, match.where, "x".join(map(str, match.shape)), hidden, told))
        head = f"{len(self.replaced)} of {len(self)} SE blocks replaced"
        return "\n".join([head, *table(rows)])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


_found = CompileReport()
_lock = threading.Lock()


def compile_report() -> CompileReport:
    """What was found in the graphs that were compiled since the last `reset_compile_report`.

    A graph that is compiled again, for other shapes or in another mode, adds its blocks again.
    """
    with _lock:
        return CompileReport(_found)


def reset_compile_report() -> None:
    """Forget what was found."""
    with _lock:
        _found.clear()


def record(matches: Iterable[Match]) -> None:
    """Add to the report."""
    with _lock:
        _found.extend(matches)


def described(block: Block, error: float | None = None) -> Match:
    """A block in words and numbers, which outlive its graph."""
    tensor, result, excitation = fake(block.x), fake(block.output), block.excitation
    return Match(
        kind=block.kind,
        module=_module_path(block.product),
        source=_source(block.product),
        shape=() if tensor is None else tuple(size if isinstance(size, int) else str(size) for size in tensor.shape),
        hidden=None if excitation is None else int(excitation.fc1.outputs),
        training=block.bn is not None and block.bn.training,
        differentiated=result is not None and result.requires_grad,
        reason=block.reason,
        note=block.note,
        error=error,
    )


def _module_path(node: Node) -> str:
    """The path of the innermost module a node was written in: layer1.0.se of L['self']._modules['layer1']..."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", path).replace("._modules.", ".")
    return path.removeprefix("L.self").removeprefix(".").removeprefix("L.")


def _source(node: Node) -> str:
    """file:line of the last line of Python that a node comes from."""
    found = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(found[-1]) if found else ""
