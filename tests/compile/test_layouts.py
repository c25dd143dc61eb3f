"""Contiguous networks, whose convolutions Inductor turns to channels_last: no copies around the ops of setriton."""

import functools

import graphs
import pytest
import torch

pytest.importorskip("triton")

from setriton.bench.inductor import AS_WRITTEN, Block, GeneratedCode, generated_code

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is not built for CUDA")


def compiled(block: Block) -> dict[str, GeneratedCode]:
    return generated_code(block, training=True, channels_last=False, rewritten=True)


def copies(code: GeneratedCode) -> float:
    """Passes over the map in Inductor's own kernels, which have nothing else to do between op and convolution."""
    return code.passes - code.extern_passes


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_ops_take_the_layout_there_is(name: str) -> None:
    block = AS_WRITTEN[name]
    found = compiled(block)
    assert found.keys() == {"forward", "backward"}
    for code in found.values():
        assert code.extern_kernels == 1
        assert copies(code) < 0.1
    # Without their tag, maps that go in or come out are copied: a read and a write each.
    control = compiled(Block(functools.partial(graphs.without_tags, block.make), block.residual))
    for direction, code in control.items():
        assert code.extern_passes == pytest.approx(found[direction].extern_passes)
        assert copies(code) > 3.9
