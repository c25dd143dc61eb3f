"""Which images each rank sees at each step. The position in the data is one integer: the step."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class SampleKey(NamedTuple):
    """What a data set is asked for: an image, and the epoch that its augmentation depends on."""

    epoch: int
    image: int
    """Number of the image; -1 asks for padding: any image, with label -1."""


def stable_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on nothing else: not on the process, the worker or the run."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(num_images: int, *, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch, int64 of shape (num_images,)."""
    generator = torch.Generator().manual_seed(stable_seed(seed, epoch))
    return torch.randperm(num_images, generator=generator)


@dataclass(frozen=True)
class TrainSampler:
    """Micro-batches of one rank for the steps from `first_step` up to `last_step`, across epochs.

    Images that do not fill a last batch sit the epoch out; the next one has another order.

    The global batch is cut into accumulate * world_size chunks and (micro-step, rank) takes chunk
    micro-step * world_size + rank: one rank that accumulates twice computes what two ranks do.

    Raises:
        ValueError: the batch does not divide evenly, or there are fewer images than one batch.
    """

    num_images: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of ranks * accumulate = {self.world_size} * {self.accumulate}, "
                f"got {self.batch_size}"
            )
        if self.num_images < self.batch_size:
            raise ValueError(f"batch_size must not exceed the {self.num_images} training images, got {self.batch_size}")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        chunk_size = self.batch_size // (self.world_size * self.accumulate)
        epoch = -1
        order: list[int] = []
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.num_images, seed=self.seed, epoch=epoch).tolist()
            batch_start = step % self.steps_per_epoch * self.batch_size
            for micro_step in range(self.accumulate):
                start = batch_start + (micro_step * self.world_size + self.rank) * chunk_size
                yield [SampleKey(epoch, index) for index in order[start : start + chunk_size]]


@dataclass(frozen=True)
class ValidationSampler:
    """Every image once over all ranks, in as many equal batches on each rank: sharded forward passes are collective.

    What is missing in the last batches is padding (index -1).
    """

    num_images: int
    batch_size: int
    """Images per rank and forward pass."""
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return -(-self.num_images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [SampleKey(0, i if i < self.num_images else -1) for i in range(start, start + self.batch_size)]
