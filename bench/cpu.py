"""What `make bench` runs: every stage that a CPU can time, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

STAGES = ("bench_kernels.py",)


def main() -> int:
    """Run the stages from the repository's root; return 1 if one of them failed."""
    here = Path(__file__).resolve().parent
    codes = [
        subprocess.run([sys.executable, str(here / stage)], cwd=here.parent, check=False).returncode
        for stage in STAGES
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
