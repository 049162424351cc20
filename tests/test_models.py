"""Networks and weights by name and from files; what is refused, and in which words."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import run
from safetensors.torch import load_file, save_file
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from imagenet_swa.cli import main
from imagenet_swa.config import InputError, ModelConfig, Preprocessing, PreprocessingConfig
from imagenet_swa.models import (
    batchnorm_layers,
    check_forward,
    create_network,
    load_pretrained,
    load_weights,
    mode_of,
    resolve_preprocessing,
)
from imagenet_swa.weight_files import canonical_name

# The networks of the paper: timm's name, torchvision's name, millions of parameters, BatchNorm layers.
PAPER_NETWORKS = [
    ("resnet50.tv_in1k", "resnet50.IMAGENET1K_V1", 25.557, 53),
    ("resnet152.tv_in1k", "resnet152.IMAGENET1K_V1", 60.193, 155),
    ("densenet161.tv_in1k", "densenet161.IMAGENET1K_V1", 28.681, 161),
]


def model(name: str, library: str = "timm", **settings: Any) -> ModelConfig:
    return ModelConfig(name=name, library=library, **settings)  # pyright: ignore[reportArgumentType]


def refusal(config: ModelConfig) -> str:
    """The one line with which the network is refused."""
    with pytest.raises(InputError) as caught:
        load_pretrained(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def preprocessing_of(config: ModelConfig, **overrides: Any) -> Preprocessing:
    return resolve_preprocessing(config, PreprocessingConfig(**overrides), create_network(config))


# ------------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize(("timm_name", "torchvision_name", "millions", "num_layers"), PAPER_NETWORKS)
def test_networks_of_the_paper(timm_name: str, torchvision_name: str, millions: float, num_layers: int):
    """The paper's three networks come from both libraries by the name of their weights, with the published size."""
    for library, name in (("timm", timm_name), ("torchvision", torchvision_name)):
        network = load_pretrained(model(name, library, pretrained=False))
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
        assert len(batchnorm_layers(network)) == num_layers


@pytest.mark.parametrize(("timm_name", "torchvision_name"), [row[:2] for row in PAPER_NETWORKS])
def test_preprocessing_of_the_paper_networks(timm_name: str, torchvision_name: str):
    """They see the central 224 of 256 pixels in ImageNet's normalisation, bilinear but for timm's densenet161, bicubic."""
    for library, name in (("timm", timm_name), ("torchvision", torchvision_name)):
        p = preprocessing_of(model(name, library))
        assert (p.image_size, p.resize) == (224, 256)
        assert p.interpolation == ("bicubic" if name == "densenet161.tv_in1k" else "bilinear")
        assert p.mean == (0.485, 0.456, 0.406) and p.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("settings", [{"pretrained": False}, {"weights": Path("weights.safetensors")}])
def test_the_tag_decides_the_preprocessing(settings: dict[str, Any]):
    """With random or local weights, too, the name's tag gives its own data config, not the architecture's first."""
    assert preprocessing_of(model("resnet50.tv_in1k", **settings)).resize == 256
    assert preprocessing_of(model("resnet50.a1_in1k", **settings)).resize == 235
    assert preprocessing_of(model("resnet50.IMAGENET1K_V2", "torchvision", **settings)).resize == 232
    assert preprocessing_of(model("resnet50.IMAGENET1K_V1", "torchvision", **settings)).resize == 256


def test_ambiguous_timm_name():
    """An architecture alone does not say which of its weights: refused with all choices."""
    message = refusal(model("resnet50"))
    assert "'resnet50' is ambiguous: it does not say which weights; wanted one of" in message
    for choice in ("resnet50.tv_in1k", "resnet50.a1_in1k", "resnet50.tv2_in1k"):
        assert choice in message


