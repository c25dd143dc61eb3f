"""What every network here offers besides its layers: head, feature maps, checkpointing, groups of parameters."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from setriton.checks import check_choice, check_rate, check_size
from setriton.stock import must_call

from .preprocessing import Preprocessing
from .stages import Stage, takes_forks

GlobalPool = Literal["avg", "max", "avgmax", "catavgmax", ""]
POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class Options(TypedDict, total=False):
    """What every network takes.

    num_classes: size of the output; 0 for the pooled features.
    in_chans: channels of the input images.
    global_pool: avg, max, avgmax (their mean), catavgmax (both), or "" for none, which needs `num_classes=0`.
    drop_rate: dropout before the classifier.
    """

    num_classes: int
    in_chans: int
    global_pool: GlobalPool
    drop_rate: float


class Level(TypedDict):
    """A feature map a network can give out: the module it comes from, its channels, and input over output size."""

    module: str
    num_chs: int
    reduction: int


class Network(nn.Module):
    """A trunk, modules called one after the other, and a classifier `fc` on its pooled output.

    Args:
        num_classes, in_chans, global_pool, drop_rate: of `Options`.

    Attributes:
        trunk: names of the modules, in order; `Stage`s are made of blocks.
        feature_info: the feature maps that `forward_intermediates` can give, from the largest to the smallest.
        config: name and options it was built with, if `create_model` built it.
        preprocessing: what its images should be; loading weights sets what those were trained with.

    Raises:
        TypeError, ValueError: a value that no network can have.
    """

    trunk: tuple[str, ...]
    feature_info: list[Level]
    num_features: int
    config: dict[str, Any]
    layout: str | None = None
    usual_preprocessing: ClassVar[Preprocessing] = Preprocessing()

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: GlobalPool = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("in_chans", in_chans)
        check_rate("drop_rate", drop_rate)
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.config = {}
        self.preprocessing = self.usual_preprocessing

    def finish(self, trunk: Sequence[str], feature_info: Sequence[Level]) -> None:
        """Add the head behind the modules of `trunk`: the last step of a constructor but for initialisation."""
        self.trunk = tuple(trunk)
        self.feature_info = list(feature_info)
        self.num_features = self.feature_info[-1]["num_chs"]
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new classifier `fc`, with random weights; `num_classes=0` removes it.

        Raises:
            TypeError, ValueError: as for the constructor.
        """
        pool = self.global_pool if global_pool is None else global_pool
        _check_head(num_classes, pool)
        self.num_classes, self.global_pool = num_classes, pool
        if self.config:
            self.config |= {"num_classes": num_classes, "global_pool": pool}
        width = self.head_hidden_size * (2 if pool == "catavgmax" else 1)
        where = next(self.parameters())
        like: dict[str, Any] = {"device": where.device, "dtype": where.dtype}
        self.fc = nn.Linear(width, num_classes, **like) if num_classes else nn.Identity()

    @property
    def head_hidden_size(self) -> int:
        """What the classifier sees of one pooling; other than `num_features` where the head has hidden layers."""
        return self.num_features

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W); pooled features (N, num_features) without classes."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, num_features, H/32, W/32) in most networks."""
        return self._run(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and classifier, or what the classifier would see if `pre_logits`."""
        x = self.dropout(_pool(x, self.global_pool))
        return x if pre_logits else self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """The last feature map and, of `feature_info`, the maps at `indices`.

        Args:
            x: images (N, in_chans, H, W).
            indices: which levels, negative ones from the end; a number n means the last n; None all.
            stop_early: end after the last level asked for, and give its map as the last.
            intermediates_only: give the list alone.

        Returns:
            ``(last, maps)``, or ``maps``.

        Raises:
            TypeError: `indices` are no ints.
            ValueError: there is no such level.
        """
        wanted = self.take_indices(indices)
        keep = [self.feature_info[i]["module"] for i in wanted]
        last = self.feature_info[max(wanted)]["module"] if stop_early or intermediates_only else None
        x, maps = self._run(x, keep, last)
        return maps if intermediates_only else (x, maps)

    def take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Positions in `feature_info`, in order, for `indices` as `forward_intermediates` takes them.

        Raises:
            TypeError: `indices` are no ints.
            ValueError: there is no such level.
        """
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        given = [indices] if isinstance(indices, int) else indices
        if not isinstance(given, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
            raise TypeError(f"indices must be ints; got {indices!r}")
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices must be at most the {count} levels there are and at least 1; got {indices}")
            return list(range(count - indices, count))
        if not indices or not all(-count <= i < count for i in indices):
            raise ValueError(f"indices must name levels 0 to {count - 1}; got {list(indices)}")
        return sorted({i % count for i in indices})

    def _run(self, x: Tensor, keep: Sequence[str] = (), last: str | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output of module `last` (the trunk's if None), and those of the modules in `keep`."""
        end = len(self.trunk) if last is None else self.trunk.index(last) + 1
        skip, kept = None, []
        modules = [self.get_submodule(name) for name in self.trunk[:end]]
        takes = [not must_call(x) and takes_forks(module) for module in modules] + [False]
        for position, (name, module) in enumerate(zip(self.trunk, modules, strict=False)):
            # A residual stage reads its input twice: the stage before hands it on twice.
            if takes[position] and takes[position + 1]:
                x, skip = module(x, skip, fork=True)
            elif takes[position]:
                x, skip = module(x, skip), None
            else:
                x = module(x)
            if name in keep:
                kept.append(x)
        return x, kept

    def prune(self, last: int) -> None:
        """Remove what stands behind level `last`, the head included; `forward_features` ends there."""
        end = self.trunk.index(self.feature_info[last]["module"]) + 1
        for name in self.trunk[end:]:
            delattr(self, name)
        self.trunk, self.feature_info = self.trunk[:end], self.feature_info[: last + 1]
        self.num_features = self.feature_info[-1]["num_chs"]
        self.reset_classifier(0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks alone for the backward pass, which computes the rest again."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The function from a parameter's name to the number of its group of `layer_groups`; timm's optimizers ask."""
        numbers = {name: number for number, names in enumerate(self.layer_groups(coarse)) for name in names}
        return numbers.__getitem__

    def layer_groups(self, coarse: bool = False) -> list[list[str]]:
        """Names of all parameters in groups from the input to the output: stem, each block (stage if `coarse`), head.

        For learning rates that fall with the distance to the output.
        """
        groups: dict[tuple[int, str], list[str]] = {}
        order = {name: position for position, name in enumerate(self.trunk)}
        first_stage = min((p for n, p in order.items() if isinstance(self.get_submodule(n), Stage)), default=len(order))
        for name, _ in self.named_parameters():
            child, block = name.split(".")[:2]
            position = order.get(child, len(order))
            if position < first_stage:
                key = (0, "")
            elif isinstance(self.get_submodule(child), Stage) and not coarse:
                key = (position, block)
            else:
                key = (position, "")
            groups.setdefault(key, []).append(name)
        return list(groups.values())


class FeatureExtractor(nn.Module):
    """A network as a list of feature maps, for detectors and segmenters; nothing behind the last of them is kept.

    Args:
        network: taken over and pruned.
        out_indices: which of its `feature_info`; None all.

    Raises:
        TypeError: `out_indices` are no ints.
        ValueError: there is no such level.
    """

    def __init__(self, network: Network, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = network.take_indices(out_indices)
        network.prune(max(self.out_indices))
        self.network = network
        self.feature_info = [network.feature_info[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(x, self.out_indices, intermediates_only=True)


def _check_head(num_classes: int, global_pool: str) -> None:
    if num_classes != 0 or isinstance(num_classes, bool):
        check_size("num_classes", num_classes)
    check_choice("global_pool", global_pool, POOLS)
    if num_classes and not global_pool:
        raise ValueError(f"global_pool must be one of {', '.join(POOLS[:-1])} for a classifier; got ''")


def _pool(x: Tensor, kind: str) -> Tensor:
    if not kind:
        return x
    if kind == "avg":
        return x.mean((2, 3))
    if kind == "max":
        return x.amax((2, 3))
    average, largest = x.mean((2, 3)), x.amax((2, 3))
    return (average + largest) / 2 if kind == "avgmax" else torch.cat((average, largest), dim=1)
