"""A clock that moves only when work is done, so that timing itself can be tested exactly."""

import pytest

from dpfa_jax.bench import timing


class Clock:
    def __init__(self):
        self.now = 0.0
        self.order = []

    def perf_counter(self):
        return self.now

    def work(self, name, seconds):
        """A version that takes ``seconds`` a call, or ``seconds(now)``."""

        def run(times):
            self.order.append((name, times))
            for _ in range(times):
                self.now += seconds(self.now) if callable(seconds) else seconds

        return timing.Runnable(run)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    return clock
