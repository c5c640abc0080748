"""``python -m sdbatch``."""

from sdbatch.cli import main

main()
