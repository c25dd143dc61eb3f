"""The networks: `create_model` builds one by name, `list_models` says which there are."""

if __name__ != "setriton.models":
    raise ImportError("this folder is setriton.models; import it by that name")

from . import resnet, small_resnet
from .registry import create_model, list_models

__all__ = ["create_model", "list_models", "resnet", "small_resnet"]
