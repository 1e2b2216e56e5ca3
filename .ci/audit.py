"""Known faults of the installed packages, asked of PyPI; where nobody answers, that is said and nothing is claimed.

Exit code 1 for a known fault, 0 otherwise: a check that needs the network may not stop one who has none.
"""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 180


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        print(f"pip-audit: not done, no vulnerability service answered ({type(error).__name__})")
        return 0
    asked = [one for one in packages if "skip_reason" not in one]
    faults = {f"{one['name']} {one['version']}": [fault["id"] for fault in one["vulns"]] for one in asked}
    bad = [f"{name}: {', '.join(found)}" for name, found in faults.items() if found]
    print(f"pip-audit: {len(asked)} of {len(packages)} packages could be looked up, {len(bad)} with known faults")
    for one in bad:
        print(one)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
