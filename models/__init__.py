"""The networks: `create_model` builds one by name, `list_models` says which there are."""

if __name__ != "setriton.models":
    raise ImportError("this folder is setriton.models; import it by that name")

from . import bn_inception, inception_resnet_v2, mobilenet, preact_resnet, resnet, shufflenet, small_resnet, vgg
from .registry import create_model, list_models
from .weights import load_weights

__all__ = [
    "bn_inception",
    "create_model",
    "inception_resnet_v2",
    "list_models",
    "load_weights",
    "mobilenet",
    "preact_resnet",
    "resnet",
    "shufflenet",
    "small_resnet",
    "vgg",
]
