"""Experiments on toy peers: a task of ``common.experiment`` in a page."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from common import experiment
from common.card import file_sum
from common.checkpoint import load_run, newest_good_run, read_weights, save_weights
from common.engine import JointEngine
from common.experiment import Measured, Trained
from common.options import OptionError
from common.peers import PeerGroup
from common.roles import check_rule
from common.trainer import Plan, Trainer
from common.transfer import KnowledgeTransfer
from tests.common.toy import CLASSES, FEATURES, HERE, ToyEvaluator, ToyLoader, ToyPeer, make_batch

CPU = torch.device("cpu")


class Loader(ToyLoader):
    """Batches of a seed's own."""

    def __init__(self, seed):
        super().__init__(batches=4)
        self.seed = seed

    def __iter__(self):
        for k in range(self.start, self.batches):
            yield make_batch(self.size, seed=10**6 * (self.seed + 1) + 1000 * self.epoch + k)


def built(entry):
    torch.manual_seed(len(entry["name"]))
    width = entry.get("width", 8)
    module = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
    if entry["model"] != "toy":
        module.load_state_dict(read_weights(entry["model"]))
    return module


def right(module, seed):
    x, y = make_batch(300, seed=seed)
    with torch.no_grad():
        return module(x).argmax(1) == y, y


class ToyTask:
    module = "tests.common.toy_experiment"
    metric = "top1"
    lower_is_better = False
    suffix = ".safetensors"
    known = frozenset("peers rule seed held_out epochs lr device".split())

    def __init__(self):
        self.measurements = 0

    def read(self, path):
        return json.loads(path.read_text())

    def check(self, options):
        names = [entry["name"] for entry in options["peers"]]
        try:
            check_rule(options["rule"], names)
        except ValueError as error:
            raise OptionError(str(error)) from error
        if set(options) - self.known:
            raise OptionError(f"unknown options {set(options) - self.known}")
        return names

    def hidden(self, peer, train, own):
        return experiment.hidden_by(peer, own, {"rate": "lr"})

    def sources(self, options):
        models = [entry["model"] for entry in options["peers"]]
        return {model: file_sum(Path(model)) for model in models if model != "toy"}

    def start(self, options, files):
        modules = {entry["name"]: built(entry) for entry in options["peers"]}
        for name, module in modules.items():
            save_weights(files[name], module.state_dict())
        return {
            what: self._measured(modules, seed) for what, seed in (("held_out", 99), ("test", 77))
        }

    def started(self, peer, name, file):
        return {**peer, "model": str(file)}

    def train(self, options, folder):
        peers = []
        for entry in options["peers"]:
            module = built(entry)
            optimizer = torch.optim.SGD(module.parameters(), lr=options.get("lr", 0.1))
            peers.append(ToyPeer(entry["name"], module, optimizer=optimizer))
        group = PeerGroup(peers)
        transfer = KnowledgeTransfer(options["rule"], names=group.names, seed=options["seed"])
        trainer = Trainer(
            peers=group,
            engine=JointEngine(group, transfer, CPU),
            transfer=transfer,
            loader=Loader(options["seed"]),
            evaluator=ToyEvaluator(),
            plan=Plan(epochs=options["epochs"], log_every=2),
            folder=folder,
            world=HERE,
        )
        found = newest_good_run(folder)
        if found is not None:
            trainer.resume(load_run(found[0]))
        progress = trainer.fit()
        chosen = {name: (best.epoch, best.value) for name, best in progress.best.items()}
        return Trained(progress.history, progress.lessons, chosen, progress.updates)

    def measure(self, options, files, start):
        self.measurements += 1
        entries = {entry["name"]: entry for entry in options["peers"]}
        modules = {}
        for name, file in files.items():
            state = read_weights(file)
            width = len(state["0.bias"])
            entry = {**entries.get(name, {}), "name": name, "width": width, "model": str(file)}
            modules[name] = built(entry)
        return self._measured(modules, 77)

    def _measured(self, modules, seed):
        found = Measured({})
        for name, module in modules.items():
            good, y = right(module, seed)
            found.metrics[f"{name}/top1"] = 100 * good.double().mean().item()
            found.classes[name] = {
                str(k): 100 * good[y == k].double().mean().item() for k in range(CLASSES)
            }
        return found


if __name__ == "__main__":
    sys.exit(experiment.main(ToyTask(), (), sys.argv[1:]))
