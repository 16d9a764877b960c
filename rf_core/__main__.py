"""`python -m rf_core COMMAND`: opens the commands, of which `card` runs without torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .console import exit_process, forgiving_console


@forgiving_console()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 1 on an error of the user's, 130 when stopped."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["card"]:
        from .measure.card.runner import main as card

        return card(given[1:])
    try:
        from .commands import main as others
    except KeyboardInterrupt:  # torch takes seconds to open
        print("stopped", file=sys.stderr)
        return 130
    return others(given)


if __name__ == "__main__":
    exit_process(main())
