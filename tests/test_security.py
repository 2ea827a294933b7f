"""No path unpickles, evaluates or unpacks without bounds what a user was given by others."""

import argparse
import ast
import codecs
import copy
import importlib
import io
import itertools
import json
import logging
import os
import pickle
import resource
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from classification.images import BrokenImageError, read_image
from classification.models import ModelError, create_classifier
from classification.options import parse
from classification.train import main as classify
from classification.validate import main as validate
from common.checkpoint import CheckpointError, read_file, read_metadata
from common.options import OptionError
from common.yaml_files import read_yaml
from saliency import images
from saliency.errors import DataError
from saliency.evaluate import main as evaluate_saliency
from saliency.predict import main as predict
from saliency.train import main as train_saliency
from tests.children import in_a_child
from tests.saliency.folders import write_dataset

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "classification", "saliency", "segmentation", "benchmarks", "tests")
# What the rules below find, and why it is there.
ALLOWED = {
    ("common/pickles.py", "pickle.Unpickler"): "builds plain containers, no larger than the file",
    (
        "segmentation/weights.py",
        "common.pickles.BoundedUnpickler",
    ): "refuses all but containers and arrays",
}
CODE = {
    *(f"{kind}.{name}" for kind in ("pickle", "_pickle", "dill", "cloudpickle", "marshal")
      for name in ("load", "loads", "Unpickler", "_Unpickler")),
    "common.pickles.BoundedUnpickler",
    *("joblib.load", "shelve.open", "pandas.read_pickle", "torch.jit.load", "torch.hub.load"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *("torch.package.PackageImporter", "torch.serialization.add_safe_globals"),
    *(f"yaml.{name}" for name in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all")),
}  # fmt: skip
SAFE_YAML = {"yaml.SafeLoader", "yaml.CSafeLoader"}
NEVER = {"trust_remote_code": True, "allow_unsafe": True, "shell": True, "weights_only": False}


class Rules(ast.NodeVisitor):
    """Collects what could run code that a file brings, whatever it is imported as."""

    def __init__(self):
        self.names, self.found = {}, []

    def visit_Import(self, node):
        for alias in node.names:
            whole = alias.name if alias.asname else alias.name.split(".")[0]
            self.names[alias.asname or whole] = whole

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def whole(self, node):
        first, dot, rest = ast.unparse(node).partition(".")
        return self.names.get(first, first) + dot + rest

    def visit_ClassDef(self, node):
        self.found += [name for name in map(self.whole, node.bases) if name in CODE]
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        given = node.args
        plain = [*given.posonlyargs, *given.args]
        pairs = [*zip(reversed(plain), reversed(given.defaults), strict=False)]
        pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
        for argument, default in pairs:
            self.check_value(argument.arg, default)
        self.generic_visit(node)

    def visit_Call(self, node):
        name = self.whole(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        for word in node.keywords:
            self.check_value(word.arg, word.value)
        loads_code = (
            name in CODE
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "numpy.load" and given.get("allow_pickle", "False") != "False")
            or (name in ("yaml.load", "yaml.load_all") and not self.is_safe_yaml(node))
            or (name.endswith((".extractall", ".unpack_archive")) and "filter" not in given)
        )
        if loads_code:
            self.found.append(name)
        self.generic_visit(node)

    def is_safe_yaml(self, node):
        loaders = [*node.args[1:], *(word.value for word in node.keywords)]
        return {self.whole(loader) for loader in loaders} <= SAFE_YAML and bool(loaders)

    def check_value(self, name, value):
        if name in NEVER and isinstance(value, ast.Constant) and value.value is NEVER[name]:
            self.found.append(f"{name}={value.value}")


def violations(text):
    rules = Rules()
    rules.visit(ast.parse(text))
    return rules.found


def sources():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield ROOT / "setup.py"


def test_no_source_loads_code():
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in sources()
        for name in violations(path.read_text(encoding="utf-8"))
    }
    own = {entry for entry in found if entry[0].startswith("tests/")}
    assert found - own == set(ALLOWED)
    assert own - TESTS_MAY == {entry for entry in own if entry[1] == "torch.load"}  # its default


# The tests set files up for the loaders, and trust what they wrote themselves.
TESTS_MAY = {
    ("tests/classification/test_publish.py", "eval"),  # the line by which a card loads its file
    ("tests/common/test_broken.py", "exec"),  # a line of its own, under another module's name
    ("tests/test_architecture.py", "runpy.run_path"),  # setup.py's own lists
    ("tests/classification/test_huggingface.py", "trust_remote_code=True"),  # shows what it is for
    ("tests/segmentation/test_config.py", "allow_unsafe=True"),  # the same
    ("tests/segmentation/test_scenes.py", "__import__"),  # hides a package
}


@pytest.mark.parametrize(
    "line",
    [
        "from torch import load as l; l(f)",
        "import torch as t; t.load(f, weights_only=False)",
        "import pickle as p; p.loads(b)",
        "from pickle import Unpickler\nclass Mine(Unpickler): pass",
        "import numpy as np; np.load(f, allow_pickle=ask)",
        "import yaml; yaml.load(f)",
        "import yaml; yaml.load(f, Loader=yaml.Loader)",
        "import yaml; yaml.load(f, yaml.UnsafeLoader)",
        "def read(f, *, trust_remote_code=True): pass",
        "def read(f, weights_only=False): pass",
        "x.from_pretrained(f, trust_remote_code=True)",
        "import subprocess; subprocess.run(c, shell=True)",
        "import tarfile; tarfile.open(f).extractall()",
        "import marshal; marshal.loads(b)",
        "eval(text)",
    ],
)
def test_the_rules_find(line):
    assert violations(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(f, map_location='cpu', weights_only=True)",
        "import numpy; numpy.load(f, mmap_mode='r')",
        "import yaml; yaml.safe_load(f); yaml.load(f, Loader=yaml.SafeLoader)",
        "model.eval(); re.compile(x); subprocess.run([a, b])",
        "x.from_pretrained(f, trust_remote_code=self.trust)",
    ],
)
def test_the_rules_pass(line):
    assert not violations(line)


