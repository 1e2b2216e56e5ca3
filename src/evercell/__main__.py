"""``python -m evercell``."""

import sys

from evercell.cli import main

if __name__ == "__main__":
    sys.exit(main())
