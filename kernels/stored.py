"""Configurations that were measured, and which of them a launch takes: files of one device each, read once.

`configs/<device>.json` comes with the package; a file of the same name in the user's cache adds to it and goes first.
Nothing is measured here unless SETRITON_AUTOTUNE=online asks for it.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .cases import KINDS, Case, Machine, fitted, kind_of, pick
from .config import ForwardConfig, SweepConfig
from .entries import Entry, Failure, Key
from .layout import is_channels_last

SHIPPED = Path(__file__).with_name("configs")
FORMAT = 1

log = logging.getLogger("setriton")


def slug(device: str) -> str:
    """A device's name as the name of its files: NVIDIA H200 is nvidia-h200."""
    return "-".join(re.findall(r"[a-z0-9.]+", device.lower()))


def user_file(device: str) -> Path:
    """Where the user's results go: in $SETRITON_CACHE, else $XDG_CACHE_HOME/setriton, else ~/.cache/setriton."""
    folder = os.environ.get("SETRITON_CACHE")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative one is to be ignored (XDG Base Directory Specification).
        folder = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "setriton")
    return Path(folder, f"{slug(device)}.json")


def read(path: Path, device: str) -> dict[Key, Entry]:
    """Entries of a file; none where there is no file.

    Raises:
        ValueError: the file holds something else, or another device's entries.
        OSError: it cannot be read.
    """
    return _read(path, device)[0]


def read_failures(path: Path, device: str) -> dict[tuple[Case, SweepConfig], Failure]:
    """Configurations that failed, and are not to be tried again.

    Raises:
        ValueError, OSError: as `read`.
    """
    return _read(path, device)[1]


