"""Functions of the parts of a block, compiled with blocks replaced and nothing else done, and compared with eager."""

from collections.abc import Callable

import graphs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setriton.compile.report import CompileReport, compile_report, reset_compile_report

N, C, R, H, W = 2, 4, 3, 2, 3


class Parts(nn.Module):
    """BN, the layers of an SE block with GELU between, and a convolution; `body(self, x, r)` is what is tried."""

    def __init__(self, body: "Body") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.conv = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
        self.fc1, self.fc2 = nn.Conv2d(C, R, 1), nn.Conv2d(R, C, 1)
        self.body = body
        graphs.randomize(self)
        self.double()

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.body(self, x, r)

    def gate(self, x: Tensor) -> Tensor:
        """One number for each channel of x."""
        return torch.sigmoid(self.fc2(F.gelu(self.fc1(x.mean((2, 3), keepdim=True)))))


Body = Callable[[Parts, Tensor, Tensor], Tensor]


def _outcome(module: nn.Module, run: Callable[..., Tensor], shape: tuple[int, ...], grad: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x, r = (torch.randn(shape, dtype=torch.float64, requires_grad=grad) for _ in range(2))
    torch.manual_seed(2)
    with torch.set_grad_enabled(grad):
        y = run(x, r)
    seen = {"result": y.detach(), "x": x.detach(), "r": r.detach()}
    seen |= {f"{name} afterwards": b.detach().clone() for name, b in module.state_dict().items()}
    if grad:
        leaves = {"x": x, "r": r} | dict(module.named_parameters())
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
        found = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True)
        seen |= {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return seen


def compared(
    body: Body,
    *,
    grad: bool = False,
    shapes: tuple[tuple[int, ...], ...] = ((N, C, H, W),),
    dynamic: bool | None = None,
) -> CompileReport:
    """What was found in a body whose results, gradients, and writes are eager's."""
    torch._dynamo.reset()
    reset_compile_report()
    module, twin = Parts(body), Parts(body)
    compiled = torch.compile(twin, backend=graphs.rewriting, fullgraph=True, dynamic=dynamic)
    for shape in shapes:
        want, found = _outcome(module, module, shape, grad), _outcome(twin, compiled, shape, grad)
        assert want.keys() == found.keys()
        for name, a in want.items():
            assert (a.shape, a.stride()) == (found[name].shape, found[name].stride()), name
            torch.testing.assert_close(found[name], a, rtol=1e-9, atol=1e-9, msg=name)
    return compile_report()
