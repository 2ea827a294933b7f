"""The plan of saliency models against a real step, and its command line."""

import logging

import pytest
import torch

from common.distributed import World
from common.engine import ENGINES
from common.memory import peak_saved_bytes, tensors_in
from common.peers import PeerGroup
from common.planner import engine_costs
from common.transfer import KnowledgeTransfer
from saliency import plan
from saliency.options import parse
from saliency.peer import build_modules, build_peers
from saliency.plan import measure_team, random_batch
from saliency.train import main
from tests.common.test_planner import memory_for, two_peers

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
PEERS = ["--peer", "tests.saliency.toy:Deep", "--peer", "tests.saliency.toy:Flat"]


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_activations_are_those_of_a_real_step(engine):
    options, specs = parse("dhf1k", "train_dhf1k", [*PEERS, "--plan", "-b", "3", "--nss", "-0.1"])
    team = measure_team(options, specs, HERE, None)
    modules, views = build_modules(specs)
    peers = PeerGroup(build_peers(specs, modules, views, options, HERE, updates=1))
    for peer in peers:
        peer.train()
    batch = random_batch(views, options, 3, CPU)
    known = list(tensors_in([*modules, batch]))
    step = ENGINES[engine](peers, KnowledgeTransfer("best", names=peers.names), CPU).step
    real = peak_saved_bytes(lambda: step(batch, step=0), known)
    assert engine_costs(team)[engine].activations == real


def test_the_command_line_tells_and_writes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        asked = [*PEERS, "--plan", "--gpu-mem", "1G", "--amp", "--device", "cpu"]
        assert main("dhf1k", "train_dhf1k", asked) == 0
    assert "Take joint" in caplog.text and "Deep" in caplog.text
    assert "peer-parallel" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_for_each_peer_is_offered_with_its_command(monkeypatch, caplog):
    team = two_peers()
    monkeypatch.setattr(plan, "measure_team", lambda *given: team)
    memory = memory_for(engine_costs(team)["two-pass"].peak) - 1
    with caplog.at_level(logging.INFO):
        asked = [*PEERS, "--plan", "--gpu-mem", f"{memory / 1024:.6f}K", "--device", "cpu"]
        assert main("dhf1k", "train_dhf1k", asked) == 0
    assert "--nproc-per-node=2 saliency/train_dhf1k.py and add: --engine peer-par" in caplog.text
