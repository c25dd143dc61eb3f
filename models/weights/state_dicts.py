"""The network's state dict in whatever a training script wrote around it.

A checkpoint is a tree: dictionaries within dictionaries, and names with dots are branches as well, so that
``{"state_dict": {"model.conv1.weight": ...}}`` and ``{"model": {"conv1.weight": ...}}`` are written alike. Branches
that wrappers of modules add are taken out wherever they are, and the network is where the names below a branch are
those of a known source. No wrapper's order, number or nesting matters.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .checkpoint import StoredTensor

Leaves = dict[str, Any]
"""Tensors, read or not, by names with dots."""

# Submodules in which wrappers keep what they wrap: (Distributed)DataParallel and AveragedModel, torch.compile, FSDP,
# activation checkpointing, Lightning Fabric.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# Averages of the weights over training steps: model_ema, state_dict_ema, ema, emaModel, modelEma, EMAWeights ...; not
# emanet, schema.
_AVERAGED = re.compile(r"(?<![A-Za-z])ema(?![a-z])|(?<![A-Z])(?:Ema|EMA)(?![a-z])|(?i:averaged)")
# mmengine's EMAHook saves the averages as the state dict, and beside it what was trained and this counter.
_SWAPPED = "ema_state_dict.steps"
# Where several lie side by side, what timm's loader takes first, then what other scripts call it.
_USUAL = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net", "network", "")
# Longer names, and deeper trees, are no network's.
_LONGEST_NAME, _DEEPEST = 512, 32


@dataclass
class Found:
    """A network's tensors in a checkpoint."""

    where: str
    """The branch they are in; "" for the root."""
    leaves: Leaves
    """Under the names that the network gives them."""
    is_averaged: bool = False
    notes: list[str] = field(default_factory=list)
    """What was chosen, and what was left out."""


@dataclass
class _Dictionary:
    """The tensors that one dictionary of a checkpoint holds, by their whole names."""

    leaves: Leaves = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    """Names that several have once wrappers are taken out."""


