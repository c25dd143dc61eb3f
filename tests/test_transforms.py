"""torch.func's transforms: what they give for SE as users write it, in float64, of functions, networks and graphs."""

from typing import Any

import pytest
import torch
from graphs import rewriting
from tail_oracle import make_tail_inputs
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from transforms import PAIRS, TRANSFORMS, assert_equal, random, tail_pair

import setriton
from setriton import composite
from setriton.compile.report import reset_compile_report


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pair", PAIRS)
def test_transforms(pair: str, transform: str) -> None:
    tensors, ours, naive = PAIRS[pair]()
    found, wanted = (TRANSFORMS[transform](f, len(tensors))(*tensors) for f in (ours, naive))
    assert_equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype) -> None:
    """Maps and statistics of different dtypes keep theirs, and statistics move as they do without a transform."""
    tensors = make_tail_inputs(3, 4, 2, 3, 3, dtype)
    parameters = list(tensors[1:10])
    statistics = [torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)]
    parameters[2:4] = statistics

    def function(x: Tensor) -> Tensor:
        *arguments, residual = parameters
        return setriton.bn_squeeze_excite(x, *arguments, residual=residual, training=True)  # type: ignore[arg-type]

    y, tangent = jvp(function, (tensors.x,), (tensors.x,))
    moved = [t.clone() for t in statistics]
    statistics[0].zero_()
    statistics[1].fill_(1)
    torch.testing.assert_close(y, function(tensors.x))
    assert tangent.dtype == y.dtype == dtype
    for found, wanted in zip(moved, statistics, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("batched", [True, False], ids=["batched statistics", "shared statistics"])
def test_running_statistics_under_vmap_are_batch_norms(batched: bool) -> None:
    """Each network of an ensemble moves its own; one that all share cannot be moved by each."""
    tail = setriton.BatchNormSqueezeExcite(3, rd_channels=2, dtype=torch.float64)
    twin = nn.Sequential(tail.bn, tail.se)
    x = random(4, 2, 3, 2, 2)
    if not batched:
        for module in (tail, twin):
            with pytest.raises(RuntimeError, match="running_mean or running_var"):
                vmap(module)(x)
        return
    results = []
    for module in (tail, twin):
        parameters, buffers = stack_module_state([module] * 4)
        y = vmap(lambda p, b, x, m=module: functional_call(m, (p, b), x))(parameters, buffers, x)
        results.append([y, *buffers.values()])
    assert_equal(*results)
    assert not torch.equal(results[0][1][0], results[0][1][1])


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """A small SE-ResNet, and the same from stock layers."""
    ours, stock = (setriton.create_model("se_resnet20", num_classes=3, fused=f).double() for f in (True, False))
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5 if "running_var" in name else -0.5, 1)
    stock.load_state_dict(ours.state_dict())
    return ours.eval(), stock.eval()


def test_per_sample_gradients_of_a_network(networks: tuple[nn.Module, nn.Module]) -> None:
    x, labels = random(3, 3, 8, 8), torch.tensor([0, 1, 2])

    def loss(network: nn.Module, parameters: Any, buffers: Any, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (parameters, buffers), image[None])
        return nn.functional.cross_entropy(logits, label[None])

    results = []
    for network in networks:
        parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
        one = grad(lambda *t, n=network: loss(n, *t))
        results.append(vmap(one, (None, None, 0, 0))(parameters, buffers, x, labels))
    assert_equal(*results)
    weights = list(networks[0].parameters())
    alone = torch.autograd.grad(nn.functional.cross_entropy(networks[0](x[1:2]), labels[1:2]), weights)
    assert_equal([g[1] for g in results[0].values()], list(alone))


def test_an_ensemble_of_networks(networks: tuple[nn.Module, nn.Module]) -> None:
    """In training mode: outputs, gradients of all parameters, and running statistics of each network."""
    x = random(2, 3, 8, 8)
    results = []
    for network in networks:
        parameters, buffers = stack_module_state([network.train()] * 2)
        parameters = {name: p.detach() for name, p in parameters.items()}
        buffers = {name: b.clone() for name, b in buffers.items()}

        def loss(parameters: Any, buffers: Any, x: Tensor, n: nn.Module = network) -> Tensor:
            return functional_call(n, (parameters, buffers), x).square().sum()

        gradients = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
        results.append([*gradients.values(), *buffers.values()])
        network.eval()
    assert_equal(*results)


def test_a_process_group_is_refused() -> None:
    tensors = make_tail_inputs(2, 3, 2, 2, 2, torch.float64)
    *arguments, residual, _, _ = tensors
    with pytest.raises(NotImplementedError, match=r"setriton.bn_squeeze_excite with statistics of a process_group"):
        composite.bn_squeeze_excite(
            *arguments, residual, True, 0.1, 1e-5, "identity", "relu", "sigmoid", "identity", "0"
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms(backend: str) -> None:
    torch._dynamo.reset()
    tensors, ours, naive = tail_pair(out_act="relu")
    for transform in ("grad", "vmap", "jvp"):
        compiled = torch.compile(TRANSFORMS[transform](ours, len(tensors)), backend=backend, fullgraph=True)
        assert_equal(compiled(*tensors), TRANSFORMS[transform](naive, len(tensors))(*tensors))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vmap of grad", "vmap of the weights"])
@pytest.mark.parametrize("pair", ["training", "evaluation"])
def test_rewritten_graphs(pair: str, transform: str) -> None:
    """Blocks within a transform are left alone, with this reason, and the results are eager's."""
    assert_rewritten(pair, transform, rewriting)


def test_a_rewritten_graph_under_the_backend() -> None:
    assert_rewritten("evaluation", "vmap", "setriton", options={"compile_threads": 1})


def assert_rewritten(pair: str, transform: str, backend: Any, **options: Any) -> None:
    torch._dynamo.reset()
    reset_compile_report()
    tensors, _, naive = PAIRS[pair]()
    function = TRANSFORMS[transform](naive, len(tensors))
    found = torch.compile(function, backend=backend, fullgraph=True, **options)(*tensors)
    report = setriton.compile_report()
    assert not report.replaced
    assert {match.reason for match in report.left} == {"inside of a function transform"}
    assert_equal(found, function(*tensors))