# Files that would run something, or fill the memory.


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def write_evil(path, proof, how):
    if how == "pickle":
        path.write_bytes(pickle.dumps({"model": Bomb(proof)}))
    elif how == "inflated":
        write_inflated(path)
    else:
        content = {"state_dict": {"x": torch.zeros(1)}, "format": 1, "peers": Bomb(proof)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    return path


def write_inflated(path, size=2**26):
    """Write 64 MiB of zeros as torch does, then compress its parts."""
    whole = io.BytesIO()
    torch.save({"weight": torch.zeros(size // 4)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part), zipfile.ZIP_DEFLATED, 1)
    assert path.stat().st_size < size / 100


HOW = ("torch", "legacy", "pickle", "inflated")


def one_line(caplog, status):
    """Return the only error of a command that ended in one line."""
    assert status == 1 and "Traceback" not in caplog.text
    (record,) = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    return record.getMessage()


def classification_of(*given):
    fixed = [
        "--device",
        "cpu",
        "--no-pretrained",
        "--num-classes",
        "2",
        "-j",
        "0",
        "--rule",
        "none",
    ]
    return [*fixed, *given]


def saliency_of(folder):
    root = write_dataset(folder / "data", {"annotation/0001": 2, "val/0601": 2})
    return ["--data-root", str(root)]


def out_of(folder):
    return ["--output", str(folder / "out")]


ALONE = ("--peer", "vinet_s", "--rule", "none")
COMMANDS = {
    "classification": lambda file, folder: classify(
        [str(folder), *classification_of("--peer", f"test_vit,checkpoint={file}")]
    ),
    "classification as a list": lambda file, folder: classify(
        [str(folder), *classification_of("--peer", f"dinov2_vits14_lc,checkpoint={file}+{file}")]
    ),
    "mae": lambda file, folder: classify(
        [str(folder), *classification_of("--peer", f"mae_vit_base_ft,checkpoint={file}")]
    ),
    "classification resumes": lambda file, folder: classify(
        [str(folder), *classification_of("--peer", "test_vit", "--resume", str(file))]
    ),
    "validate": lambda file, folder: validate(
        [str(folder), *classification_of("--peer", f"test_vit,checkpoint={file}")]
    ),
    "saliency": lambda file, folder: train_saliency(
        "dhf1k",
        "t",
        [*saliency_of(folder), "--peer", f"vinet_s,checkpoint={file}", "--rule", "none"],
    ),
    "a backbone": lambda file, folder: train_saliency(
        "dhf1k", "t", [*saliency_of(folder), "--peer", f"vinet_s,backbone={file}", "--rule", "none"]
    ),
    "saliency resumes": lambda file, folder: train_saliency(
        "dhf1k", "t", [*saliency_of(folder), *ALONE, "--resume", str(file)]
    ),
    "saliency is evaluated": lambda file, folder: evaluate_saliency(
        [*saliency_of(folder), "--peer", f"vinet_s,checkpoint={file}"]
    ),
    "saliency predicts": lambda file, folder: predict(
        [
            f"{saliency_of(folder)[1]}/val",
            *("--peer", f"vinet_s,checkpoint={file}"),
            *out_of(folder),
        ]
    ),
}
ONCE = {"classification": HOW, "saliency": HOW}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("command", "how"),
    [(name, how) for name in COMMANDS for how in ONCE.get(name, ("torch",))],
)
def test_no_command_runs_what_a_checkpoint_brings(home, tmp_path, caplog, command, how):
    proof = tmp_path / "executed"
    file = write_evil(tmp_path / "evil.pth", proof, how)
    told = one_line(caplog, COMMANDS[command](file, tmp_path))
    assert str(file) in told and not proof.exists()
    if how in ("torch", "legacy"):
        assert "refused, it asks to run 'posix.mkdir'" in told


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".bin", ".ckpt", ".safetensors", ".npz"])
@pytest.mark.parametrize("how", HOW)
def test_no_suffix_makes_a_file_trusted(tmp_path, suffix, how):
    proof = tmp_path / "executed"
    file = write_evil(tmp_path / f"evil{suffix}", proof, how)
    with pytest.raises(CheckpointError, match=str(file)):
        read_file(file)
    assert not proof.exists()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_timms_and_hugging_faces_folders_run_nothing(tmp_path, how):
    proof = tmp_path / "executed"
    write_evil(tmp_path / "pytorch_model.bin", proof, how)
    config = {"architecture": "test_vit", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=str(tmp_path)):
        create_classifier(f"local-dir:{tmp_path}", pretrained=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_labels": 2}))
    with pytest.raises(ModelError, match=r"pickled weights are not read here"):
        create_classifier(f"hf:{tmp_path}")
    assert not proof.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "other.pth"])
