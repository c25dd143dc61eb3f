"""SqueezeExcite beside timm's and torchvision's modules."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.layers import SEModule

import setriton
from setriton import SqueezeExcite


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


def test_public_names() -> None:
    assert all(hasattr(setriton, name) for name in setriton.__all__)
    assert set(dir(setriton)) == set(setriton.__all__)