@pytest.mark.parametrize(
    ("name", "settings"),
    [("resnet50", {}), ("resnet50.DEFAULT", {}), ("resnet50.DEFAULT", {"weights": Path("some.pth")})],
)
def test_ambiguous_torchvision_name(name: str, settings: dict[str, Any]):
    """torchvision's architecture alone, and DEFAULT, which is V2, do not say which weights: refused with both choices."""
    message = refusal(model(name, "torchvision", **settings))
    assert f"'{name}' is ambiguous" in message
    assert message.endswith("wanted one of resnet50.IMAGENET1K_V1, resnet50.IMAGENET1K_V2")


@pytest.mark.parametrize("settings", [{}, {"pretrained": False}, {"weights": Path("some.pth")}])
@pytest.mark.parametrize(
    ("library", "name", "choice"),
    [("timm", "resnet50.tv_in1kk", "resnet50.tv_in1k"), ("torchvision", "resnet50.IMAGENET1K_V3", "resnet50.IMAGENET1K_V2")],
)
def test_unknown_weights(library: str, name: str, choice: str, settings: dict[str, Any]):
    """A tag that the library does not know is refused with the choices, even where it only decides the preprocessing."""
    message = refusal(model(name, library, **settings))
    assert f"'{name}' is unknown; wanted one of" in message
    assert choice in message


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("name", ["resnt50", "resnt50.tv_in1k"])
def test_unknown_architecture(library: str, name: str):
    """A misspelt architecture is refused with the nearest names, with weights or without."""
    for pretrained in (True, False):
        message = refusal(model(name, library, pretrained=pretrained))
        assert f"{library} has no network 'resnt50'; did you mean" in message
        assert "resnet50" in message


def test_architecture_without_weights():
    """Where the library has no weights at all, the message names the two ways out."""
    without = next(name for name in ("test_vit4", "test_coatnet", "seresnet18") if not timm.list_pretrained(f"{name}.*"))
    message = refusal(model(without))
    assert f"timm has no pretrained weights for '{without}'" in message
    assert "model.weights to a file or model.pretrained to false" in message


@pytest.mark.parametrize(
    ("library", "name", "kwargs"),
    [
        ("timm", "resnet18", {"drop_rte": 0.1}),
        ("timm", "resnet18", {"act_layer": "nonsense"}),
        ("timm", "resnet18", {"block": 3}),
        ("timm", "resnet18", {"num_classes": 3}),
        ("torchvision", "resnet18", {"drop_rate": 0.1}),
    ],
)
def test_unusable_constructor_arguments(library: str, name: str, kwargs: dict[str, Any]):
    """Arguments that the network's constructor does not take are refused in one line that repeats them."""
    message = refusal(model(name, library, pretrained=False, kwargs=kwargs))
    assert f"{library} cannot build {name} with {kwargs}: " in message


def test_constructor_arguments_reach_the_network():
    """model.kwargs and model.num_classes shape the network, in both libraries."""
    network = create_network(model("test_efficientnet", num_classes=7, kwargs={"drop_rate": 0.5}))
    assert getattr(network, "drop_rate") == 0.5  # noqa: B009 -- no attribute that a type checker knows
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    network = create_network(model("mobilenet_v3_small", "torchvision", num_classes=7, kwargs={"dropout": 0.7}))
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.7]
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_torchvision_weights_for_other_classes():
    """torchvision's weights have 1000 classes and stay that way: another number is refused before any download."""
    message = refusal(model("resnet18.IMAGENET1K_V1", "torchvision", num_classes=10))
    assert "has 1000 classes, model.num_classes is 10" in message


@pytest.mark.parametrize(
    ("library", "name", "missing", "cache"),
    [
        ("timm", "resnet50.tv_in1k", "model.safetensors of timm/resnet50.tv_in1k on the Hugging Face Hub", "HF_HOME"),
        (
            "torchvision",
            "resnet50.IMAGENET1K_V1",
            "https://download.pytorch.org/models/resnet50-0676ba61.pth",
            "TORCH_HOME",
        ),
    ],
)
def test_weights_that_cannot_be_downloaded(tmp_path: Path, library: str, name: str, missing: str, cache: str):
    """Without a network and with an empty cache, one line says within seconds which file is missing and how to provide it."""
    program = (
        "import sys; from imagenet_swa.config import *; from imagenet_swa.models import *\n"
        f"try: load_pretrained(ModelConfig(library={library!r}, name={name!r}))\n"
        "except InputError as error: print(error); sys.exit(3)"
    )
    # A proxy that refuses every connection is a machine without a network.
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = run(["python", "-c", program], HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path), **proxy)
    assert result.returncode == 3, result.stderr
    *_, line = result.stdout.splitlines()  # after torch's own "Downloading: ..."
    assert f"missing: {missing}." in line
    assert f"pass --model.weights FILE beside --model.name {name}, or copy the cache folder and set {cache}" in line


