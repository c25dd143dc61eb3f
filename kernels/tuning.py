"""What can be tuned: the configurations of a case, and the model that leaves a few worth measuring."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from . import config
from .cases import DTYPES, H200, KINDS, Case, Machine, pick, programs
from .config import ForwardConfig, Pieces, SweepConfig, next_power_of_2

# What CUDA's programming guide says of a multiprocessor of compute capability 9.0: threads, registers, programs.
THREADS, REGISTERS, PROGRAMS = 2048, 65536, 32
# Bytes that each multiprocessor must have asked for to keep the memory busy (Little's law): an H200's 4.8 TB/s and
# 0.8 microseconds, over 132 of them.
BYTES_IN_FLIGHT = 29_000
# Of a thread, for the products of the excitation that the forward kernel has beside its sweeps, by warps.
EXCITE_REGISTERS = {"float32": {2: 255, 4: 136, 8: 128}, "float16": {2: 225}, "bfloat16": {2: 225}}
# Rows that are no multiple of 16 have an address and a mask for each element: twice the registers.
UNALIGNED = 2.0
# Candidates of a case. Compiling one takes seconds, so that a case takes about half a minute.
LIMIT = 16


def candidates(
    kind: str,
    shape: Sequence[int],
    dtype: str = "bfloat16",
    layout: str = "channels_last",
    machine: Machine = H200,
    limit: int = LIMIT,
) -> list[SweepConfig]:
    """At most `limit` configurations worth measuring for a map (N, C, H, W): the model's pick, then the most promising.

    Raises:
        ValueError: as `Case.of`.
    """
    return candidates_of(Case.of(kind, shape, dtype, layout), machine, limit)


def candidates_of(case: Case, machine: Machine, limit: int = LIMIT) -> list[SweepConfig]:
    """`candidates` of a case."""
    first = pick(case, machine)
    by_tile: dict[tuple[int, int, int], list[SweepConfig]] = {}
    for found in _sweeps(case, first):
        if all(rule(case, found, first, machine) for rule in RULES):
            by_tile.setdefault((found.block_hw, found.block_c, found.num_warps), []).append(found)
    # One length of the pieces for each tile: what it costs is better known than what a tile does.
    best = [min(group, key=lambda found: cost(case, found, machine)) for group in by_tile.values()]
    best.sort(key=lambda found: cost(case, found, machine))
    return list(dict.fromkeys([first, *_schedules(case, first, machine), *best]))[:limit]


def best_of(milliseconds: Mapping[SweepConfig, float], first: SweepConfig) -> SweepConfig:
    """The fastest; the model's pick where it is within 1 %, which is too little to tell from noise."""
    fastest = min(milliseconds, key=lambda found: milliseconds[found])
    if first in milliseconds and milliseconds[first] <= 1.01 * milliseconds[fastest]:
        return first
    return fastest


