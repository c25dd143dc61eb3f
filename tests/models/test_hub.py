"""Networks in other people's registries, and weights that are downloaded: checked, cached, refused when offline."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from setriton import create_model
from setriton.models.hub import HubNetwork
from setriton.models.preprocessing import Preprocessing
from setriton.models.timm_registry import register_with_timm
from setriton.models.weights import download


def test_a_network_goes_to_the_hub_and_back(tmp_path: Path) -> None:
    network = create_model("se_resnet20", num_classes=5, rd_ratio=1 / 8)
    network.preprocessing = Preprocessing(24, 32, (0.1,) * 3, (0.2,) * 3)
    HubNetwork(network).save_pretrained(tmp_path)
    x = torch.randn(1, 3, 24, 24)
    loaded = HubNetwork.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(x), network.eval()(x))
    assert loaded.network.config == network.config
    assert loaded.network.preprocessing == network.preprocessing
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "se_resnet20"
    again = create_model("se_resnet20", weights=tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), network(x))
    with pytest.raises(TypeError, match="network must be one that create_model built; got Linear"):
        HubNetwork(torch.nn.Linear(1, 1))
    save_file({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say which it holds"):
        HubNetwork.from_pretrained(tmp_path)


def test_timm_knows_all_networks() -> None:
    names = register_with_timm()
    assert register_with_timm() == names
    assert set(names) <= set(timm.list_models("setriton_*"))
    model = timm.create_model("setriton_se_resnet20", num_classes=5, drop_rate=0.1)
    assert model.config == {"name": "se_resnet20", "num_classes": 5, "drop_rate": 0.1}
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    maps = timm.create_model("setriton_se_resnet20", features_only=True, out_indices=(1, 3))(torch.randn(2, 3, 32, 32))
    assert [m.shape[1] for m in maps] == [16, 64]


class Hub:
    """Hugging Face's hub, as huggingface_hub's functions show it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, etag: str | None = None) -> None:
        self.downloaded: list[str] = []
        self.folder, self.etag, self.online = folder, etag, True
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.metadata)

    def download(self, repository: str, file: str, local_files_only: bool = False) -> str:
        path = self.folder / file
        if file not in self.downloaded:
            if local_files_only:
                raise LocalEntryNotFoundError(f"{file} is not in the cache")
            if not self.online:
                raise ConnectionError("no network")
            self.downloaded.append(file)
        return str(path)

    def metadata(self, url: str) -> Any:
        digest = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()
        return SimpleNamespace(etag=self.etag or digest)


def published(folder: Path) -> dict[str, Any]:
    state = timm.create_model("seresnet18", num_classes=1000).state_dict()
    save_file(state, str(folder / "model.safetensors"))
    config = {
        "input_size": [3, 160, 160],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    return state


def test_weights_come_from_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, hub = published(tmp_path), Hub(monkeypatch, tmp_path)
    model = create_model("se_resnet18", weights="hf-hub:someone/seresnet18")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.preprocessing == Preprocessing(160, 168, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic")
    assert hub.downloaded == ["model.safetensors", "config.json"]
    hub.online = False
    create_model("se_resnet18", weights="timm/seresnet18")


def test_weights_of_another_hash_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path)
    Hub(monkeypatch, tmp_path, etag="0" * 64)
    with pytest.raises(OSError, match=r"came with a hash other than 0{64}, and is removed"):
        create_model("se_resnet18", weights="timm/seresnet18")
    assert not (tmp_path / "model.safetensors").exists()


def test_offline_it_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, tmp_path).online = False
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("se_resnet50", {}, r"huggingface\.co/timm/seresnet50\.a1_in1k/resolve/main/model\.safetensors"),
        ("se_resnet152", {}, r"github\.com/.*/se_resnet152-d17c99b7\.pth"),
        ("senet154", {"layout": "caffe"}, r"github\.com/.*/legacy_senet154-e9eb9fe6\.pth"),
    )
    for name, options, file in cases:
        with pytest.raises(OSError, match=rf"cannot download https://{file} .*give the file's path as weights"):
            create_model(name, weights="timm", **options)


def test_the_authors_networks_come_from_timms_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("legacy_seresnet18").state_dict()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[tuple[str, str]] = []

    def fetch(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[1], hash_prefix))
        torch.save(state, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        model = create_model("se_resnet18", weights="timm")
        assert model.config == {"name": "se_resnet18", "bn_act": "relu"}
    assert asked == [("seresnet18-4bb0ce65.pth", "4bb0ce65")]


def test_names_are_those_of_timms_own_table() -> None:
    for name, repository in download.REPOSITORIES.items():
        config = timm.get_pretrained_cfg(repository.removeprefix("timm/"))
        assert config.hf_hub_id == repository, name
        assert config.num_classes == 1000
    for url in download.RELEASES.values():
        file = url.rsplit("/", 1)[1]
        configs = (timm.get_pretrained_cfg(m) for m in timm.list_models("legacy_se*"))
        assert file in {(config.url or "").rsplit("/", 1)[-1] for config in configs}
