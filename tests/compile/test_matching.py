"""Spellings of SE blocks and of the tails around them, and what looks like one and is none."""

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, R = 16, 4
Function = Callable[..., Tensor]


class Block(nn.Module):
    """BN and the layers of an SE block; `body(self, x, ...)` is what is tried."""

    def __init__(self, body: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv1, self.conv2 = nn.Conv2d(C, R, 1), nn.Conv2d(R, C, 1)
        self.fc1, self.fc2 = nn.Linear(C, R), nn.Linear(R, C)
        self.body = body
        graphs.randomize(self)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(self, *inputs)


def compared(body: Function, n_inputs: int = 1, training: bool = True, **options: Any) -> Any:
    torch.manual_seed(1)
    inputs = [torch.randn(3, C, 5, 4, dtype=torch.float64) for _ in range(n_inputs)]
    return graphs.compare(Block(body).train(training), *inputs, **options)


def kinds(report: Any) -> list[str]:
    return [match.kind for match in report.replaced]


def excite(s: Block, q: Tensor) -> Tensor:
    """Of a squeezed map (N, C, 1, 1)."""
    return torch.sigmoid(s.conv2(F.relu(s.conv1(q))))


def se(s: Block, x: Tensor) -> Tensor:
    return x * excite(s, x.mean((2, 3), keepdim=True))


SQUEEZES: dict[str, Function] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "mean of a list, from the last": lambda x: x.mean([-1, -2], keepdim=True),
    "mean, then axes": lambda x: x.mean(dim=(2, 3))[:, :, None, None],
    "torch.mean": lambda x: torch.mean(x, dim=[2, 3], keepdim=True),
    "numpy's names": lambda x: torch.mean(x, axis=(2, 3), keepdim=True),  # type: ignore[call-overload]
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive, two sizes": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "average pool": lambda x: F.avg_pool2d(x, (5, 4)),
    "average pool of the map's size": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "of what was flattened": lambda x: x.flatten(2).mean(-1).view(3, C, 1, 1),
    "of a view": lambda x: x.view(3, C, -1).mean(dim=2, keepdim=True).unsqueeze(-1),
    "axis after axis": lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True),
    "axis after axis, dropped": lambda x: x.mean(2).mean(2).reshape(3, C, 1, 1),
    "contiguous": lambda x: F.adaptive_avg_pool2d(x, 1).contiguous(),
}


@pytest.mark.parametrize("squeeze", SQUEEZES.values(), ids=SQUEEZES.keys())
def test_squeezes(squeeze: Function) -> None:
    assert kinds(compared(lambda s, x: x * excite(s, squeeze(x)))) == ["se"]


LAYERS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "convolutions without biases": lambda s, q: F.conv2d(
        F.relu(F.conv2d(q, s.conv1.weight)), s.conv2.weight
    ),
    "linear": lambda s, q: s.fc2(F.relu(s.fc1(q.flatten(1))))[..., None, None],
    "linear without biases": lambda s, q: F.linear(
        F.relu(F.linear(q.view(3, C), s.fc1.weight)), s.fc2.weight
    ).view(3, C, 1, 1),
    "matmul": lambda s, q: (
        (F.relu(q.flatten(1) @ s.fc1.weight.t() + s.fc1.bias) @ s.fc2.weight.T) + s.fc2.bias
    ).reshape(3, C, 1, 1),
    "mm and addmm": lambda s, q: torch.addmm(
        s.fc2.bias, F.relu(torch.mm(q.flatten(1), s.fc1.weight.t())), s.fc2.weight.t()
    )[:, :, None, None],
    "einsum": lambda s, q: torch.einsum(
        "nr,cr->nc", F.relu(torch.einsum("nc,rc->nr", q.flatten(1), s.fc1.weight)), s.fc2.weight
    ).view(3, C, 1, 1),
    "einsum of maps, weights first": lambda s, q: torch.einsum(
        "cr,nrhw->nchw", s.fc2.weight, F.relu(torch.einsum("rc,nchw->nrhw", s.fc1.weight, q))
    ),
    "bias of a map": lambda s, q: F.conv2d(F.relu(F.conv2d(q, s.conv1.weight) + s.fc1.bias.view(1, R, 1, 1)),
                                           s.conv2.weight, s.conv2.bias),
    "convolution and linear": lambda s, q: s.fc2(F.relu(s.conv1(q)).flatten(1)).view(3, C, 1, 1),
    "dropout in evaluation": lambda s, q: s.conv2(F.dropout(F.relu(s.conv1(q)), 0.5, training=False)),
}  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS.keys())
def test_layers(layers: Callable[[Block, Tensor], Tensor]) -> None:
    report = compared(lambda s, x: x * torch.sigmoid(layers(s, x.mean((2, 3), keepdim=True))))
    assert [(match.kind, match.hidden) for match in report.replaced] == [("se", R)]


