"""Launches of a case on made-up tensors: what is timed when tuning, compiled for its resources, compared in tests."""

import datetime
import itertools
from collections.abc import Callable, Container
from typing import cast

import torch
import triton
from torch import Tensor

from .backward import Saved, backward
from .cases import KINDS, Case, Machine
from .config import ForwardConfig, SweepConfig
from .entries import Entry
from .forward import BatchNorm, Excitation, forward
from .layout import packed_shape
from .tuning import best_of, candidates_of


class Trial:
    """A case's tensors: one set of parameters, and maps in `rotate_bytes` of copies, two at least.

    On the meta device nothing is allocated: `setriton.bench.resources` compiles what it would launch.

    Args:
        case: what to launch.
        device: where.
        rotate_bytes: each call takes the next copy, so that more of them than a cache holds are never found in it.
        hidden: units of the excitation; None is a sixteenth of the channels.
    """

    def __init__(self, case: Case, device: torch.device, rotate_bytes: int = 0, hidden: int | None = None) -> None:
        self.kind, self.case, self.device = KINDS[case.kind], case, device
        # A generator of its own: the user's random numbers stay what they were.
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        n, c = case.n, case.channels
        r = hidden or max(1, c // 16)
        act = self.kind.bn_act
        self.has_residual = act == "identity"
        self.out_act = "relu" if self.has_residual else "identity"
        self.excitation = Excitation(
            self._vectors(r, c) / c**0.5, self._vectors(r), self._vectors(c, r) / r**0.5, self._vectors(c),
            "relu", "sigmoid",
        )  # fmt: skip
        weight, bias, mean, var = (self._vectors(c) for _ in range(4))
        self.mean, self.var = mean, var.exp()
        self.bn = None if act is None else BatchNorm(weight, bias, self.mean, self.var, 1e-5, act)
        self.kept = self._vectors(n, c), self._vectors(n, r), self._vectors(n, c).sigmoid()
        maps = 1 if self.kind.is_forward and not self.has_residual else 2
        # Not x.nbytes: a stand-in for the whole batch may not fit beside the network.
        set_bytes = maps * n * c * case.hw * case.map().element_size()
        self.sets = [[self._map() for _ in range(maps)] for _ in range(2 + rotate_bytes // set_bytes)]
        self.bits = None
        if self.has_residual and not self.kind.is_forward:
            shape = packed_shape(self.sets[0][0])
            self.bits = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256, generator=self.generator)
        self.turn = itertools.cycle(self.sets)

    def call(self, found: SweepConfig) -> Callable[[], object]:
        """A launch with a configuration, on the next copy of the maps."""
        return lambda: self._launch(found, *next(self.turn))

    def outputs(self, found: SweepConfig) -> dict[str, Tensor]:
        """All it computes in floating point, always of the same maps."""
        results = vars(self._launch(found, *self.sets[0]))
        left_empty = ("dweight", "dbias") if self.bn is None else ()
        named = {name: t for name, t in results.items() if t is not None and name not in left_empty}
        return {name: t for name, t in named.items() if t.is_floating_point() and t.numel()}

    def _launch(self, found: SweepConfig, x: Tensor, other: Tensor | None = None) -> object:
        kind = self.kind
        if kind.is_forward:
            wants_bits = kind.training and self.has_residual
            config = cast(ForwardConfig, found)
            return forward(
                x, self.excitation, self.bn, other, self.out_act, wants_bits, kind.training, 0.1, config=config
            )
        assert other is not None
        mean, var = (None, None) if self.bn is None else (self.mean, self.var)
        squeezed, z1, e = self.kept
        saved = Saved(x, self.bits, mean, var, squeezed, z1, e)
        return backward(other, saved, self.excitation, self.bn, None, self.has_residual, kind.training, config=found)

    def _map(self) -> Tensor:
        return self.case.map(self.device).normal_(generator=self.generator)

    def _vectors(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device).normal_(generator=self.generator)


def tune(case: Case, device: torch.device, machine: Machine, failed: Container[SweepConfig] = ()) -> Entry:
    """Measure the candidates of a case with Triton's own clock, beside whatever else the process has on the GPU.

    In this process, which a hang or an illegal access would take along; what is known to have failed is left out.

    Raises:
        RuntimeError: there is no memory for the maps.
    """
    trial, milliseconds = Trial(case, device), {}
    first, *others = candidates_of(case, machine)
    others = [found for found in others if found not in failed]
    with torch.no_grad(), torch.cuda.device_of(trial.mean):
        for found in (first, *others):
            try:
                # It overwrites the L2 cache before each call, as the rest of a network would.
                milliseconds[found] = triton.testing.do_bench(trial.call(found), 10, 40, return_mode="median")
            except Exception:  # of resources this GPU has not: the pick decides whether the case runs at all
                if found is first:
                    raise
    best = best_of(milliseconds, first)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    measured = {"by": "SETRITON_AUTOTUNE=online", "torch": torch.__version__, "triton": triton.__version__}
    return Entry(case, best, milliseconds[best], milliseconds[first], {**measured, "date": today})
