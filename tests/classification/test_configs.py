"""The shipped configurations: they parse, name models that exist, and say how to run them."""

from pathlib import Path

import pytest
import timm

from classification.models import PUBLISHED_TOP1
from classification.options import parse
from common import recipes
from common.options import OptionError

CONFIGS = Path(__file__).parents[2] / "classification" / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_recipe_is_the_published_setting(path):
    options, peers = parse(["/data", "-c", str(path)])
    assert (options.opt, options.lr, options.weight_decay) == ("adam", 1e-6, 1e-5)
    assert (options.sched, options.epochs, options.rule) == ("none", 20, "best")
    assert (options.temperature, options.transfer_weight) == (1.0, 1.0)
    assert not options.detach_teacher and not options.amp and options.smoothing == 0
    for peer in peers:
        assert peer.model in PUBLISHED_TOP1 or peer.model in timm.list_pretrained()
        assert peer.published in (None, PUBLISHED_TOP1.get(peer.model))
    head = path.read_text()
    assert f"classification/train.py IMAGENET -c classification/configs/paper/{path.name}" in head
    processes = int(head.split("--nproc-per-node=")[1].split()[0])
    assert processes * options.batch_size == 128
    assert "# Hardware:" in head and "# Published:" in head and "Not run here" in head


def test_there_is_a_recipe_for_every_published_run():
    assert [len(parse(["/data", "-c", str(path)])[1]) for path in PAPER] == [2, 2, 4, 3]


@pytest.mark.parametrize("path", sorted((CONFIGS / "demo").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_demo_config_parses(path):
    more = [] if "pretrain" in path.stem else ["--peer", "resnet18", "--peer", "resnet34"]
    options, _ = parse(["/data", "-c", str(path), *more])
    assert options.num_classes == 10 and options.workers == 1


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_paper_s_configs_are_the_paper_s_recipe(path):
    options, _ = parse(["/data", "-c", str(path), "--recipe", "paper"])
    assert recipes.told(options) == "paper"


def test_the_best_known_recipe_gives_every_learner_an_average_that_teaches():
    options, peers = parse(
        ["/data", "--peer", "a", "--peer", "b,frozen=true", "--recipe", "best-known"]
    )
    assert (options.rule, options.teachers, options.temperature) == ("mixture", "ema+own", 2.0)
    assert peers[0].options.model_ema and peers[0].options.model_ema_span == 0.25
    with pytest.raises(OptionError, match="no gradient moves"):
        parse(
            ["/data", "--peer", "a", "--peer", "b", "--recipe", "best-known", "--no-detach-teacher"]
        )
