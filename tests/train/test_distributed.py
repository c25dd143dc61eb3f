"""Several ranks under torchrun: the same numbers as one, and a run that survives what happens to it."""

import csv
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from setriton.train import TrainConfig, load_exported, train

pytestmark = pytest.mark.distributed
Launch = Callable[..., "subprocess.CompletedProcess[str]"]
SameRun = Callable[[Path, Path], None]
WORKER = Path(__file__).with_name("worker.py")


def column(out: Path, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs that tests of this file share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def two_ranks(runs: Path, arguments: list[str], launch: Launch) -> Path:
    """The undisturbed run of two ranks."""
    out = runs / "two_ranks"
    if not out.exists():
        output = launch(*arguments, f"--out={out}").stdout
        assert output.count("epoch 1/2") == 1, "rank 0 alone reports"
    return out


@pytest.mark.parametrize(
    ("ranks", "options"), [(2, []), (4, ["--parallel.replicate=2", "--parallel.reshard-after-forward"])]
)
def test_ranks_compute_what_one_does_with_accumulation(
    short: TrainConfig, arguments: list[str], launch: Launch, tmp_path: Path, ranks: int, options: list[str]
) -> None:
    """Equal but for the order of sums. Two steps: over twenty, such differences grow to percents of a weight."""
    alone = replace(short, parallel=replace(short.parallel, accumulate=ranks))
    train(alone)
    two_steps = ["--schedule.epochs=1", "--schedule.warmup-epochs=0", f"--batch-size={short.batch_size}"]
    launch(*arguments, *two_steps, *options, f"--out={tmp_path / 'ranks'}", ranks=ranks)
    assert column(tmp_path / "ranks", "train_loss") == pytest.approx(column(alone.out, "train_loss"), rel=1e-6)
    model, _ = load_exported(tmp_path / "ranks" / "model.safetensors")
    reference, _ = load_exported(alone.out / "model.safetensors")
    for (name, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter - wanted).norm() <= 1e-5 * wanted.norm() + 5e-6, name


def test_one_rank_goes_on_from_what_two_saved(config: TrainConfig, two_ranks: Path) -> None:
    shutil.copytree(two_ranks, config.out)
    result = train(replace(config, resume=True, schedule=replace(config.schedule, epochs=3)))
    assert (result.completed, result.steps, result.world_size) == (True, 33, 1)
    assert column(config.out, "epoch") == [0, 1, 2]
    assert column(config.out, "train_loss")[2] < column(config.out, "train_loss")[1]


def test_a_killed_rank_is_restarted_and_the_run_ends_like_an_undisturbed_one(
    arguments: list[str], launch: Launch, tmp_path: Path, two_ranks: Path, assert_same_run: SameRun
) -> None:
    process = launch(*arguments, f"--out={tmp_path}", max_restarts=1, FAULT="kill:1:14")
    assert "resuming after step 12 of 22" in process.stdout
    assert_same_run(tmp_path, two_ranks)


def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(
    arguments: list[str], launch: Launch, tmp_path: Path, two_ranks: Path, assert_same_run: SameRun
) -> None:
    assert launch(*arguments, f"--out={tmp_path}", check=False, FAULT="kill-save:0:8").returncode
    assert (tmp_path / "checkpoints" / "step-00000008.tmp").exists()
    process = launch(*arguments, f"--out={tmp_path}", "--resume")
    assert "resuming after step 4 of 22" in process.stdout
    assert_same_run(tmp_path, two_ranks)


def test_sigterm_to_torchrun_saves_what_there_is(
    arguments: list[str], config: TrainConfig, torchrun: list[str], rank_environment: dict[str, str]
) -> None:
    out = config.out
    command = [*torchrun, "--nproc-per-node=2", str(WORKER), *arguments, f"--out={out}", "--schedule.epochs=60"]
    with subprocess.Popen(
        command, env=rank_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as agent:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-????????")) and time.monotonic() < deadline:
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        stdout, stderr = agent.communicate(timeout=60)
    assert "the same command with --resume goes on from" in stdout, stderr
    assert not (out / "result.json").exists()
    saved = max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-????????"))
    epochs = saved // 11 + 1
    result = train(replace(config, resume=True, schedule=replace(config.schedule, epochs=epochs)))
    assert (result.completed, result.steps) == (True, 11 * epochs)
    assert column(out, "epoch") == list(range(epochs))


def test_a_wrong_configuration_is_reported_once(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    process = launch(*arguments, f"--out={tmp_path / 'run'}", "--batch-size=127", check=False)
    assert process.returncode
    assert process.stderr.count("ValueError: batch_size must be a multiple of ranks * accumulate = 2 * 1, got 127") == 1


RANK_SCRIPT = """
import sys
import torch
from torch import nn
from setriton.train import NonFiniteError, ParallelConfig
from setriton.train.batchnorm import sync_batch_norm_stats
from setriton.train.distributed import leave, process_group
from setriton.train.meter import LossMeter, NonFiniteLoss

with process_group(ParallelConfig(device="cpu")) as world:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    for module in (model[0], model[2]):
        module.running_mean.fill_(world.rank)
        module.running_var.fill_(2 + world.rank)
    sync_batch_norm_stats(model)
    for module in (model[0], model[2]):
        assert module.running_mean.tolist() == [0.5] * 3, module.running_mean
        assert module.running_var.tolist() == [2.5] * 3, module.running_var
        assert module.num_batches_tracked == 0

    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    meter = LossMeter(world)
    meter.update(torch.tensor(1.0 + world.rank), logits, labels, step=1)
    sums, stop = meter.reduce(stop=world.rank == 1)
    assert (sums.loss, sums.error, sums.images, stop) == (1.5, 25.0, 8, True), (sums, stop)
    meter.update(torch.tensor(1.0), logits, labels, step=2)
    meter.update(torch.tensor(float("nan") if world.rank == 1 else 1.0), logits, labels, step=3)
    try:
        meter.reduce(stop=False)
    except NonFiniteLoss as error:
        assert error.step == 3
    else:
        raise AssertionError("the NaN of rank 1 must be seen by all")
    print(f"rank {world.rank} done")
leave(0)
"""


def test_statistics_and_sums_agree_between_ranks(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT)
    output = launch(script=script).stdout
    assert "rank 0 done" in output
    assert "rank 1 done" in output
