"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from setriton.train.config import ScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step`, which counts from 0.

    Warm-up rises linearly and reaches `peak` at the first step after it. Step decay counts epochs from the start of
    training, warm-up included, so that drops fall where the recipe names them; cosine spans what is left after warm-up.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule.kind == "step":
        return peak * schedule.gamma ** (step // (schedule.step_epochs * steps_per_epoch))
    total_steps = schedule.epochs * steps_per_epoch
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
