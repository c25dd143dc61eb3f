"""Where weights come from: how their keys tell, what our keys are, what the network must be to run them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import bn_inception, vgg
from ..inception_resnet_v2 import InceptionResNetV2
from ..preprocessing import Preprocessing
from . import caffe
from .files import State

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class Source:
    """One way in which published weights are written down.

    The networks of one source compute alike wherever their keys do, so that what a network must be follows from them.
    """

    name: str
    title: str
    """Whose weights these are, for messages."""
    marks: tuple[str, ...]
    """Regular expressions; the source is this one if each matches some key."""
    renames: tuple[Rename, ...] = ()
    """Regular expressions and what they become, applied to every key in turn."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Options of `create_model` without which the outputs would be others."""
    published_dropout: bool = False
    """Whether the weights were trained with the network's own dropout; other libraries' defaults say nothing."""
    preprocessing: Preprocessing | None = None
    """What the images must be; None where the keys do not tell: then the network's own default stays."""
    prepare: Callable[[State], State] | None = None
    """What must happen to the tensors before keys are renamed."""
    untold: str = ""
    """Networks that have these keys and shapes and compute something else."""

    def roots(self, keys: Iterable[str]) -> list[str]:
        """Branches ("" the root) below which the keys are those of this source, from the outermost."""
        found: list[set[str]] = []
        for mark in self.marks:
            pattern = re.compile(rf"(?:(.*?)\.)?(?:{mark})")
            found.append({match[1] or "" for key in keys if (match := pattern.fullmatch(key))})
        return sorted(set.intersection(*found), key=len)

    def translate(self, state: State) -> State:
        """The state dict under our keys.

        Raises:
            ValueError: two tensors have one name there, or one is no blob of Caffe's layers.
        """
        state = state if self.prepare is None else self.prepare(state)
        renamed: State = {}
        for key, tensor in state.items():
            name = key
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            if name in renamed:
                raise ValueError(f"weights of {self.title} must have one {name}; {key} is the second")
            renamed[name] = tensor
        return renamed

    def network_needs(self, state: State) -> dict[str, Any]:
        """Options that the network of this state dict, under our keys, must have."""
        needs = dict(self.needs)
        is_basic = "layer1.0.conv2.weight" in state and "layer1.0.conv3.weight" not in state
        if self.name == "legacy" and is_basic and "layer1.0.se.fc1.weight" in state:
            # timm's legacy_seresnet18 and 34, which no paper has.
            needs["bn_act"] = "relu"
        return needs


def _next_digit(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) + 1}."


_TORCH, _CAFFE = {"layout": "torch"}, {"layout": "caffe"}
# timm and torchvision have options that no key shows.
_UNTOLD_TIMM = (
    "keys cannot tell networks that pool, activate or dilate otherwise, such as timm's resnetaa50 and resnetblur50: if "
    "the weights are of such a one, the outputs are wrong"
)
_UNTOLD_MMPRETRAIN = (
    'keys cannot tell style="caffe", which has the stride in the first 1x1 convolution: if the weights are of it, the '
    "outputs are wrong"
)
_SENET154_STEM = (
    (r"^layer0\.conv1\.", "conv1.0."),
    (r"^layer0\.bn1\.", "conv1.1."),
    (r"^layer0\.conv2\.", "conv1.3."),
    (r"^layer0\.bn2\.", "conv1.4."),
    (r"^layer0\.conv3\.", "conv1.6."),
    (r"^layer0\.bn3\.", "bn1."),
)
_STEM = ((r"^layer0\.", ""),)
_LEGACY = ((r"\.se_module\.", ".se."), (r"^last_linear\.", "fc."))
_STAGE_OF = {module: stage for stage, modules in bn_inception.STAGES.items() for module in modules}


def _inception_layer(match: re.Match[str]) -> str:
    """Cadene's name of a module's convolution, or of the BN behind it, as ours."""
    module, layer, is_bn = match.groups()
    if module not in _STAGE_OF:
        return match[0]
    return f"{_STAGE_OF[module]}.{module}.conv_{layer}.{'bn' if is_bn else 'conv'}."


def _inception_se(match: re.Match[str]) -> str:
    if match[1] not in _STAGE_OF:
        return match[0]
    return f"{_STAGE_OF[match[1]]}.{match[1]}.se.{'fc1' if match[2] == 'down' else 'fc2'}."


# Cadene's names are Caffe's with underscores, and numbers where Caffe has letters.
_BN_INCEPTION: tuple[Rename, ...] = (
    (r"^(inception_\w\w)_1x1_(down|up)\.", _inception_se),
    (r"^(conv1_7x7_s2|conv2_3x3\w*|inception_\w+?)/bn\.", r"\1_bn."),
    (r"_double3x3_reduce", "_double_3x3_reduce"),
    (r"_double3x3a", "_double_3x3_1"),
    (r"_double3x3b", "_double_3x3_2"),
    (r"^conv1_7x7_s2_bn\.", "conv1.bn."),
    (r"^conv1_7x7_s2\.", "conv1.conv."),
    (r"^conv2_3x3(_reduce)?_bn\.", r"conv2\1.bn."),
    (r"^conv2_3x3(_reduce)?\.", r"conv2\1.conv."),
    (r"^(inception_\w\w)_(\w+?)(_bn)?\.", _inception_layer),
    (r"^(last_linear|classifier)\.", "fc."),
)


def _vgg_layer(match: re.Match[str]) -> str:
    """Position of a convolution or BN in VGG-16-BN's list, which has ReLUs and pools as well, as stage and block."""
    position = int(match[1])
    for stage, (depth, _) in enumerate(vgg.STAGES, start=1):
        if 0 <= position < 3 * depth and position % 3 < 2:
            return f"layer{stage}.{position // 3}.{('conv', 'bn')[position % 3]}."
        position -= 3 * depth + 1
    return match[0]


