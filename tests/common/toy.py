"""Toy peers: linear classifiers on random points, enough to test the machinery."""

import torch
import torch.nn.functional as F
from torch import nn

from common.distributed import World
from common.engine import JointEngine
from common.peers import Peer, PeerGroup
from common.trainer import Plan, Trainer, rng_state
from common.transfer import KnowledgeTransfer, PeerOutput

CLASSES, FEATURES = 5, 8
HERE = World(0, 1, 0, torch.device("cpu"))


class ToyPeer(Peer):
    def forward(self, batch):
        x, y = batch
        logits = self.model(x).float()
        loss = F.cross_entropy(logits, y, reduction="none")
        return PeerOutput(
            loss.mean(), -loss.detach(), logits, correct=logits.argmax(1) == y, target=y
        )


class Halving:
    """A schedule that halves the rate after every epoch."""

    def __init__(self, optimizer):
        self.optimizer, self.epoch = optimizer, 0

    def step(self, epoch, metric=None):
        self.epoch = epoch
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 * 0.5**epoch

    def step_update(self, num_updates, metric=None):
        pass

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def make_peers(count, seed=0, frozen=(), dropout=0.0, clip=None, dtype=torch.float32):
    peers = []
    for i in range(count):
        torch.manual_seed(100 * seed + i)
        hidden = 4 + 4 * i
        module = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, CLASSES)
        ).to(dtype)
        rest = {"frozen": f"p{i}" in frozen}
        if not rest["frozen"]:
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            rest |= {"optimizer": optimizer, "schedule": Halving(optimizer), "clip": clip}
        peers.append(ToyPeer(f"p{i}", module, **rest))
    return PeerGroup(peers)


def make_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, FEATURES, generator=generator)
    return x, (x[:, :CLASSES] + 0.5 * torch.randn(size, CLASSES, generator=generator)).argmax(1)


class ToyLoader:
    """Seeded batches by epoch and position."""

    def __init__(self, batches=6, size=16):
        self.batches, self.size, self.epoch, self.start = batches, size, 0, 0

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return self.batches

    def __iter__(self):
        for k in range(self.start, self.batches):
            yield make_batch(self.size, seed=1000 * self.epoch + k)


def rank_state():
    """Return what a process of a run leaves in a run's files, as small as can be."""
    return {
        "rng": rng_state(HERE.device),
        "ledger": {"interval": torch.zeros(1), "epoch": torch.zeros(1), "tells": True},
        "transfer": {"generator": None},
        "buffers": {},
    }


def run_state(epoch=0, batch=0, **config):
    """Return a run file's content without peers."""
    told = {"epoch": epoch, "batch": batch, "updates": 0, "best": {}, "history": [], "lessons": []}
    return {
        "peers": {}, "progress": told, "ranks": [rank_state()], "scaler": {}, "evaluator": {},
        "config": config,
    }  # fmt: skip


class ToyEvaluator:
    def evaluate(self, peers):
        x, y = make_batch(200, seed=99)
        with torch.no_grad():
            found = {}
            for peer in peers:
                peer.module.eval()
                right = peer.best_module(x).argmax(1) == y
                found[f"{peer.name}/top1"] = 100 * right.float().mean().item()
        return found

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def make_trainer(folder, peers=None, rule="best", loader=None, world=HERE, amp_dtype=None, **plan):
    peers = peers or make_peers(3, dropout=0.3)
    transfer = KnowledgeTransfer(rule, names=peers.names, frozen=peers.frozen)
    plan = {"epochs": 3, "log_every": 2, **plan}
    return Trainer(
        peers=peers,
        engine=JointEngine(peers, transfer, torch.device("cpu"), amp_dtype),
        transfer=transfer,
        loader=loader or ToyLoader(),
        evaluator=ToyEvaluator(),
        plan=Plan(**plan),
        folder=folder,
        world=world,
    )