ACTS: dict[str, Function] = {
    "relu in place": lambda z: F.relu(z, inplace=True),
    "relu_": lambda z: z.relu_(),
    "silu": F.silu,
    "silu as written": lambda z: z * torch.sigmoid(z),
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "none": lambda z: z,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_acts(act: Function) -> None:
    def body(s: Block, x: Tensor) -> Tensor:
        return x * torch.sigmoid(s.conv2(act(s.conv1(x.mean((2, 3), keepdim=True)))))

    assert kinds(compared(body, tolerance=1e-7)) == ["se"]


GATES: dict[str, Function] = {
    "method": lambda z: z.sigmoid(),
    "in place": lambda z: z.sigmoid_(),
    "hardsigmoid": F.hardsigmoid,
    "relu6": lambda z: F.relu6(z + 3) / 6,
    "relu6, in place": lambda z: F.relu6(z + 3.0, inplace=True).div_(6.0),
    "relu6, multiplied": lambda z: F.relu6(z + 3.0) * (1 / 6),
    "clamp": lambda z: z.add_(3.0).clamp_(0.0, 6.0).div_(6.0),
    "hardtanh": lambda z: F.hardtanh(z + 3, 0.0, 6.0) / 6,
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_gates(gate: Function) -> None:
    def body(s: Block, x: Tensor) -> Tensor:
        return x * gate(s.conv2(F.relu(s.conv1(x.mean((2, 3), keepdim=True)))))

    # Where clamp has gradients at its bounds, as in torch 2.11, it is no hard sigmoid.
    z = torch.zeros(1, requires_grad=True)
    is_other = gate is GATES["clamp"] and torch.autograd.grad(z.clamp(0, 6).sum(), z)[0].item() == 1
    assert kinds(compared(body, tolerance=1e-7)) == ([] if is_other else ["se"])


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate first": lambda x, e: e * x,
    "torch.mul": torch.mul,
    "method": lambda x, e: x.mul(e),
    "expand_as": lambda x, e: x * e.expand_as(x),
    "expand": lambda x, e: e.expand(3, C, 5, 4) * x,
    "reshaped": lambda x, e: x * e.flatten(1).view(3, C, 1, 1),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert kinds(compared(lambda s, x: product(x, excite(s, x.mean((2, 3), keepdim=True))))) == ["se"]


def test_product_in_place() -> None:
    """On a map that nothing else reads; what others would see changed stays as it was written."""

    def owned(s: Block, x: Tensor) -> Tensor:
        y = F.softplus(x)
        return y.mul_(excite(s, y.mean((2, 3), keepdim=True)))

    def read_later(s: Block, x: Tensor) -> Tensor:
        y = F.softplus(x)
        z = y
        y *= excite(s, y.mean((2, 3), keepdim=True))
        return y + z.flip(2)

    def given(s: Block, x: Tensor) -> Tensor:
        return x.mul_(excite(s, x.mean((2, 3), keepdim=True)))

    assert kinds(compared(owned, differentiate=False)) == ["se"]
    (match,) = compared(read_later, differentiate=False)
    assert match.reason == "y is written in place in the block and read again, by flip"
    (match,) = compared(given, differentiate=False)
    assert str(match.reason).endswith("writes in place what comes from outside")


BN_ACTS: dict[str, tuple[Function, str]] = {
    "none": (lambda z: z, "bn_se"),
    "relu": (F.relu, "bn_act_se"),
    "relu in place": (lambda z: F.relu(z, inplace=True), "bn_act_se"),
    "silu": (lambda z: F.silu(z, inplace=True), "bn_act_se"),
    "hardswish": (F.hardswish, "bn_act_se"),
    "without a fused form": (F.relu6, "se"),
}
TAILS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "alone": (lambda y, r: y * 1.0, ""),
    "add": (lambda y, r: y + r, "+add"),
    "add in place": (lambda y, r: y.add_(r), "+add"),
    "residual first": (lambda y, r: torch.add(r, y), "+add"),
    "add, relu": (lambda y, r: F.relu(y + r, inplace=True), "+add+relu"),
    "relu": (lambda y, r: torch.relu(y), "+relu"),
    "another sum": (lambda y, r: torch.add(y, r, alpha=2), ""),
    "a broadcast sum": (lambda y, r: y + r.mean((2, 3), keepdim=True), ""),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("bn_act", "head"), BN_ACTS.values(), ids=BN_ACTS.keys())
def test_norms(bn_act: Function, head: str, training: bool) -> None:
    report = compared(lambda s, x: se(s, bn_act(s.bn(x))), training=training, tolerance=1e-7)
    assert kinds(report) == [head]
    assert report[0].training == (training and head != "se")


@pytest.mark.parametrize("head", ["bn_se", "bn_act_se", "se"])
@pytest.mark.parametrize(("tail", "added"), TAILS.values(), ids=TAILS.keys())
def test_tails(tail: Callable[[Tensor, Tensor], Tensor], added: str, head: str) -> None:
    before: dict[str, Callable[[Block, Tensor], Tensor]] = {
        "se": lambda s, x: x,
        "bn_se": lambda s, x: s.bn(x),
        "bn_act_se": lambda s, x: F.silu(s.bn(x)),
    }
    assert kinds(compared(lambda s, x, r: tail(se(s, before[head](s, x)), r), 2)) == [head + added]


def test_addcmul() -> None:
    def body(s: Block, x: Tensor, r: Tensor) -> Tensor:
        y = s.bn(x)
        return torch.relu(torch.addcmul(r, y, excite(s, y.mean((2, 3), keepdim=True))))

    assert kinds(compared(body, 2)) == ["bn_se+add+relu"]


def test_chains_join_their_gradients() -> None:
    """A residual that is another block's output, which has two readers: it is given out twice."""
    from setriton.compile.rewrite import rewrite
    from setriton.functional import bn_squeeze_excite, bn_squeeze_excite_forked

    seen = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        found = graphs.rewriting(graph_module, inputs)
        seen.append([node.target for node in graph_module.graph.nodes if "squeeze" in str(node.target)])
        assert rewrite(graph_module) == []
        return found

    def body(s: Block, x: Tensor, r: Tensor) -> Tensor:
        y = F.relu(se(s, s.bn(x)) + r)
        return F.relu(se(s, s.bn2(y.flip(2))) + y)

    assert kinds(compared(body, 2, backend=backend)) == ["bn_se+add+relu"] * 2
    assert seen == [[bn_squeeze_excite_forked, bn_squeeze_excite]]


LOOK_ALIKES: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "softmax": (
        lambda s, x: x * F.softmax(s.conv2(F.relu(s.conv1(x.mean((2, 3), keepdim=True)))), 1),
        "the gate is softmax, not sigmoid or hardsigmoid"),
    "one axis": (lambda s, x: x * excite(s, x.mean((3,), keepdim=True).amax(2, keepdim=True)), "maximum"),
    "mean over other axes": (
        lambda s, x: x * excite(s, x.mean((0, 2, 3), keepdim=True)), "not one number a channel of each image"),
    "another tensor": (
        lambda s, x: x.flip(2) * excite(s, x.mean((2, 3), keepdim=True)), "another map than the squeezed one"),
    "mean and maximum": (
        lambda s, x: x * excite(s, x.mean((2, 3), keepdim=True) + F.adaptive_max_pool2d(x, 1)),
        "the map's maximum is added to its mean"),
    "mean and maximum, excited": (
        lambda s, x: x * torch.sigmoid(
            sum(s.conv2(F.relu(s.conv1(q))) for q in (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))),
        "the map's maximum is added to its mean"),
    "two means": (
        lambda s, x: x * excite(s, x.mean((2, 3), keepdim=True) + F.adaptive_avg_pool2d(x, 1)),
        "add where a mean over height and width was expected"),
    "mean in another dtype": (
        lambda s, x: x * excite(s, x.mean((2, 3), keepdim=True, dtype=torch.float64)), "taken in torch.float64"),
    "part of the map": (
        lambda s, x: x * excite(s, F.avg_pool2d(x, (4, 4), stride=5)), "avg_pool2d over a part of the map"),
    "maximum": (lambda s, x: x * excite(s, F.adaptive_max_pool2d(x, 1)), "maximum"),
    "larger pool": (
        lambda s, x: x * F.adaptive_avg_pool2d(excite(s, F.adaptive_avg_pool2d(x, 2)), 1), "the gate is"),
    "one layer": (
        lambda s, x: x * torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), s.conv1.weight.repeat(4, 1, 1, 1))),
        "one layer only"),
    "no layer": (lambda s, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), "no layer between squeeze and gate"),
    "grouped": (
        lambda s, x: x * torch.sigmoid(
            s.conv2(F.relu(F.conv2d(x.mean((2, 3), keepdim=True), s.conv1.weight[:, :8], groups=2)))),
        "grouped convolution"),
    "spatial": (
        lambda s, x: x * torch.sigmoid(s.conv2(F.relu(F.conv2d(
            x.mean((2, 3), keepdim=True), s.conv1.weight.repeat(1, 1, 3, 3), padding=1)))),
        "spatial convolution"),
    "norm between": (
        lambda s, x: x * torch.sigmoid(
            s.conv2(F.relu(F.group_norm(s.conv1(x.mean((2, 3), keepdim=True)), 2)))),
        "normalization between the layers"),
    "another act": (
        lambda s, x: x * torch.sigmoid(s.conv2(torch.tanh(s.conv1(x.mean((2, 3), keepdim=True))))), "tanh"),
    "tanh gelu": (
        lambda s, x: x * torch.sigmoid(s.conv2(F.gelu(s.conv1(x.mean((2, 3), keepdim=True)), approximate="tanh"))),
        "gelu with approximate='tanh'"),
    "another gate": (
        lambda s, x: x * (1 + torch.tanh(s.conv2(F.relu(s.conv1(x.mean((2, 3), keepdim=True)))))), "the gate is"),
    "channels shuffled": (
        lambda s, x: x * excite(s, x.mean((2, 3), keepdim=True).flip(1)),
        "flip where a mean over height and width was expected"),
    "over another axis": (
        lambda s, x: x * torch.sigmoid(s.fc2(F.relu(s.fc1(x.mean((2, 3)))))).t()[:, :1].t()[:, :, None, None],
        "the gate is"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_look_alikes_are_left_alone(body: Callable[[Block, Tensor], Tensor], reason: str) -> None:
    report = compared(body)
    assert kinds(report) == []
    assert len(report.left) == 1
    assert reason in str(report[0].reason)


def test_shared_intermediates() -> None:
    def pooled(s: Block, x: Tensor) -> Tensor:
        q = x.mean((2, 3), keepdim=True)
        return x * excite(s, q) + q

    def gate(s: Block, x: Tensor) -> Tensor:
        e = excite(s, x.mean((2, 3), keepdim=True))
        return x * e + e

    for body in (pooled, gate):
        (match,) = compared(body)
        assert "is read elsewhere" in str(match.reason)

    def normalized(s: Block, x: Tensor) -> Tensor:
        y = s.bn(x)
        return se(s, y) + y

    (match,) = compared(normalized)
    assert (match.kind, match.reason, match.note) == ("se+add", None, "BN's output is read elsewhere")


def test_statistics_of_one_branch() -> None:
    """BN with batch statistics before the squeeze, without them before the product."""

    def body(s: Block, x: Tensor) -> Tensor:
        y = F.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, False)
        return y * excite(s, s.bn(x).mean((2, 3), keepdim=True))

    (match,) = compared(body)
    assert "another map" in str(match.reason)


