"""What `setriton bench models` times: networks with SE, the same without, and the ways to run them."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setriton

from .cases import DTYPES
from .measure import FAR, distance, refuse_other_results

# Most telling first: a run cut short has these. se_* are setriton's, the others timm's.
NETWORKS = (
    "seresnet50",
    "se_resnet50",
    "efficientnet_b0",
    "regnety_032",
    "seresnext101_32x4d",
    "mobilenetv3_large_100",
    "seresnet152",
    "se_resnet152",
    "legacy_senet154",
)
TRAINING, INFERENCE = "training", "inference"
MODES = (TRAINING, INFERENCE)
# Images that rounding is measured on and statistics are taken from: float32 copies of more need not fit beside them.
FEW = 32


@dataclass(frozen=True)
class Way:
    """How a network is run: as it is or without SE, accelerated or not, by a compiler or by eager PyTorch."""

    name: str
    title: str
    backend: str | None = "inductor"
    accelerated: bool = False
    plain: bool = False

    def apply(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What to call in place of the network, which may change."""
        if self.accelerated:
            setriton.accelerate(model)
        return model if self.backend is None else torch.compile(model, backend=_backend(self.backend))


EAGER, PLAIN, BACKEND = "eager", "plain", "backend"
WAYS = (
    Way(EAGER, "eager", backend=None),
    Way(PLAIN, "without SE, torch.compile", plain=True),
    Way(BACKEND, 'torch.compile(backend="setriton")', backend="setriton"),
    Way("compile", "torch.compile"),
    Way("accelerate", "setriton.accelerate, torch.compile", accelerated=True),
)


def _backend(name: str) -> Any:
    """setriton's has its name from an entry point, which a checkout that nobody installed has not."""
    if name == "setriton" and name not in torch.compiler.list_backends(()):
        from setriton.compile.backend import setriton as backend

        return backend
    return name


@functools.cache
def timm_missing() -> str:
    """Why timm cannot be imported; "" if it can."""
    try:
        import timm  # noqa: F401
    except Exception as error:  # a torchvision of another build fails with a RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def check_network(name: str) -> None:
    """ValueError unless setriton or timm has a network with SE of this name."""
    if name not in setriton.list_models():
        if reason := timm_missing():
            own = ", ".join(setriton.list_models("se*"))
            raise ValueError(f"networks must be of {own}, as timm cannot be imported ({reason}); got {name!r}")
        import timm

        if not timm.is_model(name):
            raise ValueError(f"networks must be names of setriton's or timm's; got {name!r}")
    with torch.device("meta"):
        if not any(map(is_se, build(name).modules())):
            raise ValueError(f"networks must have SE modules; {name} has none")


def build(name: str) -> nn.Module:
    """A network of setriton or, where that has none of this name, of timm; random weights, no dropout."""
    if name in setriton.list_models():
        return setriton.create_model(name)
    import timm

    return timm.create_model(name, drop_rate=0.0)


def without_se(model: nn.Module) -> nn.Module:
    """A copy of a network that does nothing where its SE modules were.

    Raises:
        ValueError: it has none.
    """
    plain = copy.deepcopy(model)
    found = [path for path, module in plain.named_modules() if is_se(module)]
    if not found:
        raise ValueError(f"model must have SE modules; {type(model).__name__} has none")
    for path in found:
        parent_path, _, name = path.rpartition(".")
        parent = plain.get_submodule(parent_path)
        # setriton's blocks call BN and SE at once, and know None for no SE.
        ours = type(parent).__module__.startswith("setriton.models.")
        setattr(parent, name, None if ours else nn.Identity())
    return plain


def is_se(module: nn.Module) -> bool:
    """Whether it is an SE block: timm's three, torchvision's or setriton's."""
    return re.fullmatch(r"SEModule|SqueezeExcit(e|ation)(Cl)?", type(module).__name__) is not None


