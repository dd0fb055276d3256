"""Noise keys: 256 bits from the operating system, used once.

A noise key is a typed JAX key array of this module's own implementation,
``key<chacha20>``. ``jax.random.split`` and ``jax.random.fold_in`` derive children, Flax
takes it in ``rngs``, and it is an ordinary argument of a jitted function.

The rules, each enforced where it can be seen:

* No default. :meth:`SecureKey.generate` reads the operating system's generator;
  :func:`reproducible_key` makes a key anybody can make again and is for tests.
* A 64-bit Threefry key (``jax.random.key(0)``) is refused by everything that adds
  noise: it can be searched, and its usual value is known.
* A key is used for one release. Handing the same key to a second noisy operation gives
  both the same noise, and the difference of the two releases is then the private
  difference, exactly. Within one trace, and between calls outside ``jit``, the second
  use raises. Inside a compiled function it cannot be seen: make the key an argument,
  and derive it with ``jax.random.fold_in(key, step)``.

Printing a JAX key array prints its words. Print :attr:`SecureKey.fingerprint` instead.
"""

import collections
import contextlib
import functools
import hashlib
import secrets
import threading
import weakref
from collections.abc import Iterator

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Key, UInt32

from pallas_kernels import prng

# What a child of a key is for. Never renumber: a stream is a function of these.
# The attention kernels use 16 and 17 (pallas_kernels/attention/common.py).
_FOLD_IN, _SPLIT, _BITS = 1, 2, 3
GRADIENT = 18


def _seed(seed: jax.Array) -> jax.Array:
    del seed
    raise ValueError(
        "jax.random.key(seed, impl='chacha20'): a 32-bit seed is not a noise key. Use "
        "dpfa_jax.SecureKey.generate().key(), or dpfa_jax.keys.reproducible_key(seed) in tests."
    )


def _fold_in(key_words: jax.Array, data: jax.Array | int) -> jax.Array:
    return prng.derive_key(key_words, _FOLD_IN, data)


def purpose_words(key: Key[Array, ""], index: jax.Array, purpose: int) -> UInt32[Array, "8"]:
    """The words of the child for ``purpose`` of ``jax.random.fold_in(key, index)``."""
    return prng.derive_path(jax.random.key_data(key), [(_FOLD_IN, index), (purpose, 0)])


