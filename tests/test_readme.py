"""What the README says to type, works; what it lists, is there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from imagenet_swa.arguments import parse_config, parse_config_and
from imagenet_swa.cli import COMMANDS, main
from imagenet_swa.study import load_grid

README = (PROJECT / "README.md").read_text()
COMMENTED = sorted([*PROJECT.glob("configs/*.yaml"), *PROJECT.glob("launch/accelerate/*.yaml"), *PROJECT.glob("launch/*.s*")])


def commands_in(text: str) -> list[list[str]]:
    """The command lines of all bash blocks, as words, without comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def commands_in_comments(path: Path) -> list[list[str]]:
    """The launch commands that a file's own comments tell the reader to type, continued lines joined."""
    comments = "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    lines = comments.replace("\\\n", " ").splitlines()
    starts = ("accelerate launch", "bash launch/single_node.sh configs", "sbatch launch/")
    found = [line[line.index(start) :] for line in lines for start in starts if start in line and "[" not in line]
    return [shlex.split(line, comments=True) for line in found]


def understood_by_cli(words: list[str]) -> bool:
    """Whether a command gets as far as its work, which is not done."""
    done: list[str] = []

    def instead(name: str, result: object) -> Callable[..., object]:
        return lambda *_, **__: done.append(name) or result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagenet_swa.data.verify.verify", instead("verify", SimpleNamespace(healthy=True)))
        patch.setattr("imagenet_swa.data.prepare.prepare", instead("prepare", None))
        nothing = {"summary": [], "absent": [], "interrupted": False}
        patch.setattr("imagenet_swa.bench.bench_loader", instead("bench", nothing))
        patch.setattr("imagenet_swa.bench.safety.bench_safety", instead("bench", nothing))
        patch.setattr("imagenet_swa.selftest.campaign.faults", instead("selftest", 0))
        imported = SimpleNamespace(num_images={}, flags=())
        patch.setattr("imagenet_swa.data.prepare.cifar.import_dataset", instead("import", imported))
        patch.setattr("imagenet_swa.report.plot_schedule", instead("schedule", None))
        for name in ("averages", "ensemble", "landscape"):
            patch.setattr(f"imagenet_swa.analysis.{name}.{name}", instead(name, None))
        # Of a run that is not there, only the flags can be looked at.
        patch.setattr(
            "imagenet_swa.cli.parse_run_and", lambda name, cls, words, *about: parse_config_and(name, cls, words[1:], *about)
        )
        main(words)
    return done == [words[0]]


def check(words: list[str]) -> None:
    """Fail unless the files that the command names exist and its flags make a configuration."""
    if words[0] in ("bash", "sbatch"):
        assert (PROJECT / words[1]).is_file(), f"{words[1]} is not there"
        if "study" in words[1]:
            grid = next(i for i, word in enumerate(words) if word.startswith("configs/"))
            assert load_grid(PROJECT / words[grid]).runs
            parse_config(words[grid + 1 :], "", "")
            return
        if "cifar" in words[1]:
            assert all((PROJECT / f"configs/cifar/{words[2]}-{kind}.yaml").is_file() for kind in ("sgd", "swa"))
            return
        configs = [i for i, word in enumerate(words) if word.startswith("configs/")]
        if configs:
            parse_config(["--config", str(PROJECT / words[configs[0]]), *words[configs[0] + 1 :]], "", "")
    elif words[0] == "accelerate":
        launcher, flags = words[: words.index("-m")], words[words.index("-m") + 2 :]
        if "--config_file" in launcher:
            assert (PROJECT / launcher[launcher.index("--config_file") + 1]).is_file()
        parse_config([str(PROJECT / w) if w.startswith("configs/") else w for w in flags], "", "")
    elif words[0] == "imagenet-swa":
        assert words[1] in COMMANDS
        if words[1] in ("verify", "prepare", "bench", "import", "schedule", "averages", "ensemble", "landscape", "selftest"):
            assert understood_by_cli(words[1:])
        elif words[1] == "study":
            assert load_grid(PROJECT / words[2]).runs
        elif words[1] != "report":
            parse_config([str(PROJECT / w) if w.startswith("configs/") else w for w in words[2:]], "", "")
    else:
        assert words[:2] == ["pip", "install"], f"no test knows the command {words}"
        extra = re.search(r"\[([\w-]+)\]", words[2])
        assert extra and f"{extra.group(1)} =" in (PROJECT / "pyproject.toml").read_text()


@pytest.mark.parametrize("words", commands_in(README), ids=lambda words: " ".join(words)[:60])
def test_every_command_of_the_readme_can_be_typed(words):
    """Each command's files exist and its flags are settings of the program."""
    check(words)


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.name)
def test_every_command_in_a_comment_can_be_typed(path):
    """A configuration's or script's header shows a command that works with the files and settings there are."""
    for words in commands_in_comments(path):
        check(words)


def test_the_comments_hold_commands():
    """The check above has something to check: every configuration of a paper's network says how to run it."""
    for name in ("resnet50", "resnet152", "densenet161", "demo"):
        assert commands_in_comments(PROJECT / f"configs/{name}.yaml"), name


def test_inline_settings_exist():
    """Every `--section.setting` that the text mentions is a flag of the program."""
    from imagenet_swa.arguments import parser_for_config

    known = set(parser_for_config("", "").get_defaults().keys()) | {"preprocessing.*"}
    mentioned = set(re.findall(r"`--([a-z_]+\.[a-z_*]+)", README))
    assert len(mentioned) > 8
    assert mentioned <= known, mentioned - known


def test_the_file_tree_is_the_real_one():
    """The README lists exactly the modules of the package."""
    tree = README[README.index("## Files") :].split("```")[1]
    listed = set()
    for line in tree.splitlines():
        if match := re.match(r"    (\w+\.py)", line):
            listed.add(f"data/{match.group(1)}")
        elif match := re.match(r"  (\w+\.py)", line):
            listed.add(match.group(1))
        elif match := re.match(r"  (  )?(\w+)/ .*: (.*)", line):  # a package that names its modules in the same line
            folder = f"data/{match.group(2)}" if match.group(1) else match.group(2)
            listed |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", re.sub(r"\(.*?\)", "", match.group(3)))}
    package = PROJECT / "imagenet_swa"
    real = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    with_init = {
        "bench/__init__.py",
        "selftest/__init__.py",
        "config/__init__.py",
        "data/prepare/__init__.py",
        "report/__init__.py",
    }
    assert listed == {n for n in real if Path(n).name not in ("__init__.py", "__main__.py") or n in with_init}


def test_linked_files_are_there():
    """Relative links and pictures of the README lead somewhere."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (PROJECT / target).exists(), target
