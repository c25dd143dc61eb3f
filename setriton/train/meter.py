"""Sums over the steps between two looks at the loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from setriton.train.distributed import World


@dataclass
class Sums:
    """Loss, right answers, images and seconds over all ranks, since the last log step or the start of the epoch."""

    loss_sum: float = 0.0
    correct: float = 0.0
    images: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Sums") -> None:
        self.loss_sum += other.loss_sum
        self.correct += other.correct
        self.images += other.images
        self.seconds += other.seconds

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return self.loss_sum / self.images

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * (1 - self.correct / self.images)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


class NonFiniteLoss(Exception):
    """Says at which step; raised on all ranks alike."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class LossMeter:
    """Adds up on the device, without waiting for it; reduces over the ranks when asked."""

    def __init__(self, world: World) -> None:
        self.world = world
        # loss sum, right answers, images, non-finite losses
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        self.first_bad_step = torch.full((), math.inf, device=world.device)

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, *, step: int) -> None:
        """Count a micro-batch: mean loss (), logits (N, classes), labels (N,)."""
        bad = ~loss.isfinite()
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels)), bad])
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp(max=step), self.first_bad_step)

    def reduce(self, *, stop: bool) -> tuple[Sums, bool]:
        """The sums of all ranks since the last call, and whether any rank wants to stop: one all-reduce.

        Raises:
            NonFiniteLoss: some rank met an infinite or NaN loss.
        """
        flag = torch.full((1,), float(stop), dtype=torch.float64, device=self.world.device)
        loss_sum, correct, images, bad, stop_votes = self.world.sum(torch.cat([self.sums, flag])).tolist()
        if bad:
            raise NonFiniteLoss(int(self.world.min(self.first_bad_step).item()))
        self.sums.zero_()
        return Sums(loss_sum, correct, images), stop_votes > 0
