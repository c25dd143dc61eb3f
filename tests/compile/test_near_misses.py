"""Arguments that change an operation, parts taken for the whole, strides and sizes: found right or left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parts import Body, C, H, N, Parts, R, W, compared
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def vectors(s: Parts, q: Tensor) -> Tensor:
    """The excitation of (N, C), before its gate."""
    return F.linear(F.gelu(F.linear(q, s.fc1.weight.flatten(1), s.fc1.bias)), s.fc2.weight.flatten(1), s.fc2.bias)


def excite(s: Parts, q: Tensor) -> Tensor:
    return torch.sigmoid(vectors(s, q))[:, :, None, None]


def logits(s: Parts, x: Tensor) -> Tensor:
    return s.fc2(F.gelu(s.fc1(x.mean((2, 3), keepdim=True))))


def _out(s: Parts, x: Tensor, r: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    torch.mul(x, s.gate(x), out=buffer)
    return buffer


def _into_residual(s: Parts, x: Tensor, r: Tensor) -> Tensor:
    k = r * 1.0
    k.addcmul_(x, s.gate(x))
    return k + 1.0


def _addcmul_of_itself(s: Parts, x: Tensor, r: Tensor) -> Tensor:
    y = s.bn(x)
    return torch.addcmul(y, y, s.gate(y))


def _addcmul_of_the_gate(s: Parts, x: Tensor, r: Tensor) -> Tensor:
    e = s.gate(x)
    return torch.addcmul(e, x, e)


def _bias(beta: float = 1.0, alpha: float = 1.0) -> Body:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = F.gelu(torch.addmm(s.fc1.bias, x.mean((2, 3)), s.fc1.weight.flatten(1).t(), beta=beta, alpha=alpha))
        return x * torch.sigmoid(F.linear(z, s.fc2.weight.flatten(1)))[..., None, None]

    return body


def _matrix(shape: tuple[int, ...]) -> Body:
    """A layer that adds another tensor than a bias."""

    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        added = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=x.dtype).view(shape)
        z = F.gelu(torch.addmm(added, x.mean((2, 3)), s.fc1.weight.flatten(1).t()))
        return x * torch.sigmoid(F.linear(z, s.fc2.weight.flatten(1)))[..., None, None]

    return body


REFUSED: dict[str, Body] = {
    "half a bias": lambda s, x, r: x
    * torch.sigmoid(torch.add(F.conv2d(F.gelu(s.fc1(x.mean((2, 3), keepdim=True))), s.fc2.weight),
                              s.fc2.get_parameter("bias").view(1, C, 1, 1), alpha=0.5)),
    "thrice two": lambda s, x, r: x * (F.relu6(torch.add(logits(s, x), 3, alpha=2)) / 6),
    "rounded": lambda s, x, r: x * torch.div(F.relu6(logits(s, x) + 3), 6, rounding_mode="trunc"),
    "masked": lambda s, x, r: x * excite(s, torch.masked.mean(x, (2, 3), mask=x > 0.1).nan_to_num(0.0)),
    "of the residual": _into_residual,
    "out": _out,
    "half of addmm": _bias(beta=0.5),
    "twice addmm": _bias(alpha=2.0),
    "value": lambda s, x, r: torch.addcmul(r, x, s.gate(x), value=2),
    "a row": lambda s, x, r: x * excite(s, x[:, :, 0].mean(-1)),
    "a column": lambda s, x, r: x * excite(s, x[..., 1].mean(-1)),
    "over the batch": lambda s, x, r: x * excite(s, x.reshape(1, C, -1).mean(2)),
    "over the batch, expanded": lambda s, x, r: x * excite(s, x.reshape(1, C, -1).mean(2).expand(N, -1)),
    "other axes flattened": lambda s, x, r: x * excite(s, x.reshape(N, W, H, C).mean((1, 2))),
    "padded": lambda s, x, r: x * excite(s, F.avg_pool2d(x, (H, W), padding=1, stride=9).flatten(1)),
    "another divisor": lambda s, x, r: x * excite(s, F.avg_pool2d(x, (H, W), divisor_override=5).flatten(1)),
    "the first image": lambda s, x, r: x * s.gate(x)[:1],
    "the gate's gate": lambda s, x, r: _addcmul_of_the_gate(s, x, r),
    "other bits": lambda s, x, r: x * torch.sigmoid(logits(s, x).view(torch.int64).to(x.dtype) * 1e-19),
    "a matrix": _matrix((N, R)),
    "one number": _matrix((1,)),
    "a number for each image": _matrix((N, 1)),
    "without gradients": lambda s, x, r: x * _without_gradients(s, x),
    "another dtype": lambda s, x, r: x * s.gate(x).float(),
    "nearly a sixth": lambda s, x, r: x * (F.relu6(logits(s, x) + 3) * 0.1666667),
}  # fmt: skip


def _without_gradients(s: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        return s.gate(x)


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_near_misses_are_left_alone(body: Body) -> None:
    assert compared(body, grad=body is not REFUSED["out"]).replaced == []


def test_a_gate_that_widens_the_batch() -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        return x * s.gate(x).expand(5, -1, -1, -1)

    assert compared(body, grad=True, shapes=((1, C, H, W),)).replaced == []


def test_addcmul_of_the_map_itself() -> None:
    report = compared(_addcmul_of_itself, grad=True)
    assert [(match.kind, match.note) for match in report.replaced] == [("se+add", "BN's output is read elsewhere")]


@pytest.mark.parametrize(
    "names", [("running_mean", "running_var", "running_mean"), ("running_var", "running_var", "bias")]
)
def test_statistics_that_are_something_else_as_well(names: tuple[str, str, str]) -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        mean, var, weight = (getattr(s.bn, name) for name in names)
        y = F.batch_norm(x, mean, var, weight, None, True)
        return y * s.gate(y)

    assert [match.kind for match in compared(body)] == ["se"]


@pytest.mark.parametrize("bound", [3.0, -3.0])
@pytest.mark.parametrize("clip", [lambda z: z.clamp(0, 6), F.relu6, lambda z: F.hardtanh(z, 0, 6)])
def test_gates_that_start_at_a_bound(clip: Callable[[Tensor], Tensor], bound: float) -> None:
    """What a clip's gradient is there, torch 2.11 and 2.14 do not agree on."""

    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = F.gelu(s.fc1(x.mean((2, 3), keepdim=True)))
        weight, bias = s.fc2.weight, s.fc2.get_parameter("bias")
        return x * (clip(F.conv2d(z, weight - weight.detach(), bias - bias.detach() + bound) + 3) / 6)

    compared(body, grad=True)


