"""Checkpoints on a disk that fails, fills up or flips a bit."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from setriton.train import TrainConfig, train
from setriton.train import checkpoint as checkpoint_module

SameRun = Callable[[Path, Path], None]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished() -> Iterator[dict[str, Path]]:
    """Remembers the undisturbed run, which every test of this file compares with."""
    runs: dict[str, Path] = {}
    yield runs
    for out in runs.values():
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def run(config: TrainConfig, finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A copy of a finished run with checkpoints at steps 20 and 22."""
    if "run" not in finished:
        finished["run"] = tmp_path_factory.mktemp("finished")
        train(replace(config, out=finished["run"]))
    shutil.copytree(finished["run"], config.out)
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
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "commit.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    run: TrainConfig,
    finished: dict[str, Path],
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
    assert_same_run(run.out, finished["run"])


def test_damage_twice_keeps_both(run: TrainConfig) -> None:
    for _ in range(2):
        truncate(run.out / "checkpoints" / "step-00000022" / "commit.json")
        train(replace(run, resume=True))
    assert names(run.out)[-2:] == ["step-00000022.invalid", "step-00000022.invalid-2"]


def test_without_any_valid_checkpoint_the_run_starts_again_and_says_so(
    run: TrainConfig, finished: dict[str, Path], assert_same_run: SameRun, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in names(run.out):
        truncate(run.out / "checkpoints" / name / "commit.json")
    train(replace(run, resume=True))
    output = capfd.readouterr()
    assert output.err.count("is not valid") == 2
    assert "starting from the beginning" in output.out
    assert_same_run(run.out, finished["run"])


def test_what_a_dead_save_left_behind_is_no_checkpoint(
    run: TrainConfig, finished: dict[str, Path], assert_same_run: SameRun
) -> None:
    newest = run.out / "checkpoints" / "step-00000022"
    newest.rename(newest.with_name("step-00000022.tmp"))
    train(replace(run, resume=True))
    assert names(run.out) == ["step-00000020", "step-00000022"]
    assert_same_run(run.out, finished["run"])


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
