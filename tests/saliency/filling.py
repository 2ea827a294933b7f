"""Weights, clips and maps from arithmetic alone: the same on every machine, no file, no generator.

A tensor's values are a hash of its name and of each element's index, scaled so that activations
stay near 1 and the last sigmoid is not saturated.
"""

import zlib

import numpy as np
import torch

# Gain of 3-d convolutions, and of those with one map as output.
GAINS = {"vinet_s": (1.25, 3.5), "vinet_a": (1.25, 4.0), "tmfi_net": (1.15, 1.2)}

_SHORT = np.uint64(0xFFFFFFFF)


def noise(name, shape):
    """Values in [-1, 1), float64, in C order: murmur3's finaliser of a counter that starts at the
    CRC of the name and grows by the golden ratio's 32 bits."""
    start = np.uint64(zlib.crc32(f"0:{name}".encode()))
    count = np.arange(int(np.prod(shape)), dtype=np.uint64)
    x = (start + count * np.uint64(0x9E3779B9)) & _SHORT
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint64(shift)
        x = x * np.uint64(factor) & _SHORT
    x ^= x >> np.uint64(16)
    return (x / 2.0**31 - 1.0).reshape(shape)


def _centre_and_width(model, name, shape):
    """Where the values of a tensor lie: centre +- width."""
    if name.endswith("running_mean"):
        return 0.0, 0.1
    if name.endswith("running_var"):
        return 1.0, 0.25
    if name.endswith("relative_position_bias_table"):
        return 0.0, 0.5
    if len(shape) == 1:
        if not name.endswith("weight"):
            return 0.0, 0.1
        return (0.4 if name.endswith("bn3.weight") else 1.0), 0.1
    convolution, to_one_map = GAINS[model]
    if len(shape) == 5:
        gain = to_one_map if shape[0] == 1 else convolution
    else:
        gain = 0.4 if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1.0
    return 0.0, gain * np.sqrt(3.0 / np.prod(shape[1:]))


def fill(model, weights):
    """Overwrite the floating-point entries of a state dict with published names; others stay."""
    with torch.no_grad():
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                shape = tuple(tensor.shape)
                centre, width = _centre_and_width(model, name, shape)
                values = centre + width * noise(name, shape)
                tensor.copy_(torch.from_numpy(values.astype(np.float32)))


def _wave(z):
    """A triangle wave of period 1 between -1 and 1."""
    return 4.0 * np.abs(z - np.floor(z) - 0.5) - 1.0


def clip(shape):
    """Two waves that move through the frames, and noise: [B, 3, T, H, W], float32."""
    n, c, t, y, x = np.ogrid[tuple(slice(0, float(size)) for size in shape)]
    _, _, frames, height, width = shape
    one = _wave(2.0 * x / width + y / height + t / frames + c / 3.0 + 0.13)
    two = _wave(3.0 * y / height - 2.0 * x / width + 0.5 * t / frames + 0.29 + 0.5 * n)
    return torch.from_numpy((0.9 * one + 0.6 * two + 0.4 * noise("input", shape)).astype("f4"))


def gaze(shape):
    """Three bumps and some noise for each sample: [B, H, W] in (0, 1), float32."""
    samples, height, width = shape
    y = ((np.arange(float(height)) + 0.5) / height)[None, :, None]
    x = ((np.arange(float(width)) + 0.5) / width)[None, None, :]
    bumps = 0.5 + 0.5 * noise("gt.bumps", (samples, 3, 4))
    total = np.zeros(shape)
    for k in range(3):
        cy, cx, spread, height_ = (bumps[:, k, i][:, None, None] for i in range(4))
        distance = (y - cy) ** 2 + (x - cx) ** 2
        total += (0.3 + 0.7 * height_) / (1.0 + distance / (0.002 + 0.02 * spread))
    speckle = 0.5 + 0.5 * noise("gt.noise", shape)
    return torch.from_numpy((total / 3.0 + 0.05 * speckle).astype(np.float32))
