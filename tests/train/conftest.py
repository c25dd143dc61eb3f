"""Runs of a few steps on digits, in this process or on several under torchrun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

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

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started pytest, tests that call train() are a world of their own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Two epochs of eleven steps; seconds on one core."""
    return TrainConfig(
        model=ModelConfig("se_resnet20", drop_rate=0.1),
        data=DataConfig("digits"),
        optimizer=OptimizerConfig(lr=0.05),
        schedule=ScheduleConfig("cosine", epochs=2, warmup_epochs=0.5),
        parallel=ParallelConfig(device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=1, every_steps=4),
        batch_size=128,
        log_every=2,
        out=tmp_path / "run",
    )


@pytest.fixture
def short(config: TrainConfig) -> TrainConfig:
    """One epoch of two steps."""
    return replace(
        config,
        schedule=ScheduleConfig("cosine", epochs=1),
        checkpoint=CheckpointConfig(every_epochs=1),
        batch_size=512,
        log_every=1,
    )


@pytest.fixture(scope="session")
def finished() -> Iterator[dict[str, Path]]:
    """Remembers the run of `undisturbed`."""
    runs: dict[str, Path] = {}
    yield runs
    for out in runs.values():
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def undisturbed(config: TrainConfig, finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run of `config`, which tests compare with and copy, and do not change."""
    if "run" not in finished:
        out = tmp_path_factory.mktemp("finished")
        train(replace(config, out=out))
        finished["run"] = out
    return finished["run"]


@pytest.fixture
def torchrun() -> list[str]:
    """The start of a command line: torchrun, on a free port of its own choice."""
    return [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.fixture
def rank_environment() -> dict[str, str]:
    """One thread per rank, and gloo even where there are GPUs."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def launch(torchrun: list[str], rank_environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """launch(*arguments, ranks=2, max_restarts=0, script=WORKER, check=True, **environment): the finished torchrun."""

    def run(
        *arguments: object,
        ranks: int = 2,
        max_restarts: int = 0,
        script: Path = WORKER,
        check: bool = True,
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        command = [*torchrun, f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", str(script)]
        process = subprocess.run(
            [*command, *map(str, arguments)],
            env=rank_environment | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if check and process.returncode:
            raise AssertionError(f"exit {process.returncode}\n{process.stdout}\n{process.stderr}")
        return process

    return run


@pytest.fixture
def arguments(config: TrainConfig) -> list[str]:
    """The fixture `config` for worker.py."""
    return [
        "digits",
        f"--model.drop-rate={config.model.drop_rate}",
        f"--optimizer.lr={config.optimizer.lr}",
        "--optimizer.no-nesterov",
        f"--optimizer.weight-decay={config.optimizer.weight_decay}",
        f"--schedule.epochs={config.schedule.epochs}",
        f"--schedule.warmup-epochs={config.schedule.warmup_epochs}",
        "--parallel.device=cpu",
        f"--checkpoint.every-epochs={config.checkpoint.every_epochs}",
        f"--checkpoint.every-steps={config.checkpoint.every_steps}",
        f"--batch-size={config.batch_size}",
        f"--log-every={config.log_every}",
    ]


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Two folders hold the same run bit for bit: weights, BatchNorm statistics, every loss and error of every epoch."""

    def curve(out: Path) -> list[str]:
        """metrics.csv without its last two columns, which are of time."""
        return [line.rsplit(",", 2)[0] for line in (out / "metrics.csv").read_text().splitlines()]

    def check(out: Path, reference: Path) -> None:
        assert curve(out) == curve(reference)
        assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()

    return check
