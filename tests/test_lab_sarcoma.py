"""lab/sarcoma.py: the parts of the benchmark."""
from lab import sarcoma


def test_no_patient_is_in_two_parts_and_the_others_train():
    named = [number for numbers in sarcoma.PARTS.values() for number in numbers]
    assert len(named) == len(set(named)) == 27 and {k: len(v) for k, v in sarcoma.PARTS.items()} == dict(test=14, val=3, reserved=10)
    assert [sarcoma.part(number) for number in ("001", "003", "005", "002")] == ["test", "val", "reserved", "train"]
