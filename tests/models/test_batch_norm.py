"""freeze_bn and unfreeze_bn: what moves in training and what does not, and what a network can do as before."""

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from setriton import BatchNormSqueezeExcite, accelerate, create_model, freeze_bn, unfreeze_bn
from setriton.models.blocks import ResidualBlock


def image() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(name: str = "se_resnet20", **options: Any) -> nn.Module:
    """One whose statistics are those of images, in training mode."""
    torch.manual_seed(0)
    model = create_model(name, dtype=torch.float64, **options)
    with torch.no_grad():
        for _ in range(3):
            model(image())
    return model


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def state_of_norms(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{key}": t.clone() for path, m in norms(model).items() for key, t in m.state_dict().items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    model(image()).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["resnet20", "se_resnet20"])
def test_frozen_layers_do_not_move_and_all_others_do(name: str) -> None:
    model = network(name)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=0.1)
    train(model, optimizer)
    keys = list(model.state_dict())
    assert freeze_bn(model) == 19
    assert freeze_bn(model) == 19
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(before) == keys
    for _ in range(2):
        train(model, optimizer)
    frozen = state_of_norms(model).keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key in frozen), key


def test_a_frozen_network_computes_in_training_what_it_does_in_evaluation() -> None:
    model = network()
    want = model.eval()(image())
    freeze_bn(model.train())
    assert torch.equal(model(image()), want)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    assert [block.training and not block.last_bn.training for block in blocks] == [True] * 9
    assert torch.equal(model.eval().train()(image()), want)


def test_gradients_through_a_frozen_fused_tail_are_those_of_its_modules() -> None:
    fused, plain = network(), network(fused=False)
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        freeze_bn(model)
        model(image()).sin().sum().backward()
    want = dict(plain.named_parameters())
    for key, parameter in fused.named_parameters():
        if want[key].grad is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, want[key].grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_unfreezing_gives_back_classes_modes_and_gradients(training: bool) -> None:
    model = network()
    model.get_submodule("layer1.0.bn2").weight.requires_grad_(False)
    learns = {key: p.requires_grad for key, p in model.named_parameters()}
    freeze_bn(model.train(not training))
    assert not any(p.requires_grad for m in norms(model).values() for p in m.parameters())
    model.train(training)
    assert unfreeze_bn(model) == 19
    assert unfreeze_bn(model) == 0
    assert {key: p.requires_grad for key, p in model.named_parameters()} == learns
    assert all(type(m) is nn.BatchNorm2d and m.training is training for m in norms(model).values())
    assert all(vars(m).keys() == vars(nn.BatchNorm2d(1)).keys() for m in norms(model).values())
    before = state_of_norms(model)
    model(image())
    moved = {key for key, value in state_of_norms(model).items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in moved} == (
        {"running_mean", "running_var", "num_batches_tracked"} if training else set()
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_frozen_too(how: str) -> None:
    model = network()
    freeze_bn(model)
    if how == "save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin.train()
    assert torch.equal(twin(image()), model(image()))
    before = state_of_norms(twin)
    assert all(torch.equal(value, before[key]) for key, value in state_of_norms(model).items())
    assert unfreeze_bn(twin) == 19
    assert freeze_bn(model) == 19
    assert not any(m.training for m in norms(model).values())


def test_compiled_blocks_are_frozen_and_thawed() -> None:
    torch._dynamo.reset()
    stage: Any = network().get_submodule("layer1")
    compiled: Any = torch.compile(stage, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64)

    def moved() -> set[bool]:
        """Whether a step of training changes each tensor of all BNs."""
        before = state_of_norms(stage)
        optimizer = torch.optim.SGD(stage.parameters(), 1e-3)
        compiled.train()(x).square().sum().backward()
        optimizer.step()
        stage.zero_grad()
        return {not torch.equal(value, before[key]) for key, value in state_of_norms(stage).items()}

    assert moved() == {True}
    assert freeze_bn(compiled) == 6
    assert moved() == {False}
    assert unfreeze_bn(compiled) == 6
    assert moved() == {True}


def test_classes_with_a_forward_of_their_own_keep_it() -> None:
    """timm's have an activation, and maybe a dropout, inside."""
    norm = timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout).double()
    model = nn.Sequential(norm, nn.SyncBatchNorm(3).double(), nn.BatchNorm1d(3).double())
    assert freeze_bn(model) == 3
    model.train()
    assert [m.training for m in model] == [False] * 3
    assert norm.drop.training
    norm.drop.eval()
    x = image() - 0.5
    torch.testing.assert_close(model[:2](x), (x / (1 + 1e-5)).relu() / (1 + 1e-5) ** 0.5, rtol=1e-4, atol=1e-4)
    assert "FrozenBatchNormAct2d" in repr(model)


@pytest.mark.parametrize("freeze_first", [True, False])
def test_accelerate_fuses_frozen_tails(freeze_first: bool) -> None:
    model = timm.create_model("seresnet50")
    steps = [freeze_bn, accelerate]
    for step in steps if freeze_first else reversed(steps):
        step(model)
    assert set(accelerate(model).left.values()) == {"already accelerated"}
    model.train()
    before = state_of_norms(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in state_of_norms(model).items())
    assert unfreeze_bn(model) == 53


def test_a_frozen_bn_can_be_paired() -> None:
    bn = nn.BatchNorm2d(32)
    tail = BatchNormSqueezeExcite(32)
    freeze_bn(bn)
    pair = BatchNormSqueezeExcite.from_pair(bn, tail.se).train()
    assert pair.bn is bn
    pair(torch.randn(2, 32, 4, 4))
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("function", [freeze_bn, unfreeze_bn])
def test_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got str"):
        function("se_resnet50")


def test_layers_that_cannot_be_frozen() -> None:
    first = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="model must have running statistics in what is frozen; 1 has none"):
        freeze_bn(nn.Sequential(first, nn.BatchNorm2d(3, track_running_stats=False)))
    assert type(first) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="called once before its lazy layers are frozen; got the model"):
        freeze_bn(nn.LazyBatchNorm2d())


def test_thawing_what_another_has_given_a_class() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    freeze_bn(model)
    model[0].__class__ = type("FSDPFrozenBatchNorm2d", (type(model[0]),), {})
    with pytest.raises(ValueError, match="as freeze_bn left them; got 0 of class FSDPFrozenBatchNorm2d"):
        unfreeze_bn(model)
