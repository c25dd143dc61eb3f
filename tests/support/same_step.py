"""Two copies of a network take the same step: what converted networks are compared by."""

import torch
from graphs import randomize
from torch import Tensor, nn

from setriton import SqueezeExcite


def randomized(model: nn.Module) -> nn.Module:
    """In float64, with BN as after training: timm starts the last gamma of a block at 0, which would hide the block."""
    randomize(model.double())
    return model


def well_conditioned(model: nn.Module) -> nn.Module:
    """As `randomized`, for evaluation of deep networks: of wider ranges rounding grows from block to block."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0, generator=generator)  # type: ignore[arg-type]
    return model.double().eval()


def outcome(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """All that a step leaves: output, gradients of input and parameters, buffers."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.square().mean().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": {"": y.detach()}, "dx": {"": x.grad}, "gradients": gradients, "buffers": dict(model.named_buffers())}


def assert_same_step(model: nn.Module, twin: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Differences are at most `tolerance` of the largest output, gradient, or statistic."""
    found, wanted = outcome(model, x), outcome(twin, x)
    for what, tensors in wanted.items():
        assert found[what].keys() == tensors.keys()
        scale = max((float(tensor.abs().max()) for tensor in tensors.values()), default=0.0)
        for name, tensor in tensors.items():
            error = float((found[what][name].double() - tensor.double()).abs().max())
            assert error <= tolerance * scale, f"{what} {name}: {error / scale:.1e}"


def assert_same(model: nn.Module, twin: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """One step in training, then one in evaluation."""
    for training in (True, False):
        assert_same_step(model.train(training), twin.train(training), x, tolerance)


def images(size: int = 64) -> Tensor:
    """Two images of random numbers; smaller ones would leave BN two values a channel, whose gradients are rounding."""
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def tail(se: nn.Module | None = None, act: nn.Module | None = None, bn: nn.Module | None = None) -> nn.Sequential:
    """conv -> BN -> act -> SE -> conv in an nn.Sequential, for 8 channels."""
    bn = nn.BatchNorm2d(8) if bn is None else bn
    act = nn.SiLU() if act is None else act
    se = SqueezeExcite(8, 1 / 4) if se is None else se
    return nn.Sequential(nn.Conv2d(3, 8, 3), bn, act, se, nn.Conv2d(8, 4, 1))
