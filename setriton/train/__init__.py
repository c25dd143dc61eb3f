"""Training: `train(TrainConfig(...))` runs or resumes one, `evaluate(path)` looks at what it left.

Configurations import at once; what needs torch's distributed packages is imported on first use, so that a command line
made of recipes starts quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any

from setriton.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from setriton.train.evaluation import EvalResult as EvalResult
    from setriton.train.evaluation import evaluate as evaluate
    from setriton.train.export import load_exported as load_exported
    from setriton.train.trainer import NonFiniteError as NonFiniteError
    from setriton.train.trainer import TrainResult as TrainResult
    from setriton.train.trainer import train as train

_HOMES = {
    "EvalResult": "evaluation",
    "evaluate": "evaluation",
    "load_exported": "export",
    "NonFiniteError": "trainer",
    "TrainResult": "trainer",
    "train": "trainer",
}
__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalResult",
    "ModelConfig",
    "NonFiniteError",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_exported",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
