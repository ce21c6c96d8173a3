"""Run the bench on a GPU, a stage a process, rows into a folder as they come.

    python bench/gpu.py --out FOLDER [--stage NAME ...] [--skip-done] [--repeat N] [--kernel NAME]
    python bench/gpu.py --dry-run [--stage NAME ...]

Each stage is stopped after 300 seconds; what it had written stays. With `--skip-done` a stage makes
only rows that FOLDER lacks. Without a GPU only the dry run works: it prints every shape and
compiles every kernel for sm_90. Imports no neighbour, so that it runs from a plain clone.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "tests",
    "machine",
    "mix_imagenet",
    "tune",
    "mix_cifar",
    "bank",
    "confidence",
    "reconstruction",
    "draws",
    "step_resnet50",
    "osr",
    "loaders",
)
"""In the order in which they are worth having."""
LIMIT_S = 300


def command(stage: str, options: argparse.Namespace) -> list[str]:
    """Return what runs a stage, after `python -m`."""
    words = ["bench.stage_kernels", stage]
    if stage == "step_resnet50":
        words = ["bench.bench_step"]
    if stage == "osr":
        words = ["bench.stage_osr"]
        words += [word for name in options.method or () for word in ("--method", name)]
    if stage == "loaders":
        words = ["bench.stage_loaders"]
        words += [word for file in options.data or () for word in ("--data", str(file.resolve()))]
        words += [word for form in options.form or () for word in ("--form", form)]
    if options.dry_run:
        return [*words, "--dry-run"]
    words += ["--out", str(options.out), "--repeat", str(options.repeat)]
    words += ["--skip-done"] if options.skip_done else []
    words += ["--tiny"] if options.tiny else []
    if stage == "tune":
        words += ["--kernel", options.kernel] if options.kernel else []
        words += ["--seconds", str(options.seconds)]
    if stage == "tests":  # which end by themselves before they would be ended, and say what failed
        words += ["--seconds", str(0.85 * options.limit)]
    return words


def run(stage: str, options: argparse.Namespace) -> str:
    """Run one stage to its end or its limit; return how it ended, in a few words."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment |= {"BENCH_COMMIT": options.commit} if options.commit else {}
    started = time.monotonic()
    # A session of its own, so that what the stage started ends with it.
    process = subprocess.Popen(
        [sys.executable, "-m", *command(stage, options)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        code = process.wait(options.limit)
    except subprocess.TimeoutExpired:
        end(process)
        return f"KILLED after {options.limit:g} s: its rows until then are there"
    except BaseException:
        end(process)
        raise
    seconds = time.monotonic() - started
    return f"{'ok' if code == 0 else f'FAILED ({code})'}, {seconds:.0f} s"


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    os.killpg(process.pid, 9)
    process.wait()


def main() -> int:
    """Run the stages; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the rows, one file a stage")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this; may repeat")
    parser.add_argument("--skip-done", action="store_true", help="make no row that is there")
    parser.add_argument("--repeat", type=int, default=1, help="passes over each stage")
    parser.add_argument("--kernel", help="of the stage tune: only this one")
    parser.add_argument("--seconds", type=float, default=45, help="of the stage tune: each case")
    parser.add_argument(
        "--data", type=Path, action="append", help="of the stage loaders: .beton files"
    )
    parser.add_argument(
        "--form", action="append", help="of the stage loaders: only this; may repeat"
    )
    parser.add_argument("--method", action="append", help="of the stage osr: only this; may repeat")
    parser.add_argument("--commit", help="for the rows, where this copy has no git repository")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each stage")
    parser.add_argument("--dry-run", action="store_true", help="print and compile, on any machine")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, for tests")
    options = parser.parse_args()
    if options.out is None and not options.dry_run:
        parser.error("--out is needed, or --dry-run")
    if not (options.dry_run or options.tiny):
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here; --dry-run prints the shapes and compiles the kernels")
            return 1
    if options.out is not None:
        options.out = options.out.resolve()
    ends = {}
    for stage in options.stage or STAGES:
        print(f"== {stage}", flush=True)
        ends[stage] = run(stage, options)
        print(f"== {stage}: {ends[stage]}", flush=True)
    print("\n" + "\n".join(f"{stage:15} {how}" for stage, how in ends.items()))
    return int(any(how.startswith(("FAILED", "KILLED")) for how in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
