"""The commands: parse, call, exit code. What a command needs is imported when it runs."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from imagenet_swa import __version__, status
from imagenet_swa.arguments import parse_config, parse_config_and, parse_run_and, parse_settings
from imagenet_swa.config import InputError, require
from imagenet_swa.ending import BAD_INPUT, end, exit_code_of
from imagenet_swa.stop import request

T = TypeVar("T")

USAGE = f"""imagenet-swa {__version__}: make pretrained ImageNet networks better by Stochastic Weight Averaging

usage: imagenet-swa COMMAND [--config FILE] [--section.setting VALUE ...]

a run:
  train      fine-tune, average, recompute BatchNorm, evaluate, report
             (on several GPUs: accelerate launch -m imagenet_swa.train --config FILE)
  evaluate   top-1, top-5 and NLL of the configured network, or of --model.weights FILE
  doctor     check configuration, data, launcher, GPUs, DALI and disk, and measure the pretrained baseline
             (--skip_baseline leaves the measurement out)
  schedule   imagenet-swa schedule PICTURE.png --config FILE: learning rate and captures against the step

what its results mean:
  report     imagenet-swa report RUN [RUN ...] [--output FOLDER]: tables beside the paper's, gains with their intervals,
             as Markdown, HTML and JSON
  averages   imagenet-swa averages RUN: all averages of a run's captures side by side
  ensemble   imagenet-swa ensemble RUN: the ensemble of the captures against their average (sec. 3.5)
  landscape  imagenet-swa landscape rays|line|plane RUN: loss and error around weights (figs. 1, 3, 4, 5)
  study      imagenet-swa study GRID: a grid of runs, such as the paper's learning rates (fig. 6); see launch/study.sh

data:
  index      list the images of data.train and data.val once, into a file beside them or in data.index, which every run
             then starts from (--rebuild after the data changed)
  verify     look at every image, decode them with --full; a report, and a list of bad images for data.quarantine
  prepare    imagenet-swa prepare SOURCE OUTPUT: official archives, parquet, folders, lists or shards to tar shards or folders,
             smaller or with restart markers if wanted
  import     imagenet-swa import cifar10|cifar100 SOURCE OUTPUT: CIFAR's original binaries to folders of images
  selftest   imagenet-swa selftest faults: kills a small run again and again, and compares what becomes of it
  bench      imagenet-swa bench loader|safety: images/s of our loader and its alternatives; what checkpoints and guards cost

