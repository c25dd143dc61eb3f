"""Checkpoints that are whole or not there: written aside, hashed, forced to disk, then renamed.

A hash tells damage, not who wrote a file: so nothing in a checkpoint can run code. Tensors are in safetensors files,
one for each rank, whose headers say which part of which tensor they hold; all else is JSON.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from setriton.files import fsync, publish, sha256
from setriton.train.distributed import World

_COMMIT = "commit.json"
_FORMAT = 2
"""Of checkpoints. The first had a pickle in them."""


class ForeignCheckpoint(ValueError):
    """A checkpoint that is whole, and not for this version to read: the run must not go on without it."""


@dataclass(frozen=True)
class Commit:
    """What a checkpoint folder says about itself; written last, so a folder without it is not a checkpoint."""

    step: int
    """Optimizer steps done: the position in the data, too."""
    run: dict[str, Any]
    """What must be equal for the run to go on, such as model, batch size and seed."""
    progress: dict[str, Any]
    """Metrics of the running epoch."""
    files: dict[str, str]
    """SHA-256 of every file."""
    torch: str
    world_size: int
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        body = json.dumps(vars(self), sort_keys=True)
        path = folder / _COMMIT
        path.write_text(json.dumps({"commit": json.loads(body), "sha256": _digest(body)}, indent=1))
        fsync(path)

    @classmethod
    def read(cls, folder: Path) -> "Commit":
        """The commit of a valid checkpoint.

        Raises:
            ForeignCheckpoint: another version of this package wrote it.
            ValueError: something is missing or not as it was written.
        """
        try:
            content = json.loads((folder / _COMMIT).read_text())
            fields = dict(content["commit"])
            intact = content["sha256"] == _digest(json.dumps(fields, sort_keys=True))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{_COMMIT} cannot be read: {error}") from None
        if not intact:
            raise ValueError(f"{_COMMIT} is damaged")
        version = fields.setdefault("format", 1)
        if version != _FORMAT:
            reason = "it holds a pickle, which can run any code, and is not read" if version == 1 else "it is newer"
            raise ForeignCheckpoint(f"{folder} has checkpoint format {version!r}, wanted {_FORMAT}: {reason}")
        try:
            commit = cls(**fields)
            step, files = _name(commit.step), dict(commit.files)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_COMMIT} has other fields than a commit: {error}") from None
        if folder.name != step:
            raise ValueError(f"{_COMMIT} is of step {commit.step!r}")
        if unknown := sorted({path.name for path in folder.glob("*.safetensors")} - set(files)):
            raise ValueError(f"{unknown[0]} does not belong to it")
        for name, digest in files.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if sha256(path) != digest:
                raise ValueError(f"{name} is damaged")
        return commit


class _Planner(DefaultSavePlanner):
    """Files hold dense tensors; loading copies them into parameters of any layout."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = super().resolve_data(write_item)
        return data.contiguous() if isinstance(data, torch.Tensor) else data


