"""A block run beside its replacement on random numbers: results, gradients, and what is written."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .block import Block
from .spelling import fake

_TOLERANCE = 1e-6
# Where the block itself rounds to a dtype narrower than float64's.
_TOLERANCE_OF_CASTS = 2e-2
_SEEDS = (0, 1)


def verifies() -> bool:
    """Whether the environment asks for it: `SETRITON_VERIFY=1`."""
    return os.environ.get("SETRITON_VERIFY") == "1"


def verified(
    module: GraphModule, block: Block, replace: Callable[[Graph, Block], Node]
) -> tuple[float | None, str | None]:
    """Run the nodes from a block's first to its last, then the same with the block replaced.

    Floating-point inputs are random float64 numbers in the strides, and with the shared memory, of the graph's; sizes
    that may change have the values that the graph was made with. What the graph holds and the state of random numbers
    stay as they are.

    Args:
        module: whose graph the block is in.
        block: one that can be replaced.
        replace: puts a call in the place of a block in a graph, and removes the block.

    Returns:
        The largest difference of results, gradients and inputs afterwards, relative to the largest number there, and
        why the block must be left alone: it differs, or cannot be run. The error is None where nothing was run, the
        reason None where all agree.
    """
    written = _Part.of(module, block)
    try:
        with _disable_current_modes(), torch.random.fork_rng(_devices(written.inputs)):
            wanted = [written.run(seed) for seed in _SEEDS]
            replaced = written.copied()
            replace(replaced.module.graph, replaced.block)
            replaced.module.recompile()
            found = [replaced.run(seed) for seed in _SEEDS]
    except Exception as error:
        warnings.warn(f"setriton: a block is left alone, because it cannot be verified: {error}", stacklevel=2)
        return None, f"it cannot be verified: {error}"
    tolerance = _TOLERANCE_OF_CASTS if written.casts else _TOLERANCE
    largest, where = max(_difference(a, b) for a, b in zip(wanted, found, strict=True))
    if largest <= tolerance:
        return largest, None
    reason = f"its replacement differs{'' if largest == float('inf') else f' by {largest:.1e}'} in {where}"
    warnings.warn(f"setriton: a block is left alone: {reason}; please report this", stacklevel=2)
    return largest, reason


@dataclass
class _Part:
    """The nodes of a graph from a block's first to its last, as a graph of their own.

    Attributes:
        inputs: nodes of the whole graph whose values the part takes.
    """

    module: GraphModule
    block: Block
    inputs: list[Node]

    @classmethod
    def of(cls, module: GraphModule, block: Block) -> "_Part":
        nodes = list(module.graph.nodes)
        first = min(map(nodes.index, block.inner | {block.output}))
        last = nodes.index(block.output)
        part = nodes[first : last + 1]
        inside = set(part)
        inputs = list(dict.fromkeys(value for node in part for value in node.all_input_nodes if value not in inside))
        results = [node for node in part if node is block.output or any(user not in inside for user in node.users)]
        graph, copies = Graph(), dict[Node, Node]()
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in part:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in results if node not in block.inner))
        return cls(GraphModule(module, graph), block.translated(copies), inputs)

    def copied(self) -> "_Part":
        """The same, to be changed."""
        graph, copies = Graph(), dict[Node, Node]()
        for node in self.module.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return _Part(GraphModule(self.module, graph), self.block.translated(copies), self.inputs)

    @property
    def casts(self) -> bool:
        """Whether its values have different floating dtypes."""
        tensors = [fake(node) for node in self.module.graph.nodes]
        return len({t.dtype for t in tensors if t is not None and t.is_floating_point()}) > 1

    def run(self, seed: int) -> dict[str, Tensor | None]:
        """Results, inputs afterwards and gradients, by name."""
        torch.manual_seed(seed)
        views = _views(self.inputs)
        leaves = _fill(views, self.inputs, self.block)
        memory = {name: leaf.clone() for name, leaf in leaves.items()}
        arguments = [view.of(memory) if isinstance(view, _View) else view for view in views]
        result = fake(self.block.output)
        differentiated = result is not None and result.requires_grad
        with torch.set_grad_enabled(differentiated):
            results = self.module.forward(*arguments)  # its call would print errors
        seen: dict[str, Tensor | None] = {f"result {i}": t for i, t in enumerate(results) if isinstance(t, Tensor)}
        written = {f"{name} afterwards": t for name, t in memory.items()}
        losses = [(t * torch.rand_like(t)).sum() for t in seen.values() if t is not None and t.requires_grad]
        # What was written is a result, too; what was not would have a gradient of its own.
        losses += [(t * torch.rand_like(t)).sum() for t in written.values() if t.requires_grad and t._version]
        seen |= written
        if differentiated and losses:
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            gradients = torch.autograd.grad(losses, list(wanted.values()), allow_unused=True)
            seen |= {f"the gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
        return {name: None if t is None else t.detach() for name, t in seen.items()}


@dataclass
class _Memory:
    """What inputs of a part share: the elements of one storage, and whether any input of it needs a gradient."""

    name: str
    length: int
    like: Tensor
    requires_grad: bool

    def random(self) -> Tensor:
        """Elements for it: floating-point ones in float64, others 0."""
        dtype = self.like.dtype
        device = torch.device("cpu") if self.like.is_meta else self.like.device
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(self.length, dtype=dtype, device=device)
        return torch.randn(self.length, dtype=torch.complex128 if dtype.is_complex else torch.float64, device=device)


@dataclass(frozen=True)
class _View:
    """An input: a view of a memory."""

    memory: _Memory
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool

    def of(self, memory: dict[str, Tensor]) -> Tensor:
        whole = memory[self.memory.name]
        return (whole if self.requires_grad else whole.detach()).as_strided(self.size, self.stride, self.offset)


def _views(inputs: Iterable[Node]) -> list[Any]:
    """Of each input its view, or its value where it is no tensor."""
    memories, views = dict[Any, _Memory](), []
    for node in inputs:
        tensor = fake(node)
        if tensor is None:
            views.append(_hinted(node.meta.get("example_value", node.meta.get("val"))))
            continue
        storage = tensor.untyped_storage()
        memory = memories.setdefault((storage._cdata, tensor.dtype), _Memory(node.name, 0, tensor, False))
        size, stride = _hinted(tuple(tensor.shape)), _hinted(tuple(tensor.stride()))
        offset, requires_grad = _hinted(tensor.storage_offset()), tensor.requires_grad
        views.append(_View(memory, size, stride, offset, requires_grad))
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        memory.length = max(memory.length, reach, _hinted(storage.nbytes()) // tensor.element_size())
        memory.requires_grad |= requires_grad
    return views


def _hinted(value: Any) -> Any:
    """Sizes as numbers, of symbols those that the graph was made with; asking so specializes nothing."""

    def hint(symbol: Any) -> Any:
        if symbol.node.hint is None:
            raise ValueError(f"the graph was made without a value of {symbol}")
        return symbol.node.hint

    return tree_map_only((torch.SymInt, torch.SymFloat, torch.SymBool), hint, value)


def _fill(views: Sequence[Any], inputs: Sequence[Node], block: Block) -> dict[str, Tensor]:
    """Random numbers that show faults: maps with other means, weights that saturate nothing, variances above 0."""
    tensors = [view for view in views if isinstance(view, _View)]
    leaves = {view.memory.name: view.memory.random() for view in tensors}
    excitation = block.excitation
    weights = () if excitation is None else (excitation.fc1.weight, excitation.fc2.weight)
    names = {node.name for node in weights}
    variance = None if block.bn is None else block.bn.running_var
    for view, node in zip(views, inputs, strict=True):
        if not isinstance(view, _View) or not view.memory.like.is_floating_point():
            continue
        values = view.of({name: leaf.detach() for name, leaf in leaves.items()})
        if node.name in names:
            values.div_(max(values.shape) ** 0.5)
        elif variance is not None and node.name == variance.name:
            values.abs_().add_(0.5)
        elif values.dim() == 4 and 0 not in values.stride():
            values.add_(torch.randn_like(values[:, :, :1, :1]))
    for view in tensors:
        leaves[view.memory.name].requires_grad_(view.memory.requires_grad)
    return leaves


def _devices(inputs: Iterable[Node]) -> list[torch.device]:
    tensors = [fake(node) for node in inputs]
    return list({t.device for t in tensors if t is not None and t.is_cuda})


def _difference(want: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest difference and where it is; infinite where one has what the other has not."""
    largest = (0.0, "nothing")
    for name, a in want.items():
        b = found.get(name)
        if a is None and b is None:
            continue
        if a is None or b is None or _layout(a) != _layout(b):
            return float("inf"), f"{name}: {_told(a)} as written, {_told(b)} replaced"
        if not a.numel():
            continue
        scale = max(a.abs().nan_to_num(0, 0, 0).max().item(), 1e-3)
        apart = torch.where(a.isnan() & b.isnan() | (a == b), 0, (a - b).abs()).double().max().item()
        largest = max(largest, (float("inf") if apart != apart else apart / scale, name))
    return largest


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and the strides of a dense tensor's dimensions that are stepped over."""
    steps = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    is_dense = sum((size - 1) * stride for size, stride in steps) + 1 == tensor.numel()
    return tuple(tensor.shape), tensor.dtype, steps if is_dense else None


def _told(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} with strides {tensor.stride()}"
