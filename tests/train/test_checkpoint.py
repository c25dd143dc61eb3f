"""Checkpoints on a disk that fails, fills up or flips a bit."""

import hashlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from setriton.files import sha256
from setriton.models.batch_norm import freeze_bn
from setriton.train import ParallelConfig, TrainConfig, train
from setriton.train import checkpoint as checkpoint_module
from setriton.train.checkpoint import Checkpointer, Commit, ForeignCheckpoint
from setriton.train.distributed import process_group

SameRun = Callable[[Path, Path], None]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture
def run(config: TrainConfig, undisturbed: Path) -> TrainConfig:
    """A copy of a finished run with checkpoints at steps 20 and 22."""
    shutil.copytree(undisturbed, config.out)
    return config


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_bit, remove])
@pytest.mark.parametrize("file", ["shard-00001-model-00001-of-00001.safetensors", "commit.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    run: TrainConfig,
    undisturbed: Path,
    assert_same_run: SameRun,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    file: str,
) -> None:
    damage(run.out / "checkpoints" / "step-00000022" / file)
    train(replace(run, resume=True))
    output = capfd.readouterr()
    assert "resuming after step 20 of 22" in output.out
    assert "step-00000022 is not valid" in output.err
    assert file in output.err
    assert names(run.out) == ["step-00000020", "step-00000022", "step-00000022.invalid"]
    assert_same_run(run.out, undisturbed)


def test_damage_twice_keeps_both(run: TrainConfig) -> None:
    for _ in range(2):
        truncate(run.out / "checkpoints" / "step-00000022" / "commit.json")
        train(replace(run, resume=True))
    assert names(run.out)[-2:] == ["step-00000022.invalid", "step-00000022.invalid-2"]


def test_without_any_valid_checkpoint_the_run_starts_again_and_says_so(
    run: TrainConfig, undisturbed: Path, assert_same_run: SameRun, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in names(run.out):
        truncate(run.out / "checkpoints" / name / "commit.json")
    train(replace(run, resume=True))
    output = capfd.readouterr()
    assert output.err.count("is not valid") == 2
    assert "starting from the beginning" in output.out
    assert_same_run(run.out, undisturbed)


def test_what_a_dead_save_left_behind_is_no_checkpoint(
    run: TrainConfig, undisturbed: Path, assert_same_run: SameRun
) -> None:
    newest = run.out / "checkpoints" / "step-00000022"
    newest.rename(newest.with_name("step-00000022.tmp"))
    train(replace(run, resume=True))
    assert names(run.out) == ["step-00000020", "step-00000022"]
    assert_same_run(run.out, undisturbed)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writes past `size` bytes fail with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save = checkpoint_module.Checkpointer.save
    saved: dict[int, bool] = {}

    def full_after_eight(self: checkpoint_module.Checkpointer, step: int, *arguments: object) -> bool:
        with files_no_larger_than(100_000 if step == 8 else -1):
            saved[step] = save(self, step, *arguments)  # type: ignore[arg-type]
        return saved[step]

    monkeypatch.setattr(checkpoint_module.Checkpointer, "save", full_after_eight)
    assert train(config).completed
    assert [step for step, done in saved.items() if not done] == [8]
    assert "warning: checkpoint of step 8 not saved, training goes on" in capfd.readouterr().err
    assert names(config.out) == ["step-00000020", "step-00000022"]


def rewrite_commit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a commit and hash it anew, as whoever made the file could."""
    path = folder / "commit.json"
    commit = json.loads(path.read_text())["commit"]
    change(commit)
    body = json.dumps(commit, sort_keys=True)
    path.write_text(json.dumps({"commit": commit, "sha256": hashlib.sha256(body.encode()).hexdigest()}))


class Touch:
    """Unpickled, runs a shell command that leaves `marker` behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_no_file_of_a_checkpoint_can_run_code(run: TrainConfig, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    malicious = pickle.dumps(Touch(marker))
    pickle.loads(malicious)
    assert marker.exists(), "the pickle must work where it is read"
    marker.unlink()
    newest = run.out / "checkpoints" / "step-00000022"
    files = sorted(path.name for path in newest.iterdir())
    assert files == ["commit.json", "shard-00001-model-00001-of-00001.safetensors"]

    for file, message in zip(files, (r"commit\.json cannot be read", "cannot be loaded by torch"), strict=True):
        replaced = replace(run, out=tmp_path / file, resume=True)
        folder = replaced.out / "checkpoints" / newest.name
        shutil.copytree(newest, folder)
        (folder / file).write_bytes(malicious)
        if file != "commit.json":
            rewrite_commit(folder, lambda commit, path=folder / file: commit["files"].update({path.name: sha256(path)}))
        with pytest.raises(ValueError, match=message):
            Commit.read(folder) if file == "commit.json" else train(replaced)

    # A file that torch's own format would read is not looked at.
    (newest / ".metadata").write_bytes(malicious)
    rewrite_commit(newest, lambda commit: commit["files"].update({".metadata": sha256(newest / ".metadata")}))
    assert train(replace(run, resume=True)).completed
    assert not marker.exists()


def test_checkpoints_of_other_versions_are_refused_unread(run: TrainConfig, tmp_path: Path) -> None:
    newest = run.out / "checkpoints" / "step-00000022"
    before = sorted(path.name for path in newest.iterdir())
    (newest / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    rewrite_commit(newest, lambda commit: commit.pop("format"))
    with pytest.raises(ForeignCheckpoint, match="has checkpoint format 1, wanted 2: it holds a pickle, which can"):
        train(replace(run, resume=True))
    rewrite_commit(newest, lambda commit: commit.update(format=3, more="unknown"))
    with pytest.raises(ForeignCheckpoint, match="has checkpoint format 3, wanted 2: it is newer"):
        train(replace(run, resume=True))
    assert sorted(path.name for path in newest.iterdir()) == [".metadata", *before], "not set aside as damaged"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "cannot be read"),
        ("[]", "cannot be read"),
        ('{"commit": [1], "sha256": ""}', "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_commit_of_another_shape_is_a_value_error(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "commit.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Commit.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 21}, "is of step 21"),
        ({"step": [22]}, "other fields"),
        ({"files": 3}, "other fields"),
        ({"more": 1}, "other fields"),
        ({"files": {}}, r"shard-00001-model-00001-of-00001\.safetensors does not belong to it"),
    ],
)
def test_a_commit_that_does_not_fit_its_folder_is_a_value_error(
    run: TrainConfig, fields: dict[str, Any], message: str
) -> None:
    newest = run.out / "checkpoints" / "step-00000022"
    rewrite_commit(newest, lambda commit: commit.update(fields))
    with pytest.raises(ValueError, match=message):
        Commit.read(newest)


