"""Reading data and solving for the noise take longer than small runs; each is done once."""

import functools

import pytest

from dpfa_jax.train import data, loop


@pytest.fixture(autouse=True, scope="session")
def _solve_each_plan_once():
    solve, known = loop.calibrate_noise_multiplier, {}

    def once(make_event, **target):
        # The plan at one noise level, and the target, tell these plans apart.
        name = repr((make_event(1.0), sorted(target.items())))
        if name not in known:
            known[name] = solve(make_event, **target)
        return known[name]

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "calibrate_noise_multiplier", once)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _read_the_messages_once():
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "read_chitchat", functools.cache(data.read_chitchat))
    yield
    patch.undo()
