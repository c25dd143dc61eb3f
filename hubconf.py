"""torch.hub: `torch.hub.load("<owner>/setriton", "se_resnet50")`, from a checkout that nobody installed."""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import ClassVar as _ClassVar

dependencies = ["torch"]

_ROOT = _Path(__file__).resolve().parent


class _FolderFinder(importlib.abc.MetaPathFinder):
    """Finds setriton.kernels, .models and .bench, which stand beside setriton/ and are put below it by an install."""

    folders: _ClassVar = {f"setriton.{name}": _ROOT / name for name in ("kernels", "models", "bench")}

    def find_spec(
        self, fullname: str, path: _Sequence[str] | None, target: _ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.folders:
            return None
        folder = self.folders[fullname]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not any(type(finder).__name__ == _FolderFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_FolderFinder())

import setriton.models as _models  # noqa: E402

# torch.hub lists every public callable of this module: these and nothing else.
for _name in _models.list_models():
    globals()[_name] = functools.partial(_models.create_model, _name)
