"""Blocks replaced by calls of the library's functions, in place: the graph stays one that Dynamo could have made."""

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from setriton.functional import bn_squeeze_excite, bn_squeeze_excite_forked, squeeze_excite

from .excitation import Layer
from .match import Block, match
from .report import Match, described
from .spelling import changes, fake
from .verify import verified, verifies

# Functions that a rewritten graph may call.
TARGETS = (squeeze_excite, bn_squeeze_excite, bn_squeeze_excite_forked)
# Higher-order operators whose graphs run as if they stood in the place of the operator.
_TRANSPARENT = {
    "invoke_subgraph",
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}


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
        graph, replaced = graph_module.graph, []
        for node in list(graph.nodes):
            block = match(node)
            if block is None:
                continue
            error = None
            if block.reason is None and (verifies() if verify is None else verify):
                error, block.reason = verified(graph_module, block, _replace)
            found.append(described(block, error))
            if block.reason is None:
                replaced.append(_replace(graph, block))
        for node in replaced:
            _fork(graph, node)
        if replaced:
            graph.lint()
            graph_module.recompile()
    return found


def _transparent_graphs(module: GraphModule) -> list[GraphModule]:
    found = [module]
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.name() not in _TRANSPARENT:
            continue
        for argument in node.all_input_nodes:
            inner = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(inner, GraphModule) and inner not in found:
                found += _transparent_graphs(inner)
    return found


def _replace(graph: Graph, block: Block) -> Node:
    """Put a call in the place of the block's output, and remove the block's nodes."""
    excitation, output = block.excitation, block.output
    assert excitation is not None
    with graph.inserting_before(output):
        arguments = [*_weights(graph, excitation.fc1), *_weights(graph, excitation.fc2)]
        options: dict[str, Any] = {"act": excitation.act, "gate": excitation.gate}
        if block.kind == "se":
            new = graph.call_function(squeeze_excite, (block.x, *arguments), options)
        else:
            norm, of_tail = _batch_norm(graph, block)
            options |= of_tail | {"bn_act": block.bn_act, "out_act": block.out_act, "residual": block.residual}
            new = graph.call_function(bn_squeeze_excite, (block.x, *norm, *arguments), options)
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    gone = block.inner | {output}
    for node in reversed(list(graph.nodes)):
        if node not in gone:
            continue
        for user in list(node.users):  # what is left of them reads sizes, and those are x's
            user.replace_input_with(node, block.x)
        graph.erase_node(node)
    return new


def _weights(graph: Graph, layer: Layer) -> tuple[Node, Node | None]:
    """Weight (out, in) or (out, in, 1, 1) and bias (out)."""
    weight, bias = layer.weight, layer.bias
    tensor = fake(bias)
    if layer.transposed:
        weight = _derived(graph, weight, "t")
    if bias is not None and tensor is not None and tensor.dim() != 1:
        bias = _derived(graph, bias, "reshape", (-1,))
    return weight, bias


def _batch_norm(graph: Graph, block: Block) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors and options of the tail's BN; where there is none, the one that changes nothing."""
    bn = block.bn
    if bn is not None:
        tensors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        return tensors, {"training": bn.training, "momentum": bn.momentum, "eps": bn.eps}
    tensor = fake(block.x)
    assert tensor is not None
    # Variance 0 and eps 1, not the reverse: a kernel's lanes past the last channel read 0 as the variance.
    mean, var = (_derived(graph, block.x, "new_zeros", (tensor.shape[1],)) for _ in range(2))
    return (None, None, mean, var), {"training": False, "eps": 1.0}


def _derived(graph: Graph, node: Node, method: str, *arguments: Any) -> Node:
    new = graph.call_method(method, (node, *arguments))
    tensor = fake(node)
    if tensor is not None:
        new.meta["example_value"] = getattr(tensor, method)(*arguments)
    return new


def _fork(graph: Graph, node: Node) -> None:
    """Give a tail's two readers a result each: the sum of their gradients is then made in the tail's own sweep."""
    users = list(node.users)
    tensor = fake(node)
    if node.target is not bn_squeeze_excite or tensor is None or not tensor.requires_grad or len(users) != 2:
        return
    if any(user.op == "output" or changes(user, node) for user in users):
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
