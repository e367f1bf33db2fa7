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
    assert scale.kept(lambda: linear(x), [*linear.parameters()]) == 4000
    assert scale.kept(lambda: linear(x), [x, *linear.parameters()]) == 0


def test_checkpointing_keeps_an_eighth_and_width_and_volume_cost_in_proportion():
    held = scale.of_crop(24, 64, False)[1]
    few, again = scale.of_crop(24, 64, True)[1:]
    assert few < held / 8 and few + again < held / 2
    assert scale.of_crop(48, 64, False)[1] == pytest.approx(2 * held, rel=0.02)
    # 32 and 48 tokens an axis take five and seven windows of seven: what is padded is kept, too
    assert scale.of_crop(24, 96, False)[1] == pytest.approx(held * (7 / 5) ** 3, rel=0.05)
