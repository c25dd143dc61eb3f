"""The authors' Caffe weights: files read to the bit, and networks that compute what Caffe's layers do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_files import Blobs, CaffeNet, bn_inception, encode_caffemodel, se_resnet, senet154
from torch import Tensor

from setriton import create_model, load_weights
from setriton.models.weights.caffe import authors_labels
from setriton.models.weights.caffemodel import read_caffemodel
from setriton.models.weights.files import read_weights

NETWORKS = {
    "se_resnet50": se_resnet((3, 4, 6, 3), 64, 1),
    "se_resnext50_32x4d": se_resnet((3, 4, 6, 3), 128, 32),
    "senet154": senet154,
    "se_bn_inception": bn_inception,
}


def flat(blobs: Blobs) -> dict[str, Tensor]:
    return {f"{name}:{index}": blob for name, tensors in blobs.items() for index, blob in enumerate(tensors)}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_prototxt(name: str) -> None:
    run: Callable[[CaffeNet, Tensor], Tensor] = NETWORKS[name]
    net = CaffeNet()
    # Odd sizes, where Caffe's pooling rounds otherwise than padding does; Inception's maps fit together at even ones.
    size = (64, 96) if name == "se_bn_inception" else (69, 74)
    x = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = run(net, x)
    model = create_model(name, weights=flat(net.blobs), dtype=torch.float64).eval()
    with torch.no_grad():
        found = model(x)
    # Row i of the classifier is the authors' class number authors_labels()[i].
    want = want[:, authors_labels()]
    assert (found - want).abs().max() < 1e-10 * want.abs().max()
    assert model.preprocessing.channels == "bgr"


def test_cadenes_bn_inception_has_biases_that_are_folded() -> None:
    net, x = CaffeNet(conv_bias=True), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    want = bn_inception(net, x, se=False)
    state: dict[str, Tensor] = {}
    for layer, blobs in net.blobs.items():
        # As Cadene's converter names them; by then statistics are divided by their factor.
        name = (
            layer.replace("/bn/scale", "_bn")
            .replace("/bn", "_bn")
            .replace("/", "_")
            .replace("classifier", "last_linear")
        )
        name = name.replace("double3x3_reduce", "double_3x3_reduce")
        name = name.replace("double3x3a", "double_3x3_1").replace("double3x3b", "double_3x3_2")
        keys = ("running_mean", "running_var") if layer.endswith("/bn") else ("weight", "bias")
        values = [blob / blobs[2] for blob in blobs[:2]] if layer.endswith("/bn") else blobs
        state |= {f"{name}.{key}": value for key, value in zip(keys, values, strict=True)}
    model = create_model("bn_inception", dtype=torch.float64).eval()
    report = load_weights(model, state)
    assert report.notes == ["69 biases of convolutions are folded into the means of the BN behind them"]
    with torch.no_grad():
        assert (model(x) - want).abs().max() < 1e-10 * want.abs().max()
    assert (model.preprocessing.channels, model.preprocessing.mean[2] * 255) == ("bgr", 128)
    model.train()
    with torch.no_grad():
        in_training = model(x.repeat(2, 1, 1, 1))
    assert in_training.isfinite().all()


def test_the_order_of_classes_is_a_permutation_without_a_fixed_point() -> None:
    labels = authors_labels()
    assert sorted(labels) == list(range(1000))
    assert all(index != label for index, label in enumerate(labels))
    assert [labels[i] for i in (0, 1, 2, 254, 972)] == [448, 449, 441, 142, 358]


@pytest.fixture
def blobs() -> Blobs:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv1/7x7_s2": [(4, 3, 7, 7)], "conv1/7x7_s2/bn": [(4,), (4,), (1,)], "classifier": [(300, 4), (300,)]}
    return {name: [torch.randn(s, generator=generator) for s in sizes] for name, sizes in shapes.items()}


def test_a_caffemodel_is_read_to_the_bit(tmp_path: Path, blobs: Blobs) -> None:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(encode_caffemodel(blobs))
    read = read_caffemodel(path)
    assert read.keys() == flat(blobs).keys()
    for key, blob in flat(blobs).items():
        assert torch.equal(read[key], blob)
        assert read[key].shape == blob.shape


def test_a_caffemodel_of_the_first_version_is_read(tmp_path: Path, blobs: Blobs) -> None:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(encode_caffemodel(blobs, old=True))
    read = read_caffemodel(path)
    assert read["classifier:0"].shape == (1, 1, 300, 4)
    for key, blob in flat(blobs).items():
        assert torch.equal(read[key].reshape(blob.shape), blob)


@pytest.mark.parametrize("keep", [0, 1, 57, -1])
def test_a_caffemodel_cut_short_is_refused(tmp_path: Path, blobs: Blobs, keep: int) -> None:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(encode_caffemodel(blobs)[:keep])
    with pytest.raises(ValueError, match="caffemodel"):
        read_caffemodel(path)


def test_an_npz_of_blobs_is_read_and_objects_in_it_are_refused(tmp_path: Path, blobs: Blobs) -> None:
    path = tmp_path / "net.npz"
    np.savez(path, **{key: blob.numpy() for key, blob in flat(blobs).items()})
    read, header = read_weights(path)
    assert header is None
    assert all(torch.equal(read[key], blob) for key, blob in flat(blobs).items())
    np.savez(path, **{"conv1/7x7_s2:0": np.array([{"code": 1}], dtype=object)})
    with pytest.raises(ValueError, match=r"npz of numeric arrays"):
        read_weights(path)


def test_a_caffemodel_loads_as_its_blobs_do(tmp_path: Path) -> None:
    net = CaffeNet()
    se_resnet((3, 4, 6, 3), 64, 1)(net, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    path = tmp_path / "SE-ResNet-50.caffemodel"
    path.write_bytes(encode_caffemodel(net.blobs))
    of_file, of_blobs = create_model("se_resnet50", weights=path), create_model("se_resnet50", weights=flat(net.blobs))
    for key, value in of_blobs.state_dict().items():
        assert torch.equal(of_file.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"need layout='caffe'; the network has layout='torch'"):
        load_weights(create_model("se_resnet50", layout="torch"), path)


def test_the_labels_are_data_of_the_package() -> None:
    from importlib import resources

    text = resources.files("setriton.models.weights").joinpath("authors_labels.json").read_text()
    assert json.loads(text) == authors_labels()
