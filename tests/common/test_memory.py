"""Bytes by hand, and that watching leaves nothing behind."""

from dataclasses import dataclass

import torch
from torch import nn

from common.memory import (
    buffers_kept,
    bytes_of,
    peak_bytes,
    peak_saved_bytes,
    saved_bytes,
    tensors_in,
)


@dataclass
class Pair:
    one: torch.Tensor
    rest: dict


class Plain:
    def __init__(self, x):
        self.x = x


def test_tensors_are_found_in_anything_that_holds_them():
    x = [torch.zeros(i + 1) for i in range(5)]
    held = Pair(x[0], {"a": [x[1], (x[2],)], "b": Plain(x[3]), "c": 7, "d": "text"})
    assert [len(found) for found in tensors_in(held)] == [1, 2, 3, 4]


def test_a_storage_counts_once_and_whole():
    x = torch.zeros(100)
    assert bytes_of([x, x[:10], x.view(10, 10)]) == 400
    assert bytes_of([x[:10]]) == 400
    assert bytes_of(x, torch.device("meta")) == 0


def test_saved_bytes_of_a_product_are_those_of_its_factors():
    a, b = (torch.rand(50, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: a * b) == 400
    assert saved_bytes(lambda: a * b, [a]) == 200
    assert saved_bytes(lambda: a * a) == 200
    assert saved_bytes(lambda: a.detach() * b.detach()) == 0


def test_what_is_saved_on_the_meta_device_is_told_apart():
    a, b = (torch.rand(50, requires_grad=True, device="meta") for _ in range(2))
    assert saved_bytes(lambda: a * b) == 400


def test_the_peak_falls_when_a_graph_goes():
    a = torch.rand(1000, requires_grad=True)

    def one_by_one():
        for _ in range(3):
            a.exp().sum().backward()  # exp saves its result

    assert saved_bytes(one_by_one) == 3 * 4000
    assert peak_saved_bytes(one_by_one) == 4000

    def at_once():
        graphs = [a.exp().sum() for _ in range(3)]
        for graph in graphs:
            graph.backward()

    assert peak_saved_bytes(at_once) == 3 * 4000


def test_the_peak_of_all_tensors_has_temporaries_and_gradients():
    a = torch.rand(1000, requires_grad=True)
    assert peak_bytes(lambda: a.detach() + 1, [a]) == 4000
    assert peak_bytes(lambda: (a.detach() + 1) * 2, [a]) == 8000  # both, for a moment
    assert peak_bytes(lambda: a.detach().view(10, 100), [a]) == 0
    # sum, its gradient of one, and the gradient of a, expanded and then its own
    assert 4000 <= peak_bytes(lambda: a.sum().backward(), [a]) <= 4000 + 3 * 4


def test_buffers_are_put_back():
    module = nn.BatchNorm1d(3)
    with buffers_kept(module):
        module(torch.randn(8, 3))
        assert module.num_batches_tracked == 1
    assert module.num_batches_tracked == 0
    assert torch.equal(module.running_mean, torch.zeros(3))
