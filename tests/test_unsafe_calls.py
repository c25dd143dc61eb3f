"""No file that a user is given can run code: what may execute a file's content is found in the source, and refused."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "hubconf.py",
    *(path for folder in ("setriton", "kernels", "models", "bench") for path in sorted((ROOT / folder).rglob("*.py"))),
]

# Safe with this argument alone, or, where the second is None, not at all. Names are as after `import`.
UNSAFE: dict[str, tuple[str, bool] | None] = {
    "torch.load": ("weights_only", True),
    "torch.serialization.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    **dict.fromkeys(("eval", "exec", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module")),
    **dict.fromkeys(f"{module}.{name}" for module in ("pickle", "_pickle", "cloudpickle", "dill")
                    for name in ("load", "loads", "Unpickler", "_Unpickler", "Pickler.load")),
    **dict.fromkeys(("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "jsonpickle.decode")),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle")),
    **dict.fromkeys(("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "torch.export.load")),
    **dict.fromkeys(("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader")),
    # Storage of torch's own format, whose metadata is a pickle; `checkpoint_id` alone chooses it.
    **dict.fromkeys(
        f"torch.distributed.checkpoint.{name}"
        for name in ("FileSystemReader", "filesystem.FileSystemReader", "format_utils.dcp_to_torch_save")
    ),
    "torch.distributed.checkpoint.load": ("storage_reader", True),
    "torch.distributed.checkpoint.state_dict_loader.load": ("storage_reader", True),
}  # fmt: skip
PRESENT = {"storage_reader"}
"""Arguments that any value makes safe."""

ALLOWED = {
    ("setriton/convert.py", "exec"): "source that torch.fx made of a graph in this process",
    ("setriton/convert_fused.py", "exec"): "source that torch.fx made of a graph in this process",
    ("hubconf.py", "importlib.util.spec_from_file_location"): "this package's own folders in a checkout",
    ("bench/inductor.py", "pickle.loads"): "bytes that the parent process made and sent",
}


def unsafe_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each use in `source` of what may run code, calls or not, whatever it is imported as."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                imported[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            owner = full_name(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return imported.get(node.id, node.id).removeprefix("builtins.") if isinstance(node, ast.Name) else ""

    safe: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (wanted := UNSAFE.get(full_name(node.func))):
            argument, value = wanted
            given = {keyword.arg: keyword.value for keyword in node.keywords}.get(argument)
            is_default = given is None and argument == "allow_pickle" and len(node.args) < 3
            is_wanted = isinstance(given, ast.Constant) and given.value is value
            if is_default or is_wanted or (given is not None and argument in PRESENT):
                safe.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and node not in safe and full_name(node) in UNSAFE:
            yield node.lineno, full_name(node)
        elif isinstance(node, ast.keyword) and node.arg == "shell" and getattr(node.value, "value", True) is not False:
            yield node.value.lineno, "shell=True"


def test_nothing_in_the_package_runs_what_a_file_holds() -> None:
    assert len(SOURCES) > 90, "the folders must be found"
    found = [
        f"{name}:{line}: {use}"
        for path in SOURCES
        for name in [path.relative_to(ROOT).as_posix()]
        for line, use in unsafe_uses(path.read_text())
        if (name, use) not in ALLOWED
    ]
    assert found == [], "these may run code from a file; read the file as data, or say in ALLOWED why none is read"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load\nload(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "import pickle\npickle.loads(content)",
        "from pickle import load as read\nreads = map(read, files)",
        "import pickle\nclass Reader(pickle.Unpickler): ...",
        "from builtins import eval\neval(text)",
        "exec(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from torch.distributed.checkpoint.filesystem import FileSystemReader\nFileSystemReader(path)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state, checkpoint_id=path)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert len(list(unsafe_uses(source))) == 1


def test_safe_uses_are_not_reported() -> None:
    source = """
import json, pickle, subprocess
import numpy as np
import torch
from torch.distributed.checkpoint import load
torch.load(path, weights_only=True)
np.load(path), np.load(path, allow_pickle=False)
json.loads(text), pickle.dumps(value), model.eval(), model.load(path)
load(state, storage_reader=reader)
subprocess.run(command, shell=False)
"""
    assert list(unsafe_uses(source)) == []
