"""Writes between the parts of a block, by every kind of alias, and what later nodes write: nothing of it is lost."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import rewriting
from parts import Body, C, H, N, Parts, W, compared
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from setriton.compile.report import compile_report, reset_compile_report

Write = Callable[[Tensor], object]

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.library.custom_op("setriton_tests::halve_", mutates_args=("x",))
def halve_(x: Tensor) -> None:
    """Write by an operation that PyTorch knows only by its schema."""
    x.mul_(0.5)


def _foreach(v: Tensor) -> None:
    torch._foreach_add_([v], 1.0)


def _without_grad(v: Tensor) -> None:
    with torch.no_grad():
        v.add_(1.0)


WRITES: dict[str, Write] = {
    "itself": lambda v: v.add_(1.0),
    "slice": lambda v: v[:, :3].relu_(),
    "index": lambda v: v[0, 1].mul_(0.5),
    "assignment": lambda v: v.__setitem__((slice(None), 0), 0.25),
    "view": lambda v: v.view(v.size(0), -1).add_(1.0),
    "reshape": lambda v: v.reshape(-1).mul_(0.5),
    "flatten": lambda v: v.flatten(1).add_(1.0),
    "detach": lambda v: v.detach().add_(1.0),
    "data": lambda v: v.data.add_(1.0),
    "chunk": lambda v: v.chunk(2, 1)[0].mul_(0.5),
    "split": lambda v: torch.split(v, 2, 1)[1].mul_(0.5),
    "unbind": lambda v: v.unbind(0)[0].mul_(0.5),
    "transpose": lambda v: v.transpose(0, 1).mul_(0.5),
    "permute": lambda v: v.permute(0, 2, 3, 1).mul_(0.5),
    "mT": lambda v: v.mT.mul_(0.5),
    "narrow": lambda v: v.narrow(1, 0, 2).zero_(),
    "select": lambda v: v.select(1, 0).fill_(0.5),
    "diagonal": lambda v: v.diagonal(0, 2, 3).zero_(),
    "unfold": lambda v: v.unfold(1, 2, 2).mul_(0.5),
    "as_strided": lambda v: v.as_strided((3,), (1,)).mul_(0.5),
    "contiguous": lambda v: v.contiguous().add_(1.0),
    "to its dtype": lambda v: v.to(torch.float64).add_(1.0),
    "to its device": lambda v: v.to("cpu").mul_(0.5),
    "type_as": lambda v: v.type_as(v).mul_(0.5),
    "double": lambda v: v.double().mul_(0.5),
    "expand": lambda v: v.expand_as(v).mul_(0.5),
    "unsqueeze": lambda v: v.unsqueeze(0).add_(1.0),
    "other bits": lambda v: v.view(torch.int64).zero_(),
    "foreach": _foreach,
    "out": lambda v: torch.add(v, 1.0, out=v),
    "out, of a view": lambda v: torch.neg(v.view(-1), out=v.view(-1)),
    "copy_": lambda v: v.copy_(v.flip(1)),
    "index_put_": lambda v: v.index_put_((torch.tensor([0]),), torch.tensor(0.5, dtype=v.dtype)),
    "masked_fill_": lambda v: v.masked_fill_(v > 0.1, 0.2),
    "leaky_relu": lambda v: F.leaky_relu(v, 0.1, True),
    "dropout": lambda v: F.dropout(v, 0.5, True, True),
    "scatter_": lambda v: v.scatter_(1, torch.zeros(N, 1, H, W, dtype=torch.long), 2.0),
    "indexed": lambda v: v.__setitem__(torch.tensor([0]), 0.5),
    "uniform_": lambda v: v.uniform_(),
    "foreach copy": lambda v: torch._foreach_copy_([v], [v.flip(1)]),
    "set_": lambda v: v.set_(v.flip(1)),  # type: ignore[call-overload]
    "transpose_": lambda v: v.transpose_(2, 3).mul_(0.5).transpose_(2, 3),
    "checkpoint": lambda v: checkpoint(lambda t: t.add_(1.0), v, use_reentrant=False),
    "aten": lambda v: torch.ops.aten.mul_.Scalar(v, 0.5),
    "an operation of others": halve_,
    "without gradients": _without_grad,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_map_written_before_the_product(write: Write) -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = x * 1.0
        e = s.gate(z)
        write(z)
        return z * e + r

    assert compared(body).replaced == []


@pytest.mark.parametrize("name", ["slice", "data", "contiguous", "foreach", "out, of a view"])
def test_other_inputs_written_on_the_way(name: str) -> None:
    write = WRITES[name]

    def input_of_bn(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = x * 1.0
        y = s.bn(z)
        e = s.gate(y)
        write(z)
        return y * e

    def output_of_bn(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = s.bn(x)
        e = s.gate(y)
        write(y)
        return y * e

    def residual(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        k = r * 1.0
        y = s.bn(x)
        o = y * s.gate(y) + k
        write(k)
        return F.relu(o) + k

    def product(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = s.bn(x)
        o = y * s.gate(y)
        write(o)
        return F.relu(o + r)

    assert [match.kind for match in compared(input_of_bn).replaced] == ["se"]
    assert compared(output_of_bn).replaced == []
    assert [match.kind for match in compared(residual).replaced] == ["bn_se+add"]
    assert [match.kind for match in compared(product).replaced] == ["bn_se"]


@pytest.mark.parametrize("name", ["itself", "slice", "data", "detach", "foreach"])
def test_weights_written_before_the_product(name: str) -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        e = s.gate(x)
        with torch.no_grad():
            WRITES[name](s.fc1.weight)
        return x * e

    assert compared(body).replaced == []


def test_a_part_written_by_the_product() -> None:
    def part(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = torch.cat([x, r], 1)
        a = z[:, :C]
        a *= s.gate(a)
        return z

    def view_as_residual(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = x * 1.0
        k = y.view(N, C, H, W)
        y *= s.gate(y)
        return y + k

    def given(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        k = x.view(N, C, H, W)
        k *= s.gate(k)
        return k * 2.0

    def gate_again(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        z = s.fc1(x.mean((2, 3), keepdim=True))
        return x * torch.sigmoid(s.fc2(z * z.sigmoid_()))

    for body in (part, view_as_residual, given, gate_again):
        report = compared(body)
        assert (len(report.left), report.replaced) == (1, []), body.__name__


def test_inputs_that_share_memory() -> None:
    """What another input is written to may be a view of the map, at this call or a later one."""

    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        e = s.gate(x)
        r.add_(1.0)
        return x * e

    module, twin = Parts(body), Parts(body)
    torch._dynamo.reset()
    reset_compile_report()
    compiled = torch.compile(twin, backend=rewriting, fullgraph=True)
    with torch.no_grad():
        for other in (torch.ones_like, lambda x: x, lambda x: x[:, :2], lambda x: x.view(-1)):
            x = torch.linspace(-1, 1, N * C * H * W, dtype=torch.float64).view(N, C, H, W)
            y = x.clone()
            torch.testing.assert_close(compiled(x, other(x)), module(y, other(y)))
            torch.testing.assert_close(x, y)
    assert not compile_report().replaced


@pytest.mark.parametrize("norm", [False, True])
def test_inputs_that_share_memory_at_a_later_call(norm: bool) -> None:
    """Shapes are the same, so that nothing is compiled again."""

    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = s.bn(x) if norm else x
        e = s.gate(y)
        r.mul_(2.0)
        return y * e

    module, twin = Parts(body).eval(), Parts(body).eval()
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend=rewriting, fullgraph=True)
    with torch.no_grad():
        for share in (torch.ones_like, lambda x: x.view_as(x), lambda x: x.detach()):
            x = torch.linspace(-1, 1, N * C * H * W, dtype=torch.float64).view(N, C, H, W)
            y = x.clone()
            torch.testing.assert_close(compiled(x, share(x)), module(y, share(y)))


@pytest.mark.parametrize("offset", [0, 3])
def test_a_part_that_is_written_and_read_past_its_end(offset: int) -> None:
    def multiplied(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        a = torch.cat([x, r], 0)[N:]
        a *= s.gate(a)
        return a.as_strided(a.shape, a.stride(), offset)

    def added(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        a = torch.cat([x, r], 0)[N:]
        a += x * s.gate(x)
        return a.as_strided(a.shape, a.stride(), offset)

    for body in (multiplied, added):
        for grad in (False, True):
            compared(body, grad=grad)


def _mapped(s: Parts, x: Tensor, r: Tensor) -> Tensor:
    def norm_and_excite(t: Tensor) -> Tensor:
        y = F.batch_norm(t, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)
        return y * s.gate(y)

    return torch.vmap(norm_and_excite)(torch.stack([x, r]))


TRANSFORMED: dict[str, Body] = {
    "vmap": _mapped,
    "grad": lambda s, x, r: torch.func.grad(lambda t: (t * s.gate(t)).sum())(x),
    "vjp": lambda s, x, r: torch.func.vjp(lambda t: t * s.gate(t), x)[1](r)[0],
    "jvp": lambda s, x, r: torch.func.jvp(lambda t: t * s.gate(t), (x,), (r,))[1],
}


@pytest.mark.parametrize("body", TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_function_transforms(body: Body) -> None:
    assert {match.reason for match in compared(body)} == {"inside of a function transform"}


def test_what_cannot_be_run_without_data_may_write_all() -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = x * 1.0
        e = s.gate(y)
        k = torch.cond(y.sum() > 0, lambda t: t + 1, lambda t: t - 1, (y,))
        return y * e + k

    assert [match.reason for match in compared(body)] == ["cond changes an input of the block in place"]


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1, True),
    "elu": lambda y: F.elu(y, 1.0, True),
    "dropout2d": lambda y: F.dropout2d(y, 0.5, True, True),
    "slice": lambda y: y[:, :2].mul_(0.5),
    "detached": lambda y: y.detach().mul_(0.5),
    "threshold": lambda y: F.threshold(y, 0.1, 0.2, True),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_results_of_two_readers_that_one_writes(reader: Callable[[Tensor], Tensor]) -> None:
    def body(s: Parts, x: Tensor, r: Tensor) -> Tensor:
        y = s.bn(x)
        o = y * s.gate(y) + r
        h = reader(o)
        return s.conv(h).sum() + o.sin() if h.shape[1] == C else o.sin() + h.sum()

    assert [match.kind for match in compared(body, grad=True).replaced] == ["bn_se+add"]
