"""`python -m rf_core.measure.card STAGE RECORD`: one stage, in the process the runner started."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from importlib import import_module
from pathlib import Path

from .plan import SIZES, STAGES, Setting
from .record import NotRun, Record


def main() -> int:
    """Run a stage; 0 however it ended, as long as it said so in its record."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=sorted({s.module or s.name for s in STAGES}))
    parser.add_argument("record", type=Path)
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--published", type=Path)
    args = parser.parse_args()
    record = Record(args.record)
    try:
        stage = import_module(f".stages.{args.stage}", __package__)
        stage.run(record, Setting(size=args.size, published=args.published))
    except NotRun as reason:
        record.end(str(reason))
    except ModuleNotFoundError as error:
        record.end(f"the package {error.name} is not installed")
    except Exception as error:  # named in the table, and the next stage begins
        traceback.print_exc()
        record.fail(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    else:
        record.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
