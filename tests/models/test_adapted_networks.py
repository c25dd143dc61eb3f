"""Adapters, observers, sharding, traces and hooks of whole networks, against networks of stock operators."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn.modules.module import register_module_forward_hook

from setriton import create_model, stock
from setriton.models.batch_norm import freeze_bn
from setriton.models.blocks import BlockSEOptions
from setriton.models.published import crop
from setriton.models.small_resnet import SmallResNet


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """The same network, fused and not."""
    torch.manual_seed(0)
    options = [BlockSEOptions(rd_ratio=1 / 4, fused=fused) for fused in (True, False)]
    fused, plain = (SmallResNet(8, se, num_classes=5).double() for se in options)
    for bn in (m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def step(model: nn.Module, x: Tensor, training: bool = True) -> dict[str, Any]:
    model.train(training)
    model.zero_grad()
    torch.manual_seed(4)
    y = model(x)
    y.sin().sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


def assert_same_steps(fused: nn.Module, plain: nn.Module) -> None:
    for training in (True, True, False):
        close(step(fused, images(), training), step(plain, images(), training))


def test_adapters_train_merge_and_are_merged_for_good(pair: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["conv2", "se.fc1", "se.fc2"], init_lora_weights=False)
    adapted = []
    for network in pair:
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(network, config))
    fused, plain = adapted
    close(step(fused, images()), step(plain, images()))
    adapters = [p for name, p in fused.named_parameters() if "lora_" in name]
    assert len(adapters) == 3 * 3 * 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)
    y = fused.eval()(images())
    close(y, plain.eval()(images()))
    with fused.disable_adapter():
        assert (fused(images()) - y).abs().max() > 1e-3
    fused.merge_adapter()
    close(fused(images()), y)
    fused.unmerge_adapter()
    close(fused(images()), y)
    merged = fused.merge_and_unload()
    close(merged(images()), y)
    assert merged.layer1[0].se.is_readable()


@pytest.mark.parametrize("how", ["eager", "fx"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantization_aware_training(how: str, pair: tuple[Any, Any]) -> None:
    prepared = []
    for network in pair:
        network.float().train()
        if how == "eager":
            network.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            prepared.append(quantization.prepare_qat(network))
        else:
            mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
            prepared.append(prepare_qat_fx(network, mapping, (images().float(),)))
    fused, plain = prepared
    observers = [name for name, _ in fused.named_modules() if "se.fc1.weight_fake_quant" in name]
    assert len([name for name in observers if name.endswith("weight_fake_quant")]) == 3
    for training in (True, True, False):
        found, want = (step(model, images().float(), training) for model in (fused, plain))
        torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["all", "last"])
def test_frozen_batch_norm_of_timm(where: str, pair: tuple[Any, Any]) -> None:
    changed = []
    for network in pair:
        step(network, images())
        if where == "all":
            changed.append(timm.layers.freeze_batch_norm_2d(network))
        else:
            network.layer1[0].bn2 = timm.layers.freeze_batch_norm_2d(network.layer1[0].bn2)
            changed.append(network)
    assert_same_steps(*changed)
    assert type(changed[0].layer1[0].bn2).__name__ == "FrozenBatchNorm2d"


def test_our_own_frozen_batch_norm_stays_fused(pair: tuple[Any, Any], caplog: Any) -> None:
    for network in pair:
        step(network, images())
        freeze_bn(network)
    assert_same_steps(*pair)
    assert not caplog.records


def test_single_layers_are_sharded(pair: tuple[Any, Any], one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    network, plain = pair
    for one in (
        lambda net: net.layer1[0].bn2,
        lambda net: net.layer1[0].se,
        lambda net: net.layer2[0].se.fc1,
        lambda net: net.layer2[0].conv1,
        lambda net: net.layer3[0],
        lambda net: net.layer1,
    ):
        fused = copy.deepcopy(network)
        fully_shard(one(fused))
        fully_shard(fused)
        found, want = step(fused, images()), step(copy.deepcopy(plain), images())
        assert found.keys() == want.keys()
        close({name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in found.items()}, want)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


TRACED: dict[str, dict[str, Any]] = {
    "se_resnet20": {"drop_path_rate": 0.5},
    "se_resnet50": {"drop_path_rate": 0.5},
    "se_wrn16_8": {},
    "se_mobilenet": {},
    "se_shufflenet_g3": {},
    "se_vgg16_bn": {"hidden_size": 8},
    "se_bn_inception": {},
    "se_inception_resnet_v2": {"repeats": (1, 1, 2), "se_mixed": True},
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_follows_training_and_moves_nothing(name: str) -> None:
    side = 16 if crop(name) == 32 else 75
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **TRACED[name]).double().train()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    model(x)
    before = copy.deepcopy(model.state_dict())
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)} <= called
    for training in (False, True):
        ys = []
        for network in (model.train(training), traced.train(training)):
            model.load_state_dict(before)
            torch.manual_seed(3)
            with torch.no_grad():
                ys.append(network(x))
        close(ys[1], ys[0])


@pytest.mark.parametrize("path", ["layer1", "layer2", "layer2.0", "layer2.0.se"])
def test_parts_are_traced(path: str, pair: tuple[Any, Any]) -> None:
    part = pair[0].get_submodule(path).train()
    channels = 16 if path in ("layer1", "layer2", "layer2.0") else 32
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(part)
    for training in (True, False):
        close(traced.train(training)(x), part.train(training)(x))


def watch(model: nn.Module, path: str) -> list[Any]:
    seen: list[Any] = []

    def note(_module: nn.Module, args: Any, y: Any) -> Any:
        assert all(isinstance(value, Tensor) for value in (*args, y))
        assert len(args) == 1
        seen.append(y.detach().clone())
        return y * 2

    model.get_submodule(path).register_forward_hook(note)
    return seen


@pytest.mark.parametrize("path", ["layer1", "layer3", "layer1.0", "layer2.0", "layer2.0.se", "layer2.0.se.fc2"])
def test_hooks_of_blocks_and_stages_see_one_map(path: str, pair: tuple[Any, Any]) -> None:
    seen = [watch(network, path) for network in pair]
    assert_same_steps(*pair)
    close(*seen)
    assert len(seen[0]) == 3


def test_hooks_of_all_modules(pair: tuple[Any, Any]) -> None:
    calls: list[list[str]] = []
    for network in pair:
        names = {module: name for name, module in network.named_modules()}
        calls.append([])

        def note(module: nn.Module, _args: Any, y: Tensor, names: Any = names, called: Any = calls[-1]) -> Tensor:
            called.append(names[module])
            return y * 1.1

        handle = register_module_forward_hook(note)
        try:
            close(step(network, images())["y"], step(network, images())["y"])
            y = network.eval()(images())
        finally:
            handle.remove()
        calls[-1].append(str(y.sum().item())[:12])
    assert calls[0] == calls[1]
    assert {"layer1.0.se.fc1", "layer1.0.bn2", "layer2.0.relu"} <= set(calls[0])


def test_a_block_that_writes_into_its_input_reads_one_map(pair: tuple[Any, Any]) -> None:
    """Twice handed on, the input would be changed for both readers and its gradient lost for one."""
    torch.manual_seed(0)
    options = [BlockSEOptions(rd_ratio=1 / 4, fused=fused) for fused in (True, False)]
    networks: list[Any] = [SmallResNet(14, se).double() for se in options]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        for stage in (network.layer1, network.layer2):
            stage[1].conv1 = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), stage[1].conv1)
            nn.init.constant_(stage[0].bn2.bias, -1.0)
            stage[0].relu = nn.Identity()
    assert_same_steps(*networks)


def test_weights_swapped_for_a_call(pair: tuple[Any, Any]) -> None:
    fused, plain = (network.eval() for network in pair)
    others = {name: p * 1.1 for name, p in fused.named_parameters()}
    close(*(torch.func.functional_call(network, others, images()) for network in (fused, plain)))
    for network in (fused, plain):
        network.layer1[0].se.fc1.weight = nn.Parameter(network.layer1[0].se.fc1.weight * 2)
        network.layer2[0].se.fc2 = network.layer2[0].se.fc2.half().double()
    assert_same_steps(fused, plain)


def test_parameters_that_do_not_learn(pair: tuple[Any, Any]) -> None:
    for network in pair:
        network.layer1[0].se.fc1.weight.requires_grad_(False)
        network.layer2[0].bn2.bias.requires_grad_(False)
        network.layer2[0].se.fc2.bias = None
        network.layer3[0].se.fc1.weight.register_hook(lambda gradient: 3 * gradient)
    assert_same_steps(*pair)


def test_changed_layers_under_checkpointing(pair: tuple[Any, Any]) -> None:
    for network in pair:
        network.set_grad_checkpointing()
        network.layer1[0].se.fc1.register_forward_hook(lambda _m, _args, y: 2 * y)
        network.layer2[0].bn2 = nn.GroupNorm(4, 32, dtype=torch.float64)
    assert_same_steps(*pair)


def test_features_extracted_by_name(pair: tuple[Any, Any]) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = ["layer1", "layer2", "layer2.0.se", "layer3.0.bn2"]
    found, want = (extraction.create_feature_extractor(network, names)(images()) for network in pair)
    assert sorted(found) == sorted(names)
    close(found, want)


@pytest.mark.parametrize("changed", [False, True], ids=["stock", "hooks"])
def test_compiled_once_in_one_graph(changed: bool, pair: tuple[Any, Any]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    for network in pair:
        if changed:
            network.layer1[0].se.fc1.register_forward_hook(lambda _m, _args, y: 2 * y)
            network.layer2[0].bn2 = nn.GroupNorm(4, 32, dtype=torch.float64)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(pair[0], backend=counter, fullgraph=True)
    for _ in range(3):
        close(compiled(images()), pair[1](images()))
    assert counter.frame_count == 1


def test_one_message_for_each_reason(pair: tuple[Any, Any], caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(stock, "_reported", set())
    fused = pair[0].eval()
    fused(images())
    assert not caplog.records
    for stage in (fused.layer1, fused.layer2):
        stage[0].se.fc1.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="setriton"):
        fused(images())
        fused(images())
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} calls its layers one after the other instead of one fused operator: {layer}: with hooks"
        for name, layer in (("BasicBlock", "se.fc1"), ("SqueezeExcite", "fc1"))
    ]
