"""Flags and YAML files -> checked settings; the parser's complaints as one line."""

import dataclasses
import difflib
import json
import re
import warnings
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import yaml

from imagenet_swa.config import Config, InputError, require
from imagenet_swa.plain import MAX_YAML_BYTES, check_yaml, parse_yaml, printable, read_text

T = TypeVar("T")
RETIRED = frozenset({"checkpoints_to_keep"})  # settings of earlier versions


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
    _refuse_harmful_yaml()
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of settings; later flags override it.")
    return parser


@cache
def _refuse_harmful_yaml() -> None:
    """What the parser reads, files and flags, is looked through first: it would follow aliases and nesting without end."""
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def load_checked(text: str) -> Any:
        check_yaml(text)
        try:
            return load(text)
        except ValueError as error:  # of a number of thousands of digits
            raise yaml.YAMLError(str(error)) from None

    set_loader("yaml", load_checked, (yaml.YAMLError,))


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


def parse_run_and(name: str, cls: type[T], arguments: Sequence[str], prog: str, description: str) -> tuple[Config, T]:
    """`RUN [--name.field VALUE ...] [--setting VALUE ...]`: the configuration of a finished run with the flags laid over it,
    and settings of another dataclass. Of its network only the architecture is asked for, and `output` is the run's folder.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        if arguments:
            return parse_config_and(name, cls, ["--help"], f"{prog} RUN", description)
        raise InputError(f"wanted `{prog} RUN [--{name}.setting VALUE ...]` (all settings: {prog} --help)")
    require(not arguments[0].startswith("-"), f"wanted the run's folder first, got {arguments[0]}: {prog} RUN [...]")
    folder = Path(arguments[0])
    file = folder / "config.yaml"
    require(file.is_file(), f"{folder} is no run: {file} is missing")
    with _without_retired(file) as current:
        config, settings = parse_config_and(name, cls, [f"--config={current}", *arguments[1:]], prog, description)
    model = replace(config.model, weights=None, pretrained=False)
    return replace(config, model=model, output=folder), settings


@contextmanager
def _without_retired(file: Path) -> Iterator[Path]:
    """A run's configuration without the settings that only earlier versions had, which decided no result."""
    try:
        settings = parse_yaml(read_text(file, MAX_YAML_BYTES))
    except (OSError, ValueError):
        settings = None  # the parser says what is wrong with it
    if not isinstance(settings, dict) or RETIRED.isdisjoint(settings):
        yield file
        return
    with TemporaryDirectory() as folder:
        current = Path(folder) / file.name
        current.write_text(json.dumps({key: value for key, value in settings.items() if key not in RETIRED}))
        yield current


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
    sections = [f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)]
    _check_files(arguments, {f"--{name}" for name in ("config", *sections, *(groups or {}))})
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


def _check_files(arguments: Sequence[str], flags: Collection[str]) -> None:
    """Refuse files that are no configuration before they are read into memory."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if flag in flags and path.is_file() and path.stat().st_size > MAX_YAML_BYTES:
            raise InputError(f"{flag} {path} has more than {MAX_YAML_BYTES:,} bytes; wanted a file of settings")
        require(flag not in flags or not path.is_char_device(), f"{flag} {path} is a device; wanted a file of settings")


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
    message = (
        printable(re.sub(r"\s*\n\s*", " ", message.strip()))
        .replace('Parser key "', '"')
        .replace("<class '", "")
        .replace("'>", "")
    )
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
