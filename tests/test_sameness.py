"""Ranks that would compute something else than the others are found and named."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import imagenet_swa
from imagenet_swa import sameness
from imagenet_swa.config import Config, DataConfig, ModelConfig, OptimizerConfig, flatten, to_plain
from imagenet_swa.sameness import OF_A_MACHINE, Description, code_digests, describe, differences, weights_fingerprint

FOUND = {"training images": "3f2a", "validation images": "77b1"}


@pytest.fixture(scope="module")
def usual() -> Description:
    """What a rank says of itself."""
    return describe(Config(), FOUND)


def of_host(description: Description, host: str, **changes: str) -> Description:
    return description | {"host": host} | changes


# -------------------------------------------------------------------------------------------------------- descriptions


def test_ranks_of_several_machines_agree(usual: Description):
    """Hosts may differ, and what each machine may have its own of: folders, caches, decoding threads."""
    own = Config(
        output=Path("/mnt/runs"),
        model=ModelConfig(weights=Path("/scratch/7/weights.safetensors")),
        data=DataConfig(
            train="/scratch/7/train",
            train_list="/scratch/7/train.txt",
            val="/scratch/7/val",
            val_list="/scratch/7/val.txt",
            index=Path("/scratch/7/index"),
            quarantine=Path("/scratch/7/bad.tsv"),
            num_workers=7,
            prefetch=3,
        ),
    )
    assert differences([usual, of_host(describe(own, FOUND), "node7"), of_host(usual, "node8")]) is None
    assert differences([usual]) is None


def test_every_setting_is_compared_or_of_a_machine(usual: Description):
    """No setting is forgotten, and no name among those of a machine is misspelt."""
    names = set(flatten(to_plain(Config())))
    assert names == (set(usual) & names) | set(OF_A_MACHINE)
    assert not set(usual) & set(OF_A_MACHINE)
    assert set(Config().result_settings()) <= set(usual) | {"model.weights"}


def test_each_changed_setting_is_named(usual: Description):
    """Another seed, a momentum, an argument of the network: by name, with both values."""
    changed = Config(seed=1, optimizer=OptimizerConfig(momentum=0.8), model=ModelConfig(kwargs={"drop_rate": 0.2}))
    line = differences([usual, usual, of_host(describe(changed, FOUND), "node7")])
    assert line is not None
    for part in ("rank 2 on node7: ", "seed is 1 instead of 0", "optimizer.momentum is 0.8 instead of 0.9"):
        assert part in line
    line = differences([usual, usual, describe(Config(model=ModelConfig(kwargs={"drop_rate": 0.2})), FOUND)])
    assert line is not None
    assert "model.kwargs.drop_rate is 0.2 instead of absent" in line


def test_data_and_packages_are_compared(usual: Description, monkeypatch: pytest.MonkeyPatch):
    """A rank with other images, another torch, or a package that the others do not have is named."""
    other_images = describe(Config(), FOUND | {"training images": "9999"})
    line = differences([usual, other_images, usual])
    assert line is not None
    assert "training images is 9999 instead of 3f2a" in line

    installed = sameness.metadata.version
    monkeypatch.setattr(sameness.metadata, "version", lambda name: "2.9.1" if name == "torch" else installed(name))
    line = differences([usual, usual, describe(Config(), FOUND)])
    assert line is not None
    assert f"torch is 2.9.1 instead of {torch.__version__.partition('+')[0]}" in line

    def without_scipy(name: str) -> str:
        if name == "scipy":
            raise sameness.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(sameness.metadata, "version", without_scipy)
    line = differences([usual, describe(Config(), FOUND), usual])
    assert line is not None
    assert "rank 1 on " in line
    assert "scipy is absent instead of " in line


def test_code_is_compared(tmp_path: Path, usual: Description):
    """A copy of the package has the same digests, line ends and compiled files aside; a file that differs, is missing or is
    additional is named.
    """
    here = Path(imagenet_swa.__file__).parent
    shutil.copytree(here, tmp_path / "imagenet_swa", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    copy = tmp_path / "imagenet_swa"
    (copy / "finetune.py").write_bytes((copy / "finetune.py").read_bytes().replace(b"\n", b"\r\n"))
    assert code_digests(copy) == code_digests(here)
    assert "code: imagenet_swa/data/native/resize.c" in usual

    (copy / "engine.py").write_text((copy / "engine.py").read_text().replace("step", "stop", 1))
    (copy / "optim.py").unlink()
    (copy / "data" / "mine.py").write_text("")
    changed = {name: value for name, value in usual.items() if not name.startswith("code: ")} | code_digests(copy)
    line = differences([usual, changed, usual])
    assert line is not None
    assert "code: imagenet_swa/engine.py differs" in line
    assert "code: imagenet_swa/optim.py is missing" in line
    assert "code: imagenet_swa/data/mine.py is additional" in line


def test_weights_are_told_apart():
    """Tensors have one fingerprint whatever their order and memory order, another with one bit, name, shape or type changed."""
    weights = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(7),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.empty(0),
    }
    same = {name: weights[name].clone() for name in reversed(weights)} | {"a": weights["a"].t().contiguous().t()}
    assert weights_fingerprint(same) == weights_fingerprint(weights)
    bit = weights["a"].clone()
    bit.view(torch.int32)[1, 2] ^= 1
    others = [
        weights | {"a": bit},
        weights | {"a": weights["a"].reshape(3, 2)},
        weights | {"b": torch.tensor(8)},
        weights | {"b": torch.tensor(7, dtype=torch.int32)},
        weights | {"c": torch.ones(3, dtype=torch.float16)},
        weights | {"d": torch.empty(0, 2)},
        weights | {"d": torch.empty(0, dtype=torch.int32)},
        {name: tensor for name, tensor in weights.items() if name != "d"},
        weights | {"a": weights["b"], "b": weights["a"]},
        {("e" if name == "d" else name): tensor for name, tensor in weights.items()},
    ]
    assert len({weights_fingerprint(tensors) for tensors in [weights, *others]}) == 1 + len(others)


# --------------------------------------------------------------------------------------------------------- differences

DESCRIPTIONS = st.lists(
    st.fixed_dictionaries(
        {"host": st.sampled_from(["node1", "node2"])},
        optional={name: st.sampled_from(["x", "y", "z"]) for name in ("seed", "torch", "code: a.py")},
    ),
    min_size=1,
    max_size=5,
)


@given(DESCRIPTIONS)
def test_exactly_those_in_the_minority_are_named(descriptions: list[Description]):
    """A line if and only if something but the host differs; it names each rank that differs from the most frequent value, or
    from rank 0's where several are as frequent, and no rank that agrees with the most frequent value in everything.
    """
    names = {name for description in descriptions for name in description} - {"host"}
    deviating = set()
    for name in names:
        values = [description.get(name) for description in descriptions]
        counts = Counter(values)
        frequent = [value for value in values if counts[value] == max(counts.values())]
        usual = values[0] if values[0] in frequent else frequent[0]
        deviating |= {rank for rank, value in enumerate(values) if value != usual}
    line = differences(descriptions)
    assert (line is None) == (not deviating)
    if line is not None and " more. " not in line:
        said = [(int(rank), part) for part in line.split(". ") if " on " in part for rank in numbers_of(part)]
        assert {rank for rank, _ in said} == deviating
        for rank, part in said:
            for name in names - {"code: a.py"}:
                assert part.count(f"{name} is ") <= 1
                if f"{name} is " in part:
                    assert f"{name} is {descriptions[rank].get(name, 'absent')} instead of " in part


def numbers_of(part: str) -> list[str]:
    """Of `ranks 1, 3 on node1: ...`."""
    return part.partition(" on ")[0].removeprefix("ranks ").removeprefix("rank ").split(", ")


def test_the_line_stays_short(usual: Description):
    """Of thousands of ranks that differ in everything the first few are named, values cut, and how many more."""
    for many in (
        [of_host(usual, f"node{rank}", seed=str(rank)) for rank in range(2000)],
        [usual] * 1500 + [{name: value * 500 + "\x1b[2J\n" for name, value in usual.items()} for _ in range(500)],
    ):
        line = differences(many)
        assert line is not None
        assert len(line) < 1000
        assert line.isprintable()
        assert " more" in line


def test_a_description_is_small(usual: Description):
    """A description is plain text of a few kilobytes: it goes to all other ranks."""
    assert all(isinstance(part, str) for entry in usual.items() for part in entry)
    assert sum(map(len, [*usual, *usual.values()])) < 50_000
