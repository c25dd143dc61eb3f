"""What changes how a network trains and not what it computes: checkpointing; and stochastic depth."""

import copy
import math
from typing import Any

import pytest
import torch
from same_step import assert_same, assert_same_step, images, randomized
from torch import Tensor, nn

from setriton import create_model
from setriton.models.batch_norm import freeze_bn
from setriton.models.blocks import DropPath
from setriton.models.stages import Stage


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    """A network in training, and a copy that checkpoints."""
    torch.manual_seed(0)
    model = randomized(create_model(name, num_classes=5, **options)).train()
    twin: Any = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    return model, twin


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass, parameters aside; the same memory counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # themselves, so that no memory is used again meanwhile

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet20", {}),
        ("se_resnet20", {}),
        ("se_resnet20", {"fused": False}),
        ("se_resnet20", {"drop_path_rate": 0.5}),
        ("se_resnet20", {"se_position": "post"}),
        ("se_resnet18", {}),
    ],
    ids=str,
)
def test_checkpointing_changes_nothing(name: str, options: dict[str, Any]) -> None:
    model, twin = twins(name, **options)
    for _ in range(2):
        assert_same(twin, model, images(24))


def test_checkpointing_leaves_cumulative_statistics_and_frozen_layers_alone() -> None:
    model, twin = twins("se_resnet20")
    for network in (model, twin):
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        freeze_bn(network.layer2)
    for _ in range(2):
        assert_same(twin, model, images(16))
    assert all(norm.momentum is None for norm in twin.modules() if isinstance(norm, nn.BatchNorm2d))
    assert (
        twin.bn1.num_batches_tracked == twin.layer1[0].bn1.num_batches_tracked > model.layer2[0].bn1.num_batches_tracked
    )


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20"])
def test_checkpointing_changes_nothing_where_the_network_is_compiled(name: str) -> None:
    torch._dynamo.reset()
    model, twin = twins(name)
    twin.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same_step(twin, model, images(16))


def test_checkpointing_changes_nothing_where_blocks_are_compiled() -> None:
    torch._dynamo.reset()
    model, twin = twins("se_resnet20")
    for block in twin.layer1:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        assert_same_step(twin, model, images(16))


@pytest.mark.parametrize("name", ["resnet32", "se_resnet32"])
def test_checkpointing_keeps_the_inputs_of_blocks_alone(name: str) -> None:
    model, twin = twins(name)
    x = images(32)
    every, few = saved_bytes(model, x), saved_bytes(twin, x)
    block_inputs = sum(2 * 8 * chans * size**2 * 5 for chans, size in ((16, 32), (32, 16), (64, 8)))
    assert few < 2 * block_inputs < every / 2
    twin.set_grad_checkpointing(False)
    assert saved_bytes(twin, x) == every


def test_evaluation_checkpoints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins("se_resnet20")
    assert [stage.grad_checkpointing for stage in twin.modules() if isinstance(stage, Stage)] == [True] * 3
    monkeypatch.setattr("setriton.models.stages.checkpoint", None)
    x = images(16)
    twin.eval()(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(twin.train()(x), model(x))


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3, 1)
    y = drop(x)
    kept = y[:, 0, 0, 0] != 0
    assert torch.equal(y, kept.view(-1, 1, 1, 1) * x / 0.75)
    # Four standard deviations of a binomial mean.
    assert abs(kept.float().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20", "se_resnet18"])
def test_drop_path_rates_grow_and_leave_evaluation_alone(name: str) -> None:
    model: Any = randomized(create_model(name, drop_path_rate=0.4))
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0
    assert rates[-1] == 0.4
    torch.testing.assert_close(torch.tensor(rates).diff(), torch.full((len(rates) - 1,), 0.4 / (len(rates) - 1)))
    twin = create_model(name).double()
    twin.load_state_dict(model.state_dict())
    x = images(24)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_drop_path_is_the_same_fused_or_not() -> None:
    torch.manual_seed(0)
    fused = randomized(create_model("se_resnet20", drop_path_rate=0.5))
    stock = create_model("se_resnet20", drop_path_rate=0.5, fused=False).double()
    stock.load_state_dict(fused.state_dict())
    for _ in range(2):
        assert_same(fused, stock, images(16))


def test_a_dropped_branch_leaves_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = randomized(create_model("se_resnet20", drop_path_rate=0.5)).train()
    block = model.layer1[2]
    x = images(8).repeat(1, 6, 1, 1)[:, :16].relu()
    monkeypatch.setattr(Tensor, "bernoulli_", lambda mask, keep: mask.zero_())
    assert torch.equal(block(x), x)
