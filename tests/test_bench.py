"""`imagenet-swa bench loader`: what is timed, how ratios follow from it, what the alternatives yield, what is written."""

import gc
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import preprocessing
from hypothesis import given
from hypothesis import strategies as st

from imagenet_swa import bench
from imagenet_swa.bench import BenchSettings, bench_loader, cyclic_order
from imagenet_swa.bench.alternatives import ALTERNATIVES, REFERENCE, Alternative, Mode, Stream, Work
from imagenet_swa.bench.measure import Candidate, cpu_seconds, measure, rotated, time_block
from imagenet_swa.bench.results import COLUMNS, Block, absent_lines, plot_ratios, summarise, table_rows
from imagenet_swa.config import Config, DataConfig, InputError, ModelConfig, PreprocessingConfig

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module", autouse=True)
def without_collecting_garbage() -> Iterator[None]:
    """Between blocks it is for what real loaders leave behind, and takes long in a process with many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield


def block(candidate: str, number: int, seconds: float, cpu: float = 1.0, mode: Mode = "train") -> Block:
    return Block(mode=mode, candidate=candidate, round=number, num_images=100, seconds=seconds, cpu_seconds=cpu)


# -------------------------------------------------------------------------------------------------------- ratios


def test_ratios_are_taken_within_rounds():
    """The ratio is the median of the rounds' ratios, by hand: 2, 4, 2.5 -> 2.5, where the medians' ratio would be 4."""
    blocks = [block("ref", r, s, cpu) for r, s, cpu in ((1, 2, 4), (2, 4, 2), (3, 5, 10))]
    blocks += [block("new", r, s, cpu) for r, s, cpu in ((1, 1, 2), (2, 1, 2), (3, 2, 1))]
    reference, new = summarise(blocks, "ref")
    assert (new["mode"], new["candidate"], new["rounds"]) == ("train", "new", 3)
    assert new["images_per_second"] == {"median": 100, "min": 50, "max": 100}
    assert new["ratio_of_images_per_second"] == {"median": 2.5, "min": 2, "max": 4}
    assert new["images_per_cpu_second"] == {"median": 50, "min": 50, "max": 100}
    assert new["ratio_of_images_per_cpu_second"] == {"median": 2, "min": 1, "max": 10}
    assert reference["ratio_of_images_per_second"] == {"median": 1, "min": 1, "max": 1}


def test_rounds_and_modes_without_the_reference_have_no_ratio():
    """Only a round in which the same mode's reference was measured gives a ratio; without any, there is none."""
    blocks = [block("ref", 1, 2), block("new", 1, 1), block("new", 2, 0.01), block("new", 1, 1, mode="evaluation")]
    _, train, evaluation = summarise(blocks, "ref")
    assert train["ratio_of_images_per_second"] == {"median": 2, "min": 2, "max": 2}
    assert train["rounds"] == 2
    assert evaluation["ratio_of_images_per_second"] is None
    assert summarise([], "ref") == []


@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=1, max_size=6))
def test_a_slow_round_bends_no_ratio(rounds: list[tuple[float, float, float]]):
    """A neighbour that slows everybody in a round by the same factor leaves all ratios as they were."""

    def ratio(slowed: bool) -> dict[str, float]:
        blocks = []
        for number, (ours, theirs, factor) in enumerate(rounds, start=1):
            factor = factor if slowed else 1
            blocks += [block("new", number, ours * factor), block("ref", number, theirs * factor)]
        return summarise(blocks, "ref")[0]["ratio_of_images_per_second"]

    assert ratio(slowed=True) == pytest.approx(ratio(slowed=False))


# --------------------------------------------------------------------------------------------------- measurement


