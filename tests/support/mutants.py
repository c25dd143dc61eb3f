"""Faults planted one at a time, in copies of the tree, to see that tests fail: `make mutants`.

python tests/support/mutants.py [WORD ...]      faults whose description holds a word; without one, all
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "mutants.toml"
_SECONDS = 900
# Of pytest: all passed; some failed. Others say that tests were not found, or did not come to run.
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Fault:
    """An entry of the table."""

    what: str
    file: str
    old: str
    new: str
    tests: list[str]
    """Arguments of pytest."""

    def planted(self, root: Path) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the table is stale.
        """
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{TABLE.name} is stale: {self.what}: {self.old!r} is {times} times in {self.file}")
        return text.replace(self.old, self.new)


def faults() -> list[Fault]:
    """All entries of the table."""
    return [Fault(**entry) for entry in tomllib.loads(TABLE.read_text())["fault"]]


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A folder with the files that git knows or would add."""
    with tempfile.TemporaryDirectory(prefix="setriton-mutants-") as name:
        folder = Path(name) / "tree"
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for file in subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            source, copy = ROOT / file, folder / file
            if file and (source.is_file() or source.is_symlink()):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy, follow_symlinks=False)
        # An installed setriton finds these three beside it; a copy has them inside, found before any installed one.
        for part in ("kernels", "models", "bench"):
            (folder / "setriton" / part).symlink_to(folder / part)
        (Path(name) / "path").mkdir()
        (Path(name) / "path" / "setriton").symlink_to(folder / "setriton")
        yield folder


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status and output."""
    environment = os.environ | {"PYTHONPATH": str(tree.parent / "path"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a fault of the same size, written in the same second, must be read
    environment["TRITON_CACHE_DIR"] = str(tree.parent / "cache")
    if tests[0].startswith("tests/kernels"):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    return done.returncode, done.stdout


def verdict(tree: Path, fault: Fault) -> str | None:
    """What is wrong: tests that fail without the fault, or do not see it. None where all is right."""
    path = tree / fault.file
    planted, right = fault.planted(tree), path.read_text()
    status, output = run_tests(tree, fault.tests)
    if status != _PASSED:
        return f"its tests must pass without it, and end with {status}:\n{output[-3000:]}"
    path.write_text(planted)
    try:
        status, output = run_tests(tree, fault.tests)
    finally:
        path.write_text(right)
    if status == _PASSED:
        return "NOT SEEN"
    return None if status == _FAILED else f"its tests must fail, and end with {status}:\n{output[-3000:]}"


def main(words: list[str]) -> int:
    chosen = [fault for fault in faults() if not words or any(word in fault.what for word in words)]
    problems = 0
    with copy_of_the_tree() as tree:
        for fault in chosen:
            started = time.monotonic()
            problem = verdict(tree, fault)
            problems += problem is not None
            print(f"{fault.what}: {problem or 'seen'} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen) - problems} of {len(chosen)} faults seen")
    return 1 if problems or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
