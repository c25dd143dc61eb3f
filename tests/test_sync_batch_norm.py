"""Statistics over two ranks, against one process on the whole batch: nn.SyncBatchNorm itself refuses the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sync_worker.py")


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(WORKER)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