def _flat_vgg_head(state: State) -> State:
    """timm's convolutions as what torchvision has in their place, linear layers."""
    return {key: value.flatten(1) if value.dim() == 4 and "fc" in key else value for key, value in state.items()}


_OF_CAFFE = Source(
    "caffe",
    "the authors' Caffe models",
    (r"classifier:0", r"conv\d.*:0"),
    caffe.RENAMES,
    _CAFFE,
    published_dropout=True,
    preprocessing=caffe.PREPROCESSING,
    prepare=caffe.to_state_dict,
)
_OF_LEGACY = Source(
    "legacy",
    "timm legacy_* or Cadene",
    (r"layer0\.conv1\.weight", r"last_linear\.weight"),
    _STEM + _LEGACY,
    _CAFFE,
    published_dropout=True,
    preprocessing=Preprocessing(),
)

# In this order: what stands first is the more special.
SOURCES = (
    replace(
        _OF_CAFFE,
        marks=(r"inception_3a/1x1:0",),
        renames=((r"^(conv\d|inception_\w\w)/(?!bn)", r"\1_"), *_BN_INCEPTION),
        needs={},
    ),
    _OF_CAFFE,
    replace(
        _OF_LEGACY,
        title="timm legacy_* or Cadene (SENet-154)",
        marks=(r"layer0\.conv3\.weight", r"last_linear\.weight"),
        renames=_SENET154_STEM + _LEGACY,
    ),
    _OF_LEGACY,
    Source(
        "nvidia",
        "NVIDIA DeepLearningExamples",
        # The second is of the file on NGC, the first of the code, of networks without SE too.
        (r"layers\.0\.0\.conv1\.weight|layer1\.0\.squeeze\.squeeze\.weight",),
        (
            (r"^layers\.(\d)\.", _next_digit),
            (r"\.squeeze\.squeeze\.", ".se.fc1."),
            (r"\.squeeze\.expand\.", ".se.fc2."),
        ),
        _TORCH,
        preprocessing=Preprocessing(),
    ),
    Source(
        "moskomule",
        "moskomule/senet.pytorch",
        (r"layer1\.0\.se\.fc\.0\.weight",),
        ((r"\.se\.fc\.0\.", ".se.fc1."), (r"\.se\.fc\.2\.", ".se.fc2.")),
        _TORCH,
        preprocessing=Preprocessing(),
    ),
    Source(
        "mmpretrain",
        "mmpretrain",
        (r"backbone\.layer1\.0\.conv1\.weight",),
        (
            (r"^backbone\.", ""),
            (r"^head\.fc\.", "fc."),
            (r"\.se_layer\.conv1\.conv\.", ".se.fc1."),
            (r"\.se_layer\.conv2\.conv\.", ".se.fc2."),
        ),
        _TORCH,
        preprocessing=Preprocessing(),
        untold=_UNTOLD_MMPRETRAIN,
    ),
    Source(
        "cadene",
        "Cadene (BN-Inception)",
        (r"conv1_7x7_s2\.weight", r"last_linear\.weight"),
        _BN_INCEPTION,
        # BGR, as the authors' own, with another mean of red.
        preprocessing=replace(caffe.PREPROCESSING, mean=(104 / 255, 117 / 255, 128 / 255)),
    ),
    Source(
        "timm",
        "timm or Cadene (Inception-ResNet-v2)",
        (r"conv2d_1a\.conv\.weight", r"(classif|last_linear)\.weight"),
        ((r"^(classif|last_linear)\.", "fc."),),
        preprocessing=InceptionResNetV2.usual_preprocessing,
    ),
    Source(
        "timm",
        "timm or torchvision (VGG-16-BN)",
        (r"features\.41\.running_mean", r"classifier\.6\.weight|head\.fc\.weight"),
        (
            (r"^features\.(\d+)\.", _vgg_layer),
            (r"^(classifier\.6|head\.fc)\.", "fc."),
            (r"^pre_logits\.fc1\.", "classifier.0."),
            (r"^pre_logits\.fc2\.", "classifier.3."),
        ),
        prepare=_flat_vgg_head,
        preprocessing=Preprocessing(),
    ),
    Source(
        "timm",
        "timm or torchvision",
        (r"conv1\.(0\.)?weight", r"layer1\.0\.conv1\.weight"),
        needs=_TORCH,
        untold=_UNTOLD_TIMM,
    ),
    # Last: ResNets' keys are timm's, and files of setriton say more than their keys.
    Source("setriton", "setriton", (r"(layer1|stage3|conv2d_1a)\..*",)),
)


def _of(source: str) -> list[Source]:
    names = list(dict.fromkeys(known.name for known in SOURCES))
    if source != "auto" and source not in names:
        raise ValueError(f"source must be auto or one of {', '.join(names)}; got {source!r}")
    return [known for known in SOURCES if source in ("auto", known.name)]


def network_roots(keys: Sequence[str], source: str = "auto") -> list[str]:
    """Branches below which the keys are those of a known source.

    Raises:
        ValueError: no source is called `source`.
    """
    return [root for known in _of(source) for root in known.roots(keys)]


def recognise(state: State, source: str = "auto") -> Source:
    """Where a state dict comes from.

    Raises:
        ValueError: no source is called `source`, or the keys are not those of it, or of any if it is auto.
    """
    found = next((known for known in _of(source) if "" in known.roots(state)), None)
    names = list(dict.fromkeys(known.name for known in SOURCES))
    if found is None:
        whose = "weights of a known kind" if source == "auto" else f"weights of {source}"
        raise ValueError(f"these must be {whose} ({', '.join(names)}); got keys such as {', '.join(list(state)[:3])}")
    return found