# ------------------------------------------------------------------------------------------- networks for CIFAR

# Library, name, constructor arguments: one network by its own name and one of each of the recipes' families, small.
CIFAR_NETWORKS: list[tuple[str, str, dict[str, Any]]] = [
    ("imagenet_swa", "vgg16", {"width": 0.125}),
    ("imagenet_swa", "vgg16_bn", {"width": 0.125}),
    ("pytorchcv", "resnet20_cifar10", {}),
    ("pytorchcv", "preresnet_cifar", {"blocks": 8, "bottleneck": False}),
    ("pytorchcv", "wrn_cifar", {"blocks": 10, "width_factor": 1}),
    ("pytorchcv", "pyramidnet_cifar", {"blocks": 8, "alpha": 12, "bottleneck": False}),
    ("pytorchcv", "shakeshakeresnet_cifar", {"blocks": 8, "bottleneck": False, "first_stage_channels": 8}),
]
each_cifar_network = pytest.mark.parametrize(
    ("library", "name", "kwargs"), CIFAR_NETWORKS, ids=[name for _, name, _ in CIFAR_NETWORKS]
)


def cifar_model(library: str, name: str, kwargs: dict[str, Any], **settings: Any) -> ModelConfig:
    return model(name, library, num_classes=10, kwargs=kwargs, **{"pretrained": False} | settings)


