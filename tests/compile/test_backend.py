"""torch.compile(backend="setriton"): found without an import, options passed on, caches kept, regions looked into."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from graphs import compare
from residual import C, Network, image
from torch import nn

import setriton


def paths(report: Any) -> list[str]:
    return [match.module for match in report.replaced]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_by_name(training: bool) -> None:
    report = compare(Network().train(training), image(), backend="setriton")
    assert paths(report) == ["blocks.0", "blocks.1", "blocks.2"]
    assert {match.kind for match in report.replaced} == {"bn_se+add+relu"}
    assert {(match.shape, match.hidden, match.training) for match in report.replaced} == {((2, C, 4, 4), 4, training)}
    assert "3 of 3 SE blocks replaced" in str(report)
    assert "blocks.1  2x8x4x4" in str(report)


def test_options_reach_inductor() -> None:
    compare(Network(), image(), backend="setriton", options={"max_fusion_size": 8})
    compare(Network().eval(), image(), backend="setriton", mode="max-autotune-no-cudagraphs")
    with pytest.raises(Exception, match="no_such_option"):
        compare(Network(), image(), backend="setriton", options={"no_such_option": 1})


def test_layouts_and_strides() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        report = compare(Network().to(memory_format=layout), image().to(memory_format=layout), backend="setriton")
        assert len(report.replaced) == 3


def test_checkpointed_blocks_are_found() -> None:
    # Eager training moves the statistics of a checkpointed BN twice, compiled training once.
    report = compare(Network(checkpointed=True).eval(), image(), backend="setriton")
    assert sorted(paths(report)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_dynamic_sizes_compile_once_more() -> None:
    torch._dynamo.reset()
    setriton.reset_compile_report()
    network = Network().double()
    compiled = torch.compile(network, backend=graphs.rewriting, fullgraph=True)
    for n in (2, 3, 5, 8):
        compiled(image(n)).sum().backward()
    assert len(setriton.compile_report()) == 6
    assert setriton.compile_report()[-1].shape[1:] == (C, 4, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(image(7)).sum().backward()


def test_dynamic_from_the_start() -> None:
    report = compare(Network(), image(), backend="setriton", dynamic=True)
    assert len(report.replaced) == 3
    assert not isinstance(report[0].shape[0], int)


def test_a_graph_without_blocks_is_untouched() -> None:
    plain = nn.Sequential(nn.Conv2d(C, C, 3, bias=False), nn.BatchNorm2d(C), nn.ReLU()).eval()
    torch._dynamo.reset()
    code = []

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        code.append(graph_module.code)
        run = graphs.rewriting(graph_module, inputs)
        code.append(graph_module.code)
        return run

    torch.compile(plain, backend=backend)(torch.randn(1, C, 4, 4))
    assert code[0] == code[1]


def test_caches_are_warm_in_another_process(tmp_path: Path) -> None:
    """And the report is there, though nothing was compiled."""
    worker = Path(__file__).with_name("worker.py")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, worker], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["0", "hits", "1", "misses", "1", "blocks"], ["1", "hits", "0", "misses", "1", "blocks"]]


def test_enable_and_disable() -> None:
    from torch._inductor import config

    setriton.enable()
    try:
        setriton.enable()
        with config.patch(fx_graph_cache=False):  # what an earlier run has left there is not matched again
            assert len(compare(Network(), image(), backend="inductor").replaced) == 3
    finally:
        setriton.disable()
    assert config.pre_grad_custom_pass is None
    assert compare(Network(), image(), backend="inductor") == []
    # Not monkeypatch's: what undoes that deletes the option.
    with (
        config.patch(pre_grad_custom_pass=lambda graph: None),
        pytest.raises(RuntimeError, match="pre_grad_custom_pass is taken"),
    ):
        setriton.enable()


def test_explain_computes_nothing() -> None:
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    setriton.reset_compile_report()
    x = image().float()
    state = torch.get_rng_state()
    explanation = setriton.explain(network, x)
    assert paths(explanation) == ["blocks.0", "blocks.1", "blocks.2"]
    assert str(explanation).count("bn_se+add+relu  blocks.1  25.2        11.1   14.1") == 1
    assert setriton.compile_report() == []
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        evaluated = setriton.explain(network.eval(), image().float())
    assert "6.0         4.0    2.0" in str(evaluated)
    assert str(setriton.explain(nn.ReLU(), image())) == "no SE blocks were found"
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got int"):
        setriton.explain(3)
