"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

    python -m backmix.kernels.offline [--kernel NAME] [--arch 90] [--write]

No GPU and no driver are needed: Triton brings NVIDIA's assembler and disassembler. Registers, stack
and instructions per stored element are the best that can be said of a kernel's speed without
running it; `budget.json` holds them for the launches of `shipped.py`, and a test holds the budget.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from backmix.kernels.launch import Launch

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that every shipped launch must compile for: Ampere, Hopper, Blackwell."""
BUDGET = Path(__file__).with_name("budget.json")

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture."""

    arch: int
    ptx: str
    cubin: bytes
    shared: int
    """Shared memory of a block, bytes."""
    warps: int

    @cached_property
    def registers(self) -> int:
        """Return the registers of a thread."""
        return self._resources[0]

    @cached_property
    def stack(self) -> int:
        """Return the bytes of a thread's stack: above 0 where registers were spilled."""
        return self._resources[1]

    @cached_property
    def _resources(self) -> tuple[int, int]:
        text = self._dump("--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no resources: {text[-500:]}")
        return int(found[1]), int(found[2])

    @cached_property
    def sass(self) -> list[str]:
        """Return the machine instructions in order, `address: text`, without padding."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", self._dump("-sass"))
        listed = [f"{address}: {text}" for address, text in lines]
        last = max(
            (i for i, line in enumerate(listed) if "EXIT" in line or "BRA" in line), default=0
        )
        return listed[: last + 1]

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run(
                [_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True
            ).stdout


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a launch for a compute capability, as the first call on such a GPU would.

    Args:
        launch: may hold tensors on the device "meta".
        arch: compute capability times ten: 80, 90, 100.

    Raises:
        RuntimeError: Triton runs interpreted in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("nothing can be compiled in a process with TRITON_INTERPRET=1")
    types, constants, divisible = launch.compiled_arguments()
    names = list(types)
    kernel = triton.compile(
        ASTSource(
            fn=launch.function,
            signature=types,
            constexprs=constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "maxnreg": launch.maxnreg,
        },
    )
    return Compiled(
        arch, kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared, launch.warps
    )


def measure(compiled: Compiled) -> dict[str, int]:
    """Return what the budget holds of a compiled kernel."""
    return {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "instructions": len(compiled.sass),
    }


def budget_key(kernel: str, case: str, arch: int) -> str:
    """Return the name of a line of the budget."""
    return f"{kernel} | {case} | sm_{arch}"


def main() -> int:
    """Compile the shipped launches and print, or write, their budget."""
    from backmix.kernels.shipped import SHIPPED

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=sorted(SHIPPED))
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help="into budget.json")
    parser.add_argument("--dump", type=Path, help="a JSON file for all that the compiler made")
    options = parser.parse_args()
    lines: dict[str, dict[str, Any]] = {}
    dump: dict[str, dict[str, Any]] = {}
    for kernel, launches in SHIPPED.items():
        if options.kernel not in (None, kernel):
            continue
        for case, launch in launches().items():
            for arch in ARCHITECTURES if options.arch is None else (options.arch,):
                key = budget_key(kernel, case, arch)
                compiled = compile_launch(launch, arch)
                lines[key] = measure(compiled)
                dump[key] = {"ptx": compiled.ptx, "sass": compiled.sass, **lines[key]}
                print(key, lines[key], flush=True)
    if options.dump:
        options.dump.write_text(json.dumps(dump))
    if options.write:
        stored = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        stored[triton.__version__] = {**stored.get(triton.__version__, {}), **lines}
        BUDGET.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
