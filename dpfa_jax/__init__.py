"""Differentially private attention and training for JAX.

The names below are the public interface; everything else may change. See README.md for
the two commands, docs/privacy.md for what is proved and docs/sharp_edges.md for what
is not.
"""

from dpfa_jax.accounting import Accountant as Accountant
from dpfa_jax.accounting import calibrate_noise_multiplier as calibrate_noise_multiplier
from dpfa_jax.attention import AttentionPrivacy as AttentionPrivacy
from dpfa_jax.attention import attention_event as attention_event
from dpfa_jax.attention import dp_dot_product_attention as dp_dot_product_attention
from dpfa_jax.attention_fn import attention_fn as attention_fn
from dpfa_jax.attention_fn import noise_key as noise_key
from dpfa_jax.clipping import clipped_grad as clipped_grad
from dpfa_jax.keys import SecureKey as SecureKey
from dpfa_jax.ledger import Ledger as Ledger
from dpfa_jax.optim import add_noise as add_noise
from dpfa_jax.optim import dp_aggregate as dp_aggregate
from dpfa_jax.sampling import PoissonSampler as PoissonSampler
from dpfa_jax.sampling import UserSampler as UserSampler
