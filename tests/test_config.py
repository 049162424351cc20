"""Settings from YAML and flags: precedence, one-line errors that name the setting, and a saved file that gives the same run."""

import ast
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, preprocessing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagenet_swa import arguments
from imagenet_swa import config as config_module
from imagenet_swa.arguments import parse_config, parser_for_config
from imagenet_swa.config import (
    BatchNormConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    InputError,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
    ProcessesConfig,
    SpeedConfig,
    SwaConfig,
    flatten,
    to_plain,
)


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Iterator[None]:
    """Build the parser once: it takes ten times as long as parsing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "parser_for_config", functools.cache(parser_for_config))
        yield


def parse(*flags: str) -> Config:
    return parse_config(flags, prog="imagenet-swa train", description="")


def parse_text(folder: Path, text: str, *flags: str) -> Config:
    file = folder / "settings.yaml"
    file.write_text(text)
    return parse("--config", str(file), *flags)


def message_of(*flags: str) -> str:
    """The message of the InputError that these flags raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        parse(*flags)
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    return message


def message_of_text(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    return message_of("--config", str(file))


# --------------------------------------------------------------------------------------------------------- checks

REFUSED = {
    "--seed=-1": "got -1",
    "--seed=9223372036854775808": "got 9223372036854775808",
    "--global_batch_size=0": "got 0",
    "--log_every=0": "got 0",
    "--max_minutes=0": "got 0",
    "--checkpoint.every_minutes=-1": "got -1",
    "--checkpoint.every_minutes=.inf": "got inf",
    "--checkpoint.keep=0": "got 0",
    "--checkpoint.max_failures=0": "got 0",
    "--processes.silence_seconds=0.5": "got 0.5",
    "--processes.collective_minutes=0": "got 0",
    "--model.num_classes=0": "got 0",
    "--model.name=": "is empty",
    "--preprocessing.crop_area=[0,1]": "got 0.0, 1.0",
    "--preprocessing.crop_area=[0.5,0.4]": "got 0.5, 0.4",
    "--preprocessing.crop_area=[0.5,1.01]": "got 1.01",
    "--preprocessing.crop_aspect=[0,1]": "got 0.0, 1.0",
    "--preprocessing.crop_aspect=[2,1]": "got 2.0, 1.0",
    "--preprocessing.image_size=0": "got 0",
    "--preprocessing.resize=-256": "got -256",
    "--preprocessing.std=[0.2,0,0.2]": "got (0.2, 0.0, 0.2)",
    "--data.max_bad_images=-1": "got -1",
    "--data.prefetch=0": "got 0",
    "--data.num_workers=-1": "got -1",
    "--data.synthetic_num_images=[0,5]": "got (0, 5)",
    "--data.synthetic_num_images=[5,0]": "got (5, 0)",
    "--swa.num_epochs=0": "got 0",
    "--swa.num_epochs=7 --swa.cycle_epochs=2": "7 is not a whole number of cycles of 2 epochs",
    "--swa.cycle_epochs=0": "got 0",
    "--swa.lr_min=-0.1": "got lr_min -0.1",
    "--swa.lr_min=0.1": "got lr_min 0.1, lr_max 0.001",
    "--swa.lr_max=.nan": "lr_max nan",
    "--swa.report_epochs=[0]": "must be positive, got 0",
    "--swa.report_epochs=[5,-5]": "must be positive, got -5",
    "--swa.start_epoch=-1": "got -1",
    "--swa.start_epoch=11": "0 .. swa.num_epochs 10, got 11",
    "--swa.start_epoch=3 --swa.cycle_epochs=2": "3 is not a whole number of cycles of 2 epochs",
    "--swa.cycle_steps=0": "got 0",
    "--swa.cycle_steps=7 --swa.cycle_epochs=2": "both set",
    "--swa.cycle_epochs=5 --swa.schedule=triangular": "must be even, got 5",
    "--swa.cycle_steps=5 --swa.schedule=triangular": "must be even, got 5",
    "--swa.budget_epochs=0 --swa.schedule=three_part": "got 0",
    "--swa.budget_epochs=20": "means nothing to the schedule cyclical",
    "--swa.cosine_start_epoch=-1 --swa.schedule=cosine": "got -1",
    "--swa.cosine_start_epoch=5": "swa.schedule is not cosine",
    "--preprocessing.padding=-1": "got -1",
    "--data.num_held_out=-1": "got -1",
    "--swa.report_epochs=[5] --swa.cycle_epochs=2": "multiples of swa.cycle_epochs 2",
    "--optimizer.momentum=1": "got 1.0",
    "--optimizer.momentum=-0.1": "got -0.1",
    "--optimizer.weight_decay=-1e-4": "got -0.0001",
    "--optimizer.label_smoothing=1": "got 1.0",
    "--optimizer.label_smoothing=-0.1": "got -0.1",
    "--optimizer.nesterov=true --optimizer.momentum=0": "needs a momentum above 0",
    "--batchnorm.num_images=1": "got 1",
    "--evaluation.batch_size=0": "got 0",
    "--speed.max_batch_size_per_device=0": "got 0",
}


@pytest.mark.parametrize(("flags", "reason"), REFUSED.items())
def test_value_out_of_range_is_refused_by_name(flags: str, reason: str):
    """Every value that no run can use is refused in one line that names the setting and says what was given."""
    message = message_of(*flags.split())
    assert flags.removeprefix("--").split("=")[0] in message
    assert reason in message


ACCEPTED = [
    "--seed=9223372036854775807",
    "--global_batch_size=1",
    "--log_every=1",
    "--max_minutes=0.001",
    "--checkpoint.every_minutes=0",
    "--checkpoint.every_minutes=null",
    "--checkpoint.keep=1",
    "--checkpoint.max_failures=1",
    "--processes.silence_seconds=1",
    "--model.num_classes=1",
    "--preprocessing.crop_area=[1,1]",
    "--preprocessing.crop_aspect=[1,1]",
    "--preprocessing.image_size=1 --preprocessing.resize=1",
    "--preprocessing.std=[0.001,1,1]",
    "--data.prefetch=1 --data.num_workers=0 --data.synthetic_num_images=[1,1] --data.max_bad_images=0",
    "--swa.num_epochs=1 --swa.cycle_epochs=1",
    "--swa.num_epochs=6 --swa.cycle_epochs=3 --swa.report_epochs=[3,300]",
    "--swa.lr_min=0 --swa.lr_max=0",
    "--swa.report_epochs=[]",
    "--swa.start_epoch=10",
    "--swa.cycle_steps=7 --swa.report_epochs=[3,4] --swa.num_epochs=9 --swa.start_epoch=5",
    "--swa.cycle_epochs=2 --swa.report_epochs=[2] --swa.schedule=triangular",
    "--swa.schedule=cosine --swa.budget_epochs=1800 --swa.cosine_start_epoch=1600",
    "--swa.schedule=three_part --swa.budget_epochs=1",
    "--preprocessing.padding=0 --preprocessing.train_crop=padded --data.num_held_out=0",
    "--optimizer.momentum=0 --optimizer.weight_decay=0 --optimizer.label_smoothing=0",
    "--batchnorm.num_images=2",
    "--evaluation.batch_size=1",
    "--speed.max_batch_size_per_device=1",
]


@pytest.mark.parametrize("flags", ACCEPTED)
def test_last_usable_value_is_accepted(flags: str):
    """The values at the edge of what can be used are accepted."""
    settings_found = flatten(to_plain(parse(*flags.split())))
    for flag in flags.split():
        name, value = flag.removeprefix("--").split("=")
        found = settings_found[name]
        assert (found if isinstance(found, list) else [found]) == yaml.safe_load(f"[{value.strip('[]')}]")


def test_evaluation_resize_below_the_crop_is_refused():
    """A resize smaller than the crop that is cut from it is refused; an equal one is not."""
    with pytest.raises(InputError, match=r"preprocessing\.resize 31 is smaller than the central crop of 32 pixels"):
        preprocessing(resize=31, image_size=32)
    assert preprocessing(resize=32, image_size=32).resize == 32


@settings(deadline=None)
@given(
    cycle_epochs=st.integers(1, 4),
    num_cycles=st.integers(1, 5),
    start=st.integers(0, 5),
    cycles=st.lists(st.integers(1, 8), max_size=5),
)
def test_epochs_to_report_are_the_asked_ones_and_the_last(cycle_epochs: int, num_cycles: int, start: int, cycles: list[int]):
    """The epochs to report ascend without repetition, are asked for and reached after averaging began, and end with the last
    epoch; where nothing is averaged there are none.
    """
    num_epochs, start_epoch = num_cycles * cycle_epochs, min(start, num_cycles) * cycle_epochs
    asked = tuple(cycle * cycle_epochs for cycle in cycles)
    swa = SwaConfig(num_epochs=num_epochs, cycle_epochs=cycle_epochs, start_epoch=start_epoch, report_epochs=asked)
    wanted = [epoch for epoch in range(start_epoch + 1, num_epochs + 1) if epoch in asked or epoch == num_epochs]
    assert list(swa.epochs_to_report) == wanted
    assert swa.averages == bool(wanted)


def test_configuration_cannot_be_changed():
    """A checked configuration stays as it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().swa.num_epochs = 0  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_the_papers():
    """Without any flag the settings are those of the paper's ImageNet experiment."""
    config = parse()
    assert config == Config()
    assert (config.swa.lr_max, config.swa.lr_min, config.swa.cycle_epochs, config.swa.num_epochs) == (1e-3, 1e-5, 1, 10)
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.global_batch_size) == (0.9, 1e-4, 256)
    assert config.model.name == "resnet50.tv_in1k"


