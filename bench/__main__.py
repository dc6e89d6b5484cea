"""`python -m bench COMMAND`: report, compare, static."""

import sys
from importlib import import_module

from bench.record import RecordError

COMMANDS = ("report", "compare", "static")


def main() -> int:
    """Hand over to the command's module."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} ... (each has --help)")
        return 2
    try:
        return int(import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
