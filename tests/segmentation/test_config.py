import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from common.recipes import RECIPES, Setting
from segmentation.config import OF_RECIPE, SHARED_KEYS, load_run
from segmentation.errors import ConfigError
from segmentation.solver import build_clip, build_optimizer

CONFIGS = Path(__file__).parents[2] / "segmentation" / "configs"
PEER = """
MODEL:
  META_ARCHITECTURE: SemanticSegmentor
  SEM_SEG_HEAD:
    NUM_CLASSES: 4
VERSION: 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.yaml").write_text(PEER)
    (tmp_path / "b.yaml").write_text(PEER.replace("4", "5"))
    return tmp_path


def write_run(folder, peers=None, **content):
    if peers is None:
        peers = [{"NAME": "x", "CONFIG": "a.yaml"}, {"NAME": "y", "CONFIG": "b.yaml"}]
    content.setdefault("TRANSFER", {})["PEERS"] = peers
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_file_names_its_peers(folder):
    path = write_run(folder, TRANSFER={"RULE": "better", "WEIGHT": 2}, SOLVER={"BASE_LR": "1e-6"})
    run = load_run([path])
    assert run.names == ["x", "y"]
    assert (run.transfer.RULE, run.transfer.WEIGHT, run.transfer.TEMPERATURE) == ("better", 2, 1.0)
    assert [peer.cfg.SOLVER.BASE_LR for peer in run.peers] == [1e-6, 1e-6]
    assert [peer.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES for peer in run.peers] == [4, 5]
    assert run.output_dir == Path("./output")
    assert run.peers[1].cfg.OUTPUT_DIR == "output/y"


def test_what_is_said_later_wins(folder):
    peers = [
        {"NAME": "x", "CONFIG": "a.yaml", "WEIGHTS": "x.pkl", "OPTS": ["SOLVER.BASE_LR", 3.0]},
        {"NAME": "y", "CONFIG": "b.yaml", "FROZEN": True, "OPTS": ["MODEL.WEIGHTS", "opt.pkl"]},
    ]
    path = write_run(folder, peers, SOLVER={"BASE_LR": 2.0, "MAX_ITER": 7})
    run = load_run([path])
    assert [peer.cfg.SOLVER.BASE_LR for peer in run.peers] == [3.0, 2.0]
    assert [peer.cfg.MODEL.WEIGHTS for peer in run.peers] == ["x.pkl", "opt.pkl"]
    assert [peer.frozen for peer in run.peers] == [False, True]
    options = ["SOLVER.BASE_LR", "4.0", "PEER.y.SOLVER.BASE_LR", "5.0", "TRANSFER.WEIGHT", "2"]
    run = load_run([path], options)
    assert [peer.cfg.SOLVER.BASE_LR for peer in run.peers] == [4.0, 5.0]
    assert run.transfer.WEIGHT == 2.0


def test_given_keys_override_a_recipe_wherever_they_are(folder):
    best = {key: setting.value for key, setting in RECIPES["best-known"].items()}
    node = load_run([write_run(folder)], ["TRANSFER.RECIPE", "best-known"]).transfer
    assert node == load_run([write_run(folder, TRANSFER={"RECIPE": "best-known"})]).transfer
    shown = {name: node[key] for name, key in OF_RECIPE.items() if name != "margin"}
    assert shown == {name: best[name] for name in shown} and node.MARGIN == 0
    given = write_run(folder, TRANSFER={"RECIPE": "paper", "TEMPERATURE": 3, "WEIGHT": 2})
    node = load_run([given]).transfer
    assert (node.RULE, node.TEMPERATURE, node.WEIGHT) == ("best", 3.0, 2.0)
    assert (node.DETACH_TEACHER, node.MODEL_EMA) == (True, False)  # unlike the other tasks
    options = ["TRANSFER.RECIPE", "best-known", "TRANSFER.WEIGHT", "0.5"]
    node = load_run([given], options).transfer  # the command line chooses the recipe
    assert (node.RULE, node.TEMPERATURE, node.WEIGHT) == ("mixture", 3.0, 0.5)
    assert (node.TEACHERS, node.MODEL_EMA) == ("ema+own", True)
    assert load_run([write_run(folder)]).transfer.RULE == "best"


def test_a_recipe_that_wants_what_is_not_offered_is_refused(folder, monkeypatch):
    wants = {**RECIPES["paper"], "gap_power": Setting(1.0, "here")}
    monkeypatch.setitem(RECIPES, "paper", wants)
    with pytest.raises(ConfigError, match=r"paper sets gap_power to 1\.0, which segmentation"):
        load_run([write_run(folder)], ["TRANSFER.RECIPE", "paper"])


def test_several_configs_are_the_short_form(folder):
    run = load_run(
        [folder / "a.yaml", folder / "b.yaml", folder / "a.yaml"], ["TRANSFER.RULE", "mutual"]
    )
    assert run.names == ["a", "b", "a-2"]
    assert run.transfer.RULE == "mutual"


def test_weights_are_found_beside_the_run_file(folder, monkeypatch):
    peers = [{"NAME": n, "CONFIG": "a.yaml", "WEIGHTS": "w.pth"} for n in ("x", "y")]
    path = write_run(folder, peers)
    (folder / "w.pth").touch()
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    options = ["PEER.y.MODEL.WEIGHTS", "hf:some/name"]
    run = load_run([path], options)
    assert [p.cfg.MODEL.WEIGHTS for p in run.peers] == [str(folder / "w.pth"), "hf:some/name"]
    (folder / "here" / "w.pth").touch()
    assert load_run([path]).peers[0].cfg.MODEL.WEIGHTS == "w.pth"


def test_a_config_of_the_model_zoo_is_found_by_its_name(folder):
    peers = [{"NAME": n, "CONFIG": "Misc/semantic_R_50_FPN_1x.yaml"} for n in ("x", "y")]
    run = load_run([write_run(folder, peers)])
    assert run.cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TRANSFER": {"RULL": "best"}}, "unknown key RULL; did you mean RULE"),
        ({"TRANSFER": {"RULE": "worst"}}, "unknown rule 'worst'; choose from best"),
        ({"TRANSFER": {"RULE": "one_way:z"}}, "no peer is named 'z'; peers: x, y"),
        ({"TRANSFER": {"GRANULARITY": "row"}}, "'row'; choose from image, pixel"),
        ({"TRANSFER": {"SCORE": "luck"}}, "'luck'; choose from loss, confidence"),
        ({"TRANSFER": {"WEIGHT": -1.0}}, "WEIGHT is -1.0; expected 0 or more"),
        ({"TRANSFER": {"TEMPERATURE": 0.0}}, "TEMPERATURE is 0.0; expected more than 0"),
        ({"TRANSFER": {"ACCUMULATE": 0}}, "ACCUMULATE is 0; expected 1 or more"),
        ({"TRANSFER": {"WEIGHT": "much"}}, "WEIGHT"),
        ({"TRANSFER": {"RECIPE": "papers"}}, "RECIPE: unknown recipe 'papers'; choose from paper"),
        ({"TRANSFER": {"TEACHERS": "copies"}}, "'copies'; choose from peers, ema, ema\\+own"),
        ({"TRANSFER": {"TEACHERS": "ema"}}, "TEACHERS is 'ema', .*give TRANSFER.MODEL_EMA True"),
        ({"TRANSFER": {"RULE": "self"}}, "rule 'self' needs copies that teach"),
        (
            {"TRANSFER": {"TEACHERS": "ema", "MODEL_EMA": True, "DETACH_TEACHER": False}},
            "no gradient moves",
        ),
        ({"TRANSFER": {"MODEL_EMA_DECAY": 0.9}}, "MODEL_EMA_DECAY is 0.9 without .*; give both"),
        ({"TRANSFER": {"MODEL_EMA_DECAY": 1}}, "MODEL_EMA_DECAY is 1.0; expected more than 0"),
        ({"TRANSFER": {"MODEL_EMA_SPAN": 0.0}}, "MODEL_EMA_SPAN is 0.0; expected a share"),
        (
            {"TRANSFER": {"MODEL_EMA": True}, "TEST": {"PRECISE_BN": {"ENABLED": True}}},
            "peer 'x': TEST.PRECISE_BN with TRANSFER.MODEL_EMA",
        ),
        ({"SOLVER": {"BASE_LRR": 1}}, "unknown key SOLVER.BASE_LRR; did you mean BASE_LR"),
        ({"SOLVER.BASE_LR": 1}, "SOLVER.BASE_LR; write it nested, SOLVER: {BASE_LR: VALUE}"),
        ({"MODEL": {"META_ARCHITECTURE": "Nothing"}}, "'Nothing'; choose from .*SemanticSegmentor"),
        ({"peers": []}, "no peers; list them under TRANSFER.PEERS"),
        ({"peers": ["a.yaml"]}, "TRANSFER.PEERS holds 'a.yaml'; expected keys NAME, CONFIG"),
        ({"peers": [{"NAME": "x", "CONFIG": "a.yaml", "LR": 1}]}, "unknown key 'LR' of a peer"),
        ({"peers": [{"NAME": "x"}]}, "peer 'x' has no CONFIG"),
        ({"peers": [{"NAME": "x", "CONFIG": "c.yaml"}] * 2}, "two peers are named 'x'"),
        ({"peers": [{"NAME": n, "CONFIG": "c.yaml"} for n in "xy"]}, "c.yaml: no such config"),
        ({"peers": [{"NAME": n, "CONFIG": "a.yaml"} for n in ("x", "ensemble")]}, "'ensemble'"),
        ({"peers": [{"NAME": n, "CONFIG": "a.yaml"} for n in ("x", "y.z")]}, "may not hold a dot"),
        ({"peers": [{"NAME": "x", "CONFIG": "a.yaml"}]}, "needs two peers or more, got 1"),
        ({"peers": {"NAME": "x"}}, "PEERS"),
        ({"peers": "a.yaml"}, "PEERS"),
        (
            {"peers": [{"CONFIG": "a.yaml", "OPTS": {"SEED": 1}}]},
            r"OPTS is \{'SEED': 1\}; expected",
        ),
        ({"peers": [{"CONFIG": "a.yaml", "OPTS": "SEED 1"}]}, "OPTS is 'SEED 1'; expected a list"),
        ({"peers": [{"CONFIG": "a.yaml", "FROZEN": "false"}]}, "FROZEN is 'false'; expected true"),
        ({"SOLVER": None}, "SOLVER is None; expected keys, of AMP, .*MAX_ITER"),
        ({"SOLVER": {"MAX_ITER": -5}}, "SOLVER.MAX_ITER is -5; expected 0 or more"),
        ({"DATALOADER": {"NUM_WORKERS": -1}}, "NUM_WORKERS is -1; expected 0 or more"),
        *(
            (
                {"INPUT": {"CROP": {"ENABLED": True, "TYPE": kind, "SIZE": size}}},
                rf"SIZE is {re.escape(str(size))} of TYPE {kind}; expected two {what}",
            )
            for kind, size, what in (
                ("absolute", [0, 8], "whole numbers"),
                ("absolute", [0.5, 0.5], "whole numbers"),
                ("absolute", [8], "whole numbers"),
                ("absolute_range", [9, 8], "whole numbers .*, the smaller"),
                ("relative", [0.5, 1.5], "shares"),
                ("relative_range", [64, 64], "shares"),
            )
        ),
        ({"INPUT": {"CROP": {"ENABLED": True, "TYPE": "abs"}}}, "'abs'; choose from relative, "),
        ({"MODEL": {"PIXEL_MEAN": [1.0]}}, r"'x': MODEL.PIXEL_MEAN is \[1.0\]; expected 3 values"),
    ],
)
def test_run_files_are_refused_by_name(folder, change, message):
    change = dict(change)
    peers = change.pop("peers", None)
    with pytest.raises(ConfigError, match=message):
        load_run([write_run(folder, peers, **change)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.BASE_LR"], "pairs of KEY VALUE; 'SOLVER.BASE_LR' is left over"),
        (["SEED", "1", "--resume"], "--resume: arguments with -- come before KEY VALUE"),
        (["SOLVER.RATE", "1"], "unknown key SOLVER.RATE; .*choose from .*BASE_LR"),
        (["SOLVER.BASE_LR.X", "1"], "unknown key SOLVER.BASE_LR.X; it holds a value"),
        (["PEER.z.SOLVER.BASE_LR", "1"], "PEER.z: no such peer; peers: x, y"),
        (["PEER.x.SOLVER.RATE", "1"], "PEER.x: unknown key SOLVER.RATE"),
        (["TRANSFER.RATE", "1"], "unknown key RATE; choose from .*TEMPERATURE"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER 'many'"),
    ],
)
def test_options_are_refused_by_name(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_run([write_run(folder)], options)


@pytest.mark.parametrize("key", SHARED_KEYS)
def test_peers_must_agree_on_what_they_share(folder, key):
    other = {
        "DATASETS.TRAIN": ("d",),
        "DATASETS.TEST": ("d",),
        "INPUT.MIN_SIZE_TRAIN": (31,),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
        "INPUT.CROP": None,
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.COLOR_AUG_SSD": True,
        "SOLVER.AMP": None,
        "MODEL.DEVICE": "meta",
    }.get(key, 12345)
    key = {"INPUT.CROP": "INPUT.CROP.ENABLED", "SOLVER.AMP": "SOLVER.AMP.ENABLED"}.get(key, key)
    value = str(True if other is None else other)
    with pytest.raises(ConfigError, match=f"peers differ in {key[:10]}.*x: .*y: .*set it for all"):
        load_run([write_run(folder)], [f"PEER.y.{key}", value])
    assert load_run([write_run(folder)], [key, value]).names == ["x", "y"]


@pytest.mark.parametrize("transfer", [None, [1]])
def test_a_transfer_node_without_keys_is_refused(folder, transfer):
    (folder / "run.yaml").write_text(yaml.safe_dump({"TRANSFER": transfer}))
    with pytest.raises(ConfigError, match=r"TRANSFER is .*; expected keys, of ACCUMULATE, .*RULE"):
        load_run([folder / "run.yaml"])


def test_no_list_of_peers_is_refused(folder):
    (folder / "run.yaml").write_text("TRANSFER:\n  PEERS:\n")
    with pytest.raises(ConfigError, match="PEERS is None; expected a list of peers"):
        load_run([folder / "run.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PEER.replace("VERSION: 2", "VERSION: 3"), "a.yaml: VERSION 3: Cannot merge a v3 config"),
        (PEER.replace("VERSION: 2", "VERSION: 1\nSOLVERR:\n  A: 1"), "a.yaml: VERSION 1: "),
        ("\udcff\udcfe", "a.yaml: cannot be read as YAML .*utf-8"),
        ("# nothing\n", "a.yaml: holds no keys"),
        ("<<: 3\n", r"a.yaml: cannot be read as YAML \(expected a mapping"),
    ],
)
def test_peers_configs_that_cannot_be_read_are_named(folder, text, message):
    (folder / "a.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        load_run([write_run(folder)])


def test_python_in_yaml_runs_only_where_the_file_is_trusted(folder):
    tag = "!!python/object/apply:eval"
    (folder / "a.yaml").write_text(PEER + f'INPUT:\n  MAX_SIZE_TEST: {tag} ["7 * 6"]\n')
    with pytest.raises(ConfigError, match=r"holds Python to run.*--allow-unsafe-config"):
        load_run([write_run(folder)])
    assert load_run([write_run(folder)], allow_unsafe=True).cfg.INPUT.MAX_SIZE_TEST == 42


def test_missing_and_broken_files(folder):
    with pytest.raises(ConfigError, match="no config was given"):
        load_run([])
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_run([folder / "none.yaml"])
    (folder / "run.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_run([folder / "run.yaml"])
    with pytest.raises(ConfigError, match="a run file, not the config of one peer"):
        load_run([write_run(folder), folder / "a.yaml"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_project_reads_without_code(path):
    content = yaml.safe_load(path.read_text())
    if "TRANSFER" in content:
        run = load_run([path])
        assert len(run.peers) >= 2


def test_the_published_settings_are_in_the_ade20k_runs():
    for path in (CONFIGS / "ade20k").glob("r50_*.yaml"):
        for peer in load_run([path]).peers:
            solver = peer.cfg.SOLVER
            assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.OPTIMIZER) == (1e-6, 1e-5, "ADAMW")
            assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (4, 160000)
            assert peer.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
            given = peer.cfg.INPUT
            assert (given.CROP.ENABLED, given.CROP.TYPE) == (True, "absolute")
            assert (list(given.CROP.SIZE), given.SIZE_DIVISIBILITY) == ([512, 512], 512)
            assert list(given.MIN_SIZE_TRAIN) == [int(512 * x / 10) for x in range(5, 21)]
            sizes = given.MAX_SIZE_TRAIN, given.MIN_SIZE_TEST, given.MAX_SIZE_TEST
            assert sizes == (2048, 512, 2048)


def test_optimizers_have_the_groups_that_mask2former_knows():
    import torch
    from torch import nn

    cfg = load_run([CONFIGS / "ade20k" / "r50_r101.yaml"]).cfg.clone()
    cfg.defrost()
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.25
    model = nn.ModuleDict(
        {"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "embed": nn.Embedding(3, 2)}
    )
    model.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer(cfg, model)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found[id(model.backbone.weight)] == pytest.approx((1e-7, 1e-5))
    assert found[id(model.backbone.relative_position_bias_table)] == pytest.approx((1e-7, 0))
    assert found[id(model.norm.weight)] == pytest.approx((1e-6, 0))
    assert found[id(model.embed.weight)] == pytest.approx((1e-6, 0.25))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    build_clip(cfg, model)()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    assert build_clip(cfg, model) is None
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ConfigError, match="'LION'; choose from SGD, ADAMW"):
        build_optimizer(cfg, model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="FROZEN: True"):
        build_optimizer(cfg, model)


@pytest.mark.parametrize("kind", ["SGD", "ADAMW"])
@pytest.mark.parametrize("clip", ["none", "full_model", "value", "norm"])
def test_optimizers_skip_an_overflow_and_clip_what_is_unscaled(kind, clip):
    import torch
    from torch import nn

    cfg = load_run([CONFIGS / "ade20k" / "r50_r101.yaml"]).cfg.clone()
    cfg.defrost()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.CLIP_GRADIENTS.ENABLED = kind, clip != "none"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip if clip != "none" else "full_model"
    cfg.SOLVER.BASE_LR = 0.1
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    models[1].load_state_dict(models[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, scaled in zip(models, (True, False), strict=True):
        optimizer, whole = build_optimizer(cfg, model), build_clip(cfg, model)
        assert optimizer.defaults["fused" if clip in ("none", "full_model") else "foreach"]
        for value in (3.0, float("inf"), 5.0):
            loss = (model(torch.ones(1, 2)) * torch.tensor([1.0, 2.0])).sum() * value
            if not scaled:
                if value == float("inf"):
                    continue
                loss.backward()
                if whole:
                    whole()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                if whole:
                    scaler.unscale_(optimizer)
                    whole()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
