"""Published weights: the same logits as where they come from, and a refusal wherever they would be others."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from same_step import well_conditioned
from torch import Tensor, nn

from setriton import create_model, load_weights
from setriton.models.preprocessing import Preprocessing
from setriton.models.saved import Header, save

State = dict[str, Tensor]


def images(size: int = 75) -> Tensor:
    """An odd size: where the stem's two ways to pool differ."""
    return torch.randn(2, 3, size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


TORCH = {"layout": "torch"}
R4 = functools.partial(timm.layers.SEModule, rd_ratio=0.25)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, **options)


# Ours, theirs, and the options that create_model must find out.
SAME_LOGITS: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "torchvision resnet18": ("resnet18", torchvision.models.resnet18, TORCH),
    "torchvision resnext50": ("resnext50_32x4d", torchvision.models.resnext50_32x4d, TORCH),
    **{f"timm {n}": (n, of_timm(n), TORCH) for n in ("resnet34", "resnet50", "resnet101", "resnet152")},
    "timm resnext101": ("resnext101_32x4d", of_timm("resnext101_32x4d"), TORCH),
    **{f"timm seresnet{n}": (f"se_resnet{n}", of_timm(f"seresnet{n}"), TORCH) for n in (50, 101, 152)},
    **{f"timm seresnet{n}": (f"se_resnet{n}", of_timm(f"seresnet{n}"), TORCH | {"rd_divisor": 8}) for n in (18, 34)},
    "timm seresnext50": (
        "se_resnext50_32x4d",
        of_timm("seresnext50_32x4d", num_classes=10),
        TORCH | {"num_classes": 10},
    ),
    "timm seresnext101": ("se_resnext101_32x4d", of_timm("seresnext101_32x4d"), TORCH),
    "timm senet154": ("senet154", of_timm("senet154"), TORCH),
    "timm inception_resnet_v2": ("inception_resnet_v2", of_timm("inception_resnet_v2"), {}),
    "torchvision vgg16_bn": ("vgg16_bn", torchvision.models.vgg16_bn, {}),
    "timm vgg16_bn": ("vgg16_bn", of_timm("vgg16_bn"), {}),
    "timm r=4": ("se_resnet50", of_timm("seresnet50", block_args={"attn_layer": R4}), TORCH | {"rd_ratio": 0.25}),
    **{f"legacy {n}": (f"se_resnet{n}", of_timm(f"legacy_seresnet{n}"), {"bn_act": "relu"}) for n in (18, 34)},
    **{f"legacy {n}": (f"se_resnet{n}", of_timm(f"legacy_seresnet{n}"), {}) for n in (50, 101, 152)},
    "legacy seresnext50": ("se_resnext50_32x4d", of_timm("legacy_seresnext50_32x4d"), {}),
    "legacy seresnext101": ("se_resnext101_32x4d", of_timm("legacy_seresnext101_32x4d"), {}),
    "legacy senet154": ("senet154", of_timm("legacy_senet154"), {}),
}


