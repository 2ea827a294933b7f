"""What a team needs, from its members: who is measured when, and which engine it fits."""

from dataclasses import replace

import pytest
import torch

from common.planner import engine_costs, usable
from common.scouting import Team
from common.team_costs import TeamCosts, rule_of, shown_costs
from common.transfer import KnowledgeTransfer
from tests.common.test_planner import two_peers


class Sized(TeamCosts):
    """Two models, of which the second wants a size that changes what the first needs."""

    def __init__(self, **rest):
        self.measured = []
        shapes = {"score": (torch.Size([4]), torch.float32)}
        shapes["logits"] = torch.Size([4, 5]), torch.float32
        self.peers = [replace(peer, shapes=shapes) for peer in two_peers().peers]
        self.rule = "best"
        options = {"batch": 4, "accumulate": 1, "engine": "joint", "budget": None} | rest
        super().__init__(2, watch=lambda items, title: items, **options)

    def setting(self, members):
        return max(members)

    def measure(self, model, setting):
        self.measured.append((model, setting))
        return self.peers[model]

    def inputs(self, members):
        return 1000 * len(members)

    def transfer(self, names, frozen):
        return KnowledgeTransfer(rule_of(self.rule, names), names=names, frozen=frozen)


def pair():
    return Team((0, 1), [], [], [], {}, 0.0)


def test_a_model_is_measured_once_in_each_setting():
    costs = Sized()
    assert costs.measured == [(0, 0), (1, 1)]
    for _ in range(2):
        assert costs(pair())
    assert costs.measured == [(0, 0), (1, 1), (0, 1)]


def test_what_does_not_fit_under_the_runs_engine_is_tried_under_two_pass():
    free, costs = pair(), engine_costs(Sized().of((0, 1)))
    joint, two_pass = costs["joint"].peak, costs["two-pass"].peak
    assert two_pass < joint
    assert Sized()(free) and (free.engine, free.memory) == ("joint", joint)
    for need, fits, engine in (
        (joint, True, "joint"),
        (joint - 1, True, "two-pass"),
        (two_pass - 1, False, "two-pass"),
    ):
        team = pair()
        budget = next(b for b in range(need, 2 * need) if usable(b) == need)
        assert Sized(budget=budget)(team) == fits and team.engine == engine
    assert Sized(engine="peer-parallel")(free) and free.engine == "peer-parallel"


def test_the_inputs_and_the_objective_are_of_the_team():
    found = Sized(accumulate=3).of((0, 1))
    assert found.inputs == 2000 and found.accumulate == 3 and found.batch == 4
    assert found.transfer.peak > 0


@pytest.mark.parametrize(
    ("rule", "expected"), [("best", "best"), ("one_way:x", "one_way:a"), ("mutual", "mutual")]
)
def test_a_teacher_that_is_not_in_a_team_costs_as_much_as_another(rule, expected):
    assert rule_of(rule, ["a", "b"]) == expected


def test_shown_costs_are_none_where_nothing_was_measured():
    assert shown_costs({"memory": None}) == {}
    told = {"memory": 2**31, "engine": "joint", "step_seconds": None}
    assert shown_costs(told) == {"engine": "joint", "memory": "2.00 G", "step": "-"}