def test_timms_folders_fill_no_memory(tmp_path, file):
    torch.save({"w": Call(bytearray, 2**28)}, tmp_path / file)
    config = {"architecture": "test_vit", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    grown, told = grown_by(lambda: create_classifier(f"local-dir:{tmp_path}", pretrained=True))
    assert f"{tmp_path / file}: refused, it asks for 'bytearray'" in told and grown < 64


def test_of_a_timm_folder_only_the_file_that_timm_takes_is_looked_at(tmp_path):
    model = create_classifier("test_vit", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    write_evil(tmp_path / "training_args.bin", tmp_path / "executed", "torch")
    config = {"architecture": "test_vit", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = create_classifier(f"local-dir:{tmp_path}", pretrained=True)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(read.state_dict()[name], model.state_dict()[name])
    assert not (tmp_path / "executed").exists()


def test_code_of_a_folder_is_never_implied(tmp_path, caplog):
    code = f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n"
    (tmp_path / "own.py").write_text(code)
    mapped = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    config = {"model_type": "own", "auto_map": mapped}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "model.safetensors")
    status = classify([str(tmp_path), *classification_of("--peer", f"hf:{tmp_path}")])
    assert "brings its own Python code" in one_line(caplog, status)
    assert not (tmp_path / "executed").exists()
    options, (spec,) = parse(["/data", "--peer", "hf:a/b", "--rule", "none"])
    assert options.trust_remote_code is options.dataset_trust_remote_code is False
    assert spec.options.trust_remote_code is False


SAFETENSORS = {
    "a head longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a head of 90 MB that is not there": struct.pack("<Q", 90_000_000) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"{nothing",
    "offsets that overlap": b"[0, 8] [4, 12]",
    "offsets behind the end": b"[0, 8] [8, 2000000000]",
    "offsets that go back": b"[0, 8] [8, 4]",
    "a shape that is not its bytes": b"[0, 8] [8, 24]",
    "nothing": b"",
}


def safetensors_of(what):
    if not what.startswith(b"[0"):
        return what
    first, second = (json.loads(part + b"]") for part in what.rstrip(b"]").split(b"] "))
    head = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        for name, offsets in (("a", first), ("b", second))
    }
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("read", [read_file, read_metadata])
def test_broken_heads_of_safetensors_are_named(tmp_path, name, read):
    path = tmp_path / "peer.safetensors"
    path.write_bytes(safetensors_of(SAFETENSORS[name]))
    with pytest.raises(CheckpointError, match=f"{path}: .*copy, download or write it again"):
        read(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path}: no such file; check the checkpoint's path"):
        read(path)


YAML = ("lr: !!python/object/apply:os.mkdir [{}]", "lr: !!python/name:os.system", "\x00")


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize("command", ["classification", "saliency"])
def test_yaml_that_holds_code_is_refused_by_name(tmp_path, caplog, text, command):
    proof, config = tmp_path / "executed", tmp_path / "run.yaml"
    config.write_text(text.format(proof))
    given = ["-c", str(config)]
    status = {
        "classification": lambda: classify([str(tmp_path), *given]),
        "saliency": lambda: train_saliency("dhf1k", "t", given),
    }[command]()
    assert str(config) in one_line(caplog, status) and not proof.exists()


def test_text_that_is_no_utf8_is_refused_by_name(tmp_path, caplog):
    config = tmp_path / "run.yaml"
    config.write_bytes(b"lr: \xff\xfe")
    assert str(config) in one_line(caplog, classify([str(tmp_path), "-c", str(config)]))
    caplog.clear()
    assert str(config) in one_line(caplog, train_saliency("dhf1k", "t", ["-c", str(config)]))


# Memory that a small file asks for.

MIB = 2**20


def aliases(levels, each="[*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0}]"):
    """Write lines of YAML, each ten times what the line before stands for; ``b0`` is a mapping."""
    lines = [f"b{k + 1}: &b{k + 1} {each.format(k)}" for k in range(levels)]
    return "\n".join(["b0: &b0 {k: 1}", *lines, ""])


MERGES = "{{z{0}: 1, <<: [*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0},*b{0}]}}"
YAML_BOMBS = {
    "aliases": (aliases(9), "it would hold more than 100000 characters"),
    "keys that are merged": (aliases(9, MERGES), "it would hold more than 100000 characters"),
    "a long text": (
        "b0: &b0 " + "x" * 10_000 + "\nb1: [" + "*b0, " * 10_000 + "]\n",
        "it would hold more than",
    ),
    "a chain": (aliases(2000, "[*b{0}]"), "it is nested more than 100 deep"),
    "a list that holds itself": ("b0: &b0 [1, *b0]\n", "one of its values holds itself"),
    "lists that hold one another": ("b0: &b0 {k: &b1 {k: [*b0, *b1]}}\n", "holds itself"),
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_that_multiplies_by_its_aliases_is_refused_before_it_is_made(tmp_path, name):
    text, fault = YAML_BOMBS[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)

    def read():
        mine = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mine + 2**30,) * 2)
        read_yaml(path)

    grown, told = grown_by(read)
    assert told.startswith(f"OptionError: {path}: refused, ") and fault in told and grown < 64
    assert "write the values out in place of aliases" in told and "\n" not in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n",
        aliases(3),
        f"a: {'x' * 120_000}\nb: &b {{x: 1}}\nc: *b\n",
    ],
)
def test_ordinary_aliases_and_long_files_are_read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert read_yaml(path) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text", ["lr: 2001-99-99", "lr: !!int ''", "lr: !!timestamp x", "lr: !!bool x", "[" * 5000]
)
def test_yaml_of_values_that_are_none_is_refused_by_name(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=f"{path}: not plain YAML: "):
        read_yaml(path)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "0x" + "f" * 4000, "[" + "a, " * 900 + "]"])