class _Writer(HuggingFaceStorageWriter):
    """One safetensors file for each rank that has something to save; rank 0 learns their names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.written: set[str] = set()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.written = {result.storage_data.relative_path for of_rank in results for result in of_rank}


class Checkpointer:
    """Saves and restores a model and its SGD momentum in `folder`/step-N, sharded over the ranks.

    Args:
        folder: shared by all ranks.
        keep: checkpoints kept.
        run: what must be equal for a run to go on.
        world: the ranks.
    """

    def __init__(self, folder: Path, *, keep: int, run: dict[str, Any], world: World) -> None:
        self.folder = folder
        self.keep = keep
        self.run = run
        self.world = world
        self.last_step: int | None = None

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has written or resumed from."""
        return None if self.last_step is None else self.folder / _name(self.last_step)

    def exists(self) -> bool:
        """Whether the folder holds any checkpoint, valid or not."""
        return any(_steps(self.folder))

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> bool:
        """Save after `step` steps; call it on all ranks. False where the disk did not take it: training can go on.

        Saving a step that is already saved does nothing.
        """
        if step == self.last_step:
            return True
        temporary = self.folder / f"{_name(step)}.tmp"
        if self.last_step is None and self.world.is_rank0:
            # The first save of a new run: the folder is its own by now.
            self._remove_leftovers()
        problem: str | None = None
        writer = _Writer(temporary)
        try:
            save(_state(model, optimizer), storage_writer=writer, planner=_Planner())
        except CheckpointException as error:
            # Raised alike on all ranks, with every rank's own exception inside; a write that fails in torch's
            # serializer surfaces as a RuntimeError.
            failures = [failure for failure, _ in error.failures.values()]
            if not all(isinstance(failure, (OSError, RuntimeError)) for failure in failures):
                raise RuntimeError(f"checkpoint of step {step} failed") from error
            problem = f"{failures[0]}"
        if self.world.is_rank0:
            try:
                if problem is None:
                    self._publish(temporary, writer.written, step, progress)
            except OSError as error:
                problem = f"{error}"
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        problem = self.world.from_rank0(problem)
        if problem is not None:
            self.world.warn(f"checkpoint of step {step} not saved, training goes on: {problem}")
            return False
        self.last_step = step
        return True

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Commit | None:
        """Restore the newest valid checkpoint, on all ranks; None where there is none.

        Damaged ones are renamed to *.invalid and reported. The number of ranks may differ from the one that saved.

        Raises:
            ForeignCheckpoint: the newest one is of another version of this package.
            ValueError: the checkpoint belongs to another run, or does not hold the tensors of this one.
        """
        commit = self._newest_valid()
        if commit is None:
            return None
        path = self.folder / _name(commit.step)
        saved = commit.run
        different = [f"{key} {saved.get(key)!r}, now {now!r}" for key, now in self.run.items() if saved.get(key) != now]
        if different:
            raise ValueError(f"{path} belongs to another run: it has {'; '.join(different)}. Choose another out")
        state = _state(model, optimizer)
        try:
            load(state, storage_reader=HuggingFaceStorageReader(str(path)))
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(
                f"{path}, written by torch {commit.torch}, cannot be loaded by torch {torch.__version__}: {cause!r}"
            ) from error
        for parameter, momentum in zip(model.parameters(), state["momentum"].values(), strict=True):
            optimizer.state[parameter]["momentum_buffer"] = momentum
        self.last_step = commit.step
        return commit

    def _publish(self, temporary: Path, written: set[str], step: int, progress: dict[str, Any]) -> None:
        lost = sorted(name for name in written if not (temporary / name).is_file())
        if lost:
            raise OSError(f"{temporary} lacks {lost}: out must be one folder that all ranks share")
        files = {name: sha256(temporary / name) for name in sorted(written)}
        for name in files:
            fsync(temporary / name)
        Commit(step, self.run, progress, files, torch.__version__, self.world.size).write(temporary)
        publish(temporary, self.folder / _name(step))
        for old in sorted(_steps(self.folder))[: -self.keep]:
            shutil.rmtree(self.folder / _name(old), ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Saves that were killed."""
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)

    def _newest_valid(self) -> Commit | None:
        """What rank 0 finds, or the error that it meets, on every rank."""
        found: Commit | ForeignCheckpoint | None = None
        if self.world.is_rank0:
            self._remove_leftovers()
            try:
                found = self._select()
            except ForeignCheckpoint as error:
                found = error
        found = self.world.from_rank0(found)
        if isinstance(found, ForeignCheckpoint):
            raise found
        return found

    def _select(self) -> Commit | None:
        for step in sorted(_steps(self.folder), reverse=True):
            path = self.folder / _name(step)
            try:
                return Commit.read(path)
            except ForeignCheckpoint:
                raise
            except ValueError as error:
                quarantined = _free_name(path)
                path.rename(quarantined)
                self.world.warn(f"checkpoint {path} is not valid ({error}); moved to {quarantined.name}")
        return None


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors to save, or to load into; momentum that does not exist yet is zero, as SGD takes it.

    Frozen parameters have momentum too: a checkpoint from before a freeze then loads after it, and the other way round.
    """
    momentum = {
        name: optimizer.state[parameter].get("momentum_buffer", torch.zeros_like(parameter))
        for name, parameter in model.named_parameters()
    }
    return {"model": model.state_dict(), "momentum": momentum}


def is_finite(model: nn.Module, world: World) -> bool:
    """Whether every parameter and buffer is finite on every rank."""
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in model.state_dict().values()]
    bad = torch.stack([(~value.isfinite()).any() for value in tensors if value.is_floating_point()]).any()
    return not world.sum(bad.to(torch.int32)).item()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08}"


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return [int(name) for name in names if name.isdecimal()]


def _free_name(path: Path) -> Path:
    candidate, number = path.with_name(f"{path.name}.invalid"), 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}.invalid-{number}"), number + 1
    return candidate