@each_cifar_network
def test_cifar_networks_take_cifar_images(library: str, name: str, kwargs: dict[str, Any]):
    """Images of 32 x 32 pixels give logits in both modes, without the trial leaving a trace, and other sizes are refused."""
    config = cifar_model(library, name, kwargs)
    network = create_network(config)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    check_forward(network, 32, config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    with pytest.raises(InputError, match=f"{name} does not take images of 3 x 16 x 16 in evaluation"):
        check_forward(network, 16, config)


@each_cifar_network
def test_seeds_decide_the_random_weights(library: str, name: str, kwargs: dict[str, Any]):
    """The same seed of torch gives the same weights, another seed others."""

    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(load_pretrained(cifar_model(library, name, kwargs)).named_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    random = [key for key in first if first[key].ndim == 4]
    assert random and not any(torch.equal(first[key], other[key]) for key in random)


@each_cifar_network
def test_cifar_network_from_a_file(tmp_path: Path, library: str, name: str, kwargs: dict[str, Any]):
    """A file of weights gives these very weights and statistics, and the logits of the network that it was written from."""
    torch.manual_seed(8)
    written = create_network(cifar_model(library, name, kwargs)).train()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        written(images)  # moves the BatchNorm statistics
    save_file(written.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_pretrained(cifar_model(library, name, kwargs, weights=tmp_path / "weights.safetensors"))
    assert all(torch.equal(tensor, written.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(images), written.eval()(images))


def test_pytorchcv_names_and_families_are_the_same_networks():
    """A family called with the sizes of one of its networks is that network: names, shapes and, by the seed, weights."""
    for name, family, kwargs in (
        ("preresnet20_cifar10", "preresnet_cifar", {"blocks": 20, "bottleneck": False}),
        ("shakeshakeresnet20_2x16d_cifar10", "shakeshakeresnet_cifar", {"blocks": 20, "bottleneck": False}),
    ):
        states = []
        for config in (cifar_model("pytorchcv", name, {}), cifar_model("pytorchcv", family, kwargs)):
            torch.manual_seed(9)
            states.append(create_network(config).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("library", "name", "near"),
    [
        ("pytorchcv", "wrn28_10_cifar1", "wrn28_10_cifar10 or wrn28_10_cifar100"),
        ("pytorchcv", "preresnet_cfar", "preresnet_cifar"),
        ("imagenet_swa", "vgg61", "vgg16"),
    ],
)
def test_unknown_cifar_network(library: str, name: str, near: str):
    """A misspelt network or family is refused with the nearest names."""
    message = refusal(model(name, library, pretrained=False))
    assert f"{library} has no network '{name}'; did you mean" in message
    assert near in message


@pytest.mark.parametrize(
    ("library", "name", "num_classes", "kwargs", "reason"),
    [
        ("pytorchcv", "preresnet_cifar", 10, {"blocks": 20}, "missing 1 required positional argument: 'bottleneck'"),
        ("pytorchcv", "preresnet_cifar", 10, {"blocks": 21, "bottleneck": False}, "assert ((blocks - 2) % 6 == 0)"),
        ("pytorchcv", "preresnet_cifar", 3, {"blocks": 20, "bottleneck": False}, "assert (num_classes in [10, 100])"),
        ("pytorchcv", "wrn28_10_cifar10", 10, {"pretrained": True}, "multiple values for keyword argument 'pretrained'"),
        ("pytorchcv", "wrn28_10_cifar10", 10, {"widht": 2}, "unexpected keyword argument 'widht'"),
        ("imagenet_swa", "vgg16", 10, {"widht": 2}, "unexpected keyword argument 'widht'"),
        ("imagenet_swa", "vgg16", 10, {"width": 0.001}, "width 0.001 leaves no channels"),
        ("imagenet_swa", "vgg16", 10, {"dropout": 2}, "dropout probability has to be between 0 and 1, but got 2"),
    ],
)
def test_unusable_sizes_of_cifar_networks(library: str, name: str, num_classes: int, kwargs: dict[str, Any], reason: str):
    """What the constructor does not take is refused with its reason; where it only asserts, with the condition."""
    message = refusal(model(name, library, pretrained=False, num_classes=num_classes, kwargs=kwargs))
    assert f"{library} cannot build {name} with {kwargs}: " in message
    assert reason in message


@pytest.mark.parametrize(("library", "name"), [("pytorchcv", "wrn28_10_cifar10"), ("imagenet_swa", "vgg16")])
@pytest.mark.parametrize("tag", ["", ".best"])
def test_no_pretrained_weights_for_cifar(library: str, name: str, tag: str):
    """Pretrained weights are not taken from these libraries, and the line says what to set instead."""
    message = refusal(model(name + tag, library, num_classes=10))
    assert f"no pretrained weights are taken from {library}; set model.name to {name}, and model.weights to a file" in message
    assert "model.pretrained to false" in message


def test_without_pytorchcv(monkeypatch: pytest.MonkeyPatch):
    """Where pytorchcv is not installed, the line says how to install it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorchcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorchcv", None)  # pyright: ignore[reportArgumentType] -- how Python marks what is not there
    message = refusal(model("wrn28_10_cifar10", "pytorchcv", pretrained=False, num_classes=10))
    assert message.endswith("not installed: pip install 'imagenet-swa[cifar]'")


def test_pytorchcv_is_imported_only_when_asked_for():
    """A run of another library's network never imports pytorchcv."""
    program = (
        "import sys; from imagenet_swa.config import *; from imagenet_swa.models import *\n"
        "make = lambda library, name: create_network(ModelConfig(library=library, name=name, pretrained=False, num_classes=10))\n"
        "make('timm', 'test_efficientnet'); make('torchvision', 'mobilenet_v3_small'); make('imagenet_swa', 'vgg16')\n"
        "print('pytorchcv' in sys.modules); make('pytorchcv', 'resnet20_cifar10'); print('pytorchcv' in sys.modules)"
    )
    result = run(["python", "-c", program])
    assert result.stdout.split() == ["False", "True"], result.stderr


def test_preprocessing_of_cifar_networks():
    """32 pixels without a resize; normalised as the authors' code does it, VGG by ImageNet's numbers, the others by CIFAR's."""
    for library, name, kwargs in CIFAR_NETWORKS:
        p = preprocessing_of(cifar_model(library, name, kwargs))
        assert (p.image_size, p.resize, p.interpolation) == (32, 32, "bilinear")
        vgg = library == "imagenet_swa"
        assert p.mean == ((0.485, 0.456, 0.406) if vgg else (0.4914, 0.4822, 0.4465))
        assert p.std == ((0.229, 0.224, 0.225) if vgg else (0.2023, 0.1994, 0.2010))
        changed = preprocessing_of(cifar_model(library, name, kwargs), resize=40, mean=(0.1, 0.2, 0.3))
        assert (changed.image_size, changed.resize, changed.mean, changed.std) == (32, 40, (0.1, 0.2, 0.3), p.std)


def test_preprocessing_of_pytorchcvs_large_networks():
    """Its networks for ImageNet bring their own size, and see 0.875 of the image in ImageNet's normalisation."""
    with torch.device("meta"):
        p = preprocessing_of(model("inceptionv3", "pytorchcv", pretrained=False))
    assert (p.image_size, p.resize, p.mean) == (299, 341, (0.485, 0.456, 0.406))
    with torch.device("meta"):
        p = preprocessing_of(model("resnet18", "pytorchcv", pretrained=False))
    assert (p.image_size, p.resize) == (224, 256)


@pytest.mark.parametrize("command", ["doctor", "evaluate"])
@pytest.mark.parametrize(("library", "name", "kwargs"), [CIFAR_NETWORKS[1], CIFAR_NETWORKS[4]])
@pytest.mark.usefixtures("on_the_cpu")
def test_commands_take_cifar_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, library: str, name: str, kwargs: dict[str, Any]
):
    """doctor and evaluate work with the networks of both libraries, weights from a file."""
    torch.manual_seed(10)
    save_file(create_network(cifar_model(library, name, kwargs)).state_dict(), tmp_path / "weights.safetensors")
    flags = [f"--model.library={library}", f"--model.name={name}", "--model.num_classes=10", f"--model.kwargs={kwargs}"]
    flags += [f"--model.weights={tmp_path / 'weights.safetensors'}", f"--output={tmp_path / 'run'}", "--global_batch_size=16"]
    flags += ["--data.synthetic", "--data.synthetic_num_images=[32,20]", "--evaluation.batch_size=10"]
    assert main([command, *flags]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert f"{library} {name}" in out if command == "doctor" else "of 20" in out


# --------------------------------------------------------------------------------------------------- local files


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """The state dict of a small network, statistics and counters moved away from their initial values."""
    torch.manual_seed(5)
    network = timm.create_model("test_efficientnet", num_classes=10)
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def small(weights: Path) -> ModelConfig:
    return model("test_efficientnet", num_classes=10, weights=weights)


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_local_file(tmp_path: Path, reference: dict[str, torch.Tensor], suffix: str, prefix: str):
    """A file of weights gives these very weights, whether or not DDP or torch.compile put a prefix before the names."""
    path = tmp_path / f"weights{suffix}"
    save: Any = save_file if suffix == ".safetensors" else torch.save
    save(prefixed(reference, prefix), path)
    loaded = load_pretrained(small(path)).state_dict()
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_training_checkpoint(tmp_path: Path, reference: dict[str, torch.Tensor], key: str):
    """The weights of a training checkpoint are found under its usual names, beside numbers and an optimizer's state."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 90, key: prefixed(reference, "module."), "optimizer": optimizer}, tmp_path / "best.pth")
    loaded = load_pretrained(small(tmp_path / "best.pth")).state_dict()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


def test_compiled_submodules():
    """torch.compile of parts puts its prefix inside names; a name of one's own that holds `module` stays."""
    assert canonical_name("blocks.0._orig_mod.conv.weight") == "blocks.0.conv.weight"
    assert canonical_name("my_module.weight") == "my_module.weight"
    assert canonical_name("head.module.weight") == "head.module.weight"


def test_half_precision_file(tmp_path: Path, reference: dict[str, torch.Tensor]):
    """Weights stored in fp16 are widened: the network stays fp32."""
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in reference.items()}
    save_file(halved, tmp_path / "half.safetensors")
    loaded = load_pretrained(small(tmp_path / "half.safetensors")).state_dict()
    assert loaded["conv_stem.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv_stem.weight"], halved["conv_stem.weight"].float())


def test_file_without_counters(tmp_path: Path, reference: dict[str, torch.Tensor]):
    """Files from before BatchNorm counted its batches load, with counters at zero, as in PyTorch itself."""
    old = {name: tensor for name, tensor in reference.items() if "num_batches" not in name}
    save_file(old, tmp_path / "old.safetensors")
    loaded = load_pretrained(small(tmp_path / "old.safetensors")).state_dict()
    assert all(torch.equal(loaded[name], old[name]) for name in old)
    assert loaded["bn1.num_batches_tracked"] == 0


def test_old_densenet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's DenseNet files, whose names have a dot too many (`norm.1`), load as torchvision's own loader reads them."""
    torch.manual_seed(6)
    network = torchvision.models.densenet121(num_classes=10)
    parts = ("norm", "relu", "conv")
    old: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        for part in parts:
            name = name.replace(f".{part}1.", f".{part}.1.").replace(f".{part}2.", f".{part}.2.")
        if "num_batches" not in name:
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    config = model("densenet121", "torchvision", num_classes=10, weights=tmp_path / "densenet.pth")
    loaded = load_pretrained(config).state_dict()
    # torchvision's own loader, fed with the same file in place of a download
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(old))
    weights = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    monkeypatch.setitem(weights.meta, "categories", list(range(10)))
    wanted = torchvision.models.densenet121(weights=weights).state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_wrong_shape(tmp_path: Path, reference: dict[str, torch.Tensor]):
    """A weight of another shape is named with both shapes."""
    save_file(reference | {"classifier.bias": torch.zeros(11)}, tmp_path / "w.safetensors")
    message = refusal(small(tmp_path / "w.safetensors"))
    assert "w.safetensors does not fit the network: classifier.bias has shape (11,), wanted (10,)" in message


def test_missing_and_unexpected_names(tmp_path: Path, reference: dict[str, torch.Tensor]):
    """Names that are missing or unexpected are counted, and one of each is named."""
    weights = {name: tensor for name, tensor in reference.items() if not name.startswith("classifier")}
    save_file(weights | {"fc.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = refusal(small(tmp_path / "w.safetensors"))
    assert "2 names missing (such as classifier.bias), 1 unexpected (such as fc.weight)" in message


def test_no_such_file(tmp_path: Path):
    """A path without a file, or to a folder, is named."""
    for path in (tmp_path / "none.pth", tmp_path):
        assert f"no such weights file: {path}" in refusal(small(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("weights.bin", b"x", "wanted a .safetensors or .pth file"),
        ("weights.safetensors", b"<html>404</html>", "is not a valid safetensors file"),
        ("weights.safetensors", b"", "is not a valid safetensors file"),
        ("weights.pth", b"<html>404</html>", "is not a file of plain weights"),
        ("weights.pth", b"", "is not a file of plain weights"),
        ("weights.pth", b"PK\x03\x04 cut short", "is not a file of plain weights"),
    ],
)
def test_not_a_weights_file(tmp_path: Path, name: str, content: bytes, words: str):
    """Something else under a weight file's name is refused by path, in one line."""
    (tmp_path / name).write_bytes(content)
    message = refusal(small(tmp_path / name))
    assert f"{tmp_path / name}" in message and words in message


def test_truncated_file(tmp_path: Path, reference: dict[str, torch.Tensor]):
    """A download that broke off is refused, in either format."""
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"cut{suffix}"
        save: Any = save_file if suffix == ".safetensors" else torch.save
        save(reference, path)
        path.write_bytes(path.read_bytes()[:-1000])
        assert str(path) in refusal(small(path))


@pytest.mark.parametrize("content", [[1, 2], {"a": torch.zeros(1), "b": 3}, torch.zeros(3)], ids=["list", "mixed", "tensor"])
def test_file_of_something_else(tmp_path: Path, content: Any):
    """A .pth that holds no dict of tensors is refused with the way to write one."""
    torch.save(content, tmp_path / "other.pth")
    assert "holds no dict of tensors; save network.state_dict()" in refusal(small(tmp_path / "other.pth"))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path: Path, how: str):
    """A .pth with code in it is refused, and the code does not run."""
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"conv_stem.weight": torch.zeros(1), "x": Malicious(mark)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "is not a file of plain weights" in refusal(small(path))
    assert not mark.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the test's own file is harmless and proves nothing"


def test_loading_is_all_or_nothing(reference: dict[str, torch.Tensor]):
    """A network that refuses weights keeps its own."""
    network = create_network(model("test_efficientnet", num_classes=10))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=r"the average does not fit the network: classifier.bias has shape"):
        load_weights(network, reference | {"classifier.bias": torch.zeros(3)}, "the average")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("library", "name", "interpolation", "resize", "mean"),
    [
        ("torchvision", "mobilenet_v2", "bilinear", 256, (0.485, 0.456, 0.406)),
        ("timm", "tf_efficientnet_lite0", "bicubic", 256, (0.5, 0.5, 0.5)),
    ],
)
def test_real_weights(
    real_weights: Path, library: str, name: str, interpolation: str, resize: int, mean: tuple[float, float, float]
):
    """Real files load strictly into the library's own network, which brings the preprocessing they were trained for."""
    path = next(real_weights.glob(f"{name}.*"))
    config = model(name, library, weights=path)
    network, content = load_pretrained(config), load_file(path)
    assert all(torch.equal(tensor, content[key]) for key, tensor in network.state_dict().items())
    p = resolve_preprocessing(config, PreprocessingConfig(), network)
    assert (p.image_size, p.resize, p.interpolation, p.mean) == (224, resize, interpolation, mean)


