"""`python -m phiforge` is the same as `phiforge`."""

from phiforge.cli import main

main()
