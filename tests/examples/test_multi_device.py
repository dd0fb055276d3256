"""The example's three ways end at the same parameters, on several devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_device.py"


def test_three_ways_train_the_same_model():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, EXAMPLE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.findall(
        r"^(.+?) +on 4 devices: loss ([\d.]+), farthest parameter (\S+)$", done.stdout, re.M
    )
    assert [way for way, _, _ in shown] == ["jit, fully sharded", "shard_map", "pmap"]
    (loss,) = {loss for _, loss, _ in shown}
    assert float(loss) < 0.1  # a constant has 0.51, the variance of the targets
    assert all(float(far) < 1e-5 for _, _, far in shown)