# ------------------------------------------------------------------------------------------------- preprocessing


def test_every_override_wins():
    """Whatever the user sets replaces the network's own, and nothing else."""
    own = preprocessing_of(model("resnet18.tv_in1k"))
    overrides = {
        "image_size": 96,
        "resize": 100,
        "interpolation": "bicubic",
        "train_interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_area": (0.5, 0.9),
        "crop_aspect": (0.9, 1.1),
        "horizontal_flip": False,
        "train_crop": "padded",
        "padding": 2,
    }
    for name in overrides.keys() - {"image_size"}:
        changed = vars(preprocessing_of(model("resnet18.tv_in1k"), **{name: overrides[name] if name != "resize" else 300}))
        assert {key for key in changed if changed[key] != getattr(own, key)} == {name}
    assert vars(preprocessing_of(model("resnet18.tv_in1k"), **overrides)) == overrides


@pytest.mark.parametrize(("size", "resize"), [(112, 128), (160, 182), (224, 256), (448, 512), (299, 341)])
def test_image_size_keeps_the_crops_share(size: int, resize: int):
    """With image_size alone the central crop shows the same share of the image: 224 of 256, rounded down."""
    p = preprocessing_of(model("resnet18.tv_in1k"), image_size=size)
    assert (p.image_size, p.resize) == (size, resize)
    p = preprocessing_of(model("resnet18.IMAGENET1K_V1", "torchvision"), image_size=size)
    assert (p.image_size, p.resize) == (size, resize)


