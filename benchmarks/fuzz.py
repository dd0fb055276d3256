"""Bad input at scale: the config loader, the ledger file, checkpoints and the command line.

    python -m benchmarks.fuzz --seconds 60 --json OUT            # every target, guided by coverage
    python -m benchmarks.fuzz --target ledger --seconds 600 --json OUT

Each target decodes some bytes to an input, tries it, and allows two ends: it works and all that
it promises holds, or one clear error. Everything else is a finding: any other exception, an
error without a message, a ledger that counts less than was charged, a release without a charge.

Coverage comes from atheris (pip install 'dpfa_jax[fuzz]'), which instruments dpfa_jax. Without
it, and for --random, inputs are random edits of valid ones. Each target runs in a process
of its own and counts its executions. The exit status is 1 if there is a finding.
"""

import argparse
import collections
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"


class Finding(AssertionError):
    """Something that no input may do."""


class Bytes:
    """Numbers and strings out of bytes; zeros and empty strings when they are used up."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def below(self, limit: int) -> int:
        width = max(1, (limit.bit_length() + 7) // 8)
        return int.from_bytes(self.take(width)) % limit

    def text(self) -> str:
        return self.take(self.below(24)).decode("utf-8", "surrogateescape")


def clear(error: Exception, *allowed: type) -> str:
    """The error's class, if it is one that a person can act on."""
    if not isinstance(error, allowed) or not str(error).strip():
        raise Finding(f"{type(error).__name__}: {error}") from error
    return type(error).__name__


# --- configurations ---------------------------------------------------------------------------

VALUES = (
    "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 400, "true", '""', '"linen"', "[]",
    "[[1, 1]]", "[[0, 9999999999]]", "{}", "1979-05-27", '"\\u0000"', "'''x'''", "[1, [2]]",
    "1e-320", "0x7fffffffffffffff", "220349", "1044", "0.5", '"user"', '"message"', '"add_remove"',
)  # fmt: skip


