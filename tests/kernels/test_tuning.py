"""What may be tuned, what is stored of it, and what a launch takes; and that every candidate computes the same."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from setriton.kernels import config, stored, tuning
from setriton.kernels.cases import DTYPES, H200, KINDS, LAYOUTS, Case, Machine, fitted, kind_of, pick, programs
from setriton.kernels.config import ForwardConfig, SweepConfig
from setriton.kernels.entries import Entry, Failure
from setriton.kernels.stored import choose, store
from setriton.kernels.tuning import LIMIT, candidates, candidates_of

DEVICE = "NVIDIA H200"
SHAPES = [(128, 256, 56, 56), (128, 2048, 7, 7), (1, 512, 28, 28), (256, 32, 112, 112), (2, 3, 5, 1), (1, 1, 1, 1)]
BIG = Case.of("bn-training", (128, 256, 56, 56))
U = 2.0**-24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache and a package without configurations; nothing said or chosen yet."""
    monkeypatch.setenv("SETRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SETRITON_AUTOTUNE", raising=False)
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "configs")
    monkeypatch.setattr(stored, "_said", set())
    stored.forget()
    yield tmp_path / "cache"
    stored.forget()


def an_entry(case: Case = BIG, **changes: Any) -> Entry:
    changed = dataclasses.replace(pick(case, H200), **{"tiles": 3, **changes})
    return Entry(case, changed, 0.25, 0.5, {"date": "2026-01-01"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pick_is_what_launchers_pick(
    kind: str, shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "multiprocessors", lambda device: H200.multiprocessors)
    monkeypatch.setattr(config, "l2_bytes", lambda device: H200.l2_bytes)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=LAYOUTS[layout])
    facts = KINDS[kind]
    if facts.is_forward:
        found: SweepConfig = stored.forward_config(x, facts.bn_act, facts.training)
    else:
        found = stored.backward_config(x, facts.bn_act)
    assert pick(Case.of(kind, shape, "bfloat16", layout), H200) == found
    assert kind_of(facts.bn_act, facts.training, facts.is_forward) == kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_few_begin_with_the_pick_and_can_be_stored(
    kind: str, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    case = Case.of(kind, shape, dtype, layout)
    found = candidates(kind, shape, dtype, layout)
    assert found[0] == pick(case, H200)
    assert len(set(found)) == len(found) <= LIMIT
    for each in found:
        entry = an_entry(case, **vars(each))
        assert entry.config == each
        assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry
        assert fitted(each, case, case, H200) in (each, dataclasses.replace(each, tiles=each.tiles // 2)) or (
            programs(case, each) < config.PIECES_PER_SM * H200.multiprocessors
        )


def test_large_maps_have_a_choice_of_tiles_warps_and_launches() -> None:
    found = candidates_of(BIG, H200)
    assert len({(c.block_hw, c.block_c) for c in found}) >= 4
    assert len({c.num_warps for c in found}) >= 2
    assert {c.launches for c in found if isinstance(c, ForwardConfig)} == {1, 2, 3}
    evaluation = candidates_of(dataclasses.replace(BIG, kind="bn-evaluation"), H200)
    assert len({c.group_kib for c in evaluation if isinstance(c, ForwardConfig)}) >= 2


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("fits_registers", {"block_hw": 128}),
        ("accesses_are_wide", {"block_hw": 8, "block_c": 64, "num_warps": 8}),
        ("rows_are_long", {"block_hw": 128, "block_c": 16}),
        ("reads_few_vectors", {"block_hw": 8, "block_c": 256, "tiles": 1}),
        ("fills_the_machine", {"tiles": 10**6}),
        ("programs_overlap", {"block_hw": 256, "num_warps": 16, "maxnreg": 255}),
        ("masks_little", {"block_hw": 8192}),
    ],
)
def test_each_rule_leaves_something_out(rule: str, changes: dict[str, Any]) -> None:
    (named,) = (r for r in tuning.RULES if r.__name__ == rule)
    first = pick(BIG, H200)
    assert named(BIG, first, first, H200)
    assert not named(BIG, dataclasses.replace(first, **changes), first, H200)


@pytest.mark.parametrize("arguments", [("bn", (1, 2, 3, 4)), ("se", (1, 2, 3)), ("se", (0, 1, 1, 1))], ids=str)
def test_wrong_cases(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        candidates(*arguments)


def test_the_pick_is_kept_unless_another_is_clearly_faster() -> None:
    first, second, *_ = candidates_of(BIG, H200)
    assert tuning.best_of({first: 1.0, second: 0.995}, first) == first
    assert tuning.best_of({first: 1.0, second: 0.9}, first) == second


def test_lookup(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "setriton")
    entry = an_entry()
    store(stored.user_file(DEVICE), DEVICE, [entry, an_entry(dataclasses.replace(BIG, hw=49, channels=2048), tiles=2)])
    assert choose(dataclasses.replace(BIG, n=100), DEVICE, H200) == entry.config
    assert caplog.messages == []
    near = [dataclasses.replace(BIG, n=64), dataclasses.replace(BIG, n=512)]
    assert [choose(case, DEVICE, H200) for case in near] == [entry.config] * 2
    assert choose(dataclasses.replace(BIG, channels=4096, hw=49), DEVICE, H200).tiles == 2
    (said,) = caplog.messages
    assert said.startswith(f"setriton: {near[0]} was not tuned on {DEVICE}: using that of {BIG};")
    others = [dataclasses.replace(BIG, **change) for change in ({"kind": "se"}, {"dtype": "float32"})]
    assert [choose(case, DEVICE, H200) for case in others] == [pick(case, H200) for case in others]
    assert choose(BIG, "NVIDIA A100", H200) == pick(BIG, H200)
    assert len(caplog.messages) == 2
    assert caplog.messages[1].startswith(f"setriton: no tuned configuration for se bfloat16 channels_last on {DEVICE}")


def test_a_small_map_takes_a_tile_that_fits_and_as_many_pieces() -> None:
    found = dataclasses.replace(pick(BIG, H200), block_hw=32, block_c=128, tiles=64)
    small = dataclasses.replace(BIG, channels=16, n=8)
    near = fitted(found, BIG, small, H200)
    assert (near.block_hw, near.block_c) == (256, 16)
    assert near.tiles == 1
    assert fitted(found, BIG, dataclasses.replace(BIG, n=1024), H200) == found


def test_the_users_results_go_before_the_packages(cache: Path) -> None:
    store(stored.SHIPPED / "nvidia-h200.json", DEVICE, [an_entry(tiles=5), an_entry(BIG.of("se", (1, 8, 4, 4)))])
    store(cache / "nvidia-h200.json", DEVICE, [an_entry(tiles=7)])
    assert choose(BIG, DEVICE, H200).tiles == 7
    assert len(stored.entries_of(DEVICE)) == 2


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({"SETRITON_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/setriton"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/.cache/setriton"),
        ({}, "/home/.cache/setriton"),
    ],
    ids=str,
)
def test_where_the_cache_is(environment: dict[str, str], want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SETRITON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert stored.user_file("AMD Instinct MI300X / 8") == Path(want, "amd-instinct-mi300x-8.json")


def broken(**changes: Any) -> str:
    row = an_entry().to_json()
    row["config"] |= changes
    return json.dumps({"format": 1, "device": DEVICE, "entries": [row]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": 1',
        "[]",
        "\x00\xff",
        '{"format": 2, "device": "NVIDIA H200", "entries": []}',
        '{"format": 1, "device": "NVIDIA A100", "entries": []}',
        '{"format": 1, "device": "NVIDIA H200", "entries": [{"kind": "se"}]}',
        broken(block_hw=48),
        broken(block_c=4),
        broken(launches=4),
        broken(tiles=0),
        broken(num_warps="4"),
        broken(stages=3),
        '{"format": 1, "device": "NVIDIA H200", "entries": [], "failures": [{"kind": "hang"}]}',
        '{"format": 1, "device": "NVIDIA H200", "entries": [], "failures": [{"kind": "late"}]}',
    ],
    ids=range(15),
)
def test_a_file_of_something_else_is_named(text: str, cache: Path) -> None:
    cache.mkdir()
    (cache / "nvidia-h200.json").write_text(text)
    with pytest.raises(ValueError, match=r"cache/nvidia-h200\.json holds no tuned configurations of NVIDIA H200"):
        choose(BIG, DEVICE, H200)
    with pytest.raises(ValueError, match="move it away"):
        store(cache / "nvidia-h200.json", DEVICE, [an_entry()])
    assert (cache / "nvidia-h200.json").read_text() == text


def test_a_cache_that_cannot_be_read_is_reported_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "nvidia-h200.json").mkdir(parents=True)
    for case in (BIG, dataclasses.replace(BIG, n=1)):
        stored.forget()
        assert choose(case, DEVICE, H200) == pick(case, H200)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nvidia-h200.json" in record.getMessage()


WRITER = """
import sys
from pathlib import Path
from setriton.kernels.cases import H200, Case, pick
from setriton.kernels.stored import Entry, store
path, first = Path(sys.argv[1]), int(sys.argv[2])
for power in range(first, first + 15):
    case = Case("se", 8, 2**power, 16, "bfloat16", "contiguous")
    store(path, "NVIDIA H200", [Entry(case, pick(case, H200), 1.0, 1.0, {})])
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / "tuned.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(first)]) for first in (0, 15)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(stored.read(path, DEVICE)) == 30
    assert [file.name for file in path.parent.iterdir()] == ["tuned.json"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A map on a GPU that is not there; lookups find an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Machine, "of", lambda device: H200)
    with FakeTensorMode():
        return torch.empty(128, 256, 56, 56, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)


def test_a_launch_reads_files_once(pretended: torch.Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(stored.user_file(DEVICE), DEVICE, [an_entry()])
    first = stored.forward_config(pretended, "identity", True)
    assert first == an_entry().config
    monkeypatch.setattr(stored, "choose", None)
    assert stored.forward_config(pretended, "identity", True) is first


def test_tuning_on_first_use(
    pretended: torch.Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    from setriton.kernels import trials

    tuned: list[Case] = []
    hanging = candidates_of(BIG, H200)[1]
    store(stored.user_file(DEVICE), DEVICE, [], [Failure(BIG, hanging, "hang", "nothing happened", {})])

    def tune(case: Case, device: torch.device, machine: Machine, failed: Container[SweepConfig]) -> Entry:
        tuned.append(case)
        assert (hanging in failed) == (case == BIG)
        if case.kind == "se":
            raise torch.OutOfMemoryError("no memory for the maps")
        return an_entry(case)

    monkeypatch.setattr(trials, "tune", tune)
    monkeypatch.setenv("SETRITON_AUTOTUNE", "online")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert stored.forward_config(pretended, "identity", True) == pick(BIG, H200)
    assert not tuned
    assert not caplog.messages
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for batch in (128, 100, 128):
        assert stored.forward_config(pretended[:batch], "identity", True) == an_entry().config
    assert stored.forward_config(pretended, None, False) == pick(dataclasses.replace(BIG, kind="se"), H200)
    assert [case.kind for case in tuned] == ["bn-training", "se"]
    assert "online: tuning each new shape, into" in caplog.messages[0]
    assert "was not tuned: no memory" in caplog.messages[1]
    assert len(stored.read(stored.user_file(DEVICE), DEVICE)) == 1
    monkeypatch.setenv("SETRITON_AUTOTUNE", "always")
    with pytest.raises(ValueError, match="SETRITON_AUTOTUNE must be online, or unset; got 'always'"):
        stored.backward_config(pretended, "identity")


def same_results(device: torch.device, case: Case, machine: Machine, limit: int) -> int:
    """Every candidate's results are the pick's but for the order of fp32 sums and a last rounding."""
    from setriton.kernels.trials import Trial

    trial = Trial(case, device)
    first, *others = candidates_of(case, machine, limit)
    want = trial.outputs(first)
    terms = case.n * case.hw + case.channels
    for found in others:
        for name, result in trial.outputs(found).items():
            last = 0.0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
            difference = (result.double() - want[name].double()).norm()
            assert difference <= (terms * U + last) * want[name].double().norm(), (found, name)
    return len(others)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_compute_the_same(device: torch.device, kind: str, layout: str) -> None:
    assert same_results(device, Case.of(kind, (3, 40, 9, 7), "float32", layout), Machine(1, 2**18), limit=8)


@pytest.mark.full_autotune
@pytest.mark.parametrize("shape", [(3, 40, 9, 7), (5, 72, 4, 4), (2, 24, 33, 31)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_computes_the_same(
    device: torch.device, kind: str, layout: str, dtype: str, shape: tuple[int, ...]
) -> None:
    same_results(device, Case.of(kind, shape, dtype, layout), Machine(1, 2**18), limit=10**6)


def test_the_candidates_are_timed_where_tuning_is_online(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from setriton.kernels import trials

    case = Case.of("se", (3, 40, 9, 7), "float32")
    tried: list[int] = []

    def do_bench(call: Any, *_: object, return_mode: str) -> float:
        call()
        tried.append(len(tried))
        if len(tried) == 2:
            raise RuntimeError("out of resource")
        return 0.5 if len(tried) == 3 else 1.0

    monkeypatch.setattr(trials.triton.testing, "do_bench", do_bench)
    before = torch.get_rng_state()
    entry = trials.tune(case, device, Machine(1, 2**18))
    assert entry.config == candidates_of(case, Machine(1, 2**18))[2]
    assert (entry.ms, entry.pick_ms) == (0.5, 1.0)
    tried.clear()
    assert trials.tune(case, device, Machine(1, 2**18), {entry.config}).config != entry.config
    assert torch.equal(torch.get_rng_state(), before)
