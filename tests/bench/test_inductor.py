"""Inductor's code for the blocks as users write them, and the gradients that stand in for autograd's engine."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import setriton
from setriton.bench import inductor, pretended_gpu
from setriton.bench.inductor import AS_WRITTEN, Block, generated_code

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA")


@needs_cuda_build
def test_interior_block_of_a_chain() -> None:
    found = generated_code(AS_WRITTEN["BN, SE, + residual, ReLU"], training=True)
    # Of torch 2.11 and of 2.15.
    expected = {"forward": 7.09, "backward": 18.07}
    assert {direction: code.passes for direction, code in found.items()} == pytest.approx(expected, abs=0.1)
    for code in found.values():
        # The SE block's two convolutions, which move next to nothing; the chain's own is not counted.
        assert code.extern_kernels == 2
        assert code.extern_passes < 0.01
        assert code.triton_kernels > 2


@needs_cuda_build
def test_a_custom_op_is_one_extern_kernel() -> None:
    block = Block(functools.partial(setriton.BatchNormSqueezeExcite, out_act="relu"), residual=True)
    code = generated_code(block, training=True, in_chain=False)
    # Maps in and out, and a mask of a bit an element; no kernel of Inductor's touches a map.
    assert code["forward"].extern_passes == pytest.approx(3 + 1 / 16, abs=0.01)
    assert code["backward"].extern_passes == pytest.approx(4 + 1 / 16, abs=0.01)
    for direction in code.values():
        assert direction.extern_kernels == 1
        assert direction.passes - direction.extern_passes < 0.01


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(TypeError, match="block must be a Block"):
        generated_code(nn.ReLU, training=False)
    with pytest.raises(TypeError, match=r"block\.make must be picklable"):
        generated_code(Block(lambda channels: nn.ReLU()), training=False)
    with pytest.raises(ValueError, match=r"shape must be N, C, H, W, .* got \(2, 3\)"):
        generated_code(AS_WRITTEN["SE"], training=False, shape=(2, 3))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="needs a torch built for CUDA"):
        generated_code(AS_WRITTEN["SE"], training=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(inductor, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        generated_code(AS_WRITTEN["SE"], training=False)


@needs_cuda_build
def test_what_fails_in_the_child_is_raised_here() -> None:
    # A block of two maps gets one.
    with pytest.raises(RuntimeError, match=r"no code for Block.*ResidualTail"):
        generated_code(Block(inductor.ResidualTail), training=False, in_chain=False, shape=(1, 16, 4, 4))


def test_a_process_that_used_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(RuntimeError, match="has used a GPU"):
        pretended_gpu.pretend()


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, x: Tensor, y: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        assert dsum is None
        x, y = ctx.saved_tensors
        return None, dproduct * y, dproduct * x, None


def test_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    block = inductor.ResidualTail(16)
    x, residual, unused = (torch.randn(2, 16, 3, 5, requires_grad=True) for _ in range(3))
    y = block(x.relu(), residual)
    # A node written in Python, broadcasting, another dtype, and an input in the middle of the graph.
    product, _ = TwoResults.apply(2.0, y, residual, torch.ones(1))
    outputs = [product.to(torch.bfloat16) * x[:1, :, :1], y.sum()]
    inputs = [x, residual, y, unused, *block.parameters()]
    dy = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, inputs, dy, retain_graph=True, allow_unused=True)
    for ours, theirs in zip(pretended_gpu.gradients(outputs, inputs, dy), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
