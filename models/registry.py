"""Names of networks and what builds them."""

import difflib
import fnmatch
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, overload

import torch

from .base import FeatureExtractor, Network, Options
from .se import SEOptions


@dataclass(frozen=True)
class Entry:
    """What is known of a network by its name."""

    builder: type[Network]
    se: type[SEOptions] | None
    fixed: dict[str, Any]
    """What the name says: arguments that are no options."""
    defaults: dict[str, Any]
    """Options whose defaults are this network's own."""

    def options(self) -> dict[str, Any]:
        """The options it takes, with their defaults."""
        keywords = {
            name: parameter.default
            for name, parameter in inspect.signature(self.builder).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in self.fixed
        }
        common = {n: inspect.signature(Network).parameters[n].default for n in Options.__annotations__}
        of_se = {} if self.se is None else {field.name: field.default for field in fields(self.se)}
        return common | keywords | of_se | self.defaults

    def build(self, options: dict[str, Any]) -> Network:
        """The network with these options, the others at their defaults.

        Raises:
            TypeError, ValueError: an option has another value than it can have.
        """
        for name, default in self.options().items():
            # Any other value is true or false as well: "False" is true.
            if isinstance(default, bool) and not isinstance(options.get(name, default), bool):
                raise TypeError(f"{name} must be True or False; got {options[name]!r}")
        options = self.defaults | options
        if self.se is None:
            return self.builder(**self.fixed, **options)
        of_se = {field.name: options.pop(field.name) for field in fields(self.se) if field.name in options}
        options["se"] = self.se(**of_se)
        return self.builder(**self.fixed, **options)


_ENTRIES: dict[str, Entry] = {}
_log = logging.getLogger("setriton")


def register(
    name: str,
    builder: type[Network],
    se: type[SEOptions] | None = None,
    *,
    fixed: dict[str, Any],
    **defaults: Any,
) -> None:
    """Make `builder` known as `name`.

    Args:
        name: of the network.
        builder: a `Network` class; its keyword arguments are the network's options.
        se: the options of its SE blocks, which it takes as `se`; None for a plain network.
        fixed: further arguments, those that the name stands for.
        defaults: options whose defaults are other than the builder's.

    Raises:
        ValueError: the name is taken.
    """
    if name in _ENTRIES:
        raise ValueError(f"name {name!r} is already registered")
    _ENTRIES[name] = Entry(builder, se, fixed, defaults)


def entry(name: str) -> Entry:
    """What is known of a network.

    Raises:
        TypeError: the name is no string.
        ValueError: it is unknown (the message names the closest ones).
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {type(name).__name__}")
    if name not in _ENTRIES:
        close = difflib.get_close_matches(name, _ENTRIES, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(list_models())}"
        raise ValueError(f"name {name!r} is no known network{hint}")
    return _ENTRIES[name]


@overload
def create_model(
    name: str,
    *,
    weights: str | Path | Mapping[str, Any] | None = None,
    use_ema: bool = True,
    features_only: Literal[False] = False,
    out_indices: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Network: ...
@overload
def create_model(
    name: str,
    *,
    weights: str | Path | Mapping[str, Any] | None = None,
    use_ema: bool = True,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> FeatureExtractor: ...
def create_model(
    name: str,
    *,
    weights: str | Path | Mapping[str, Any] | None = None,
    use_ema: bool = True,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Network | FeatureExtractor:
    """Build a network by name.

    Args:
        name: one of `list_models()`.
        weights: None for random ones. Else what `setriton.load_weights` takes: a file or a state dict; or "timm", which
            downloads what timm publishes for this network (`setriton.models.weights.download`), or a repository of
            Hugging Face's, such as "timm/seresnet50.ra2_in1k". Options that the weights need, and that are not given,
            are chosen: the layout, the widths of SE blocks, the number of classes. The logger "setriton" warns of what
            was chosen in the file, left out or changed, and of what its keys cannot tell.
        use_ema: of weights that a checkpoint has averaged as well, take the averages, as timm does.
        features_only: give feature maps instead of logits (`setriton.models.base.FeatureExtractor`).
        out_indices: which feature maps: positions in the network's `feature_info`, or how many from the end.
        device: where to build it; "meta" for a network without weights.
        dtype: of its parameters and statistics.
        options: what the network takes: `num_classes`, `in_chans`, `global_pool`, `drop_rate` (see
            `setriton.models.base.Options`), those of its class (`setriton.models.resnet.ResNet`: `layout`,
            `output_stride`, `drop_path_rate`, ...), and those of its SE blocks (`setriton.models.se.SEOptions`:
            `rd_ratio`, `squeeze`, `gate`, `fused`, ...).

    Returns:
        The network: images (N, in_chans, H, W) to logits (N, num_classes).

    Raises:
        ValueError: the name is unknown (the message names the closest ones), an option has no such value, or the
            weights are another network's or need other options than those given.
        TypeError: the network takes no such option.
        FileNotFoundError: there is no such file of weights.
        OSError: weights cannot be downloaded; the message says what to download elsewhere.
    """
    known = entry(name)
    taken = known.options()
    for option in options:
        if option not in taken:
            raise TypeError(f"{name} takes no option {option!r}; it takes {', '.join(taken)}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices must be given with features_only=True")
    opened = None
    if weights is not None:
        from .weights import load

        opened = load.open_for(name, weights, options.get("layout"), use_ema)
        options = load.options_for(name, opened) | options
    config = {"name": name, **options}
    if opened is not None:
        # Before it takes memory, of which options that were chosen may want any amount.
        with torch.device("meta"):
            sketch = known.build(options)
        sketch.config = config
        load.check_fit(sketch, opened)
    with torch.device(device or torch.get_default_device()):
        model = known.build(options)
    model.config = config
    if dtype is not None:
        model.to(dtype)
    if opened is not None:
        report = load.load_opened(model, opened)
        _log.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return FeatureExtractor(model, out_indices) if features_only else model


def list_models(
    pattern: str | Sequence[str] = "*", *, exclude: str | Sequence[str] = (), se: bool | None = None
) -> list[str]:
    """Names of networks, sorted naturally.

    Args:
        pattern: shell pattern, or several of which a name must match one.
        exclude: shell patterns of names to leave out.
        se: only networks with SE, or only those without.

    Raises:
        TypeError: a pattern is no string.
    """
    wanted, unwanted = _patterns("pattern", pattern), _patterns("exclude", exclude)
    names = [
        name
        for name, known in _ENTRIES.items()
        if any(fnmatch.fnmatchcase(name, p) for p in wanted)
        and not any(fnmatch.fnmatchcase(name, p) for p in unwanted)
        and se in (None, known.se is not None)
    ]
    return sorted(names, key=_natural)


def _patterns(argument: str, value: str | Sequence[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument} must be a string or several; got {type(value).__name__}")
    return list(patterns)


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
