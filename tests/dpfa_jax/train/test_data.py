import collections

import numpy as np
import pytest
from small_runs import small

from dpfa_jax.train import data
from dpfa_jax.train.config import parse_config
from dpfa_jax.train.schema import ConfigError

USERS = {f"user{i}": [f"hello {i} {j}!" for j in range(1 + i % 7)] for i in range(60)}


@pytest.fixture
def config():
    return parse_config(small())


def test_fold_is_one_symbol_a_byte_and_reversible_on_ascii():
    text = "".join(map(chr, range(32, 127))) + "\n"
    symbols = data.fold(text)
    assert symbols.min() >= 1
    assert symbols.max() == data.SYMBOLS - 1
    back = "".join("\n" if s == 1 else chr(s + 30) for s in symbols)
    assert back == text
    assert data.fold("é").tolist() == [0, 0]


def test_split_of_a_user_does_not_depend_on_the_others(config):
    train, held_out = data.split_users(USERS, config)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(USERS)
    assert held_out
    for gone in list(USERS)[:10]:
        fewer = {k: v for k, v in USERS.items() if k != gone}
        train_2, held_out_2 = data.split_users(fewer, config)
        assert set(train_2) == set(train) - {gone}
        assert set(held_out_2) == set(held_out) - {gone}


def test_user_chunks_are_capped_and_hold_the_users_own_text(config):
    chunks = data.user_chunks(USERS, config)
    counts = np.bincount(chunks.unit)
    assert len(counts) == len(USERS)
    assert counts.max() == config.data.max_chunks_per_user
    for number, messages in enumerate(USERS.values()):
        mine = chunks.symbols[chunks.unit == number].reshape(-1)
        expected = data.fold("\n".join(messages) + "\n")[:32]
        assert mine[mine >= 0].tolist() == expected.tolist()


def test_message_chunks_are_one_unit_each(config):
    chunks = data.message_chunks(USERS, config)
    messages = [m for ms in USERS.values() for m in ms]
    assert chunks.unit.tolist() == list(range(len(messages)))
    assert chunks.symbols.shape == (len(messages), 16)


def test_population_is_checked_against_the_data(config):
    train, held_out = data.load_chunks(config)
    assert int(train.unit[-1]) + 1 == 1044
    assert len(np.unique(held_out.unit)) == held_out.users == 271
    with pytest.raises(ConfigError, match=r"data\.population = 1043: the data holds 1044"):
        data.load_chunks(parse_config(small(data__population=1043)))


def test_unigram_loss_is_the_entropy():
    chunks = data.Chunks(np.array([[3, 3, 4, 4], [5, 5, 6, 6], [-1] * 4]), np.arange(3), 3)
    assert data.unigram_loss(chunks) == pytest.approx(np.log(4))


def test_one_message_more_changes_one_record(config):
    """Message by message, the prepared records of neighbours differ in one record only."""
    more = {**USERS, "user3": ["new!", *USERS["user3"]]}
    before, after = (data.message_chunks(users, config).symbols for users in (USERS, more))
    assert len(after) == len(before) + 1
    rows = [collections.Counter(map(bytes, x)) for x in (before, after)]
    assert sum((rows[1] - rows[0]).values()) == 1
    assert not rows[0] - rows[1]