# ------------------------------------------------------------------------------------------------ YAML and flags


def test_later_settings_override_earlier_ones(tmp_path: Path):
    """A file overrides the defaults, what follows overrides the file, and the file what came before it."""
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nswa:\n  lr_max: 1e-2\n  num_epochs: 4\n")
    second = tmp_path / "second.yaml"
    second.write_text("swa:\n  num_epochs: 6\n")
    config = parse("--seed=7", "--config", str(file), "--swa.lr_max=0.5")
    assert (config.seed, config.swa.lr_max, config.swa.num_epochs, config.swa.lr_min) == (1, 0.5, 4, 1e-5)
    config = parse("--config", str(file), "--config", str(second), "--seed=8", "--seed", "9")
    assert (config.seed, config.swa.lr_max, config.swa.num_epochs) == (9, 0.01, 6)


def test_types_of_values(tmp_path: Path):
    """Text of a file becomes the field's type: 1e-3 a number although YAML 1.1 says text, lists tuples, names paths."""
    config = parse_text(
        tmp_path,
        """
        output: results/two words
        trackers: [wandb, mlflow]
        model: {weights: weights.pth, kwargs: {drop_rate: 0.2, block: {sizes: [1, 2]}}}
        preprocessing: {mean: [0, 0.5, 1], interpolation: bicubic}
        swa: {lr_max: 1, lr_min: 1, report_epochs: [10]}
        speed: {tf32: off}
        """,
    )
    assert config.output == Path("results/two words")
    assert config.trackers == ("wandb", "mlflow")
    assert config.model.weights == Path("weights.pth")
    assert config.model.kwargs == {"drop_rate": 0.2, "block": {"sizes": [1, 2]}}
    assert config.preprocessing.mean == (0.0, 0.5, 1.0)
    assert config.swa.report_epochs == (10,)
    assert isinstance(config.swa.lr_min, float)
    assert config.speed.tf32 is False
    assert parse_text(tmp_path, "swa: {lr_max: 1e-2}").swa.lr_max == 0.01


