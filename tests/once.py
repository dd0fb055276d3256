"""Scripts that tests start once for all workers, and whose answers they share."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import dpfa_jax


def output_of(script, tmp_path_factory, timeout=280):
    """What ``script`` prints with eight CPU devices; the first worker to ask runs it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept = shared / f"{script.stem}.out"
    with open(shared / f"{script.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(Path(dpfa_jax.__file__).parents[1]),
                "XLA_FLAGS": flags.strip(),
            }
            run = subprocess.run(
                [sys.executable, str(script)],
                env=env,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
            assert run.returncode == 0, run.stderr[-3000:]
            kept.write_text(run.stdout)
    return kept.read_text()