class Clock:
    """A clock that moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def prefetching_stream(clock: Clock, *, num_free: int, work: float, num_batches: int = 1000) -> Stream:
    """Batches of 4: the first `num_free` lie ready and cost nothing, each further one costs `work` seconds."""
    for number in range(num_batches):
        clock.now += work * (number >= num_free)
        yield torch.zeros(4, 3, 2, 2), torch.zeros(4)


@given(
    num_free=st.integers(0, 20),
    spare=st.integers(0, 5),
    num_timed=st.integers(1, 10),
    work=st.integers(1, 8).map(float),
)
def test_prefetched_batches_are_not_counted(num_free: int, spare: int, num_timed: int, work: float):
    """However many batches a loader has ready, the measured rate is that at which it makes them."""
    clock = Clock()
    stream = prefetching_stream(clock, num_free=num_free, work=work)
    images, seconds, cpu = time_block(stream, num_drained=num_free + spare, num_timed=num_timed, clock=clock, cpu_clock=clock)
    assert images == 4 * num_timed
    assert seconds == cpu == num_timed * work


def test_a_stream_that_ends_within_the_block_is_an_error():
    """A loader that runs out of images has no rate."""
    stream = prefetching_stream(Clock(), num_free=0, work=1, num_batches=5)
    with pytest.raises(EOFError, match="ended within the block"):
        time_block(stream, num_drained=3, num_timed=3, clock=Clock(), cpu_clock=Clock())


def fake_candidate(name: str, open_: Callable[[int], Stream], capacity: int = 2) -> Candidate:
    return Candidate(mode="train", name=name, output="uint8", open=open_, capacity=capacity)


def test_candidates_take_turns_alone():
    """Every round has each candidate once, another one first; one is closed before the next opens; round 0 does not count."""
    clock, events, blocks, opened = Clock(), [], [], []

    def candidate(name: str, work: float) -> Candidate:
        def stream(number: int) -> Stream:
            events.append(f"open {name}{number}")
            try:
                yield from prefetching_stream(clock, num_free=2, work=work)
            finally:
                events.append(f"close {name}{number}")

        def remembered(number: int) -> Stream:
            opened.append(stream(number))  # so that it is not closed only because it is forgotten
            return opened[-1]

        return fake_candidate(name, remembered)

    candidates = [candidate("a", 1), candidate("b", 2), candidate("c", 4)]
    measure(candidates, rounds=3, num_timed=5, record=blocks.append, fail=lambda *_: pytest.fail(), clock=clock, cpu_clock=clock)
    order = ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert events == [event for block_ in order for event in (f"open {block_}", f"close {block_}")]
    assert [f"{b.candidate}{b.round}" for b in blocks] == order[3:]
    assert {(b.candidate, b.num_images / b.seconds) for b in blocks} == {("a", 4.0), ("b", 2.0), ("c", 1.0)}


def test_rotation_of_nothing():
    """Where no candidate is left there is no order to turn."""
    assert rotated([], 3) == []


def test_a_failing_candidate_stops_no_other():
    """One that raises is named with the reason as one line and left out from there; the others have all their rounds."""
    clock, blocks, failures = Clock(), [], []

    def breaks_in_round_2(number: int) -> Stream:
        yield from prefetching_stream(clock, num_free=0, work=1, num_batches=2 if number == 2 else 99)
        raise RuntimeError("cannot\n   go on")

    good = fake_candidate("good", lambda _: prefetching_stream(clock, num_free=2, work=1))
    bad = fake_candidate("bad", breaks_in_round_2)
    measure(
        [bad, good],
        rounds=3,
        num_timed=2,
        record=blocks.append,
        fail=lambda candidate, reason: failures.append((candidate.name, reason)),
        clock=clock,
        cpu_clock=clock,
    )
    assert failures == [("bad", "failed: cannot go on")]
    assert sorted((b.candidate, b.round) for b in blocks) == [("bad", 1), ("good", 1), ("good", 2), ("good", 3)]


def burn(amount: float, done: object, leave: object) -> None:
    while time.process_time() < amount:
        pass
    done.set()  # pyright: ignore[reportAttributeAccessIssue]  an Event, whose class multiprocessing does not name
    leave.wait(60)  # pyright: ignore[reportAttributeAccessIssue]


def test_cpu_time_of_workers_counts_while_they_live_and_after():
    """What a child process burned is counted while it runs, and neither lost nor counted twice when it has ended."""
    context = multiprocessing.get_context("fork")
    done, leave = context.Event(), context.Event()
    before = cpu_seconds()
    process = context.Process(target=burn, args=(2.0, done, leave))
    process.start()
    assert done.wait(60)
    alive = cpu_seconds() - before
    leave.set()
    process.join(60)
    ended = cpu_seconds() - before
    # The clocks tick in hundredths; a child counted twice would have four seconds, one lost none.
    assert alive > 1.9
    assert alive - 0.1 < ended < 3.5


def burn_below(amount: float, done: object, leave: object) -> None:
    process = multiprocessing.get_context("fork").Process(target=burn, args=(amount, done, leave))
    process.start()
    process.join()


def test_cpu_time_of_workers_of_workers_counts():
    """What a child's child burned is counted while both run."""
    context = multiprocessing.get_context("fork")
    done, leave = context.Event(), context.Event()
    before = cpu_seconds()
    process = context.Process(target=burn_below, args=(1.0, done, leave))
    process.start()
    assert done.wait(60)
    alive = cpu_seconds() - before
    leave.set()
    process.join(60)
    assert 0.9 < alive < 2


