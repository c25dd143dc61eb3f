"""What a file says of its weights, or only their form does: followed, told, or refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from caffe_files import CaffeNet, bn_inception, encode_caffemodel
from safetensors.torch import load_file, save_file
from torch import Tensor

from setriton import create_model, load_weights
from setriton.models.saved import Header, save
from setriton.models.weights.convert import convert

State = dict[str, Tensor]


def write(path: Path, name: str, **options: Any) -> Any:
    """A network in a file of setriton."""
    model = create_model(name, **options)
    save(path, model.state_dict(), Header.of(model, "digits"))
    return model


def test_options_of_a_file_are_followed_and_none_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    # One hidden width for all, which rd_channels would give as well; and TensorFlow's number of classes.
    options = {"rd_ratio": 1 / 8, "num_classes": 1001, "global_pool": "max", "output_stride": 16, "layout": "torch"}
    write(path, "se_resnet50", **options)
    assert create_model("se_resnet50", weights=path).config == {"name": "se_resnet50"} | options


def test_what_changes_the_outputs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.safetensors"
    write(path, "resnet50", global_pool="max", output_stride=8)
    report = str(load_weights(create_model("resnet50"), path))
    assert "global_pool: the network has 'avg', the weights were saved with 'max'" in report
    assert "output_stride: the network has 32, the weights were saved with 8" in report
    with caplog.at_level(logging.INFO, "setriton"):
        create_model("resnet50", weights=path)
        assert caplog.records[-1].levelname == "INFO"
        create_model("resnet50", weights=path, num_classes=10)
        assert caplog.records[-1].levelname == "WARNING"
        assert "fc: as it was; the weights have 1,000 classes, the network 10" in caplog.text


def test_classes_of_tensorflow_are_those_of_networks_that_have_1000() -> None:
    state = create_model("se_resnet20", num_classes=1001).state_dict()
    assert create_model("se_resnet20", weights=state).num_classes == 1001
    state = timm.create_model("resnet18", num_classes=1001).state_dict()
    assert create_model("resnet18", weights=state).num_classes == 1000


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_configuration_beside_a_file_is_read_by_all(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / name, timm.create_model("resnet18").state_dict()
    save_file(state, path) if name.endswith("tensors") else torch.save(state, path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetblur18"}))
    for use in (
        lambda: load_weights(create_model("resnet18", layout="torch"), path),
        lambda: create_model("resnet18", weights=path),
        lambda: convert(path, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"by their config\.json they are of resnetblur18"):
            use()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "global_pool": "max"}))
    report = str(load_weights(create_model("resnet18", layout="torch"), path))
    assert "keys cannot tell" not in report
    assert "the weights were saved with 'max'" in report
    # Of another file in the folder it says nothing.
    path.rename(tmp_path / "other.pth" if name.endswith("bin") else tmp_path / "other.safetensors")
    other = next(tmp_path.glob("other.*"))
    assert "keys cannot tell" in str(load_weights(create_model("resnet18", layout="torch"), other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "torch", "bn_act": "relu", "rd_divisor": 8}, "in layout 'torch' with bn_act='relu'"),
        ({"bn_act": "relu", "output_stride": 16}, "no legacy_seresnet18 with output_stride=16"),
    ],
)
def test_timm_gets_no_weights_that_it_would_compute_otherwise(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.safetensors", "se_resnet18", **options)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="timm")


def test_timm_is_told_what_its_state_dict_does_not_say(tmp_path: Path) -> None:
    options = {"global_pool": "avgmax", "output_stride": 16}
    ours = write(tmp_path / "a.safetensors", "se_resnet50", layout="torch", **options).double().eval()
    name, report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="timm")
    assert f"timm.create_model({name!r}, global_pool='avgmax', output_stride=16)" in str(report)
    theirs = timm.create_model(name, **options).double().eval()
    theirs.load_state_dict(load_file(tmp_path / "b.safetensors"))
    x = torch.randn(1, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-10, atol=1e-10)
    model = create_model("resnet18", layout="torch")
    model.preprocessing = type(model.preprocessing)(channels="bgr", mean=(0.4,) * 3, std=(1 / 255,) * 3)
    save(tmp_path / "a.safetensors", model.state_dict(), Header.of(model, "digits"))
    _, report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="timm")
    assert "timm must be told of its images" in str(report)
    assert "channels='bgr'" in str(report)


def with_shape(state: State, key: str, *shape: int) -> State:
    return state | {key: state[key].reshape(shape)}


def test_shapes_that_mean_the_same_and_others() -> None:
    model = create_model("se_resnet20")
    state = model.state_dict()
    hidden = "layer1.0.se.fc1.weight"
    for key, shape in (("fc.weight", (10, 64, 1, 1)), ("fc.bias", (1, 1, 1, 10)), (hidden, state[hidden].shape[:2])):
        load_weights(create_model("se_resnet20"), with_shape(state, key, *shape))
    # Mobile networks' depthwise convolutions have one input channel: transposed they have as many values.
    mobile = create_model("se_mobilenet").state_dict()
    depthwise = next(key for key, value in mobile.items() if value.dim() == 4 and value.shape[1:] == (1, 3, 3))
    channels = mobile[depthwise].shape[0]
    with pytest.raises(ValueError, match=f"{depthwise} is 1x{channels}x3x3"):
        load_weights(create_model("se_mobilenet"), with_shape(mobile, depthwise, 1, channels, 3, 3), source="setriton")


@pytest.mark.parametrize("count", [-1.0, 1.5, float("nan"), float("inf")])
def test_counts_of_batches_are_whole(count: float) -> None:
    state = create_model("resnet20").state_dict()
    key = "bn1.num_batches_tracked"
    with pytest.raises(ValueError, match=f"whole counts of batches: {key}"):
        load_weights(create_model("resnet20"), state | {key: torch.tensor(count)})


def test_a_small_negative_variance_is_seen_before_it_becomes_0() -> None:
    state = create_model("resnet20").state_dict()
    small = torch.full_like(state["bn1.running_var"], -1e-60, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bn1\.running_var has one of -1e-60"):
        load_weights(create_model("resnet20"), state | {"bn1.running_var": small})


def test_a_networks_own_tensors_may_change_places() -> None:
    model = create_model("resnet20")
    state = model.state_dict()
    first, second = "layer1.0.conv1.weight", "layer1.0.conv2.weight"
    want = {first: state[second].clone(), second: state[first].clone()}
    load_weights(model, state | {first: state[second], second: state[first]})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in want.items())


def test_a_network_on_meta_has_no_classifier_to_keep() -> None:
    state = create_model("resnet20").state_dict()
    with pytest.raises(ValueError, match=r"its fc\.weight is on the meta device"):
        create_model("resnet20", weights=state, num_classes=3, device="meta")


def test_what_does_not_fit_is_refused_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    state = create_model("resnet20").state_dict()
    devices: list[str] = []
    builder = type(create_model("resnet32"))
    build = builder.__init__

    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        devices.append(torch.get_default_device().type)
        build(self, *arguments, **options)

    monkeypatch.setattr(builder, "__init__", watched)
    with pytest.raises(ValueError, match="not those of resnet32"):
        create_model("resnet32", weights=state)
    assert devices == ["meta"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [("inception_9z", "fit no network|inception_9z"), ("inception_3a_1x1_down", "inception_3a")],
)
def test_layers_that_no_network_has(layer: str, message: str, tmp_path: Path) -> None:
    net = CaffeNet()
    bn_inception(net, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    net.blobs[f"{layer}/1x1" if layer.endswith("z") else layer] = next(iter(net.blobs.values()))
    (tmp_path / "a.caffemodel").write_bytes(encode_caffemodel(net.blobs))
    with pytest.raises(ValueError, match=message):
        create_model("se_bn_inception", weights=tmp_path / "a.caffemodel")


@pytest.mark.parametrize("position", [2, 6, 99])
def test_positions_of_vgg_that_have_no_weights(position: int) -> None:
    state = timm.create_model("vgg16_bn", num_classes=10).state_dict()
    with pytest.raises(ValueError, match=rf"the file has features\.{position}\.weight"):
        create_model("vgg16_bn", weights=state | {f"features.{position}.weight": torch.ones(64)})


@pytest.mark.parametrize(
    "options", [{"se_bias": "False"}, {"fused": "no"}, {"fused": None}, {"zero_init_last": 3}, {"fused": 1}]
)
def test_options_that_are_true_or_false(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be True or False; got"):
        create_model("se_resnet50", device="meta", **options)
