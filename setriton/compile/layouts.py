"""The replacement of a block run without data, before it is made: it must give a tensor of the same form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from .block import Block
from .effects import Effects, undisturbed
from .shapes import are_same, is_same
from .spelling import fake

_DENSE = (torch.channels_last, torch.contiguous_format)


def settle(block: Block, effects: Effects, replacement: Callable[[Graph, Block], Node]) -> str | None:
    """Choose the layout of the block's input, so that the result has the strides that it has as written.

    Args:
        block: its `layout` is set.
        effects: of its graph.
        replacement: puts a block's call at the end of a graph, before the block's output.

    Returns:
        Why there is none, or why the replacement cannot be run; None where it has the same form.
    """
    x, want = fake(block.x), fake(block.output)
    assert x is not None
    assert want is not None
    # Of other strides the operation makes a copy itself, in a layout that must not depend on what they are.
    is_dense = any(x.is_contiguous(memory_format=layout) for layout in _DENSE)
    for layout in (None, *_DENSE) if is_dense else _DENSE:
        block.layout = layout
        try:
            found = _result(block, effects, replacement)
        except Exception as error:
            return f"it cannot be replaced: {error}"
        if (found.dtype, found.device) != (want.dtype, want.device) or not are_same(found.shape, want.shape):
            return "its replacement has another shape or dtype"
        if _same_strides(found, want):
            return None
    return f"its result has strides {tuple(want.stride())}, which the replacement does not give"


def _result(block: Block, effects: Effects, replacement: Callable[[Graph, Block], Node]) -> Tensor:
    """Of the replacement alone, in a graph of its own."""
    graph = Graph()
    inputs = list(dict.fromkeys(block.inputs))
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    graph.output(replacement(graph, block.translated(copies)))
    tensors = [tensor for node in inputs if (tensor := fake(node)) is not None]
    with undisturbed(effects.mode):
        values: list[Any] = [tensor.data for tensor in tensors]
        result = Interpreter(GraphModule({}, graph)).run(*values)
    assert isinstance(result, Tensor)
    return result


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Along the axes that are stepped over."""
    return all(
        is_same(size, 1) or is_same(one, other)
        for size, one, other in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
