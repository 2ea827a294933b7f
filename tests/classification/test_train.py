"""train.py from the command line: real images, every N, resume, exports, wrong input."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml

from classification.data import TrainLoader
from classification.images import read_image
from classification.options import parse
from classification.train import main, run
from classification.validate import validate
from common.checkpoint import CheckpointError, list_runs, load_run, read_weights
from common.options import OptionError
from common.outputs import folder_of
from common.soup import average_weights
from tests.launch import launch

ROOT = Path(__file__).parents[2]


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(name, **more):
    sizes = "kwargs.patch_size=8,kwargs.embed_dim=24,kwargs.depth=2,kwargs.num_heads=2"
    extra = "".join(f",{key}={value}" for key, value in {"img_size": 32, **more}.items())
    return f"vit_tiny_patch16_224,name={name},{sizes}{extra}"


def arguments_of(data, output, *more, peers=2, epochs=2, drop_path=0.2):
    shapes = [vit("a"), vit("b", img_size=24, mean="0.4+0.4+0.4", lr="2e-3")]
    shapes += [vit(f"c{i}", drop_path=drop_path) for i in range(peers - 2)]
    asked = [item for shape in shapes[:peers] for item in ("--peer", shape)]
    fixed = (
        "--no-pretrained --num-classes 10 --opt adamw --lr 1e-3 --warmup-epochs 0 -b 40 -j 0 "
        "--scale 0.8 1 --hflip 0 --log-interval 5 --experiment run --device cpu"
    ).split()
    return [str(data), *asked, *fixed, "--epochs", str(epochs), "--output", str(output), *more]


def weights_of(folder, name, which="last"):
    return read_weights(folder / "run" / name / f"{which}.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("peers", [2, 3, 4, 5])
def test_n_peers_learn_and_leave_files_that_stock_timm_loads(digits, tmp_path, peers, caplog):
    caplog.set_level("INFO")
    progress = run(arguments_of(digits, tmp_path, peers=peers, epochs=3), bars=False)
    names = ["a", "b", "c0", "c1", "c2"][:peers]
    last = progress.history[-1]
    assert [row["epoch"] for row in progress.history] == [0, 1, 2, 3]
    assert all(last[f"{name}/loss"] < progress.history[0][f"{name}/loss"] for name in names)
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    for name in names:
        best = tmp_path / "run" / name / "best.safetensors"
        size = 24 if name == "b" else 32
        module = timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=str(best), img_size=size, **kwargs
        )
        module.load_state_dict(read_weights(best), strict=True)
        assert f"{name}: best.safetensors reloaded" in caplog.text
    told = validate([str(digits), "-j", "0", "-b", "64", "--peer", str(best)])
    assert told[f"{name}/top1"] == pytest.approx(progress.best[name].value, abs=1e-9)
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(name in report for name in names)
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    assert float(rows[-1]["a/top1"]) == last["a/top1"]
    assert {"fixed", "broken"} <= {key.split("/")[-1] for key in rows[-1]}
    assert re.search(r"a +vit_tiny_patch16_224 +0\.\d+ M +0\.\d+ +10 +32x32", caplog.text)


@pytest.mark.parametrize(
    "more",
    [
        "--mixup 0.2 --reprob 0.2 --rule random --model-ema --grad-accum-steps 2".split(),
        "--sched-on-updates --clip-grad 1 --rule mutual --aa rand-m3".split(),
        "--model-ema --model-ema-decay 0.9 --teachers ema+own --engine two-pass".split(),
        "--sched plateau --patience-epochs 0 --lr-noise 0.3 --epochs 3".split(),
        "--calibrate-scores epoch --held-out 0.2 --engine two-pass".split(),
    ],
    ids=["mixup-ema-random", "updates-clip-mutual", "copies-two-pass", "plateau-noise", "scores"],
)  # fmt: skip
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(digits, tmp_path, more):
    whole = arguments_of(
        digits, tmp_path / "whole", *more, "--recovery-interval", "2", "--checkpoint-hist", "99",
        peers=3,
    )  # fmt: skip
    expected = run(whole, bars=False)
    runs = list_runs(tmp_path / "whole" / "run")
    middle = next(path for path in runs if "00001-" in path.name and "-00000000" not in path.name)
    again = arguments_of(
        digits, tmp_path / "again", *more, "--resume", str(middle), "--recovery-interval", "2",
        peers=3,
    )  # fmt: skip
    got = run(again, bars=False)
    assert got.history == expected.history and got.lessons == expected.lessons
    for name in ("a", "b", "c0"):
        assert_equal_weights(
            weights_of(tmp_path / "whole", name), weights_of(tmp_path / "again", name)
        )


def test_kill_9_in_a_step_then_resume_equals_the_uninterrupted_run(digits, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(arguments):
        return subprocess.Popen(
            [sys.executable, ROOT / "classification" / "train.py", *arguments],
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    more = ("--recovery-interval", "3", "-j", "1")
    assert start(arguments_of(digits, tmp_path / "whole", *more)).wait() == 0
    killed = start(arguments_of(digits, tmp_path / "killed", *more, epochs=2))
    folder, deadline = tmp_path / "killed" / "run", time.monotonic() + 240
    while not list_runs(folder) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (folder / "a" / "last.safetensors").exists()
    resumed = arguments_of(digits, tmp_path / "killed", *more, "--resume", str(folder))
    assert start(resumed).wait() == 0
    for name in ("a", "b"):
        assert_equal_weights(
            weights_of(tmp_path / "whole", name), weights_of(tmp_path / "killed", name)
        )
    one, two = (load_run(tmp_path / which / "run") for which in ("whole", "killed"))
    assert one["progress"] == two["progress"]


def ranked(world, arguments):
    run(arguments, bars=False)


def test_two_processes_equal_one(digits, tmp_path):
    one = arguments_of(digits, tmp_path / "one", epochs=1)
    two = arguments_of(digits, tmp_path / "two", "-b", "20", epochs=1)
    run(one, bars=False)
    launch(ranked, 2, two)
    for name in ("a", "b"):
        torch.testing.assert_close(
            weights_of(tmp_path / "one", name), weights_of(tmp_path / "two", name),
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip
    history = [load_run(tmp_path / w / "run")["progress"]["history"] for w in ("one", "two")]
    assert history[0][0] == pytest.approx(history[1][0])


def assert_close_runs(one, two):
    assert list(two["peers"]) == list(one["peers"])
    for name, peer in one["peers"].items():
        for part in ("module", "average"):
            torch.testing.assert_close(two["peers"][name][part], peer[part], rtol=1e-3, atol=1e-5)
    for before, after in zip(one["progress"]["history"], two["progress"]["history"], strict=True):
        assert after == pytest.approx(before, abs=1.0)  # an image of a hundred, at most
    for before, after in zip(one["progress"]["lessons"], two["progress"]["lessons"], strict=True):
        assert after == pytest.approx(before, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("size", [3, 6])
def test_peers_in_processes_of_their_own_equal_the_joint_run(digits, tmp_path, size, monkeypatch):
    """Mixup and erasing too: what is drawn for a batch does not depend on who drew before."""
    more = "--mixup 0.2 --cutmix 0.5 --reprob 0.3 --remode pixel --model-ema".split()
    batch = ["-b", str(120 // size)]
    three = functools.partial(arguments_of, digits, peers=3, drop_path=0)  # drawn by process
    if size == 3:  # one share of the data: the joint run is one process
        run(three(tmp_path / "joint", *more, *batch), bars=False)
    else:
        launch(ranked, 2, three(tmp_path / "joint", *more, *batch))
    seated = ["--engine", "peer-parallel", "--recovery-interval", "3", "--checkpoint-hist", "9"]
    launch(ranked, size, three(tmp_path / "seated", *more, *batch, *seated))
    one, two = (load_run(tmp_path / name / "run") for name in ("joint", "seated"))
    assert_close_runs(one, two)
    rows = (tmp_path / "seated" / "run" / "scalars.csv").read_text()
    assert all(f"{name}/lr" in rows for name in ("a", "b", "c0"))
    for name in ("a", "b", "c0"):
        best = read_weights(tmp_path / "seated" / "run" / name / "best.safetensors")
        assert best.keys() == two["peers"][name]["module"].keys()
    assert (tmp_path / "seated" / "run" / "report.html").exists()
    if size == 3:  # and goes on in a single process, from the middle of the second epoch
        middle = tmp_path / "seated" / "run" / "run-00001-00000002.pt"
        again = ["--resume", str(middle), "--engine", "two-pass"]
        run(three(tmp_path / "again", *more, *batch, *again), bars=False)
        assert_close_runs(one, load_run(tmp_path / "again" / "run"))


@pytest.mark.parametrize("peers", [2, 3])
def test_peer_parallel_in_one_process_says_how_to_start_it(digits, tmp_path, caplog, peers):
    assert main(arguments_of(digits, tmp_path, "--engine", "peer-parallel", peers=peers)) == 1
    assert f"{peers} peers in 1 processes" in caplog.text
    assert f"torchrun --nproc-per-node={peers}" in caplog.text
    assert not tmp_path.joinpath("run").exists()


def test_exports_start_a_new_run_with_a_frozen_copy(digits, tmp_path):
    run(arguments_of(digits, tmp_path, epochs=1), bars=False)
    file = tmp_path / "run" / "a" / "best.safetensors"
    rest = arguments_of(digits, tmp_path, "--experiment", "next", "--score", "confidence", epochs=1)
    rest = [x for x in rest if not x.startswith("vit_tiny") and x != "--peer"]
    rest = [*rest, "--peer", str(file), "--peer", f"{file},name=old,frozen=true"]
    progress = run(rest, bars=False)
    assert progress.history[0]["a/top1"] == progress.history[0]["old/top1"]
    assert progress.history[-1]["old/loss"] == progress.history[0]["old/loss"]
    old = read_weights(tmp_path / "next" / "old" / "last.safetensors")
    assert_equal_weights(old, read_weights(file))
    assert progress.lessons[0]["transfer/a->old/share"] == 0


def test_the_written_arguments_repeat_the_run(digits, tmp_path):
    first = run(arguments_of(digits, tmp_path / "one", epochs=1), bars=False)
    config = tmp_path / "one" / "run" / "args.yaml"
    content = yaml.safe_load(config.read_text())
    assert content["rule"] == "best" and len(content["peers"]) == 2
    again = run(
        ["-c", str(config), "--output", str(tmp_path / "two"), "--experiment", "run"], bars=False
    )
    assert again.history == first.history


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--peer", "resnet1800"), "unknown model"),
        (("--peer", "resnet18,checkpoint=/nowhere.pth"), "no such file"),
        (("--num-classes", "7"), "the data has 10 classes, the peers tell 7"),
        (("--device", "cuda"), "--device cuda"),
        (("--device", "mps"), "--device mps"),
        (("--opt", "adumw"), "adumw"),
        (("--aa", "nonsense"), "--aa nonsense: Unknown AA policy"),
        (("--mean", "0.5", "0.5"), "--mean has 2 values"),
        (("--resume", "/nowhere"), "no such file"),
    ],
)
def test_wrong_input_ends_in_one_line_before_any_work(digits, tmp_path, caplog, more, says):
    assert main(arguments_of(digits, tmp_path, *more)) == 1
    assert says in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(digits, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert main(arguments_of(digits, tmp_path / "file")) == 1
    assert f"{tmp_path}/file" in caplog.text and "can be written" in caplog.text


def test_a_peer_that_gets_worse_is_rolled_back(digits, tmp_path, caplog):
    """A bound of no flip at all is soon passed: lessons end first, and learning then."""
    guard = ["--guard", "rollback", "--guard-flips", "0", "--guard-patience", "1"]
    progress = run(arguments_of(digits, tmp_path, *guard, epochs=4), bars=False)
    assert progress.epoch == 2 and "no peer learns any more" in caplog.text
    assert [row["epoch"] for row in progress.history] == [0, 1, 1, 2, 2]
    for name in "ab":
        assert f"{name} got worse: negative_flips" in caplog.text
        assert progress.history[-1][f"{name}/top1"] == progress.best[name].value
        assert_equal_weights(weights_of(tmp_path, name), weights_of(tmp_path, name, "best"))
    assert "taught no more" in (tmp_path / "run" / "report.html").read_text()


def test_a_soup_loads_in_stock_timm(digits, tmp_path, caplog):
    """One of the peers has batch norm, whose statistics are those of its own average."""
    caplog.set_level("INFO")
    more = ("--soup", "--peer", "test_resnet,name=r,lr=3e-3", "--train-batches-per-epoch", "10")
    run(arguments_of(digits, tmp_path, *more, peers=1, epochs=1), bars=False)
    folder = tmp_path / "run"
    for name, model, kwargs in (
        ("a", "vit_tiny_patch16_224", VIT),
        ("r", "test_resnet", {}),
    ):
        told = json.loads((folder / name / "soup.json").read_text())
        assert f"{name}: top1 on the half that did not choose the soup: start" in caplog.text
        files = [folder / name / f"{which}.safetensors" for which in ("start", "best", "soup")]
        module = timm.create_model(model, checkpoint_path=str(files[2]), num_classes=10, **kwargs)
        start, best, soup = map(read_weights, files)
        module.load_state_dict(soup, strict=True)
        average = average_weights(start, best, told["alpha"])
        normed = [key for key in soup if "running" in key]
        assert all(torch.equal(soup[key], average[key]) for key in soup if key not in normed)
        if told["alpha"] in (0, 1):
            assert all(torch.equal(soup[key], average[key]) for key in normed)
    assert "<h2>Soup" in (folder / "report.html").read_text()


def test_only_frozen_peers_are_refused(digits, tmp_path):
    asked = [f"{x},frozen=true" if "name=" in x else x for x in arguments_of(digits, tmp_path)]
    with pytest.raises(OptionError, match="every peer is frozen"):
        run(asked, bars=False)


def choosing(world, folder):
    time.sleep(1.1 * world.rank)  # another second, another stamp
    options, specs = parse(["/data", "--peer", "a", "--peer", "b", "--output", str(folder)])
    (folder / str(world.rank)).write_text(
        str(folder_of(options, [spec.name for spec in specs], world))
    )


def test_all_ranks_choose_one_folder(tmp_path):
    launch(choosing, 2, tmp_path)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def test_a_diverging_run_ends_in_one_line(digits, tmp_path, caplog):
    asked = arguments_of(digits, tmp_path, "--opt", "sgd", "--lr", "1e30", epochs=3)
    assert main(asked) == 1
    told = (
        r"the loss of a.* was not finite at optimizer step \d+, in .*train/\d/\d+\.png.*; look at"
    )
    assert re.search(told, caplog.text) and "lower that peer's lr" in caplog.text
    assert not list_runs(tmp_path / "run")


@pytest.fixture
def nan_in_batch_3(monkeypatch):
    """Break one image of the fourth batch of every epoch; return where its file is told."""
    told, batches = [], TrainLoader.__iter__

    def broken(loader):
        for k, (images, target) in enumerate(batches(loader), loader.start):
            if k == 3:
                images[7, 0, 0, 0] = float("nan")
                told.append(loader.names_of(None)()[7])
            yield images, target

    monkeypatch.setattr(TrainLoader, "__iter__", broken)
    return told


def test_a_nan_in_an_image_stops_and_its_file_is_told(digits, tmp_path, caplog, nan_in_batch_3):
    assert main(arguments_of(digits, tmp_path, "--engine", "two-pass")) == 1
    assert f"loss of a, b was not finite at optimizer step 4, in {nan_in_batch_3[0]}" in caplog.text
    assert not list_runs(tmp_path / "run") and "Traceback" not in caplog.text


def test_or_is_skipped_counted_and_told(digits, tmp_path, caplog, nan_in_batch_3):
    skip = "--on-nonfinite skip --max-skips-in-a-row 1 --recovery-interval 1 --model-ema".split()
    whole = run(arguments_of(digits, tmp_path / "whole", *skip, epochs=2), bars=False)
    assert nan_in_batch_3[1] in caplog.text and whole.lessons[-1]["a/skipped"] == 2
    assert "2 optimizer steps were skipped by all peers" in caplog.text
    folder = tmp_path / "whole" / "run"
    assert "2 optimizer steps were skipped" in (folder / "report.html").read_text()
    assert "b/skipped" in (folder / "scalars.csv").read_text()
    middle = folder / "run-00001-00000003.pt"
    again = arguments_of(digits, tmp_path / "again", *skip, "--resume", str(middle))
    assert run(again, bars=False) == whole
    for name in ("a", "b"):
        assert_equal_weights(
            weights_of(tmp_path / "whole", name), weights_of(tmp_path / "again", name)
        )


@pytest.fixture
def own_digits(digits, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def cut(path, size=60):
    path.write_bytes(path.read_bytes()[:size])
    return str(path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_broken_image_stops_and_is_named(own_digits, tmp_path, caplog, split):
    file = cut(own_digits / split / "3" / "11.png")
    assert main(arguments_of(own_digits, tmp_path, "-j", "1", epochs=1)) == 1
    assert f"error: {file}: " in caplog.text and "Traceback" not in caplog.text
    assert "mend or remove it, or allow broken files (--max-bad-samples)" in caplog.text


def test_broken_images_are_replaced_left_out_and_told(own_digits, tmp_path, caplog):
    """In evaluation as if they were not there, for peers of two geometries alike."""
    of_none = arguments_of(own_digits, tmp_path / "none", epochs=1)
    files = [own_digits / "train" / "3" / "11.png", own_digits / "validation" / "5" / "7.png"]
    told = [cut(path) for path in files]
    more = "--max-bad-samples 2 --recovery-interval 1 --checkpoint-hist 99".split()
    whole = run(arguments_of(own_digits, tmp_path / "whole", *more, "-j", "1"), bars=False)
    assert [caplog.text.count(f"{file}: ") for file in told] == [2, 2]  # when met, and at the end
    assert caplog.text.count("evaluated without 1 of 200 samples") >= 3
    page = (tmp_path / "whole" / "run" / "report.html").read_text()
    assert "2 broken files were done without" in page and "left out 1 of them" in page
    again = ["--resume", str(tmp_path / "whole" / "run" / "run-00001-00000003.pt")]
    assert run(arguments_of(own_digits, tmp_path / "again", *more, *again), bars=False) == whole
    record = load_run(tmp_path / "again" / "run")
    assert set(record["bad"]["found"]) == set(told)
    files[1].unlink()
    files[0].write_bytes((own_digits / "train" / "3" / "12.png").read_bytes())
    for key, value in run(of_none, bars=False).history[0].items():
        assert value == pytest.approx(whole.history[0][key], abs=1e-9)


def test_a_killed_worker_ends_in_one_line(digits, tmp_path, caplog, monkeypatch):
    def read(dataset, index):
        if torch.utils.data.get_worker_info() is not None and index % 7 == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(dataset, index)

    monkeypatch.setattr("classification.data.read_image", read)
    assert main(arguments_of(digits, tmp_path, "-j", "1")) == 1
    assert "error: a process that reads data" in caplog.text and "(--workers" in caplog.text
    assert "Traceback" not in caplog.text


def test_class_counts_that_differ_name_both(digits, tmp_path):
    ten = timm.create_model("test_vit", num_classes=10)
    torch.save(ten.state_dict(), tmp_path / "ten.pth")
    asked = ["--peer", f"test_vit,checkpoint={tmp_path}/ten.pth", "--peer", "test_vit2,name=other"]
    with pytest.raises(OptionError, match=r"test_vit: 10, other: 1000; give checkpoints"):
        run([str(digits), *asked, "--no-pretrained", "--output", str(tmp_path)], bars=False)


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(digits, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pth")
    asked = ["--peer", f"test_vit,checkpoint={tmp_path}/evil.pth"]
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused, it asks to run 'posix.system'"):
        run(arguments_of(digits, tmp_path, *asked), bars=False)
    assert not (tmp_path / "executed").exists()


def test_an_older_runs_folder_is_not_overwritten(digits, tmp_path):
    run(arguments_of(digits, tmp_path, epochs=1), bars=False)
    with pytest.raises(OptionError, match="holds the run files of an earlier run; give --resume"):
        run(arguments_of(digits, tmp_path, epochs=1), bars=False)


def test_a_published_number_far_from_the_baseline_warns(digits, tmp_path, caplog):
    asked = arguments_of(digits, tmp_path, epochs=1)
    asked[2] += ",published=88.8"
    run(asked, bars=False)
    assert re.search(r"a: baseline top-1 [\d.]+, published 88\.80 .*more than 0\.5", caplog.text)


def test_metadata_of_an_export_rebuilds_it(digits, tmp_path):
    from common.checkpoint import read_metadata

    run(arguments_of(digits, tmp_path, epochs=1), bars=False)
    told = read_metadata(tmp_path / "run" / "b" / "best.safetensors")
    assert told["architecture"] == "vit_tiny_patch16_224" and told["num_classes"] == "10"
    assert json.loads(told["mean"]) == [0.4, 0.4, 0.4]
    assert json.loads(told["input_size"]) == [3, 24, 24]
