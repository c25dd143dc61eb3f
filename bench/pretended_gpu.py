"""One GPU that is not there, for code that generates code: answers to what torch and Triton ask of a driver.

Nothing can be allocated or launched on it, and a process that pretends cannot stop to: caches remember the answers.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

# What Inductor and Triton ask of a device, as an H200 answers.
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=139 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=60 * 2**20,
)


def pretend() -> None:
    """Make this process see one H200, and none of the GPUs there may be.

    FakeTensorMode by itself traces CUDA tensors where there is no GPU. What is left is what Dynamo and Inductor ask of
    the driver, and autograd's engine, which looks for the device's streams: `gradients` takes its place.

    Raises:
        RuntimeError: the process has used a GPU.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("this process has used a GPU: pretend there is one in another")
    # Before torch first asks for devices: the answer is kept.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.pad_mm as padding
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.cuda.graphs as cuda_graphs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    core: Any = torch._C
    core._ensureCUDADeviceGuardSet()
    for owner, name, value in (
        (core, "_cuda_getDeviceCount", lambda: 1),
        (core, "_cuda_getDevice", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "_initialized", True),
        (torch.cuda, "_exchange_device", lambda device: 0),
        (torch.cuda, "_maybe_exchange_device", lambda device: 0),
        (torch.cuda, "_get_device_properties", lambda device: H200),
        # Dynamo saves and restores the states of random generators around tracing.
        (torch.cuda, "default_generators", (torch.Generator(),)),
        (cuda_graphs, "_cuda_isCurrentStreamCapturing", lambda: False),
        # Would allocate, for the engine to find streams.
        (fake_tensor, "init_gpu_context", lambda device: None),
        (torch.autograd, "grad", gradients),
        # Without a driver torch takes its own convolutions, whose results are contiguous: 2 passes more an SE block.
        (core, "_select_conv_backend", lambda *_, **__: core._ConvBackend.Cudnn),
        # These make patterns, of attention and of padded matrix products, from tensors that they allocate.
        (attention, "_sfdp_init", lambda *_, **__: None),
        (padding, "_pad_mm_init", lambda *_, **__: None),
    ):
        setattr(owner, name, value)
    target = GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, is_active=lambda: True))


def move_to_fake_cuda(module: nn.Module, layout: torch.memory_format) -> None:
    """Replace parameters and buffers, those of four dimensions in the given layout, inside FakeTensorMode.

    Module.to() cannot: it keeps a parameter's identity, and a real tensor does not become a fake one.
    """
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            strides = layout if tensor.dim() == 4 else torch.contiguous_format
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", memory_format=strides)
            setattr(part, name, nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], **_: Any
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad without its engine: the same nodes, newest first, on this thread and no stream.

    Hooks do not run, and functions written in Python get None for a gradient that is not there, as they do after
    ``ctx.set_materialize_grads(False)``. Inputs that the outputs do not depend on get None.
    """
    sources, targets = ([get_gradient_edge(tensor) for tensor in tensors] for tensors in (outputs, inputs))
    nodes: set[Node] = set()
    stack = [edge.node for edge in sources]
    while stack:
        node = stack.pop()
        if node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions if following is not None)
    # A node is newer than those it leads to. Only nodes that lead to an input run: others may be unable to.
    leading = {edge.node for edge in targets}
    needed: list[Node] = []
    for node in sorted(nodes, key=_age):
        if any(following in leading for following, _ in node.next_functions):
            needed.append(node)
            leading.add(node)
    sums: dict[tuple[Node | None, int], Tensor] = {}

    def add(node: Any, index: int, gradient: Tensor) -> None:
        wanted = node._input_metadata[index]
        gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
        sums[node, index] = sums[node, index] + gradient if (node, index) in sums else gradient

    with torch.no_grad():
        for edge, gradient in zip(sources, grad_outputs, strict=True):
            add(edge.node, edge.output_nr, gradient)
        for node in reversed(needed):
            for (following, index), result in _call(node, sums):
                if following is not None and result is not None:
                    add(following, index, result)
    return tuple(sums.get((edge.node, edge.output_nr)) for edge in targets)


def _age(node: Any) -> int:
    return node._sequence_nr()


def _call(
    node: Any, sums: dict[tuple[Node | None, int], Tensor]
) -> list[tuple[tuple[Node | None, int], Tensor | None]]:
    """Edges to the nodes that follow, and the gradients that go there."""
    arguments = [sums.get((node, index)) for index in range(len(node._input_metadata))]
    if all(argument is None for argument in arguments):
        return []
    is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    results = (node.apply if is_python else node)(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    if not is_python:
        return list(zip(node.next_functions, results, strict=False))
    # One result for each argument of forward(), one edge for each that was a tensor.
    wanted = [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
    return list(zip([edge for edge in node.next_functions if edge[0] is not None], wanted, strict=True))
