"""What the feature maps of a network are."""

from collections.abc import Sequence
from typing import TypedDict


class Level(TypedDict):
    """A feature map a network can give out: the module it comes from, its channels, and input over output size."""

    module: str
    num_chs: int
    reduction: int


class FeatureInfo(list[Level]):
    """The feature maps that an extractor gives, with the questions that timm's extractors answer."""

    def channels(self, indices: int | Sequence[int] | None = None) -> int | list[int]:
        """Channels of the map at an index, of those at several, or of all."""
        numbers = [level["num_chs"] for level in self]
        return numbers[indices] if isinstance(indices, int) else [numbers[i] for i in _all(indices, self)]

    def reduction(self, indices: int | Sequence[int] | None = None) -> int | list[int]:
        """Input over output size of the map at an index, of those at several, or of all."""
        numbers = [level["reduction"] for level in self]
        return numbers[indices] if isinstance(indices, int) else [numbers[i] for i in _all(indices, self)]

    def module_name(self, indices: int | Sequence[int] | None = None) -> str | list[str]:
        """The module that the map at an index comes from, those of several, or of all."""
        names = [level["module"] for level in self]
        return names[indices] if isinstance(indices, int) else [names[i] for i in _all(indices, self)]


def _all(indices: Sequence[int] | None, levels: Sequence[Level]) -> Sequence[int]:
    return range(len(levels)) if indices is None else indices
