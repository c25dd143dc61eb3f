"""torch.hub: `torch.hub.load("<owner>/setriton", "se_resnet50")`, from a checkout that nobody installed."""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

dependencies = ["torch"]

ROOT = Path(__file__).resolve().parent


class _FolderFinder(importlib.abc.MetaPathFinder):
    """Finds setriton.kernels, .models and .bench, which stand beside setriton/ and are put below it by an install."""

    folders: ClassVar = {f"setriton.{name}": ROOT / name for name in ("kernels", "models", "bench")}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.folders:
            return None
        folder = self.folders[fullname]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.append(_FolderFinder())

from setriton.models import create_model, list_models  # noqa: E402

for _name in list_models():
    globals()[_name] = functools.partial(create_model, _name)