def config_target(folder: Path) -> Callable[[bytes], str]:
    """A TOML file: edits of a valid one, or any bytes."""
    from dpfa_jax.train.config import Config, load_config
    from dpfa_jax.train.schema import ConfigError

    lines = (CONFIGS / "chat_message_level.toml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    path = folder / "config.toml"

    def run(data: bytes) -> str:
        source = Bytes(data)
        kind, edited = source.below(8), list(lines)
        if kind == 0:
            path.write_bytes(source.take(4096))
        else:
            for _ in range(kind):
                line = keys[source.below(len(keys))]
                name = lines[line].partition("=")[0]
                match source.below(4):
                    case 0:
                        edited[line] = ""
                    case 1:
                        edited[line] = f"{name}= {source.text()}"
                    case 2:
                        edited[line] = f"{source.text()} = {VALUES[source.below(len(VALUES))]}"
                    case 3:
                        edited[line] = f"{name}= {VALUES[source.below(len(VALUES))]}"
            path.write_text("\n".join(edited), encoding="utf-8", errors="surrogateescape")
        try:
            config = load_config(path)
        except ConfigError as error:
            return clear(error, ConfigError)
        promised = config.privacy.delta * config.data.population < 1
        if not isinstance(config, Config) or not (
            promised and 0 < config.sampling_probability <= 1
        ):
            raise Finding(f"accepted: {config}")
        return "accepted"

    return run


# --- the ledger's file ------------------------------------------------------------------------


def ledger_target(folder: Path) -> Callable[[bytes], str]:
    """A ledger with five charges, some bytes changed, cut off or repeated."""
    import dp_accounting

    from dpfa_jax.ledger import Ledger, LedgerError

    template, path = folder / "whole.sqlite", folder / "ledger.sqlite"
    event = dp_accounting.GaussianDpEvent(20.0)
    with contextlib.closing(Ledger(template)) as ledger:
        ledger.open_budget("s", epsilon=1.0, delta=1e-5, adjacency="add_remove", unit="user")
        for i in range(5):
            ledger.charge("s", f"release {i}", event)
        spent = ledger.spent("s")
    whole = template.read_bytes()

    def run(data: bytes) -> str:
        source, changed = Bytes(data), bytearray(whole)
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        match source.below(8):
            case 0:
                changed = changed[: source.below(len(changed) + 1)]
            case 1:
                changed = bytearray(source.take(8192))
            case 2:
                page = 4096 * source.below(len(changed) // 4096)
                other = 4096 * source.below(len(changed) // 4096)
                changed[page : page + 4096] = changed[other : other + 4096]
            case _:
                while source:
                    changed[source.below(len(changed))] = source.below(256)
        path.write_bytes(changed)
        try:
            with contextlib.closing(Ledger(path)) as ledger:
                if "s" not in ledger.scopes():
                    # An empty file is a new ledger; one with entries is not.
                    if changed:
                        raise Finding("a changed file was taken for a ledger without the scope")
                    return "new"
                if ledger.spent("s") < spent:
                    raise Finding(f"spent {ledger.spent('s')} where {spent} was charged")
                if not ledger.charge("s", "one more", event):
                    raise Finding("a release without a charge")
                if not ledger.spent("s") > spent:
                    raise Finding("a charge that costs nothing")
        except LedgerError as error:
            return clear(error, LedgerError)
        return "works"

    return run


# --- checkpoints ------------------------------------------------------------------------------


def checkpoint_target(folder: Path) -> Callable[[bytes], str]:
    """A run's checkpoint, with a file changed, cut off, emptied or gone."""
    import jax
    import jax.numpy as jnp
    import optax

    from dpfa_jax import add_noise, keys
    from dpfa_jax.train.schema import ConfigError
    from dpfa_jax.train.state import Checkpoints

    params = {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)}
    tx = optax.chain(add_noise(1.0, 1.0, 2.0, keys.SecureKey.generate()), optax.adam(0.1))
    state = tx.init(params)
    whole, broken = folder / "whole", folder / "broken"
    with contextlib.closing(Checkpoints(whole)) as checkpoints:
        checkpoints.save(3, params, state, [{"step": 3, "epsilon": 1.0}])
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    if not files:
        raise RuntimeError("no checkpoint was written")

    def run(data: bytes) -> str:
        source = Bytes(data)
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        changed = False
        for _ in range(1 + source.below(3)):
            path = broken / files[source.below(len(files))]
            if not path.exists():
                continue
            before = path.read_bytes()
            match source.below(4):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(before[: source.below(len(before) + 1)])
                case 2:
                    path.write_bytes(source.take(source.below(64)))
                case 3:
                    after = bytearray(before)
                    for _ in range(1 + source.below(4)):
                        if after:
                            after[source.below(len(after))] = source.below(256)
                    path.write_bytes(after)
            changed = changed or not path.exists() or path.read_bytes() != before
        try:
            with contextlib.closing(Checkpoints(broken)) as checkpoints:
                step, found, found_state, _ = checkpoints.restore(params, state)
        except ConfigError as error:
            return clear(error, ConfigError)
        if jax.tree.structure(found) != jax.tree.structure(params):
            raise Finding("parameters of another shape")
        if not jnp.array_equal(
            jax.random.key_data(found_state[0].key), jax.random.key_data(state[0].key)
        ):
            raise Finding("a noise key from the disk")
        return f"step {step}" if changed else "unchanged"

    return run


# --- the command line -------------------------------------------------------------------------

WORDS = (
    "train", "budget", "audit", "doctor", "bench", "new", "show", "verify", "export", "plan",
    "--epsilon", "--delta", "--adjacency", "add_remove", "replace_one", "--unit", "--level", "run",
    "--parent", "--composition", "adaptive", "--policy", "--region", "--reason", "--scope", "s",
    "--json", "--out", "--population", "--batch-size", "--padded-batch-size", "--steps",
    "--noise-multiplier",
    "--receipt", "--language", "en", "de", "--run-dir", "--ledger", "--only", "training",
    "--samples", "--confidence", "--jobs", "--implementation", "xla", "0", "1", "100",
    "1e-5", "nan", "-1", "1e999", "", "L", "C", "--disjoint", "--plot",
)  # fmt: skip


def cli_target(folder: Path) -> Callable[[bytes], str]:
    """Command lines of the words that there are, and of any others. What takes long is left out."""
    from dpfa_jax import cli, doctor
    from dpfa_jax.audit import suite
    from dpfa_jax.ledger import Ledger, LedgerError
    from dpfa_jax.train import loop

    config, ledger = folder / "config.toml", folder / "budget.sqlite"
    shutil.copy(CONFIGS / "chat_user_level.toml", config)
    released: list[Any] = []
    report = {"guarantee": "", "validation_loss": 1.0, "unigram_loss": 2.0}
    loop.run = lambda *_, **__: released.append(1) or {**report, "nonprivate_validation_loss": None}
    suite.run_audits = lambda **_: iter(())
    doctor.run = lambda **_: None
    os.chdir(folder)

    def run(data: bytes) -> str:
        source, argv = Bytes(data), []
        while source and len(argv) < 24:
            choice = source.below(len(WORDS) + 4)
            argv.append(WORDS[choice] if choice < len(WORDS) else source.text().replace("\0", ""))
        argv = [{"L": str(ledger), "C": str(config)}.get(x, x) for x in argv]
        if argv[:1] == ["bench"] or any("/" in x and str(folder) not in x for x in argv):
            return "left out"
        before = _spent(ledger, Ledger, LedgerError)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code: Any = cli.main(argv)
        except SystemExit as exit_:
            code = exit_.code
        if code not in (0, 1, 2, 130):
            raise Finding(f"{argv}: exit status {code!r}")
        if code == 2 and not out.getvalue().strip():
            raise Finding(f"{argv}: exit status 2 without a word")
        if "Traceback" in out.getvalue():
            raise Finding(f"{argv}: a traceback")
        if _spent(ledger, Ledger, LedgerError) < before:
            raise Finding(f"{argv}: budget lost")
        return f"status {code}"

    return run


def _spent(path: Path, ledger_class: Any, error: Any) -> float:
    if not path.exists():
        return 0.0
    with contextlib.closing(ledger_class(path)) as ledger:
        return sum(ledger.spent(scope) for scope in ledger.scopes())


TARGETS: dict[str, Callable[[Path], Callable[[bytes], str]]] = {
    "config": config_target,
    "ledger": ledger_target,
    "checkpoint": checkpoint_target,
    "cli": cli_target,
}


# --- running ----------------------------------------------------------------------------------


def _random(run: Callable[[bytes], Any], seconds: float, seed: int) -> None:
    choose, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        run(choose.randbytes(int(choose.expovariate(1 / 24)) + 1))


def _guided(run: Callable[[bytes], Any], seconds: float, folder: Path) -> None:
    import atheris

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={int(seconds)}", "-max_len=512", "-rss_limit_mb=0",
         "-timeout=60", f"-artifact_prefix={folder}/", "-verbosity=0"],
        run,
    )  # fmt: skip
    atheris.Fuzz()  # leaves through os._exit


