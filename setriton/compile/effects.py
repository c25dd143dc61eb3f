"""What each node of a graph writes, and which of its tensors share memory: known from schemas and storages."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Higher-order operators whose graphs run as if they stood in the place of the operator.
_TRANSPARENT = {
    "invoke_subgraph",
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
}
# Written by normalizations whose schemas do not say so, if one of the modes is true or there is none.
_STATISTICS = ("running_mean", "running_var")
_MODES_OF_STATISTICS = ("training", "train", "use_input_stats")
_DEVICES = ("cpu", "cuda")
# What operations give; another result, and none at all, is given for what is done beside.
_VALUES = (
    *(Tensor, int, float, complex, bool, str, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)


class Effects:
    """What the nodes of a graph do to memory and to the mode that later nodes run in.

    Memory is told apart by storages, as numbers. Of what cannot be run without data the worst is assumed: it writes
    all that it takes, and its result shares memory with it.
    """

    def __init__(self, module: GraphModule) -> None:
        """Run the graph on its tensors without data, and watch what reaches aten."""
        self._storages: dict[Node, set[int]] = {}
        self._writes: dict[Node, set[int]] = {}
        self._same: dict[int, int] = {}
        self._changing: set[Node] = set()
        self._transformed: set[Node] = set()
        self._forms: dict[Node, list[Any]] = {}
        # Storages are told apart by their addresses: none may be freed.
        self._kept: list[Any] = []
        self.mode = _fake_mode(module)
        with undisturbed(self.mode), _Watch() as watch:
            runner = _Runner(module, self.mode, watch, self)
            runner.run(*[_fresh(value_of(node)) for node in module.graph.find_nodes(op="placeholder")])
        for node, value in runner.env.items():  # a storage may have been exchanged since
            self._storages.setdefault(node, set()).update(storages_in(value))
        self._unsteady = {node for node, value in runner.env.items() if _form(value) != self._forms.get(node)}
        given = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
        self.given = set[int]().union(*map(self.storages, given))
        # Those that may be maps of a caller's: of real numbers, and no running statistics.
        real = [node for node in given if _is_real(runner.env.get(node))]
        self.given_maps = set[int]().union(*map(self.storages, real)) - {self._root(s) for s in watch.statistics}

    def storages(self, node: Node) -> set[int]:
        """Of the tensors in a node's value."""
        return {self._root(found) for found in self._storages.get(node, ())}

    def writes(self, node: Node) -> set[int]:
        """Storages that running the node changes."""
        return {self._root(found) for found in self._writes.get(node, ())}

    def changes_mode(self, node: Node) -> bool:
        """Whether what follows runs under another grad mode, autocast or function transform."""
        return node in self._changing

    def is_transformed(self, node: Node) -> bool:
        """Whether a node runs inside of a function transform, such as vmap."""
        return node in self._transformed

    def is_steady(self, node: Node) -> bool:
        """Whether the shape, the strides and the dtype of a node's value stay what they were when it was made."""
        return node not in self._unsteady

    def exchange(self, old: Node, new: Node, writes: set[int]) -> None:
        """Note a new node, whose value stands for that of `old`, and what it writes."""
        self._storages[new], self._writes[new] = set(self._storages.get(old, ())), writes

    def note(self, node: Node, value: Any, storages: set[int], writes: set[int]) -> None:
        """Note what a node was seen to do."""
        self._storages[node], self._writes[node] = storages, writes
        self._kept.append(value)
        self._forms[node] = _form(value)

    def note_modes(self, node: Node, changes: bool, transformed: bool) -> None:
        """Note what mode a node ran in, and whether it left it."""
        if changes:
            self._changing.add(node)
        if transformed:
            self._transformed.add(node)

    def unite(self, storages: set[int]) -> None:
        """Take storages for one from here on."""
        roots = [self._root(found) for found in storages]
        self._same |= {root: roots[0] for root in roots[1:] if root != roots[0]}

    def _root(self, storage: int) -> int:
        while storage in self._same:
            storage = self._same[storage]
        return storage


