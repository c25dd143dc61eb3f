"""What a file of setriton says of itself, compared with what is in it."""

import torch
from torch import Tensor

from ..base import Network
from ..registry import entry
from ..saved import Header
from .fit import Weights
from .tensors import check_tensors

# Options in which a network may differ from the one that was saved: head and input are adapted, dilation is meant for
# weights that were trained without, and the others change nothing in evaluation.
FREE = (
    *("num_classes", "in_chans", "global_pool", "output_stride"),
    *("drop_rate", "drop_path_rate", "conv_drop_rate", "zero_init_last", "fused"),
)


def of_header(state: dict[str, Tensor], header: Header, where: str) -> Weights:
    """The weights of a file that says which network it holds.

    Raises:
        ValueError: the network is unknown, cannot be built with those options, or has other tensors.
    """
    check_tensors(state, where)
    try:
        options = entry(header.model).options()
        if unknown := sorted(header.options.keys() - options.keys()):
            raise ValueError(f"{header.model} has no option {unknown[0]!r} in this version, perhaps in a newer one")
        network = _build(header, len(state))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not say which network it holds: {error}") from None
    wanted = network.state_dict()
    for key in (*wanted, *(state.keys() - wanted.keys())):
        shapes = [str(tuple(d[key].shape)) if key in d else "missing" for d in (state, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{where} says it holds {header.model}: {key} would be {shapes[1]}, and is {shapes[0]}")
    needs = {name: value for name, value in (options | header.options).items() if name not in FREE}
    of_file = (header.preprocessing, False, header.model, options | header.options, header.origin)
    return Weights(state, f"setriton {header.model}", needs, *of_file)


def _build(header: Header, tensors: int) -> Network:
    """The network of a header, without memory, if it has not more blocks than the file has tensors."""
    for name, value in header.options.items():
        if isinstance(value, list) and any(isinstance(n, int) and n > tensors for n in value):
            raise ValueError(f"{name} is {str(value)[:100]}, of {tensors} tensors")
    with torch.device("meta"):
        return entry(header.model).build(dict(header.options))
