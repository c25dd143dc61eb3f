"""Squeeze-and-Excitation networks as fast as the hardware allows.

The public names are imported on first use: `import setriton` itself costs nothing and needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile.backend import disable as disable
    from .compile.backend import enable as enable
    from .compile.explain import explain as explain
    from .compile.report import compile_report as compile_report
    from .compile.report import reset_compile_report as reset_compile_report
    from .convert import accelerate as accelerate
    from .convert import restore as restore
    from .functional import bn_squeeze_excite as bn_squeeze_excite
    from .functional import squeeze_excite as squeeze_excite
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .models import load_weights as load_weights
    from .models.batch_norm import freeze_bn as freeze_bn
    from .models.batch_norm import unfreeze_bn as unfreeze_bn
    from .modules import BatchNormSqueezeExcite as BatchNormSqueezeExcite
    from .modules import SqueezeExcite as SqueezeExcite

__version__ = "0.1.0"

_HOMES = {
    "bn_squeeze_excite": "functional",
    "squeeze_excite": "functional",
    "BatchNormSqueezeExcite": "modules",
    "SqueezeExcite": "modules",
    "accelerate": "convert",
    "compile_report": "compile.report",
    "create_model": "models",
    "disable": "compile.backend",
    "enable": "compile.backend",
    "explain": "compile.explain",
    "freeze_bn": "models.batch_norm",
    "list_models": "models",
    "load_weights": "models",
    "reset_compile_report": "compile.report",
    "restore": "convert",
    "unfreeze_bn": "models.batch_norm",
}
__all__ = [
    "BatchNormSqueezeExcite",
    "SqueezeExcite",
    "__version__",
    "accelerate",
    "bn_squeeze_excite",
    "compile_report",
    "create_model",
    "disable",
    "enable",
    "explain",
    "freeze_bn",
    "list_models",
    "load_weights",
    "reset_compile_report",
    "restore",
    "squeeze_excite",
    "unfreeze_bn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
