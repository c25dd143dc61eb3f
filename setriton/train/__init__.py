"""Training: `train(TrainConfig(...))` runs or resumes one, `evaluate(path)` looks at what it left."""

from setriton.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from setriton.train.evaluate import EvalResult, evaluate
from setriton.train.export import ExportMetadata, load_exported
from setriton.train.trainer import NonFiniteError, TrainResult, train

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalResult",
    "ExportMetadata",
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
