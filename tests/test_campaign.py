"""Three hundred trials of tests/campaign.py; more of them, kills and full disks by hand."""
import campaign
import pytest


@pytest.mark.parametrize("family", ["headers", "pictures", "datalists", "tables", "configs", "checkpoints"])
def test_broken_inputs_end_in_a_result_or_in_one_line(family):
    assert campaign.trials(family, 50, seed=7) == []
