"""The modules beside torch's, timm's and torchvision's."""

import copy
import functools
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from changed_layers import CHANGES
from timm.layers import BatchNormAct2d, SEModule
from torch import nn

import setriton
from setriton import BatchNormSqueezeExcite, SqueezeExcite


def test_hidden_width_is_the_authors() -> None:
    widths = {256: 16, 320: 20, 576: 36, 608: 38, 1056: 66, 2048: 128, 16: 1, 8: 1}
    assert {c: SqueezeExcite(c).fc1.out_channels for c in widths} == widths
    assert SqueezeExcite(64, rd_channels=5).fc1.weight.shape == (5, 64, 1, 1)
    assert SqueezeExcite(96, rd_ratio=1 / 6).fc1.out_channels == 16


@pytest.mark.parametrize("bias", [True, False])
def test_timm_module(bias: bool) -> None:
    theirs, ours = SEModule(64, rd_channels=4, bias=bias), SqueezeExcite(64, rd_channels=4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_torchvision_module() -> None:
    theirs = torchvision.ops.SqueezeExcitation(40, 10, torch.nn.SiLU, torch.nn.Hardsigmoid)
    ours = SqueezeExcite(40, rd_channels=10, act="silu", gate="hardsigmoid")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 40, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_timm_network_with_our_block() -> None:
    stock = timm.create_model("seresnet50").eval()
    ours = timm.create_model("seresnet50", block_args={"attn_layer": SqueezeExcite}).eval()
    ours.load_state_dict(stock.state_dict())
    assert sum(isinstance(m, SqueezeExcite) for m in ours.modules()) == 16
    for block in (m for model in (stock, ours) for m in model.modules() if hasattr(m, "bn3")):
        torch.nn.init.ones_(block.bn3.weight)  # timm starts it at 0, which would hide the SE block
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)


