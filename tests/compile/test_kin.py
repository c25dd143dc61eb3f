"""What is kin to an SE block is told and left alone; what only looks like arithmetic on maps is not told."""

import pytest
import torch
import torch.nn.functional as F
from graphs import rewriting
from torch import Tensor, nn

from setriton.compile.report import CompileReport, compile_report, reset_compile_report

pytestmark = pytest.mark.usefixtures("one_thread")
C, R = 4, 3


class Kin(nn.Module):
    """Layers that the functions below share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(C, R), nn.Linear(R, C)
        self.branches = nn.Linear(R, 2 * C)
        self.attention, self.norm = nn.Conv2d(C, 1, 1), nn.LayerNorm(R)
        self.weight = nn.Parameter(torch.rand(1, C, 1, 1))

    def excited(self, q: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.gelu(self.fc1(q))))


def one_axis(s: Kin, x: Tensor) -> Tensor:
    x = x.flatten(2)
    return x * s.excited(x.mean(2))[..., None]


def one_axis_pooled(s: Kin, x: Tensor) -> Tensor:
    x = x.flatten(2)
    return x * s.excited(F.adaptive_avg_pool1d(x, 1).squeeze(-1)).unsqueeze(-1)


def three_axes(s: Kin, x: Tensor) -> Tensor:
    x = torch.stack([x, x + 1], 2)
    return x * s.excited(x.mean((2, 3, 4))).view(-1, C, 1, 1, 1)


def selective_kernel(s: Kin, x: Tensor) -> Tensor:
    x = torch.stack([x, x.flip(2)], 1)
    q = F.gelu(s.fc1(x.sum(1).mean((2, 3))))
    return (x * s.branches(q).view(-1, 2, C, 1, 1).softmax(1)).sum(1)


def split_attention(s: Kin, x: Tensor) -> Tensor:
    return selective_kernel(s, x).relu()


def global_context(s: Kin, x: Tensor) -> Tensor:
    n = x.shape[0]
    attended = s.attention(x).view(n, 1, -1, 1).softmax(2)
    context = (x.flatten(2).unsqueeze(1) @ attended).view(n, C)
    return x + s.fc2(F.relu(s.norm(s.fc1(context)))).view(n, C, 1, 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (one_axis, "a map of 3 axes, not 4"),
        (one_axis_pooled, "a map of 3 axes, not 4"),
        (three_axes, "a map of 5 axes, not 4"),
        (selective_kernel, "a gate for each of several branches"),
        (split_attention, "a gate for each of several branches"),
        (global_context, "what is made of the map's context is added to it"),
    ],
)
def test_kin_is_told(body: object, reason: str) -> None:
    assert [match.reason for match in found(body)] == [reason]


def rms_norm(s: Kin, x: Tensor) -> Tensor:
    x = s.fc2(s.fc1(x.flatten(2).transpose(1, 2)))
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_scale(s: Kin, x: Tensor) -> Tensor:
    return x + s.weight * F.relu(x)


def instance_norm(s: Kin, x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).sum((2, 3), keepdim=True) + 1e-6)


@pytest.mark.parametrize("body", [rms_norm, layer_scale, instance_norm])
def test_what_is_no_kin_is_not_told(body: object) -> None:
    assert found(body) == []


def found(body: object) -> CompileReport:
    """What is said of a function, the results of which are eager's."""
    torch._dynamo.reset()
    reset_compile_report()
    module = Kin()
    x = torch.randn(2, C, 2, 3)
    assert callable(body)
    torch.testing.assert_close(torch.compile(body, backend=rewriting, fullgraph=True)(module, x), body(module, x))
    return compile_report()
