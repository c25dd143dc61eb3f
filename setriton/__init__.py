"""Squeeze-and-Excitation networks as fast as the hardware allows.

The public names are imported on first use: `import setriton` itself costs nothing and needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .functional import bn_squeeze_excite as bn_squeeze_excite
    from .functional import squeeze_excite as squeeze_excite
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .modules import BatchNormSqueezeExcite as BatchNormSqueezeExcite
    from .modules import SqueezeExcite as SqueezeExcite

__version__ = "0.1.0"

_HOMES = {
    "bn_squeeze_excite": "functional",
    "squeeze_excite": "functional",
    "BatchNormSqueezeExcite": "modules",
    "SqueezeExcite": "modules",
    "create_model": "models",
    "list_models": "models",
}
__all__ = [
    "BatchNormSqueezeExcite",
    "SqueezeExcite",
    "__version__",
    "bn_squeeze_excite",
    "create_model",
    "list_models",
    "squeeze_excite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
