"""The libraries that define networks: the names each one knows, and how it builds a network with random weights."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import timm
import torchvision
from torch import nn

from imagenet_swa import vgg
from imagenet_swa.config import InputError, ModelConfig


def known_names(library: str) -> list[str]:
    """The architectures of a library. Raises InputError where it is not installed."""
    match library:
        case "timm":
            return timm.list_models()
        case "torchvision":
            return torchvision.models.list_models(module=torchvision.models)
        case "pytorchcv":
            return _pytorchcv_names()
        case _:
            return list(vgg.NETWORKS)


def build(model: ModelConfig) -> nn.Module:
    """A network of a known name with random weights; raises whatever its constructor runs into."""
    architecture, arguments = model.name.partition(".")[0], cast("dict[str, Any]", model.kwargs)
    match model.library:
        case "timm":
            return timm.create_model(model.name, pretrained=False, num_classes=model.num_classes, **arguments)
        case "torchvision":
            # Otherwise these two warn about how they initialise weights that are replaced at once.
            defaults = {"init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
            return torchvision.models.get_model(architecture, num_classes=model.num_classes, **defaults, **arguments)
        case "pytorchcv":
            return _from_pytorchcv(architecture)(num_classes=model.num_classes, pretrained=False, **arguments)
        case "imagenet_swa":
            return vgg.NETWORKS[architecture](model.num_classes, **arguments)


def _pytorchcv(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pytorchcv.{module}")
    except ImportError:
        raise InputError("model.library is pytorchcv, which is not installed: pip install 'imagenet-swa[cifar]'") from None


def _pytorchcv_networks() -> dict[str, Callable[..., nn.Module]]:
    provided = vars(_pytorchcv("model_provider")).items()
    return {name: value for name, value in provided if inspect.isfunction(value) and name != "get_model"}


def _pytorchcv_names() -> list[str]:
    """Networks (`wrn28_10_cifar10`) and families of networks (`wrn_cifar`), whose sizes model.kwargs give."""
    families = [module.name for module in pkgutil.iter_modules(_pytorchcv("models").__path__) if not module.ispkg]
    return sorted({*_pytorchcv_networks(), *families})


def _from_pytorchcv(architecture: str) -> Callable[..., nn.Module]:
    network = _pytorchcv_networks().get(architecture)
    return network or getattr(_pytorchcv(f"models.{architecture}"), f"get_{architecture}")
