"""The command line: timm's names, peers, YAML, and what is refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from classification.options import PEER_OPTIONS, REJECTED, build_parser, parse
from common.average import chosen_decay
from common.options import OptionError

TIMM = json.loads(Path(__file__).with_name("timm_arguments.json").read_text())


def test_every_argument_of_timm_is_taken_or_refused_with_a_sentence():
    options = build_parser()._option_string_actions
    assert not set(TIMM) - set(options)
    assert all(len(reason.split()) > 3 for reason in REJECTED.values())


def test_defaults_are_timms():
    options, _ = parse(["/data", "--peer", "resnet18", "--peer", "resnet34"])
    differ = {}
    for flag, default in TIMM.items():
        dest = flag.lstrip("-").replace("-", "_")
        if flag in REJECTED or dest in ("c", "config", "data_dir", "b", "vb", "j", "dr"):
            continue
        if hasattr(options, dest) and getattr(options, dest) != default:
            differ[dest] = (getattr(options, dest), default)
    # timm trains one model from scratch on CUDA; peers start from their weights, wherever they are,
    # and a decay is told from one that is not given
    assert differ == {
        "pretrained": (None, False),
        "device": ("auto", "cuda"),
        "model_ema_decay": (None, 0.9998),
    }


def test_peer_options_are_options():
    dests = {action.dest for action in build_parser()._actions}
    assert set(PEER_OPTIONS) <= dests


def test_peers_override_the_run():
    options, peers = parse(
        [
            "/data",
            "--peer",
            "vit_base_patch16_224.augreg_in1k,lr=1e-3,mean=0.1+0.2+0.3,kwargs.depth=3,compile=true",
            "--peer",
            "vit_base_patch16_224,frozen=yes,checkpoint=a.pth+b.pth,published=81.1",
            "--peer",
            "hf:org/Some-Net,name=third,opt=lamb",
            "--weight-decay",
            "0.3",
        ]
    )
    one, two, three = peers
    assert [p.name for p in peers] == ["vit_base_patch16_224", "vit_base_patch16_224-2", "third"]
    assert (one.options.lr, one.options.mean) == (1e-3, [0.1, 0.2, 0.3])
    assert one.options.model_kwargs == {"depth": 3} and one.options.torchcompile == "inductor"
    assert two.frozen and two.checkpoint == ["a.pth", "b.pth"] and two.published == 81.1
    assert (two.options.lr, options.lr) == (None, None)
    assert three.options.opt == "lamb" and three.options.weight_decay == 0.3


def test_yaml_under_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "peers:\n- {model: resnet18, name: a, lr: 0.5, kwargs: {zero_init_last: false}}\n"
        "- resnet34,name=b\nlr: 1e-3\nbatch-size: 7\namp: true\nscale: [0.5, 1.0]\n"
    )
    options, peers = parse(["/data", "-c", str(path), "--batch-size", "9"])
    assert (options.lr, options.batch_size, options.amp, options.scale) == (1e-3, 9, True, [0.5, 1])
    assert [(p.name, p.options.lr) for p in peers] == [("a", 0.5), ("b", 1e-3)]
    assert peers[0].options.model_kwargs == {"zero_init_last": False}


def test_peers_on_the_command_line_replace_those_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("peers: [resnet18, resnet34]")
    _, peers = parse(["/data", "-c", str(path), "--peer", "vit", "--peer", "deit"])
    assert [peer.model for peer in peers] == ["vit", "deit"]


TWO = ["--peer", "resnet18", "--peer", "resnet34"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/data"], "no peers"),
        (TWO, "no data"),
        (["/data", "--peer", "resnet18"], "'best' needs two peers or more"),
        (["/data", *TWO, "--rule", "bst"], "unknown rule 'bst'; choose from best"),
        (["/data", *TWO, "--rule", "one_way:resnet"], "peers: resnet18, resnet34"),
        (["/data", "--peer", "resnet18,learning_rate=1", *TWO], "unknown key 'learning_rate'"),
        (["/data", "--peer", "resnet18,lr=fast", *TWO], "lr is 'fast'; expected one float"),
        (["/data", "--peer", "resnet18,frozen=maybe", *TWO], "frozen is 'maybe'; expected true"),
        (["/data", "--peer", "resnet18,clip_mode=big", *TWO], "choose from norm, value, agc"),
        (["/data", "--peer", "resnet18,lr", *TWO], "'lr' is not key=value"),
        (["/data", "--peer", "resnet18,name=a/b", *TWO], "'a/b' cannot be a peer's name"),
        (["/data", "--peer", "a,name=x", "--peer", "b,name=x"], "two peers are named 'x'"),
        (["/data", *TWO, "--batch-size", "0"], "--batch-size is 0"),
        (["/data", *TWO, "-b", "7", "--mixup", "0.2"], "mixup needs an even --batch-size, got 7"),
        (["/data", *TWO, "-b", "7", "--cutmix-minmax", "0.2", "0.8"], "mixup needs an even"),
        (["/data", *TWO, "--start-epoch", "-1"], "--start-epoch is -1; expected 0 or more"),
        (["/data", *TWO, "-vb", "0"], "--validation-batch-size is 0; expected 1 or more"),
        (["/data", *TWO, "--temperature", "0"], "temperature is 0.0; expected more than 0"),
        (["/data", *TWO, "--transfer-weight", "-1"], "weight is -1.0; expected 0 or more"),
        (["/data", *TWO, "--margin", "-1"], "margin is -1.0; expected 0 or more"),
        (["/data", *TWO, "--smoothing", "2"], "--smoothing is 2.0; expected 0 or more, below 1"),
        (["/data", "--peer", "resnet18,published=x", *TWO], "published is 'x'; expected a number"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(OptionError) as error:
        parse(arguments)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("bathc_size: 1", "did you mean batch_size"),
        ("lr: [1, 2]", "lr is [1, 2]; expected one float"),
        ("scale: 1", "scale is 1; expected a list of 2 float"),
        ("scale: [1]", "scale is [1]; expected a list of 2 float"),
        ("amp: perhaps", "expected true or false"),
        ("model: resnet18", "give every model as --peer"),
        ("peers: resnet18", "peers is 'resnet18'; expected a list"),
        ("peers: [{name: a}]", "it needs a `model:`"),
        ("- a", "expected `option: value` lines"),
        ("x: !!python/object/apply:os.system ['true']", "apply:os.system', line 1; write plain"),
        ("x: [1\ny: 2", "line 2; write plain text, numbers, lists and mappings alone"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        parse(["/data", "-c", str(path), *([] if "peers" in content else TWO)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_timms_arguments_without_meaning_here_say_why(capsys):
    with pytest.raises(SystemExit):
        parse(["/data", *TWO, "--jsd-loss"])
    assert "no per-sample score" in capsys.readouterr().err


def test_a_missing_config_is_named():
    with pytest.raises(OptionError, match="no such config file"):
        parse(["/data", "-c", "/nowhere.yaml", *TWO])


def test_namespace_is_plain():
    options, peers = parse(["/data", *TWO])
    assert isinstance(options, argparse.Namespace) and len(peers) == 2


TOLD = {
    "architecture": "resnet18", "model_args": "{}", "input_size": "[3, 32, 32]", "mean": "[0.5]",
    "std": "[0.5]", "interpolation": "bicubic", "crop_pct": "1.0",
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_args": "{"},
        {"model_args": "7"},
        {"input_size": "[3]"},
        {"input_size": "{}"},
        {"mean": '"x"'},
        {"crop_pct": "wide"},
        {"crop_pct": None},
    ],
)
def test_an_export_with_a_broken_description_is_named(tmp_path, wrong):
    told = {key: value for key, value in {**TOLD, **wrong}.items() if value is not None}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=told)
    with pytest.raises(OptionError, match=r"x\.safetensors: its description cannot be read"):
        parse(["/data", "--peer", f"{tmp_path}/x.safetensors", *TWO])


@pytest.mark.parametrize("more", [["--mixup", "0.2"], ["--cutmix", "1"]])
def test_the_non_target_transfer_wants_hard_targets(more):
    asked = ["/data", "--peer", "a", "--peer", "b", "--transfer-classes", "non-target"]
    assert parse(asked)[0].transfer_classes == "non-target"
    with pytest.raises(OptionError, match="leave mixup and cutmix"):
        parse([*asked, *more])


@pytest.mark.parametrize("span", ["0", "1.5", "-0.1"])
def test_an_average_reaches_back_over_a_share_of_the_run(span):
    with pytest.raises(OptionError, match=rf"peer 'b': model-ema-span is {span}.*expected a share"):
        parse(["/data", "--peer", "a", "--peer", f"b,model-ema-span={span}"])


def test_a_decay_that_is_given_goes_before_a_span_whatever_its_value():
    def decays(*more, of_b=""):
        asked = ["/data", "--model-ema", "--peer", "a", "--peer", f"b{of_b}", *more]
        own = [peer.options for peer in parse(asked)[1]]
        return [chosen_decay(o.model_ema_decay, o.model_ema_span, 1000) for o in own]

    span = ("--model-ema-span", "0.1")
    assert decays() == [0.9998] * 2
    assert decays(*span) == [0.99] * 2
    for given in (0.9998, 0.5):
        assert decays(*span, "--model-ema-decay", str(given)) == [given] * 2
        assert decays("--recipe", "best-known", "--model-ema-decay", str(given)) == [given] * 2
        assert decays(*span, of_b=f",model_ema_decay={given}") == [0.99, given]
    run = ("--model-ema-decay", "0.5")
    assert decays(*run, of_b=",model-ema-span=0.1") == [0.5, 0.99]
    assert decays(*run, of_b=",model-ema-span=0.1,model-ema-decay=0.7") == [0.5, 0.7]


def test_what_an_average_would_leave_without_effect_is_refused():
    asked = ["/data", "--peer", "a", "--peer", "b"]
    with pytest.raises(OptionError, match="model-ema-span without --model-ema"):
        parse([*asked, "--model-ema-span", "0.5"])
    with pytest.raises(OptionError, match="fitted on the averages"):
        parse([*asked, "--model-ema", "--calibrate-scores", "epoch"])


def test_temperatures_of_scores_that_nobody_compares_are_refused():
    asked = ["/data", "--peer", "a", "--peer", "b", "--calibrate-scores", "start"]
    for rule in ("mutual", "none", "random", "one_way:b"):
        with pytest.raises(OptionError, match=f"start under --rule {rule}: no scores .*mixture"):
            parse([*asked, "--rule", rule])
    with pytest.raises(OptionError, match="under --rule self"):
        parse([*asked, "--rule", "self", "--teachers", "ema", "--model-ema", "--margin", "1"])
    for more in (
        ["--rule", "better"],
        ["--rule", "mutual", "--margin", "0.1"],
        ["--rule", "random", "--gap-power", "1"],
        ["--recipe", "paper"],
    ):
        assert parse([*asked, *more])[0].calibrate_scores == "start"
    assert parse([*asked[:5], "--recipe", "paper", "--rule", "mutual"])


def test_averaged_copies_teach_only_where_there_are_some():
    asked = ["/data", "--peer", "a", "--peer", "b,frozen=true", "--teachers", "ema"]
    assert parse([*asked, "--model-ema"])[0].teachers == "ema"
    assert parse([*asked, "--rule", "none"])[0].teachers == "ema"  # nobody is asked
    for more, message in (
        ([], "a has no averaged copy"),
        (["--model-ema", "--model-ema-force-cpu"], "on the peer's own device"),
        (["--model-ema", "--no-detach-teacher"], "no gradient moves"),
    ):
        with pytest.raises(OptionError, match=message):
            parse([*asked, *more])
    with pytest.raises(OptionError, match="needs copies that teach"):
        parse(["/data", "--peer", "a", "--peer", "b", "--rule", "self"])