@pytest.mark.parametrize("task", ["classification", "saliency"])
def test_long_values_are_refused_in_a_short_line(tmp_path, caplog, task, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"lr: {value}\n")
    told = one_line(caplog, YAML_COMMANDS[task](path))
    assert told.startswith(f"error: {path}: lr is ") and len(told) < 800


YAML_COMMANDS = {
    "classification": lambda file: classify([str(file.parent), "-c", str(file)]),
    "saliency": lambda file: train_saliency("dhf1k", "t", ["-c", str(file)]),
    "classification's experiment": lambda file: experiment_of("classification", file),
    "saliency's experiment": lambda file: experiment_of("saliency", file),
}


def experiment_of(task, file):
    return importlib.import_module(f"{task}.experiment").main([str(file)])


@pytest.mark.parametrize("command", YAML_COMMANDS)
def test_every_command_refuses_aliases_that_multiply(tmp_path, caplog, command):
    path = tmp_path / "run.yaml"
    path.write_text(aliases(6).replace("b6: ", "lr: "))
    assert path.stat().st_size < 600
    told = one_line(caplog, YAML_COMMANDS[command](path))
    assert told.startswith(f"error: {path}: refused, written out it would hold more than")


def grown_by(work):
    """Return how many MiB the most memory of a process grew by while it worked, and its error."""
    end, start = os.pipe()

    def measured():
        told = "nothing was raised"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            work()
        except (ValueError, OSError) as error:  # what this project raises on bad input
            told = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        os.write(start, json.dumps([grown, told]).encode())

    assert in_a_child(measured) == 0
    os.close(start)
    with os.fdopen(end, "rb") as file:
        return json.loads(file.read())


def test_a_compressed_torch_file_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "peer.pth"
    write_inflated(path)
    grown, told = grown_by(lambda: read_file(path))
    assert f"{path}: refused, it would unpack from" in told and grown < 32
    for sums in (False, True):
        with pytest.raises(CheckpointError, match="torch compresses nothing"):
            read_file(path, sums=sums)


def endless():
    """Two containers that hold each other, and a tensor in one of them."""
    one = [torch.zeros(1).expand(10**10)]
    one.append({"up": one})
    return one


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.zeros(1).expand(10**10), "model.w"),
        (lambda: torch.zeros(9).as_strided((3, 10**9), (3, 0)), "model.w"),
        (lambda: torch.zeros(2**19).unfold(0, 2**18, 1), "model.w"),
        (lambda: (0, argparse.Namespace(x=torch.zeros(1).expand(10**10))), "model.w.1.x"),
        (endless, "model.w.0"),
    ],
)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path, make, name):
    path = tmp_path / "w.pth"
    torch.save({"model": {"w": make()}}, path)
    says = f"w.pth: refused, {name} claims [0-9]+ bytes, and the file holds [0-9]+ of them"
    with pytest.raises(CheckpointError, match=says):
        read_file(path)


