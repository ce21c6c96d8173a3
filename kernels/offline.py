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
from torch import Tensor
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
    itemsize: int
    """Bytes of an element of the first tensor, by custom the output."""

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

    @cached_property
    def per_element(self) -> list[float]:
        """Return, of each innermost loop that stores, the instructions for a stored element.

        Fewest first. An element is one of the output, of a lane whose store is not masked off. All
        instructions between a loop's first and its branch back count, once: what a loop skips by a
        branch counts too, so a kernel puts its bodies into loops of their own.
        """
        place = {int(line.partition(":")[0], 16): i for i, line in enumerate(self.sass)}
        loops: list[tuple[int, int]] = []  # first and last instruction
        for last, line in enumerate(self.sass):
            branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", line)
            first = place.get(int(branch[1], 16)) if branch else None
            if first is not None and first < last:
                loops.append((first, last))
        figures = []
        for first, last in loops:
            body = self.sass[first : last + 1]
            inner = any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
            stored = sum(_stored_bytes(line) for line in body)
            if stored and not inner:
                figures.append(round(len(body) * self.itemsize / stored, 2))
        return sorted(figures)

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run(
                [_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True
            ).stdout


def _stored_bytes(instruction: str) -> int:
    """Return the bytes that a thread stores to global memory by a machine instruction."""
    store = re.search(r"\bSTG(\.\S+)?", instruction)
    if store is None:
        return 0
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in store[0].split(".") if part in widths), 4)


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
    out = next(x for x in launch.arguments.values() if isinstance(x, Tensor))
    return Compiled(
        arch,
        kernel.asm["ptx"],
        kernel.asm["cubin"],
        kernel.metadata.shared,
        launch.warps,
        out.element_size(),
    )


def measure(compiled: Compiled) -> dict[str, int | list[float]]:
    """Return what the budget holds of a compiled kernel."""
    return {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "instructions": len(compiled.sass),
        "per_element": compiled.per_element,
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