def test_resize_below_the_crop():
    """A resize that is smaller than the crop is refused with the least that works."""
    with pytest.raises(InputError, match=r"resize 200 is smaller than the central crop of 224 pixels; set .* at least 224"):
        preprocessing_of(model("resnet18.tv_in1k"), resize=200)


def test_network_without_central_crop():
    """Networks that timm evaluates without a central crop are refused unless a resize is given."""
    names = [n for n in timm.list_pretrained("vit_*") if getattr(timm.get_pretrained_cfg(n), "crop_mode", "") == "squash"]
    config = model(min(names, key=lambda n: ("small" not in n, "base" not in n, n)))
    network = create_network(config)
    with pytest.raises(InputError, match=r"evaluated without a central crop.*set preprocessing.resize"):
        resolve_preprocessing(config, PreprocessingConfig(), network)
    size = timm.get_pretrained_cfg(config.name).input_size[-1]  # pyright: ignore[reportOptionalMemberAccess]
    assert resolve_preprocessing(config, PreprocessingConfig(resize=size), network).resize == size


def test_torchvision_network_without_weights_to_its_name():
    """torchvision's data config for an architecture alone is that of its IMAGENET1K_V1 weights."""
    p = preprocessing_of(model("efficientnet_b1", "torchvision"))
    assert (p.image_size, p.resize, p.interpolation) == (240, 256, "bicubic")


