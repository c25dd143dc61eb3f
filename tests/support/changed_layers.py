"""What users do to the layers of a network, as functions that change a module in place."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

Change = Callable[[nn.Module], Any]


def named(module: nn.Module, name: str) -> list[tuple[nn.Module, str, Any]]:
    """Parent, attribute and module of every child called `name`."""
    return [(parent, name, child) for parent in module.modules() for n, child in parent.named_children() if n == name]


def norms(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The same of every nn.BatchNorm2d."""
    children = [(parent, *child) for parent in module.modules() for child in parent.named_children()]
    return [found for found in children if isinstance(found[2], nn.BatchNorm2d)]


def each(name: str, function: Callable[[Any], Any]) -> Change:
    """Call `function` with every child of that name."""

    def change(module: nn.Module) -> None:
        for _, _, child in named(module, name):
            function(child)

    return change


def each_norm(function: Callable[[Any], Any]) -> Change:
    """Call `function` with every batch normalization."""
    return lambda module: [function(bn) for _, _, bn in norms(module)]


def replace(name: str, make: Callable[[Any], nn.Module]) -> Change:
    """Put another module in the place of every child of that name."""

    def change(module: nn.Module) -> None:
        for parent, attribute, child in named(module, name):
            setattr(parent, attribute, make(child))

    return change


def replace_norms(make: Callable[[nn.BatchNorm2d], nn.Module]) -> Change:
    def change(module: nn.Module) -> None:
        for parent, attribute, bn in norms(module):
            setattr(parent, attribute, make(bn))

    return change


class Doubled(nn.Conv2d):
    """A convolution of another class, with the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Doubled":
        twin = copy.deepcopy(conv)
        twin.__class__ = cls
        return twin  # type: ignore[return-value]


def wide(conv: nn.Conv2d) -> nn.Conv2d:
    """3x3 with padding, of which a 1x1 map meets the middle."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        new.weight.normal_(generator=torch.Generator().manual_seed(5))
    return new


def group_norm(bn: nn.BatchNorm2d) -> nn.Module:
    return nn.GroupNorm(2, bn.num_features, dtype=torch.float64)


def frozen(bn: nn.BatchNorm2d) -> nn.Module:
    new = torchvision.ops.FrozenBatchNorm2d(bn.num_features).double()
    new.load_state_dict(bn.state_dict(), strict=False)
    return new


def own_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def own_convolution(conv: Any) -> None:
    """What a convolution's forward calls, as in tricks for images without borders."""
    inner = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: 2 * inner(x, weight, bias)


def shadowed(name: str) -> Callable[[Any], None]:
    """Put a tensor where a call finds it before the parameter or buffer of that name."""

    def change(layer: Any) -> None:
        object.__setattr__(layer, name, 1.5 * getattr(layer, name).detach() + 0.1)

    return change


def trained_input(layer: Any) -> None:
    """A weight that is computed before each call, and no parameter."""
    weight = layer.weight
    del layer.weight
    layer.scale = nn.Parameter(weight.new_ones(()))
    layer.register_buffer("original", weight.detach())
    layer.weight = None

    def compute(module: Any, _args: Any) -> None:
        module.weight = module.original * module.scale.cos()

    layer.register_forward_pre_hook(compute)


def hooked_backward(layer: nn.Module) -> None:
    def triple(_module: nn.Module, dx: Any, _dy: Any) -> Any:
        return tuple(None if gradient is None else 3 * gradient for gradient in dx)

    layer.register_full_backward_hook(triple)


def out_of_place(module: nn.Module) -> nn.Module:
    """Autograd lets nothing write into what a backward hook looks at."""
    for child in module.modules():
        if isinstance(child, nn.ReLU):
            child.inplace = False
    return module


CHANGES: dict[str, Change] = {
    "prune": each("fc1", lambda fc: prune.l1_unstructured(fc, "weight", 0.5)),
    "prune bias": each("fc2", lambda fc: prune.l1_unstructured(fc, "bias", 0.5)),
    "prune bn": each_norm(lambda bn: prune.l1_unstructured(bn, "weight", 0.5)),
    "weight_norm": each("fc1", torch.nn.utils.weight_norm),
    "spectral_norm": each("fc2", torch.nn.utils.spectral_norm),
    "new weight_norm": each("fc1", parametrizations.weight_norm),
    "new spectral_norm": each("fc2", parametrizations.spectral_norm),
    "orthogonal": each("fc1", lambda fc: parametrizations.orthogonal(fc)),
    "computed weight": each("fc2", trained_input),
    "hook of fc1": each("fc1", lambda fc: fc.register_forward_hook(lambda _m, _a, y: 2 * y)),
    "hook of fc2, always": each("fc2", lambda fc: fc.register_forward_hook(lambda _m, _a, y: 2 * y, always_call=True)),
    "pre-hook of fc1": each("fc1", lambda fc: fc.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))),
    "pre-hook of se": each("se", lambda se: se.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))),
    "hook of se": each("se", lambda se: se.register_forward_hook(lambda _m, _a, y: y - 1)),
    "hook of norms": each_norm(lambda bn: bn.register_forward_hook(lambda _m, _a, y: 2 * y)),
    "hook of relu": each("relu", lambda relu: relu.register_forward_hook(lambda _m, _a, y: 2 * y)),
    "backward hook of fc1": each("fc1", hooked_backward),
    "backward hook of norms": lambda module: each_norm(hooked_backward)(out_of_place(module)),
    "backward pre-hook": each("se", lambda se: se.register_full_backward_pre_hook(lambda _m, dy: (2 * dy[0],))),
    "forward of its own": each("fc1", own_forward),
    "bn with a forward of its own": each_norm(own_forward),
    "convolution of its own": each("fc2", own_convolution),
    "shadowed weight": each("fc1", shadowed("weight")),
    "shadowed weight of bn": each_norm(shadowed("weight")),
    "shadowed statistic": each_norm(lambda bn: shadowed("running_mean")(bn.eval())),
    "subclass": replace("fc1", Doubled.of),
    "sequential": replace("fc2", lambda fc: nn.Sequential(fc, nn.Tanh())),
    "3x3": replace("fc1", wide),
    "group norm": replace_norms(group_norm),
    "identity": replace_norms(lambda _bn: nn.Identity()),
    "frozen batch norm": replace_norms(frozen),
    "frozen": each_norm(lambda bn: bn.eval().requires_grad_(False)),
    "silu": replace("relu", lambda _relu: nn.SiLU()),
    "no se": replace("se", lambda _se: nn.Identity()),
    "no drop path": replace("drop_path", lambda _path: nn.Tanh()),
    "hook of drop path": each("drop_path", lambda path: path.register_forward_hook(lambda _m, _a, y: 2 * y)),
}
