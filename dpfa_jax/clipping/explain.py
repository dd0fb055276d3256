"""Which engine ``auto`` takes, and a table that says what is done with each leaf and why."""

import dataclasses

import jax

from dpfa_jax.clipping.plan import LeafPlan, Plan

# Book-keeping may hold this share of the device's memory before `auto` prefers two passes.
_MEMORY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :meth:`dpfa_jax.ClippedGrad.explain` returns; ``print`` shows it as a table.

    Attributes:
        engine: the engine that runs.
        why: in words.
        names: of the leaves.
        leaves: what is done for each.
        examples: how many are in memory together.
    """

    engine: str
    why: str
    names: tuple[str, ...]
    leaves: tuple[LeafPlan, ...]
    examples: int

    @property
    def held_bytes(self) -> float:
        """Bytes held until the norms are known, predicted."""
        return self.examples * sum(p.held_bytes for p in self.leaves)

    @property
    def extra_seconds(self) -> float:
        """Predicted time beyond a gradient without clipping."""
        return self.examples * sum(p.extra_seconds for p in self.leaves)

    def __str__(self) -> str:
        lines = [
            f"engine {self.engine}: {self.why}",
            f"predicted: {1e3 * self.extra_seconds:.3g} ms beyond a gradient without clipping, "
            f"{self.held_bytes / 2**20:.1f} MiB held, {self.examples} examples together",
        ]
        width = max((len(n) for n in self.names), default=0)
        for name, plan in zip(self.names, self.leaves, strict=True):
            lines.append(f"  {name:{width}}  {plan.form:12}  {plan.why}")
        return "\n".join(lines)


def choose(plan: Plan, examples: int, groups: int, memory: int | None) -> tuple[str, str]:
    """The engine that ``auto`` takes, and why.

    Args:
        plan: of the loss.
        examples: in memory together.
        groups: of clipping.
        memory: bytes of the device; None where unknown.
    """
    if groups > 1 and plan.of_form("gram"):
        return "per_layer", f"{groups} groups are clipped by themselves: one pass does"
    extra = sum(p.extra_seconds for p in plan.leaves)
    one = examples * (plan.loss_seconds + extra)
    # The second pass runs the loss again, and holds what one leaf needs at a time.
    two = examples * (2.0 * plan.loss_seconds + extra)
    held = examples * sum(p.held_bytes for p in plan.leaves)
    least = examples * max((p.held_bytes for p in plan.leaves), default=0.0)
    times = f"{1e3 * one:.3g} ms predicted, {1e3 * two:.3g} ms in two"
    if groups == 1 and memory is not None and held > _MEMORY_SHARE * memory and least < held:
        return "two_pass", (
            f"one pass would hold {held / 2**30:.1f} GiB, over {_MEMORY_SHARE:.0%} of the "
            f"device's {memory / 2**30:.1f} GiB ({times})"
        )
    if not plan.of_form("gram"):
        return "vmap", f"no leaf has sites where norms without gradients would pay ({times})"
    return "bookkeeping", f"one pass; it holds {held / 2**20:.1f} MiB ({times})"


def device_memory() -> int | None:
    """Bytes that JAX may use on the default device; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("bytes_limit")