def test_one_bn_of_two_blocks() -> None:
    """Statistics that both move: in which order must not change."""
    report = compared(lambda s, x: se(s, s.bn(x)) + se(s, s.bn(x.flip(0)).flip(1)))
    assert len(report) == 2
    assert all(match.kind.startswith("se") for match in report.replaced)
    assert "BN's running statistics are read elsewhere" in {match.note for match in report.replaced}


def test_inputs_changed_on_the_way() -> None:
    def body(s: Block, x: Tensor) -> Tensor:
        z = x * 1.0
        y = s.bn(z)
        e = excite(s, y.mean((2, 3), keepdim=True))
        z.add_(1.0)
        return y * e + z

    (match,) = compared(body, differentiate=False)
    assert (match.kind, match.reason) == ("se", None)
    assert "changes an input of the block in place" in str(match.note)


def test_a_tail_ends_before_its_inputs_change() -> None:
    def body(s: Block, x: Tensor) -> Tensor:
        z = x * 1.0
        y = se(s, z)
        z.add_(1.0)
        return F.relu(y + z)

    (match,) = compared(body, differentiate=False)
    assert (match.kind, match.reason) == ("se", None)
    assert "changes an input of the block in place" in str(match.note)


def test_sizes_that_are_read() -> None:
    """Of BN's output, whose place the block's input takes."""

    def body(s: Block, x: Tensor) -> Tensor:
        y = s.bn(x)
        n, c = y.size(0), y.shape[1]
        return y * excite(s, F.adaptive_avg_pool2d(y, 1).view(n, c)[..., None, None]).view(n, c, 1, 1)

    assert kinds(compared(body)) == ["bn_se"]
    assert kinds(compared(body, dynamic=True)) == ["bn_se"]


def test_dtypes() -> None:
    block = Block(lambda s, x: se(s, s.bn(x)) + x.float()).bfloat16()
    graphs.reset_compile_report()
    torch._dynamo.reset()
    x = torch.randn(2, C, 3, 3, dtype=torch.bfloat16)
    y = torch.compile(block, backend=graphs.rewriting, fullgraph=True)(x)
    assert y.dtype == torch.float32
    assert kinds(graphs.compile_report()) == ["bn_se"]


def test_frozen_statistics_without_tracking() -> None:
    bn = nn.BatchNorm2d(C, momentum=None, track_running_stats=False, affine=False)

    def body(s: Block, x: Tensor) -> Tensor:
        return F.relu(se(s, bn(x)) + x)

    for training in (True, False):
        assert kinds(compared(body, training=training)) == ["bn_se+add+relu"]
