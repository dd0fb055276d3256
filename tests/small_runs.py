"""A configuration that trains in seconds, as a TOML table."""

import copy
from typing import Any

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {
        "source": "chitchat",
        "population": 1044,
        "chunk_bytes": 16,
        "max_chunks_per_user": 2,
        "validation_fraction": 0.175,
    },
    "privacy": {
        "unit": "user",
        "adjacency": "add_remove",
        "epsilon": 0.03,
        "delta": 9e-5,
        "l2_clip_norm": 0.1,
    },
    "model": {
        "flax_api": "linen",
        "width": 8,
        "layers": 1,
        "head_windows": [[1, 1], [0, 3]],
        "mlp_ratio": 1,
    },
    "training": {
        "steps": 12,
        "expected_batch_size": 20,
        "padded_batch_size": 40,
        "microbatch_size": 20,
        "checkpoint_every": 2,
        "learning_rate": 0.02,
        "warmup_steps": 1,
        "final_learning_rate_share": 0.1,
        "b1": 0.9,
        "b2": 0.99,
        "adam_floor_share": 0.3,
        "weight_decay": 0.0,
    },
    "report": {"release_nonprivate_comparison": False},
}


def small(**changes: Any) -> dict[str, Any]:
    """SMALL with ``section__key=value`` changed; the value ``...`` removes the key."""
    table = copy.deepcopy(SMALL)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        target, key = (table[section], key) if key else (table, section)
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return table


def to_toml(table: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            return f'"{value}"'
        return repr(value)

    lines = [f"{k} = {show(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for section, values in table.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{k} = {show(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"
