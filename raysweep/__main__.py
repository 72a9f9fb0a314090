"""`python -m raysweep`."""

from raysweep.cli import main

main()
