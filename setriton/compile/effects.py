"""What each node of a graph writes, and which of its tensors share memory: known from schemas and storages."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Higher-order operators whose graphs run as if they stood in the place of the operator.
TRANSPARENT = {
    "invoke_subgraph",
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}
# Written in training by normalizations whose schemas do not say so.
_STATISTICS = ("running_mean", "running_var")
_MODES_OF_STATISTICS = ("training", "train", "use_input_stats")


class Effects:
    """Storages, by an identity, of the values of a graph's nodes, and those that each node writes."""

    def __init__(self, module: GraphModule) -> None:
        """Run the graph on its tensors without data, and watch what reaches aten."""
        self._storages: dict[Node, set[int]] = {}
        self._writes: dict[Node, set[int]] = {}
        # Storages are told apart by their addresses: none may be freed.
        self._kept: list[Any] = []
        mode = _fake_mode(module)
        with _undisturbed(mode), _Watch(self) as watch:
            runner = _Runner(module, mode, watch, self)
            runner.run(*map(value_of, module.graph.find_nodes(op="placeholder")))
        for node, value in runner.env.items():  # a storage may have been exchanged since
            self._storages.setdefault(node, set()).update(storages_in(value))
        self.given: set[int] = set()
        for node in module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.given |= self.storages(node)

    def storages(self, node: Node) -> set[int]:
        """Of the tensors in a node's value."""
        return self._storages.get(node, set())

    def writes(self, node: Node) -> set[int]:
        """Storages that running the node changes."""
        return self._writes.get(node, set())

    def takes(self, node: Node) -> set[int]:
        """Storages of a node's arguments."""
        return set().union(*map(self.storages, node.all_input_nodes))

    def exchange(self, old: Node, new: Node, writes: set[int]) -> None:
        """Note what a new node, whose value stands for that of `old`, writes."""
        self._storages[new] = set(self.storages(old))
        self._writes[new] = writes

    def note(self, node: Node, storages: set[int], writes: set[int], kept: Any) -> None:
        """Note what a node was seen to do."""
        self._storages.setdefault(node, set()).update(storages)
        self._writes.setdefault(node, set()).update(writes)
        self._kept.append(kept)


def value_of(node: Any) -> Any:
    """What Dynamo or torch.export found out about a node's value; of other things, themselves."""
    if isinstance(node, Node):
        return node.meta.get("example_value", node.meta.get("val"))
    return type(node)(map(value_of, node)) if type(node) in (tuple, list) else node


def storages_in(value: Any) -> set[int]:
    """Of all tensors in a nested value."""
    return {found for leaf in tree_leaves(value) if isinstance(leaf, Tensor) for found in _storages_of(leaf)}


def is_transparent(node: Node) -> bool:
    """Whether a node runs a graph in its own place."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in TRANSPARENT


def _storages_of(tensor: Tensor) -> set[int]:
    try:
        return {tensor.untyped_storage()._cdata}
    except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
        return {id(tensor)}


def _fake_mode(module: GraphModule) -> FakeTensorMode | None:
    values = (value_of(node) for node in module.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def _undisturbed(mode: FakeTensorMode | None) -> Iterator[None]:
    """Let nothing of a run be felt outside: random numbers, grad mode, guards and symbols of sizes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        if mode is not None:
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode)
        yield


class _Watch(TorchDispatchMode):
    """Collects the storages that calls write, for the node that is running."""

    def __init__(self, effects: Effects) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        found = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        moves = any(found.get(name, False) for name in _MODES_OF_STATISTICS)
        for argument in arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or (moves and argument.name in _STATISTICS):
                self.written |= storages_in(found.get(argument.name))
        return func(*args, **kwargs)


class _Runner(Interpreter):
    def __init__(
        self, module: GraphModule, mode: FakeTensorMode | None, watch: _Watch, effects: Effects | None
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mode, self.watch, self.effects = mode, watch, effects
        self.attributes: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        outer, self.watch.written = self.watch.written, set()
        try:
            value = self._value(n)
            storages, writes = storages_in(value), self.watch.written
        except Exception:
            # It may do anything with what it takes.
            value = value_of(n)
            taken = storages_in([self.env.get(node) for node in n.all_input_nodes])
            storages, writes = storages_in(value) | taken, taken | self.watch.written
        self.watch.written = outer | writes
        if self.effects is not None:
            inherited = self.effects.takes(n) if value is None or n.op == "output" else set()
            self.effects.note(n, storages | inherited, writes, value)
        return value

    def _value(self, n: Node) -> Any:
        if n.op == "get_attr":
            return self._attribute(n)
        if not isinstance(n.target, torch._ops.HigherOrderOperator):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        index = next((i for i, argument in enumerate(args) if isinstance(argument, GraphModule)), None)
        if index is None or not is_transparent(n):
            raise NotImplementedError(n.target.name())
        rest = [argument for argument in args[index + 1 :] if not isinstance(argument, str)]
        return _Runner(args[index], self.mode, self.watch, None).run(*rest)

    def _attribute(self, n: Node) -> Any:
        """A module's own tensor, without its data."""
        target = str(n.target)
        if target not in self.attributes:
            value = self.fetch_attr(target)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                if self.mode is not None:
                    value = self.mode.fake_tensor_converter.from_real_tensor(self.mode, value)
                else:
                    value = torch.empty_like(value, device="meta")
            self.attributes[target] = value
        return self.attributes[target]
