"""Compiled and accelerated networks in the rest of PyTorch: export, AOTInductor, checkpointing, DDP, FSDP2 ..."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from residual import Network, image
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import setriton

TOLERANCE = 1e-12


def networks() -> tuple[nn.Module, nn.Module]:
    """A network in float64, and its twin."""
    torch._dynamo.reset()
    setriton.reset_compile_report()
    network = Network().double()
    return network, copy.deepcopy(network)


def gradients(network: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(network.parameters())))


def assert_same(found: Any, want: Any) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE * want[0].abs().max().item() + TOLERANCE)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(dynamic: bool, tmp_path: Path) -> None:
    """An exported graph is one that can be rewritten, and an accelerated network one that can be exported."""
    from setriton.compile.rewrite import rewrite

    network, twin = networks()
    network.eval(), twin.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},) if dynamic else None
    program = torch.export.export(network, (image(4),), dynamic_shapes=shapes)
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    assert [match.kind for match in rewrite(module)] == ["bn_se+add+relu"] * 3
    n = 6 if dynamic else 4
    assert_same([module(image(n))], [twin(image(n))])
    setriton.accelerate(network)
    torch.export.save(torch.export.export(network, (image(4),), dynamic_shapes=shapes), tmp_path / "network.pt2")
    assert_same([torch.export.load(tmp_path / "network.pt2").module()(image(n))], [twin(image(n))])


def test_aot_inductor(tmp_path: Path) -> None:
    network, twin = networks()
    setriton.accelerate(network.eval())
    with torch.no_grad():
        program = torch.export.export(network, (image(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        assert_same([torch._inductor.aoti_load_package(path)(image())], [twin.eval()(image())])


def test_selective_checkpointing() -> None:
    """A policy that keeps the convolutions and has the tails computed again."""

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = op is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    class Checkpointed(Network):
        def forward(self, x: Tensor) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return x

    _, twin = networks()
    network = Checkpointed().double().eval()
    twin.eval()
    y = torch.compile(network, backend="setriton", fullgraph=True)(image())
    assert len(setriton.compile_report().replaced) == 3
    want = twin(image())
    assert_same([y, *gradients(network, y)], [want, *gradients(twin, want)])


def test_functional_call() -> None:
    network, twin = networks()
    parameters = {name: 1.5 * p.detach() for name, p in network.named_parameters()}

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,))

    y = torch.compile(call, backend="setriton", fullgraph=True)(image())
    assert len(setriton.compile_report().replaced) == 3
    assert_same([y], [torch.func.functional_call(twin, parameters, (image(),))])


def test_autocast() -> None:
    """Results have eager's dtype, and are nearer to float32's than eager's are, or as near."""
    network, twin = networks()
    network.float(), twin.float()
    x = image().float()
    want = copy.deepcopy(twin)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = twin(x)
        found = torch.compile(network, backend="setriton", fullgraph=True)(x)
    assert len(setriton.compile_report().replaced) == 3
    assert found.dtype == eager.dtype
    assert (found - want).norm() <= 1.1 * (eager - want).norm()


def test_inference_mode() -> None:
    network, twin = networks()
    with torch.inference_mode():
        y = torch.compile(network.eval(), backend="setriton", fullgraph=True)(image())
        assert_same([y], [twin.eval()(image())])
    assert len(setriton.compile_report().replaced) == 3


def test_reduce_overhead() -> None:
    """CUDA graphs where there is a GPU; the mode is taken everywhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, twin = networks()
    network, twin = network.to(device), twin.to(device)
    compiled = torch.compile(network, backend="setriton", mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        x = image().to(device)
        y, want = compiled(x), twin(x)
        assert_same([y.clone(), *gradients(network, y)], [want, *gradients(twin, want)])


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
def test_ddp() -> None:
    network, twin = networks()
    compiled = torch.compile(nn.parallel.DistributedDataParallel(network), backend="setriton")
    compiled(image()).square().sum().backward()
    assert len(setriton.compile_report().replaced) == 3
    want = twin(image())
    assert_same([p.grad for p in network.parameters()], gradients(twin, want))


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
def test_fsdp2() -> None:
    """Blocks compiled one by one and then sharded, as training does."""
    from torch.distributed.fsdp import fully_shard

    network, twin = networks()
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in network.blocks:  # type: ignore[union-attr]
        block.compile(backend="setriton", fullgraph=True)
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network(image()).square().sum().backward()
    assert [match.kind for match in setriton.compile_report()] == ["bn_se+add+relu"] * len(setriton.compile_report())
    assert len(setriton.compile_report()) >= 1
    want = twin(image())
    assert_same([p.grad.full_tensor() for p in network.parameters()], gradients(twin, want))  # type: ignore[union-attr]


def test_copies_of_compiled_networks() -> None:
    network, twin = networks()
    compiled = torch.compile(network, backend="setriton")
    y = copy.deepcopy(compiled)(image())
    assert_same([y], [twin(image())])
