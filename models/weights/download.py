"""Weights that timm publishes, by the names of networks here: downloaded and checked once, cached from then on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from setriton.files import sha256

from .timm_names import TimmConfig

_log = logging.getLogger("setriton")

# Repositories of Hugging Face's: the tag that timm itself takes for the name. They need layout="torch".
REPOSITORIES = {
    "resnet18": "timm/resnet18.a1_in1k",
    "resnet34": "timm/resnet34.a1_in1k",
    "resnet50": "timm/resnet50.a1_in1k",
    "resnet101": "timm/resnet101.a1h_in1k",
    "resnet152": "timm/resnet152.a1h_in1k",
    "resnext50_32x4d": "timm/resnext50_32x4d.a1h_in1k",
    "resnext101_32x4d": "timm/resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k",
    "se_resnet50": "timm/seresnet50.a1_in1k",
    "se_resnext50_32x4d": "timm/seresnext50_32x4d.racm_in1k",
    "se_resnext101_32x4d": "timm/seresnext101_32x4d.gluon_in1k",
    "senet154": "timm/senet154.gluon_in1k",
    "inception_resnet_v2": "timm/inception_resnet_v2.tf_in1k",
}
# The authors' networks, ported by Cadene and kept by timm: layout="caffe". A file's name ends in its hash.
_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"
RELEASES = {
    "se_resnet18": f"{_RELEASES}/v0.1-weights/seresnet18-4bb0ce65.pth",
    "se_resnet34": f"{_RELEASES}/v0.1-weights/seresnet34-a4004e63.pth",
    "se_resnet50": f"{_RELEASES}/v0.1-cadene/se_resnet50-ce0d4300.pth",
    "se_resnet101": f"{_RELEASES}/v0.1-cadene/se_resnet101-7e38fcc6.pth",
    "se_resnet152": f"{_RELEASES}/v0.1-cadene/se_resnet152-d17c99b7.pth",
    "se_resnext50_32x4d": f"{_RELEASES}/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth",
    "se_resnext101_32x4d": f"{_RELEASES}/v0.1-weights/legacy_se_resnext101_32x4d-37725eac.pth",
    "senet154": f"{_RELEASES}/v0.1-weights/legacy_senet154-e9eb9fe6.pth",
}


def resolve(
    name: str, weights: str | Path | Mapping[str, Any], layout: str | None = None
) -> tuple[str | Path | Mapping[str, Any], TimmConfig | None]:
    """Where weights lie once what "timm" or a repository stands for is downloaded, and what is said of them there.

    Args:
        name: of the network.
        weights: "timm"; "timm/REPOSITORY" or "hf-hub:USER/REPOSITORY"; or what is returned as it is: a path, a state
            dict.
        layout: caffe for the authors' networks; None for what timm takes by default.

    Raises:
        ValueError: timm publishes no such weights.
        OSError: they cannot be downloaded; the message says what to download elsewhere. Or the hash is another.
    """
    if weights == "timm":
        if name in REPOSITORIES and layout != "caffe":
            return from_hub(REPOSITORIES[name])
        if name in RELEASES and layout != "torch":
            return _from_release(RELEASES[name]), None
        of_layout = f" in layout {layout!r}" if layout else ""
        known = ", ".join(sorted(REPOSITORIES.keys() | RELEASES.keys()))
        raise ValueError(f"weights must not be 'timm' for {name}{of_layout}: timm publishes weights of {known}")
    if isinstance(weights, str) and weights.startswith(("timm/", "hf-hub:")) and not Path(weights).exists():
        return from_hub(weights.removeprefix("hf-hub:"))
    return weights, None


def from_hub(repository: str) -> tuple[Path, TimmConfig]:
    """model.safetensors of a repository of Hugging Face's, and what its config.json says.

    Raises:
        ValueError: no repository can be called that.
        OSError: it cannot be downloaded, or came with another hash.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise OSError(f"downloading weights needs huggingface_hub: pip install 'setriton[hub]' ({error})") from None
    where = f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
    try:
        cached = hf_hub_download(repository, "model.safetensors", local_files_only=True)
        return Path(cached), _config(repository)
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ValueError(
            f"weights {repository!r} are neither a file nor a repository of Hugging Face's: {error}"
        ) from None
    try:
        path = Path(hf_hub_download(repository, "model.safetensors"))
        wanted = get_hf_file_metadata(hf_hub_url(repository, "model.safetensors")).etag
    except (
        Exception
    ) as error:  # httpx, requests and huggingface_hub each have errors of their own for a missing network
        raise OSError(_offline(where, error)) from None
    # Large files are stored by their SHA-256.
    if wanted is not None and len(wanted) == 64 and sha256(path) != wanted:
        path.unlink()
        raise OSError(f"{where} came with a hash other than {wanted}, and is removed: download it again")
    return path, _config(repository)


def _from_release(url: str) -> Path:
    file = url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.removesuffix(".pth").rsplit("-", 1)[1]
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=True)
        except RuntimeError as error:  # of another hash; what came is removed
            raise OSError(f"{url}: {error}") from None
        except OSError as error:
            raise OSError(_offline(url, error)) from None
    return path


def _offline(url: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot download {url} ({reason}): download it elsewhere, and give the file's path as weights"


def _config(repository: str) -> TimmConfig:
    """timm's configuration of a repository; an empty one where it has none."""
    from huggingface_hub import hf_hub_download

    try:
        config = TimmConfig.read(Path(hf_hub_download(repository, "config.json")))
    except Exception as error:  # of many types, as above
        _log.warning("%s does not say which network and images it is for: %r", repository, error)
        return TimmConfig()
    if config.preprocessing is None:
        _log.warning("%s does not say which images it wants, ImageNet's usual ones are taken", repository)
    return config
