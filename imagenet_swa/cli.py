"""The commands: parse, call, exit code. What a command needs is imported when it runs."""

import dataclasses
import difflib
import errno
import os
import re
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from imagenet_swa import __version__
from imagenet_swa.config import Config, InputError, TrainingError, require

T = TypeVar("T")

USAGE = f"""imagenet-swa {__version__}: make pretrained ImageNet networks better by Stochastic Weight Averaging

usage: imagenet-swa COMMAND [--config FILE] [--section.setting VALUE ...]

commands:
  train     fine-tune, average, recompute BatchNorm, evaluate, report
            (on several GPUs: accelerate launch -m imagenet_swa.train --config FILE)
  evaluate  top-1, top-5 and NLL of the configured network, or of --model.weights FILE
  report    imagenet-swa report RUN [RUN ...]: the result table of a run folder, or one line per run of several
  index     list the images of data.train and data.val once, into a file beside them or in data.index, which every run
            then starts from (--rebuild after the data changed)
  verify    look at every image, decode them with --full; a report, and a list of bad images for data.quarantine
  prepare   imagenet-swa prepare SOURCE OUTPUT: official archives, parquet, folders, lists or shards to tar shards or folders,
            smaller or with restart markers if wanted
  bench     imagenet-swa bench loader: images/s of our loader and its alternatives on your data
  doctor    check configuration, data, launcher, GPUs, DALI and disk, and measure the pretrained baseline
            (--skip_baseline leaves the measurement out)

imagenet-swa COMMAND --help lists every setting; --print_config shows the configuration that results.
exit codes: 0 done, 1 failed, 2 unusable input, 130 interrupted
"""


