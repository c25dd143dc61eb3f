"""Whole runs of a few steps, alone in this process."""

import csv
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from setriton.train import (
    DataConfig,
    ModelConfig,
    NonFiniteError,
    ParallelConfig,
    TrainConfig,
    evaluate,
    load_exported,
    train,
)
from setriton.train import trainer as trainer_module
from setriton.train.optimizer import make_optimizer
from setriton.train.trainer import Trainer

SameRun = Callable[[Path, Path], None]


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Trainer], None]) -> None:
    train_step = Trainer.train_step

    def patched(trainer: Trainer, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if trainer.step == step:
            action(trainer)
        train_step(trainer, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", patched)


def test_a_run_leaves_what_it_promises(config: TrainConfig) -> None:
    result = train(config)
    assert (result.completed, result.epochs, result.steps, result.world_size) == (True, 2, 22, 1)
    saved = json.loads((config.out / "result.json").read_text())
    assert saved["val_error_top1"] == result.val_error_top1
    assert json.loads((config.out / "config.json").read_text())["batch_size"] == 128
    with (config.out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "11"), ("1", "22")]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["val_error_top1"]) == result.val_error_top1
    assert list((config.out / "tensorboard").iterdir())
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step-00000020", "step-00000022"]


def test_the_exported_network_evaluates_to_the_same_error(short: TrainConfig) -> None:
    result = train(short)
    path = short.out / "model.safetensors"
    model, header = load_exported(path)
    assert (header.model, header.origin) == ("se_resnet20", "digits")
    assert header.options == {"num_classes": 10, "in_chans": 1, "drop_rate": 0.1}
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    again = evaluate(path, parallel=ParallelConfig(device="cpu"))
    assert again.images == 360
    assert again.error_top1 == result.val_error_top1
    assert again.loss == pytest.approx(result.val_loss, rel=1e-6)


def test_evaluation_takes_the_size_and_the_images_of_training(short: TrainConfig) -> None:
    data = DataConfig("synthetic:64", image_size=32)
    result = train(replace(short, data=data, batch_size=32))
    again = evaluate(short.out / "model.safetensors", parallel=short.parallel)
    assert (again.images, again.error_top5) == (7, result.val_error_top5)
    assert again.loss == pytest.approx(result.val_loss, rel=1e-5)


