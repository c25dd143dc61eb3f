"""Tensors that are no weights: refused with the reason, before any of a network's own is touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from setriton import create_model, load_weights
from setriton.models.saved import load
from setriton.models.weights.convert import convert

State = dict[str, Tensor]
# The last of a block: most of the state dict is before it.
KEY = "layer3.2.conv2.weight"


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return change


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda t: t.to_sparse(), "is .*sparse"),
    "meta": (lambda t: t.to("meta"), "without values"),
    "quantised": (quantised, "quantised"),
    "complex": (lambda t: t.to(torch.complex64), "is of torch.complex64"),
    "integer": (lambda t: t.to(torch.int32), "is of torch.int32"),
    "bool": (lambda t: t > 0, "is of torch.bool"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "is of torch.float8_e5m2"),
    "NaN": (with_value(float("nan")), "must be finite: .* has NaN"),
    "infinite": (with_value(float("inf")), "must be finite: .* has infinite values"),
    "too large": (lambda t: t.double() + 1e200, "must fit torch.float32"),
    "no input channels": (lambda t: t[:, :0], "is empty"),
    "a number": (lambda t: t.sum(), "is a number, in the network 64x64x3x3"),
}


@pytest.mark.parametrize("zipped", [None, True, False])
@pytest.mark.parametrize("case", BAD)
def test_all_or_none(case: str, zipped: bool | None, tmp_path: Path) -> None:
    change, message = BAD[case]
    model: Any = create_model("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights: Any = {key: torch.ones_like(value) for key, value in before.items()}
    weights[KEY] = change(weights[KEY])
    if zipped is not None:
        torch.save(weights, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        weights = tmp_path / "a.pth"
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tensors_that_are_made_of_others(tmp_path: Path) -> None:
    state = create_model("resnet20").state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ones(64, 64, 3, 3)
    with pytest.raises(ValueError, match=f"{KEY} is a FakeTensor"):
        load_weights(create_model("resnet20"), state | {KEY: fake})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": torch.ones(())}, r"fc\.weight has 0 axes"),
        ({"fc.weight": torch.ones(1001, 2048), "fc.bias": None}, r"the file has no fc\.bias"),
        ({"conv1.weight": torch.ones(64, 0, 7, 7)}, "conv1.weight is empty"),
        ({"last_linear.weight": torch.ones(1000, 2048), "fc.bias": None}, "resnet50"),
        ({"bn1.running_var": -torch.ones(64)}, "variances of at least 0: bn1.running_var has one of -1"),
    ],
)
def test_shapes_and_signs(changes: dict[str, Any], message: str) -> None:
    model = create_model("resnet50", layout="torch")
    state = {key: value for key, value in (model.state_dict() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_weights(model, state)


def test_a_network_on_meta_does_not_share_the_callers_memory() -> None:
    state = create_model("resnet20").state_dict()
    model = create_model("resnet20", device="meta", weights=state)
    assert model.state_dict()["conv1.weight"].data_ptr() != state["conv1.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in create_model("resnet20").state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    _, report = convert(tmp_path / "a.pth", tmp_path / "a.safetensors", "resnet20")
    count = sum(value.is_floating_point() for value in state.values())
    assert f"{count} tensors from {str(dtype).removeprefix('torch.')} to float32" in str(report)
    assert load(tmp_path / "a.safetensors")[0]["conv1.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"out must end in \.safetensors"):
        convert(tmp_path / "a.pth", tmp_path / "a.pth", "resnet20")


def test_what_keys_cannot_tell_is_said() -> None:
    state = timm.create_model("resnetaa50").state_dict()
    report = load_weights(create_model("resnet50", layout="torch"), state)
    assert "keys cannot tell" in str(report)
    assert "resnetaa50" in str(report)
    theirs = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in state.items()}
    theirs = {key.replace("fc.", "head.fc.", 1) if key.startswith("fc.") else key: v for key, v in theirs.items()}
    report = load_weights(create_model("resnet50", layout="torch"), theirs)
    assert 'style="caffe"' in str(report)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, None),
        ({"architecture": "tv_resnet50"}, None),
        ({"architecture": "setriton_resnet50"}, None),
        ({"architecture": "resnet50", "model_args": {"num_classes": 1000}}, None),
        ({"architecture": "resnetaa50"}, "by their config.json they are of resnetaa50"),
        ({"architecture": "resnetblur50"}, "of resnetblur50"),
        ({"architecture": "resnet50", "model_args": {"act_layer": "silu"}}, "resnet50 with act_layer='silu'"),
    ],
)
def test_a_repositorys_config_is_compared(
    config: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(timm.create_model("resnet50").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, **_: str(tmp_path / file))
    for weights in ("timm/resnetaa50.a1h_in1k", tmp_path / "model.safetensors"):
        if message is None:
            create_model("resnet50", weights=weights, device="meta")
            continue
        with pytest.raises(ValueError, match=message):
            create_model("resnet50", weights=weights, device="meta")