def _sweeps(case: Case, first: SweepConfig) -> Iterator[SweepConfig]:
    """Tiles of 8 to 32 elements a thread, in 2 to 8 warps, 32 to 512 along the dense axis; pieces of 4 to 64."""
    is_dense_c = case.layout == "channels_last"
    columns, rows = max(next_power_of_2(case.channels), 8), next_power_of_2(case.hw)
    for num_warps in (2, 4, 8):
        for elements in (num_warps * _threads_of_a_warp() * each for each in (8, 16, 32)):
            for dense in (32, 64, 128, 256, 512):
                block_c = min(dense if is_dense_c else elements // dense, columns)
                block_hw = min(elements // dense if is_dense_c else dense, rows)
                if block_c < 8 or block_hw < 1:
                    continue
                for tiles in (4, 8, 16, 32, 64):
                    shape = {"block_hw": block_hw, "block_c": block_c, "tiles": tiles, "num_warps": num_warps}
                    found = dataclasses.replace(first, **shape)
                    yield dataclasses.replace(found, maxnreg=_register_limit(case, found, first))


def _schedules(case: Case, first: SweepConfig, machine: Machine) -> Iterator[SweepConfig]:
    """The pick with the registers it needs, with shorter and longer pieces, in fewer launches and other groups."""
    first = dataclasses.replace(first, maxnreg=_register_limit(case, first, first))
    yield first
    for tiles in (first.tiles // 2, first.tiles * 2):
        changed = dataclasses.replace(first, tiles=tiles)
        if tiles and fills_the_machine(case, changed, first, machine):
            yield changed
    if not isinstance(first, ForwardConfig):
        return
    is_training = KINDS[case.kind].training
    yield from (dataclasses.replace(first, launches=launches) for launches in ((1, 2) if is_training else (2,)))
    if is_training:
        return
    images = {_images_of_a_group(case, first.group_kib)}
    for share in (1 / 32, 1 / 16, 1 / 4, 1 / 2):
        grouped = dataclasses.replace(first, group_kib=int(share * machine.l2_bytes) // 1024)
        if _images_of_a_group(case, grouped.group_kib) in images:
            continue
        images.add(_images_of_a_group(case, grouped.group_kib))
        if groups_fill_the_machine(case, grouped, machine):
            yield grouped


# A rule says whether a configuration may be faster than the model's pick, `first`.
Rule = Callable[[Case, SweepConfig, SweepConfig, Machine], bool]


def fits_registers(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """Registers that a thread cannot have are spilled to memory: passes over a map that nobody asked for."""
    return predicted_registers(case, found) <= (found.maxnreg or 255)


def accesses_are_wide(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """A thread with fewer than 16 bytes of the tile cannot load them in one instruction."""
    return elements_a_thread(found) * DTYPES[case.dtype].itemsize >= 16


def rows_are_long(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """Memory moves sectors of 32 bytes, two at a time: rows under 64 bytes leave part of what is moved unused."""
    dense = found.block_c if case.layout == "channels_last" else found.block_hw
    return dense * DTYPES[case.dtype].itemsize >= 64


def reads_few_vectors(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """Each piece reads what it needs of its channels anew: 3 % of the traffic at most, or what the pick reads."""
    return vector_share(case, found) <= max(0.03, vector_share(case, first))


def fills_the_machine(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """Fewer programs than run at once leave multiprocessors idle; small maps have no more than the pick's."""
    wanted = machine.multiprocessors * programs_at_once(case, found)
    return programs(case, found) >= min(wanted, programs(case, first))


def programs_overlap(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """While a program waits for its loads another one works: two at once at least."""
    return programs_at_once(case, found) >= 2


def masks_little(case: Case, found: SweepConfig, first: SweepConfig, machine: Machine) -> bool:
    """Lanes beyond the map do nothing: a quarter of a tile at most, or what the pick wastes."""
    return used_share(case, found) >= min(0.75, used_share(case, first))


RULES: tuple[Rule, ...] = (
    fits_registers,
    accesses_are_wide,
    rows_are_long,
    reads_few_vectors,
    fills_the_machine,
    programs_overlap,
    masks_little,
)


def groups_fill_the_machine(case: Case, found: ForwardConfig, machine: Machine) -> bool:
    """Groups with fewer pieces than multiprocessors leave some idle; of one beyond half the L2 little stays there."""
    group = dataclasses.replace(case, n=_images_of_a_group(case, found.group_kib))
    return programs(group, found) >= machine.multiprocessors and 2 * found.group_kib * 1024 <= machine.l2_bytes


def cost(case: Case, found: SweepConfig, machine: Machine) -> float:
    """Predicted time of the sweeps, in that of a copy with as many bytes: for ranking, not for belief."""
    at_once = programs_at_once(case, found)
    tile_bytes = found.block_hw * found.block_c * DTYPES[case.dtype].itemsize * used_share(case, found)
    in_flight = at_once * tile_bytes * KINDS[case.kind].loads
    waves = programs(case, found) / (machine.multiprocessors * at_once)
    # The last wave takes as long as a full one; its programs end at different times, so half of what it leaves idle.
    idle = (max(1, -(-waves // 1)) / waves - 1) / 2
    return (1 + vector_share(case, found)) * (1 + idle) / min(1.0, in_flight / BYTES_IN_FLIGHT)


def elements_a_thread(found: SweepConfig) -> float:
    """Elements of the tile that a thread holds."""
    return found.block_hw * found.block_c / (_threads_of_a_warp() * found.num_warps)


def predicted_registers(case: Case, found: SweepConfig) -> int:
    """Registers that a thread needs."""
    fixed, each = KINDS[case.kind].registers
    least = EXCITE_REGISTERS[case.dtype].get(found.num_warps, 128) if KINDS[case.kind].is_forward else 0
    row = case.channels if case.layout == "channels_last" else case.hw
    return max(least, int(fixed + each * (UNALIGNED if row % 16 else 1.0) * elements_a_thread(found)))


def programs_at_once(case: Case, found: SweepConfig) -> int:
    """Programs that run on one multiprocessor at once, by its threads and registers."""
    threads = _threads_of_a_warp() * found.num_warps
    registers = min(predicted_registers(case, found), found.maxnreg or 255)
    return max(1, min(PROGRAMS, THREADS // threads, REGISTERS // (threads * (-(-registers // 8) * 8))))


def vector_share(case: Case, found: SweepConfig) -> float:
    """Bytes of per-channel vectors over bytes of maps that a piece moves."""
    pieces, kind = Pieces.of(case.hw, found.block_hw, found.tiles), KINDS[case.kind]
    pixels = min(pieces.images, case.n) * case.hw / pieces.splits
    return 4 * kind.vectors / (kind.passes * DTYPES[case.dtype].itemsize * pixels)


def used_share(case: Case, found: SweepConfig) -> float:
    """Elements of the map over elements of all tiles."""
    rows, columns = -(-case.hw // found.block_hw) * found.block_hw, -(-case.channels // found.block_c) * found.block_c
    return case.hw * case.channels / (rows * columns)


def _register_limit(case: Case, found: SweepConfig, first: SweepConfig) -> int | None:
    """The pick's where that suffices, else the next multiple of 32 that does."""
    needed = predicted_registers(case, found)
    if first.maxnreg is None or needed <= first.maxnreg:
        return first.maxnreg
    return min(-(-needed // 32) * 32, 255)


def _images_of_a_group(case: Case, group_kib: int) -> int:
    image_bytes = case.channels * case.hw * DTYPES[case.dtype].itemsize
    return min(case.n, max(1, group_kib * 1024 // image_bytes))


def _threads_of_a_warp() -> int:
    return 64 if config.is_amd() else 32