@pytest.mark.parametrize("flags", [["--data.synthetic"], ["--data.synthetic", "--seed=3"], ["--seed=3", "--data.synthetic"]])
def test_a_switch_alone_switches_on(flags: list[str]):
    """`--data.synthetic` without a value means true, wherever it stands."""
    assert parse(*flags).data.synthetic
    assert parse(*flags).seed == (3 if "--seed=3" in flags else 0)


@pytest.mark.parametrize(
    "flags", [["--data.synthetic=false"], ["--data.synthetic", "false"], ["--data.synthetic", "off", "--seed=1"]]
)
def test_a_switch_with_a_value_takes_it(flags: list[str]):
    """A value after a switch decides."""
    assert not parse(*flags).data.synthetic


def test_negative_values_are_not_taken_for_flags():
    """A number below zero after a flag is its value and is judged as such."""
    assert "swa.lr_min" in message_of("--swa.lr_min", "-0.5")


@pytest.mark.parametrize(
    "file",
    sorted([*(PROJECT / "configs").glob("*.yaml"), *(PROJECT / "configs/cifar").glob("*.yaml")]),
    ids=lambda path: path.name,
)
def test_the_projects_own_files_are_valid(file: Path):
    """Every file in configs/ is a configuration, and each of its lines sets what it says."""
    found = flatten(to_plain(parse("--config", str(file))))
    for name, value in flatten(yaml.safe_load(file.read_text())).items():
        wanted = type(found[name])(value) if isinstance(found[name], float) else value
        assert found[name] == wanted