FOUND: dict[str, Body] = {
    "a sixth": lambda s, x, r: x * (F.relu6(logits(s, x) + 3) * (1 / 6)),
    "number first": lambda s, x, r: x * (F.relu6(3 + logits(s, x)) / 6),
    "hard gate, factor first": lambda s, x, r: x * ((1 / 6) * F.relu6(3.0 + logits(s, x))),
    "row bias": lambda s, x, r: x
    * torch.sigmoid(torch.addmm(s.fc2.get_parameter("bias")[None],
                                F.gelu(F.linear(x.mean((2, 3)), s.fc1.weight.flatten(1))),
                                s.fc2.weight.flatten(1).t()))[:, :, None, None],
    "of a chunk": lambda s, x, r: _of_a_chunk(s, torch.cat([x, r], 1)),
    "transposed": lambda s, x, r: _in_strides(s, x.transpose(2, 3).contiguous().transpose(2, 3)),
    "mixed layouts": lambda s, x, r: s.bn(x.contiguous(memory_format=torch.channels_last)) * s.gate(x) + r,
    "residual in other strides": lambda s, x, r: x * s.gate(x) + r.contiguous(memory_format=torch.channels_last),
}  # fmt: skip


def _of_a_chunk(s: Parts, z: Tensor) -> Tensor:
    a = z.chunk(2, 1)[0]
    return (a * s.gate(a)).view(N, -1)


def _in_strides(s: Parts, z: Tensor) -> Tensor:
    return z * s.gate(z)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("grad", [False, True], ids=["evaluation", "training"])
def test_results_have_their_strides(name: str, grad: bool) -> None:
    report = compared(FOUND[name], grad=grad)
    wrong = {"transposed": "strides", "mixed layouts": "another map"}.get(name)
    assert len(report) == 1
    assert report[0].reason is None if wrong is None else wrong in str(report[0].reason)


SIZES: dict[str, Body] = {
    "size": lambda s, x, r: x * excite(s, F.avg_pool2d(x, x.size()[2:]).flatten(1)),
    "shape": lambda s, x, r: x * excite(s, F.avg_pool2d(x, x.shape[2:]).flatten(1)),
    "by name": lambda s, x, r: x * excite(s, F.avg_pool2d(x, kernel_size=x.size()[-2:]).flatten(1)),
    "each": lambda s, x, r: x * excite(s, F.avg_pool2d(x, (x.size(2), x.size(3))).flatten(1)),
    "views": lambda s, x, r: x * excite(s, x.view(x.size(0), x.size(1), -1).mean(2)),
    "product": lambda s, x, r: x * excite(s, x.reshape(x.shape[0], C, x.shape[2] * x.shape[3]).mean(-1)),
    "of BN": lambda s, x, r: _of_bn(s, s.bn(x)) + r,
    "no norm": lambda s, x, r: F.relu(x * s.gate(x) + r),
}


def _of_bn(s: Parts, y: Tensor) -> Tensor:
    return y * excite(s, F.avg_pool2d(y, y.size()[2:]).view(y.size(0), y.size(1)))


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes(name: str) -> None:
    """The first graph is of fixed sizes, the second of symbols; a third size is the second's."""
    shapes = ((N, C, H, W), (N + 1, C, H + 2, W + 3), (N + 3, C, H + 4, W + 1))
    report = compared(SIZES[name], grad=True, shapes=shapes)
    assert len(report) > 1  # average pools may guard sizes, and be compiled a third time
    assert {match.reason for match in report} == {None}
    assert len({match.kind for match in report}) == 1


def test_symbolic_channels() -> None:
    """Nothing names a symbol that another graph has not."""

    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        return F.relu(x * s.gate(x) + r)

    assert [match.kind for match in compared(body, grad=True, dynamic=True)] == ["se+add+relu"]
