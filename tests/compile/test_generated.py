"""Generated programs, SE blocks and near misses with writes by aliases among them, compute what eager PyTorch does.

`SETRITON_PROGRAMS` and `SETRITON_SEED` say how many and which; a failure is printed as Python that can be pasted.
"""

import os
from collections import Counter

import pytest
from program_runs import Invalid, Wrong, check, shrunk
from programs import generate, pasteable

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


def test_the_same_programs_every_time() -> None:
    assert generate(3, 7) == generate(3, 7) != generate(3, 8)
