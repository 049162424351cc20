"""The commands as a user meets them: what they print, and how they end."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import PROJECT, QUICK_RUN, run

import imagenet_swa
from imagenet_swa import finetune as finetune_module
from imagenet_swa.checkpoint import load_snapshot, what_is_wrong
from imagenet_swa.cli import COMMANDS, main
from imagenet_swa.config import InputError
from imagenet_swa.schedule import Schedule

SHORT = ("--swa.num_epochs=2", "--swa.report_epochs=[]", "--swa.lr_max=0.005")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


INTERRUPTED = (
    "imagenet-swa: error: interrupted; checkpoints already written are whole, and the same command goes on from the last one"
)


def train(output: Path, *flags: str) -> int:
    return main(["train", *QUICK_RUN, *SHORT, f"--output={output}", *flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about an error; nothing else may follow it, and no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("imagenet-swa: error") == 1
    return err.splitlines()[-1]


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table drawn on the terminal, its header first."""
    lines = [line for line in table.splitlines() if line and line[0] in "┃│"]
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]


# -------------------------------------------------------------------------------------------------- help and usage


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], []])
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    """Without a command, or asked for help, every command is explained; only the missing command is an error."""
    assert main(arguments) == (0 if arguments else 2)
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    codes = ("0 done", "1 failed", "2 unusable input", "85 stopped as asked", "130 interrupted")
    assert all(code in out.partition("exit codes: ")[2] for code in codes)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(capsys: pytest.CaptureFixture[str], flag: str):
    """The version is the package's."""
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"{imagenet_swa.__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]):
    """An unknown command is refused with all that there are."""
    assert main(["trian"]) == 2
    assert error_line(capsys) == f"imagenet-swa: error: unknown command 'trian'; wanted one of {', '.join(COMMANDS)}"


@pytest.mark.parametrize("command", ["train", "evaluate", "doctor"])
def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str], command: str):
    """A command's help shows every setting with the text that stands beside it in the code."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"imagenet-swa {command}" in out
    assert "Learning rate that a cycle ends at, where the weights are captured (paper: alpha_2); cosine" in out
    for flag in ("--swa.lr_max", "--config", "--print_config", "--data.train_list", "--speed.compile", "--global_batch_size"):
        assert flag in out


def test_help_of_report(capsys: pytest.CaptureFixture[str]):
    """report without a folder is an error, its help is none."""
    assert main(["report", "--help"]) == 0
    assert main(["report"]) == 2
    assert capsys.readouterr().out == "usage: imagenet-swa report RUN [RUN ...] [--output FOLDER]\n" * 2


@pytest.mark.parametrize(
    "command", ["schedule", "averages", "ensemble", "landscape", "landscape rays", "study", "prepare", "import"]
)
def test_help_of_every_other_command(capsys: pytest.CaptureFixture[str], command: str):
    """--help ends with exit code 0 and starts with how the command is called."""
    try:
        code = main([*command.split(), "--help"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0
    assert f"usage: imagenet-swa {command}" in capsys.readouterr().out


def test_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """--print_config shows, as YAML, what file and flags amount to: flags win over the file, the file over defaults."""
    (tmp_path / "mine.yaml").write_text("seed: 3\nswa:\n  num_epochs: 20\n  lr_max: 0.5\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", f"--config={tmp_path / 'mine.yaml'}", "--swa.lr_max=0.25", "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["swa"]["num_epochs"], config["swa"]["lr_max"]) == (3, 20, 0.25)
    assert config["swa"]["lr_min"] == 1e-5


# ------------------------------------------------------------------------------------------------- unusable input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--swa.lr_mx=1"], "unknown setting swa.lr_mx; did you mean swa.lr_max?"),
        (["--seed=two"], "seed"),
        (["--swa.num_epochs=0"], "swa.num_epochs must be at least 1, got 0"),
        (["--config=/nowhere/x.yaml"], "/nowhere/x.yaml"),
        (["--data.synthetic=false", "--data.train=/nowhere", "--data.val=/nowhere"], "no such folder: /nowhere"),
        (["--data.synthetic=false"], "data.train is not set: pass --data.train FOLDER"),
        (["--model.weights=/nowhere/w.pth"], "no such weights file: /nowhere/w.pth"),
        (["--global_batch_size=1000"], "96 training images are fewer than one global batch of 1000"),
        (["--speed.precision=fp16"], "fp16 needs a GPU"),
    ],
)
def test_unusable_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str):
    """What the user got wrong ends with exit code 2 and one line that says so."""
    assert train(tmp_path / "run", *flags) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"seed: [1\n", b"just words"])
def test_unreadable_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes):
    """A configuration file that is no YAML of settings ends with exit code 2 and one line."""
    (tmp_path / "bad.yaml").write_bytes(content)
    assert train(tmp_path / "run", f"--config={tmp_path / 'bad.yaml'}") == 2
    assert "imagenet-swa: error: " in error_line(capsys)


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An output folder below a file ends with exit code 2 and the system's reason."""
    (tmp_path / "file").touch()
    assert train(tmp_path / "file/run") == 2
    assert "cannot create the run folder" in error_line(capsys)


