"""What this machine can do, found out by doing it."""

import importlib.metadata
import platform

import torch
from rich.table import Table

from . import __version__, ops, reference
from .functional import squeeze_excite
from .kernels import stored

OPTIONAL = ("triton", "torchvision", "timm", "tyro", "tensorboard", "safetensors", "matplotlib", "scikit-learn")


def report() -> Table:
    """A table of versions, devices, and the state of the kernels on each device."""
    table = Table(title=f"setriton {__version__}", show_header=False, title_justify="left")
    table.add_row("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    table.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    for package in OPTIONAL:
        table.add_row(package, _version(package))
    table.add_section()
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        table.add_row(_name(device), check_kernels(device))
    table.add_section()
    for index in range(torch.cuda.device_count()):
        table.add_row(f"tile shapes, cuda:{index}", configurations(torch.cuda.get_device_name(index)))
    if not torch.cuda.device_count():
        table.add_row("tile shapes", "the cost model's picks: only a GPU can be tuned")
    return table


def check_kernels(device: torch.device) -> str:
    """Run squeeze_excite forward and backward on a device and compare it with float64: what ran, and how well."""
    path = "Triton kernels" if ops.has_kernels(device.type) else "reference path (plain PyTorch)"
    try:
        error = _worst_error(device)
    except Exception as problem:  # whatever a driver, a compiler or a device may come up with is what is asked for
        return f"{path}: FAILED, {type(problem).__name__}: {problem}"
    verdict = "right" if error < 1e-4 else "WRONG"
    return f"{path}: {verdict}, {error:.0e} from float64, forward and gradients"


def configurations(device: str) -> str:
    """Which configurations launches on a device take."""
    try:
        entries = stored.entries_of(device)
    except ValueError as error:
        return f"FAILED, {error}"
    if not entries:
        return "the cost model's picks; `setriton tune` measures better ones"
    own = sum(key in entries for key in stored.read(stored.user_file(device), device))
    return f"{len(entries)} tuned, {own} of them in {stored.user_file(device)}; `setriton tune --show` lists them"


def _worst_error(device: torch.device) -> float:
    """Largest error of y and the gradients against float64, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 64, 14, 14), (4, 64), (4,), (64, 4), (64,))
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours = [t.detach().to(device, torch.float32).requires_grad_() for t in exact]
    x, w1, b1, w2, b2 = exact
    want = reference.squeeze_excite(x, w1, b1, w2, b2, "relu", "sigmoid")
    x, w1, b1, w2, b2 = ours
    found = squeeze_excite(x, w1, b1, w2, b2)
    pairs = [(found.detach(), want.detach())]
    pairs += zip(
        torch.autograd.grad(found.square().sum(), ours), torch.autograd.grad(want.square().sum(), exact), strict=True
    )
    return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    gib = properties.total_memory / 2**30
    return f"{device} {properties.name}, {properties.multi_processor_count} SMs, {gib:.0f} GiB"
