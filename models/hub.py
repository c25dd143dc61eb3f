"""Networks in Hugging Face's hub: saved, pushed and loaded with the methods of its mixin."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .base import Network
from .registry import create_model
from .saved import Header, save
from .weights.download import from_hub
from .weights.load import open_weights

FILE = "model.safetensors"


class HubNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="setriton",
    paper_url="https://arxiv.org/abs/1709.01507",
    pipeline_tag="image-classification",
    tags=["squeeze-and-excitation"],
):
    """A network of `create_model` with `save_pretrained`, `push_to_hub` and `from_pretrained` (a folder or repository).

    The file says which network it holds, its options and its preprocessing: ``create_model(name, weights=file)`` and
    ``create_model(name, weights="hf-hub:USER/REPOSITORY")`` read it too.

    Args:
        network: built by `create_model`.

    Raises:
        TypeError: it was not.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        if not isinstance(network, Network) or not network.config:
            raise TypeError(f"network must be one that create_model built; got {type(network).__name__}")
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        header = Header.of(self.network, f"setriton {self.network.config['name']}")
        save(save_directory / FILE, self.network.state_dict(), header)
        # For people and for the hub, which counts its downloads; what is loaded is the other file's header.
        config = {key: value for key, value in asdict(header).items() if key != "origin"}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        """The network of a folder or repository, for evaluation."""
        folder = Path(model_id)
        path = folder / FILE if folder.is_dir() else from_hub(model_id)[0]
        name = open_weights(path).model
        if name is None:
            raise ValueError(f"{model_id} must hold a network that setriton saved; {path} does not say which it holds")
        kept = (
            "revision",
            "cache_dir",
            "force_download",
            "local_files_only",
            "token",
            "config",
            "strict",
            "map_location",
        )
        network = create_model(name, weights=path, **{k: v for k, v in options.items() if k not in kept})
        return cls(network).eval()
