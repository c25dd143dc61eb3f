"""Weights rewritten: as setriton's file, back as timm's, with the same outputs and everything that belongs to them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from caffe_files import CaffeNet, bn_inception, encode_caffemodel, se_resnet
from graphs import randomize
from safetensors.torch import load_file
from torch import Tensor

from setriton import create_model
from setriton.cli import main
from setriton.models.saved import Header, load, save
from setriton.models.weights.convert import convert


def timm_file(name: str, path: Path, **options: Any) -> dict[str, Tensor]:
    model = timm.create_model(name, **options)
    randomize(model)
    torch.save(model.state_dict(), path)
    return model.state_dict()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("legacy_seresnet18", "se_resnet18"),
        ("legacy_seresnet50", "se_resnet50"),
        ("seresnet50", "se_resnet50"),
        ("seresnet18", "se_resnet18"),
        ("resnet34", "resnet34"),
        ("seresnext50_32x4d", "se_resnext50_32x4d"),
        ("legacy_senet154", "senet154"),
        ("inception_resnet_v2", "inception_resnet_v2"),
    ],
)
def test_there_and_back(tmp_path: Path, theirs: str, ours: str) -> None:
    state = timm_file(theirs, tmp_path / "theirs.pth", num_classes=10)
    name, _ = convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    assert name == ours
    name, _ = convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to="timm")
    assert name == theirs
    back = load_file(str(tmp_path / "back.safetensors"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_a_converted_caffemodel_says_all_that_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, x = CaffeNet(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    bn_inception(net, x)
    path, out = tmp_path / "SE-BN-Inception.caffemodel", tmp_path / "out.safetensors"
    path.write_bytes(encode_caffemodel(net.blobs))
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert "se_bn_inception" in capsys.readouterr().out
    _, header = load(out)
    assert header is not None
    assert (header.model, header.origin) == ("se_bn_inception", "the authors' Caffe models")
    assert (header.preprocessing.channels, header.preprocessing.std[0]) == ("bgr", 1 / 255)
    model = create_model("se_bn_inception", weights=out, dtype=torch.float64).eval()
    direct = create_model("se_bn_inception", weights=path, dtype=torch.float64).eval()
    assert model.preprocessing == header.preprocessing
    with torch.no_grad():
        assert torch.equal(model(x), direct(x))
    assert main(["convert", str(path), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(out), "--out", str(tmp_path / "b.safetensors"), "--to", "timm"]) == 2
    assert "timm has no network that computes what se_bn_inception does" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SE-BN-Inception.caffemodel", "out.safetensors"]


def test_what_was_trained_keeps_its_origin_and_a_missing_folder_is_told(tmp_path: Path) -> None:
    model = create_model("se_resnet20", num_classes=10)
    path = tmp_path / "a.safetensors"
    save(path, model.state_dict(), Header("se_resnet20", {"num_classes": 10}, model.preprocessing, "digits"))
    convert(path, tmp_path / "b.safetensors")
    _, header = load(tmp_path / "b.safetensors")
    assert header is not None
    assert (header.model, header.origin, header.preprocessing) == ("se_resnet20", "digits", model.preprocessing)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        convert(path, tmp_path / "missing" / "c.safetensors")


def test_caffe_weights_as_timms_legacy(tmp_path: Path) -> None:
    net = CaffeNet()
    se_resnet((3, 4, 6, 3), 64, 1)(net, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    (tmp_path / "net.caffemodel").write_bytes(encode_caffemodel(net.blobs))
    name, _ = convert(tmp_path / "net.caffemodel", tmp_path / "timm.safetensors", to="timm")
    theirs = timm.create_model(name).double().eval()
    theirs.load_state_dict(load_file(str(tmp_path / "timm.safetensors")))
    ours = create_model("se_resnet50", weights=tmp_path / "net.caffemodel", dtype=torch.float64).eval()
    x = torch.randn(1, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se_resnet50", {"layout": "torch", "gate": "tanh"}, "timm has no seresnet50 with gate='tanh'"),
        ("se_resnet50", {"layout": "torch", "rd_channels": 16}, "SE blocks 32 wide at 512 channels, not 16"),
        ("resnet50", {}, "timm has no network that computes what resnet50 in layout 'caffe' does"),
    ],
)
def test_what_timm_has_not_is_refused(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    model = create_model(name, **options)
    save(tmp_path / "a.safetensors", model.state_dict(), Header(name, options, model.preprocessing, "nothing"))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="timm")
    assert not (tmp_path / "b.safetensors").exists()
