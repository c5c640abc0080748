"""``python -m sdbatch.bench``: the bench where nothing is installed but torch and what the model itself needs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from sdbatch.bench.report import Wanted, bench
from sdbatch.errors import SdbatchError


def main() -> int:
    """Every field of ``Wanted`` is an option; returns the exit code."""
    parser = argparse.ArgumentParser("python -m sdbatch.bench", description=Wanted.__doc__)
    parser.add_argument("model", nargs="?", default=Wanted.model)
    for field in fields(Wanted):
        default = None if field.default is MISSING else field.default
        flag = f"--{field.name}"
        if field.name == "batches":
            parser.add_argument(flag, type=int, nargs="*", default=default)
        elif isinstance(default, bool):
            parser.add_argument(
                flag.removesuffix("s") if default is False else flag,  # as the command has it: --compile
                dest=field.name,
                action=argparse.BooleanOptionalAction,
                default=default,
            )
        elif field.name != "model":
            kind = {"out": Path, "width": int, "height": int}.get(field.name, type(default))
            parser.add_argument(flag, type=kind, default=default)
    chosen = vars(parser.parse_args())
    try:
        bench(Wanted(**chosen | {"batches": tuple(chosen["batches"])}), lambda line: print(line, flush=True))
    except SdbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
