from __future__ import annotations

import math
import time

import pytest
import torch
from ignite.engine import Engine, Events

from maisi_tools.errors import InputError
from maisi_tools.training.budget import Budget, by_budget, cosine, late_fall


def run(budget: Budget, epochs: int, length: int, seconds: float = 0.0) -> tuple[int, list[float]]:
    """How many steps of `seconds` there were, and the progress after each."""
    seen: list[float] = []

    def step(engine, batch):
        time.sleep(seconds)

    engine = Engine(step)
    budget.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(budget.progress))
    engine.run(range(length), max_epochs=epochs)
    return len(seen), seen


def test_without_minutes_progress_is_the_share_of_the_steps():
    count, seen = run(Budget(), epochs=2, length=4)
    assert count == 8 and seen == [n / 8 for n in range(1, 9)]


def test_minutes_end_the_run_and_its_schedule():
    budget = Budget(minutes=0.1 / 60)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule = by_budget(optimizer, budget, "cosine")
    count, seen = run(budget, epochs=1000, length=5, seconds=0.02)
    assert 3 <= count <= 5 and seen == sorted(seen) and seen[-1] == 1
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_minutes_end_after_a_whole_step():
    """With two batches a step, an odd number of them would leave half a gradient behind."""
    for length in (4, 5):
        engine = Engine(lambda *_: time.sleep(0.02))
        engine.accumulation_steps = 2
        Budget(minutes=0.01 * length / 60).attach(engine)
        engine.run(range(100), max_epochs=1)
        assert engine.state.iteration % 2 == 0 and engine.state.iteration < 20


def test_a_step_in_which_the_process_stood_still_counts_little():
    budget = Budget(minutes=1.0, longest_step=0.01)
    run(budget, epochs=1, length=3, seconds=0.1)
    assert budget.used == pytest.approx(0.03)


def test_a_resumed_run_goes_on_from_the_time_it_had_used():
    first = Budget(minutes=2.0)
    first.used = 90.0
    first._progress.fill_(0.75)
    again = Budget(minutes=2.0)
    again.load_state_dict(first.state_dict())
    assert (again.used, again.progress) == (90.0, 0.75)
    run(again, epochs=1, length=1)
    assert again.used == pytest.approx(90, abs=0.1) and again.progress >= 0.75


@pytest.mark.parametrize("minutes", [0, -1, math.inf, math.nan, "10"])
def test_minutes_that_are_none_are_refused(minutes):
    with pytest.raises(InputError, match="minutes is .*allowed is a number above 0"):
        Budget(minutes)


def test_shapes():
    assert cosine(0) == 0 and cosine(0.03) == pytest.approx(1) and cosine(1) == pytest.approx(0)
    assert cosine(0.515) == pytest.approx(0.5)
    assert [late_fall(x) for x in (0, 0.3, 0.6)] == [1, 1, 1]
    assert late_fall(0.8) == pytest.approx(0.5) and late_fall(1) == 0
    with pytest.raises(InputError, match="shape is 'linear'; allowed are cosine, late_fall"):
        by_budget(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5), Budget(), "linear")


def test_a_run_that_its_time_ended_is_not_resumed():
    first = Budget(minutes=0.05 / 60)
    count, _ = run(first, epochs=1, length=50, seconds=0.02)
    assert count < 10
    again = Budget(minutes=0.05 / 60)
    again.load_state_dict(first.state_dict())
    assert run(again, epochs=1, length=50)[0] == 0
    longer = Budget(minutes=1.0)
    longer.load_state_dict(first.state_dict())
    assert run(longer, epochs=1, length=3)[0] == 3


def _of_rank(rank: int, address: str, found) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    budget = Budget(minutes=0.5 / 60)
    count, seen = run(budget, epochs=1, length=500, seconds=0.02 + 0.02 * rank)  # the second one is slower
    found[rank] = count, seen
    torch.distributed.destroy_process_group()


def test_the_first_ranks_clock_is_that_of_all(tmp_path):
    """Of another one's, learning rates would differ, and a rank would wait for one that has ended."""
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.start_processes(_of_rank, (f"file://{tmp_path}/ranks", found), 2, start_method="fork")
        assert found[0] == found[1] and 5 < found[0][0] < 50
