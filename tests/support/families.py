"""One small network of each family with Squeeze-and-Excitation, in timm and in torchvision, and what is found in it.

`PYTHONPATH=tests/support python tests/support/families.py > docs/families.md` writes the table that the tests expect.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from graphs import compare, randomize
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A network, the side of its input, and whether a hard gate's constants round in float32."""

    name: str
    library: str = "timm"
    size: int = 64
    hard: bool = False

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def build(self) -> nn.Module:
        """The network with random weights, the same each time."""
        torch.manual_seed(0)
        if self.library == "torchvision":
            import torchvision

            return torchvision.models.get_model(self.name, weights=None)
        import timm

        return timm.create_model(self.name)

    def image(self) -> Tensor:
        """Two images."""
        torch.manual_seed(1)
        return torch.randn(2, 3, self.size, self.size, dtype=torch.float64)


# The smallest of each file of timm.models that has SE modules.
FAMILIES = tuple(
    Family(name, size=size, hard=hard)
    for name, size, hard in (
        ("test_byobnet", 64, False),
        ("haloregnetz_b", 224, False),
        ("sedarknet21", 64, False),
        ("cspnext_tiny", 64, True),
        ("test_efficientnet", 64, False),
        ("efficientvim_m1", 224, False),
        ("efficientvit_m0", 224, False),
        ("fastvit_t8", 64, False),
        ("gcvit_xxtiny", 224, False),
        ("ghostnet_050", 64, True),
        ("hardcorenas_b", 64, True),
        ("hgnet_tiny", 64, False),
        ("lcnetv2_small", 64, True),
        ("test_coatnet", 160, False),
        ("mobilenetv3_small_050", 64, True),
        ("test_nfnet", 64, False),
        ("rdnet_tiny", 64, True),
        ("regnety_002", 64, False),
        ("repghostnet_050", 64, True),
        ("repvit_m1", 64, False),
        ("seresnet18", 64, False),
        ("rexnet_100", 64, False),
        ("legacy_seresnet18", 64, False),
        ("shvit_s1", 224, False),
        ("tresnet_m", 64, False),
        ("ese_vovnet19b_slim_dw", 64, True),
    )
) + tuple(
    Family(name, "torchvision", hard=hard)
    for name, hard in (
        ("efficientnet_b0", False),
        ("efficientnet_v2_s", False),
        ("mobilenet_v3_large", True),
        ("mobilenet_v3_small", True),
        ("regnet_y_400mf", False),
    )
)


def se_modules(module: nn.Module) -> list[str]:
    """Paths of the modules whose class is called squeeze-and-excitation, or SE."""
    pattern = re.compile(r"SEModule|EseModule|SqueezeExcit")
    return [path for path, child in module.named_modules() if pattern.search(type(child).__name__)]


HEAD = """# Families of networks

What `torch.compile(backend="setriton")` finds in one small network of each family that has SE modules: each file of
timm.models, and torchvision. Outputs, gradients and buffers in float64 equal eager PyTorch's to 1e-10 of the largest,
1e-7 where there are hard gates, in training and in evaluation, in one graph. `tests/compile/test_families.py` checks
every row; `tests/support/families.py` writes this page.

| network | SE modules | replaced | left alone |
|---|---|---|---|"""


def row(family: Family) -> str:
    """What is found in training and in evaluation, as a line of the table.

    Raises:
        AssertionError: something is computed otherwise than in eager PyTorch, or the two modes differ.
    """
    model = family.build()
    randomize(model)
    found = []
    for training in (True, False):
        report = compare(model.train(training), family.image(), tolerance=1e-7 if family.hard else 1e-10)
        kinds, reasons = Counter(match.kind for match in report.replaced), Counter(str(m.reason) for m in report.left)
        found.append([", ".join(f"{n} {what}" for what, n in sorted(of.items())) for of in (kinds, reasons)])
        assert len(report) == len(se_modules(model)), str(report)
    assert found[0] == found[1]
    return f"| {family} | {len(se_modules(model))} | {found[0][0]} | {found[0][1]} |"


if __name__ == "__main__":
    print(HEAD, *map(row, FAMILIES), sep="\n")
