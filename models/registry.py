"""Names of networks and what builds them."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, builder: Callable[..., nn.Module]) -> None:
    """Make `builder` known as `name`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"name {name!r} is already registered")
    _BUILDERS[name] = builder


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a network by name, with random weights.

    Args:
        name: one of `list_models()`.
        options: what the network's builder takes: `num_classes`, `in_chans`, `layout`, `rd_ratio`, `drop_rate`,
            `zero_init_last`, ... (see `setriton.models.resnet.ResNet`, `setriton.models.small_resnet.SmallResNet`).

    Returns:
        The network: images (N, in_chans, H, W) to logits (N, num_classes).

    Raises:
        ValueError: the name is unknown (the message names the closest ones), or an option has no such value.
        TypeError: the network takes no such option.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {type(name).__name__}")
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(list_models())}"
        raise ValueError(f"name {name!r} is no known network{hint}")
    builder = _BUILDERS[name]
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"{name} takes no option {option!r}; it takes {', '.join(known)}")
    return builder(**options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of all networks that match a shell pattern, sorted naturally.

    Raises:
        TypeError: `pattern` is no string.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string; got {type(pattern).__name__}")
    return sorted(fnmatch.filter(_BUILDERS, pattern), key=_natural)


def _natural(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
