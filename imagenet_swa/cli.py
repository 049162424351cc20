"""The commands: parse, call, exit code. What a command needs is imported when it runs."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from imagenet_swa import __version__
from imagenet_swa.config import InputError, parse_config

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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(1, f"{error.strerror}{where}; checkpoints already written are whole, and the same command goes on from them")
    except Exception as error:
        if type(error).__name__ != "TrainingError":
            raise
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
    from imagenet_swa.finetune import evaluate_network

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
