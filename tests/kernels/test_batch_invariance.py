"""In evaluation an image has the same bits in any batch: neither the code that runs nor the cuts of a map know N.

Launches for every N up to 512 are compared as numbers; a few of them run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from setriton.kernels import forward as launcher
from setriton.kernels import stored
from setriton.kernels.cases import H200, KINDS, LAYOUTS, Case, Machine, pick
from setriton.kernels.config import ForwardConfig, Pieces
from setriton.kernels.entries import Entry
from setriton.kernels.forward import BatchNorm, Excitation, forward
from setriton.kernels.tuning import candidates_of

# Numbers of a launch that count images, or pieces of them: no sum over a map or over channels is cut by one.
OF_THE_BATCH = {
    "N", "IMAGES", "n_pieces", "group_images", "groups", "tiles_n", "n_squeeze", "n_hidden", "n_gate", "n_apply",
    "n_counters",
}  # fmt: skip
EVALUATED = [kind for kind, known in KINDS.items() if known.is_per_image]
# Channels, height, width: of ResNets, MobileNetV3 and EfficientNet, and small ones.
MAPS = [(256, 56, 56), (2048, 7, 7), (960, 7, 7), (32, 112, 112), (72, 28, 28), (3, 5, 1), (1, 1, 1), (8, 0, 7)]
BATCHES = range(1, 513)


def excitation(c: int, r: int, device: str = "meta") -> Excitation:
    generator = None if device == "meta" else torch.Generator().manual_seed(1)
    w1, b1, w2, b2 = (
        torch.empty(s, device=device) if generator is None else torch.randn(s, generator=generator)
        for s in ((r, c), (r,), (c, r), (c,))
    )
    return Excitation(w1, b1, w2, b2, "gelu", "sigmoid")


def batch_norm(kind: str, c: int, bn_act: str) -> BatchNorm | None:
    if KINDS[kind].bn_act is None:
        return None
    generator = torch.Generator().manual_seed(2)
    weight, bias, mean, var = (torch.randn(c, generator=generator) for _ in range(4))
    return BatchNorm(weight, bias, mean, var.exp(), 1e-5, bn_act)


def what_is_launched(kind: str, x: Tensor, bn_act: str, found: ForwardConfig) -> list[dict[str, Any]]:
    """What a launch is compiled for, and every number it is given but those of the batch."""
    bn = moved(batch_norm(kind, x.shape[1], bn_act), torch.device("meta"))
    launches: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **arguments: launches.append(arguments)

    with mock.patch.object(launcher, "forward_kernel", Kernel()):
        forward(x, excitation(x.shape[1], 24), bn, config=found)
    return [
        {
            name: value.dtype if isinstance(value, Tensor) else value
            for name, value in arguments.items()
            if name not in OF_THE_BATCH
        }
        for arguments in launches
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EVALUATED)
def test_launches_differ_in_numbers_of_the_batch_alone(kind: str, layout: str) -> None:
    for c, h, w in MAPS:
        x = torch.empty(512, c, h, w, dtype=torch.bfloat16, device="meta", memory_format=LAYOUTS[layout])
        want: list[dict[str, Any]] = []
        for n in BATCHES:
            case = Case(kind, n, c, h * w, "bfloat16", layout)
            found = what_is_launched(kind, x[:n], "silu", pick(case, H200))  # type: ignore[arg-type]
            want = want or found
            assert found == want, n
            assert len(found) == (1 if h else 0)


def test_the_batch_decides_how_many_whole_maps_make_a_piece() -> None:
    """What is cut by N is cut between images."""
    small, large = (pick(Case.of("se", (n, 2048, 7, 7)), H200) for n in (1, 512))
    assert small.tiles < large.tiles
    images = [Pieces.of(49, found.block_hw, found.tiles).images for found in (small, large)]
    assert images[0] == 1 < images[1]


@pytest.mark.parametrize("kind", EVALUATED)
def test_stored_configurations_do_not_know_the_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that were measured with one batch, or several, hold for all."""
    monkeypatch.setenv("SETRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "none")
    stored.forget()
    cases = [Case.of(kind, (n, c, size, size)) for n, c, size in ((1, 256, 56), (128, 2048, 7), (300, 256, 56))]
    entries = [Entry(case, candidates_of(case, H200)[-1], 1.0, 2.0, {}) for case in cases]
    stored.store(stored.user_file("NVIDIA H200"), "NVIDIA H200", entries)
    for c, h, w in MAPS[:-1]:
        x = torch.empty(512, c, h, w, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        chosen = [stored.choose(Case.of(kind, (n, c, h, w)), "NVIDIA H200", H200) for n in BATCHES]
        found = [what_is_launched(kind, x[:n], "identity", each) for n, each in zip(BATCHES, chosen, strict=True)]  # type: ignore[arg-type]
        assert all(each == found[0] for each in found), (c, h, w)
    assert stored.choose(cases[1], "NVIDIA H200", H200) == entries[1].config
    stored.forget()


def bits_of(
    device: torch.device, kind: str, bn_act: str, layout: str, launches: int, c: int, hw: int, batches: tuple[int, ...]
) -> int:
    """Compare images alone and in batches; the number of parts their maps are cut into."""
    *_, most = batches
    x = torch.randn(most, c, hw, 1, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=LAYOUTS[layout]).to(device)
    se, bn = moved(excitation(c, 18, "cpu"), device), moved(batch_norm(kind, c, bn_act), device)

    def run(x: Tensor) -> dict[str, Tensor]:
        config = pick(Case(kind, x.shape[0], c, hw, "float32", layout), Machine(20, 2**18))
        config = dataclasses.replace(config, launches=launches, group_kib=16)  # type: ignore[call-arg]
        return vars(forward(x, se, bn, config=config))  # type: ignore[arg-type]

    want = run(x)
    parts = {**{n: slice(0, n) for n in batches[:-1]}, "last": slice(most - 1, most)}
    for part in parts.values():
        found = run(x[part])
        assert all(torch.equal(found[name], want[name][part]) for name in ("y", "squeezed", "z1", "e")), part
    found_tiles = pick(Case(kind, 1, c, hw, "float32", layout), Machine(20, 2**18))
    return Pieces.of(hw, found_tiles.block_hw, found_tiles.tiles).splits


def moved(fields: Any, device: torch.device) -> Any:
    if fields is None:
        return None
    tensors = {name: t.to(device) for name, t in vars(fields).items() if isinstance(t, Tensor)}
    return dataclasses.replace(fields, **tensors)


@pytest.mark.parametrize(
    ("kind", "bn_act", "layout", "launches"),
    [
        ("se", "identity", "channels_last", 1),
        ("se", "identity", "contiguous", 2),
        ("bn-evaluation", "identity", "contiguous", 1),
        ("bn-evaluation", "silu", "channels_last", 1),
        ("bn-evaluation", "silu", "channels_last", 2),
    ],
)
def test_bits_of_an_image(device: torch.device, kind: str, bn_act: str, layout: str, launches: int) -> None:
    """As in a batch of its own, and as in part of a batch: several maps a piece, then a map in several pieces."""
    assert bits_of(device, kind, bn_act, layout, launches, 20, 6, (1, 2, 18)) == 1
    assert bits_of(device, kind, bn_act, layout, launches, 7, 600, (1, 3)) > 1


def test_bits_of_an_image_among_more_than_a_tile_of_the_products(device: torch.device) -> None:
    assert bits_of(device, "se", "identity", "channels_last", 2, 3, 2, (1, 63, 130)) == 1
