"""``python -m evercell``."""

import io
import sys
import time
from contextlib import redirect_stderr

from evercell.cli import main
from evercell.distributed import started

PATIENCE = 3.0  # seconds that torchrun needs to see that the first process failed, and to end the others


def beside_the_first() -> int:
    """Run as one of several processes: silently, for what there is to say the first one says.

    A failure of this process alone is said, after a time in which one of all would have ended it.
    """
    with redirect_stderr(io.StringIO()) as said:
        code = main()
    if code:
        time.sleep(PATIENCE)
        print(f"process {started().rank} of {started().size}:\n{said.getvalue()}", file=sys.stderr, end="")
    return code


if __name__ == "__main__":
    sys.exit(main() if started().first else beside_the_first())