def test_the_project_has_configurations():
    """There are files in configs/ to check."""
    assert list((PROJECT / "configs").glob("*.yaml"))


# ----------------------------------------------------------------------------------------------------- misspellings


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("sede", "seed"),
        ("swa.lr_mx", "swa.lr_max"),
        ("swa.lr-max", "swa.lr_max"),
        ("swaa.lr_max", "swa.lr_max"),
        ("lr_max", "swa.lr_max"),
        ("model.num_class", "model.num_classes"),
        ("data.syntetic", "data.synthetic"),
        ("optimizer.wight_decay", "optimizer.weight_decay"),
    ],
)
def test_misspelt_setting_is_refused_with_the_nearest_name(tmp_path: Path, misspelt: str, meant: str):
    """A setting that does not exist is named, with the one that was meant, as a flag as well as in a file."""
    *section, name = misspelt.split(".")
    line = f"{section[0]}: {{{name}: 1}}" if section else f"{name}: 1"
    for message in (message_of(f"--{misspelt}=1"), message_of(f"--{misspelt}", "1"), message_of_text(tmp_path, line)):
        assert f"unknown setting {misspelt}" in message
        assert f"did you mean {meant}?" in message


def test_setting_like_no_other_is_refused_without_a_guess(tmp_path: Path):
    """Where nothing is near, no name is suggested."""
    for message in (message_of("--zzzzzz=1"), message_of_text(tmp_path, "zzzzzz: 1")):
        assert "unknown setting zzzzzz" in message
        assert "did you mean" not in message


@pytest.mark.parametrize(
    "line",
    [
        "seed: one",
        "seed: 1.5",
        "seed: true",
        "seed: null",
        "seed: [1]",
        "output: 3",
        "resume: always",
        "trackers: wandb",
        "trackers: [paper]",
        "model: {library: keras}",
        "model: {name: 5}",
        "model: {kwargs: 3}",
        "preprocessing: {mean: [0.1, 0.2]}",
        "preprocessing: {mean: 0.5}",
        "preprocessing: {crop_area: null}",
        "preprocessing: {interpolation: nearest}",
        "preprocessing: {resize: 256.5}",
        "data: {synthetic: maybe}",
        "data: {synthetic: 1}",
        "data: {synthetic_num_images: [1, 2, 3]}",
        "swa: {lr_max: fast}",
        "swa: {lr_max: null}",
        "swa: {report_epochs: 5}",
        "swa: {report_epochs: [five]}",
        "swa: 3",
        "swa: [1]",
        "swa: null",
    ],
)
def test_wrong_type_is_refused_by_name(tmp_path: Path, line: str):
    """A value of another type, a blank one included, is refused in one line that names the setting."""
    ((name, value),) = yaml.safe_load(line).items()
    if isinstance(value, dict):
        name = f"{name}.{next(iter(value))}"
    assert name in message_of_text(tmp_path, line)


def test_wrong_type_as_flag_is_refused_by_name():
    """Flags are held to the same types as files, and need a value unless they are switches."""
    assert "seed" in message_of("--seed=x")
    assert "seed" in message_of("--seed")
    assert "data.synthetic" in message_of("--data.synthetic", "maybe")
    assert "stray" in message_of("stray")
    assert "swa" in message_of("--swa", "3")


def test_unusable_file_is_refused(tmp_path: Path):
    """A missing file, a folder, broken or empty YAML, a list and bytes that are no text are refused in one line each."""
    assert "nowhere.yaml" in message_of("--config", "nowhere.yaml")
    assert str(tmp_path) in message_of("--config", str(tmp_path))
    assert "line 2" in message_of_text(tmp_path, "seed: [")
    for text in ("", "# comment", "just text", "- seed", "swa:"):
        assert "holds no settings" in message_of_text(tmp_path, text)
    assert len(message_of_text(tmp_path, "word " * 100_000)) < 300
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"seed: \xff\xfe\x00")
    assert "not UTF-8 text" in message_of("--config", str(file))


