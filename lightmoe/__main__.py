"""`python -m lightmoe` is `lightmoe`."""

from lightmoe.cli import main

main()
