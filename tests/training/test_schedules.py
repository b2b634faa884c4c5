from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser

from maisi_tools.errors import find_input_error
from maisi_tools.training.budget import Budget, by_budget
from maisi_tools.training.schedules import cosine, one_cycle, warm_up


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def rates(made, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.step()
    return found


def test_warm_up_multiplies_the_first_epochs():
    made = warm_up(optimizer(), 0.5, 12, [[2, 0.01], [4, 0.1]], epoch_steps=2)
    assert rates(made, 12) == pytest.approx([0.005] * 4 + [0.05] * 4 + [0.5] * 4)
    assert rates(warm_up(optimizer(), 0.5, 3, [], epoch_steps=2), 3) == [0.5] * 3


@pytest.mark.parametrize("given", ["cosine", "one_cycle", 3, None])
def test_a_schedule_by_a_name_alone_is_refused_with_those_that_the_config_has(repo_root, given):
    """Before any data are read; those that the message names are there."""
    parser = ConfigParser()
    parser.read_config(str(repo_root / "bundles" / "maisi_vae" / "configs" / "train.json"))
    place = next(i for i, line in enumerate(parser["initialize"]) if "check_schedule" in str(line))
    parser["schedule"] = given
    with pytest.raises(RuntimeError) as refused:
        parser.get_parsed_content(f"initialize#{place}")
    said = str(find_input_error(refused.value))
    assert f"schedule is {given!r}; allowed are '@one_cycle', '@cosine' and '@warm_up'" in said
    assert all("schedules." in parser[name]["_target_"] for name in ("one_cycle", "cosine", "warm_up"))
    for allowed in ("@one_cycle", "@cosine"):
        parser["schedule"] = allowed
        parser.parse()
        parser.get_parsed_content(f"initialize#{place}")


@pytest.mark.parametrize("steps", [1, 2, 20, 100])
def test_one_cycle_reaches_its_rate_and_ends_near_zero(steps):
    found = rates(one_cycle(optimizer(), 0.5, steps), steps)
    assert max(found) == pytest.approx(0.5, rel=0.05) or steps < 20
    assert steps == 1 or found[-1] < 0.01 * 0.5


def test_the_cosine_is_that_of_the_budget():
    budget = Budget(None)
    made = cosine(optimizer(), 0.5, 10, budget)
    expected = by_budget(optimizer(), budget, "cosine")
    for progress in (0.0, 0.01, 0.03, 0.5, 1.0):
        budget._progress.fill_(progress)
        assert made.lr_lambdas[0](0) == expected.lr_lambdas[0](0)
    assert made.lr_lambdas[0](0) == pytest.approx(0, abs=1e-6)
