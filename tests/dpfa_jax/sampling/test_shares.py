"""Batches dealt to hosts: nothing lost, nothing twice, whatever the numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfa_jax import PoissonSampler, UserSampler, keys
from dpfa_jax.sampling import PoissonBatch, deal, share


@given(
    parts=st.integers(1, 9),
    rows=st.integers(1, 12),
    data=st.data(),
)
def test_every_example_is_in_exactly_one_share(parts, rows, data):
    size = parts * rows
    real = data.draw(st.integers(0, size))
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, 500), min_size=real, max_size=real))))
    indices = np.zeros(size, np.int32)
    indices[:real] = chosen
    batch = PoissonBatch(indices, np.arange(size) >= real)
    shares = [share(batch, p, parts) for p in range(parts)]
    loaded = np.concatenate([s.indices[~s.is_padding_example] for s in shares])
    assert sorted(loaded) == chosen.tolist()
    for s in shares:
        assert s.indices.shape == s.is_padding_example.shape == (rows,)
        # Padding last, and work spread evenly: what skips microbatches of padding counts on both.
        assert (np.diff(s.is_padding_example.astype(int)) >= 0).all()
        assert abs(int((~s.is_padding_example).sum()) - real / parts) < 1
    whole = deal(batch, parts)
    np.testing.assert_array_equal(whole.indices, np.concatenate([s.indices for s in shares]))


def test_hosts_that_draw_with_one_key_have_one_batch():
    with keys.allow_reuse_for_tests():
        hosts = [PoissonSampler(500, 0.1, 96, keys.reproducible_key(3)) for _ in range(4)]
    for step in range(3):
        joint = hosts[0].sample(step)
        loaded = [share(h.sample(step), p, 4) for p, h in enumerate(hosts)]
        got = np.concatenate([s.indices[~s.is_padding_example] for s in loaded])
        assert sorted(got) == joint.indices[~joint.is_padding_example].tolist()


def test_users_keep_their_examples_together():
    sampler = UserSampler(
        np.repeat(np.arange(20), 3),
        max_examples_per_user=2,
        sampling_probability=0.5,
        batch_size=16,
        rng=keys.reproducible_key(11),
    )
    batch = sampler.sample(0)
    parts = [share(batch, p, 4) for p in range(4)]
    rows = [tuple(r) for s in parts for r in s.examples[~s.is_padding_example]]
    assert sorted(rows) == sorted(map(tuple, batch.examples[~batch.is_padding_example]))
    assert all(s.is_padding_slot.shape == (4, 2) for s in parts)


@pytest.mark.parametrize(
    ("part", "parts", "message"),
    [
        (0, 3, "parts=3: allowed is a whole number >= 1 that divides the batch's 4 rows"),
        (0, 0, "parts=0"),
        (0, True, "parts=True"),
        (2, 2, "part=2: allowed is a whole number from 0 to 1"),
        (-1, 2, "part=-1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, parts, message):
    batch = PoissonBatch(np.zeros(4, np.int32), np.zeros(4, bool))
    with pytest.raises(ValueError, match=message):
        share(batch, part, parts)