imagenet-swa COMMAND --help lists every setting; --print_config shows the configuration that results.
exit codes: 0 done, 1 failed, 2 unusable input, 85 stopped as asked (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, --max_minutes): start the
same command again and it goes on, 130 interrupted
"""


_GOES_ON = {
    "train": "; checkpoints already written are whole, and the same command goes on from the last one",
    "prepare": "; what was written is whole, and the same command goes on with the rest",
    "import": "; the same command starts again with the split that was being written",
    "landscape": "; the points measured so far are kept, and the same command goes on with the rest",
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
        return end(BAD_INPUT, f"unknown command {arguments[0]!r}; wanted one of {', '.join(COMMANDS)}")
    return exit_code_of(lambda: command(arguments[1:]), goes_on=_GOES_ON.get(arguments[0], ""))


def _train(arguments: Sequence[str]) -> int:
    request.listen()
    status.begin()
    config = parse_config(arguments, "imagenet-swa train", "Fine-tune, average, recompute BatchNorm, evaluate, report.")
    request.limit(config.max_minutes)
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
    usage = "usage: imagenet-swa report RUN [RUN ...] [--output FOLDER]"
    words, output = list(arguments), None
    for flag in [word for word in words if word.split("=")[0] == "--output"]:
        at = words.index(flag)
        value = flag.partition("=")[2] if "=" in flag else words.pop(at + 1) if at + 1 < len(words) else ""
        require(bool(value), f"--output wants a folder; {usage}")
        output = Path(value)
        words.pop(at)
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0 if words else 2
    require(not any(word.startswith("-") for word in words), f"unknown flag among {' '.join(words)}; {usage}")
    from imagenet_swa.report import COLUMNS, load_run, print_table, report_runs, table_rows, write_report

    runs = [load_run(Path(folder)) for folder in words]
    if len(runs) == 1 and output is None:
        print_table(COLUMNS, table_rows(runs[0]))
        path = write_report(runs[0].folder)
    else:
        path = report_runs(runs, output)
    print(f"report: {path.with_suffix('.html')} (also .md, .json)")
    return 0


def _averages(arguments: Sequence[str]) -> int:
    from imagenet_swa.analysis.averages import AveragesSettings, averages

    about = "All averages of a run's captures side by side, at no extra training."
    averages(*parse_run_and("averages", AveragesSettings, arguments, "imagenet-swa averages", about))
    return 0


def _ensemble(arguments: Sequence[str]) -> int:
    from imagenet_swa.analysis.ensemble import EnsembleSettings, ensemble

    about = "The ensemble of a run's captures against their average (sec. 3.5)."
    ensemble(*parse_run_and("ensemble", EnsembleSettings, arguments, "imagenet-swa ensemble", about))
    return 0


def _landscape(arguments: Sequence[str]) -> int:
    from imagenet_swa.analysis.landscape import LandscapeSettings, landscape

    kinds = ("rays", "line", "plane")
    wanted = f"wanted `imagenet-swa landscape {'|'.join(kinds)} RUN`"
    rest = list(arguments)
    kind = rest.pop(0) if rest and rest[0] not in ("-h", "--help") else None
    require(kind in (*kinds, None) and bool(rest), f"{wanted}, got {' '.join(arguments[:1]) or 'nothing after landscape'}")
    prog, about = f"imagenet-swa landscape {kind or '|'.join(kinds)}", "Loss and error around the weights of a run."
    if kind is not None and rest[0] not in ("-h", "--help"):
        rest.insert(1, f"--landscape.kind={kind}")
    landscape(*parse_run_and("landscape", LandscapeSettings, rest, prog, about))
    return 0


def _study(arguments: Sequence[str]) -> int:
    from imagenet_swa.study import study

    return study(arguments)


def _schedule(arguments: Sequence[str]) -> int:
    words = list(arguments)
    picture = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    about = "Learning rate and captures against the step, as a picture. An epoch is as long as data.train, or else ImageNet, is."
    config = parse_config(words, "imagenet-swa schedule PICTURE.png", about)
    if picture is None:
        raise InputError("wanted `imagenet-swa schedule PICTURE.png --config FILE`")
    require(picture.suffix in (".png", ".pdf", ".svg"), f"wanted a picture named .png, .pdf or .svg, got {picture}")
    require(picture.parent.is_dir(), f"no such folder: {picture.parent}")
    from imagenet_swa.data.imagenet import NUM_TRAIN
    from imagenet_swa.data.loaders import num_training_images
    from imagenet_swa.plan import make_plan
    from imagenet_swa.report import plot_schedule

    num_images = num_training_images(config) or NUM_TRAIN
    plan = make_plan(config, num_images=num_images, world_size=1)
    plot_schedule(config, plan.steps_per_epoch, picture)
    print(f"picture: {picture} ({num_images:,} training images, {plan.steps_per_epoch:,} steps an epoch)")
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

    settings = _settings_of_words(PrepareSettings, ("source", "output"), arguments, "imagenet-swa prepare")
    prepare(settings, track=progress_bar)
    return 0


def _import(arguments: Sequence[str]) -> int:
    from imagenet_swa.data.prepare.cifar import ImportSettings, import_dataset
    from imagenet_swa.data.sources import progress_bar

    settings = _settings_of_words(ImportSettings, ("dataset", "source", "output"), arguments, "imagenet-swa import")
    import_dataset(settings, track=progress_bar)
    return 0


def _settings_of_words(cls: type[T], names: Sequence[str], arguments: Sequence[str], prog: str) -> T:
    """Settings whose first fields may be given as bare words in front."""
    usage = f"{prog} {' '.join(name.upper() for name in names)}"
    require(bool(arguments), f"wanted `{usage} [--setting VALUE ...]` (all settings: --help)")
    leading = list(takewhile(lambda word: not word.startswith("-"), arguments[: len(names)]))
    given = {*names[: len(leading)], *(word.lstrip("-").partition("=")[0] for word in arguments)}
    missing = [name.upper() for name in names if name not in given]
    told_elsewhere = given & {"h", "help", "config", "print_config"}
    require(not missing or bool(told_elsewhere), f"wanted `{usage} [--setting VALUE ...]`, got no {' and no '.join(missing)}")
    named = [f"--{name}={word}" for name, word in zip(names, leading, strict=False)]
    return parse_settings(cls, [*named, *arguments[len(leading) :]], prog, f"{cls.__doc__}: {usage} [--setting VALUE ...]")


def _bench(arguments: Sequence[str]) -> int:
    kinds = {"loader": _bench_loader, "safety": _bench_safety}
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("nothing after bench", [])
    if kind in ("-h", "--help"):
        print("usage: imagenet-swa bench loader|safety [--setting VALUE ...] (all settings: imagenet-swa bench loader --help)")
        return 0
    if kind not in kinds:
        raise InputError(f"wanted `imagenet-swa bench loader` or `imagenet-swa bench safety`, got {kind}")
    return kinds[kind](rest)


def _bench_loader(arguments: Sequence[str]) -> int:
    from imagenet_swa.bench import BenchSettings, bench_loader
    from imagenet_swa.bench.results import COLUMNS, absent_lines, table_rows
    from imagenet_swa.report import print_table

    about = "Our loader and its alternatives on data.train and data.val, side by side, as ratios."
    prog = "imagenet-swa bench loader"
    config, settings = parse_config_and("bench", BenchSettings, arguments, prog, about)
    variants = {}
    for name, flags in settings.flags_of_variants().items():
        variants[name], _ = parse_config_and("bench", BenchSettings, [*arguments, *flags], prog, about)
    record = bench_loader(config, settings, variants)
    print_table(COLUMNS, table_rows(record))
    for line in absent_lines(record):
        print(f"not measured: {line}")
    print(f"bench folder: {settings.output}")
    return 130 if record["interrupted"] else 0 if record["summary"] else 1


def _bench_safety(arguments: Sequence[str]) -> int:
    from imagenet_swa.bench.safety import SafetySettings, bench_safety
    from imagenet_swa.bench.safety_results import COLUMNS, safety_rows
    from imagenet_swa.report import print_table

    about = "What checkpoints cost, and in each step the agreement of the ranks and the look at the gradients."
    config, settings = parse_config_and("bench", SafetySettings, arguments, "imagenet-swa bench safety", about)
    record = bench_safety(config, settings)
    if os.environ.get("RANK", "0") == "0":
        print_table(COLUMNS, safety_rows(record))
        print(f"bench folder: {settings.output}")
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    skip_baseline = "--skip_baseline" in arguments
    rest = [argument for argument in arguments if argument != "--skip_baseline"]
    config = parse_config(rest, "imagenet-swa doctor", "Check everything that a run needs. --skip_baseline: no measurement.")
    from imagenet_swa.doctor import examine

    return 0 if examine(config, measure_baseline=not skip_baseline) else 1


def _selftest(arguments: Sequence[str]) -> int:
    from imagenet_swa.selftest import FaultSettings
    from imagenet_swa.selftest.campaign import faults

    wanted = "wanted `imagenet-swa selftest faults [--setting VALUE ...]`"
    require(bool(arguments) and arguments[0] == "faults", f"{wanted}, got {' '.join(arguments[:1]) or 'nothing after selftest'}")
    return faults(parse_settings(FaultSettings, arguments[1:], "imagenet-swa selftest faults", FaultSettings.__doc__ or ""))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "doctor": _doctor,
    "schedule": _schedule,
    "report": _report,
    "averages": _averages,
    "ensemble": _ensemble,
    "landscape": _landscape,
    "study": _study,
    "index": _index,
    "verify": _verify,
    "prepare": _prepare,
    "import": _import,
    "bench": _bench,
    "selftest": _selftest,
}
