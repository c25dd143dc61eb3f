"""What compiling a model would replace, found without compiling it: `setriton.explain`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from .report import CompileReport, Match, table
from .rewrite import rewrite

# Passes over a bfloat16 map, forward and backward, of what Inductor generates for a block as it is written, measured
# inside a chain of 1x1 convolutions under autocast with `setriton.bench.inductor.generated_code` (torch 2.14, batch 32,
# 256 channels, 56x56, channels_last). BN, ReLU and SE in training, for instance, are 6 and 11.
_AS_WRITTEN: dict[tuple[str, bool], tuple[float, float]] = {}


class Explanation(CompileReport):
    """A report whose `str` says what each block saves, too."""
