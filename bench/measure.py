"""What benchmarks share: rows that are kept, runs that go on where one stopped, results that are refused."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from setriton.checks import check_choice

from .cases import DTYPES

# How far, by the 2-norm, results may be from eager's before a timing is refused. Of one operator, what bfloat16 rounds
# differently is 0.004 of y and, where it flips a ReLU, 0.03 of the gradient; tests catch smaller faults.
FAR = 1 / 8
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class AnyRow:
    """A line of results."""

    @property
    def key(self) -> Key:
        """What was measured, without what came out."""
        raise NotImplementedError


R = TypeVar("R", bound=AnyRow)
G = TypeVar("G")


@dataclass
class StoredResults(Generic[R]):
    """Rows of one environment, on disk after each call of `add`."""

    name: ClassVar[str]
    row: ClassVar[type[AnyRow]]
    method: ClassVar[str]
    # Rows are comparable where these are equal; commit and date are those of the last run.
    identity: ClassVar[tuple[str, ...]] = ("device", "driver", "torch", "triton", "setriton", "source")

    folder: Path
    environment: dict[str, str]
    rows: dict[Key, R] = field(default_factory=dict)
    # Why something has no row, by what it is and where.
    failures: dict[str, str] = field(default_factory=dict)
    # What the file held was measured in another environment, and goes with the first row written.
    outdated: bool = False

    @classmethod
    def open(cls, folder: Path, environment: dict[str, str]) -> Self:
        """With the rows that the folder's file has of the same environment; others are not read.

        Raises:
            ValueError: the file is no result of this benchmark.
        """
        results = cls(folder, environment)
        if results.path.exists():
            try:
                data = json.loads(results.path.read_text())
                results.outdated = any(data["environment"][name] != environment[name] for name in cls.identity)
                if not results.outdated:
                    rows: list[Any] = [cls.row(**row) for row in data["rows"]]
                    results.rows = {row.key: row for row in rows}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{results.path} is no result of this benchmark; move it away ({error})") from None
        return results

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def add(self, rows: Sequence[R]) -> None:
        """Keep rows, in place of those with the same keys."""
        self.rows.update((row.key, row) for row in rows)
        self._write_json()

    def write_reports(self) -> list[Path]:
        """The table and the picture, made of the rows; all paths. Without a row, none, and older files stay."""
        if not self.rows:
            return []
        self._write_json()
        return [self.path, *self._write_pages(list(self.rows.values()))]

    def _write_pages(self, rows: Sequence[R]) -> list[Path]:
        raise NotImplementedError

    def _write_json(self) -> None:
        head = {"environment": self.environment, "method": self.method, "failures": self.failures}
        # A row a line: a measurement made again is a line in a diff.
        rows = ",\n".join(f"  {json.dumps(_rounded(asdict(row)))}" for row in self.rows.values())
        text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Events tick in 0.5 microseconds: six digits hold all that was measured."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


class OutOfTime(Exception):
    """What comes next would take longer than there is; what was measured is kept."""


class ResumableBench(Generic[G, R]):
    """Measures groups one after another into results."""

    # What a group is, in the plural.
    unit: ClassVar[str]

    def __init__(self, results: StoredResults[R], clock: Callable[[], float] = time.monotonic) -> None:
        self.results = results
        self.clock = clock
        self.took = 0.0
        self.deadline = math.inf

    def measure(self, groups: Sequence[G], seconds: float = math.inf, *, force: bool = False) -> list[G]:
        """Measure what the results lack, or everything; the groups that the time did not suffice for."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        todo = [group for group in groups if force or self._missing(group)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.deadline, self.took = self.clock() + seconds, 0.0
        with Progress(*columns) as progress:
            say = functools.partial(progress.console.print, highlight=False, markup=False, soft_wrap=True)
            if self.results.outdated:
                say(f"{self.results.path} is of another environment or other sources: measuring anew")
            if len(todo) < len(groups):
                say(f"{len(groups) - len(todo)} of {len(groups)} {self.unit} are in {self.results.path}")
            task = progress.add_task("", total=len(todo))
            for index, group in enumerate(todo):
                begun = self.clock()
                progress.update(task, description=str(group))
                try:
                    if not self.has_time(self._expected()):
                        raise OutOfTime
                    for rows in self._rows(group, force):
                        self.results.add(rows)
                        say(self._brief(group, rows))
                except OutOfTime:
                    say(f"stopped in time; run again for {self._counted(todo[index:])}")
                    return todo[index:]
                except torch.OutOfMemoryError as error:
                    self._fail(str(group), error)
                finally:
                    for what, why in self.results.failures.items():
                        if what.startswith(str(group)):
                            say(f"{what}: {why}", style="red")
                self.took = self.clock() - begun
                progress.advance(task)
        return []

    def has_time(self, seconds: float) -> bool:
        """Whether as many are left."""
        return self.clock() + seconds <= self.deadline

    def _expected(self) -> float:
        """Seconds of the next group: those of the last one. Compilation takes most, and about as long for each."""
        return self.took

    def _missing(self, group: G) -> bool:
        """Whether the results lack something of the group."""
        raise NotImplementedError

    def _rows(self, group: G, force: bool) -> Iterator[list[R]]:
        """What is missing, or everything, in portions to keep at once."""
        raise NotImplementedError

    def _brief(self, group: G, rows: Sequence[R]) -> str:
        raise NotImplementedError

    def _counted(self, groups: Sequence[G]) -> str:
        raise NotImplementedError

    def _fail(self, what: str, error: Exception) -> None:
        reason = str(error).strip().splitlines() or [""]
        self.results.failures[what] = f"{type(error).__name__}: {reason[0]}"


def check_run(command: str, batch_sizes: Sequence[int], seconds: float, dtype: str) -> None:
    """ValueError for what no benchmark of a GPU can be run with, and where there is none."""
    check_choice("dtype", dtype, DTYPES)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be at least 1; got {batch_sizes}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    if not torch.cuda.is_available():
        raise ValueError(f"{command} needs a GPU; torch sees none")


def refuse_other_results(what: str, found: Tensor, want: Tensor, far: float = FAR) -> None:
    """ValueError where a result is farther from eager PyTorch's than rounding takes it."""
    difference = distance(found, want)
    if not difference <= far:
        raise ValueError(f"{what} is {difference:.2f} of its norm from eager PyTorch's")


def distance(found: Tensor, want: Tensor) -> float:
    """The 2-norm of the difference over that of `want`."""
    return ((found.float() - want.float()).norm() / want.float().norm()).item()


def digest(files: Iterable[Path]) -> str:
    """Of names and contents: equal digests make rows comparable, whatever the commit."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
