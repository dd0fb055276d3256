"""Where a run's arrays are: on which devices of which processes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dpfa_jax import keys
from dpfa_jax.parallel.mesh import DATA, make_mesh, parameter_shardings
from dpfa_jax.sampling import UserBatch, deal
from dpfa_jax.train.config import Config
from dpfa_jax.train.schema import ConfigError


class Placement:
    """The mesh of a run, and how it lays parameters and batches on it.

    Without ``[mesh]`` it is one device.

    Raises:
        ConfigError: if the mesh is not of the devices that are there, or the batch does not divide.
    """

    def __init__(self, config: Config):
        sizes = {"data": config.mesh.data, "model": config.mesh.model}
        wanted, there = sizes["data"] * sizes["model"], len(jax.devices())
        # One device of many may be meant; of several processes all have to take part.
        if wanted != there and not (wanted == 1 and jax.process_count() == 1):
            raise ConfigError(
                f"mesh = {sizes}: needs {wanted} devices; there are {there} in "
                f"{jax.process_count()} processes. Give --mesh data=N,model=M with N·M = {there}."
            )
        self.parts = sizes["data"]
        t = config.training
        for name in ("padded_batch_size", "microbatch_size"):
            value = getattr(t, name)
            if value % self.parts:
                raise ConfigError(
                    f"training.{name} = {value}: allowed are multiples of mesh.data = "
                    f"{self.parts}, over which each is split."
                )
        self.mesh = make_mesh(sizes, jax.devices()[:wanted] if wanted != there else None)
        self._fsdp = config.mesh.fsdp
        self.rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        self.whole = NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: PyTree) -> PyTree:
        """Of parameters, or of what an optimiser keeps for them."""
        return parameter_shardings(tree, self.mesh, fsdp=self._fsdp)

    def make(self, function: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """What the function returns, every array where it belongs from the start."""
        shardings = self.shardings(jax.eval_shape(function, *arguments))
        return jax.jit(function, out_shardings=shardings)(*arguments)

    def optimiser_state(self, tx: optax.GradientTransformation, params: PyTree) -> PyTree:
        """The optimiser's first state: moments lie as their parameters do, keys everywhere."""
        state = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
        return jax.tree.map(self._put, state)

    def _put(self, x: Array) -> Array:
        sharding = self.shardings(x)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(x))
            return keys.wrap(
                jax.make_array_from_callback(words.shape, self.whole, words.__getitem__)
            )
        # Zeros and counters: made whole by each process, a leaf at a time.
        data = np.asarray(x)
        return jax.make_array_from_callback(data.shape, sharding, data.__getitem__)

    def load(self, symbols: np.ndarray, batch: UserBatch) -> tuple[Array, Array]:
        """A sampled batch on the devices; each process reads only the rows of its own.

        Returns:
            int32[batch, chunks of a unit, bytes], -1 where there is none; bool[batch].
        """
        dealt = deal(batch, self.parts)

        def read(index: Any) -> np.ndarray:
            rows = symbols[dealt.examples[index[0]]]
            rows[dealt.is_padding_slot[index[0]]] = -1
            return rows

        def flags(index: Any) -> np.ndarray:
            return dealt.is_padding_example[index]

        shape = (*dealt.examples.shape, symbols.shape[1])
        made = functools.partial(jax.make_array_from_callback, sharding=self.rows)
        return (
            made(shape, data_callback=read),
            made(dealt.is_padding_example.shape, data_callback=flags),
        )