# ------------------------------------------------------------------------------------------------- saved and loaded


# Names as people give them, odd ones included, that begin with a letter: jsonargparse reads some signs alone, `?` or `1e5`, as
# YAML of its own, and `null` as no path.
NAMES = st.from_regex(r"[a-zA-Zé日/][\w .,:#'\"=+~!*@&%\[\]{}/-]{0,12}", fullmatch=True)
NAMES_OR_NONE = st.none() | NAMES.filter(lambda name: name.lower() != "null")
PATHS = NAMES_OR_NONE.map(lambda name: None if name is None else Path(name))
POSITIVE = st.floats(1e-12, 1e6)
TRIPLES = st.none() | st.tuples(POSITIVE, POSITIVE, POSITIVE)
SIZES = st.none() | st.integers(1, 10_000)
PLAIN = st.recursive(
    st.booleans() | st.integers(-1000, 1000) | st.floats(-1e9, 1e9) | st.sampled_from(["relu", "same padding"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=5,
)
PRECISIONS = st.sampled_from(["fp32", "bf16", "fp16"])


def ranges(highest: float) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(st.floats(1e-6, highest), st.floats(1e-6, highest)).map(lambda pair: tuple(sorted(pair)))


CONFIGS = st.builds(
    Config,
    output=NAMES.map(Path),
    seed=st.integers(0, 2**63 - 1),
    global_batch_size=st.integers(1, 10_000),
    resume=st.sampled_from(["auto", "never"]),
    allow_changed=st.lists(st.sampled_from(["swa.lr_max", "training images"]), max_size=2).map(tuple),
    max_minutes=st.none() | st.floats(1e-3, 1e6),
    checkpoint=st.builds(
        CheckpointConfig,
        every_minutes=st.none() | st.floats(0, 1e6),
        keep=st.integers(1, 100),
        in_background=st.booleans(),
        max_failures=st.integers(1, 100),
    ),
    processes=st.builds(ProcessesConfig, silence_seconds=st.floats(1, 1e6), collective_minutes=st.floats(0.1, 1e6)),
    log_every=st.integers(1, 100),
    trackers=st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), max_size=3).map(tuple),
    model=st.builds(
        ModelConfig,
        library=st.sampled_from(["timm", "torchvision"]),
        name=NAMES | st.sampled_from(["5", "true", "null", "~", "0x10", "2020-01-01", "a: b", "[x]", "resnet50.tv_in1k"]),
        pretrained=st.booleans(),
        weights=PATHS,
        num_classes=st.integers(1, 30_000),
        kwargs=st.dictionaries(st.sampled_from(["drop_rate", "act_layer", "block_args"]), PLAIN, max_size=3),
        freeze_batchnorm=st.booleans(),
        sync_batchnorm=st.booleans(),
    ),
    preprocessing=st.builds(
        PreprocessingConfig,
        image_size=SIZES,
        resize=SIZES,
        interpolation=st.sampled_from([None, "bilinear", "bicubic"]),
        train_interpolation=st.sampled_from(["bilinear", "bicubic"]),
        mean=TRIPLES,
        std=TRIPLES,
        crop_area=ranges(1.0),
        crop_aspect=ranges(100.0),
        horizontal_flip=st.booleans(),
    ),
    data=st.builds(
        DataConfig,
        train=NAMES_OR_NONE | st.sampled_from(["s3://bucket/train-*.tar", "/data/train-{0000..1023}.tar"]),
        train_list=NAMES_OR_NONE,
        val=NAMES_OR_NONE,
        val_list=NAMES_OR_NONE,
        index=PATHS,
        quarantine=PATHS,
        on_bad_image=st.sampled_from(["stop", "skip"]),
        max_bad_images=st.integers(0, 10**7),
        synthetic=st.booleans(),
        synthetic_num_images=st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)),
        backend=st.sampled_from(["dali", "torchvision"]),
        decode=st.sampled_from(["auto", "cpu", "gpu"]),
        resize=st.sampled_from(["auto", "compiled", "dali"]),
        num_workers=st.none() | st.integers(0, 100),
        prefetch=st.integers(1, 10),
    ),
    swa=st.builds(
        SwaConfig,
        num_epochs=st.just(12),
        schedule=st.sampled_from(["cyclical", "constant"]),
        lr_min=st.floats(0, 1e-3),
        lr_max=st.floats(1e-3, 1e3),
        cycle_epochs=st.sampled_from([1, 2, 3]),
        include_pretrained=st.booleans(),
        report_epochs=st.lists(st.sampled_from([6, 12, 600]), max_size=3).map(tuple),
    ),
    optimizer=st.builds(
        OptimizerConfig,
        momentum=st.floats(0.1, 0.99),
        nesterov=st.booleans(),
        weight_decay=st.floats(0, 1),
        decay_norm_and_bias=st.booleans(),
        label_smoothing=st.floats(0, 0.9),
    ),
    batchnorm=st.builds(BatchNormConfig, num_images=st.none() | st.integers(2, 10**7)),
    evaluation=st.builds(EvaluationConfig, batch_size=st.integers(1, 1000), precision=PRECISIONS, captures=st.booleans()),
    speed=st.builds(
        SpeedConfig,
        precision=PRECISIONS,
        tf32=st.booleans(),
        channels_last=st.booleans(),
        compile=st.booleans(),
        fused_optimizer=st.booleans(),
        max_batch_size_per_device=st.integers(1, 10_000),
    ),
)


