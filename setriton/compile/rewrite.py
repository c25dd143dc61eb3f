"""Blocks replaced by calls of the library's functions, in place: the graph stays one that Dynamo could have made."""

import functools
import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from setriton.functional import bn_squeeze_excite, bn_squeeze_excite_forked, squeeze_excite

from .block import Block
from .effects import Effects, is_transparent, value_of
from .hazards import is_given_or_written, statistics
from .layers import Layer
from .layouts import settle
from .match import match
from .report import Match, described
from .spelling import fake
from .verify import verified, verifies

# Functions that a rewritten graph may call.
TARGETS = (squeeze_excite, bn_squeeze_excite, bn_squeeze_excite_forked)


def rewrite(module: GraphModule, *, verify: bool | None = None) -> list[Match]:
    """Replace the SE blocks of a graph, and of the graphs in its checkpointed and other regions.

    Args:
        module: as Dynamo or torch.export makes it, with fake tensors in its nodes' meta. It is changed in place.
        verify: replace no block before it was run beside its replacement; None asks SETRITON_VERIFY.

    Returns:
        What was found, replaced or left alone, in order.
    """
    found = []
    for graph_module in _transparent_graphs(module):
        found += _rewrite(graph_module, verifies() if verify is None else verify)
    return found


def _rewrite(module: GraphModule, verify: bool) -> list[Match]:
    graph, found, replaced = module.graph, [], []
    effects = functools.cache(lambda: Effects(module))
    for node in list(graph.nodes):
        block = None if node._erased else match(node, effects)
        if block is None:
            continue
        error = None
        if block.reason is None:
            block.reason = settle(block, effects(), _call)
        if block.reason is None and verify:
            error, block.reason = verified(module, block, _replace)
        found.append(described(block, error))
        if block.reason is None:
            new = _replace(graph, block)
            effects().exchange(block.output, new, statistics(block, effects()))
            replaced.append(new)
    for node in replaced:
        _fork(graph, node, effects())
    if replaced:
        graph.lint()
        module.recompile()
    return found


def _transparent_graphs(module: GraphModule) -> list[GraphModule]:
    found = [module]
    for node in module.graph.nodes:
        if not is_transparent(node):
            continue
        for argument in node.all_input_nodes:
            inner = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(inner, GraphModule) and inner not in found:
                found += _transparent_graphs(inner)
    return found


def _replace(graph: Graph, block: Block) -> Node:
    """Put a call in the place of the block's output, and remove the block's nodes."""
    output = block.output
    with graph.inserting_before(output):
        new = _call(graph, block)
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    gone = block.nodes
    for node in reversed(list(graph.nodes)):
        if node not in gone:
            continue
        for user in list(node.users):  # what is left of them reads sizes, and those are x's
            user.replace_input_with(node, block.x)
        graph.erase_node(node)
    return new


def _call(graph: Graph, block: Block) -> Node:
    """What computes a block, at the place where the graph inserts nodes."""
    excitation, x = block.excitation, block.x
    assert excitation is not None
    arguments = [*_weights(graph, excitation.fc1), *_weights(graph, excitation.fc2)]
    options: dict[str, Any] = {"act": excitation.act, "gate": excitation.gate}
    if block.layout is not None:
        x = _derived(graph, x, "contiguous", memory_format=block.layout)
    if block.kind == "se":
        return graph.call_function(squeeze_excite, (x, *arguments), options)
    norm, of_tail = _batch_norm(graph, block, x)
    options |= of_tail | {"bn_act": block.bn_act, "out_act": block.out_act, "residual": block.residual}
    return graph.call_function(bn_squeeze_excite, (x, *norm, *arguments), options)


def _weights(graph: Graph, layer: Layer) -> tuple[Node, Node | None]:
    """Weight (out, in) or (out, in, 1, 1) and bias (out)."""
    weight, bias = layer.weight, layer.bias
    tensor = fake(bias)
    if layer.transposed:
        weight = _derived(graph, weight, "t")
    if bias is not None and tensor is not None and tensor.dim() != 1:
        bias = _derived(graph, bias, "reshape", (-1,))
    return weight, bias


def _batch_norm(graph: Graph, block: Block, x: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors and options of the tail's BN; where there is none, the one that changes nothing."""
    bn = block.bn
    if bn is not None:
        tensors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        return tensors, {"training": bn.training, "momentum": bn.momentum, "eps": bn.eps}
    # Variance 0 and eps 1, not the reverse: a kernel's lanes past the last channel read 0 as the variance.
    channels = _derived(graph, x, "size", 1)
    mean, var = (_derived(graph, x, "new_zeros", (channels,)) for _ in range(2))
    return (None, None, mean, var), {"training": False, "eps": 1.0}


def _derived(graph: Graph, node: Node, method: str, *arguments: Any, **options: Any) -> Node:
    new = graph.call_method(method, (node, *arguments), options)
    tensor = fake(node)
    if tensor is not None:
        new.meta["example_value"] = getattr(tensor, method)(*value_of(arguments), **options)
    return new


def _fork(graph: Graph, node: Node, effects: Effects) -> None:
    """Give a tail's two readers a result each: the sum of their gradients is then made in the tail's own sweep."""
    users = list(node.users)
    tensor = fake(node)
    if node.target is not bn_squeeze_excite or tensor is None or not tensor.requires_grad or len(users) != 2:
        return
    if is_given_or_written(node, effects):
        return
    with graph.inserting_after(node):
        forked = graph.call_function(bn_squeeze_excite_forked, node.args, dict(node.kwargs))
    with graph.inserting_after(forked):
        results = [graph.call_function(operator.getitem, (forked, index)) for index in (1, 0)]
    for result, user in zip(results, users, strict=True):
        result.meta = dict(node.meta)
        user.replace_input_with(node, result)
    forked.meta = dict(node.meta) | {"example_value": (tensor, tensor)}
    graph.erase_node(node)
