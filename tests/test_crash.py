"""The small form of tests/crash.py: real trainings, killed twice."""

from tests.crash import crash_test


def test_a_training_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    said = crash_test(tmp_path, kills=2, seed=0, workers=0)
    assert said.startswith("2 kills")