class Call:
    """Asks for a call when it is unpickled; the same arguments are written once."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


class Attributes(Call):
    """Asks for an object, and for a copy of its attributes."""

    def __reduce__(self):
        return argparse.Namespace, (), self.given[0]


def doubled(times):
    """Write bytes twice as long with each call, from 64 on."""
    value = b"0" * 64
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return value


MANY = list(range(2**16))
NAMED = {str(k): k for k in range(2**15)}
COPIES = 2**7
SHORT = torch.zeros(1, dtype=torch.uint8).expand(2**26)
TO_OTHER = torch._utils._rebuild_device_tensor_from_cpu_tensor
# What a torch file of less than a megabyte can ask for; each takes 200 MiB or more.
LARGE = {
    "bytes": lambda: Call(bytearray, 2**28),
    "bytes that double": lambda: doubled(22),
    "another type": lambda: Call(TO_OTHER, SHORT, torch.float32, "cpu", False),
    "sets": lambda: [Call(set, MANY) for _ in range(COPIES)],
    "sizes": lambda: [Call(torch.Size, MANY) for _ in range(4 * COPIES)],
    "dicts": lambda: [Call(OrderedDict, NAMED) for _ in range(COPIES)],
    "counters": lambda: [Call(Counter, NAMED) for _ in range(COPIES)],
    "attributes": lambda: [Attributes(None, NAMED) for _ in range(2 * COPIES)],
    "names": lambda: {"k" * 2**18: [[0] for _ in range(2**10)]},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", LARGE)
def test_a_small_torch_file_fills_no_memory(tmp_path, what, zipped):
    path = tmp_path / "w.pth"
    torch.save({"w": LARGE[what]()}, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < MIB
    grown, told = grown_by(lambda: read_file(path))
    assert grown < 64
    if what != "names":  # which are read: they are there
        assert told.startswith(f"CheckpointError: {path}: refused, ")
        assert "save its state_dict alone" in told


class Part:
    """Stands for a storage beside the pickle, with whatever is claimed of it."""

    def __init__(self, key, count, *view, kind=torch.ByteStorage):
        self.claim = ("storage", kind, key, "cpu", count, *view)

    def tensor(self, *size):
        strides = [1] * len(size)
        return Call(torch._utils._rebuild_tensor_v2, self, 0, size, (*strides,), False, None)


class PartPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.claim if isinstance(value, Part) else None


def write_parts(path, content, zipped, parts):
    """Write a torch file of both forms by hand."""
    stream = io.BytesIO()
    PartPickler(stream, protocol=2).dump(content)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w/data.pkl", stream.getvalue())
            for key, data in {**parts, "../version": b"3"}.items():
                archive.writestr(f"w/data/{key}".replace("data/../", ""), data)
        return
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    pickles = [*(pickle.dumps(x, 2) for x in head), stream.getvalue(), pickle.dumps([*parts], 2)]
    stored = [struct.pack("<q", len(data)) + data for data in parts.values()]
    path.write_bytes(b"".join(pickles + stored))


def cases(word):
    """Give a word in all its cases: torch finds a part by any of them."""
    return map("".join, itertools.product(*zip(word, word.upper(), strict=True)))


HALF = {"abcdefghi": bytes(2**19)}
PARTS = {
    "one part, by many names": (
        lambda: [Part(key, 2**19) for key in cases("abcdefghi")],
        True, HALF, "no part data/abcdefghI",
    ),
    "one part, by keys that differ from themselves": (
        lambda: [Part(float("nan"), 2**19) for _ in range(2**9)],
        True, {"nan": bytes(2**19)}, "not a checkpoint that can be read safely",
    ),
    "more than the part has": (
        lambda: Part("0", 2**28).tensor(2**28), True, {"0": bytes(9)},
        "storage '0' claims 268435456 bytes, and the file has 9",
    ),
    "more than the file has": (
        lambda: Part("0", 2**28, None).tensor(2**28), False, {},
        "storage '0' claims 268435456 bytes",
    ),
    "a part that is not there": (
        lambda: Part("0", 99, None).tensor(99), False, {},
        "claims bytes that the file does not have",
    ),
    "a tensor that reaches behind its part": (
        lambda: Part("0", 9, None).tensor(2**28), False, {}, "a tensor claims 268435456 bytes of a"
    ),
    "a part of a storage that reaches behind it": (
        lambda: Part("0", 9, ("1", 0, 2**28)).tensor(2**28), False, {"0": bytes(9)},
        "claims more than the storage",
    ),
    "one storage of two types": (
        lambda: [Part("0", 8, None, kind=torch.DoubleStorage), Part("0", 64, None).tensor(64)],
        False, {}, "a tensor claims 512 bytes of a storage of 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PARTS)
def test_parts_that_claim_more_than_they_have_are_refused(tmp_path, what):
    make, zipped, parts, says = PARTS[what]
    path = tmp_path / "w.pth"
    write_parts(path, {"w": make()}, zipped, parts)
    grown, told = grown_by(lambda: read_file(path))
    assert told.startswith(f"CheckpointError: {path}: ") and says in told and grown < 64


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_parts_that_are_there_are_read(tmp_path, zipped):
    path = tmp_path / "w.pth"
    view = [] if zipped else [None]
    write_parts(path, {"w": Part("0", 3, *view).tensor(3)}, zipped, {"0": b"abc"})
    assert read_file(path)["w"].tolist() == [*b"abc"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.empty(9, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (
            lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
            "torch._utils._rebuild_qtensor",
        ),
        (lambda: torch.nested.nested_tensor([torch.eye(3)]), "torch._utils._rebuild_nested_tensor"),
        (lambda: bytearray(b"1"), "bytearray"),
    ],
)
def test_tensors_that_are_no_plain_ones_are_refused_by_name(tmp_path, make, name):
    path = tmp_path / "w.pth"
    torch.save({"w": make()}, path)
    with pytest.raises(CheckpointError, match=f"w.pth: refused, it asks for '{name}', .*dense"):
        read_file(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_checkpoints_hold_is_read(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    named = torch.zeros(2)
    named.note = "a tensor with an attribute"
    kept = {
        "model": model.state_dict(),
        "parameter": model[0].weight,
        "named": named,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, size=torch.Size([1, 2]), device=torch.device("cpu")),
        "rng": torch.get_rng_state(),
        "bytes": b"\x00\xff",
        "plain": [{1, 2}, Counter("aab"), 2 + 1j, None, (1, 2.5), torch.bfloat16, 2**70],
        "half": [torch.ones(3, dtype=kind) for kind in (torch.half, torch.bfloat16, torch.bool)],
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 3),
        "of Python 2": Call(OrderedDict, [["a", 1]]),
        "view": torch.arange(12.0).reshape(3, 4)[1:, ::2].t(),
    }
    if zipped:  # torch itself does not read these in its older form
        kept["small"] = torch.zeros(4, dtype=torch.float8_e4m3fn)
        kept["unsigned"] = torch.zeros(4, dtype=torch.uint16)
    torch.save(kept, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_file(tmp_path / "w.pth")
    assert list(read) == list(kept)
    assert read.pop("of Python 2") == {"a": 1}
    for name in ("plain", "bytes", "args"):
        assert read[name] == kept[name]
    assert read["named"].note == named.note
    for name in ("view", "complex", "rng", "empty", "parameter"):
        assert torch.equal(read[name], kept[name]), name
    assert read["optimizer"]["state"].keys() == kept["optimizer"]["state"].keys()
    for name, value in kept["model"].items():
        assert torch.equal(read["model"][name], value)


def test_tensors_that_share_or_are_small_and_expanded_are_read(tmp_path):
    table = torch.rand(2**10, 2**10)
    kept = {"tied": table, "twice": table, "part": table[:, 1:].t(), "ids": table[0, :1].expand(99)}
    kept |= {"none": torch.zeros(0, 10**6), "row": torch.arange(512).expand(1, -1)}
    torch.save(kept, tmp_path / "w.pth")
    for name, value in read_file(tmp_path / "w.pth").items():
        assert torch.equal(value, kept[name]), name


def test_parts_of_a_torch_file_that_overlap_are_refused(tmp_path):
    path = tmp_path / "peer.pth"
    torch.save({"weight": torch.zeros(9999)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
        for k in range(50):
            again = copy.copy(largest)
            again.filename = f"peer/data/{k + 1}"
            archive.filelist.append(again)
        archive.writestr("peer/x", b"")
    with pytest.raises(CheckpointError, match="its parts overlap"):
        read_file(path)


def mat(*variables):
    """Write a file of MATLAB 7 with (name, kind, shape, bytes of data), each compressed."""
    parts = [b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)]
    for name, kind, shape, size in variables:
        head = struct.pack("<IIII", 6, 8, kind, 0)
        head += struct.pack("<II", 5, 4 * len(shape)) + struct.pack(f"<{len(shape)}i", *shape)
        head += struct.pack("<II", 1, len(name)) + name.encode().ljust(8, b"\0")
        head += struct.pack("<II", 2 if kind == 9 else 4, size)
        packer = zlib.compressobj(1)
        packed = packer.compress(struct.pack("<II", 14, len(head) + size) + head)
        for start in range(0, size, MIB):
            packed += packer.compress(bytes(min(MIB, size - start)))
        packed += packer.flush()
        parts.append(struct.pack("<II", 15, len(packed)) + packed)
    return b"".join(parts)


UINT8, CHAR, CELL = 9, 4, 1
MATS = {
    "more data than the shape": [("I", UINT8, (4, 4), 2**26)],
    "a large map": [("I", UINT8, (2**13, 2**13), 2**26)],
    "another variable": [("I", UINT8, (4, 4), 16), ("X", UINT8, (2**13, 2**13), 2**26)],
    "text of a size that is not there": [("I", CHAR, (2**14, 2**14), 0)],
    "cells that are not there": [("I", CELL, (2**14, 2**14), 0)],
    "numbers that are not there": [("I", UINT8, (2**15, 2**15), 0)],
}


@pytest.mark.parametrize("name", MATS)
def test_a_mat_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(images, "MOST_UNPACKED", 2**24)
    path = tmp_path / "0001.mat"
    path.write_bytes(mat(*MATS[name]))
    assert path.stat().st_size < 2**20
    grown, told = grown_by(lambda: images.read_fixations(str(path)))
    assert told.startswith(f"DataError: {path}: ") and grown < 40


def test_a_mat_file_of_this_kind_is_read(tmp_path):
    path = tmp_path / "0001.mat"
    path.write_bytes(mat(("X", CHAR, (1, 0), 0), ("I", UINT8, (4, 4), 16)))
    assert images.read_fixations(str(path)).shape == (4, 4)


def png(side):
    """Write a white picture of one bit a pixel: a few kilobytes for millions of pixels."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8)
    packed = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", packed))
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*parts, (b"IEND", b"")):
        whole += struct.pack(">I", len(data)) + kind + data
        whole += struct.pack(">I", zlib.crc32(kind + data))
    return whole


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    path = tmp_path_factory.mktemp("huge") / "0001.png"
    path.write_bytes(png(20_000))
    assert path.stat().st_size < 2**18
    return path