def one(target: str, seconds: float, seed: int, is_guided: bool, out: Path) -> None:
    """Runs a target until the time is over or something is found; counts go to ``out``."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="dpfa_fuzz_"))
    ends: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    shown = [started]

    def write(finding: str | None = None) -> None:
        counts = {"executions": ends.total(), "ends": dict(ends.most_common()), "finding": finding}
        out.write_text(json.dumps({**counts, "seconds": round(time.monotonic() - started, 1)}))

    if is_guided:
        import atheris

        with atheris.instrument_imports(include=["dpfa_jax"]):
            for module in ("dpfa_jax.cli", "dpfa_jax.train.loop", "dpfa_jax.audit.suite"):
                importlib.import_module(module)
            attempt = TARGETS[target](folder)
    else:
        attempt = TARGETS[target](folder)

    def run(data: bytes) -> None:
        try:
            ends[attempt(data)] += 1
        except BaseException as error:
            write(f"{hashlib.sha256(data).hexdigest()[:12]} {data.hex()}: {error!r}")
            raise
        if time.monotonic() - shown[0] > 1:
            shown[0] = time.monotonic()
            write()

    write()
    try:
        if is_guided:
            _guided(run, seconds, folder)
        else:
            _random(run, seconds, seed)
            write()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz")
    parser.add_argument("--target", choices=tuple(TARGETS), action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--random", action="store_true", help="without coverage")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    has_atheris = importlib.util.find_spec("atheris") is not None
    is_guided = has_atheris and not args.random
    if args.one is not None:
        one(args.target[0], args.seconds, args.seed, is_guided, args.one)
        return 0
    results = {}
    for target in args.target or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "counts.json"
            command = [
                sys.executable,
                "-m",
                "benchmarks.fuzz",
                "--target",
                target,
                "--one",
                str(out),
            ]
            command += ["--seconds", str(args.seconds), "--seed", str(args.seed)]
            command += ["--random"] * (not is_guided)
            log = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=CONFIGS.parent
            )
            found = json.loads(out.read_text()) if out.exists() else {"finding": log.stderr[-2000:]}
        if log.returncode and not found["finding"]:
            found["finding"] = f"exit status {log.returncode}: {log.stderr[-2000:]}"
        results[target] = found
        print(target, json.dumps(found, ensure_ascii=False)[:400], flush=True)
    facts = {
        "command": "python -m benchmarks.fuzz " + " ".join(sys.argv[1:] if argv is None else argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("dpfa_jax", *(["atheris"] if is_guided else []))
            },
        },
        "guided": is_guided,
        "findings": sum(bool(r["finding"]) for r in results.values()),
        "targets": results,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return 1 if facts["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
