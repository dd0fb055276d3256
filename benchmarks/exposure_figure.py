"""The figure of docs/auditing.md, from the figures of ``dpfa audit CONFIG --json``.

python -m benchmarks.exposure_figure RESULT.json docs/exposure.svg
"""

import json
import sys
from pathlib import Path

import matplotlib.figure

from dpfa_jax.audit.chat import Secret
from dpfa_jax.audit.report import exposure_plot


def main(argv: list[str]) -> int:
    source, target = map(Path, argv)
    found = json.loads(source.read_text())
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    secrets = [Secret(**s) for s in found["secrets"]]
    exposure_plot(axes, secrets, found["one_run"]["epsilon_claimed"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, format="svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
