"""The table of planted faults fits the tree; `make mutants` shows that tests see them."""

import ast
from pathlib import Path

import mutants
import pytest


@pytest.mark.parametrize("fault", mutants.faults(), ids=lambda fault: fault.what)
def test_a_fault_can_be_planted_and_has_tests(fault: mutants.Fault) -> None:
    text = (mutants.ROOT / fault.file).read_text()
    planted = fault.planted(mutants.ROOT)
    assert len(planted) - len(text) == len(fault.new) - len(fault.old)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text)), "only a comment or a layout changes"
    assert (mutants.ROOT / fault.tests[0]).is_file()


def test_all_parts_have_faults() -> None:
    parts = {fault.what.partition(":")[0] for fault in mutants.faults()}
    assert parts >= {"kernel", "matcher", "accelerate", "loaders", "trainer"}
    assert len(mutants.faults()) >= 10


@pytest.mark.parametrize("text", ["", "x = 1\ny = 1\n"])
def test_a_stale_table_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(ValueError, match=r"mutants\.toml is stale: fault: '= 1' is \d times in file\.py"):
        mutants.Fault("fault", "file.py", "= 1", "= 2", []).planted(tmp_path)


TEST = """
from setriton import files, kernels

def test() -> None:
    assert "setriton-mutants-" in files.__file__ and "setriton-mutants-" in kernels.__file__, "not the copy"
    assert {}
"""


def test_verdicts() -> None:
    tests = ["tests/test_planted.py", "--noconftest"]
    fault = mutants.Fault("fault", "setriton/files.py", "import hashlib\n", "import hashlib\nX = 1\n", tests)
    wanted = {
        "'X' not in vars(files)": None,
        "True": "NOT SEEN",
        "'X' in vars(files)": "its tests must pass without it, and end with 1",
    }
    with mutants.copy_of_the_tree() as tree:
        for condition, verdict in wanted.items():
            (tree / tests[0]).write_text(TEST.format(condition))
            found = mutants.verdict(tree, fault)
            assert found is None if verdict is None else str(found).startswith(verdict)
            assert "X = 1" not in (tree / fault.file).read_text()