_GOES_ON = {
    "train": "; checkpoints already written are whole, and the same command goes on from the last one",
    "prepare": "; what was written is whole, and the same command goes on with the rest",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(__version__)
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        return _fail(2, f"unknown command {arguments[0]!r}; wanted one of {', '.join(COMMANDS)}")
    try:
        return command(arguments[1:])
    except InputError as error:
        return _fail(2, str(error), every_rank=error.concerns_one_rank)
    except KeyboardInterrupt:
        return _fail(130, f"interrupted{_GOES_ON.get(arguments[0], '')}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(1, f"{error.strerror}{where}{_GOES_ON.get(arguments[0], '')}")
    except TrainingError as error:
        return _fail(1, str(error))


def _fail(code: int, message: str, *, every_rank: bool = False) -> int:
    """Say why on stderr, once per machine unless only this rank knows."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        rank = f" [rank {os.environ['RANK']}]" if every_rank and "RANK" in os.environ else ""
        print(f"imagenet-swa: error{rank}: {message}", file=sys.stderr, flush=True)
    return code


def _train(arguments: Sequence[str]) -> int:
    config = parse_config(arguments, "imagenet-swa train", "Fine-tune, average, recompute BatchNorm, evaluate, report.")
    from imagenet_swa.finetune import finetune

    report = finetune(config)
    if os.environ.get("RANK", "0") == "0":
        from imagenet_swa.report import COLUMNS, load_run, print_table, table_rows

        print_table(COLUMNS, table_rows(load_run(config.output)))
        print(f"run folder: {config.output}")
        print(f"plot:       {config.output / 'trajectory.png'}")
        print(f"report:     {report}")
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    config = parse_config(arguments, "imagenet-swa evaluate", "Evaluate the configured network on the validation images.")
    from imagenet_swa.session import evaluate_network

    summary = evaluate_network(config).summary()
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{config.model.weights or config.model.name}: top-1 {100 * summary['top1']:.2f} % "
            f"({summary['num_correct']} of {summary['num_images']}), top-5 {100 * summary['top5']:.2f} % "
            f"({summary['num_correct_top5']}), NLL {summary['nll']:.4f}"
        )
    return 0


def _report(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: imagenet-swa report RUN [RUN ...]")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    from imagenet_swa.report import COLUMNS, RUN_COLUMNS, compare_runs, load_run, print_table, table_rows, write_report

    runs = [load_run(Path(folder)) for folder in arguments]
    if len(runs) == 1:
        print_table(COLUMNS, table_rows(runs[0]))
        print(f"report: {write_report(runs[0].folder)}")
    else:
        print_table(RUN_COLUMNS, compare_runs(runs))
    return 0


def _index(arguments: Sequence[str]) -> int:
    rebuild = "--rebuild" in arguments
    rest = [argument for argument in arguments if argument != "--rebuild"]
    about = "List the images of data.train and data.val into files that every run starts from. --rebuild: list them again."
    config = parse_config(rest, "imagenet-swa index", about)
    require((config.data.train, config.data.val) != (None, None), "data.train and data.val are not set; set one or both")
    from imagenet_swa.data.index_cache import build_index, find_index, index_path
    from imagenet_swa.data.sources import progress_bar, source_of

    for split in ("train", "val"):
        if getattr(config.data, split) is None:
            continue
        source, start = source_of(config.data, split), time.perf_counter()
        index = None if rebuild else find_index(source, config.data.index)
        verb = "built" if index is None else "found as it was built before"
        if index is None:
            index, _ = build_index(source, config.data.index, num_classes=config.model.num_classes, track=progress_bar)
        print(
            f"{split}: {len(index):,} images with {len(set(index.labels.tolist())):,} labels, "
            f"fingerprint {index.fingerprint[:16]}, {verb} in {time.perf_counter() - start:.1f} s: "
            f"{index_path(source, config.data.index)}"
        )
    return 0


def _verify(arguments: Sequence[str]) -> int:
    from imagenet_swa.data.sources import progress_bar
    from imagenet_swa.data.verify import VerifySettings, verify

    arguments = [f"--verify.{a[2:]}" if a == "--full" or a.startswith("--full=") else a for a in arguments]
    about = "Look at every image of data.train and data.val; --full decodes them. Writes a report and a quarantine list."
    config, settings = parse_config_and("verify", VerifySettings, arguments, "imagenet-swa verify", about)
    return 0 if verify(config, settings, track=progress_bar).healthy else 1


def _prepare(arguments: Sequence[str]) -> int:
    from imagenet_swa.data.prepare import PrepareSettings, prepare
    from imagenet_swa.data.sources import progress_bar

    positional = [word for word in arguments[:2] if not word.startswith("-")]
    if not arguments:
        raise InputError("wanted `imagenet-swa prepare SOURCE OUTPUT [--setting VALUE ...]` (all settings: --help)")
    named = [f"--{name}={word}" for name, word in zip(("source", "output"), positional, strict=False)]
    about = "Tar shards or class folders with an index from any source: imagenet-swa prepare SOURCE OUTPUT [--setting VALUE ...]"
    settings = parse_settings(PrepareSettings, [*named, *arguments[len(positional) :]], "imagenet-swa prepare", about)
    prepare(settings, track=progress_bar)
    return 0


def _bench(arguments: Sequence[str]) -> int:
    from imagenet_swa.bench import BenchSettings, bench_loader
    from imagenet_swa.bench.results import COLUMNS, absent_lines, table_rows
    from imagenet_swa.report import print_table

    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["loader", "--help"]
    if not arguments or arguments[0] != "loader":
        raise InputError(f"wanted `imagenet-swa bench loader`, got {' '.join(arguments[:1]) or 'nothing after bench'}")
    about = "Our loader and its alternatives on data.train and data.val, side by side, as ratios."
    rest, prog = arguments[1:], "imagenet-swa bench loader"
    config, settings = parse_config_and("bench", BenchSettings, rest, prog, about)
    variants = {}
    for name, flags in settings.flags_of_variants().items():
        variants[name], _ = parse_config_and("bench", BenchSettings, [*rest, *flags], prog, about)
    record = bench_loader(config, settings, variants)
    print_table(COLUMNS, table_rows(record))
    for line in absent_lines(record):
        print(f"not measured: {line}")
    print(f"bench folder: {settings.output}")
    return 130 if record["interrupted"] else 0 if record["summary"] else 1


def _doctor(arguments: Sequence[str]) -> int:
    skip_baseline = "--skip_baseline" in arguments
    rest = [argument for argument in arguments if argument != "--skip_baseline"]
    config = parse_config(rest, "imagenet-swa doctor", "Check everything that a run needs. --skip_baseline: no measurement.")
    from imagenet_swa.doctor import examine

    return 0 if examine(config, measure_baseline=not skip_baseline) else 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "index": _index,
    "verify": _verify,
    "prepare": _prepare,
    "bench": _bench,
    "doctor": _doctor,
}


# ---------------------------------------------------------------------------------------- flags and YAML -> dataclasses


def parser_for_config(prog: str, description: str, **groups: type) -> Any:
    """A jsonargparse parser: `--config FILE`, a flag for every field, `--print_config`, help from the docstrings.

    `groups` are dataclasses of further settings, each under the name that it is given by.
    """
    parser = _bare_parser(prog, description)
    parser.add_class_arguments(Config)
    for name, cls in groups.items():
        parser.add_class_arguments(cls, name)
    return parser


def _bare_parser(prog: str, description: str) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of settings; later flags override it.")
    return parser


def parse_config(arguments: Sequence[str], prog: str, description: str) -> Config:
    """Flags and the YAML files they name as a checked `Config`.

    Raises:
        InputError: a misspelt key, a wrong type, a value out of range, or a file that cannot be read.
        SystemExit: after `--help` or `--print_config`.
    """
    return Config(**_parse(parser_for_config(prog, description), arguments, Config))


def parse_config_and(name: str, cls: type[T], arguments: Sequence[str], prog: str, description: str) -> tuple[Config, T]:
    """`parse_config`, and settings of another dataclass given as `--name.field`."""
    values = _parse(parser_for_config(prog, description, **{name: cls}), arguments, Config, {name: cls})
    settings = values.pop(name)
    return Config(**values), settings


def parse_settings(cls: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """Settings of one dataclass alone, given as `--field`."""
    parser = _bare_parser(prog, description)
    parser.add_class_arguments(cls)
    return cls(**_parse(parser, arguments, cls))


def _parse(parser: Any, arguments: Sequence[str], cls: type, groups: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Values of the fields of `cls`, and an instance for each group."""
    names = _field_names(cls) + [f"{group}.{name}" for group, of in (groups or {}).items() for name in _field_names(of)]
    switches = _field_names(cls, only_bool=True)
    switches += [f"{group}.{name}" for group, of in (groups or {}).items() for name in _field_names(of, only_bool=True)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.parse_args(_with_explicit_true(arguments, switches))
            _check_filled(namespace, cls)
            for name, group in (groups or {}).items():
                _check_filled(namespace[name], group, f"{name}.")
            values = dict(parser.instantiate(namespace))
    except ArgumentError as error:
        raise InputError(_one_line(str(error), names, parser.prog)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"the configuration file is not UTF-8 text: {error}") from None
    values.pop("config")
    return values


def _field_names(cls: Any, prefix: str = "", only_bool: bool = False) -> list[str]:
    names: list[str] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            names += _field_names(f.type, f"{prefix}{f.name}.", only_bool)
        elif f.type is bool or not only_bool:
            names.append(prefix + f.name)
    return names


def _check_filled(namespace: Any, cls: Any, prefix: str = "") -> None:
    """jsonargparse lets an empty value through for every setting, and any value for a whole section."""
    for f in dataclasses.fields(cls):
        name, value = prefix + f.name, namespace[f.name]
        if dataclasses.is_dataclass(f.type):
            require(hasattr(value, "get"), f"{name} is a section, got {value!r}; wanted its settings, indented, below `{name}:`")
            _check_filled(value, f.type, f"{name}.")
        else:
            optional = type(None) in get_args(f.type) or f.default is dataclasses.MISSING
            require(value is not None or optional, f"{name} is empty; give a value or leave it out")


def _with_explicit_true(arguments: Sequence[str], switches: Sequence[str]) -> list[str]:
    """`--data.synthetic` alone means `--data.synthetic=true`, as people write switches."""
    flags = {f"--{name}" for name in switches}
    pairs = zip(arguments, [*arguments, "--"][1:], strict=True)
    return [a + "=true" if a in flags and b.startswith("-") else a for a, b in pairs]


_PLAINER = (
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.+), NoneType\] Errors: .* Given value: ",
        r"Expected \1. Got value: ",
    ),
    (r"Expected a typing\.Literal\[", "Expected one of ["),
)


def _one_line(message: str, names: Sequence[str], prog: str) -> str:
    """jsonargparse's message as one line, with the nearest setting's name where a key was not known."""
    message = re.sub(r"\s*\n\s*", " ", message.strip()).replace('Parser key "', '"').replace("<class '", "").replace("'>", "")
    for pattern, plain in _PLAINER:
        message = re.sub(pattern, plain, message)
    if message.startswith("Unexpected config:"):
        return f"the configuration file holds no settings; wanted lines such as `seed: 1`, got {message[19:79]!r}"
    unknown = re.search(
        r"unrecognized arguments: --([\w.-]+)|Group '([\w.]+)' does not accept option '([^']+)'|[Oo]ption '([^']+)'", message
    )
    if unknown:
        flag, group, option, alone = unknown.groups()
        key = flag or (f"{group}.{option}" if group else alone)
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown setting {key}{hint} (all settings: {prog} --help)"
    return message
