"""Planted bugs that no attack on a release sees, and the test of the suite that does.

Each bug is one change, and the named test, which passes in the suite, must fail for it.
"""

import jax
import jax.numpy as jnp
import mutants
import pytest

from dpfa_jax import device_axes, keys
from dpfa_jax.accounting import renyi
from dpfa_jax.ledger import Ledger
from dpfa_jax.ledger.state import State
from dpfa_jax.sampling import PoissonSampler, poisson
from dpfa_jax.train import loop
from pallas_kernels.prng import chacha

FAILURES = (AssertionError, pytest.fail.Exception)


@pytest.fixture(autouse=True)
def _as_their_own_fixtures_do():
    with keys.allow_reuse_for_tests(), jax.numpy_dtype_promotion("standard"):
        yield


def test_truncated_batches_accounted_as_plain(monkeypatch):
    tests = mutants.load_tests("sampling", "test_poisson_sampler.py")
    with keys.allow_reuse_for_tests():
        tests.test_the_event_says_what_the_sampler_does()
        mutants.patch_line(
            monkeypatch, poisson.sampling_event, "if batch_size >= population:", "if True:"
        )
        with pytest.raises(AssertionError):
            tests.test_the_event_says_what_the_sampler_does()


def test_batches_of_a_fixed_size_accounted_as_poisson(monkeypatch):
    tests = mutants.load_tests("sampling", "test_poisson_sampler.py")
    mutants.patch_line(
        monkeypatch,
        PoissonSampler.sample,
        "chosen = np.flatnonzero(join.astype(np.uint64) < self._threshold)",
        "chosen = np.sort(np.argsort(join)[: int(self.population * self.sampling_probability)])",
        PoissonSampler,
    )
    with keys.allow_reuse_for_tests():
        members = tests.membership(tests.sampler(60, 0.3), 500)
    tests.test_each_record_joins_with_probability_q(members)  # each record by itself is right
    with pytest.raises(AssertionError):
        tests.test_batch_sizes_are_binomial(members)


def test_norms_summed_in_bfloat16(monkeypatch):
    tests = mutants.load_tests("clipping", "test_clipped_grad.py")

    def clipped_grad(loss_fn, *, l2_clip_norm):
        def call(params, x):
            grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, x)
            add = lambda total, column: (total + column * column, None)  # noqa: E731
            squares, _ = jax.lax.scan(add, jnp.zeros(len(x), jnp.bfloat16), grads.T)
            norms = jnp.sqrt(squares).astype(jnp.float32)
            factor = jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norms, 1e-12))
            return jnp.einsum("b,b...->...", factor, grads.astype(jnp.float32))

        return call

    tests.test_bfloat16_norms_are_taken_in_float32()
    monkeypatch.setattr(tests, "clipped_grad", clipped_grad)
    with pytest.raises(AssertionError):
        tests.test_bfloat16_norms_are_taken_in_float32()


# --- the order of charge and release ------------------------------------------------------


def test_charge_after_release(tmp_path, monkeypatch):
    """The block runs and is committed before it is in the ledger."""
    tests = mutants.load_tests("train", "test_loop.py")
    # Enough noise; solving for the least takes longer than the run.
    monkeypatch.setattr(loop, "calibrate_noise_multiplier", lambda *_, **__: 500.0)
    charge = "ledger.charge(label, event, fingerprint)\n"
    steps = (
        "            for i in block:\n"
        "                params, state = step(params, state, *batches[i])\n"
        "                progress.step(i + 1)\n"
    )
    mutants.patch_line(
        monkeypatch, loop._train_private, charge + steps, steps.lstrip() + " " * 12 + charge
    )
    with pytest.raises(AssertionError) as failure:
        tests.test_crash_and_resume_end_with_the_same_accounting(tmp_path, monkeypatch, None, 1)
    assert "done + 2" in str(failure.traceback[-1].statement)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_budget("s", epsilon=4.4, delta=1e-5, adjacency="add_remove", unit="user")
    return ledger


def test_refund_on_crash(ledger, monkeypatch):
    """Another process, after a crash, does not count what is in the file."""
    tests = mutants.load_tests("ledger", "test_ledger.py")
    mutants.patch_line(
        monkeypatch,
        State.apply,
        "list(_charged(entry.body))",
        "[]",
        State,
    )
    with pytest.raises(AssertionError):
        tests.test_a_charge_is_there_for_the_next_process(ledger)


def test_a_label_pays_again_only_if_it_was_released(ledger, monkeypatch):
    """Whoever crashed releases once more for the same charge, though the first is out."""
    tests = mutants.load_tests("ledger", "test_ledger.py")
    mutants.patch_line(
        monkeypatch,
        Ledger.charge,
        'if self._store.labelled(write.connection, "release", scope, label) is not None:',
        "if False:",
        Ledger,
    )
    with pytest.raises(FAILURES):
        tests.test_what_was_released_is_not_released_again_for_the_same_charge(ledger)


def test_delta_not_composed(monkeypatch):
    tests = mutants.load_tests("accounting", "test_renyi.py")
    mutants.patch_line(
        monkeypatch,
        renyi.RenyiCost.plus,
        "self.delta + count * other.delta",
        "max(self.delta, other.delta)",
        renyi.RenyiCost,
    )
    with pytest.raises(AssertionError):
        tests.test_deltas_add_up()


# --- counters and keys --------------------------------------------------------------------


def test_counter_overflow(monkeypatch):
    """Sixteen bits of an index: step 65,536 draws the noise of step 0."""
    tests = mutants.load_tests("audit", "test_streams.py")
    tests.test_steps_share_no_noise()
    mutants.patch_line(
        monkeypatch,
        chacha.derive_key,
        "jnp.asarray(index).astype(jnp.uint32)",
        "jnp.asarray(index).astype(jnp.uint16).astype(jnp.uint32)",
    )
    with pytest.raises(AssertionError):
        tests.test_steps_share_no_noise()


def test_one_key_on_all_devices(monkeypatch):
    tests = mutants.load_tests("test_attention.py")
    mutants.patch_line(monkeypatch, device_axes.positions, "if missing:", "if False:")
    with pytest.raises(FAILURES):
        tests.test_shard_map_needs_a_key_of_its_own_on_every_device("query")
