"""`python -m nmsweep`."""

from nmsweep.cli import main

main()
