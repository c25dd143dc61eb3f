"""`setriton tune` with a child process: what hangs or dies loses one candidate, and nothing outlives its parent."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faulty import faulty_worker
from told_tuner import DEVICE, MEASURED, ToldMeter, tuner

from setriton import tune
from setriton.bench.tune_worker import WatchedWorker
from setriton.bench.watchdog import Watched
from setriton.kernels import stored
from setriton.kernels.cases import H200, Case
from setriton.kernels.config import SweepConfig
from setriton.kernels.tuning import candidates_of

CASE = Case.of("bn-training", (128, 256, 56, 56))
SUPPORT = str(Path(__file__).parent / "support")


def test_candidates_that_hang_or_die_are_lost_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real child processes, which hang, die of a signal and lose their GPU for real, but launch nothing."""
    cache = tmp_path / "tuned.json"
    first, *others = candidates_of(CASE, H200)
    faults = dict(zip(others, ("hang", "crash", "illegal access", "error", "hang when timed"), strict=False))
    child = Watched(faulty_worker, faults, patience=3.0)
    found = tune.Tuner(cache, DEVICE, H200, MEASURED, WatchedWorker(child))
    assert found.tune([CASE]) == []
    assert child.child is None
    held = stored.read_failures(cache, DEVICE)
    assert {config: failure.kind for (_, config), failure in held.items()} == {
        config: fault.removesuffix(" when timed") for config, fault in faults.items()
    }
    assert all(failure.measured == MEASURED for failure in held.values())
    shown = capsys.readouterr().out
    assert shown.count(": without ForwardConfig") == len(faults)
    assert "hang: nothing happened for 3 seconds" in shown
    assert "illegal access: RuntimeError: CUDA error" in shown
    # The others were compared and timed in the child after the last.
    (entry,) = stored.read(cache, DEVICE).values()
    assert (entry.config, entry.pick_ms) == (others[len(faults)], 1.0)

    tried: list[SweepConfig] = []

    def results(case: Case, found: SweepConfig) -> torch.Tensor:
        tried.append(found)
        return torch.ones(3)

    stored.store(cache, DEVICE, [dataclasses.replace(entry, measured={"source": "of other kernels"})])
    tuner(cache, ToldMeter(), results).tune([CASE])
    assert {*tried} == {first, *others} - {*faults}
    assert "without 5 that failed before" in capsys.readouterr().out
    tried.clear()
    tuner(cache, ToldMeter(), results, source="of another day").tune([CASE])
    assert {*tried} == {first, *others}
    tried.clear()
    tuner(cache, ToldMeter(), results).tune([CASE], force=True)
    assert {*tried} == {first, *others}


KILLED = """
import sys
from faulty import faulty_worker
from setriton.bench.watchdog import Watched
from setriton.kernels.cases import H200, Case, pick
if __name__ == "__main__":
    case = Case.of("se", (8, 64, 14, 14))
    found = pick(case, H200)
    child = Watched(faulty_worker, {found: "hang"}, patience=600.0)
    child.call("close")
    print(child.pid, flush=True)
    child.call("check", case, found, found)
"""


def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there, and is not one that nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


HANGS = """
import sys, time
from time_limit import time_limit
with time_limit(0.2, print, "a test"):
    time.sleep(600)
"""


def test_a_test_that_hangs_is_named() -> None:
    """What ends a kernel's test on a GPU."""
    found = subprocess.run([sys.executable, "-c", HANGS], cwd=SUPPORT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stdout == "a test has not ended in 0.2 seconds; neither does this process go on\n"
