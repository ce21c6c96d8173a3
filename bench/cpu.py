"""What `make bench` runs: every stage that a CPU can time, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

STAGES = ("bench.bench_kernels",)
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the stages from the repository's root; return 1 if one of them failed."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    codes = [
        subprocess.run(
            [sys.executable, "-m", stage, *sys.argv[1:]], cwd=ROOT, env=environment, check=False
        ).returncode
        for stage in STAGES
    ]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
