"""The ``dpfa`` command."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from dpfa_jax import budget_cli
from dpfa_jax.audit import cli as audit_cli
from dpfa_jax.messages import language


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpfa", description="Differentially private training with JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train under a privacy budget and write a report",
        description="Trains as a TOML file says. The same command again continues a run that "
        "was interrupted, under the budget it has.",
    )
    train.add_argument(
        "config", type=Path, help="a TOML file, such as configs/chat_user_level.toml"
    )
    train.add_argument(
        "--run-dir",
        type=Path,
        default=None,
        help="where checkpoints, ledger and report go (default: runs/NAME of the file)",
    )
    train.add_argument(
        "--ledger",
        default=None,
        metavar="PATH_OR_URL",
        help="charge a shared ledger instead of one in the run's directory",
    )
    train.add_argument(
        "--parent", default=None, metavar="SCOPE", help="the scope there that pays as well"
    )
    train.add_argument(
        "--mesh",
        default=None,
        metavar="data=N,model=M",
        help="over how many devices, instead of the file's [mesh]",
    )
    train.add_argument(
        "--fsdp", action="store_true", help="split the parameters over data, too ([mesh] fsdp)"
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes; they find each other in the environment of SLURM, Open "
        "MPI, Kubernetes or a TPU pod, or through the next three (docs/scaling.md)",
    )
    train.add_argument("--coordinator", default=None, metavar="HOST:PORT", help="the first process")
    train.add_argument("--processes", type=int, default=None, help="how many")
    train.add_argument("--process-id", type=int, default=None, help="this one's number, from 0")
    budget_cli.add_parser(commands)
    _add_bench(commands)
    audit_cli.add_parser(commands)
    doctor = commands.add_parser(
        "doctor", help="which attention implementation each feature gets here, and why"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure attention and training on this machine")
    kinds = bench.add_subparsers(dest="kind", required=True)
    ledger = kinds.add_parser("ledger", help="what a charge costs, and a large composition")
    ledger.add_argument("--charges", type=int, default=1000, help="default: %(default)s")
    ledger.add_argument("--folder", type=Path, default=None, help="where the file goes")
    ledger.add_argument(
        "--json",
        type=Path,
        default=Path("runs/bench_ledger.json"),
        metavar="PATH",
        help="the result (default: %(default)s)",
    )
    attention = kinds.add_parser(
        "attention",
        help="speed beside the peers that are installed",
        description="Times private and exact attention beside cuDNN, tokamax and PyTorch, in "
        "turns, and judges the project's targets. Prints tables and writes every sample.",
    )
    attention.add_argument(
        "--shapes",
        choices=("all", "standard", "small"),
        default="all",
        help="standard: up to T = 16384; small: tiny ones that a CPU can do, to see that it works",
    )
    attention.add_argument(
        "--only-targets",
        action="store_true",
        help="only the peers and the versions that the targets name",
    )
    attention.add_argument(
        "--json",
        type=Path,
        default=Path("runs/bench_attention.json"),
        metavar="PATH",
        help="the result (default: %(default)s)",
    )
    attention.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that compile at the same time; one at a time measures "
        "(default: %(default)s)",
    )
    _add_budget(attention, 420.0)
    clipping = kinds.add_parser(
        "clipping",
        help="private training steps beside the same step without privacy",
        description="Times training steps of a decoder (clipping, noise, AdamW) beside the same "
        "step without privacy and other libraries that are installed, and judges the project's "
        "targets. Prints tables and writes every sample.",
    )
    clipping.add_argument(
        "--shapes",
        choices=("all", "cpu", "small"),
        default="all",
        help="all: for an accelerator; cpu: one that two cores can do; small: to see that it works",
    )
    clipping.add_argument(
        "--only", metavar="TEXT", help="only shapes whose name holds this, such as T=256 or LoRA"
    )
    clipping.add_argument(
        "--versions",
        metavar="TEXT",
        help="only steps whose name holds this, such as dpfa, and the non-private one",
    )
    clipping.add_argument(
        "--quick",
        action="store_true",
        help="of JAX's steps only what the targets are about, and jax_privacy; PyTorch and Opacus "
        "all the same, where both are installed",
    )
    clipping.add_argument(
        "--attention",
        choices=("cudnn", "dpfa", "xla"),
        help="of all steps (default: cudnn on NVIDIA GPUs in 16-bit floats, else xla)",
    )
    clipping.add_argument("--batch", type=int, metavar="B", help="another physical batch")
    clipping.add_argument(
        "--json",
        type=Path,
        default=Path("runs/bench_clipping.json"),
        metavar="PATH",
        help="the result (default: %(default)s)",
    )
    _add_budget(clipping, 420.0)
    _add_scaling(kinds)
    tune = kinds.add_parser(
        "tune",
        help="measure block sizes and keep the best in a cache file",
        description="Measures the kernels' block sizes on this card and writes the better ones "
        "to $DPFA_TUNING_CACHE, or to dpfa_jax/attention_blocks.json in the user's cache folder.",
    )
    tune.add_argument(
        "--backend",
        action="append",
        help="which kernels, such as triton; may be given again (default: all that run here)",
    )
    tune.add_argument(
        "--head-dim",
        action="append",
        type=int,
        choices=(64, 128, 256),
        help="which head dimension; may be given again (default: all)",
    )
    _add_budget(tune, 480.0)


def _add_scaling(kinds: Any) -> None:
    def numbers(text: str) -> list[int]:
        found = [n.strip() for n in text.split(",")]
        if not all(n.isdecimal() and int(n) >= 1 for n in found):
            raise argparse.ArgumentTypeError(
                f"{text!r}: allowed are whole numbers >= 1 with commas between, such as 1,2,4,8."
            )
        return [int(n) for n in found]

    def words(text: str) -> list[str]:
        return [w.strip() for w in text.split(",")]

    scaling = kinds.add_parser(
        "scaling",
        help="private training steps on one device and on several",
        description="Times training steps of decoders on 1 to N devices of this machine, data "
        "parallel and fully sharded, with the batch of a device fixed (weak) and with the whole "
        "batch fixed (strong). Prints a table and writes every sample.",
    )
    scaling.add_argument(
        "--devices", type=numbers, default=[1], metavar="N,N", help="such as 1,2,4,8"
    )
    scaling.add_argument(
        "--models",
        type=words,
        default=["gpt2", "1.3b", "attention"],
        help="gpt2, 1.3b, small, and attention over split keys (default: %(default)s)",
    )
    scaling.add_argument(
        "--layouts", type=words, default=["dp", "fsdp"], help="default: %(default)s"
    )
    scaling.add_argument(
        "--modes", type=words, default=["weak", "strong"], help="default: %(default)s"
    )
    scaling.add_argument("--batch", type=int, metavar="B", help="another batch of one device")
    scaling.add_argument("--quick", action="store_true", help="weak scaling, few samples")
    scaling.add_argument(
        "--json",
        type=Path,
        default=Path("runs/bench_scaling.json"),
        metavar="PATH",
        help="the result (default: %(default)s)",
    )
    _add_budget(scaling, 480.0)


def _add_budget(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--budget",
        type=float,
        default=default,
        metavar="SECONDS",
        help="begin nothing new after this time (default: %(default)s)",
    )


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    if args.kind == "tune":
        from dpfa_jax.bench import tune

        more = {} if args.head_dim is None else {"head_dims": args.head_dim}
        path = tune.run(backends=args.backend, budget=args.budget, **more)
        print(f"block sizes: {path}")
        return
    if args.kind == "clipping":
        from dpfa_jax.bench import clipping

        result = clipping.run(
            shapes=args.shapes,
            batch=args.batch,
            only=args.only,
            attention=args.attention,
            versions_with=args.versions,
            quick=args.quick,
            budget=args.budget,
            json_path=args.json,
            command=shlex.join(["dpfa", *argv]),
        )
        clipping.print_result(result)
        print(f"every sample: {args.json}")
        return
    if args.kind == "scaling":
        from dpfa_jax.bench import scaling

        measured = scaling.run(
            devices=args.devices,
            models=args.models,
            layouts=args.layouts,
            modes=args.modes,
            batch=args.batch,
            quick=args.quick,
            budget=args.budget,
            json_path=args.json,
            command=shlex.join(["dpfa", *argv]),
        )
        scaling.print_result(measured)
        print(f"every sample: {args.json}, plot: {args.json.with_suffix('.svg')}")
        return
    if args.kind == "ledger":
        from dpfa_jax.bench import ledger

        found = ledger.run(
            charges=args.charges,
            folder=args.folder,
            json_path=args.json,
            command=shlex.join(["dpfa", *argv]),
        )
        print(ledger.show(found))
        return
    from dpfa_jax.bench import attention, peers, tables

    result = attention.run(
        shapes=args.shapes,
        only_targets=args.only_targets,
        budget=args.budget,
        jobs=args.jobs,
        json_path=args.json,
        command=shlex.join(["dpfa", *argv]),
    )
    tables.print_result(result, separate=peers.SEPARATE)
    print(f"every sample: {args.json}")


def _train(args: argparse.Namespace) -> int:
    # Checked before JAX and the data are touched: a wrong key should answer at once.
    from dpfa_jax.train.config import load_config, with_mesh

    config = with_mesh(load_config(args.config), args.mesh, args.fsdp)
    given = (args.coordinator, args.processes, args.process_id)
    from dpfa_jax.parallel import processes

    if not args.distributed and given == (None, None, None):
        return _train_here(config, args)
    from dpfa_jax.ledger import LedgerError
    from dpfa_jax.train.schema import ConfigError

    # From here on the others may wait for this process, and JAX's shutdown would wait for them.
    try:
        try:
            processes.start(*given)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except processes.ProcessError as error:
            print(f"dpfa: {error}", file=sys.stderr)
            processes.end_now(3)
        try:
            return _train_here(config, args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            processes.stop(error, own=(LedgerError, ConfigError))
    except KeyboardInterrupt:
        _say_interrupted(continues=True)
        processes.end_now(130)


def _train_here(config: Any, args: argparse.Namespace) -> int:
    from dpfa_jax.parallel.processes import is_first
    from dpfa_jax.train.loop import run

    run_dir = args.run_dir or Path("runs") / args.config.stem
    report = run(config, run_dir, ledger=args.ledger, parent=args.parent)
    if not is_first():
        return 0
    print(report["guarantee"])
    print(
        f"validation loss {report['validation_loss']:.3f} nats a byte "
        f"(unigram {report['unigram_loss']:.3f}"
        + (
            f", without privacy {report['nonprivate_validation_loss']:.3f})"
            if report["nonprivate_validation_loss"] is not None
            else ")"
        )
    )
    print(f"report: {run_dir / 'report.html'}")
    return 0


def _say_interrupted(*, continues: bool) -> None:
    print(
        "\ndpfa: interrupted"
        + ("; the same command continues from the last checkpoint." if continues else ".")
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; errors that a person can mend are one line on stderr.

    Returns:
        0, 2 for such an error, 130 after Ctrl-C. One of several processes that stops for another
        reason than these ends with 3 (docs/scaling.md).
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        if args.command == "train":
            return _train(args)
        elif args.command == "budget":
            return budget_cli.run(args)
        elif args.command == "bench":
            _bench(args, argv)
        elif args.command == "audit":
            return audit_cli.run(args, argv)
        else:
            from dpfa_jax import doctor

            doctor.run(as_json=args.json)
    except ValueError as error:
        from dpfa_jax.bench.timing import BenchError
        from dpfa_jax.ledger import LedgerError
        from dpfa_jax.train.schema import ConfigError
        from pallas_kernels.attention.tuning import CacheError

        known = LedgerError | ConfigError | BenchError | CacheError
        # Of "budget" every ValueError is about an argument: it reads nothing else.
        if not isinstance(error, known) and args.command != "budget":
            raise
        text = str(error)
        if isinstance(error, LedgerError):
            text = error.message.show(getattr(args, "language", None) or language())
        print(f"dpfa: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say_interrupted(continues=args.command == "train")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
