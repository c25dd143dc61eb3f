"""A run on one GPU: NCCL, autocast, compiled blocks, and a checkpoint to go on from."""

import json
from dataclasses import replace

import pytest
import torch

from setriton.train import ParallelConfig, TrainConfig, evaluate, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(device="cuda"),
        ParallelConfig(device="cuda", precision="bf16"),
        ParallelConfig(device="cuda", precision="bf16", compile=True, accumulate=2),
    ],
)
def test_digits_are_learned_on_a_gpu(config: TrainConfig, parallel: ParallelConfig) -> None:
    config = replace(config, parallel=parallel, schedule=replace(config.schedule, epochs=6))
    result = train(config)
    assert result.device == torch.cuda.get_device_name()
    assert result.val_error_top1 is not None
    assert result.val_error_top1 < 20
    longer = replace(config, resume=True, schedule=replace(config.schedule, epochs=7))
    assert train(longer).steps == 77
    again = evaluate(config.out / "model.safetensors", parallel=ParallelConfig(device="cuda"))
    assert again.error_top1 < 20
    assert json.loads((config.out / "result.json").read_text())["completed"]
