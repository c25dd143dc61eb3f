"""What a file of tuned configurations holds: the fastest of each case, and those that failed."""

from dataclasses import dataclass
from typing import Any, Self

from .cases import DTYPES, KINDS, LAYOUTS, Case
from .config import ForwardConfig, SweepConfig

Key = tuple[str, str, str, tuple[int, int, int]]
# How a configuration may fail: it never ends; its process dies, in a compiler or of a signal; its kernels touch what
# is not theirs; it is refused, by a compiler or for resources; it computes something else.
FAILURES = ("hang", "crash", "illegal access", "error", "wrong")


@dataclass(frozen=True)
class Entry:
    """The fastest configuration of one case; its milliseconds and those of the model's pick; when, and with what."""

    case: Case
    config: SweepConfig
    ms: float
    pick_ms: float
    measured: dict[str, str]

    @property
    def key(self) -> Key:
        """What it holds for."""
        return self.case.kind, self.case.dtype, self.case.layout, self.case.bucket

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what is none."""
        return cls(*_case_and_config(row), float(row["ms"]), float(row["pick_ms"]), dict(row["measured"]))

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        # Six digits: a clock that ticks in half a microsecond has no more.
        times = {"ms": float(f"{self.ms:.6g}"), "pick_ms": float(f"{self.pick_ms:.6g}")}
        return {"case": vars(self.case), "config": vars(self.config), **times, "measured": self.measured}


@dataclass(frozen=True)
class Failure:
    """A configuration that is not to be tried again on a case: one of `FAILURES`, in words; when, and with what."""

    case: Case
    config: SweepConfig
    kind: str
    message: str
    measured: dict[str, str]

    @property
    def key(self) -> tuple[Case, SweepConfig]:
        """What it holds for."""
        return self.case, self.config

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what is none."""
        if row["kind"] not in FAILURES:
            raise ValueError(f"a failure's kind is one of {', '.join(FAILURES)}: {row}")
        return cls(*_case_and_config(row), row["kind"], str(row["message"]), dict(row["measured"]))

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        told = {"kind": self.kind, "message": self.message, "measured": self.measured}
        return {"case": vars(self.case), "config": vars(self.config), **told}


def _case_and_config(row: dict[str, Any]) -> tuple[Case, SweepConfig]:
    case = Case(**row["case"])
    kind = KINDS[case.kind]
    found = (ForwardConfig if kind.is_forward else SweepConfig)(**row["config"])
    sizes = case.n, case.channels, case.hw, *(v for v in vars(found).values() if v is not None)
    if case.dtype not in DTYPES or case.layout not in LAYOUTS or not all(_is_size(size) for size in sizes):
        raise ValueError(f"no such case or configuration: {row}")
    powers = found.block_hw, found.block_c, found.num_warps
    if any(size & (size - 1) for size in powers) or found.block_c < 8 or found.num_warps > 32:
        raise ValueError(f"block_hw, block_c from 8 and num_warps to 32 are powers of two: {row}")
    if isinstance(found, ForwardConfig) and found.launches > 3:
        raise ValueError(f"launches are 1, 2 or 3: {row}")
    return case, found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
