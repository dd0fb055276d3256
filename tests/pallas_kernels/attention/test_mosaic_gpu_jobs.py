"""Which rows the blocks of the Hopper forward kernel do, and in what order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import AttentionSpec
from pallas_kernels.attention.mosaic_gpu_forward import Jobs, Plan


def make_jobs(batch, heads, row_tiles, blocks, is_causal, tiles=8):
    plan = Plan(
        keys=128, stages=2, warpgroups=2, tiles=tiles, row_tiles=row_tiles, unit=1.0, row_unit=1.0
    )
    spec = AttentionSpec(mode="exact", scale=1.0, is_causal=is_causal)
    return Jobs(spec, plan, batch, heads, 1, blocks)


def schedule(jobs, lengths):
    """For every block its jobs (batch, head, row tile, tiles of keys), in order."""
    words = jnp.asarray(lengths, jnp.uint32)[:, None]

    @jax.jit
    @jax.vmap
    def look(turn, block):
        job = jobs.job(turn, block, words)
        return job.batch, job.head, job.first_row, job.high - job.low

    plan = []
    for block in range(jobs.blocks):
        turns = int(jobs.turns(jnp.int32(block)))
        index = jnp.arange(turns, dtype=jnp.int32)
        columns = look(index, jnp.full_like(index, block))
        rows = np.stack([np.asarray(x) for x in columns], axis=1)
        rows[:, 2] //= jobs.plan.rows
        plan.append([tuple(int(x) for x in row) for row in rows])
    return plan


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_every_row_of_every_head_is_done(batch, heads, row_tiles, blocks, is_causal):
    jobs = make_jobs(batch, heads, row_tiles, blocks, is_causal)
    done = [job[:3] for block in schedule(jobs, [1024] * batch) for job in block]
    wanted = [(b, n, i) for b in range(batch) for n in range(heads) for i in range(row_tiles)]
    assert set(done) == set(wanted)
    if is_causal and batch * heads % 2:
        wanted += [(batch - 1, heads - 1, i) for i in range(row_tiles)]
    assert sorted(done) == sorted(wanted)


# (B, N, T): causal self-attention on 132 multiprocessors.
@pytest.mark.parametrize("shape", [(4, 16, 4096), (1, 16, 16384), (16, 16, 1024), (4, 32, 4096)])
def test_causal_blocks_have_as_much_to_do(shape):
    """The longest block at most 6 % above the mean: of 7.76 pairs a block, some have 8."""
    batch, heads, length = shape
    jobs = make_jobs(batch, heads, length // 128, 132, True, tiles=length // 128)
    # A job costs its tiles, and about four more before and after them.
    work = [sum(job[3] + 4 for job in block) for block in schedule(jobs, [length] * batch)]
    assert max(work) <= 1.06 * np.mean(work)