# ------------------------------------------------------------------------------------------- BatchNorm and modes


def test_batchnorm_layers_are_found_by_type():
    """All BatchNorm layers are found, whatever they are called."""
    assert "layer2.0.downsample.1" in batchnorm_layers(create_network(model("resnet18", pretrained=False)))
    assert "features.denseblock1.denselayer1.norm1" in batchnorm_layers(create_network(model("densenet121")))
    network = nn.ModuleDict(
        {
            "group": nn.GroupNorm(1, 4),
            "layer": nn.LayerNorm(4),
            "instance": nn.InstanceNorm2d(4),
            "frozen": FrozenBatchNorm2d(4),
            "frozen_timm": FrozenBatchNormAct2d(4),
            "no_statistics": nn.BatchNorm2d(4, track_running_stats=False),
            "one": nn.BatchNorm1d(4),
            "two": nn.BatchNorm2d(4, affine=False),
            "three": nn.BatchNorm3d(4),
            "sync": nn.SyncBatchNorm(4),
            "timm": BatchNormAct2d(4),
        }
    )
    assert list(batchnorm_layers(network)) == ["one", "two", "three", "sync", "timm"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_modes_are_put_back(training: bool, fails: bool):
    """Inside, every module is in the asked mode; afterwards each has its own back, also after an exception."""
    inner = nn.BatchNorm1d(2)
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner, nn.Dropout()))
    inner.eval()
    before = [module.training for module in network.modules()]
    assert len(set(before)) == 2
    try:
        with mode_of(network, training=training):
            assert {module.training for module in network.modules()} == {training}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in network.modules()] == before