def test_copies_and_devices() -> None:
    module = SqueezeExcite(32, device="meta", dtype=torch.bfloat16)
    assert module.fc2.weight.is_meta
    assert module.fc2.weight.dtype == torch.bfloat16
    module = SqueezeExcite(32)
    x = torch.randn(1, 32, 4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert "act=relu, gate=sigmoid" in repr(module)


def make_pair(**options: Any) -> tuple[nn.BatchNorm2d, SqueezeExcite]:
    bn, se = nn.BatchNorm2d(16, **options).double(), SqueezeExcite(16, 1 / 4, dtype=torch.float64)
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn, se


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_the_tails_bookkeeping_is_that_of_batch_norm(options: dict[str, Any]) -> None:
    bn, se = make_pair(**options)
    tail = BatchNormSqueezeExcite.from_pair(*copy.deepcopy((bn, se)), bn_act="silu", out_act="relu")
    x, residual = torch.randn(2, 5, 16, 3, 4, dtype=torch.float64)
    # Training, evaluation, BN alone frozen, and training again.
    for mode, bn_mode in ((True, True), (True, True), (False, False), (True, False), (True, True)):
        tail.train(mode)
        bn.train(bn_mode)
        tail.bn.train(bn_mode)
        want = torch.relu(se(torch.nn.functional.silu(bn(x))) + residual)
        torch.testing.assert_close(tail(x, residual), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(tail.bn.state_dict(), bn.state_dict(), rtol=1e-13, atol=1e-13)
        x = x + 1


def test_a_tail_takes_a_pair_over_and_gives_it_back() -> None:
    bn, se = make_pair()
    tail = BatchNormSqueezeExcite.from_pair(bn.eval(), se)
    assert not tail.training
    assert tail.to_pair() == (bn, se)
    assert set(tail.state_dict()) == {f"bn.{key}" for key in bn.state_dict()} | {f"se.{key}" for key in se.state_dict()}
    tail.load_state_dict(BatchNormSqueezeExcite(16, 1 / 4, dtype=torch.float64).state_dict())
    assert torch.equal(bn.weight, torch.ones(16))
    assert "bn_act=identity, out_act=identity" in repr(tail)


@pytest.mark.parametrize(
    "se",
    [
        SEModule(16, rd_channels=4),
        SEModule(16, rd_channels=4, bias=False, act_layer=nn.SiLU, gate_layer="hard_sigmoid"),
        torchvision.ops.SqueezeExcitation(16, 4),
        torchvision.ops.SqueezeExcitation(16, 4, nn.GELU, nn.Hardsigmoid),
    ],
    ids=["timm", "timm, other functions", "torchvision", "torchvision, other functions"],
)
def test_a_tail_of_a_stock_block(se: nn.Module) -> None:
    bn, x = nn.BatchNorm2d(16), torch.randn(2, 16, 7, 7)
    tail = BatchNormSqueezeExcite.from_pair(bn, se)
    torch.testing.assert_close(tail.eval()(x), se(bn(x)))
    assert tail.se.fc1 is se.fc1
    assert set(tail.se.state_dict()) == set(se.state_dict())


@pytest.mark.parametrize(
    ("bn", "se", "error", "message"),
    [
        (nn.BatchNorm1d(16), SqueezeExcite(16), TypeError, "bn must be an nn.BatchNorm2d or .* got BatchNorm1d"),
        (BatchNormAct2d(16), SqueezeExcite(16), TypeError, "bn must be .* got BatchNormAct2d"),
        (nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), TypeError, "module must be an SE block .* got Conv2d"),
        (nn.BatchNorm2d(16), SqueezeExcite(8), ValueError, "se must have the 16 channels of bn; got 8"),
        (nn.BatchNorm2d(16), SEModule(16, norm_layer=nn.BatchNorm2d), ValueError, "no normalization"),
        (nn.BatchNorm2d(16), SEModule(16, add_maxpool=True), ValueError, "no max pool"),
        (nn.BatchNorm2d(16), SEModule(16, act_layer=nn.Tanh), ValueError, "act must be one of ReLU, .* got Tanh"),
        (nn.BatchNorm2d(16), SEModule(16, gate_layer="tanh"), ValueError, "gate must be one of Sigmoid, .* got Tanh"),
        (
            nn.BatchNorm2d(16),
            torchvision.ops.SqueezeExcitation(16, 4, lambda: nn.GELU(approximate="tanh")),
            ValueError,
            "act must be one of .* got GELU",
        ),
    ],
)
def test_pairs_that_have_no_fused_form(bn: nn.Module, se: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormSqueezeExcite.from_pair(bn, se)


def test_a_tails_options() -> None:
    tail = BatchNormSqueezeExcite(
        32, rd_channels=3, bias=False, act="silu", gate="hardsigmoid", eps=1e-3, momentum=0.3, affine=False,
        track_running_stats=False, bn_act="hardswish", out_act="relu", device="meta", dtype=torch.bfloat16,
    )  # fmt: skip
    bn, se = tail.to_pair()
    assert (bn.eps, bn.momentum, bn.affine, bn.track_running_stats) == (1e-3, 0.3, False, False)
    assert (se.fc1.out_channels, se.fc1.bias, se.act, se.gate) == (3, None, "silu", "hardsigmoid")
    assert se.fc1.weight.is_meta
    assert se.fc1.weight.dtype == torch.bfloat16
    x = torch.empty(2, 32, 3, 3, device="meta", dtype=torch.bfloat16)
    assert tail(x, x).shape == x.shape


def test_a_tail_compiles_with_its_bookkeeping() -> None:
    torch._dynamo.reset()
    tail = BatchNormSqueezeExcite.from_pair(*make_pair())
    twin = copy.deepcopy(tail)
    compiled = torch.compile(tail, fullgraph=True)
    for x in torch.randn(3, 4, 16, 3, 3, dtype=torch.float64):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(tail.state_dict(), twin.state_dict())


def test_public_names() -> None:
    assert all(hasattr(setriton, name) for name in setriton.__all__)
    assert set(dir(setriton)) == set(setriton.__all__)


def written_out(se: SqueezeExcite, x: torch.Tensor) -> torch.Tensor:
    """The block of its layers, called."""
    return x * torch.sigmoid(se.fc2(torch.nn.functional.silu(se.fc1(x.mean((2, 3), keepdim=True)))))


def written_out_tail(tail: BatchNormSqueezeExcite, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(written_out(tail.se, torch.nn.functional.silu(tail.bn(x))) + x)


# Changes of layers that a tail alone has not, or that `written_out` does not call.
OF_BLOCKS = (
    *("hook of relu", "silu", "no drop path", "hook of drop path"),
    *("no se", "hook of se", "pre-hook of se", "backward pre-hook"),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in OF_BLOCKS])
def test_what_was_done_to_a_layer_takes_effect(name: str) -> None:
    tail = BatchNormSqueezeExcite(16, 1 / 4, act="silu", bn_act="silu", out_act="relu", dtype=torch.float64)
    nn.init.constant_(tail.bn.bias, 0.5)
    twin = copy.deepcopy(tail)
    for module in (tail, twin):
        torch.manual_seed(5)
        CHANGES[name](module)
    for x in torch.randn(2, 3, 16, 4, 5, dtype=torch.float64):
        gradients = []
        for function in (tail, functools.partial(written_out_tail, twin)):
            image = x.clone().requires_grad_()
            y = function(image, image) if function is tail else function(image)
            y.cos().sum().backward()
            gradients.append([y.detach(), image.grad])
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        for (key, found), (other, want) in zip(tail.named_parameters(), twin.named_parameters(), strict=True):
            assert key == other
            torch.testing.assert_close(found.grad, want.grad, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: k + m)
    torch.testing.assert_close(tail.state_dict(), twin.state_dict(), rtol=1e-10, atol=1e-10)


def test_activations_are_exchanged() -> None:
    tail = BatchNormSqueezeExcite(8, 1 / 2, dtype=torch.float64).eval()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    tail.se.act, tail.se.gate = nn.Mish(), nn.Tanh()
    tail.bn_act, tail.out_act = nn.LeakyReLU(0.2), torch.sin
    se, u = tail.se, nn.functional.leaky_relu(tail.bn(x), 0.2)
    excited = torch.tanh(se.fc2(nn.functional.mish(se.fc1(u.mean((2, 3), keepdim=True)))))
    torch.testing.assert_close(tail(x, x), torch.sin(u * excited + x), rtol=1e-12, atol=1e-12)


def test_a_traced_tail_follows_training() -> None:
    tail = BatchNormSqueezeExcite.from_pair(*make_pair(), bn_act="silu", out_act="relu").train()
    traced = torch.fx.symbolic_trace(tail)
    assert {str(n.target) for n in traced.graph.nodes if n.op == "call_module"} == {"bn", "se.fc1", "se.fc2"}
    assert tail.bn.num_batches_tracked == 0
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    for training in (True, False, True):
        twin = copy.deepcopy(tail)
        torch.testing.assert_close(traced.train(training)(x, x), twin.train(training)(x, x), rtol=1e-11, atol=1e-11)
