"""What a training run is told: frozen dataclasses, checked when built; the command line is derived from them."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _require_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _require_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _require_one_of(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_types(config: object) -> None:
    """Each field holds what its annotation says; a whole number may stand for a float, infinity may not."""
    section = type(config).__name__.removesuffix("Config").lower()
    for name, wanted in get_type_hints(type(config)).items():
        value, option = getattr(config, name), name if section == "train" else f"{section}.{name}"
        if not _fits(value, wanted):
            raise TypeError(f"{option} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}")
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{option} must be finite, got {value}")


def _fits(value: object, wanted: Any) -> bool:
    if get_origin(wanted) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(wanted))
    if get_origin(wanted) is Literal:
        return isinstance(value, str)
    if wanted in (int, float):
        return isinstance(value, (int, wanted)) and not isinstance(value, bool)
    return isinstance(value, wanted)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What two configurations, as nested dictionaries, do not have in common; where they are and `resume` aside."""
    found = []
    for key in now:
        old, new = before.get(key), now[key]
        if isinstance(new, dict) and isinstance(old, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new and key not in ("out", "resume"):
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return found


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "se_resnet50"
    """Network name; `setriton models` lists them."""
    layout: Literal["caffe", "torch"] | None = None
    """Details that the authors' Caffe models and torchvision do differently; unset: the network's default."""
    drop_rate: float | None = None
    """Dropout probability in front of the classifier; unset: the network's own, 0.2 in SENet-154 and 0 in most."""
    zero_init_last: bool = False
    """Start each residual block as the identity."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.layout is not None:
            _require_one_of("model.layout", self.layout, ("caffe", "torch"))
        if self.drop_rate is not None:
            _require_fraction("model.drop_rate", self.drop_rate)

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `create_model`: those that are set."""
        values = {key: value for key, value in vars(self).items() if key != "name"}
        return {key: value for key, value in values.items() if value is not None and value is not False}


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    source: str = "digits"
    """digits | imagefolder:PATH (with PATH/train and PATH/val) | synthetic[:IMAGES]."""
    image_size: int | None = None
    """Side of the square network input, pixels; unset: 8 for digits, 224 otherwise."""
    resize: int | None = None
    """Shorter side to which validation images are scaled before the centre crop; unset: image_size * 256 / 224."""
    workers: int = 0
    """Data loading processes per rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _check_types(self)
        kind, _, argument = self.source.partition(":")
        _require_one_of("data.source", kind, ("digits", "imagefolder", "synthetic"))
        if kind == "imagefolder" and not argument:
            raise ValueError("data.source imagefolder needs a folder: imagefolder:PATH")
        if kind == "synthetic" and argument and not (argument.isdecimal() and int(argument) > 0):
            raise ValueError(f"data.source synthetic:IMAGES needs a positive whole number, got {argument!r}")
        if kind == "digits" and (argument or self.image_size not in (None, 8) or self.resize is not None):
            raise ValueError("data.source digits has 8x8 images: it takes no argument, other image_size or resize")
        if self.image_size is not None:
            _require_positive("data.image_size", self.image_size)
        if self.resize is not None:
            _require_at_least("data.resize", self.resize, self.image_size or 224)
        _require_at_least("data.workers", self.workers, 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent."""

    lr: float = 0.1
    """Peak learning rate at the global batch size given; never rescaled."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient."""
    decay_norm_and_bias: bool = True
    """Decay BatchNorm parameters and biases as well."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_positive("optimizer.lr", self.lr)
        _require_fraction("optimizer.momentum", self.momentum)
        _require_at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs optimizer.momentum > 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time."""

    kind: Literal["step", "cosine"] = "step"
    """step: lr * gamma every step_epochs; cosine: from lr to zero."""
    epochs: int = 100
    """Passes over the training images."""
    step_epochs: int = 30
    """step: epochs between two drops."""
    gamma: float = 0.1
    """step: factor of each drop."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero to lr, of either kind."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_one_of("schedule.kind", self.kind, ("step", "cosine"))
        _require_at_least("schedule.epochs", self.epochs, 1)
        _require_at_least("schedule.step_epochs", self.step_epochs, 1)
        _require_positive("schedule.gamma", self.gamma)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be in [0, {self.epochs}), got {self.warmup_epochs}")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU per process where there are GPUs, the CPU otherwise."""
    replicate: int = 1
    """Groups that each hold the whole network, sharded over the group's ranks; 1 shards over all ranks."""
    reshard_after_forward: bool = False
    """Free the gathered weights after forward and gather them again in backward: less memory, 50 % more traffic."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and BatchNorm statistics stay fp32."""
    compile: bool = False
    """torch.compile every residual block."""
    accumulate: int = 1
    """Micro-steps per optimizer step; the global batch stays what batch_size says."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_one_of("parallel.device", self.device, ("auto", "cpu", "cuda"))
        _require_one_of("parallel.precision", self.precision, ("fp32", "bf16"))
        _require_at_least("parallel.replicate", self.replicate, 1)
        _require_at_least("parallel.accumulate", self.accumulate, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be resumed from. The end of a run is always saved."""

    every_epochs: int = 1
    """Save every so many epochs; 0 is off."""
    every_steps: int = 0
    """Save every so many steps as well; 0 is off."""
    keep: int = 2
    """Checkpoints kept; an old one goes only after the new one is complete on disk."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_at_least("checkpoint.every_epochs", self.every_epochs, 0)
        _require_at_least("checkpoint.every_steps", self.every_steps, 0)
        _require_at_least("checkpoint.keep", self.keep, 1)

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether to save once `step` steps are done."""
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_steps or (self.every_epochs > 0 and step % (self.every_epochs * steps_per_epoch) == 0)


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    batch_size: int = 256
    """Images per optimizer step over all ranks."""
    label_smoothing: float = 0.0
    """Label smoothing of the training loss."""
    seed: int = 0
    """Of initialisation, order, augmentation and dropout."""
    log_every: int = 20
    """Steps between two looks at the loss; a request to stop is seen at the next one."""
    out: Path = Path("runs/train")
    """Folder of checkpoints, metrics.csv, TensorBoard files, model.safetensors and result.json."""
    resume: bool = False
    """Go on from the newest checkpoint in out."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require_at_least("batch_size", self.batch_size, 1)
        _require_fraction("label_smoothing", self.label_smoothing)
        _require_at_least("seed", self.seed, 0)
        _require_at_least("log_every", self.log_every, 1)
