"""Modules compiled with their SE blocks replaced and nothing else done to them, compared with eager in float64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from setriton import ops, ops_tail
from setriton.compile.report import CompileReport, compile_report, record, reset_compile_report
from setriton.compile.rewrite import rewrite


def rewriting(graph_module: GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend that replaces blocks and runs the graph as it is then."""
    record(rewrite(graph_module))
    return graph_module.forward


def randomize(module: nn.Module) -> None:
    """Weights and statistics of BN at random: timm starts last weights at 0, which hides what comes before them."""
    for bn in module.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            if bn.weight is not None:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.normal_(bn.bias, 0, 0.2)
            if bn.running_mean is not None and bn.running_var is not None:
                bn.running_mean.normal_(0, 0.2)
                bn.running_var.uniform_(0.5, 1.5)


def compare(
    module: nn.Module,
    *inputs: Tensor,
    tolerance: float = 1e-10,
    backend: Callable[..., Any] | str = rewriting,
    fullgraph: bool = True,
    differentiate: bool = True,
    **options: Any,
) -> CompileReport:
    """What was found in a module whose outputs, gradients and buffers in float64 are eager's.

    Gradients are compared with the largest of all: that of a bias before batch statistics is 0 but for rounding.
    """
    torch._dynamo.reset()
    reset_compile_report()
    module = module.double()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend=backend, fullgraph=fullgraph, **options)
    want, found = (_outcome(run, own, inputs, differentiate) for run, own in ((module, module), (compiled, twin)))
    for name in want:
        scale = max([t.abs().max().item() for t in want[name] if t.numel()] or [0.0])
        for a, b in zip(want[name], found[name], strict=True):
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            assert not a.numel() or (a - b).abs().max().item() <= tolerance * scale, name
    return compile_report()


def _outcome(
    run: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor], differentiate: bool
) -> dict[str, list[Tensor]]:
    leaves = [x.detach().clone().double().requires_grad_(differentiate) for x in inputs]
    torch.manual_seed(0)
    with torch.set_grad_enabled(differentiate):
        y = run(*leaves)
    if not differentiate:  # what was written to an input is a result, too
        return {"output": [y], "inputs": leaves, "buffer": list(module.buffers())}
    # Weights of some networks' second outputs may have no gradient.
    parameters = list(module.parameters())
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, [*leaves, *parameters], torch.randn_like(y), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, [*leaves, *parameters], strict=True)]
    buffers = [b.detach().clone() for b in module.buffers() if b.is_floating_point()]
    counts = [b.detach().double() for b in module.buffers() if not b.is_floating_point()]
    return {
        "output": [y.detach()],
        "input gradient": zeros[: len(leaves)],
        "parameter gradient": zeros[len(leaves) :],
        "buffer": buffers,
        "count": counts,
    }


def without_tags(make: Callable[[int], nn.Module], channels: int) -> nn.Module:
    """A module, in a process in which no op of setriton's has a tag from here on."""
    for op in (ops.squeeze_excite, ops.squeeze_excite_backward, ops_tail._forward, ops_tail._backward):
        op._opoverload._tags = []
    return make(channels)
