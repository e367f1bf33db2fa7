"""What size costs: bytes counted are bytes kept."""
import pytest
import torch
from torch import nn

from lab import scale


def test_storages_are_counted_once_and_parameters_not():
    x = torch.ones(1000, requires_grad=True)
    assert scale.kept(lambda: x.exp().sin(), ()) == 4000            # one result serves both backward passes
    assert scale.kept(lambda: x.exp().sin().sin(), ()) == 8000
    linear = nn.Linear(1000, 10)
    assert scale.kept(lambda: linear(x), [*linear.parameters()]) in (0, 4000)       # x, or a view of it
    assert scale.kept(lambda: linear(x), [x, *linear.parameters()]) == 0


def test_checkpointing_keeps_a_tenth_and_width_and_volume_cost_in_proportion():
    count, held, again = scale.of_crop(24, 64, False)
    assert again == 0 and count == sum(p.numel() for p in scale.model.Swin3D(feature_size=24, num_heads=(
        1, 3, 6, 12)).parameters())
    _, few, again = scale.of_crop(24, 64, True)
    assert few < held / 8 and few + again < held / 2
    assert scale.of_crop(48, 64, False)[1] == pytest.approx(2 * held, rel=0.02)
    # at 96 voxels windows of seven fit 48 tokens no better than 32: the last one is padded
    assert scale.of_crop(24, 96, False)[1] == pytest.approx(held * (96 / 64) ** 3, rel=0.2)
