"""Maps by formula: the golden numbers were computed on these."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).with_name("golden")
_BITS = 0xFFFFFFFF


def golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def hashed(name, count):
    """Numbers in [0, 1): murmur3's finaliser of the counter, seeded by the name's CRC."""
    seed = zlib.crc32(f"0:{name}".encode())
    x = (seed + np.arange(count, dtype=np.uint64) * 0x9E3779B9) & _BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & _BITS
    return x.astype(np.float64) / 2**32


def make_map(shape, name):
    """Positive maps: three rational bumps a sample and 5 % noise."""
    batch, height, width = shape
    y = ((np.arange(height) + 0.5) / height)[None, :, None]
    x = ((np.arange(width) + 0.5) / width)[None, None, :]
    bumps = hashed(f"{name}.bumps", batch * 12).reshape(batch, 3, 4, 1, 1)
    total = np.zeros(shape)
    for cy, cx, size, height in (bumps[:, k].swapaxes(0, 1) for k in range(3)):
        distance = (y - cy) ** 2 + (x - cx) ** 2
        total = total + (0.3 + 0.7 * height) / (1.0 + distance / (0.002 + 0.02 * size))
    noise = hashed(f"{name}.noise", total.size).reshape(shape)
    return torch.from_numpy((total / 3 + 0.05 * noise).astype(np.float32))


def make_fixations(shape, name, density):
    return torch.from_numpy(hashed(name, int(np.prod(shape))).reshape(shape) < density).float()


def mix(weights, target, other):
    """Blend maps sample by sample, in float32."""
    weights = torch.as_tensor(weights, dtype=torch.float32).view(-1, 1, 1)
    return weights * target + (1 - weights) * other


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.01
