"""Memory, open files and threads over many annotations by one process, and the share of a CPU that it uses.

    python benchmarks/leaks.py [--calls 100] [--model human-pancreas] [--threads 1]

The query is a packaged study of human pancreas. Linux only.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

from evercell import registry
from evercell.annotation import annotate
from evercell.examples import load_example
from evercell.threads import limited


def held() -> tuple[float, int, int]:
    """Resident memory in MB, open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--model", default="human-pancreas")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    model, query = registry.load(asked.model), load_example("tritschler_unseen")
    with limited(asked.threads):
        for call in range(asked.calls + 1):
            if call % 10 == 0:
                memory, files, threads = held()
                print(f"after {call:4} calls: {memory:,.0f} MB, {files} open files, {threads} threads", flush=True)
            wall, cpu = time.perf_counter(), time.process_time()
            annotate(model, query, shown=False)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    print(f"share of one CPU in the last call: {share:.2f}")


if __name__ == "__main__":
    main()
