"""One rank of a training run, with a fault on request.

FAULT=ACTION:RANK:STEP in the environment of a first attempt; ACTION is kill (before the step), kill-save (after the
checkpoint of that step is written, before it gets its name) or term (SIGTERM to this rank, before the step).
"""

import os
import signal
import sys
from pathlib import Path

import tyro
from torch import Tensor

from setriton import files
from setriton.recipes import RECIPES
from setriton.train import checkpoint, train
from setriton.train.distributed import leave
from setriton.train.trainer import Trainer


def inject(fault: str) -> None:
    action, rank, step = fault.split(":")
    if rank != os.environ.get("RANK", "0") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    train_step = Trainer.train_step

    def faulty_step(trainer: Trainer, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        if trainer.step == int(step):
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
        train_step(trainer, micro_batches)

    def faulty_publish(temporary: Path, final: Path) -> None:
        if final.name == f"step-{int(step):08}":
            os.kill(os.getpid(), signal.SIGKILL)
        files.publish(temporary, final)

    if action == "kill-save":
        checkpoint.publish = faulty_publish  # type: ignore[attr-defined]
    else:
        Trainer.train_step = faulty_step  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    if "FAULT" in os.environ:
        inject(os.environ["FAULT"])
    train(tyro.extras.overridable_config_cli(RECIPES, args=sys.argv[1:]))
    leave(0)