def test_evaluation_refuses_what_does_not_fit(short: TrainConfig, tmp_path: Path) -> None:
    train(short)
    path = short.out / "model.safetensors"
    with pytest.raises(ValueError, match=r"has num_classes 10, the images of synthetic:20 have 1000"):
        evaluate(path, "synthetic:20", image_size=32)
    with pytest.raises(FileNotFoundError, match="no file"):
        evaluate(tmp_path / "nothing.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        evaluate(garbage)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, str(garbage))
    with pytest.raises(ValueError, match="does not say which network"):
        evaluate(garbage)


@pytest.mark.parametrize("step", [5, 13])
def test_a_stopped_run_goes_on_where_it_was(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        stopped = train(config)
    assert not stopped.completed
    assert stopped.steps == step + 1
    assert not (config.out / "result.json").exists()
    wanted = f"stopped after step {step + 1}; the same command with --resume goes on from {config.out}"
    assert wanted in capsys.readouterr().out
    assert train(replace(config, resume=True)).completed


def test_a_stopped_run_ends_like_an_undisturbed_one(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, assert_same_run: SameRun, undisturbed: Path
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, 13, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
        train(config)
    train(replace(config, resume=True))
    assert_same_run(config.out, undisturbed)


def test_signal_handlers_are_given_back(short: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(short)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_with_a_run_is_not_overwritten(short: TrainConfig) -> None:
    train(short)
    with pytest.raises(FileExistsError, match="go on with --resume, or choose another --out"):
        train(short)


def test_a_refused_start_touches_nothing_of_a_running_save(short: TrainConfig) -> None:
    train(short)
    saving = short.out / "checkpoints" / "step-00000009.tmp"
    saving.mkdir()
    with pytest.raises(FileExistsError):
        train(short)
    assert saving.is_dir()


def test_resuming_with_other_settings_says_so(short: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(short)
    schedule = replace(short.schedule, epochs=2)
    train(replace(short, resume=True, schedule=schedule, optimizer=replace(short.optimizer, lr=0.01)))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not as before")]
    assert said == [
        f"not as before: optimizer.lr was {short.optimizer.lr}, is 0.01",
        "not as before: schedule.epochs was 1, is 2",
    ]


def test_resuming_a_finished_run_changes_nothing(short: TrainConfig) -> None:
    first = train(short)
    before = (short.out / "metrics.csv").read_text()
    again = train(replace(short, resume=True))
    assert again.completed
    assert again.images_per_second is None
    assert again.val_loss == first.val_loss
    assert (short.out / "metrics.csv").read_text() == before


def test_resuming_nothing_starts_and_says_so(short: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(replace(short, resume=True)).completed
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_another_run_is_refused(short: TrainConfig) -> None:
    train(short)
    with pytest.raises(ValueError, match="belongs to another run: it has seed 0, now 1"):
        train(replace(short, resume=True, seed=1))
    with pytest.raises(ValueError, match="batch_size 512, now 256"):
        train(replace(short, resume=True, batch_size=256))


def test_a_nan_input_ends_the_run_and_is_never_saved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(trainer: Trainer) -> None:
        normalize = trainer.normalize
        trainer.normalize = lambda images: normalize(images) * float("nan")

    before_step(monkeypatch, 5, poison)
    message = r"the loss of step 6 is not finite; .* newest checkpoint is .*step-00000004"
    with pytest.raises(NonFiniteError, match=message):
        train(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (config.out / "model.safetensors").exists()


def test_a_weight_that_is_not_finite_is_never_saved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step

    def patched(trainer: Trainer, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        train_step(trainer, micro_batches)
        if trainer.step == 8:
            next(trainer.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "train_step", patched)
    with pytest.raises(NonFiniteError, match="a weight is not finite after step 8"):
        train(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000004"]


def test_bf16_trains_with_fp32_weights_and_statistics(short: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def look(trainer: Trainer) -> None:
        conv = next(module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    before_step(monkeypatch, 1, look)
    train(replace(short, parallel=ParallelConfig(device="cpu", precision="bf16")))
    assert set(seen) == {torch.bfloat16}
    model, _ = load_exported(short.out / "model.safetensors")
    dtypes = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(dtypes.values()) == {torch.float32}


def test_compiled_blocks_train_and_evaluate(short: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block, **options: compiled.append(block))
    train(replace(short, parallel=ParallelConfig(device="cpu", compile=True)))
    assert len(compiled) == 9, "one per block of ResNet-20"


def test_weight_decay_can_leave_norms_and_biases_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    config = TrainConfig().optimizer
    decays = [group["weight_decay"] for group in make_optimizer(model, config).param_groups]
    assert decays == [1e-4, 1e-4]
    spared = make_optimizer(model, replace(config, decay_norm_and_bias=False)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in spared] == [(1e-4, 1), (0.0, 3)]


def test_workers_and_accumulation_change_no_sample(
    short: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    train_step = Trainer.train_step

    def look(trainer: Trainer, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        seen.setdefault(trainer.config.out.name, []).append(torch.cat([images for images, _ in micro_batches]))
        train_step(trainer, micro_batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", look)
    train(replace(short, out=tmp_path / "plain"))
    changed = replace(short.parallel, accumulate=4)
    train(replace(short, out=tmp_path / "changed", parallel=changed, data=replace(short.data, workers=1)))
    for plain, other in zip(seen["plain"], seen["changed"], strict=True):
        assert torch.equal(plain, other)


def test_random_numbers_of_dropout_are_others_at_each_step(short: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    train_step = Trainer.train_step

    def look(trainer: Trainer, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        train_step(trainer, micro_batches)
        seeds.append(torch.initial_seed())

    monkeypatch.setattr(Trainer, "train_step", look)
    train(short)
    assert len(set(seeds)) == len(seeds) == 2


def test_unknown_networks_are_refused_before_anything_is_written(short: TrainConfig) -> None:
    with pytest.raises(ValueError, match="se_resnet21"):
        train(replace(short, model=ModelConfig("se_resnet21")))
    assert not short.out.exists()
