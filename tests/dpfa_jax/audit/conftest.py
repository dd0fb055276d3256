"""What a clean audit must show, at a false-alarm rate that a daily run can afford."""

import pytest


@pytest.fixture
def stands():
    """Asserts a claim: no bound above it at 1 − 10⁻⁹, a tight attack near it at 99 %.

    The first fails for a claim that holds with probability below 10⁻⁹. For the second: at
    20,000 samples the ratio is 0.941 on average with a deviation of 0.016 (docs/auditing.md),
    so that 0.85 is 5.7 of them away: below 10⁻⁸. Keys are fixed.
    """

    def check(result):
        assert result.samples == 20_000
        strict = result.at(1 - 1e-9)
        assert not strict.is_broken, strict.to_json()
        assert not result.is_wasteful, result.to_json()

    return check