@pytest.mark.parametrize(("local_rank", "concerns_one", "told"), [("0", False, True), ("1", False, False), ("1", True, True)])
def test_ranks_do_not_repeat_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, concerns_one: bool, told: bool
):
    """An error of all ranks is told once per machine; one that only this rank has is told by it, with its number."""
    error = InputError("something")
    error.concerns_one_rank = concerns_one

    def fail(_: Any) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "train", fail)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", "5")
    assert main(["train"]) == 2
    prefix = "imagenet-swa: error [rank 5]: " if concerns_one else "imagenet-swa: error: "
    assert capsys.readouterr().err == (f"{prefix}something\n" if told else "")


# ---------------------------------------------------------------------------------------------------- it goes well


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs with different seeds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    runs = [tmp_path_factory.mktemp("runs") / f"seed-{seed}" for seed in (0, 1)]
    for seed, path in enumerate(runs):
        assert train(path, f"--seed={seed}") == 0
    return runs


def test_train_ends_with_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """train prints the table of the run and where its files are, and nothing else to the output stream."""
    assert train(tmp_path / "run") == 0
    out = capsys.readouterr().out
    header, *rows = rows_of(out)
    assert header == ["network", "epochs", "top-1 %", "top-5 %", "NLL", "gain, points"]
    assert [row[:2] for row in rows] == [
        ["pretrained", ""],
        ["capture", "1"],
        ["capture", "2"],
        ["SWA (Alg. 1)", "2"],
        ["SWA, captures only", "2"],
    ]
    named = [line.split()[-1] for line in out.splitlines() if line and line[0].isascii()]
    assert named == [f"{tmp_path}/run", f"{tmp_path}/run/trajectory.png", f"{tmp_path}/run/report.md"]
    assert all(Path(path).exists() for path in named)


def test_evaluate_prints_counts(capsys: pytest.CaptureFixture[str], two_runs: list[Path]):
    """evaluate of a run's swa.safetensors prints the counts and the NLL that the run itself found for it."""
    weights = two_runs[0] / "swa.safetensors"
    assert main(["evaluate", *QUICK_RUN, f"--model.weights={weights}"]) == 0
    results = yaml.safe_load((two_runs[0] / "results.json").read_text())
    (swa,) = [result for result in results if result["name"] == "swa"]
    correct, top5 = swa["num_correct"], swa["num_correct_top5"]
    assert capsys.readouterr().out == (
        f"{weights}: top-1 {correct / 0.4:.2f} % ({correct} of 40), top-5 {top5 / 0.4:.2f} % ({top5}), NLL {swa['nll']:.4f}\n"
    )


def test_report_of_one_run(capsys: pytest.CaptureFixture[str], two_runs: list[Path]):
    """report of one run prints its table and writes report.md anew."""
    report = two_runs[0] / "report.md"
    before = report.read_text()
    report.unlink()
    assert main(["report", str(two_runs[0])]) == 0
    out = capsys.readouterr().out
    assert len(rows_of(out)) == 6
    assert f"report: {report.with_suffix('.html')} (also .md, .json)" in out
    assert report.read_text() == before