def value_of(value: Any) -> Any:
    """What Dynamo or torch.export found out about a node's value; of other things, themselves."""
    if isinstance(value, Node):
        return value.meta.get("example_value", value.meta.get("val"))
    return type(value)(map(value_of, value)) if type(value) in (tuple, list) else value


def storages_in(value: Any) -> set[int]:
    """Of all tensors in a nested value."""
    return {_storage(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def is_transparent(node: Node) -> bool:
    """Whether a node runs a graph in its own place."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _TRANSPARENT


@contextlib.contextmanager
def undisturbed(mode: FakeTensorMode | None) -> Iterator[None]:
    """Run on tensors without data, and let nothing of it be felt outside: random numbers, modes, guards, symbols."""
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        if mode is not None:
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode)
        try:
            yield
        finally:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            for device, enabled, dtype in autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
        return id(tensor)


def _form(value: Any) -> list[Any]:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return [(str(t.shape), str(t.stride()), t.dtype, t.requires_grad) for t in tensors]


def _fresh(value: Any) -> Any:
    """The same tensors over the same storages, whose metadata and versions are their own."""
    return tree_map_only(FakeTensor, lambda t: t.data, value)


def _fake_mode(module: GraphModule) -> FakeTensorMode | None:
    leaves = (leaf for node in module.graph.nodes for leaf in tree_leaves(value_of(node)))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def _modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, depth


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sets_mode(node: Node, value: Any, takes: set[int]) -> bool:
    """Whether a node takes and gives nothing but must be there for something: for the mode it sets."""
    if node.op != "call_function" or takes or isinstance(node.target, torch._ops.OpOverload):
        return False
    if getattr(node.target, "__name__", "").startswith(("_check", "_assert")):
        return False
    return value is None or not all(leaf is None or isinstance(leaf, _VALUES) for leaf in tree_leaves(value))


class _Watch(TorchDispatchMode):
    """Collects the storages that calls write, for the node that is running, and those of all running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.statistics: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        found = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        modes = [found[name] for name in _MODES_OF_STATISTICS if name in found]
        for argument in arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            is_statistic = argument.name in _STATISTICS
            if is_written or (is_statistic and (any(modes) or not modes)):
                self.written |= storages_in(found.get(argument.name))
            if is_statistic:
                self.statistics |= storages_in(found.get(argument.name))
        return func(*args, **kwargs)


class _Runner(Interpreter):
    """Runs a graph, and notes what each node does; `effects` is None in the graphs of higher-order operators."""

    def __init__(
        self, module: GraphModule, mode: FakeTensorMode | None, watch: _Watch, effects: Effects | None
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mode, self.watch, self.effects = mode, watch, effects
        self.attributes: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        outer, self.watch.written = self.watch.written, set()
        before = _modes()
        taken = storages_in([self.env.get(node) for node in n.all_input_nodes])
        failed = False
        try:
            value = self._value(n)
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and value_of(n) is not None:
                value = value_of(n)  # what was found out about a number stays so
        except Exception:
            if self.effects is None:
                raise
            value, failed = value_of(n), True
        writes = self.watch.written | (taken if failed else set())
        self.watch.written = outer | writes
        if self.effects is not None:
            if failed and (together := taken | storages_in(value)):
                self.effects.unite(together)
            self.effects.note(n, value, storages_in(value), writes)
            changes = before != _modes() or (not failed and _sets_mode(n, value, taken))
            self.effects.note_modes(n, changes, bool(before[-1]))
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
        with contextlib.ExitStack() as stack:
            if n.target.name() == "wrap_with_autocast":
                stack.enter_context(torch.autocast(*args[:index]))
            return _Runner(args[index], self.mode, self.watch, None).run(*rest)

    def _attribute(self, n: Node) -> Any:
        """A module's own tensor, without its data."""
        target = str(n.target)
        if target not in self.attributes:
            value = self.fetch_attr(target)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                if self.mode is None:
                    value = torch.empty_like(value, device="meta")
                else:
                    value = self.mode.fake_tensor_converter.from_real_tensor(self.mode, value)
            self.attributes[target] = value
        return self.attributes[target]
