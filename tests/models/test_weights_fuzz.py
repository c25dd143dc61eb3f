"""Two thousand damaged files of weights: each is refused with a ValueError, or gives the weights that were saved.

A file's checksums find damaged values where it has them (.pth and .npz are zip files). Where it has none, a damaged
value is a value, and no other may change.
"""

import io
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caffe_files import encode_caffemodel
from safetensors.torch import save
from torch import Tensor

from setriton import create_model
from setriton.models.preprocessing import Preprocessing
from setriton.models.saved import Header
from setriton.models.saved import save as save_ours
from setriton.models.weights.load import open_weights

State = dict[str, Tensor]
SEED = 20_261_126
SECONDS_A_FILE = 1.0
MEGABYTES = 256


def small_state() -> State:
    """A few tensors by which timm's ResNets are recognised."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv1.weight": (4, 3, 3, 3),
        "bn1.weight": (4,),
        "bn1.running_mean": (4,),
        "bn1.running_var": (4,),
        "layer1.0.conv1.weight": (4, 4, 1, 1),
        "layer1.0.se.fc1.weight": (2, 4, 1, 1),
        "fc.weight": (10, 4),
        "fc.bias": (10,),
    }
    state = {key: torch.rand(shape, generator=generator) + 0.5 for key, shape in shapes.items()}
    return state | {"bn1.num_batches_tracked": torch.tensor(7)}


def pth(folder: Path) -> bytes:
    content = {"state_dict": {f"module.{key}": value for key, value in small_state().items()}, "epoch": 3}
    torch.save(content, folder / "whole.pth")
    return (folder / "whole.pth").read_bytes()


def old_pth(folder: Path) -> bytes:
    torch.save(small_state(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return (folder / "old.pth").read_bytes()


def blobs() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv1/7x7_s2": [(4, 3, 3, 3)],
        "conv1/7x7_s2/bn": [(4,), (4,), (1,)],
        "conv1/7x7_s2/bn/scale": [(4,), (4,)],
        "conv2_1_1x1_down": [(2, 4, 1, 1), (2,)],
        "classifier": [(10, 4), (10,)],
    }
    return {name: [torch.rand(size, generator=generator) + 0.5 for size in sizes] for name, sizes in shapes.items()}


def npz(_: Path) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{f"{name}:{i}": b.numpy() for name, bs in blobs().items() for i, b in enumerate(bs)})
    return file.getvalue()


def ours(folder: Path) -> bytes:
    model = create_model("resnet20", num_classes=3)
    save_ours(
        folder / "ours.safetensors", model.state_dict(), Header("resnet20", {"num_classes": 3}, Preprocessing(), "x")
    )
    return (folder / "ours.safetensors").read_bytes()


# Suffix, how to write the file, how many damaged ones, whether its values have checksums.
KINDS: dict[str, tuple[str, Callable[[Path], bytes], int, bool]] = {
    "caffemodel": (".caffemodel", lambda _: encode_caffemodel(blobs()), 450, False),
    "caffemodel of the first version": (".caffemodel", lambda _: encode_caffemodel(blobs(), old=True), 150, False),
    "pth": (".pth", pth, 450, True),
    "pth of the first version": (".pth", old_pth, 200, False),
    "npz": (".npz", npz, 350, True),
    "safetensors": (".safetensors", lambda _: save(small_state()), 300, False),
    "safetensors of setriton": (".safetensors", ours, 100, False),
}


def position(chance: random.Random, size: int) -> int:
    """Half of the positions in the first bytes, a quarter in the last ones: what says where all else is."""
    part = chance.random()
    if part < 0.5:
        return chance.randrange(min(size, 1500))
    return size - 1 - chance.randrange(min(size, 1500)) if part < 0.75 else chance.randrange(size)


def damaged(whole: bytes, chance: random.Random) -> tuple[bytes, int]:
    """A damaged copy, and how many bytes of it are others at most; 0 where it has another length."""
    content, at = bytearray(whole), position(chance, len(whole))
    length = min(chance.choice((1, 1, 2, 4, 8, 64)), len(whole) - at)
    kind = chance.randrange(8)
    if kind < 3:
        for _ in range(1 + kind):
            content[position(chance, len(whole))] ^= 1 << chance.randrange(8)
        return bytes(content), 1 + kind
    if kind == 3:
        content[at : at + length] = chance.randbytes(length)
        return bytes(content), length
    if kind == 4:
        content[at : at + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
        return bytes(content), length
    if kind == 5:
        return bytes(content[:at]), 0
    if kind == 6:
        del content[at : at + length]
        return bytes(content), 0
    content[at:at] = content[at : at + length]
    return bytes(content), 0


@pytest.fixture
def at_most_a_second() -> Iterator[Callable[[], None]]:
    """Call it before each file: what computes for longer is interrupted."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError("a damaged file takes more than a second")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_A_FILE) and None
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def differing(found: State, want: State) -> int | None:
    """How many values differ; None where names or shapes do, which no network takes."""
    if found.keys() != want.keys() or any(found[key].shape != value.shape for key, value in want.items()):
        return None
    return sum(int((found[key] != value).sum()) for key, value in want.items())


def test_there_are_two_thousand() -> None:
    assert sum(count for _, _, count, _ in KINDS.values()) == 2000


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_gives_its_weights(
    kind: str, tmp_path: Path, at_most_a_second: Callable[[], None]
) -> None:
    suffix, write, count, has_sums = KINDS[kind]
    whole, chance = write(tmp_path), random.Random(f"{SEED} {kind}")
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(whole)
    want = open_weights(path).state
    memory, refused, slowest, advice = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0, 0
    for number in range(count):
        content, touched = damaged(whole, chance)
        path.write_bytes(content)
        start = time.process_time()
        at_most_a_second()
        try:
            difference = differing(open_weights(path).state, want)
        except ValueError as error:
            difference = None
            advice += "weights_only" in str(error)
        slowest = max(slowest, time.process_time() - start)
        refused += difference is None
        # A value of Caffe's statistics is a quotient of two.
        may_differ = 0 if has_sums else touched * (8 if "caffemodel" in kind else 1)
        assert difference is None or difference <= may_differ, f"{kind}, seed {SEED}, file {number}: {difference}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{kind}: seed {SEED}, {count} files, {refused} refused, slowest {slowest:.3f} s, {grown:.0f} MB more")
    assert advice == 0
    assert slowest < SECONDS_A_FILE
    assert grown < MEGABYTES
