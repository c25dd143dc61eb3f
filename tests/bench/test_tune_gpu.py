"""`setriton tune` on a GPU, with candidates that take the GPU away from their process."""

from pathlib import Path

import pytest
import torch

from setriton import tune
from setriton.bench.tune_worker import WatchedWorker
from setriton.bench.watchdog import Watched
from setriton.kernels import stored
from setriton.kernels.cases import Case, Machine
from setriton.kernels.tuning import candidates_of


@pytest.mark.gpu
def test_kernels_that_hang_or_stray_are_lost_alone(tmp_path: Path) -> None:
    from faulty_gpu import faulty_gpu_worker

    device, machine = torch.cuda.get_device_name(), Machine.of(torch.device("cuda", torch.cuda.current_device()))
    case, path = Case.of("se", (32, 64, 14, 14)), tmp_path / "tuned.json"
    _, *others = candidates_of(case, machine)
    faults = dict(zip(others, ("hang", "illegal access"), strict=False))
    worker = WatchedWorker(Watched(faulty_gpu_worker, faults, patience=25.0))
    assert tune.Tuner(path, device, machine, {"source": "of a test"}, worker).tune([case]) == []
    failed = stored.read_failures(path, device)
    assert {found: failure.kind for (_, found), failure in failed.items()} == faults
    (entry,) = stored.read(path, device).values()
    assert entry.config not in faults
    assert entry.ms > 0