def _split(key_words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    count = int(np.prod(shape))
    children = prng.derive_key(key_words, _SPLIT, jnp.arange(count, dtype=jnp.uint32))
    return children.reshape(*shape, 8)


def _random_bits(key_words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    count = int(np.prod(shape))
    per_value = max(1, bit_width // 32)
    child = prng.derive_key(key_words, _BITS)
    words = prng.stream_words(child, -(-count * per_value // 16)).reshape(-1)
    words = words[: count * per_value]
    if bit_width == 64:
        pairs = words.astype(jnp.uint64).reshape(-1, 2)
        return ((pairs[:, 0] << jnp.uint64(32)) | pairs[:, 1]).reshape(shape)
    dtype = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width]
    return words.astype(dtype).reshape(shape)


_IMPL = jax.extend.random.define_prng_impl(
    key_shape=(8,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="chacha20",
)


def wrap(words: UInt32[Array, "*b 8"]) -> Key[Array, "*b"]:
    """Key words as a typed key array."""
    return jax.random.wrap_key_data(words, impl=_IMPL)


@functools.cache
def _dtype() -> object:
    # Not a constant: making one array at import would start JAX's back ends.
    with jax.ensure_compile_time_eval():
        return wrap(jnp.zeros(8, jnp.uint32)).dtype


class SecureKey:
    """A 256-bit noise key from the operating system, held on the host.

    ``repr`` shows a fingerprint, never the key, and pickling is refused: a key that
    reaches a disk can be used twice. In several processes, which each draw a secret of their
    own, :meth:`key` gives the first process's in all of them, so all must call it.

    Example:
        >>> key = SecureKey.generate()
        >>> key.key().dtype
        key<chacha20>
        >>> len(key.fingerprint)
        16
    """

    source = "operating system (256 bit)"

    def __init__(self, secret: bytes):
        if not isinstance(secret, bytes) or len(secret) != 32:
            raise ValueError("secret: 32 bytes are needed (256 bits); its value is not shown.")
        self._secret = secret
        self._is_this_process_alone = False

    @classmethod
    def generate(cls) -> "SecureKey":
        """A fresh key from the operating system's generator."""
        made = cls(secrets.token_bytes(32))
        made._is_this_process_alone = True
        return made

    def key(self) -> Key[Array, ""]:
        """The typed JAX key array, ``key<chacha20>[]``; the same in all processes."""
        # Concrete also inside a traced function, where :func:`consume` must recognise it.
        with jax.ensure_compile_time_eval():
            words = np.frombuffer(self._secret, dtype="<u4").astype(np.uint32)
            if self._is_this_process_alone:
                words = _of_first_process(words)
                self._secret = words.astype("<u4").tobytes()
                self._is_this_process_alone = False
            return wrap(jnp.asarray(words))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the key and do not reveal it.

        In several processes: each one's own until :meth:`key` was called.
        """
        return hashlib.sha256(b"dpfa_jax key fingerprint" + self._secret).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"SecureKey(fingerprint={self.fingerprint})"

    def __reduce__(self) -> str:
        raise TypeError("A SecureKey is not pickled: a stored key can be used twice.")


def reproducible_key(seed: int) -> Key[Array, ""]:
    """A key that anybody who knows the seed can make again. For tests only.

    Noise from it hides nothing: whoever knows the seed subtracts it.

    Example:
        >>> bool((jax.random.key_data(reproducible_key(1))
        ...       == jax.random.key_data(reproducible_key(1))).all())
        True
    """
    digest = hashlib.sha256(f"dpfa_jax reproducible key {int(seed)}".encode()).digest()
    return SecureKey(digest).key()


def take_key(rng: object) -> Key[Array, ""]:
    """One checked noise key for an object that keeps it; a second taker raises.

    Raises:
        ValueError: if it is missing, unsuited, an array of keys, or was used before.
    """
    key = check_noise_key(rng)
    if key.shape != ():
        raise ValueError(f"rng has shape {key.shape}: one key is needed, shape ().")
    consume(key)
    if isinstance(key, jax.core.Tracer) or jax.process_count() == 1:
        return key
    return wrap(jnp.asarray(_of_first_process(np.asarray(jax.random.key_data(key)))))


def _of_first_process(words: np.ndarray) -> np.ndarray:
    """The first process's key words in all processes, which each drew their own.

    Otherwise each would add noise of its own to one sum, or sample a batch of its own. All
    processes come here together: they run one program.
    """
    if jax.process_count() == 1:
        return words
    return np.asarray(multihost_utils.broadcast_one_to_all(words))


def is_noise_key(key: object) -> bool:
    """Whether ``key`` is a typed key array of this module's implementation."""
    return isinstance(key, jax.Array) and key.dtype == _dtype()


def check_noise_key(key: object, argument: str = "rng") -> Key[Array, "*b"]:
    """``key`` itself, as a key array, or a clear error.

    Raises:
        ValueError: if it is missing, of another implementation, or no key at all.
    """
    make_one = "Make one with dpfa_jax.SecureKey.generate().key()"
    if key is None:
        raise ValueError(f"{argument}=None: noise needs a key; there is no default. {make_one}.")
    if isinstance(key, SecureKey):
        return key.key()
    if is_noise_key(key):
        assert isinstance(key, jax.Array)
        return key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{argument} is a {key.dtype}: its key is too short to hide noise. {make_one}, or with "
            "dpfa_jax.keys.reproducible_key(seed) in tests."
        )
    raise ValueError(
        f"{argument} is a {type(key).__name__}: a key<chacha20> array is needed. {make_one}."
    )


# --- a key is used once -----------------------------------------------------------------

_MEMORY = 1 << 20
_used_values: collections.OrderedDict[bytes, None] = collections.OrderedDict()
_used_tracers: dict[int, weakref.ref] = {}
_lock = threading.Lock()
_reuse_allowed = threading.local()
_threefry_allowed = threading.local()


@contextlib.contextmanager
def allow_reuse_for_tests() -> Iterator[None]:
    """Lets one key be used several times, to compare implementations under equal noise.

    Never in production: two releases under one key reveal their private difference.
    """
    before = getattr(_reuse_allowed, "value", False)
    _reuse_allowed.value = True
    try:
        yield
    finally:
        _reuse_allowed.value = before


@contextlib.contextmanager
def allow_threefry_for_tests() -> Iterator[None]:
    """Lets ``AttentionPrivacy(rounds="threefry")`` make noise, to compare it with others'.

    Never in production: 64 of the key's 256 bits decide this noise, and no guarantee is
    stated for it. What counts is where a function is traced: a program compiled inside
    also runs outside.
    """
    before = getattr(_threefry_allowed, "value", False)
    _threefry_allowed.value = True
    try:
        yield
    finally:
        _threefry_allowed.value = before


def check_threefry_allowed(argument: str) -> None:
    """Raises outside :func:`allow_threefry_for_tests`.

    Raises:
        ValueError: names the argument that asked for Threefry.
    """
    if not getattr(_threefry_allowed, "value", False):
        raise ValueError(
            f"{argument}: Threefry's 64-bit key hides nothing; it is for reproducible tests, "
            "inside `with dpfa_jax.keys.allow_threefry_for_tests():`. Allowed elsewhere are "
            "8, 12 and 20 rounds of ChaCha."
        )


def refuse_frozen_key(key: Key[Array, "*b"], argument: str) -> None:
    """Raises if compiled code would make the same noise from ``key`` at every execution.

    While JAX records a program (the body of ``jit``, ``scan``, ``checkpoint``, ...), a
    key from outside that body is a constant of the program: each execution, each
    iteration of a loop, draws the same noise again, and no Python runs that could see
    it. A key that is an argument of the body is fine, and so is a key outside ``vmap``
    or ``grad``, which record nothing themselves.

    An operation on constants tells the two apart: inside a program it is recorded, and
    its result is a tracer of the innermost program; otherwise it is computed at once.

    Raises:
        ValueError: if the key is not a value of the program that is being recorded.
    """
    probe = jax.lax.add(np.float32(0), np.float32(0))
    if not isinstance(probe, jax.core.Tracer):
        return
    # JAX has no public way to ask which program a tracer belongs to. Should these two
    # attributes go, every noisy call under jit fails; none passes unseen.
    program = probe._trace
    trace = key._trace if isinstance(key, jax.core.Tracer) else None
    while trace is not None and trace is not program:  # out of vmap and grad
        trace = getattr(trace, "parent_trace", None)
    if trace is None:
        raise ValueError(
            f"{argument}: the key comes from outside the function that JAX is tracing (jit, scan, "
            "checkpoint, eval_shape, ...), so its noise would be the same at every execution. "
            "Make the key an argument of that function, and use it inside."
        )


def consume(key: Key[Array, "*b"], argument: str = "rng") -> UInt32[Array, "*b 8"]:
    """The words of a key that is about to make noise; a second call for it raises.

    Seen are: the same value outside ``jit``, the same traced value inside one trace, and
    a key that is a constant of a traced function.

    Raises:
        ValueError: if the key has made noise before, or would make it again.
    """
    words = jax.random.key_data(key)
    if getattr(_reuse_allowed, "value", False):
        return words
    refuse_frozen_key(key, argument)
    seen = _mark_tracer(key) if isinstance(key, jax.core.Tracer) else _mark_value(words)
    if seen:
        raise ValueError(
            f"{argument}: this key has made noise before. Two releases with the same noise reveal "
            "their private difference. Derive a key for each use: jax.random.fold_in(key, index)."
        )
    return words


def _mark_value(words: jax.Array) -> bool:
    # Salted, so that a memory dump of the table is no list of key hashes.
    data = np.asarray(words).reshape(-1, 8)
    with _lock:
        seen = False
        for row in data:
            name = hashlib.sha256(b"dpfa_jax used key" + row.tobytes()).digest()
            seen = seen or name in _used_values
            _used_values[name] = None
        while len(_used_values) > _MEMORY:
            _used_values.popitem(last=False)
        return seen


def _mark_tracer(key: jax.Array) -> bool:
    name = id(key)
    with _lock:
        known = _used_tracers.get(name)
        if known is not None and known() is key:
            return True
        _used_tracers[name] = weakref.ref(key, lambda _: _used_tracers.pop(name, None))
        return False