def test_layouts_dtypes_and_frozen_parameters_come_back_bit_for_bit(tmp_path: Path) -> None:
    def network() -> tuple[Any, torch.optim.Optimizer]:
        model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, dtype=torch.bfloat16))
        model = model.to(memory_format=torch.channels_last)
        model[2].bias.data = torch.randn(4).bfloat16()[::2]
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    with process_group(ParallelConfig(device="cpu")) as world:
        torch.manual_seed(0)
        model, optimizer = network()
        model[2](model[1](model[0](torch.randn(2, 3, 5, 5))).bfloat16()).float().square().sum().backward()
        optimizer.step()
        freeze_bn(model)
        checkpointer = Checkpointer(tmp_path, keep=1, run={}, world=world)
        assert checkpointer.save(1, model, optimizer, {})
        again, its_optimizer = network()
        assert Checkpointer(tmp_path, keep=1, run={}, world=world).load(again, its_optimizer) is not None
    for (name, value), (_, wanted) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert value.dtype == wanted.dtype, name
        assert value.stride() == wanted.stride() or value.dim() < 4, name
        assert torch.equal(value, wanted), name
    for parameter, wanted in zip(again.parameters(), model.parameters(), strict=True):
        momentum = optimizer.state[wanted]["momentum_buffer"]
        assert momentum.any() or momentum.dim() < 4
        assert torch.equal(its_optimizer.state[parameter]["momentum_buffer"], momentum)


def test_a_commit_names_step_versions_and_every_file(run: TrainConfig) -> None:
    folder = run.out / "checkpoints" / "step-00000022"
    commit = json.loads((folder / "commit.json").read_text())["commit"]
    assert (commit["step"], commit["world_size"]) == (22, 1)
    assert set(commit["files"]) == {path.name for path in folder.iterdir()} - {"commit.json"}


def test_training_can_be_prolonged_but_not_cut_short(run: TrainConfig) -> None:
    longer = replace(run, resume=True, schedule=replace(run.schedule, epochs=3))
    assert train(longer).steps == 33
    with pytest.raises(ValueError, match=r"step-00000033 is past the end: schedule.epochs 2 ends at step 22"):
        train(replace(run, resume=True))
