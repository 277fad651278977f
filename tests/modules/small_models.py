"""Small models that several files try: a bottleneck alone, and one behind an encoder that counts its calls."""

from __future__ import annotations

from torch import nn

from kvb import BottleneckedEncoder, KeyValueBottleneck

C, K, D, V, CHANNELS = 4, 8, 3, 5, 12


class Recorder(nn.Module):
    """An encoder that counts its calls; 6 inputs to 12 channels by one matrix."""

    def __init__(self, channel_last=True):
        super().__init__()
        self.linear = nn.Linear(6, CHANNELS)
        self.channel_last = channel_last
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        features = self.linear(x) * scale
        return features if self.channel_last else features.movedim(-1, 1)


def build(encoder=None, **options):
    defaults = {
        "num_channels": CHANNELS,
        "num_codebooks": C,
        "key_value_pairs_per_codebook": K,
        "dim_keys": D,
        "dim_values": V,
    }
    return BottleneckedEncoder(encoder or Recorder(), **{**defaults, **options})


def make(C=3, K=11, D=5, V=4, **options):
    return KeyValueBottleneck(C, K, D, V, **options)
