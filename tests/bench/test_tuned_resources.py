"""Every configuration that ships compiles without spills for its GPU; while none does, the model's picks."""

import itertools
import json
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from setriton.bench.resources import resources  # noqa: E402
from setriton.kernels import stored  # noqa: E402
from setriton.kernels.cases import H200, KINDS, Case, pick  # noqa: E402
from setriton.kernels.config import SweepConfig  # noqa: E402
from setriton.kernels.trials import Trial  # noqa: E402

# By what the device's name contains.
TARGETS = {
    "a100": "sm_80", "h100": "sm_90", "h200": "sm_90", "gh200": "sm_90", "b200": "sm_100", "rtx-5": "sm_120",
    "rtx-pro": "sm_120", "mi300": "gfx942", "mi325": "gfx942", "mi350": "gfx950", "mi355": "gfx950",
}  # fmt: skip
# What a configuration decides; the excitation's own launches are `test_resources`' concern.
SWEEPS = ("forward_kernel", "reduce_kernel", "dx_kernel")
RESNET = [(128, 256, 56, 56), (128, 512, 28, 28), (128, 1024, 14, 14), (128, 2048, 7, 7)]


def picks() -> list[Any]:
    cases = [Case.of(kind, shape) for kind, shape in itertools.product(KINDS, RESNET)]
    return [(case, pick(case, H200), "sm_90") for case in cases]


def shipped() -> list[Any]:
    found: list[Any] = []
    for path in sorted(stored.SHIPPED.glob("*.json")):
        (target,) = {target for part, target in TARGETS.items() if part in path.stem} or {None}
        assert target is not None, f"which target is {path.stem}?"
        entries = stored.read(path, json.loads(path.read_text())["device"]).values()
        found += [(entry.case, entry.config, target) for entry in entries]
    return found


@pytest.mark.parametrize(("case", "config", "target"), shipped() or picks(), ids=str)
def test_no_spills(case: Case, config: SweepConfig, target: str) -> None:
    trial = Trial(case, torch.device("meta"))
    swept = [launch for launch in resources(lambda: trial.outputs(config), target) if launch.kernel in SWEEPS]
    assert swept
    assert all(launch.spilled == 0 for launch in swept), swept
