"""Generated programs, SE blocks and near misses with writes by aliases among them, compute what eager PyTorch does.

`SETRITON_PROGRAMS` and `SETRITON_SEED` say how many and which; a failure is printed as Python that can be pasted.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable

import pytest
from program_runs import Invalid, Wrong, check, shrunk
from programs import generate, pasteable
from torch.fx import Graph, Node

from setriton.compile import rewrite
from setriton.compile.block import Block

PROGRAMS = int(os.environ.get("SETRITON_PROGRAMS", "2000"))
SEED = int(os.environ.get("SETRITON_SEED", "0"))
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_programs(part: int, one_thread: None) -> None:
    seen: Counter[str] = Counter()
    failed: list[str] = []
    for index in range(part, PROGRAMS, PARTS):
        program = generate(SEED, index)
        try:
            run = check(program)
        except Invalid:
            seen["refused by eager"] += 1
            continue
        except Exception as error:
            said = f"program {index} of seed {SEED}: {error}"
            failed.append(f"{said}\n{pasteable(shrunk(program) if isinstance(error, Wrong) else program)}")
            continue
        seen["run"] += 1
        seen["with a fused block"] += any(match.reason is None for match in run.matches)
        seen["with a block that was refused"] += any(match.reason is not None for match in run.matches)
        seen["differentiated"] += run.differentiated
        seen["whose excitation is seen"] += run.sees_excitation
    print(f"seed {SEED}, {PROGRAMS} programs, part {part} of {PARTS}: {dict(seen)}, {len(failed)} wrong")
    assert not failed, "\n\n".join(failed[:3])
    # Where nothing is found, or nothing depends on the excitation, nothing is tested.
    assert seen["with a fused block"] > 0.2 * seen["run"]
    assert seen["with a block that was refused"] > 0.1 * seen["run"]
    assert seen["whose excitation is seen"] > 0.5 * seen["differentiated"]
    assert seen["refused by eager"] < 0.2 * seen["run"]


def _forget_gradient(graph: Graph, block: Block) -> None:
    assert block.excitation is not None
    weight = block.excitation.fc1.weight
    with graph.inserting_before(block.output):
        detached = graph.call_method("detach", (weight,))
    detached.meta = dict(weight.meta)
    block.excitation = dataclasses.replace(
        block.excitation, fc1=dataclasses.replace(block.excitation.fc1, weight=detached)
    )


def _confuse_activations(graph: Graph, block: Block) -> None:
    assert block.excitation is not None
    act = {"gelu": "silu", "silu": "gelu"}.get(block.excitation.act, block.excitation.act)
    block.excitation = dataclasses.replace(block.excitation, act=act)


def _forget_residual(graph: Graph, block: Block) -> None:
    block.residual = None


@pytest.mark.parametrize("fault", [_forget_gradient, _confuse_activations, _forget_residual])
def test_planted_faults_are_found(
    fault: Callable[[Graph, Block], None], one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rewrite._replace

    def replace(graph: Graph, block: Block) -> Node:
        fault(graph, block)
        return right(graph, block)

    monkeypatch.setattr(rewrite, "_replace", replace)
    for index in range(200):
        program = generate(SEED, index)
        try:
            if not program.needs_dynamo:
                check(program)
        except Invalid:
            continue
        except Wrong:
            return
    pytest.fail("200 programs, and none shows it")


def test_the_same_programs_every_time() -> None:
    assert generate(3, 7) == generate(3, 7) != generate(3, 8)