@settings(deadline=None, max_examples=50)
@given(config=CONFIGS)
@example(config=Config())
def test_saved_configuration_gives_the_same_one(tmp_path_factory: pytest.TempPathFactory, config: Config):
    """What a run saves of its configuration loads as an equal configuration."""
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    file.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")
    assert parse("--config", str(file)) == config


def test_printed_configuration_gives_the_same_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What --print_config shows is a file that gives the same run."""
    flags = ["--seed=3", "--swa.lr_max=0.05", "--data.synthetic", "--trackers=[wandb]", "--model.kwargs={drop_rate: 0.1}"]
    with pytest.raises(SystemExit) as caught:
        parse(*flags, "--print_config")
    assert caught.value.code in (None, 0)
    assert parse_text(tmp_path, capsys.readouterr().out) == parse(*flags)


# One other value for every setting there is.
OTHER_VALUES = {
    "output": "elsewhere",
    "seed": "1",
    "global_batch_size": "8",
    "resume": "never",
    "allow_changed": "[seed]",
    "max_minutes": "90",
    "log_every": "1",
    "trackers": "[wandb]",
    "model.library": "torchvision",
    "model.name": "resnet18",
    "model.pretrained": "false",
    "model.weights": "file.pth",
    "model.num_classes": "10",
    "model.kwargs": "{drop_rate: 0.2}",
    "model.freeze_batchnorm": "true",
    "model.sync_batchnorm": "true",
    "preprocessing.image_size": "32",
    "preprocessing.resize": "32",
    "preprocessing.interpolation": "bicubic",
    "preprocessing.train_interpolation": "bicubic",
    "preprocessing.train_crop": "padded",
    "preprocessing.padding": "2",
    "preprocessing.mean": "[0,0,0]",
    "preprocessing.std": "[1,1,1]",
    "preprocessing.crop_area": "[0.5,1]",
    "preprocessing.crop_aspect": "[1,1]",
    "preprocessing.horizontal_flip": "false",
    "data.train": "folder",
    "data.train_list": "list.txt",
    "data.val": "folder",
    "data.val_list": "list.txt",
    "data.index": "folder",
    "data.quarantine": "bad.tsv",
    "data.on_bad_image": "skip",
    "data.max_bad_images": "7",
    "data.num_held_out": "5",
    "data.synthetic": "true",
    "data.synthetic_num_images": "[3,4]",
    "data.backend": "torchvision",
    "data.decode": "cpu",
    "data.resize": "dali",
    "data.num_workers": "3",
    "data.prefetch": "3",
    "swa.num_epochs": "20",
    "swa.start_epoch": "5",
    "swa.schedule": "constant",
    "swa.lr_max": "0.1",
    "swa.lr_min": "1e-6",
    "swa.cycle_epochs": "5",
    "swa.cycle_steps": "7",
    "swa.budget_epochs": "30",
    "swa.cosine_start_epoch": "3",
    "swa.include_pretrained": "false",
    "swa.report_epochs": "[1]",
    "optimizer.momentum": "0.8",
    "optimizer.nesterov": "true",
    "optimizer.weight_decay": "0.1",
    "optimizer.decay_norm_and_bias": "false",
    "optimizer.label_smoothing": "0.1",
    "batchnorm.num_images": "100",
    "evaluation.batch_size": "3",
    "evaluation.precision": "bf16",
    "evaluation.captures": "false",
    "speed.precision": "bf16",
    "speed.tf32": "false",
    "speed.channels_last": "false",
    "speed.compile": "true",
    "speed.fused_optimizer": "false",
    "speed.max_batch_size_per_device": "3",
    "checkpoint.every_minutes": "5",
    "checkpoint.keep": "3",
    "checkpoint.in_background": "false",
    "checkpoint.max_failures": "5",
    "processes.silence_seconds": "30",
    "processes.collective_minutes": "10",
}
# What else has to be set where these are.
NEEDED = {"swa.budget_epochs": ["--swa.schedule=cosine"], "swa.cosine_start_epoch": ["--swa.schedule=cosine"]}
# What may change between the two halves of a run without changing its training, and where the images are: what they are is
# for their fingerprints to say.
FREE_TO_CHANGE = {
    *("output", "resume", "allow_changed", "max_minutes", "log_every", "trackers", "data.num_workers", "data.prefetch"),
    *("data.train", "data.train_list", "data.val", "data.val_list", "data.index", "data.quarantine", "data.decode"),
    *("data.on_bad_image", "data.max_bad_images", "data.resize"),
    *("swa.include_pretrained", "swa.report_epochs", "evaluation.captures"),
    *("checkpoint.every_minutes", "checkpoint.keep", "checkpoint.in_background", "checkpoint.max_failures"),
    *("processes.silence_seconds", "processes.collective_minutes"),
}


def test_every_setting_has_a_flag():
    """The table of other values above names every setting there is."""
    assert set(OTHER_VALUES) == set(flatten(to_plain(Config())))


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_settings_that_decide_the_result_must_agree(name: str):
    """Every setting but those free to change shows, under its own name alone, in what a resumed run has to agree in."""
    needed = NEEDED.get(name, [])
    unchanged, changed = parse(*needed), parse(*needed, f"--{name}={OTHER_VALUES[name]}")
    assert changed != unchanged
    before, after = unchanged.result_settings(), changed.result_settings()
    different = {key for key in before | after if before.get(key) != after.get(key)}
    if name in FREE_TO_CHANGE:
        assert different == set()
        assert name not in after
    else:
        assert different == ({name, "model.kwargs.drop_rate"} if name == "model.kwargs" else {name})


def test_flatten_joins_names_with_dots():
    """Nested settings become dotted names; an empty dict stays a value."""
    assert flatten({"a": 1, "b": {"c": {"d": [2]}, "e": {}}}) == {"a": 1, "b.c.d": [2], "b.e": {}}


# ------------------------------------------------------------------------------------------------------------ help


def texts_under_fields() -> list[str]:
    """The string below each annotated field of the classes that make up a Config, read from the source."""
    sources = [path.read_text() for path in sorted(Path(config_module.__file__).parent.glob("*.py"))]
    texts = []
    for node in [node for source in sources for node in ast.parse(source).body]:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for field, text in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts.append(str(ast.literal_eval(text.value)))
    return texts


def test_help_shows_the_text_under_every_field(monkeypatch: pytest.MonkeyPatch):
    """The text under a field is its help text; sections are fields without one."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["imagenet-swa"])
    shown = " ".join(parser_for_config("imagenet-swa train", "").format_help().split())
    texts = texts_under_fields()
    assert len(texts) == len(OTHER_VALUES)
    for text in texts:
        assert " ".join(text.split()) in shown


def test_description_of_preprocessing():
    """The line for people names both resizes, the crop, the flip and the normalisation."""
    described = preprocessing(interpolation="bicubic", horizontal_flip=False, mean=(0.5, 0.25, 0.125)).describe()
    for part in ("resize 36 bicubic", "central crop 32", "0.08-1 of the area", "bilinear", "no flip", "mean 0.5 0.25 0.125"):
        assert part in described
