"""The ``dpfa`` command."""

import argparse
import sys
from pathlib import Path


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
    return parser


def _train(config_path: Path, run_dir: Path | None) -> None:
    # Checked before JAX and the data are touched: a wrong key should answer at once.
    from dpfa_jax.train.config import load_config

    config = load_config(config_path)
    from dpfa_jax.train.loop import run

    run_dir = run_dir or Path("runs") / config_path.stem
    report = run(config, run_dir)
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


def main(argv: list[str] | None = None) -> int:
    """Runs the command; errors that a person can mend are one line on stderr.

    Returns:
        0, 2 for such an error, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        _train(args.config, args.run_dir)
    except ValueError as error:
        from dpfa_jax.ledger import LedgerError
        from dpfa_jax.train.schema import ConfigError

        if not isinstance(error, LedgerError | ConfigError):
            raise
        print(f"dpfa: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndpfa: interrupted; the same command continues from the last checkpoint.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
