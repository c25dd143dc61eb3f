"""What only a GPU can show."""

import pytest
import torch
from oracle import make_inputs, naive_squeeze_excite

from setriton import SqueezeExcite, squeeze_excite

pytestmark = pytest.mark.gpu


def test_cuda_graph_replays_a_training_step() -> None:
    module = SqueezeExcite(64).cuda()
    x = torch.randn(4, 64, 14, 14, device="cuda").to(memory_format=torch.channels_last).requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        y = module(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for found, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_more_than_2_31_elements(channels_last: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    n, c, r = 17, 256, 16
    weights = [t.cuda() for t in make_inputs(1, c, r, 1, 1, torch.float32, channels_last=False)[1:5] if t is not None]
    x = torch.empty(n, c, 704, 704, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    assert x.numel() > 2**31
    y = squeeze_excite(x, *weights)
    last = x[-1:].double()
    want = naive_squeeze_excite(last, *(w.double() for w in weights), "relu", "sigmoid")
    torch.testing.assert_close(y[-1:].double(), want, rtol=2**-8, atol=1e-3)


def test_mode_reduce_overhead() -> None:
    torch._dynamo.reset()
    module = SqueezeExcite(64).cuda()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(8, 64, 14, 14, device="cuda")
        torch.testing.assert_close(compiled(x), module(x))


def test_tensors_on_the_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module = SqueezeExcite(64).to("cuda:1")
    x = torch.randn(4, 64, 7, 7, device="cuda:1", requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
