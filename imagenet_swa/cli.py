"""The commands: parse, call, exit code. What a command needs is imported when it runs."""

import dataclasses
import difflib
import errno
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from imagenet_swa import __version__
from imagenet_swa.config import Config, InputError, TrainingError, require

USAGE = f"""imagenet-swa {__version__}: make pretrained ImageNet networks better by Stochastic Weight Averaging

usage: imagenet-swa COMMAND [--config FILE] [--section.setting VALUE ...]

commands:
  train     fine-tune, average, recompute BatchNorm, evaluate, report
            (on several GPUs: accelerate launch -m imagenet_swa.train --config FILE)
  evaluate  top-1, top-5 and NLL of the configured network, or of --model.weights FILE
  report    imagenet-swa report RUN [RUN ...]: the result table of a run folder, or one line per run of several
  doctor    check configuration, data, launcher, GPUs, DALI and disk, and measure the pretrained baseline
            (--skip_baseline leaves the measurement out)

imagenet-swa COMMAND --help lists every setting; --print_config shows the configuration that results.
exit codes: 0 done, 1 failed, 2 unusable input, 130 interrupted
"""


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
        return _fail(130, "interrupted; the same command goes on from the last checkpoint")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(1, f"{error.strerror}{where}; checkpoints already written are whole, and the same command goes on from them")
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
        from imagenet_swa.report import COLUMNS, load_run, table_rows

        _print_table(COLUMNS, table_rows(load_run(config.output)))
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
    from imagenet_swa.report import COLUMNS, RUN_COLUMNS, compare_runs, load_run, table_rows, write_report

    runs = [load_run(Path(folder)) for folder in arguments]
    if len(runs) == 1:
        _print_table(COLUMNS, table_rows(runs[0]))
        print(f"report: {write_report(runs[0].folder)}")
    else:
        _print_table(RUN_COLUMNS, compare_runs(runs))
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    skip_baseline = "--skip_baseline" in arguments
    rest = [argument for argument in arguments if argument != "--skip_baseline"]
    config = parse_config(rest, "imagenet-swa doctor", "Check everything that a run needs. --skip_baseline: no measurement.")
    from imagenet_swa.doctor import examine

    return 0 if examine(config, measure_baseline=not skip_baseline) else 1


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout, without the columns that are empty in every row."""
    from rich.console import Console
    from rich.table import Table

    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table()
    for i in kept:
        table.add_column(columns[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[row[i] for i in kept])
    # Wide enough for every cell where the output is a file, whatever terminal it came from.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "doctor": _doctor,
}


# ------------------------------------------------------------------------------------------ flags and YAML -> Config


def parser_for_config(prog: str, description: str) -> Any:
    """A jsonargparse parser: `--config FILE`, a flag for every field, `--print_config`, help from the docstrings."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of settings; later flags override it.")
    parser.add_class_arguments(Config)
    return parser


def parse_config(arguments: Sequence[str], prog: str, description: str) -> Config:
    """Flags and the YAML files they name as a checked `Config`.

    Raises:
        InputError: a misspelt key, a wrong type, a value out of range, or a file that cannot be read.
        SystemExit: after `--help` or `--print_config`.
    """
    parser = parser_for_config(prog, description)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.parse_args(_with_explicit_true(arguments))
            _check_filled(namespace)
            values = dict(parser.instantiate(namespace))
    except ArgumentError as error:
        raise InputError(_one_line(str(error))) from None
    except UnicodeDecodeError as error:
        raise InputError(f"the configuration file is not UTF-8 text: {error}") from None
    values.pop("config")
    return Config(**values)


def _field_names(cls: Any = Config, prefix: str = "", only_bool: bool = False) -> list[str]:
    names: list[str] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            names += _field_names(f.type, f"{prefix}{f.name}.", only_bool)
        elif f.type is bool or not only_bool:
            names.append(prefix + f.name)
    return names


def _check_filled(namespace: Any, cls: Any = Config, prefix: str = "") -> None:
    """jsonargparse lets an empty value through for every setting, and any value for a whole section."""
    for f in dataclasses.fields(cls):
        name, value = prefix + f.name, namespace[f.name]
        if dataclasses.is_dataclass(f.type):
            require(hasattr(value, "get"), f"{name} is a section, got {value!r}; wanted its settings, indented, below `{name}:`")
            _check_filled(value, f.type, f"{name}.")
        else:
            require(value is not None or type(None) in get_args(f.type), f"{name} is empty; give a value or leave it out")


def _with_explicit_true(arguments: Sequence[str]) -> list[str]:
    """`--data.synthetic` alone means `--data.synthetic=true`, as people write switches."""
    switches = {f"--{name}" for name in _field_names(only_bool=True)}
    pairs = zip(arguments, [*arguments, "--"][1:], strict=True)
    return [a + "=true" if a in switches and b.startswith("-") else a for a, b in pairs]


def _one_line(message: str) -> str:
    """jsonargparse's message as one line, with the nearest setting's name where a key was not known."""
    message = re.sub(r"\s*\n\s*", " ", message.strip()).replace('Parser key "', '"').replace("<class '", "").replace("'>", "")
    if message.startswith("Unexpected config:"):
        return f"the configuration file holds no settings; wanted lines such as `seed: 1`, got {message[19:79]!r}"
    unknown = re.search(
        r"unrecognized arguments: --([\w.-]+)|Group '([\w.]+)' does not accept option '([^']+)'|[Oo]ption '([^']+)'", message
    )
    if unknown:
        flag, group, option, alone = unknown.groups()
        key = flag or (f"{group}.{option}" if group else alone)
        near = difflib.get_close_matches(key, _field_names(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown setting {key}{hint} (all settings: imagenet-swa train --help)"
    return message
