"""The custom ops with real kernels behind them: registration, torch.compile, export, offsets past 2**31 elements."""

import pytest
import torch
import triton
import triton.language as tl
from oracle import make_inputs
from torch import nn

from setriton import SqueezeExcite, ops
from setriton.kernels import primitives
from setriton.kernels.layout import geometry


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(device: torch.device, bias: bool, channels_last: bool) -> None:
    inputs = make_inputs(3, 20, 2, 5, 6, torch.float32, channels_last=channels_last, bias=bias)
    *arguments, dy = (None if t is None else t.to(device) for t in inputs)
    leaves = [None if t is None else t.clone().requires_grad_() for t in arguments]
    torch.library.opcheck(ops.squeeze_excite, (*leaves, "relu", "sigmoid"))
    x, w1, _, w2, _ = arguments
    _, *saved = ops.squeeze_excite(*arguments, "relu", "sigmoid")
    torch.library.opcheck(ops.squeeze_excite_backward, (dy, x, w1, w2, *saved, "relu", "sigmoid"))


class ConvSE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, padding=1)
        self.se = SqueezeExcite(24, 1 / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.se(self.conv(x)))


def test_compiled_training_step(device: torch.device) -> None:
    """Full graph, any batch size from two compilations, the same numbers as eager."""
    torch._dynamo.reset()
    model = ConvSE().to(device)
    compiled = torch.compile(model, fullgraph=True)
    for index, batch in enumerate((2, 3, 5, 4)):
        x = torch.randn(batch, 4, 6, 6, device=device, requires_grad=True)
        leaves = [x, *model.parameters()]
        with torch._dynamo.config.patch(error_on_recompile=index >= 2):
            found = compiled(x)
        want = model(x)
        torch.testing.assert_close(found, want)
        assert found.stride() == want.stride()
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exported_program_holds_one_node(device: torch.device) -> None:
    model, x = ConvSE().to(device), torch.randn(4, 4, 6, 6, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert [str(n.target) for n in program.graph.nodes if "setriton" in str(n.target)] == [
        "setriton.squeeze_excite.default"
    ]
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


@triton.jit
def _offsets_kernel(out_ptr, n, HW, C, row):
    tl.store(out_ptr, primitives.image_offset(tl.program_id(0) + n, HW, C))
    offs = primitives.tile_offsets(row + tl.arange(0, 2), tl.arange(0, 2), C, 1, WIDE=True)
    tl.store(out_ptr + 1, tl.max(tl.max(offs, axis=1), axis=0))


def test_offsets_past_31_bits(device: torch.device) -> None:
    out = torch.zeros(2, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, 3, 2**20, 2**10, 2**22)
    assert out.tolist() == [3 * 2**30, (2**22 + 1) * 2**10 + 1]


@pytest.mark.parametrize(("height", "wide"), [(2**10, False), (2**12, True)])
def test_wide_offsets_are_asked_for(height: int, wide: bool) -> None:
    x = torch.empty(1, 2**10, height, 2**10, device="meta")
    assert geometry(x)["WIDE"] is wide
