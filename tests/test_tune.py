"""`setriton tune`: what is measured, kept, resumed and left out, with a meter that is told the numbers."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from told_tuner import DEVICE, MEASURED, ToldMeter, tuner

from setriton import cli, doctor, tune, tune_plan
from setriton.kernels import stored
from setriton.kernels.cases import H200, KINDS, Case, pick
from setriton.kernels.config import SweepConfig
from setriton.kernels.tuning import candidates_of

CASES = tune_plan.plan(shapes=("128,256,56",), kinds=("bn-training", "bn-backward", "se"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SETRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(stored, "SHIPPED", tmp_path / "shipped")
    stored.forget()
    yield stored.user_file(DEVICE)
    stored.forget()


def test_the_fastest_is_stored(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ToldMeter()
    assert tuner(cache, meter).tune(CASES) == []
    assert meter.measured == [len(candidates_of(case, H200)) for case in CASES]
    for case in CASES:
        assert stored.choose(case, DEVICE, H200) == candidates_of(case, H200)[2]
    (first, *_) = stored.read(cache, DEVICE).values()
    assert (first.ms, first.pick_ms, first.measured) == (0.9, 1.0, MEASURED)
    assert "se 128x256x3136 bfloat16 channels_last: 0.9000 ms, the model's pick 11% slower" in capsys.readouterr().out


def test_stops_in_time_and_goes_on(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ToldMeter()
    assert tuner(cache, meter).tune(CASES, seconds=2.5) == CASES[2:]
    assert "stopped in time; run again for 1 more" in capsys.readouterr().out
    assert tuner(cache, meter).tune(CASES) == []
    assert "2 of 3 maps are in" in capsys.readouterr().out
    assert len(meter.measured) == 3
    tuner(cache, meter).tune(CASES[:1], force=True)
    assert len(meter.measured) == 4


@pytest.mark.parametrize(("name", "times"), [("source", 2), ("driver", 2), ("triton", 2), ("date", 1)])
def test_other_kernels_are_measured_again(name: str, times: int, cache: Path) -> None:
    meter = ToldMeter()
    tuner(cache, meter).tune(CASES[:1])
    tuner(cache, meter, **{name: "another"}).tune(CASES[:1])
    assert len(meter.measured) == times


def test_an_interrupted_run_keeps_what_it_measured(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(case: Case, found: SweepConfig) -> torch.Tensor:
        if case.kind == "se":
            raise KeyboardInterrupt
        return torch.ones(3)

    with pytest.raises(KeyboardInterrupt):
        tuner(cache, ToldMeter(), interrupted).tune(CASES)
    assert "2 of 3 are in" in capsys.readouterr().out
    assert len(stored.read(cache, DEVICE)) == 2


def test_what_does_not_run_or_is_wrong_is_not_timed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, second, third, fourth, *others = candidates_of(CASES[0], H200)

    def results(case: Case, found: SweepConfig) -> torch.Tensor:
        if found == second:
            raise RuntimeError("out of resource: shared memory\nmore of it")
        return torch.ones(3) * {third: float("nan"), fourth: 1.1}.get(found, 1.0)

    meter = ToldMeter()
    tuner(cache, meter, results).tune(CASES[:1])
    assert meter.measured == [1 + len(others)]
    shown = capsys.readouterr().out
    assert f"without {second}: error: RuntimeError: out of resource: shared memory\n" in shown
    assert shown.count("y differs from the model's pick's") == 2


def test_the_model_s_pick_may_fail(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = candidates_of(CASES[0], H200)

    def results(case: Case, found: SweepConfig) -> torch.Tensor:
        if found == first or case != CASES[0]:
            raise RuntimeError("out of resource")
        return torch.ones(3)

    meter = ToldMeter()
    assert tuner(cache, meter, results).tune(CASES[:2]) == []
    assert meter.measured == [len(others)]
    (entry,) = stored.read(cache, DEVICE).values()
    assert entry.ms == entry.pick_ms
    assert "left out, no candidate runs" in capsys.readouterr().out


def test_a_map_too_large_is_left_out(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results(case: Case, found: SweepConfig) -> torch.Tensor:
        if case.kind == "bn-training":
            raise torch.OutOfMemoryError("no memory")
        return torch.ones(3)

    assert tuner(cache, ToldMeter(), results).tune(CASES) == []
    assert "left out, not enough memory" in capsys.readouterr().out
    assert {entry.case.kind for entry in stored.read(cache, DEVICE).values()} == {"bn-backward", "se"}


def test_maps_of_networks() -> None:
    cases = tune_plan.plan("se_resnet50", batch_size=4)
    assert {case.kind for case in cases} == {"bn-training", "bn-backward", "bn-evaluation"}
    maps = [(256, 3136), (512, 784), (1024, 196), (2048, 49)]
    assert [(case.n, case.channels, case.hw) for case in cases if case.kind == "bn-training"] == [(4, *m) for m in maps]
    small = tune_plan.plan("se_resnet20", kinds=("bn-evaluation",), dtype="float32", layout="contiguous")
    assert [(c.channels, c.hw, c.dtype, c.layout) for c in small] == [
        (channels, hw, "float32", "contiguous") for channels, hw in ((16, 1024), (32, 256), (64, 64))
    ]


def test_maps_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    import setriton

    def build(name: str, device: str) -> nn.Module:
        with torch.device(device):
            tail = setriton.BatchNormSqueezeExcite(8, bn_act="silu")
            return nn.Sequential(nn.Conv2d(3, 8, 3), tail, setriton.SqueezeExcite(8), setriton.SqueezeExcite(8))

    monkeypatch.setattr(tune_plan, "create_model", build)
    found = tune_plan.maps_of_model("made here", 2, 10)
    assert found == [(k, (2, 8, 8, 8)) for k in KINDS if k in ("se", "se-backward", "bn-evaluation") or "act" in k]


def test_without_a_network_the_most_telling_maps_come_first() -> None:
    cases = tune_plan.plan()
    assert [case.kind for case in cases[::4]][:5] == [
        "bn-training",
        "bn-backward",
        "bn-evaluation",
        "se",
        "se-backward",
    ]
    assert {case.kind for case in cases} == set(KINDS)
    assert len({(case.kind, case.bucket) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune measures on a GPU; torch sees none"),
        (["--model", "se_resnet51"], "'se_resnet51' is no known network; did you mean"),
        (["--model", "resnet50"], "model resnet50 has no SE block"),
        (["--model", "se_resnet50", "--shapes", "1,2,3"], "model and shapes exclude each other"),
        (["--shapes", "128,256"], "shapes must be N,C,H or N,C,H,W of numbers from 1; got '128,256'"),
        (["--shapes", "1,2,3", "1,0,3"], "got '1,0,3'"),
        (["--shapes", "1,2,many"], "got '1,2,many'"),
        (["--kinds", "forward"], "kinds must be some of bn-training, bn-backward"),
        (["--seconds", "0"], "seconds must be positive; got 0.0"),
        (["--batch-size", "0"], "batch_size and image_size must be at least 1; got 0 and None"),
        (["--dtype", "float64"], "dtype must be one of bfloat16, float16, float32; got 'float64'"),
        (["--layout", "NHWC"], "layout must be one of channels_last, contiguous; got 'NHWC'"),
        (["--out", "."], "out must be a .json file; got ."),
        (["--out", "tuned"], "out must be a .json file; got tuned"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_interrupted_from_the_keyboard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", run)
    assert cli.main(["tune"]) == 130
    assert capsys.readouterr().err == "setriton tune: interrupted\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["tune", "--show"]) == 0
    return capsys.readouterr().out


def test_show(gpu: None, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing is stored for NVIDIA H200" in shown(capsys, monkeypatch)
    assert doctor.configurations(DEVICE) == "the cost model's picks; `setriton tune` measures better ones"
    entry = stored.Entry(CASES[0], pick(CASES[0], H200), 0.25, 0.5, MEASURED)
    store_shipped = stored.SHIPPED / "nvidia-h200.json"
    stored.store(store_shipped, DEVICE, [entry, dataclasses.replace(entry, case=CASES[2], config=pick(CASES[2], H200))])
    stored.store(cache, DEVICE, [entry])
    table = shown(capsys, monkeypatch)
    assert re.search(r"bn-training +│ 128x256x3136 .*│ 32x64 +│ 16 +│ 4 +│ 3 +│ 0.2500 │ 0.5000 +│ user", table)
    assert re.search(r"se +│ 128x256x3136 .* package", table)
    assert doctor.configurations(DEVICE).startswith(f"2 tuned, 1 of them in {cache}")


def test_show_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in shown(capsys, monkeypatch)


def test_a_broken_cache_is_one_line(gpu: None, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.write_text("{}")
    assert cli.main(["tune", "--show"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(cache) in line
    assert "move it away" in line
    assert doctor.configurations(DEVICE).startswith(f"FAILED, {cache}")
