"""Weights of any known kind into a network, or the reason why its outputs would be wrong."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..base import Network
from ..registry import entry
from .download import resolve
from .files import read_weights, unwrapped
from .fit import BACKGROUND_TOO, LoadReport, Weights, adapt, fit, se_options
from .headers import of_header
from .sources import network_roots, recognise
from .state_dicts import without_wrappers
from .tensors import check_tensors
from .timm_names import TimmConfig

# Options that a network may have otherwise than the weights it is given, but whose outputs are then others.
SAID = ("global_pool", "output_stride")


def open_weights(
    weights: str | Path | Mapping[str, Any],
    source: str = "auto",
    use_ema: bool = True,
    config: TimmConfig | None = None,
) -> Weights:
    """Read weights and recognise them; arguments and errors are those of `load_weights`.

    Args:
        weights, source, use_ema: as there.
        config: what is said of them elsewhere; None for the file beside them, where there is one.
    """
    if isinstance(weights, Mapping):
        content, header, where = weights, None, "weights"
    elif isinstance(weights, str | Path):
        where, path = str(weights), Path(weights).expanduser()
        content, header = read_weights(path)
        config = config or TimmConfig.beside(path)
    else:
        raise TypeError(f"weights must be a path or a state dict; got {type(weights).__name__}")
    if header is not None:
        return of_header(without_wrappers(content), header, where)
    state, notes = unwrapped(content, where, functools.partial(network_roots, source=source), use_ema)
    check_tensors(state, where)
    known = recognise(state, source)
    state = known.translate(state)
    if "fc.weight" in state and state["fc.weight"].dim() < 2:
        axes = state["fc.weight"].dim()
        raise ValueError(f"weights of {known.title} must have a row for each class; fc.weight has {axes} axes")
    found = Weights(
        state,
        known.title,
        known.network_needs(state),
        known.preprocessing,
        known.published_dropout,
        notes=tuple(notes),
        untold=known.untold,
    )
    if config is None:
        return found
    options = {"global_pool": config.global_pool} if config.global_pool else None
    return replace(found, preprocessing=config.preprocessing or found.preprocessing, options=options, config=config)


def open_for(name: str, weights: str | Path | Mapping[str, Any], layout: str | None, use_ema: bool) -> Weights:
    """Weights for network `name`, downloaded where "timm" or a repository is given.

    Raises:
        ValueError: as for `load_weights`; or the repository says that they are another network's.
        OSError: they cannot be downloaded.
    """
    where, config = resolve(name, weights, layout)
    if config is not None:
        # Before the file is read, whose keys may be of no kind that is known.
        config.check(name)
    return open_weights(where, use_ema=use_ema, config=config)


def options_for(name: str, weights: Weights) -> dict[str, Any]:
    """Options of `create_model` with which network `name` is the one that the weights are of."""
    known = entry(name).options()
    chosen = weights.needs | (weights.options or {})
    if weights.model is None:
        chosen = se_options(weights.state) | chosen
        classes = weights.state["fc.weight"].shape[0] if "fc.weight" in weights.state else None
        if classes is not None and (classes, known["num_classes"]) != (BACKGROUND_TOO, BACKGROUND_TOO - 1):
            chosen["num_classes"] = classes
    return {option: value for option, value in chosen.items() if option in known and known[option] != value}


def load_weights(
    model: nn.Module,
    weights: str | Path | Mapping[str, Any],
    source: str = "auto",
    *,
    allow: Collection[str] = (),
    use_ema: bool = True,
) -> LoadReport:
    """Load published weights into a network, in place; either all of them, or none and an error.

    Networks of one name differ in details that do not show in shapes: where the stride is, how the stem pools. Weights
    are refused by a network that was built otherwise than they need, since its outputs would be wrong without a sign.

    Args:
        model: built by `create_model`. With another number of classes than the weights', its classifier keeps the
            weights it has; with other `in_chans`, the first convolution's are summed or repeated.
        weights: a file (safetensors, a PyTorch checkpoint, .caffemodel, .npz of Caffe's blobs, or what setriton wrote),
            or a state dict.
        source: where they come from: auto, by their keys; or caffe (the authors), legacy (timm's legacy_*, Cadene),
            timm (also torchvision), cadene, nvidia, moskomule, mmpretrain; or setriton, a state dict of the same
            options, which are not checked.
        allow: options in which the network may differ from what the weights need, such as "drop_rate".
        use_ema: of a checkpoint that has averaged weights as well, or alone, take those, as timm does.

    Returns:
        What was loaded, chosen, changed and left out, and what the keys cannot tell. `model.preprocessing` is then what
        the weights were trained with.

    Raises:
        TypeError: `model` is none of ours, or `weights` neither a path nor a state dict.
        FileNotFoundError: no such file.
        ValueError: the source is unknown; the file is damaged or holds more than tensors; a tensor is not dense, real
            and finite; the weights are another network's, or need an option that `model` was not built with: the
            message names it.
    """
    if not isinstance(model, Network) or not model.config:
        raise TypeError(f"model must be a network that create_model built; got {type(model).__name__}")
    return load_opened(model, open_weights(weights, source, use_ema), allow)


def load_opened(model: Network, weights: Weights, allow: Collection[str] = ()) -> LoadReport:
    """As `load_weights`, of weights that have been read."""
    is_named = _check_options(model, weights, allow)
    report = fit(model, weights)
    if weights.untold and not is_named:
        report.notes.append(weights.untold)
    built = entry(model.config["name"]).options() | model.config
    for option in SAID:
        saved = (weights.options or {}).get(option, built.get(option))
        if saved != built.get(option):
            report.notes.append(f"{option}: the network has {built[option]!r}, the weights were saved with {saved!r}")
    return report


def check_fit(model: Network, weights: Weights) -> None:
    """ValueError unless `load_opened` takes the weights into this network; their values are not looked at."""
    _check_options(model, weights, ())
    adapt(model, weights)


def _check_options(model: Network, weights: Weights, allow: Collection[str]) -> bool:
    """Whether what is said of the weights names the network's architecture; ValueError if another or other options."""
    name = model.config["name"]
    is_named = weights.config is not None and weights.config.check(name)
    if weights.model is not None and weights.model != name:
        raise ValueError(f"weights must be those of {name}; these are of {weights.model}")
    options = entry(name).options()
    needs = dict(weights.needs)
    if weights.published_dropout:
        needs["drop_rate"] = options["drop_rate"]
    built = options | model.config
    wrong = {
        option: needed
        for option, needed in needs.items()
        if option not in allow and option in built and not _equal(built[option], needed)
    }
    if wrong:
        has = ", ".join(f"{option}={built[option]!r}" for option in wrong)
        wants = ", ".join(f"{option}={needed!r}" for option, needed in wrong.items())
        raise ValueError(
            f"weights of {weights.title} need {wants}; the network has {has} and would give other outputs: "
            f"create_model({name!r}, {wants}), or allow={sorted(wrong)} where you mean it"
        )
    return is_named


def _equal(a: object, b: object) -> bool:
    """Lists are tuples that went through JSON."""
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)