def test_images_come_round_in_turn():
    """No image comes twice before all came once, and the order is random."""
    order = cyclic_order(10, 34, seed=3)
    assert len(order) == 34
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert list(order[:10]) != list(range(10))


# --------------------------------------------------------------------------------------------------- alternatives


def work_on(image_folder: Path, folder: Path, mode: Mode, num_workers: int = 1) -> Work:
    files = sorted((image_folder / "train").glob("*/*.JPEG"))
    return Work(
        files=list(map(str, files)),
        labels=[("ant", "bee", "cat").index(file.parent.name) for file in files],
        order=cyclic_order(len(files), 100, seed=0),
        mode=mode,
        preprocessing=preprocessing(crop_area=(0.5, 1.0)),
        batch_size=5,
        num_workers=num_workers,
        prefetch=2,
        device=torch.device("cpu"),
        decode_on_gpu=False,
        folder=folder,
    )


@pytest.mark.parametrize("mode", ["train", "evaluation"])
@pytest.mark.parametrize("alternative", ALTERNATIVES, ids=lambda alternative: alternative.name)
def test_alternatives_yield_images_with_their_labels(alternative: Alternative, mode: Mode, image_folder: Path, tmp_path: Path):
    """Full batches for several passes, of the shape and type announced, each image with its own label: the class's own colour is
    the strongest of the three channels.
    """
    if not alternative.is_installed():
        pytest.skip(f"{alternative.package} is not installed")
    stream = alternative.open(work_on(image_folder, tmp_path, mode), alternative.output)
    seen = []
    for _ in range(10):
        images, labels = next(stream)
        assert images.shape == (5, 3, 32, 32)
        assert str(images.dtype) == f"torch.{alternative.output}"
        assert images.float().mean(dim=(2, 3)).argmax(1).tolist() == labels.tolist()
        assert 20 < images.float().mean() < 235  # grey levels; normalisation leaves them as they are
        seen += labels.tolist()
    stream.close()
    assert set(seen) == {0, 1, 2}


def test_evaluation_crops_of_the_alternatives_are_the_reference_s(image_folder: Path, tmp_path: Path):
    """PIL with float and uint8 output show the same pixels in evaluation, tensors nearly so."""
    first = {}
    for alternative in ALTERNATIVES[:4]:
        stream = alternative.open(work_on(image_folder, tmp_path, "evaluation", num_workers=0), alternative.output)
        first[alternative.name] = next(stream)[0].float()
        stream.close()
    reference = first[REFERENCE]
    assert torch.allclose(first["torchvision PIL uint8"], reference, atol=1e-3)
    for name in ("torchvision v2 tensors", "torchvision v2 tensors uint8"):
        assert (first[name] - reference).abs().mean() < 1


# ----------------------------------------------------------------------------------------------------------- runs