def test_report_of_several_runs(capsys: pytest.CaptureFixture[str], two_runs: list[Path]):
    """report of several runs prints a line for each, and their mean and standard deviation."""
    assert main(["report", *map(str, two_runs)]) == 0
    _, *rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows[:2]] == [["seed-0", "0"], ["seed-1", "1"]]
    assert rows[2][0].startswith("mean ± std")


def test_report_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], two_runs: list[Path]):
    """A folder without a run among several ends with exit code 2 and its name."""
    assert main(["report", str(two_runs[0]), str(tmp_path)]) == 2
    assert f"{tmp_path} holds no evaluated run" in error_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import", "wanted `imagenet-swa import DATASET SOURCE OUTPUT [--setting VALUE ...]`"),
        ("import cifar10", "got no SOURCE and no OUTPUT"),
        ("import cifar10 here", "got no OUTPUT"),
        ("import cifar10 here --output", "output"),
        ("import cifar11 here there", "cifar11"),
        ("import cifar10 here there everywhere", "everywhere"),
        ("import cifar10 /nowhere/x.tar.gz there", "no such file or folder: /nowhere/x.tar.gz"),
        ("prepare /nowhere", "wanted `imagenet-swa prepare SOURCE OUTPUT [--setting VALUE ...]`, got no OUTPUT"),
        ("averages", "wanted `imagenet-swa averages RUN [--averages.setting VALUE ...]`"),
        ("averages /nowhere", "/nowhere is no run: /nowhere/config.yaml is missing"),
        ("ensemble", "wanted `imagenet-swa ensemble RUN"),
        ("ensemble --seed=1", "wanted the run's folder first, got --seed=1"),
        ("ensemble /nowhere", "/nowhere is no run"),
        ("landscape", "wanted `imagenet-swa landscape rays|line|plane RUN`, got nothing after landscape"),
        ("landscape rays", "wanted `imagenet-swa landscape rays|line|plane RUN`, got rays"),
        ("landscape sphere /nowhere", "wanted `imagenet-swa landscape rays|line|plane RUN`, got sphere"),
        ("landscape plane /nowhere", "/nowhere is no run"),
        ("study /nowhere.yaml", "/nowhere.yaml"),
        ("report /nowhere", "/nowhere"),
        ("report --output", "--output wants a folder"),
        ("report /nowhere --output=", "--output wants a folder"),
        ("report /nowhere --outptu=x", "unknown flag"),
        ("schedule", "wanted `imagenet-swa schedule PICTURE.png --config FILE`"),
        ("schedule picture.txt", "wanted a picture named .png, .pdf or .svg, got picture.txt"),
        ("schedule /nowhere/picture.png", "no such folder: /nowhere"),
        ("schedule picture.png --global_batch_size=2000000", "lower global_batch_size"),
        (
            "schedule picture.png --swa.schedule=cosine --swa.cycle_epochs=2 --swa.budget_epochs=1 --swa.report_epochs=[]",
            "leaves the cosine's",
        ),
    ],
)
def test_unusable_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, message: str
):
    """A command line with too little, too much, or something that is not there ends with exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("", 5004),
        ("--global_batch_size=128", 10009),
        ("--data.synthetic --data.num_held_out=560", 7),
        ("--data.train={}/train", 4),
    ],
)
def test_schedule_takes_the_epoch_of_the_images(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, flags: str, steps: int
):
    """The picture's epoch is that of the training images named, less those held out, or else of ImageNet's 1,281,167."""
    found: list[int] = []
    monkeypatch.setattr("imagenet_swa.report.plot_schedule", lambda _, steps_per_epoch, __: found.append(steps_per_epoch))
    small = ["--global_batch_size=6", "--model.num_classes=3"] if "train" in flags else []
    assert main(["schedule", f"{tmp_path}/picture.png", *flags.format(image_folder).split(), *small]) == 0
    assert found == [steps]


# -------------------------------------------------------------------------------------------------------- it fails


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_the_disk_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, tmp_path: Path):
    """A full or read-only disk ends with exit code 1 and one line with reason, file, and how to go on."""

    def fail(_: Any) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(finetune_module, "finetune", fail)
    assert train(tmp_path) == 1
    line = error_line(capsys)
    assert f"{os.strerror(number)} (/some/file)" in line
    assert "checkpoints already written are whole, and the same command goes on from the last one" in line


@pytest.mark.parametrize("error", [OSError(errno.ENOTTY, "what"), RuntimeError("a bug")])
def test_other_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
):
    """What nobody foresaw is not made into a line: its traceback is wanted. The exit code is 1."""

    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(finetune_module, "finetune", fail)
    assert train(tmp_path) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "raise error" in shown
    assert shown.splitlines()[-1] == f"{type(error).__name__}: {error}"


def test_a_full_disk_in_earnest(tmp_path: Path):
    """Where the system refuses to write a weight file, the run ends with code 1 and one line; with room it then finishes."""
    command = [sys.executable, "-m", "imagenet_swa", "train", *QUICK_RUN, *SHORT, f"--output={tmp_path / 'run'}"]
    limited = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "bash", *command]  # files of at most 100 KiB
    result = run(limited, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(r"error: File too large \(.*safetensors.*\); checkpoints already written", result.stderr.splitlines()[-1])
    assert train(tmp_path / "run") == 0


def test_diverging_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """When the second epoch diverges, nothing of it is saved, the first one's files stay, and the same command goes on."""
    original = Schedule.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "learning_rate", lambda schedule, step: original(schedule, step) if step < 7 else 1e30)
        assert train(tmp_path / "run") == 1
    line = error_line(capsys)
    assert re.search(r"the loss of step \d+ is infinite|a gradient of step \d+ is|a weight became", line)
    assert "nothing of it was averaged or saved" in line
    assert [path.name for path in (tmp_path / "run/captures").iterdir()] == ["epoch-01.safetensors"]
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.name == "step-0000006"
    snapshot = load_snapshot(checkpoint)
    assert snapshot.progress["num_averaged"] == 1
    assert all(tensor.isfinite().all() for tensor in snapshot.average.values())
    assert train(tmp_path / "run") == 0


