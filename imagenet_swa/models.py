"""Networks by name from timm, torchvision, pytorchcv or here, with the library's or a file's weights; their preprocessing."""

import copy
import difflib
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from torch import nn

from imagenet_swa.config import InputError, ModelConfig, Preprocessing, PreprocessingConfig
from imagenet_swa.libraries import build, known_names
from imagenet_swa.plain import printable
from imagenet_swa.weight_files import Weights, check_finite, first_line, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the authors' code, for its ResNets

# What the libraries take beside a constructor's arguments: files to load, places to fetch them from.
_NO_ARGUMENTS = {
    *("model_name", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights", "root"),
    *("weights_backbone", "progress"),
}

GENERIC: dict[str, Any] = {  # data config of a network that brings none
    "image_size": 224,
    "resize": 256,
    "interpolation": "bilinear",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_mode": "center",
}


# ------------------------------------------------------------------------------------------------------- networks


def create_network(model: ModelConfig) -> nn.Module:
    """The architecture with random weights, and timm's data config of the weights that the name's tag stands for.

    Raises:
        InputError: the library knows no such architecture or weights, or it does not take the arguments.
    """
    architecture, _, tag = model.name.partition(".")
    for name in sorted(_NO_ARGUMENTS & model.kwargs.keys()):
        raise InputError(f"model.kwargs may not set {name}, which is no part of a network; set model.name and model.weights")
    known = known_names(model.library)
    if architecture not in known:
        raise InputError(f"{model.library} has no network {architecture!r}{_nearest(architecture, known)}")
    if tag:
        _check_pretrained_name(model)
    try:
        return build(model)
    except Exception as error:  # constructors raise whatever they run into
        raise InputError(f"{model.library} cannot build {architecture} with {model.kwargs}: {first_line(error)}") from None


def load_pretrained(model: ModelConfig) -> nn.Module:
    """The network with the weights that fine-tuning starts from: a local file's, the library's, or random ones.

    Raises:
        InputError: ambiguous or unknown weights, a file that cannot be read or does not fit, or no way to download.
    """
    network = create_network(model)  # wrong names and arguments come to light before any download
    if model.weights is not None:
        load_weights(network, _as_written_today(read_weights(model.weights), network), str(model.weights))
        check_finite(network.state_dict(), str(model.weights))
        return network
    if not model.pretrained:
        return network
    _check_pretrained_name(model)
    return _from_timm(model) if model.library == "timm" else _from_torchvision(model)


def _from_timm(model: ModelConfig) -> nn.Module:
    # Without a network the hub's client reports every one of its retries; one line at the end says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        arguments = cast("dict[str, Any]", model.kwargs)
        return timm.create_model(model.name, pretrained=True, num_classes=model.num_classes, **arguments)
    except Exception as error:  # each download library raises its own
        cfg = timm.get_pretrained_cfg(model.name)
        source = f"model.safetensors of {cfg.hf_hub_id} on the Hugging Face Hub" if cfg and cfg.hf_hub_id else "its file"
        raise InputError(_cannot_download(model, source, "HF_HOME", error)) from None


def _from_torchvision(model: ModelConfig) -> nn.Module:
    architecture, _, tag = model.name.partition(".")
    weights = torchvision.models.get_model_weights(architecture)[tag]
    if len(weights.meta["categories"]) != model.num_classes:
        raise InputError(
            f"{model.name} has {len(weights.meta['categories'])} classes, model.num_classes is {model.num_classes}; "
            "torchvision does not adapt the last layer"
        )
    try:
        return torchvision.models.get_model(architecture, weights=weights, **cast("dict[str, Any]", model.kwargs))
    except (OSError, RuntimeError) as error:  # no network (urllib's URLError is an OSError), or a damaged file in the cache
        raise InputError(_cannot_download(model, weights.url, "TORCH_HOME", error)) from None


def _check_pretrained_name(model: ModelConfig) -> None:
    """Raise InputError unless the name says which weights. torchvision's DEFAULT does not: it is V2 for some networks."""
    architecture = model.name.partition(".")[0]
    if model.library in ("pytorchcv", "imagenet_swa"):
        raise InputError(
            f"no pretrained weights are taken from {model.library}; set model.name to {architecture}, and model.weights to a "
            "file or model.pretrained to false"
        )
    if model.library == "timm":
        choices = timm.list_pretrained(f"{architecture}.*")
    else:
        choices = [f"{architecture}.{member.name}" for member in torchvision.models.get_model_weights(architecture)]
    if model.name in choices:
        return
    if not choices:
        raise InputError(
            f"{model.library} has no pretrained weights for {model.name!r}; set model.name to {architecture}, and "
            "model.weights to a file or model.pretrained to false"
        )
    kind = "is unknown"
    if model.name in (architecture, f"{architecture}.DEFAULT"):
        kind = "is ambiguous: it does not say which weights"
    raise InputError(f"model.name {model.name!r} {kind}; wanted one of {', '.join(choices)}")


def _cannot_download(model: ModelConfig, source: str, cache: str, error: Exception) -> str:
    return (
        f"the weights {model.name} are not in the cache, or damaged there, and could not be downloaded ({type(error).__name__}); "
        f"missing: {source}. Where there is a network, download it; then pass --model.weights FILE beside --model.name "
        f"{model.name}, or copy the cache folder and set {cache}"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# -------------------------------------------------------------------------------------------------------- weights


def _as_written_today(weights: Weights, network: nn.Module) -> Weights:
    """What the libraries' own loaders mend in their oldest files: torchvision's DenseNets from before PyTorch 0.4 have
    `norm.1` for `norm1`, and files of that time lack BatchNorm's counters, which start at zero.
    """
    dotted = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    return counters | {dotted.sub(r"\1\2.", name): tensor for name, tensor in weights.items()}


def load_weights(network: nn.Module, weights: Weights, source: str) -> None:
    """Load strictly: names, shapes and kinds of numbers must agree. Raises InputError, naming the source and what does not."""
    expected = network.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise InputError(
            f"{source} does not fit the network: {len(missing)} names missing{_for_instance(missing)}, "
            f"{len(unexpected)} unexpected{_for_instance(unexpected)}"
        )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            got, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise InputError(f"{source} does not fit the network: {name} has shape {got}, wanted {wanted}")
        if tensor.is_floating_point() != weights[name].is_floating_point():
            raise InputError(f"{source} does not fit the network: {name} is {weights[name].dtype}, wanted {tensor.dtype}")
    try:
        network.load_state_dict(weights)
    except (RuntimeError, NotImplementedError) as error:  # of kinds of numbers that torch does not turn into others
        raise InputError(f"{source} does not fit the network: {first_line(error)}") from None


def _for_instance(names: list[str]) -> str:
    return f" (such as {printable(names[0][:100])})" if names else ""


# -------------------------------------------------------------------------------------------------- preprocessing


def resolve_preprocessing(model: ModelConfig, overrides: PreprocessingConfig, network: nn.Module) -> Preprocessing:
    """The network's own data config with the user's overrides on top.

    Raises:
        InputError: the network is evaluated in a way that resize + central crop does not describe.
    """
    own = _data_config(model, network)
    chosen = {name: value for name, value in vars(overrides).items() if value is not None}
    if own.pop("crop_mode") != "center" and overrides.resize is None:
        raise InputError(
            f"{model.name} is evaluated without a central crop, which is not supported; set preprocessing.resize "
            "to evaluate it with one"
        )
    if overrides.image_size is not None and overrides.resize is None:
        # Keep the share of the image that the central crop shows.
        chosen["resize"] = math.floor(own["resize"] * overrides.image_size / own["image_size"])
    return Preprocessing(**{**own, **chosen})


def _data_config(model: ModelConfig, network: nn.Module) -> dict[str, Any]:
    if model.library == "timm":
        return _timm_data_config(network)
    if model.library == "torchvision":
        return _torchvision_data_config(model)
    if model.library == "imagenet_swa":  # the authors' code normalises by ImageNet's numbers for its VGG
        return GENERIC | {"image_size": 32, "resize": 32}
    size = getattr(network, "in_size", (32, 32))[0]  # pytorchcv's networks know theirs
    if size == 32:
        return GENERIC | {"image_size": 32, "resize": 32, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    return GENERIC | {"image_size": size, "resize": math.floor(size / 0.875)}


def _timm_data_config(network: nn.Module) -> dict[str, Any]:
    c = resolve_model_data_config(network)
    size = c["input_size"][-1]
    return {
        "image_size": size,
        "resize": math.floor(size / c["crop_pct"]),
        "interpolation": c["interpolation"],
        "mean": tuple(c["mean"]),
        "std": tuple(c["std"]),
        "crop_mode": c["crop_mode"],
    }


def _torchvision_data_config(model: ModelConfig) -> dict[str, Any]:
    architecture, _, tag = model.name.partition(".")
    members = torchvision.models.get_model_weights(architecture).__members__
    weights = members.get(tag) or members.get("IMAGENET1K_V1")
    if weights is None:
        return dict(GENERIC)
    t = weights.transforms()
    return {
        "image_size": t.crop_size[0],
        "resize": t.resize_size[0],
        "interpolation": t.interpolation.value,
        "mean": tuple(t.mean),
        "std": tuple(t.std),
        "crop_mode": "center",
    }


def check_forward(network: nn.Module, image_size: int, model: ModelConfig) -> None:
    """Try two images in both modes on a copy. Raises InputError where logits (2, num_classes) do not come out."""
    trial = copy.deepcopy(network)
    images = torch.zeros(2, 3, image_size, image_size)
    for training in (False, True):
        try:
            with torch.no_grad():
                logits = trial.train(training)(images)
        except Exception as error:  # whatever a network raises for what it does not take
            mode = "training" if training else "evaluation"
            raise InputError(
                f"{model.name} does not take images of 3 x {image_size} x {image_size} in {mode}: {first_line(error)}; "
                "set preprocessing.image_size or model.kwargs"
            ) from None
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if got != (2, model.num_classes):
            raise InputError(f"{model.name} returns {got} for two images, wanted logits {(2, model.num_classes)}")


# ------------------------------------------------------------------------------------------ BatchNorm and modes


def batchnorm_layers(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The layers with moving statistics, by name. Found by type, so that timm's `norm1` and `downsample.1` are there;
    FrozenBatchNorm, GroupNorm and LayerNorm have no such statistics and are not.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


@contextmanager
def mode_of(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside; every module's own mode back afterwards, even after an exception."""
    before = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
