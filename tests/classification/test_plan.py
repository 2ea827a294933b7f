"""The plan of classifiers: fake against real, and its command line."""

import logging

import pytest
import torch
from timm.optim import create_optimizer_v2

from classification.data import common_view, view_of
from classification.models import create_classifier
from classification.options import parse
from classification.peer import build_modules, build_peers
from classification.plan import measure_team
from classification.train import main
from common.costs import measure_peer
from common.distributed import World
from common.engine import ENGINES
from common.memory import bytes_of, peak_saved_bytes, tensors_in
from common.peers import PeerGroup
from common.planner import engine_costs
from common.transfer import KnowledgeTransfer
from tests.common.toy import ToyPeer

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
TINY = {
    "vit": "vit_tiny_patch16_224,img_size=64,pretrained=false,kwargs.depth=2",
    "conv": "resnet18,img_size=64,pretrained=false",
}


def asked(*flags, names=("vit", "conv")):
    peers = [part for name in names for part in ("--peer", f"{TINY[name]},name={name}")]
    return parse(["/data", *peers, "--opt", "adamw", "--lr", "1e-4", "-b", "4", *flags])


@pytest.fixture(scope="module")
def built():
    options, specs = asked()
    modules, views = build_modules(specs, options)
    team = measure_team(options, specs, modules, views, HERE)
    peers = PeerGroup(build_peers(specs, modules, views, options, HERE, 1)[0])
    return team, peers, common_view(views)


def batch_of(view, samples):
    return torch.randn(samples, *view.size), torch.randint(1000, (samples,))


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_activations_are_those_of_a_real_step(built, engine):
    team, peers, view = built
    for peer in peers:
        peer.train()
    batch = batch_of(view, 4)
    known = [*tensors_in([peer.module for peer in peers]), *batch]
    step = ENGINES[engine](peers, KnowledgeTransfer("best", names=peers.names), CPU).step
    real = peak_saved_bytes(lambda: step(batch, step=0), known)
    assert engine_costs(team)[engine].activations == real


def test_a_plan_knows_optimizer_weights_and_what_was_timed(built):
    team, peers, _ = built
    for cost, peer in zip(team.peers, peers, strict=True):
        assert cost.weights == bytes_of(peer.module)
        assert cost.gradients == sum(p.numel() * 4 for p in peer.module.parameters())
        steps = 4 * len(list(peer.module.parameters()))
        assert cost.optimizer == 2 * cost.gradients + steps
        assert cost.scaled_from is None and cost.timed_on == 2
        assert cost.forward > 0 and cost.train > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "conv"])
def test_fake_tensors_count_as_real_ones(name, dtype):
    options, specs = asked(names=(name, *(other for other in TINY if other != name)))
    modules, views = build_modules(specs, options)
    view = common_view(views)
    peer = build_peers(specs, modules, views, options, HERE, 1)[0][0]
    real = batch_of(view, 4)

    class Looking(type(peer)):
        def forward(self, batch):
            assert float(batch[0].sum()) != 7  # as no fake tensor allows
            return super().forward(batch)

    def draw(samples, device):
        return torch.rand(samples, *view.size), torch.randint(1000, (samples,))

    fake = measure_peer(peer, draw, 4, CPU, dtype, timed=False)
    peer.__class__ = Looking
    true = measure_peer(peer, lambda n, d: real, 4, CPU, dtype, timed=False, few=4)
    if dtype is None:
        assert fake.step == true.step
    else:  # fake statistics of norms have half the bytes of true ones
        assert fake.step.saved == pytest.approx(true.step.saved, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adafactor", "muon", "madgrad"])
def test_timms_optimizers_have_the_state_of_a_real_step(name):
    module = create_classifier("resnet10t", num_classes=10)
    optimizer = create_optimizer_v2(module, name, lr=1e-3)
    peer = ToyPeer("p", module, optimizer=optimizer)

    def draw(samples, device):
        x = torch.rand(samples, 3, 64, 64, device=device)
        return x, torch.randint(10, (samples,), device=device)

    planned = measure_peer(peer, draw, 2, CPU, timed=False).optimizer
    peer.forward(draw(2, CPU)).task_loss.backward()
    optimizer.step()
    assert planned == bytes_of(optimizer.state)


def command(*flags):
    peers = [part for name, peer in TINY.items() for part in ("--peer", f"{peer},name={name}")]
    return ["-b", "4", "--opt", "adamw", "--lr", "1e-4", *peers, "--plan", *flags]


@pytest.mark.parametrize(
    ("memory", "advice"),
    [("24G", "Take joint"), ("235M", "Take two-pass"), ("100M", "Nothing fits")],
)
def test_the_command_line_tells_and_writes_nothing(tmp_path, monkeypatch, caplog, memory, advice):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert main(command("--gpu-mem", memory)) == 0
    told = caplog.text
    assert advice in told
    assert all(word in told for word in ("vit", "conv", "two-pass", "peer-parallel"))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_no_data_and_refuses_what_a_run_would(capsys, caplog):
    frozen = [part for peer in TINY.values() for part in ("--peer", f"{peer},frozen=true")]
    assert main([*frozen, "--plan"]) == 1
    assert "every peer is frozen" in caplog.text
    with pytest.raises(SystemExit):
        main(command("--gpu-mem", "24"))
    assert "expected one such as 24G" in capsys.readouterr().err


def test_views_are_the_runs(built):
    options, specs = asked()
    modules, _ = build_modules(specs, options)
    assert view_of(modules[0], specs[0].options).size == built[2].size == (3, 64, 64)
