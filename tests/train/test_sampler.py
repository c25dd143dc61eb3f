"""Order and augmentation depend on seed, epoch and image alone."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from setriton.train import DataConfig
from setriton.train.data import make_loader, open_data
from setriton.train.sampler import SampleKey, TrainSampler, ValidationSampler, stable_seed

CPU = torch.device("cpu")


def global_batches(world_size: int, accumulate: int, *, first_step: int = 0) -> list[list[SampleKey]]:
    """The images of each step over all ranks, in the order of chunks."""
    ranks = [
        list(
            TrainSampler(
                num_images=50,
                batch_size=16,
                seed=3,
                first_step=first_step,
                last_step=7,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
            )
        )
        for rank in range(world_size)
    ]
    micro_steps = [[*chain(*chunks)] for chunks in zip(*ranks, strict=True)]
    return [[*chain(*micro_steps[i : i + accumulate])] for i in range(0, len(micro_steps), accumulate)]


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (8, 2)])
def test_steps_are_the_same_for_any_number_of_ranks(world_size: int, accumulate: int) -> None:
    assert global_batches(world_size, accumulate) == global_batches(1, 1)


def test_micro_batches_of_accumulation_are_those_of_ranks() -> None:
    options = {"num_images": 50, "batch_size": 16, "seed": 0, "first_step": 0, "last_step": 2}
    accumulated = list(TrainSampler(**options, accumulate=2))
    first, second = (list(TrainSampler(**options, rank=rank, world_size=2)) for rank in (0, 1))
    assert accumulated == [first[0], second[0], first[1], second[1]]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_continues_the_order(step: int) -> None:
    assert global_batches(2, 1, first_step=step) == global_batches(1, 1)[step:]


def test_an_epoch_holds_each_image_at_most_once_and_epochs_differ() -> None:
    batches = global_batches(1, 1)
    epochs = [[*chain(*batches[i : i + 3])] for i in (0, 3)]
    for number, keys in enumerate(epochs):
        assert {key.epoch for key in keys} == {number}
        assert len({key.image for key in keys}) == len(keys) == 48
    assert [key.image for key in epochs[0]] != [key.image for key in epochs[1]]


@given(num_images=st.integers(1, 60), batch_size=st.integers(1, 9), world_size=st.integers(1, 6))
@settings(deadline=None)
def test_validation_covers_each_image_once_in_equal_batches(num_images: int, batch_size: int, world_size: int) -> None:
    ranks = [list(ValidationSampler(num_images, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    images = [key.image for batches in ranks for batch in batches for key in batch if key.image >= 0]
    assert sorted(images) == list(range(num_images))


@pytest.mark.parametrize("changes", [{"batch_size": 15}, {"batch_size": 64}])
def test_impossible_batches_are_refused(changes: dict[str, int]) -> None:
    options = {"num_images": 50, "batch_size": 16, "seed": 0, "first_step": 0, "last_step": 1, "world_size": 2}
    with pytest.raises(ValueError, match=f"batch_size .* got {changes['batch_size']}"):
        TrainSampler(**options | changes)


def test_seeds_depend_on_every_part() -> None:
    seeds = {stable_seed(*parts) for parts in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 12), (0, 1, 2, 0)]}
    assert len(seeds) == 5
    assert stable_seed(0, 1, 2) == stable_seed(0, 1, 2)


def test_augmentation_does_not_depend_on_workers_or_on_the_callers_random_numbers() -> None:
    images = open_data(DataConfig("digits"), seed=5).train
    keys = [[SampleKey(epoch, image) for image in range(8)] for epoch in (0, 1)]
    torch.manual_seed(1)
    alone = list(make_loader(images, keys, workers=0, device=CPU))
    torch.manual_seed(2)
    two_workers = list(make_loader(images, keys, workers=2, device=CPU))
    for ours, theirs in zip(alone, two_workers, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(alone[0][0], alone[1][0]), "another epoch, another augmentation"


def test_reading_images_leaves_the_callers_random_numbers_alone() -> None:
    images = open_data(DataConfig("digits")).train
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images[SampleKey(0, 0)]
    assert torch.equal(torch.rand(3), expected)