def _read(path: Path, device: str) -> tuple[dict[Key, Entry], dict[tuple[Case, SweepConfig], Failure]]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}, {}
    try:
        data = json.loads(text)
        if data["format"] != FORMAT or slug(data["device"]) != slug(device):
            raise ValueError(f"format {FORMAT} and device {device!r} are wanted")
        entries = [Entry.from_json(row) for row in data["entries"]]
        failures = [Failure.from_json(row) for row in data.get("failures", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} holds no tuned configurations of {device}; move it away ({reason})") from None
    return {entry.key: entry for entry in entries}, {failure.key: failure for failure in failures}


def store(path: Path, device: str, entries: Iterable[Entry], failures: Iterable[Failure] = ()) -> None:
    """Add to a file, in place of what has the same keys; whoever else writes it at the same time waits.

    Raises:
        ValueError: as `read`.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        held, failed = _read(path, device)
        held |= {entry.key: entry for entry in entries}
        failed |= {failure.key: failure for failure in failures}
        rows = {
            "entries": [held[key].to_json() for key in sorted(held)],
            "failures": [failed[key].to_json() for key in sorted(failed, key=str)],
        }
        # A line each: a case measured again is a line in a diff.
        lists = ",\n".join(
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in listed) + "\n ]"
            for name, listed in rows.items() if listed or name == "entries"
        )  # fmt: skip
        text = f'{{\n "format": {FORMAT},\n "device": {json.dumps(device)},\n{lists}\n}}\n'
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(text)
        temporary.replace(path)
    forget()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes and threads; leaves no file behind."""
    try:
        import fcntl
    except ImportError:  # Windows, where Triton does not run
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had it may have removed it, and a third may lock the next.
            is_current = lock.exists() and os.path.samestat(os.fstat(file), lock.stat())
        except FileNotFoundError:
            is_current = False
        except BaseException:
            os.close(file)
            raise
        if is_current:
            break
        os.close(file)
    try:
        yield
    finally:
        lock.unlink()
        os.close(file)


@functools.cache
def entries_of(device: str) -> dict[Key, Entry]:
    """All that is stored for a device, the user's before the package's; files are read once.

    Raises:
        ValueError: as `read`.
    """
    merged: dict[Key, Entry] = {}
    for path in (SHIPPED / f"{slug(device)}.json", user_file(device)):
        try:
            merged |= read(path, device)
        except OSError as error:
            _say_once("unreadable", f"setriton: tuned configurations are left out: {error}", logging.WARNING)
    return merged


def nearest(case: Case, entries: Iterable[Entry]) -> Entry | None:
    """The entry of the same bucket, else the nearest in log(N), log(C), log(HW), of the same kind, dtype and layout."""
    alike = [e for e in entries if (e.case.kind, e.case.dtype, e.case.layout) == (case.kind, case.dtype, case.layout)]

    def distance(entry: Entry) -> float:
        return math.dist([math.log2(size) for size in entry.case.bucket], [math.log2(size) for size in case.bucket])

    return min(alike, key=lambda entry: (distance(entry), entry.key), default=None)


def choose(case: Case, device: str, machine: Machine) -> SweepConfig:
    """What is stored for the case's bucket; else the nearest, made to fit; else the model's pick.

    The latter two are reported once a process, in a line at level INFO: nothing is wrong with either.

    Raises:
        ValueError: as `read`.
    """
    found = nearest(case, entries_of(device).values())
    if found is None:
        what = f"for {device}" if not entries_of(device) else f"for {case.kind} {case.dtype} {case.layout} on {device}"
        _say_once("model", f"setriton: no tuned configuration {what}: the cost model's is used; see `setriton tune`")
        return pick(case, machine)
    if found.case.bucket == case.bucket:
        is_per_image = KINDS[case.kind].is_per_image
        return fitted(found.config, found.case, case, machine) if is_per_image else found.config
    _say_once("nearest", f"setriton: {case} was not tuned on {device}: using that of {found.case}; see `setriton tune`")
    return fitted(found.config, found.case, case, machine)


_said: set[str] = set()
_chosen: dict[tuple[object, ...], SweepConfig] = {}


def forget() -> None:
    """Read files anew at the next launch."""
    entries_of.cache_clear()
    _chosen.clear()


def forward_config(x: Tensor, bn_act: str | None, training: bool) -> ForwardConfig:
    """For the forward pass of a dense x (N, C, H, W); bn_act is None without BN."""
    return cast(ForwardConfig, _of(kind_of(bn_act, training, is_forward=True), x))


def backward_config(x: Tensor, bn_act: str | None) -> SweepConfig:
    """For the backward pass."""
    return _of(kind_of(bn_act, True, is_forward=False), x)


def _of(kind: str, x: Tensor) -> SweepConfig:
    n, channels, height, width = x.shape
    key = kind, n, channels, height * width, x.dtype, is_channels_last(x), x.device
    found = _chosen.get(key)
    return found if found is not None else _decide(*key)


def _decide(
    kind: str, n: int, channels: int, hw: int, dtype: torch.dtype, is_last: bool, device: torch.device
) -> SweepConfig:
    layout = "channels_last" if is_last else "contiguous"
    case, machine = Case(kind, n, channels, hw, str(dtype).removeprefix("torch."), layout), Machine.of(device)
    if device.type != "cuda" or n * hw == 0:
        return pick(case, machine)
    name = torch.cuda.get_device_name(device)
    if _is_online() and not _is_stored(case, name):
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed; the next launch can
            return choose(case, name, machine)
        _tune(case, device, name, machine)
    found = _chosen[kind, n, channels, hw, dtype, is_last, device] = choose(case, name, machine)
    return found


def _is_online() -> bool:
    mode = os.environ.get("SETRITON_AUTOTUNE", "")
    if mode not in ("", "online"):
        raise ValueError(f"SETRITON_AUTOTUNE must be online, or unset; got {mode!r}")
    return mode == "online"


def _is_stored(case: Case, device: str) -> bool:
    return (case.kind, case.dtype, case.layout, case.bucket) in entries_of(device)


def _tune(case: Case, device: torch.device, name: str, machine: Machine) -> None:
    """Measure now, as the user asked for; what fails is reported once, and the launch goes on without."""
    from .trials import tune

    path = user_file(name)
    _say_once("online", f"setriton: SETRITON_AUTOTUNE=online: tuning each new shape, into {path}", logging.WARNING)
    try:
        failed = {config for tried, config in read_failures(path, name) if tried == case}
        store(path, name, [tune(case, device, machine, failed)])
    except (OSError, RuntimeError) as error:  # a full disk, or no memory beside the network's
        _say_once("failed", f"setriton: {case} was not tuned: {error}", logging.WARNING)


def _say_once(what: str, message: str, level: int = logging.INFO) -> None:
    if what not in _said:
        _said.add(what)
        log.log(level, message)
