"""What compiling costs is measured in fresh processes, and counted right."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import setriton
from setriton.bench import compile_costs
from setriton.bench.compile_costs import FirstStep
from setriton.bench.networks import INFERENCE, TRAINING, WAYS, Case, Way

CPU = torch.device("cpu")
WAY = {way.name: replace(way, backend=way.backend and "eager") for way in WAYS}


def tiny(mode: str) -> Case:
    return Case("se_resnet20", mode, 4, 16, "float32")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(("name", "mode"), [("compile", TRAINING), ("plain", INFERENCE)])
def test_counts(name: str, mode: str) -> None:
    found = compile_costs.first_step(tiny(mode), WAY[name], CPU, (5, 6))
    # The second batch size brings a graph for any; the third finds it.
    assert (found.graph_breaks, found.recompiles) == (0, 1)
    assert found.seconds > 0


def test_graph_breaks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_graphs(model: Any) -> None:
        features = model.forward_features

        def forward_features(x: torch.Tensor) -> torch.Tensor:
            x = features(x)
            torch._dynamo.graph_break()
            return x

        model.forward_features = forward_features

    monkeypatch.setattr(setriton, "accelerate", break_graphs, raising=False)
    assert compile_costs.first_step(tiny(INFERENCE), WAY["accelerate"], CPU, ()).graph_breaks > 0


def test_each_number_is_from_a_process_of_its_own() -> None:
    found = compile_costs.costs(tiny(INFERENCE), WAY["compile"], CPU)
    assert (found.cold.recompiles, found.warm.recompiles) == (0, 1)
    # In this process neither compiled anything.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_what_fails_in_a_process_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"InvalidBackend: Invalid backend: 'no compiler'"):
        compile_costs.costs(tiny(INFERENCE), replace(WAY["compile"], backend="no compiler"), CPU)


def test_caches_are_those_of_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_step(case: Case, way: Way, device: torch.device, batches: Sequence[int]) -> FirstStep:
        from torch._inductor.runtime import cache_dir_utils

        assert cache_dir_utils.cache_dir() == str(tmp_path)
        assert cache_dir_utils.triton_cache_dir(0) == os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
        return FirstStep(1.0, 0, 0)

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setattr(compile_costs, "first_step", first_step)
    compile_costs._try_first_step(tiny(INFERENCE), WAY["compile"], CPU, str(tmp_path), ())