def assert_same_logits(model: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        found, want = model.double().eval()(x), theirs(x)
    assert (found - want).abs().max() < 1e-10 * want.abs().max()


@pytest.mark.parametrize("case", SAME_LOGITS)
def test_logits_are_those_of_where_the_weights_come_from(case: str) -> None:
    name, make, options = SAME_LOGITS[case]
    theirs = well_conditioned(make())
    model = create_model(name, weights=theirs.state_dict(), dtype=torch.float64)
    assert model.config == {"name": name, **options}
    assert_same_logits(model, theirs, images())


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


class LinearSE(nn.Module):
    """SE of two linear layers, as moskomule and NVIDIA write it."""

    def __init__(self, channels: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.second(torch.relu(self.first(x.mean((2, 3))))))[:, :, None, None]


def with_linear_se(network: Callable[[], nn.Module], hidden: Callable[[int], int], bias: bool) -> nn.Module:
    """torchvision's network with an SE behind each block's last BN."""
    model = network()
    for module in list(model.modules()):
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            channels = module.bn3.num_features
            module.bn3 = nn.Sequential(module.bn3, LinearSE(channels, hidden(channels), bias))
    return well_conditioned(model)


def moskomule() -> tuple[nn.Module, State]:
    model = with_linear_se(torchvision.models.resnet50, lambda channels: channels // 16, bias=False)
    names = ((".bn3.0.", ".bn3."), (".bn3.1.first.", ".se.fc.0."), (".bn3.1.second.", ".se.fc.2."))
    return model, renamed(model.state_dict(), *names)


def nvidia(number_from: int, prefix: str = "") -> tuple[nn.Module, State]:
    model = with_linear_se(torchvision.models.resnext50_32x4d, lambda channels: 16, bias=True)
    names = ((".bn3.0.", ".bn3."), (".bn3.1.first.", ".squeeze.squeeze."), (".bn3.1.second.", ".squeeze.expand."))
    state = renamed(model.state_dict(), *names)
    if number_from == 0:
        state = renamed(state, *((f"layer{i}.", f"layers.{i - 1}.") for i in (1, 2, 3, 4)))
    return model, {prefix + key: value for key, value in state.items()}


def mmpretrain() -> tuple[nn.Module, State]:
    model = well_conditioned(timm.create_model("seresnet50"))
    names = ((".se.fc1.", ".se_layer.conv1.conv."), (".se.fc2.", ".se_layer.conv2.conv."), ("fc.", "head.fc."))
    state = renamed(model.state_dict(), *names)
    return model, {key if key.startswith("head.") else f"backbone.{key}": value for key, value in state.items()}


OTHERS: dict[str, tuple[str, Callable[[], tuple[nn.Module, State]], dict[str, Any]]] = {
    "moskomule": ("se_resnet50", moskomule, {"layout": "torch"}),
    "nvidia": ("se_resnext50_32x4d", lambda: nvidia(0), {"layout": "torch", "rd_channels": 16}),
    "nvidia, NGC": ("se_resnext50_32x4d", lambda: nvidia(1, "module."), {"layout": "torch", "rd_channels": 16}),
    "mmpretrain": ("se_resnet50", mmpretrain, {"layout": "torch"}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_logits_are_those_of_other_ports(case: str) -> None:
    name, make, options = OTHERS[case]
    theirs, state = make()
    model = create_model(name, weights={"state_dict": state, "epoch": 90}, dtype=torch.float64)
    assert model.config == {"name": name, **options}
    assert_same_logits(model, theirs, images())


@pytest.mark.parametrize(
    ("name", "options", "make", "message"),
    [
        (
            "se_resnext50_32x4d",  # the stride is where it should be in both layouts: the stem pool alone differs
            {"layout": "torch"},
            lambda: timm.create_model("legacy_seresnext50_32x4d").state_dict(),
            r"need layout='caffe'; the network has layout='torch'.*create_model\('se_resnext50_32x4d', layout=",
        ),
        (
            "se_resnet50",
            {"layout": "caffe"},
            lambda: timm.create_model("seresnet50").state_dict(),
            r"need layout='torch'; the network has layout='caffe'",
        ),
        (
            "se_resnext50_32x4d",
            {"layout": "torch"},
            lambda: nvidia(0)[1],
            r"se\.fc1\.\w+ is 16.*in the network.*create_model\('se_resnext50_32x4d', rd_channels=16\)",
        ),
        (
            "se_resnet18",
            {"layout": "torch"},
            lambda: timm.create_model("seresnet18").state_dict(),
            r"create_model\('se_resnet18', rd_divisor=8\)",
        ),
        (
            "se_resnet50",
            {"drop_rate": 0.2},
            lambda: timm.create_model("legacy_seresnet50").state_dict(),
            r"need drop_rate=0\.0; the network has drop_rate=0\.2",
        ),
        (
            "senet154",
            {"drop_rate": 0.0},
            lambda: timm.create_model("legacy_senet154").state_dict(),
            r"need drop_rate=0\.2; the network has drop_rate=0\.0",
        ),
        (
            "se_resnet18",
            {},
            lambda: timm.create_model("legacy_seresnet18").state_dict(),
            r"need bn_act='relu'; the network has bn_act='identity'",
        ),
        (
            "se_resnet50",
            {},
            lambda: timm.create_model("legacy_seresnet101").state_dict(),
            r"not those of se_resnet50: the file has layer3\.10\.",
        ),
        (
            "resnet50",
            {"layout": "torch"},
            lambda: timm.create_model("seresnet50").state_dict(),
            r"not those of resnet50: the file has layer1\.0\.se\.fc1\.bias",
        ),
        (
            "se_resnet50",
            {"layout": "torch"},
            lambda: timm.create_model("resnet50").state_dict(),
            r"not those of se_resnet50: the file has no layer1\.0\.se\.fc1",
        ),
        ("se_resnet50", {}, lambda: {"weight": torch.zeros(1)}, r"weights of a known kind .* got keys such as weight"),
        ("se_resnet50", {}, lambda: {"epoch": 3}, "it has no tensors, only epoch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_combination_is_refused_and_changes_nothing(
    name: str, options: dict[str, Any], make: Callable[[], State], message: str
) -> None:
    model = create_model(name, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, make())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_difference_can_be_allowed() -> None:
    model = create_model("senet154", drop_rate=0.5, device="meta")
    load_weights(model, timm.create_model("legacy_senet154").state_dict(), allow=["drop_rate"])
    assert model.dropout.p == 0.5


def test_only_the_networks_default_drops_out() -> None:
    assert {name: create_model(name, device="meta").drop_rate for name in ("senet154", "se_resnet50")} == {
        "senet154": 0.2,
        "se_resnet50": 0.0,
    }


def test_another_classifier_and_other_channels() -> None:
    theirs: Any = well_conditioned(timm.create_model("seresnet18"))
    options: dict[str, Any] = {"layout": "torch", "rd_divisor": 8, "num_classes": 7, "in_chans": 1}
    model: Any = create_model("se_resnet18", dtype=torch.float64, **options)
    kept = model.fc.weight.clone()
    report = load_weights(model, theirs.state_dict(), "timm")
    assert "fc: as it was; the weights have 1,000 classes, the network 7" in str(report)
    assert "conv1.weight: summed over its 3 input channels" in str(report)
    assert torch.equal(model.fc.weight, kept)
    grey = torch.randn(2, 1, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        features = model.eval().forward_features(grey)
        torch.testing.assert_close(features, theirs.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-9, atol=1e-9)
    wide = create_model("se_resnet18", weights=theirs.state_dict(), in_chans=6, dtype=torch.float64).eval()
    with torch.no_grad():
        features = wide.forward_features(grey.expand(-1, 6, -1, -1))
        torch.testing.assert_close(features, theirs.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-9, atol=1e-9)
    features = create_model("se_resnet18", weights=theirs.state_dict(), num_classes=0)(torch.ones(2, 3, 32, 32))
    assert features.shape == (2, 512)


def test_files_are_read_and_give_what_the_state_dict_gives(tmp_path: Path) -> None:
    state = well_conditioned(timm.create_model("legacy_seresnet18")).float().state_dict()
    want = create_model("se_resnet18", weights=state).state_dict()
    save_file(state, str(tmp_path / "a.safetensors"))
    torch.save(state, tmp_path / "b.pth")
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "c.pth.tar")
    without_counts = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(without_counts, tmp_path / "d.pkl")
    for path in sorted(tmp_path.iterdir()):
        found = create_model("se_resnet18", weights=path).state_dict()
        assert all(torch.equal(found[key], want[key]) for key in want if "num_batches" not in key)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = create_model("se_resnet18")
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Code()}, path)
    with pytest.raises(ValueError, match=r"is refused: it holds more than tensors, and such a pickle can run any code"):
        load_weights(model, path)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_weights(model, path)
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: load_weights(nn.Linear(1, 1), {}), TypeError, "that create_model built; got Linear"),
        (lambda p: load_weights(create_model("resnet20"), 3), TypeError, "path or a state dict; got int"),
        (lambda p: load_weights(create_model("resnet20"), p / "no.pth"), FileNotFoundError, "no file .*no.pth"),
        (lambda p: load_weights(create_model("resnet20"), {"a": torch.ones(1)}, "keras"), ValueError, "auto or one of"),
        (lambda p: create_model("resnet50", weights=p / "cut.pth"), ValueError, "cut.pth"),
        (
            lambda p: create_model("resnet50", weights=p / "text.pth"),
            ValueError,
            r"text\.pth cannot be read as a PyTorch checkpoint",
        ),
        (lambda p: create_model("resnet50", weights=p / "cut.safetensors"), ValueError, "not a safetensors file"),
        (lambda p: create_model("se_resnet20", weights="timm"), ValueError, "timm publishes weights of"),
        (lambda p: create_model("se_resnet152", weights="timm", layout="torch"), ValueError, "in layout 'torch'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, call: Any, error: type[Exception], message: str) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "text.pth").write_text("epoch 1: loss 2\n")
    (tmp_path / "cut.safetensors").write_bytes(b"\x01")
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_cadenes_inception_resnet_v2_has_a_class_for_the_background() -> None:
    theirs = well_conditioned(timm.create_model("inception_resnet_v2", num_classes=1001))
    state = renamed(theirs.state_dict(), ("classif.", "last_linear."))
    model = create_model("inception_resnet_v2", dtype=torch.float64)
    report = load_weights(model, state)
    assert report.notes == ["fc: class 0 of 1,001, the background, is left out"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), theirs(images())[:, 1:], rtol=1e-9, atol=1e-9)
    assert (model.preprocessing.image_size, model.preprocessing.mean) == (299, (0.5, 0.5, 0.5))
    whole = create_model("inception_resnet_v2", num_classes=1001, weights=state)
    assert whole.fc.out_features == 1001


@pytest.mark.parametrize(("name", "source"), [("se_resnet20", "setriton"), ("se_bn_inception", "auto")])
def test_a_state_dict_of_ours(name: str, source: str) -> None:
    theirs, ours = (create_model(name, num_classes=10) for _ in range(2))
    load_weights(ours, theirs.state_dict(), source)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_dilation_is_no_other_network() -> None:
    weights = timm.create_model("seresnet50").state_dict()
    model = create_model("se_resnet50", weights=weights, output_stride=8)
    assert model.feature_info[-1]["reduction"] == 8


def test_a_new_classifier_is_part_of_what_is_saved(tmp_path: Path) -> None:
    model = create_model("se_resnet20")
    model.reset_classifier(7)
    path = tmp_path / "a.safetensors"
    options = {key: value for key, value in model.config.items() if key != "name"}
    save(path, model.state_dict(), Header("se_resnet20", options, model.preprocessing, "nowhere"))
    assert create_model("se_resnet20", weights=path).fc.out_features == 7
    with pytest.raises(ValueError, match="weights must be those of se_resnet32; these are of se_resnet20"):
        create_model("se_resnet32", weights=path)
    with pytest.raises(ValueError, match=r"need gate='sigmoid'; the network has gate='tanh'"):
        create_model("se_resnet20", weights=path, gate="tanh")


def test_weights_bring_their_preprocessing() -> None:
    assert create_model("se_resnet18").preprocessing == Preprocessing()
    legacy = timm.create_model("legacy_seresnet18").state_dict()
    model = create_model("se_resnet18", weights=legacy, in_chans=1)
    assert model.preprocessing.mean == pytest.approx((0.449,))
