"""Tests that cannot fail are found: without an assertion, or with one that nothing or anything fulfils."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What raises where something is wrong, beside functions of the tests' own with an assertion in them.
CHECKS = {"raises", "warns", "fail", "assert_close", "opcheck", "gradcheck", "gradgradcheck", "pedantic"}
"""`pedantic` is pytest-benchmark's: a test of time alone."""


def called(node: ast.AST) -> set[str]:
    """Last names of all that is called."""
    calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return {getattr(call, "attr", getattr(call, "id", "")) for call in calls}


@cache
def checking() -> set[str]:
    """Names of functions in the tests that check something, themselves or through others of these."""
    bodies: dict[str, set[str]] = defaultdict(set)
    names = set(CHECKS)
    for path in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                bodies[node.name] |= called(node)
                if any(isinstance(part, ast.Assert) for part in ast.walk(node)):
                    names.add(node.name)
    while more := {name for name, calls in bodies.items() if name not in names and calls & names}:
        names |= more
    return names


def suspicious(source: str, helpers: set[str]) -> Iterator[tuple[int, str]]:
    """Line of each test, assertion or expectation that cannot fail, or not for the right reason; and why."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            has = any(isinstance(part, ast.Assert) for part in ast.walk(node))
            if not has and not called(node) & helpers:
                yield node.lineno, f"{node.name} asserts nothing"
        elif isinstance(node, ast.Assert):
            yield from _of_assertion(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("raises"):
            any_error = bool(node.args) and ast.unparse(node.args[0]) in ("Exception", "BaseException")
            if any_error and not any(keyword.arg == "match" for keyword in node.keywords):
                yield node.lineno, "any error will do"


def _of_assertion(node: ast.Assert) -> Iterator[tuple[int, str]]:
    test = node.test
    if isinstance(test, ast.Tuple) and test.elts:
        yield node.lineno, "a tuple is always true"
    if isinstance(test, ast.Constant) and test.value:
        yield node.lineno, "a constant"
    for part in ast.walk(test):
        if isinstance(part, ast.Compare) and len(part.ops) == 1:
            sides = part.left, part.comparators[0]
        elif isinstance(part, ast.Call) and ast.unparse(part.func).endswith(("equal", "allclose")):
            sides = tuple(part.args[:2])  # type: ignore[assignment]
        else:
            continue
        # A call may give another value the second time: that is what a test of determinism asks.
        if len(sides) == 2 and ast.dump(sides[0]) == ast.dump(sides[1]) and not called(sides[0]):
            yield node.lineno, "compares a thing with itself"


def test_no_test_is_without_effect() -> None:
    paths = sorted(HERE.rglob("test_*.py"))
    assert len(paths) > 50
    found = [
        f"{path.relative_to(HERE)}:{line}: {why}"
        for path in paths
        for line, why in suspicious(path.read_text(), checking())
    ]
    assert found == []


@pytest.mark.parametrize(
    "body",
    [
        "call()",
        "assert (x == 1, 'message')",
        "assert x == x",
        "assert torch.equal(y, y)",
        "assert True",
        "with pytest.raises(Exception):\n        call()",
    ],
)
def test_what_cannot_fail_is_seen(body: str) -> None:
    assert len(list(suspicious(f"def test_it():\n    {body}\n", {"raises"}))) == 1


@pytest.mark.parametrize(
    "body", ["assert x == y", "same(x, y)", "with pytest.raises(Exception, match='m'):\n        f()"]
)
def test_what_can_fail_is_not(body: str) -> None:
    assert not list(suspicious(f"def test_it():\n    {body}\n", {"raises", "same"}))