def find_state_dict(
    content: object, where: str, roots: Callable[[list[str]], list[str]], use_ema: bool = True
) -> Found:
    """The state dict in a checkpoint.

    Args:
        content: what was read from `where`, for messages.
        roots: of all names in a dictionary, the branches below which a known network lies.
        use_ema: take averaged weights where there are any, as timm does; else those that were trained.

    Raises:
        ValueError: there is none; or several, and none that is the usual one; or one name twice, once wrappers are out.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must hold a state dict; got {type(content).__name__}")
    dictionaries = _dictionaries(content)
    if not dictionaries:
        names = ", ".join(str(key)[:50] for key in list(content)[:10])
        raise ValueError(f"{where} must hold a state dict; it has no tensors, only {names or '{}'}")
    found = [candidate for one in dictionaries for candidate in _networks(one, where, roots)]
    if not found:
        # Of an unknown kind: what recognises names says so.
        return Found("", dictionaries[0].leaves)
    swapped = ("ema_state_dict", "state_dict") if any(_SWAPPED in one.leaves for one in dictionaries) else ()
    for one in found:
        one.is_averaged = (one.where == "state_dict") if one.where in swapped else bool(_AVERAGED.search(one.where))
    chosen = _choose(found, where, use_ema)
    others = [other.where or "the outermost" for other in found if other is not chosen]
    kind = "averaged (EMA) weights" if chosen.is_averaged else "weights"
    if others:
        chosen.notes.insert(0, f"taken are the {kind} {chosen.where or 'outermost'}; left are {', '.join(others)}")
    elif chosen.is_averaged:
        chosen.notes.insert(0, f"taken are the {kind} {chosen.where}; there are no others")
    if unread := [] if chosen.is_averaged else _unread_averages(content, found):
        chosen.notes.append(f"left are averages of an unknown form: {', '.join(unread)}")
    return chosen


def without_wrappers(state: Mapping[str, Any]) -> Leaves:
    """A state dict whose names are without the branches that wrappers of modules add.

    Raises:
        ValueError: two names become one.
    """
    for dictionary in _dictionaries(state)[:1]:
        if dictionary.twice:
            raise ValueError(f"without prefixes of wrappers, {dictionary.twice[0]} is twice")
        return dictionary.leaves
    return {}


def _dictionaries(content: Mapping[Any, Any]) -> list[_Dictionary]:
    """Those of a checkpoint that hold tensors, the outermost first; each once, wherever it is held."""
    found = []
    todo: list[tuple[str, int, Mapping[Any, Any]]] = [("", 0, content)]
    seen = {id(content)}
    for prefix, depth, mapping in todo:  # which grows
        tensors = _Dictionary()
        for key, value in mapping.items():
            if not isinstance(key, str) or len(prefix) + len(key) > _LONGEST_NAME:
                continue
            name = ".".join(part for part in f"{prefix}{key}".split(".") if part not in _WRAPPERS)
            if isinstance(value, Tensor | StoredTensor):
                if name in tensors.leaves:
                    tensors.twice.append(name)
                tensors.leaves[name] = value
            elif isinstance(value, Mapping) and id(value) not in seen and depth < _DEEPEST:
                seen.add(id(value))
                todo.append((_prefix(name), depth + 1, value))
        if tensors.leaves:
            found.append(tensors)
    return found


def _unread_averages(content: Mapping[Any, Any], found: list[Found]) -> list[str]:
    """Entries of a checkpoint that are called averages, and have something in them, but no known network."""
    read = {one.where.partition(".")[0] for one in found}
    names = [
        str(k)
        for k, v in content.items()
        if not (isinstance(v, int | float | str | None) or (isinstance(v, Mapping | list | tuple) and not v))
    ]
    return [name for name in names if _AVERAGED.search(name) and "." not in name and name not in read]


def _networks(dictionary: _Dictionary, where: str, roots: Callable[[list[str]], list[str]]) -> list[Found]:
    """The networks in a dictionary; with a note of tensors that lie beside them."""
    leaves = dictionary.leaves
    found, beside = [], set(leaves)
    for root in _outermost(roots(list(leaves))):
        prefix = _prefix(root)
        # A network's tensors have a layer's name: others are counters, such as AveragedModel's.
        below = [name for name in leaves if name.startswith(prefix) and re.search("[.:]", name.removeprefix(prefix))]
        if again := [name for name in dictionary.twice if name in below]:
            raise ValueError(f"{where} must have each tensor once; without prefixes of wrappers, {again[0]} is twice")
        found.append(Found(root, {name.removeprefix(prefix): leaves[name] for name in below}))
        beside -= set(below)
    for candidate in found:
        if beside:
            some = ", ".join(sorted(beside)[:3])
            candidate.notes.append(f"left out is what is no part of the network: {some} ({len(beside)} such)")
    return found


def _prefix(branch: str) -> str:
    return f"{branch}." if branch else ""


def _outermost(roots: list[str]) -> list[str]:
    """Branches that lie in no other one: the names of a network's part may look like a network's."""
    kept: list[str] = []
    for root in sorted(set(roots), key=lambda root: (root.count("."), len(root))):
        if not any(root.startswith(_prefix(outer)) for outer in kept):
            kept.append(root)
    return kept


def _choose(found: list[Found], where: str, use_ema: bool) -> Found:
    averaged = [candidate for candidate in found if candidate.is_averaged]
    plain = [candidate for candidate in found if not candidate.is_averaged]
    if not use_ema and not plain:
        raise ValueError(f"use_ema must not be False for {where}: it has averaged weights alone, {averaged[0].where}")
    candidates = averaged if averaged and use_ema else plain
    if len(candidates) == 1:
        return candidates[0]
    usual = sorted((c for c in candidates if c.where in _USUAL), key=lambda c: _USUAL.index(c.where))
    # One name twice, once wrappers are out: nobody can say which is meant.
    if not usual or [c.where for c in usual[:2]].count(usual[0].where) == 2:
        names = ", ".join(candidate.where or "the outermost" for candidate in candidates)
        raise ValueError(f"{where} must hold one network; it has those of {names}: give the state dict of one of them")
    return usual[0]
