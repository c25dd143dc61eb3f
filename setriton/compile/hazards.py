"""Whether a block may be computed at its end, all at once, into new memory: what its graph does to memory meanwhile.

As written a block reads its inputs at several places, and may write some of its values in place. Its replacement reads
them at the last place, and writes nothing but running statistics.
"""

from collections.abc import Iterator

from torch.fx import Node

from .block import Block
from .effects import Effects
from .shapes import is_same
from .spelling import fake, reads_shape


def hazard(block: Block, effects: Effects) -> str | None:
    """Why replacing a block would change a result, a gradient, or what is written; None where it would not."""
    checks = (_of_modes, _of_inputs, _of_writes_meanwhile, _of_writes_in_place, _of_writes_afterwards)
    return next((reason for check in checks if (reason := check(block, effects)) is not None), None)


def is_given_or_written(node: Node, effects: Effects) -> bool:
    """Whether anything after a node writes the memory of its value, or gives it out of the graph, where others may."""
    storages = effects.storages(node)
    return any(
        effects.writes(later) & storages or (later.op == "output" and _takes(later, effects) & storages)
        for later in _after(node)
    )


def statistics(block: Block, effects: Effects) -> set[int]:
    """Storages that both a block and its replacement write: of running statistics."""
    if block.bn is None or not block.bn.training:
        return set()
    return set[int]().union(*map(effects.storages, block.bn.statistics))


def _of_inputs(block: Block, effects: Effects) -> str | None:
    for node in block.inputs:
        if node in block.nodes:
            return f"{node.name} is read twice in the block"
        if not effects.is_steady(node):
            return f"the shape or the memory of {node.name} changes"
    moved = statistics(block, effects)
    if any(effects.storages(node) & moved for node in block.operands):
        return "running statistics share memory with another input"
    if block.bn is not None and moved and len(moved) < len(block.bn.statistics):
        return "running statistics share memory"
    return None


def _of_modes(block: Block, effects: Effects) -> str | None:
    for node in block.span():
        if effects.is_transformed(node):
            return "inside of a function transform"
        if effects.changes_mode(node):
            return "autocast or grad mode changes inside"
    return None


def _of_writes_meanwhile(block: Block, effects: Effects) -> str | None:
    """Nodes of others, between the block's first and its last, must leave its inputs alone."""
    inputs, moved, nodes = _memory(block, effects), statistics(block, effects), block.nodes
    maps = set[int]().union(*(effects.storages(node) for node in (block.x, block.residual) if node is not None))
    for node in block.span():
        if node in nodes:
            continue
        if effects.writes(node) & inputs:
            return f"{node.name} changes an input of the block in place"
        # Nothing compiles a graph anew where two of its inputs share memory that did not when it was made.
        if effects.writes(node) & effects.given_maps and maps & effects.given_maps:
            return f"{node.name} changes in place what may be an input of the block at another call"
        if moved & _takes(node, effects):
            return f"{node.name} reads BN's running statistics inside of the block"
    return None


def _of_writes_in_place(block: Block, effects: Effects) -> str | None:
    """What the block writes, and its replacement does not, must be read by way of what has written it alone."""
    moved, nodes = statistics(block, effects), block.nodes
    places = {node: place for place, node in enumerate(block.output.graph.nodes)}
    last = dict[int, int]()  # of each storage, the place of the last node of the block that has written it
    for node in [*block.span(), *_after(block.output)]:
        for value in node.all_input_nodes:
            is_changed = any(last.get(found, -1) > places[value] for found in effects.storages(value))
            if is_changed and not reads_shape(node):
                return f"{value.name} is written in place in the block and read again, by {node.name}"
        if node not in nodes:
            continue
        written = effects.writes(node) - moved
        if written & effects.given:
            return f"{node.name} writes in place what comes from outside"
        if written & effects.storages(block.output) and not _is_whole(block.output):
            return f"{node.name} writes in place a part of a larger tensor"
        last |= dict.fromkeys(written, places[node])
    return None


def _of_writes_afterwards(block: Block, effects: Effects) -> str | None:
    """What the replacement keeps for its backward pass must stay as it is."""
    result = fake(block.output)
    if result is None or not result.requires_grad:
        return None
    own = set[int]().union(*map(effects.writes, block.nodes), effects.storages(block.output))
    kept = _memory(block, effects) - own
    for node in _after(block.output):
        if effects.writes(node) & kept:
            return f"{node.name} changes an input of the block in place, which its backward pass reads"
    return None


def _is_whole(node: Node) -> bool:
    """Whether a node's value is all there is in its memory."""
    tensor = fake(node)
    return tensor is not None and is_same(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size())


def _memory(block: Block, effects: Effects) -> set[int]:
    return set[int]().union(*map(effects.storages, block.inputs))


def _takes(node: Node, effects: Effects) -> set[int]:
    return set[int]().union(*map(effects.storages, node.all_input_nodes))


def _after(node: Node) -> Iterator[Node]:
    node = node.next
    while node.op != "root":
        yield node
        node = node.next
