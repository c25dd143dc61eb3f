"""Configurations say what is wrong with them, in the words of the command line."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from setriton.recipes import RECIPES
from setriton.train import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    train,
)
from setriton.train.config import differences


def untyped(value: object) -> Any:
    """A value that type checkers refuse as well."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(layout=untyped("keras")), "model.layout must be one of caffe, torch, got 'keras'"),
        (lambda: ModelConfig(drop_rate=1.0), r"model.drop_rate must be in \[0, 1\), got 1.0"),
        (lambda: DataConfig("cifar10"), "data.source must be one of digits, imagefolder, synthetic, got 'cifar10'"),
        (lambda: DataConfig("imagefolder"), "imagefolder needs a folder: imagefolder:PATH"),
        (lambda: DataConfig("synthetic:many"), "whole number, got 'many'"),
        (lambda: DataConfig("digits", image_size=224), "digits has 8x8 images"),
        (lambda: DataConfig("synthetic", image_size=0), "data.image_size must be positive, got 0"),
        (lambda: DataConfig("synthetic", resize=100), "data.resize must be at least 224, got 100"),
        (lambda: DataConfig(workers=-1), "data.workers must be at least 0, got -1"),
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr must be positive, got 0.0"),
        (lambda: OptimizerConfig(lr=float("nan")), "optimizer.lr must be positive, got nan"),
        (lambda: OptimizerConfig(momentum=1.0), r"optimizer.momentum must be in \[0, 1\)"),
        (lambda: OptimizerConfig(momentum=0.0, nesterov=True), "nesterov needs optimizer.momentum > 0"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay must be at least 0, got -1.0"),
        (lambda: ScheduleConfig(untyped("linear")), "schedule.kind must be one of step, cosine, got 'linear'"),
        (lambda: ScheduleConfig(epochs=0), "schedule.epochs must be at least 1, got 0"),
        (lambda: ScheduleConfig(epochs=5, warmup_epochs=5), r"schedule.warmup_epochs must be in \[0, 5\), got 5"),
        (lambda: ParallelConfig(precision=untyped("fp8")), "parallel.precision must be one of fp32, bf16, got 'fp8'"),
        (lambda: ParallelConfig(device=untyped("tpu")), "parallel.device must be one of auto, cpu, cuda, got 'tpu'"),
        (lambda: ParallelConfig(accumulate=0), "parallel.accumulate must be at least 1, got 0"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep must be at least 1, got 0"),
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: OptimizerConfig(lr=float("inf")), "optimizer.lr must be finite, got inf"),
        (lambda: TrainConfig(log_every=0), "log_every must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(batch_size=untyped(2.5)), "batch_size must be of type int, got 2.5"),
        (lambda: TrainConfig(model=untyped("se_resnet20")), "model must be of type ModelConfig, got 'se_resnet20'"),
        (lambda: TrainConfig(out=untyped("runs")), "out must be of type Path, got 'runs'"),
        (lambda: DataConfig(untyped(3)), "data.source must be of type str, got 3"),
        (lambda: DataConfig(workers=untyped(True)), "data.workers must be of type int, got True"),
        (lambda: OptimizerConfig(nesterov=untyped(1)), "optimizer.nesterov must be of type bool, got 1"),
        (lambda: train(untyped(None)), "config must be a TrainConfig, got NoneType"),
    ],
)
def test_wrong_types_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_differences_name_the_option() -> None:
    before, now = (asdict(RECIPES[name][1]) for name in ("digits", "synthetic"))
    assert "optimizer.lr was 0.1, is 0.01" in differences(before, now)
    assert differences(before, before | {"out": "elsewhere", "resume": True}) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_a_description_and_an_out_of_their_own(name: str) -> None:
    description, config = RECIPES[name]
    assert description.endswith(".")
    assert config.out.name == name
    assert not config.resume


def test_the_paper_recipe_is_the_papers() -> None:
    config = RECIPES["imagenet-paper"][1]
    assert (config.batch_size, config.optimizer.lr, config.optimizer.momentum) == (1024, 0.6, 0.9)
    assert config.schedule == ScheduleConfig("step", epochs=100, step_epochs=30, gamma=0.1)
    assert (config.data.image_size, config.label_smoothing) == (224, 0.0)


def test_recipes_become_a_command_line() -> None:
    tyro = pytest.importorskip("tyro")
    arguments = ["digits", "--model.name", "resnet20", "--schedule.epochs", "3", "--resume", "--out", "elsewhere"]
    config = tyro.extras.overridable_config_cli(RECIPES, args=arguments)
    recipe = RECIPES["digits"][1]
    assert config.model.name == "resnet20"
    assert config.resume
    assert config.optimizer == recipe.optimizer
    assert config.schedule == replace(recipe.schedule, epochs=3)