@pytest.mark.parametrize(
    "read", [images.read_frame, images.read_map, images.read_fixations], ids=lambda f: f.__name__
)
def test_a_picture_of_far_too_many_pixels_is_refused(huge, read):
    grown, told = grown_by(lambda: read(str(huge)))
    assert told.startswith(f"DataError: {huge}: 20000 x 20000 pixels") and grown < 40


def test_a_picture_under_another_name_is_refused(huge, tmp_path):
    path = tmp_path / "0001.jpg"
    path.write_bytes(huge.read_bytes())
    with pytest.raises(DataError, match="20000 x 20000"):
        images.read_frame(str(path))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_classification_names_such_a_picture(digits, huge, tmp_path, caplog, workers):
    for split in ("train", "validation"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for k in range(2):
                (folder / f"{k}.png").write_bytes((digits / split / "0" / f"{k}.png").read_bytes())
    target = tmp_path / "data" / "train" / "a" / "0.png"
    target.write_bytes(huge.read_bytes())
    given = ["--peer", "test_vit,name=x", "--peer", "test_vit,name=y", "-b", "4", "-j", workers]
    given += ["--output", str(tmp_path / "out"), "--epochs", "1", "--img-size", "32"]
    told = one_line(caplog, classify([str(tmp_path / "data"), *classification_of(), *given]))
    assert told.startswith(f"error: {target}: Image size (400000000 pixels)")


def test_a_sample_without_a_name_is_told_by_its_number(huge):
    from PIL import Image

    class Nameless(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return np.asarray(Image.open(huge))

    with pytest.raises(BrokenImageError, match="sample 3: Image size"):
        read_image(Nameless(), 3)


# Segmentation, where Detectron2 is installed.


@pytest.fixture
def segmentation():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from segmentation import checkpoints, cli, data, weights
    from segmentation.errors import DataError as Broken

    return {"checkpoints": checkpoints, "cli": cli, "data": data, "weights": weights, "e": Broken}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_no_weights_of_a_segmentor_run_anything(segmentation, tmp_path, how, suffix):
    proof = tmp_path / "executed"
    file = write_evil(tmp_path / f"evil{suffix}", proof, how)
    with pytest.raises(CheckpointError, match=str(file)):
        segmentation["weights"].load_peer_weights(torch.nn.Linear(1, 1), str(file), "peer 'a'")
    assert not proof.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_no_folder_of_transformers_runs_anything(segmentation, tmp_path, file):
    proof = tmp_path / "executed"
    write_evil(tmp_path / file, proof, "torch")
    mapped = {"AutoModel": "own.Model", "AutoConfig": "own.Config"}
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mask2former", "auto_map": mapped})
    )
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        segmentation["weights"].load_peer_weights(torch.nn.Linear(1, 1), f"hf:{tmp_path}", "a")
    assert not proof.exists()


@pytest.mark.parametrize("how", HOW)
def test_the_record_of_a_run_runs_nothing(segmentation, tmp_path, how):
    proof = tmp_path / "executed"
    file = write_evil(tmp_path / "run.pt", proof, how)
    with pytest.raises(CheckpointError, match=str(file)):
        segmentation["checkpoints"].find(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("where", ["run.yaml", "peer.yaml"])
def test_yaml_of_segmentation_runs_nothing(segmentation, tmp_path, capfd, where):
    proof = tmp_path / "executed"
    peers = "[{NAME: a, CONFIG: peer.yaml}]"
    (tmp_path / "run.yaml").write_text(f"TRANSFER: {{RULE: none, PEERS: {peers}}}\n")
    (tmp_path / "peer.yaml").write_text("VERSION: 2\n")
    with (tmp_path / where).open("a") as file:
        file.write(f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{proof}]\n")
    assert segmentation["cli"].main(["--config-file", str(tmp_path / "run.yaml")]) == 1
    told = capfd.readouterr().err
    assert f"{where}: holds Python to run" in told and not proof.exists()


@pytest.mark.parametrize("where", ["run.yaml", "peer.yaml", "base.yaml"])
def test_yaml_of_segmentation_cannot_multiply(segmentation, tmp_path, capfd, where):
    peers = "[{NAME: a, CONFIG: peer.yaml}]"
    (tmp_path / "run.yaml").write_text(f"TRANSFER: {{RULE: none, PEERS: {peers}}}\n")
    (tmp_path / "peer.yaml").write_text("_BASE_: base.yaml\nVERSION: 2\n")
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    with (tmp_path / where).open("a") as file:
        file.write(aliases(6) + "SOLVER: {STEPS: *b6}\n")
    assert segmentation["cli"].main(["--config-file", str(tmp_path / "run.yaml")]) == 1
    told = capfd.readouterr().err
    assert f"{where}: refused, written out it would hold more than" in told
    assert "Traceback" not in told and len(told) < 2000


def test_yaml_of_segmentation_that_is_its_own_base_is_refused(segmentation, tmp_path, capfd):
    path = tmp_path / "run.yaml"
    path.write_text("_BASE_: [run.yaml, run.yaml]\n")
    assert segmentation["cli"].main(["--config-file", str(path)]) == 1
    told = capfd.readouterr().err
    assert f"{path}: names more than 50 files by _BASE_" in told and "Traceback" not in told


def test_pictures_of_too_many_pixels_are_named_in_segmentation(segmentation, huge):
    for work in (
        lambda: segmentation["data"]._read_image({"file_name": str(huge)}),
        lambda: segmentation["data"].read_labels(str(huge)),
    ):
        grown, told = grown_by(work)
        assert told.startswith(f"DataError: {huge}: ") and grown < 40


class SameBytes(Call):
    """An array of bytes that others have too."""

    def __reduce__(self):
        state = (1, (len(self.given[0]),), np.dtype("u1"), False, self.given[0])
        return RECONSTRUCT, (np.ndarray, (0,), b"b"), state


RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float32(1).__reduce__()[0]
RAW, SAME = bytes(2**19), np.zeros(2**19, np.uint8)
LARGE_PICKLES = {
    "an array without its numbers": lambda: {"w": Call(np.ndarray, (2**28,), "b")},
    "empty bytes": lambda: {"w": Call(bytes, 2**28)},
    "a new array": lambda: {"w": Call(RECONSTRUCT, np.ndarray, (2**28,), b"b")},
    "a number of many bytes": lambda: {"w": Call(SCALAR, np.dtype("V268435456"))},
    "bytes that double": lambda: {"w": doubled(22)},
    "dicts": lambda: {"w": [Call(OrderedDict, NAMED) for _ in range(COPIES)]},
    "many arrays of the same bytes": lambda: {f"{k}": SameBytes(None, RAW) for k in range(512)},
    "one array by many names": lambda: {f"{k}": SAME for k in range(512)},
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("what", LARGE_PICKLES)
def test_a_small_pickle_of_a_segmentor_fills_no_memory(segmentation, tmp_path, what, protocol):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": LARGE_PICKLES[what]()}, protocol))
    assert path.stat().st_size < 2 * MIB
    grown, told = grown_by(lambda: segmentation["weights"].read_segmentor(path))
    assert grown < 64
    if what == "one array by many names":  # which is read, and is one tensor
        assert told == "nothing was raised"
    else:
        assert told.startswith(f"CheckpointError: {path}: ")


@pytest.mark.parametrize(
    "opcode",
    [b"r" + struct.pack("<I", 2**24), b"p%d\n" % 2**24, b"\x96" + struct.pack("<Q", 2**28)],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_pickle_that_makes_its_reader_large_is_refused(segmentation, tmp_path, opcode, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"\x80\x05}" + opcode + b".")
    grown, told = grown_by(lambda: segmentation["weights"].read_segmentor(path))
    assert told.startswith(f"CheckpointError: {path}: ") and grown < 64
