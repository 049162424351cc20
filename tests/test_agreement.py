"""What ranks agree on: sums over real processes, and rounds that all leave together."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from conftest import run_ranks

from imagenet_swa.agreement import Agreement, Verdict, Wishes, share_of_good, until_stopped
from imagenet_swa.config import StopRequested
from imagenet_swa.runtime import Runtime
from imagenet_swa.stop import StopRequest

NUM_RANKS = 2


def runtime(rank: int, world_size: int) -> Runtime:
    """Without Accelerate, and with a request to stop of its own."""
    return Runtime(cast(Accelerator, None), rank, rank, world_size, world_size, torch.device("cpu"), stop=StopRequest())


def ask(one: Runtime) -> None:
    """As SIGUSR1 does."""
    one.stop._by_signal = "SIGUSR1"


def of_rank(rank: int, folder: Path) -> None:
    """Write down the verdicts on three steps, and in which round rounds end that one rank wants to end."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=60), NUM_RANKS, rank)
    agreement, poison = Agreement(runtime(rank, NUM_RANKS), lag=0), []
    for step in range(3):
        is_finite = torch.tensor(not (rank == 1 and step == 1))
        wishes = Wishes(stop=rank == 0 and step == 2, save=rank == 1 and step == 0)
        agreement.vote(wishes, loss=torch.tensor(0.5 + rank + step), num_left_out=10 * rank + step, is_finite=is_finite)
        poison.append(float(agreement.poison))
    found: dict[str, object] = {"verdicts": [vars(verdict) for verdict in agreement.verdicts()], "poison": poison}
    for who in range(NUM_RANKS):
        mine, seen = runtime(rank, NUM_RANKS), []
        try:
            for item in until_stopped(range(9 - 6 * rank), 9, mine, what="test"):  # rank 1 has three items, rank 0 nine
                seen.append(item)
                if rank == who and item == 2:
                    ask(mine)
        except StopRequested as error:
            found[f"asked {who}"] = [seen, str(error)]
    found["whole"] = list(until_stopped(range(9 - 6 * rank), 9, runtime(rank, NUM_RANKS), what="test"))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(of_rank, NUM_RANKS, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_verdicts_are_sums_over_ranks(ranks: list[dict]):
    """Each rank hears the sum of the losses and of the bad images, how many were not finite, and what any of them wishes."""
    wanted = [
        Verdict(0.5 + 1.5, 10, 0, stop=False, save=True, give_up=False),
        Verdict(1.5 + 2.5, 12, 1, stop=False, save=False, give_up=False),
        Verdict(2.5 + 3.5, 14, 0, stop=True, save=False, give_up=False),
    ]
    for rank in ranks:
        assert [Verdict(**verdict) for verdict in rank["verdicts"]] == wanted
        assert rank["poison"] == [0, 1, 1], "from the first bad step on, on every rank"


def test_all_ranks_leave_in_the_same_round(ranks: list[dict]):
    """Whoever is asked to stop, all ranks end after that round, also one that has no batches left; each says what it knows."""
    for who in range(NUM_RANKS):
        for rank, found in enumerate(ranks):
            seen, message = found[f"asked {who}"]
            assert seen == [0, 1, 2]
            assert f"by {'SIGUSR1' if rank == who else 'a request to another process'}" in message
    assert [found["whole"] for found in ranks] == [list(range(9)), list(range(3))]


def test_verdicts_a_step_later():
    """With lag 1 the newest verdict waits for the next vote, or for all_of_them."""
    agreement = Agreement(runtime(0, 1), lag=1)
    for number in range(3):
        agreement.vote(Wishes(), loss=torch.tensor(float(number)))
        assert [verdict.loss for verdict in agreement.verdicts()] == [float(number - 1)][: number > 0]
    assert [verdict.loss for verdict in agreement.verdicts(all_of_them=True)] == [2.0]
    assert agreement.verdicts(all_of_them=True) == []


@pytest.mark.parametrize("alone", [True, False])
def test_one_rank_stops(alone: bool):
    """One process leaves after the item at which it was asked."""
    mine, seen = runtime(0, 1), []
    with pytest.raises(StopRequested, match="by SIGUSR1"):
        for item in until_stopped(range(5), 5, mine, what="test", alone=alone):
            seen.append(item)
            if item == 1:
                ask(mine)
    assert seen == [0, 1]
    assert list(until_stopped(range(5), 5, replace(mine, stop=StopRequest()), what="test", alone=alone)) == [0, 1, 2, 3, 4]


def test_share_of_good():
    """24 images of which 6 were left out: a sum over 18 becomes their mean when it is scaled by 24 / 18."""
    vector = Agreement(runtime(0, 1), lag=0).vote(Wishes(), num_left_out=6)
    assert float(share_of_good(vector, 24)) == 24 / 18
