"""The cache of logits: what comes back, what is written once, what is refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import logit_cache
from common.logit_cache import CachedLogits, ChunkWriter, LogitCache, hash_weights
from common.roles import NonFiniteError
from common.survey import HeldLogits, survey


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(logit_cache, "CHUNK", 8)


def filled(root, logits, labels, name="m"):
    cache = LogitCache(root, {"weights": name}, name, *logits.shape)
    writer = ChunkWriter(cache, range(cache.chunks))
    for start in range(0, len(labels), 5):
        writer.add(logits[start : start + 5], labels[start : start + 5])
    return cache


def test_probabilities_come_back_across_chunks(tmp_path):
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(21, 6) + 40, torch.randint(6, (21,))
    cache = filled(tmp_path, logits, labels)
    assert len(list(cache.folder.iterdir())) == cache.chunks == 3 and cache.missing() == []
    assert torch.allclose(cache.read(0, 21).softmax(1), logits.softmax(1), atol=2e-3)
    assert torch.equal(cache.read(6, 19), cache.read(0, 21)[6:19])
    assert torch.equal(cache.labels(), labels)
    assert torch.equal(cache.read(0, 21).argmax(1), logits.argmax(1))


def test_half_precision_makes_no_ties(tmp_path):
    logits = torch.tensor([[100.0, 100.01, -1e6]]).expand(3, 3)
    cache = filled(tmp_path, logits, torch.zeros(3, dtype=torch.long))
    back = cache.read(0, 3)
    assert back.argmax(1).tolist() == [1, 1, 1] and torch.isfinite(back).all()
    assert back[0, 0].item() == pytest.approx(-0.01, rel=2e-2)


def test_cached_logits_survey_as_those_in_memory(tmp_path):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(3, 30, 4), torch.randint(4, (30,))
    cached = CachedLogits([filled(tmp_path, logits[i], labels, f"m{i}") for i in range(3)])
    one, two = survey(cached, cached.labels()), survey(HeldLogits(cached.names, logits), labels)
    assert torch.equal(one.prediction, two.prediction)
    assert torch.allclose(one.kl, two.kl, atol=5e-3)


def test_samples_whose_files_are_broken_are_left_out(tmp_path):
    logits, labels = torch.randn(21, 6), torch.randint(6, (21,))
    labels[[0, 9, 20]] = -1
    cached = CachedLogits([filled(tmp_path, logits, labels)])
    kept = logits[labels >= 0]
    assert cached.count == 18 and torch.equal(cached.labels(), labels[labels >= 0])
    for start, stop in ((0, 18), (7, 10), (3, 6)):
        got = cached.read(0, start, stop).softmax(1)
        assert torch.allclose(got, kept[start:stop].softmax(1), atol=2e-3)


def test_only_what_is_missing_or_broken_is_written_again(tmp_path):
    logits, labels = torch.randn(21, 6), torch.randint(6, (21,))
    cache = filled(tmp_path, logits, labels)
    paths = sorted(cache.folder.iterdir())
    paths[0].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:50])
    kept = paths[1].stat().st_mtime_ns
    assert cache.missing() == [0, 2]
    writer = ChunkWriter(cache, [0, 2])
    picked = [*range(8), *range(16, 21)]
    writer.add(logits[picked], labels[picked])
    assert cache.missing() == [] and paths[1].stat().st_mtime_ns == kept
    assert torch.allclose(cache.read(0, 21).softmax(1), logits.softmax(1), atol=2e-3)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # of the last tensor's values
    path.write_bytes(content)


def drop_the_sum(path):
    with safe_open(path, framework="pt") as file:
        told = {key: value for key, value in file.metadata().items() if key != "sum"}
    save_file(load_file(path), path, told)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "broken"),
        (flip_a_bit, "its checksum is wrong"),
        (drop_the_sum, "no checksum"),
    ],
)
def test_a_spoiled_file_is_told_once_and_written_again(tmp_path, caplog, spoil, why):
    logits, labels = torch.randn(21, 6), torch.randint(6, (21,))
    spoil(sorted(filled(tmp_path, logits, labels).folder.iterdir())[1])
    cache = LogitCache(tmp_path, {"weights": "m"}, "m", 21, 6)
    assert cache.missing() == [1]
    writer = ChunkWriter(cache, cache.missing())
    assert caplog.text.count("computed again") == 1 and why in caplog.text
    writer.add(logits[8:16], labels[8:16])
    assert (
        cache.missing() == [] and LogitCache(tmp_path, {"weights": "m"}, "m", 21, 6).missing() == []
    )
    assert torch.allclose(cache.read(0, 21).softmax(1), logits.softmax(1), atol=2e-3)


def test_another_key_is_another_cache(tmp_path):
    one = LogitCache(tmp_path, {"weights": "a"}, "m", 8, 3)
    assert one.folder != LogitCache(tmp_path, {"weights": "b"}, "m", 8, 3).folder
    assert one.folder != LogitCache(tmp_path, {"weights": "a"}, "m", 9, 3).folder
    assert one.folder == LogitCache(tmp_path, {"weights": "a"}, "other name", 8, 3).folder


def test_logits_that_are_not_finite_or_of_another_shape_are_refused(tmp_path):
    cache = LogitCache(tmp_path, {}, "vit", 8, 3)
    with pytest.raises(NonFiniteError, match="vit: its logits are not finite in samples 0 to 7"):
        cache.write(0, torch.full((8, 3), torch.nan), torch.zeros(8))
    with pytest.raises(ValueError, match=r"expected \[8, 3\]"):
        cache.write(0, torch.zeros(8, 4), torch.zeros(8))
    with pytest.raises(ValueError, match="of one shape"):
        CachedLogits([cache, LogitCache(tmp_path, {}, "pit", 8, 4)])


def test_hash_of_weights_sees_values_names_shapes_and_types():
    state = {"a": torch.arange(4.0), "n": torch.tensor(3), "h": torch.ones(2, dtype=torch.bfloat16)}
    own = hash_weights(state)
    assert own == hash_weights(dict(reversed(state.items())))
    changes = [
        {**state, "a": torch.arange(4.0) + 1e-6 * torch.eye(4)[1]},
        {**state, "a": state["a"].view(2, 2)},
        {**state, "n": torch.tensor(3.0)},
        {"b": state["a"], "n": state["n"], "h": state["h"]},
    ]
    assert len({own, *map(hash_weights, changes)}) == 5