def test_a_rate_far_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An absurd learning rate ends with exit code 1 in the first epoch: no capture, no checkpoint, no average."""
    assert train(tmp_path / "run", "--swa.lr_max=1e30") == 1
    assert "lower swa.lr_max" in error_line(capsys)
    assert not any((tmp_path / "run" / name).exists() for name in ("captures", "checkpoints", "averages", "swa.safetensors"))


def test_interrupt_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Ctrl-C ends with exit code 130 and one line that says how to go on."""

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "finetune", fail)
    assert train(tmp_path) == 130
    assert error_line(capsys) == INTERRUPTED


def test_interrupt_in_earnest(tmp_path: Path):
    """Ctrl-C in a running process ends with code 85 and one line: a checkpoint of the step, and the same command goes on."""
    flags = [*QUICK_RUN, "--data.synthetic_num_images=[9600,40]", "--swa.num_epochs=50", f"--output={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "imagenet_swa", "train", *flags, "--checkpoint.every_minutes=0"],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell starts in the background
    )
    end = time.monotonic() + 120
    try:
        while not any(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 85
    assert "Traceback" not in err
    words = r"imagenet-swa: stopped: by SIGINT after step (\d+); a checkpoint is saved, the same command goes on"
    step = re.fullmatch(words, err.splitlines()[-1])
    assert step is not None
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert newest.name == f"step-{int(step[1]):07d}" and what_is_wrong(newest) is None


# --------------------------------------------------------------------------------------------------- entry points


@pytest.mark.parametrize(
    "program", [["imagenet-swa", "train"], ["python", "-m", "imagenet_swa", "train"], ["python", "-m", "imagenet_swa.train"]]
)
def test_entry_points(program: list[str]):
    """The console script, the package and the module for accelerate are the same command, with its exit codes."""
    result = run([*program, "--swa.num_epochs=0"], timeout=60)
    assert result.returncode == 2
    assert result.stderr == "imagenet-swa: error: swa.num_epochs must be at least 1, got 0\n"
    assert result.stdout == ""
