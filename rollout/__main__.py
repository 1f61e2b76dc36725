"""The `rollout` command, and `python -m rollout`; without the extra that brings the command line, which one that is."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from rollout.cli import main as run
    except ImportError as error:
        print(f"rollout: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