@pytest.mark.parametrize(
    ("library", "name", "kwargs", "size", "wanted"),
    [
        ("timm", "vit_tiny_patch16_224", {}, 32, "does not take images of 3 x 32 x 32"),
        ("timm", "test_efficientnet", {"in_chans": 1}, 32, "does not take images of 3 x 32 x 32"),
        ("timm", "test_efficientnet", {"features_only": True}, 32, "returns list for two images, wanted logits"),
        ("timm", "test_efficientnet", {"global_pool": ""}, 64, "wanted logits|does not take"),
        ("torchvision", "inception_v3", {}, 75, "in training: Given input size"),
        ("torchvision", "googlenet", {}, 64, "returns GoogLeNetOutputs for two images, wanted logits"),
    ],
)
def test_networks_that_give_no_logits_are_refused(library: Any, name: str, kwargs: dict[str, Any], size: int, wanted: str):
    """Two images have to become two rows of logits, in both modes, before anything else is done with the network."""
    model = ModelConfig(library=library, name=name, pretrained=False, num_classes=10, kwargs=kwargs)
    network = create_network(model)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=wanted) as caught:
        check_forward(network, size, model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_trying_a_network_leaves_it_as_it_was():
    """The trial runs BatchNorm in training mode on a copy: the network's own statistics do not move."""
    model = ModelConfig(name="test_efficientnet", pretrained=False, num_classes=10)
    network = create_network(model)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    check_forward(network, 32, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