def config_of(image_folder: Path, **data: object) -> Config:
    return Config(
        model=ModelConfig(num_classes=3),
        preprocessing=PreprocessingConfig(image_size=32, resize=36),
        data=DataConfig(
            train=str(image_folder / "train"),
            val=str(image_folder / "val"),
            **{"backend": "torchvision", "num_workers": 2, **data},  # pyright: ignore[reportArgumentType]  of mixed types
        ),
    )


def in_process(work: Work, _output: str) -> Stream:
    """A loader without workers and without images."""
    while True:
        yield torch.zeros(work.batch_size, 3, 32, 32), torch.zeros(work.batch_size)


def fake_alternative(name: str, open_: Callable[..., Stream] = in_process, package: str = "torch") -> Alternative:
    return Alternative(name=name, package=package, output="uint8", open=open_, capacity=lambda _: 1)


@pytest.fixture(scope="module")
def result(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, Path]]:
    """A small run: ours, a variant, the reference, one that is not installed, one that fails."""

    def fails(_work: Work, _output: str) -> Stream:
        raise OSError("no libsomething.so")
        yield

    folder = tmp_path_factory.mktemp("bench")
    config = config_of(image_folder)
    settings = BenchSettings(output=folder / "new", rounds=2, num_images=9, batch_size=4)
    fakes = [ALTERNATIVES[0], fake_alternative("Missing", package="no_such.package"), fake_alternative("Broken", fails)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ALTERNATIVES", fakes)
        record = bench_loader(config, settings, {"data.prefetch=4": config_of(image_folder, prefetch=4)})
    yield record, folder / "new"


def test_all_candidates_are_measured_in_both_modes(result: tuple[dict, Path]):
    """Ours, its variants and the reference have a block per round and mode, of whole batches from every worker."""
    record, _ = result
    names = ("ours", "ours[data.prefetch=4]", REFERENCE)
    expected = {(mode, name, number) for mode in ("train", "evaluation") for name in names for number in (1, 2)}
    assert {(b["mode"], b["candidate"], b["round"]) for b in record["blocks"]} == expected
    assert len(record["blocks"]) == len(expected)
    # 9 images are 3 batches of 4, 2 workers make that 4.
    assert {b["num_images"] for b in record["blocks"]} == {16} == {record["num_images_per_block"]}
    assert not record["interrupted"]
    assert record["num_images"] == {"train": 24, "evaluation": 12}
    assert record["variants"]["data.prefetch=4"]["prefetch"] == 4


def test_what_was_not_measured_is_named(result: tuple[dict, Path]):
    """A loader that is not installed and one that fails have a line each with the reason, in the Markdown too."""
    record, folder = result
    lines = absent_lines(record)
    assert lines == ["Missing (train, evaluation): not installed", "Broken (train, evaluation): failed: no libsomething.so"]
    for line in lines:
        assert f"- not measured: {line}\n" in (folder / "loader.md").read_text()


def test_the_files_hold_the_same_numbers(result: tuple[dict, Path]):
    """JSON holds the record; its summary follows from its blocks; the Markdown's cells are those numbers; the plot exists."""
    record, folder = result
    from_file = json.loads((folder / "loader.json").read_text())
    assert from_file == json.loads(json.dumps(record))
    again = summarise([Block(**b) for b in from_file["blocks"]], from_file["reference"])
    assert [row | {"output": "float32"} for row in again] == from_file["summary"]
    lines = (folder / "loader.md").read_text().splitlines()
    table = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    assert table[0] == COLUMNS
    for cells in table[2:]:
        row = next(r for r in from_file["summary"] if (r["mode"], r["candidate"]) == cells[:2])
        wall, cpu = row["ratio_of_images_per_second"], row["ratio_of_images_per_cpu_second"]
        assert cells[3:6] == (
            f"{row['images_per_second']['median']:.0f}",
            f"{wall['median']:.2f}",
            f"{wall['min']:.2f} - {wall['max']:.2f}",
        )
        assert cells[7] == f"{cpu['median']:.2f}"
    assert len(table) == 2 + 6
    assert (folder / "loader.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["loader.json", "loader.md", "loader.png"]


def test_the_plot_shows_the_ratios(result: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bars are as long as the medians, the whiskers reach from minimum to maximum."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    record, _ = result
    plot_ratios(record, tmp_path / "plot.png")
    for axis in figures[0].axes:
        names = [label.get_text().removesuffix(" (float32)") for label in axis.get_yticklabels()]
        assert len(names) == 3
        for bars, kind in zip(axis.containers[1::2], ("images_per_second", "images_per_cpu_second"), strict=True):
            whiskers = bars.errorbar.lines[2][0].get_segments()
            for name, bar, whisker in zip(names, bars, whiskers, strict=True):
                row = next(r for r in record["summary"] if (r["mode"], r["candidate"]) == (axis.get_title(), name))
                ratio = row[f"ratio_of_{kind}"]
                assert bar.get_width() == pytest.approx(ratio["median"])
                assert [end[0] for end in whisker] == pytest.approx([ratio["min"], ratio["max"]])


def test_long_names_leave_room_for_bars(result: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of any length give a chart that could be laid out, with labels that still differ at their ends."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    rows = result[0]["summary"]
    longer = [row | {"candidate": f"ours[data.train=/a/{'long/' * 60}path data.prefetch={i}]"} for i, row in enumerate(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_ratios(result[0] | {"summary": [*rows, *longer]}, tmp_path / "plot.png")
    for axis in figures[0].axes:
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert len(set(labels)) == len(labels) == 6
        assert all(len(label.rpartition(" (")[0]) <= 40 for label in labels)
        assert axis.get_position().width > 0.4


def test_output_that_is_a_file(image_folder: Path, tmp_path: Path):
    """An output that cannot be a folder is named before anything is measured."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file.*; set bench\.output to another"):
        bench_loader(config_of(image_folder), BenchSettings(output=tmp_path / "file"), {})


def test_what_a_killed_run_left_is_removed(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The loaders' files of a run that was killed are never seen by the next one, and gone after it."""
    seen = []

    def looks(work: Work, output: str) -> Stream:
        seen.append(sorted(path.name for path in work.folder.iterdir()))
        (work.folder / "left").touch()
        yield from in_process(work, output)

    monkeypatch.setattr(bench, "ALTERNATIVES", [fake_alternative(REFERENCE, looks)])
    settings = BenchSettings(output=tmp_path, mode="train", rounds=1, num_images=8, batch_size=4, candidates=())
    with monkeypatch.context() as killed:  # a kill leaves no time to remove anything
        killed.setattr(bench.shutil, "rmtree", lambda *_args, **_options: None)
        bench_loader(config_of(image_folder), settings, {})
    assert len(list(tmp_path.iterdir())) == 4
    bench_loader(config_of(image_folder), settings, {})
    assert seen == [[], ["left"], [], ["left"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loader.json", "loader.md", "loader.png"]


def test_the_fastest_stands_first():
    """Rows go by mode, training first, then by ratio, best first; without the reference by rate."""
    blocks = [block("x", 1, 2, mode="evaluation"), block("ref", 1, 3), block("slow", 1, 4), block("fast", 1, 1)]
    blocks += [block("y", 1, 1, mode="evaluation")]
    record = {"summary": [row | {"output": "uint8"} for row in summarise(blocks, "ref")]}
    rows = table_rows(record)
    assert [row[1] for row in rows] == ["fast", "ref", "slow", "y", "x"]
    assert rows[0] == ("train", "fast", "uint8", "100", "3.00", "3.00 - 3.00", "100", "1.00", "1.00 - 1.00")
    assert rows[3] == ("evaluation", "y", "uint8", "100", "", "", "100", "", "")


def test_an_interrupt_leaves_what_was_measured(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C in round 2 ends the measurement; the files hold the blocks until then."""
    opened = []

    def interrupted(work: Work, output: str) -> Stream:
        opened.append(output)
        if len(opened) == 3:
            raise KeyboardInterrupt
        yield from in_process(work, output)

    monkeypatch.setattr(bench, "ALTERNATIVES", [fake_alternative(REFERENCE), fake_alternative("B", interrupted)])
    settings = BenchSettings(output=tmp_path, mode="train", rounds=9, num_images=8, batch_size=4, candidates=("B",))
    record = bench_loader(config_of(image_folder), settings, {})
    assert record["interrupted"]
    # Round 1 begins with B, round 2 with the reference.
    blocks = [(b["candidate"], b["round"]) for b in json.loads((tmp_path / "loader.json").read_text())["blocks"]]
    assert blocks == [("B", 1), (REFERENCE, 1), (REFERENCE, 2)]
    assert "(interrupted)" in (tmp_path / "loader.md").read_text()
    assert (tmp_path / "loader.png").exists()


def test_data_without_image_files(tmp_path: Path):
    """Made-up images, like shards, can only be measured with our loader; the others say why."""
    config = Config(model=ModelConfig(num_classes=3), data=DataConfig(synthetic=True, synthetic_num_images=(8, 8)))
    record = bench_loader(config, BenchSettings(output=tmp_path, mode="train", rounds=1, num_images=8, batch_size=4), {})
    assert [row["candidate"] for row in record["summary"]] == ["ours"]
    reasons = {item["candidate"]: item["reason"] for item in record["absent"]}
    assert reasons[REFERENCE] == "needs local image files, which these are not"
    assert set(reasons) == {alternative.name for alternative in ALTERNATIVES}


def test_a_variant_that_cannot_run_is_named(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another data source that is not there fails alone."""
    monkeypatch.setattr(bench, "ALTERNATIVES", [fake_alternative(REFERENCE)])
    elsewhere = config_of(image_folder / "nowhere")
    settings = BenchSettings(output=tmp_path, mode="train", rounds=1, num_images=8, batch_size=4, candidates=())
    record = bench_loader(config_of(image_folder), settings, {"data.train=nowhere": elsewhere})
    assert [row["candidate"] for row in record["summary"]] == [REFERENCE]
    assert [item["candidate"] for item in record["absent"]] == ["ours[data.train=nowhere]"]
    assert "nowhere" in record["absent"][0]["reason"]


def test_settings_that_cannot_be():
    """Numbers below one and names of no loader are refused with what is wanted."""
    for name, make in (
        ("rounds", lambda: BenchSettings(rounds=0)),
        ("num_images", lambda: BenchSettings(num_images=0)),
        ("batch_size", lambda: BenchSettings(batch_size=0)),
    ):
        with pytest.raises(InputError, match=rf"bench.{name} must be at least 1, got 0"):
            make()
    with pytest.raises(InputError, match=r"no loader 'stock dali'; wanted some of ours, torchvision PIL, .*stock DALI"):
        bench_loader(Config(), BenchSettings(candidates=("stock dali",)), {})


def test_the_random_crops_of_ours_change_from_round_to_round(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Small data sets would else be measured on one crop per image, while the alternatives draw new ones."""
    sums: dict[int, float] = {}

    def look(candidates: list[Candidate], **_: object) -> None:
        for number in (1, 2):
            stream = candidates[0].open(number)
            sums[number] = float(np.sum([next(stream)[0].sum().item() for _ in range(6)]))
            stream.close()

    monkeypatch.setattr(bench, "measure", look)
    bench_loader(config_of(image_folder, num_workers=0), BenchSettings(output=tmp_path, batch_size=4, candidates=("ours",)), {})
    assert sums[1] != sums[2]


def test_names_and_flags_of_variants() -> None:
    """What stands before the last colon and space names a variant; without a name its settings do. A path may hold colons."""
    settings = BenchSettings(variants=("data.prefetch=4 seed=1", "my shards: data.train=s3://bucket/a data.index=/x:y"))
    assert settings.flags_of_variants() == {
        "data.prefetch=4 seed=1": ["--data.prefetch=4", "--seed=1"],
        "my shards": ["--data.train=s3://bucket/a", "--data.index=/x:y"],
    }