def randomize(model: nn.Module) -> None:
    """BN parameters that hide no block, as zeros at the end of a residual branch do.

    Those at the end are small, as training leaves them: with ones, a deep network doubles a rounding error so often
    that its gradients tell nothing.
    """
    for bn in batch_norms(model):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.2)
    for block in model.modules():
        if hasattr(block, "downsample"):
            branch = [bn for path, bn in block.named_modules() if is_bn(bn) and not path.startswith("downsample")]
            for bn in branch[-1:]:
                nn.init.uniform_(bn.weight, 0.1, 0.3)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Running statistics near those of the images, and different enough to be told from them."""
    momenta = [bn.momentum for bn in batch_norms(model)]
    for bn in batch_norms(model):
        bn.momentum = 1.0
    model.train()(images)
    for bn, momentum in zip(batch_norms(model), momenta, strict=True):
        bn.momentum = momentum
        bn.running_mean += 0.1 * bn.running_var.sqrt() * torch.randn_like(bn.running_var)
        bn.running_var *= torch.empty_like(bn.running_var).uniform_(0.8, 1.25)


def batch_norms(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if is_bn(module))


def is_bn(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


class Step:
    """A training step, or an inference: under autocast, with float32 weights."""

    def __init__(
        self, model: nn.Module, way: Way, images: Tensor, labels: Tensor, *, training: bool, dtype: str
    ) -> None:
        self.model = model.train(training)
        self.images, self.labels = images, labels
        self.training = training
        self.dtype = DTYPES[dtype]
        # Before it is applied: these are compared by what they are, wherever they are then.
        self.parameters = list(model.parameters())
        self.function = way.apply(model)
        # Slow, for weights that stay near the random ones however often the step is repeated.
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def __call__(self) -> None:
        self.run(self.images, self.labels)

    def run(self, images: Tensor, labels: Tensor) -> None:
        """One step on any images."""
        if self.training:
            self._loss(images, labels)[1].backward()
            self.optimizer.step()
            # Afterwards, so that gradients are no part of what is there before a step.
            self.optimizer.zero_grad()
        else:
            self._logits(images)

    def outputs(self, few: int | None = None) -> dict[str, Tensor]:
        """Logits and, in training, the gradient of all parameters, which stay what they are."""
        images, labels = self.images[:few], self.labels[:few]
        if not self.training:
            return {"logits": self._logits(images)}
        logits, loss = self._loss(images, labels)
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.optimizer.zero_grad()
        return {"logits": logits.detach(), "gradient": torch.cat([gradient.flatten() for gradient in gradients])}

    def held_bytes(self) -> int:
        """Weights, buffers and momenta."""
        momenta = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.parameters, *self.model.buffers(), *momenta))

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = self.function(images)
            return logits, F.cross_entropy(logits, labels)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), self._autocast():
            return self.function(images)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Case:
    """A network in a mode, and what it is given."""

    network: str
    mode: str
    batch: int
    image_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.network}, {self.mode}, {self.batch} images"


def random_batch(size: int, image_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, and labels of the ten classes that any network has."""
    images = torch.randn((size, 3, image_size, image_size), device=device)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(10, (size,), device=device)


class Workload:
    """A case's network and its twin without SE, with the same weights, on a device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(0)
        model = build(case.network).to(device).to(memory_format=torch.channels_last)
        randomize(model)
        self.references: dict[bool, tuple[dict[str, Tensor], dict[str, float]]] = {}
        self.models = {False: model, True: without_se(model)}
        self.images, self.labels = random_batch(case.batch, case.image_size, device)
        for one in self.models.values():
            settle(one, torch.randn_like(self.images[:FEW]))

    def step(self, way: Way, dtype: str = "") -> Step:
        """A step of a copy of the network."""
        model = copy.deepcopy(self.models[way.plain])
        training = self.case.mode == TRAINING
        return Step(model, way, self.images, self.labels, training=training, dtype=dtype or self.case.dtype)

    def right_step(self, way: Way) -> Step:
        """A step that has run, and computes what eager PyTorch does.

        Raises:
            ValueError: it does not.
        """
        if way.plain not in self.references:
            self.references[way.plain] = self._reference(way.plain)
        want, far = self.references[way.plain]
        step = self.step(way)
        for what, found in step.outputs().items():
            refuse_other_results(what, found, want[what], far[what])
        step()
        return step

    def _reference(self, plain: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What eager PyTorch computes, and how far from it another result may be.

        Each has roundings of its own. Where eager's are more than FAR, as in deep networks, twice as far is near.
        """
        eager = Way(EAGER, "", backend=None, plain=plain)
        step = self.step(eager)
        rounded, exact = step.outputs(FEW), self.step(eager, "float32").outputs(FEW)
        return step.outputs(), {what: max(FAR, 2 * distance(rounded[what], exact[what])) for what in exact}
