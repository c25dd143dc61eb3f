"""Every configuration that `setriton tune` may try on the networks' maps, scaled down: memory, orders, bits.

The memory check of `conftest.py` goes along. Candidates are few for each map, and many in all: one of each kind, layout
and number of launches is tried each time, and all of them with `-m full_autotune`, which takes an hour of a core.
"""

import functools
import random
from collections.abc import Iterable

import pytest
import torch
from planted import count_the_tiles_of_the_group_at_hand

from setriton import list_models, tune_plan
from setriton.bench.instruments.scaled import Scaled, all_scaled, cases_of_networks, scaled
from setriton.bench.instruments.schedules import side_by_side
from setriton.kernels import schedule
from setriton.kernels.cases import DTYPES, H200, KINDS, LAYOUTS, Case
from setriton.kernels.config import ForwardConfig, Pieces, SweepConfig
from setriton.ops import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="scaled down for the interpreter")

Cell = tuple[str, str, int]
CELLS: list[Cell] = [
    (kind, layout, launches)
    for kind, facts in KINDS.items()
    for layout in LAYOUTS
    for launches in ((1, 2, 3) if facts.is_forward and facts.training else (1, 2) if facts.is_forward else (0,))
]


def cell_of(found: Scaled) -> Cell:
    launches = found.config.launches if isinstance(found.config, ForwardConfig) else 0
    return found.case.kind, found.case.layout, launches


@functools.cache
def usual() -> dict[Cell, list[Scaled]]:
    """Candidates for the maps that are tuned where no network is named."""
    cases = [case for dtype in DTYPES for layout in LAYOUTS for case in tune_plan.plan(dtype=dtype, layout=layout)]
    return by_cell(cases)


@functools.cache
def of_all_networks() -> dict[Cell, list[Scaled]]:
    return by_cell(cases_of_networks(128, list_models()))


def by_cell(cases: Iterable[Case]) -> dict[Cell, list[Scaled]]:
    cells: dict[Cell, list[Scaled]] = {cell: [] for cell in CELLS}
    for found in all_scaled(cases, H200):
        cells[cell_of(found)].append(found)
    return cells


def computes_the_same_in_any_order(found: Scaled, seed: int) -> bool:
    want = found.outputs()
    with side_by_side(seed, resident=(None, 1, 3)[seed % 3]):
        other = found.outputs()
    return all(torch.equal(want[name], other[name]) and bool(want[name].isfinite().all()) for name in want)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_a_candidate_of_each_kind(cell: Cell) -> None:
    found = random.Random(0).choice(usual()[cell])
    assert computes_the_same_in_any_order(found, seed=CELLS.index(cell)), found


@pytest.mark.full_autotune
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_every_candidate(cell: Cell) -> None:
    wrong = [f for seed, f in enumerate(of_all_networks()[cell]) if not computes_the_same_in_any_order(f, seed)]
    assert wrong == []


GROUPED = scaled(Case.of("se", (128, 960, 7, 7)), ForwardConfig(32, 64, 16, 4, launches=1, group_kib=7680))


def test_a_fault_of_the_real_map_is_one_of_the_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU this map hung for ever, when the tiles of a group of images were counted in two places."""
    assert computes_the_same_in_any_order(GROUPED, seed=0)
    count_the_tiles_of_the_group_at_hand(monkeypatch)
    with pytest.raises(Exception, match=r"OutOfBounds.*outside chunks"):
        GROUPED.outputs()
    schedule._local.__dict__.clear()


def test_small_maps_are_cut_as_large_ones() -> None:
    """Parts of a map, images of a piece, columns of channels and groups: some where there were some, with a rest."""
    parts = scaled(Case.of("se-backward", (128, 250, 56, 56)), SweepConfig(32, 64, 16, 4))
    assert Pieces.of(parts.case.hw, 32, parts.config.tiles) == Pieces(splits=3, images=1, tiles_per_split=2)
    assert (parts.case.channels, parts.case.hw % 32, parts.hidden) == (64 + 250 - 3 * 64, 0, 1)
    images = scaled(Case.of("bn-backward", (128, 2048, 7, 7)), SweepConfig(32, 64, 64, 4))
    assert Pieces.of(images.case.hw, 32, images.config.tiles).images == 3
    assert (images.case.n, images.case.channels, images.case.hw, images.hidden) == (5, 128, 49, 7)
    assert isinstance(GROUPED.config, ForwardConfig)
    # 83 images a group, of which one tile has 64, are 3, of which one has 2.
    assert GROUPED.config.group_kib * 1024 // (GROUPED.case.channels * GROUPED.case.hw * 2) == 3
