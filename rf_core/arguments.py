"""Arguments of a command line whose readers say what is wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

T = TypeVar("T")


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """A `type=` for argparse, which shows its ValueError; of others it keeps to itself the text."""

    @wraps(read)
    def reading(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reading
