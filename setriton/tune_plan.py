"""What `setriton tune` measures: the maps of a network, or those that are named, in the order of measuring."""

import inspect
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from . import reference, reference_tail
from .bench.cases import EFFICIENTNET, RESNET
from .kernels.cases import KINDS, Case
from .models import create_model

# Position of `bn_act` behind x among the arguments of `reference_tail.bn_squeeze_excite`.
_BN_ACT = list(inspect.signature(reference_tail.bn_squeeze_excite).parameters).index("bn_act") - 1


def plan(
    model: str | None = None,
    batch_size: int = 128,
    image_size: int | None = None,
    shapes: Sequence[str] = (),
    dtype: str = "bfloat16",
    layout: str = "channels_last",
    kinds: Sequence[str] = (),
) -> list[Case]:
    """Cases of `run`'s arguments in the order of measuring, one of each bucket.

    Raises:
        ValueError: as `run`.
    """
    if model is not None and shapes:
        raise ValueError("model and shapes exclude each other; got both")
    if batch_size < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"batch_size and image_size must be at least 1; got {batch_size} and {image_size}")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(sorted(unknown))}")
    if model is not None:
        maps = maps_of_model(model, batch_size, image_size)
    elif shapes:
        maps = [(kind, parse_shape(text)) for kind in KINDS for text in shapes]
    else:
        of_kind = {kind: EFFICIENTNET if "act" in kind else RESNET for kind in KINDS}
        maps = [(kind, (batch_size, s.channels, s.size, s.size)) for kind, found in of_kind.items() for s in found]
    cases = [Case.of(kind, shape, dtype, layout) for kind, shape in maps if not kinds or kind in kinds]
    of_bucket: dict[object, Case] = {}
    for case in cases:
        of_bucket.setdefault((case.kind, case.layout, case.bucket), case)
    return list(of_bucket.values())


def parse_shape(text: str) -> tuple[int, ...]:
    """(N, C, H, W) of "N,C,H,W", or of "N,C,H" with W = H.

    Raises:
        ValueError: it is neither.
    """
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"shapes must be N,C,H or N,C,H,W of numbers from 1; got {text!r}")
    return sizes if len(sizes) == 4 else (*sizes, sizes[2])


def maps_of_model(name: str, batch_size: int, image_size: int | None = None) -> list[tuple[str, tuple[int, ...]]]:
    """Kinds and maps (N, C, H, W) of a network's SE blocks, found by running it on the meta device.

    Raises:
        ValueError: no such network, or it has no SE block.
    """
    model = create_model(name, device="meta").eval()
    size = image_size or model.preprocessing.image_size
    # By map and by what stands between BN and SE, None where SE stands alone; in order, each once.
    found: dict[tuple[tuple[int, ...], str | None], None] = {}

    def of_se(x: Tensor, *others: Any) -> Tensor:
        found[tuple(x.shape), None] = None
        return squeeze_excite(x, *others)

    def of_tail(x: Tensor, *others: Any) -> Any:
        found[tuple(x.shape), others[_BN_ACT]] = None
        return bn_squeeze_excite(x, *others)

    # On the meta device all SE blocks end up in these two, whichever module calls them.
    squeeze_excite, bn_squeeze_excite = reference.squeeze_excite, reference_tail.bn_squeeze_excite
    with (
        patch.object(reference, "squeeze_excite", of_se),
        patch.object(reference_tail, "bn_squeeze_excite", of_tail),
        torch.no_grad(),
    ):
        model(torch.empty(batch_size, 3, size, size, device="meta"))
    if not found:
        raise ValueError(f"model {name} has no SE block")
    return [(kind, shape) for kind in KINDS for shape, bn_act in found if kind in _kinds_of(bn_act)]


def _kinds_of(bn_act: str | None) -> tuple[str, ...]:
    if bn_act is None:
        return "se", "se-backward"
    prefix = "bn" if bn_act == "identity" else "bn-act"
    return f"{prefix}-training", f"{prefix}-backward", "bn-evaluation"
