"""Cards beside every learning peer, and the layout that stock timm loads; uploads go to a fake."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import timm
import torch
import torchvision
import yaml

from classification.cards import files_of, front, images_of, origin
from classification.experiment import Classification
from classification.options import parse
from classification.publish import check_push, claims_of
from classification.push import main as push_main
from classification.push import push
from classification.train import main, open_both, run
from common.card import Files, from_json, told_files
from common.checkpoint import load_run, read_weights
from common.options import OptionError
from tests.classification.test_train import arguments_of, vit
from tests.common.toy import HERE
from tests.launch import launch

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
SHA = "sha256 `{}`"


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A run of two learning peers, one of them from a file, and a frozen one."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, **KWARGS)
    torch.save(module.state_dict(), root / "start.pth")
    asked = arguments_of(digits, root, "--soup", epochs=2)
    asked[asked.index(vit("a"))] = vit("a", checkpoint=root / "start.pth")
    asked += ["--peer", vit("old", frozen="true")]
    return root / "run", run(asked, bars=False), asked


def card_of(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def sum_of(path):
    return SHA.format(hashlib.sha256(path.read_bytes()).hexdigest())


def files_in(folder):
    return told_files(Files([str(path) for path in folder.glob("*/*.png")], str(folder)))


def test_every_learning_peer_gets_a_card_of_its_own_run(trained, digits):
    folder, progress, _ = trained
    assert not (folder / "old" / "README.md").exists()
    for name in ("a", "b"):
        head, text = card_of(folder / name)
        assert head["library_name"] == "timm" and head["pipeline_tag"] == "image-classification"
        assert "license" not in head and "base_model" not in head
        assert sum_of(folder / name / "best.safetensors") in text
        assert sum_of(folder / "args.yaml") in text
        best = progress.best[name]
        row = next(r for r in progress.history if r["epoch"] == best.epoch)
        before = progress.history[0][f"{name}/top1"]
        assert f"| top-1 (%) | {before:.4g} | {best.value:.4g} |" in text
        fixed, broken = row.get(f"{name}/fixed"), row.get(f"{name}/broken")
        assert f"fixed images: {fixed:.0f}, broken images: {broken:.0f}" in text
        assert f"after epoch {best.epoch} of 2" in text
        assert "400 images to train on" in text and "200 images of" in text
        assert f"| files trained on | {files_in(digits / 'train')} |" in text
        assert f"| files measured on | {files_in(digits / 'validation')} |" in text
        assert "peer `old` (vit_tiny_patch16_224, frozen), start" in text
        assert sum_of(folder.parent / "start.pth") in text
        assert str(folder.parent) not in text  # nobody's home
        assert timm.__version__ in text and torch.__version__ in text


def opened(data, tmp_path, *more):
    options, _ = parse(arguments_of(data, tmp_path, *more))
    return open_both(options, 3, 10)


def test_the_sum_of_the_files_changes_where_one_is_added(digits, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    before = images_of(*opened(digits, tmp_path), HERE).files
    assert images_of(*opened(copy, tmp_path), HERE).files == before
    first = min((copy / "train").glob("*/*.png"))
    shutil.copy(first, first.with_name("added.png"))
    after = images_of(*opened(copy, tmp_path), HERE).files
    assert after["files trained on"] == files_in(copy / "train") != before["files trained on"]
    assert after["files measured on"] == before["files measured on"]


def test_parts_of_folders_have_their_own_files_and_other_data_none(digits, tmp_path):
    parts = [files_of(part) for part in opened(digits, tmp_path, "--held-out", "0.25")]
    assert [len(part.paths) for part in parts] == [300, 100]
    whole = files_of(opened(digits, tmp_path)[0])
    assert sorted(parts[0].paths + parts[1].paths) == sorted(whole.paths)
    as_torch = torchvision.datasets.ImageFolder(digits / "train")
    assert told_files(files_of(as_torch)) == told_files(whole)
    images = images_of([0, 1], [0], HERE)
    assert all(told.startswith("no sum") for told in images.files.values())


def test_the_loading_line_of_the_card_loads_the_file(trained, monkeypatch):
    folder, _, _ = trained
    _, text = card_of(folder / "b")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder / "b")
    loaded = eval(code.split("\n")[-2], {"timm": timm})
    weights = read_weights(folder / "b" / "best.safetensors")
    assert all(torch.equal(x, weights[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("which", ["best", "last", "soup"])
def test_stock_timm_loads_the_folder_with_equal_logits(trained, tmp_path, which):
    folder, progress, _ = trained
    places = push([str(folder), "--folder", str(tmp_path / "out"), "--which", which])
    assert list(places) == ["a", "b"]
    for name, size in (("a", 32), ("b", 24)):
        out = tmp_path / "out" / name
        assert {path.name for path in out.iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
        }
        module = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        same = timm.create_model("vit_tiny_patch16_224", img_size=size, **KWARGS).eval()
        same.load_state_dict(read_weights(folder / name / f"{which}.safetensors"), strict=True)
        assert module.pretrained_cfg["label_names"] == [str(k) for k in range(10)]
        told = json.loads((out / "config.json").read_text())["pretrained_cfg"]
        assert not {"tag", "license", "origin_url", "paper_ids"} & set(told)  # as its card says
        images = torch.randn(3, 3, size, size)
        assert torch.equal(module(images), same(images))
        view = timm.data.resolve_model_data_config(module)
        assert view["input_size"] == (3, size, size)
        assert tuple(view["mean"]) == ((0.4, 0.4, 0.4) if name == "b" else (0.5, 0.5, 0.5))
        _, text = card_of(out)
        assert sum_of(out / "model.safetensors") in text and "checkpoint_path" in text
        if which == "last":
            assert f"{progress.history[-1][f'{name}/loss']:.4g}" in text
        if which == "soup":
            told = json.loads((folder / name / "soup.json").read_text())
            assert f"| top-1 (%) | {told['measured'][0]:.4g} |" in text and "average" in text


@pytest.fixture
def hub(monkeypatch):
    """Takes what would be uploaded."""
    taken = {}

    class Api:
        def __init__(self, token=None, **rest):
            assert token == "secret"

        def create_repo(self, repo, private, exist_ok):
            if repo.startswith("closed/"):
                raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
            taken[repo] = {"private": private, "exist_ok": exist_ok}

        def upload_folder(self, repo_id, folder_path, commit_message):
            module = timm.create_model(f"local-dir:{folder_path}", pretrained=True)
            with open(f"{folder_path}/README.md") as file:
                taken[repo_id] |= {"weights": module.state_dict(), "card": file.read()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return taken


def test_push_uploads_weights_and_card(trained, hub, tmp_path):
    folder, _, _ = trained
    effect = {"mean": 1, "low": 0, "high": 2, "count": 9, "p_holm": 0.04, "shown": True}
    test = {"names": ["b"], "metric": "top1", "control": "none", "level": 0.95}
    gains = {"gains": {"best": {"mean": effect}}, "peer_gains": {"best": {"b": effect}}}
    analysis = {"together": False, "test": {**test, **gains}}
    (tmp_path / "analysis.json").write_text(json.dumps(analysis))
    more = ["--private", "--analysis", str(tmp_path / "analysis.json")]
    push([str(folder), "--peer", "b", "--repo", "org/digits", *more])
    assert list(hub) == ["org/digits"] and hub["org/digits"]["private"]
    best = read_weights(folder / "b" / "best.safetensors")
    assert all(torch.equal(x, best[name]) for name, x in hub["org/digits"]["weights"].items())
    card = hub["org/digits"]["card"]
    assert "hf-hub:org/digits" in card and "| best | +1 | +0 to +2 | 9 | 0.04 | shown |" in card
    assert "primary target is the mean of the peers, where shown is: best +1." in card
    push([str(folder), "--repo", "org/digits"])
    assert set(hub) == {"org/digits", "org/digits-a", "org/digits-b"}
    assert not hub["org/digits-a"]["private"]


def test_train_pushes_at_its_end_and_a_resumed_run_keeps_its_lineage(trained, hub):
    folder, _, asked = trained
    assert load_run(folder)["config"]["origins"]["a"]["files"]
    before = {name: (folder / name / "README.md").read_text() for name in ("a", "b")}
    (folder.parent / "start.pth").rename(folder.parent / "gone.pth")
    run([*asked, "--resume", str(folder), "--push-to-hub", "org/digits"], bars=False)
    (folder.parent / "gone.pth").rename(folder.parent / "start.pth")
    assert set(hub) == {"org/digits-a", "org/digits-b"}
    assert all(repo["private"] for repo in hub.values())
    for name, text in before.items():
        assert (folder / name / "README.md").read_text() == text
        assert "start.pth" in hub[f"org/digits-{name}"]["card"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["--peer", "c", "--repo", "o/n"],
            "--peer c: .* has no such peer with a card; it has a, b",
        ),
        (["--repo", "name"], "'name' is no name of a repository; give ORG/NAME"),
        (["--repo", "org/a..b"], "the hub takes no repository 'org/a..b"),
        (["--repo", "closed/n", "--peer", "a"], r"closed/n: the hub did not take it \(offline\)"),
        (["--folder", "{run}", "--peer", "a"], "is there already and not empty"),
        (
            ["--repo", "o/n", "--analysis", "nowhere.json"],
            "--analysis nowhere.json: cannot be read",
        ),
    ],
)
def test_what_cannot_be_pushed_is_told_in_one_line(trained, hub, caplog, more, told):
    folder, _, _ = trained
    more = [word.replace("{run}", str(folder / "a")) for word in more]
    assert push_main([str(folder), *more]) == 1
    assert len(caplog.records) == 1
    assert re.search(told, caplog.text)
    assert not hub


def test_a_folder_that_is_no_run_is_told(tmp_path, hub):
    with pytest.raises(OptionError, match=r"not the folder of a finished run"):
        push([str(tmp_path), "--repo", "org/name"])


def test_without_a_token_nothing_begins(trained, digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(OptionError, match=r"no token .* `hf auth login`"):
        push([str(trained[0]), "--repo", "org/name"])
    assert main(arguments_of(digits, tmp_path, "--push-to-hub", "org/name")) == 1
    assert "no token" in caplog.text and not list(tmp_path.iterdir())


def test_impossible_names_and_foreign_models_are_refused_before_any_work(hub):
    def asked(prefix, model):
        return parse(["/data", "--peer", model, "--peer", "resnet18", "--push-to-hub", prefix])

    with pytest.raises(OptionError, match="no name of a repository"):
        check_push(*asked("org", "resnet34"))
    with pytest.raises(
        OptionError, match=r"takes no repository 'org/x-a b'(?s:.*)name to the peer"
    ):
        check_push(*asked("org/x", "resnet34,name=a b"))
    with pytest.raises(OptionError, match="dinov2_vits14_lc is not one of timm's"):
        check_push(*asked("org/x", "dinov2_vits14_lc,name=d"))
    check_push(*asked("org/x", "dinov2_vits14_lc,name=d,frozen=true"))


def test_an_experiment_pushes_none_of_its_runs(tmp_path):
    asked = {"data": str(tmp_path), "peers": [{"model": "resnet18"}, {"model": "resnet34"}]}
    assert Classification().check(asked) == ["resnet18", "resnet34"]
    with pytest.raises(OptionError, match=r"push_to_hub org/x: .* classification/push\.py"):
        Classification().check({**asked, "push_to_hub": "org/x"})


def test_published_weights_give_base_model_and_licence():
    _, specs = parse(["/data", "--peer", "resnet18.a1_in1k", "--peer", "hf:org/net,name=n"])
    found = origin(specs[0], timm.create_model("resnet18.a1_in1k"))
    assert found == {"base_model": "timm/resnet18.a1_in1k", "license": "apache-2.0", "files": []}
    assert front(found)["license"] == "apache-2.0"
    assert origin(specs[1], torch.nn.Identity())["base_model"] == "org/net"
    other = front({"base_model": None, "license": "dinov3-license"})
    assert (other["license"], other["license_name"]) == ("other", "dinov3-license")
    assert front({"license": "unknown"})["license"] is None


def test_the_config_claims_what_published_weights_claim_and_no_more(trained):
    card = from_json((trained[0] / "b" / "card.json").read_text(), "")
    config = {"license": "mit", "tag": "x", "classifier": "fc", "label_descriptions": {"0": "nil"}}
    assert claims_of(config, card) == {"classifier": "fc"}
    started = replace(card, front={**card.front, "base_model": "timm/x", "license": "mit"})
    assert claims_of(config, started) == {"license": "mit", "tag": "x", "classifier": "fc"}
    few = replace(started, labels=["0"])
    assert claims_of(config, few) == config


def train_in_seat(world, arguments):
    run(arguments, bars=False)


def test_the_leader_of_each_seat_writes_its_peers_card(digits, tmp_path):
    more = ("--engine", "peer-parallel", "-b", "20")
    launch(train_in_seat, 2, arguments_of(digits, tmp_path, *more, epochs=1))
    for name in ("a", "b"):
        _, text = card_of(tmp_path / "run" / name)
        assert sum_of(tmp_path / "run" / name / "best.safetensors") in text
        assert sum_of(tmp_path / "run" / "args.yaml") in text
