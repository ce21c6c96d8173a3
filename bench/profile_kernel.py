"""What the compiler makes of a kernel: bytes, floor, registers, occupancy, instructions, loops.

    PYTHONPATH=src python bench/profile_kernel.py NAME [--arch 90] [--case TEXT] [--sass FILE]

Needs no GPU: every launch of `kernels/shipped.py` is compiled for the architecture and its machine
code is read. Times are the bench's; what stands here are bounds and counts.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from backmix.kernels.launch import Launch
from backmix.kernels.offline import ARCHITECTURES, Compiled, compile_launch
from backmix.kernels.shipped import SHIPPED

COPY_GB_PER_S, BF16_TFLOPS = 4300.0, 769.0
"""Of an H200: a device copy (read plus written), and a large bf16 matrix product."""


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor has room for (CUDA programming guide, compute capabilities)."""

    shared_kib: int
    blocks: int
    warps: int = 64
    registers: int = 65536
    partitions: int = 4
    """Warps and their registers belong to one of these."""


PROCESSORS = {80: Processor(164, 32), 90: Processor(228, 32), 100: Processor(228, 32)}
_REGISTER_UNIT, _SHARED_UNIT, _RESERVED_SHARED = 256, 128, 1024


def occupancy(arch: int, registers: int, shared: int, warps: int) -> tuple[int, int, str]:
    """Return how many blocks and warps a multiprocessor holds, and what allows no more.

    Args:
        arch: compute capability times ten.
        registers: of a thread.
        shared: of a block, bytes.
        warps: of a block.
    """
    here = PROCESSORS[arch]
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    held = here.partitions * (here.registers // here.partitions // of_a_warp)
    of_a_block = -(-(shared + _RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    limits = {
        "warps": here.warps // warps,
        "registers": held // warps,
        "shared memory": here.shared_kib * 1024 // of_a_block,
        "blocks": here.blocks,
    }
    why = min(limits, key=lambda name: limits[name])
    return limits[why], limits[why] * warps, why


# --- bytes and operations ----------------------------------------------------------------------

GATHERED = {
    ("mix_background", "pool"): "target",
    ("mix_background", "bank"): "bank_row",
    ("update_cam_bank", "weight"): "labels",
    ("update_cam_bank", "bank"): "bank_row",
}
"""Tensors of which only the rows that another argument names are touched."""
IN_PLACE = {("update_cam_bank", "bank")}
"""Read and written."""


def tensors_of(launch: Launch) -> dict[str, Tensor]:
    """Return a launch's tensors by name, without the `_ptr` of the kernel's arguments."""
    return {
        name.removesuffix("_ptr"): value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    }


def bytes_of(kernel: str, launch: Launch) -> int:
    """Return the bytes that a launch must move at least: each argument once, as far as touched."""
    total, tensors = 0, tensors_of(launch)
    for name, tensor in tensors.items():
        rows = tensors.get(GATHERED.get((kernel, name), ""))
        share = 1.0 if rows is None else min(1.0, len(rows) / max(len(tensor), 1))
        times = 2 if (kernel, name) in IN_PLACE else 1
        total += round(times * share * tensor.numel() * tensor.element_size())
    return total


def flops_of(kernel: str, launch: Launch) -> int:
    """Return the operations of the matrix products of a launch, 0 where there are none."""

    tensors = tensors_of(launch)
    if kernel == "location_confidence" and "weight" in tensors:
        return 2 * len(tensors["weight"]) * tensors["features"].numel()
    if kernel == "class_reconstruction" and "encoder" in tensors:
        return 4 * len(tensors["x"]) * tensors["encoder"].numel()
    return 0


def floor_us(bytes_moved: int, flops: int) -> float:
    """Return the time under which an H200 cannot do it, us."""
    return max(bytes_moved / COPY_GB_PER_S / 1e3, flops / BF16_TFLOPS / 1e6)


# --- machine code ------------------------------------------------------------------------------

KINDS = {
    "matrix": r"[HIQD]?G?MMA|UTC\w*MMA|HMMA|HGMMA|IMMA",
    "load": r"LDG|LDGSTS|LD|UTMALDG",
    "constant": r"LDC|ULDC|LDCU",
    "store": r"STG|ST|UTMASTG",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM",
    "convert": r"F2F|F2FP|F2I|I2F|I2FP|I2I|PRMT",
    "float": r"F(ADD|MUL|FMA|MNMX|MNMX3|SETP|SEL|SET|CHK|SWZADD)\d?|MUFU|H(ADD|MUL|FMA)2|HMNMX2",
    "control": r"BRA|EXIT|BSSY|BSYNC|BAR|WARPSYNC|DEPBAR|CALL|RET|NOP|ELECT|SYNCS|UCGABAR_\w+",
    "move": r"U?MOV|S2R|S2UR|CS2R|R2UR|SHFL|VOTEU?|P2R|R2P|U?SEL|REDUX|UP2UR|CREDUX",
}
"""Kinds of instructions by the first word; what is none of them is integer arithmetic."""


def kind_of(instruction: str) -> str:
    """Return the kind of a machine instruction's first word: LDG, IADD3, ..."""
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, instruction):
            return kind
    return "integer"


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    name: str
    """First word with its suffixes, as in LDG.E.128.CONSTANT."""
    target: int | None
    """Address that a branch goes to."""

    @property
    def bytes(self) -> int:
        """Return the bytes of a thread that a load or store moves."""
        for word, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if word in self.name.split("."):
                return size
        return 4


def parsed(sass: list[str]) -> list[Instruction]:
    """Read lines `address: @P0 NAME operands`."""
    code = []
    for line in sass:
        address, text = line.split(": ", 1)
        words = [word for word in text.split() if not word.startswith("@")]
        branch = re.search(r"0x([0-9a-f]+)", text) if words[0].startswith("BRA") else None
        target = int(branch[1], 16) if branch else None
        code.append(Instruction(int(address, 16), words[0], target))
    return code


def widest(code: list[Instruction], name: str) -> int:
    """Return the bytes of the widest access to global memory by LDG(STS) or STG, 0 = none."""
    return max((line.bytes for line in code if line.name.startswith(name)), default=0)


@dataclass(frozen=True)
class Loop:
    """A stretch of code that a branch goes back over."""

    first: int
    """Address."""
    instructions: int
    stored: int
    """Bytes that a thread stores in one turn."""


def loops(code: list[Instruction]) -> list[Loop]:
    """Return the loops in order of their addresses; a branch to itself, the end, is none."""
    found = []
    for line in code:
        if line.target is not None and line.target < line.address:
            inside = [x for x in code if line.target <= x.address <= line.address]
            stored = sum(x.bytes for x in inside if x.name.split(".")[0] == "STG")
            found.append(Loop(line.target, len(inside), stored))
    return sorted(found, key=lambda loop: loop.first)


def matrix_lines(ptx: str) -> str:
    """Return which matrix instructions the PTX has, and how many."""
    found = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx)
    return ", ".join(f"{count} x {name}" for name, count in Counter(found).items()) or "none"


def describe(kernel: str, case: str, launch: Launch, compiled: Compiled) -> str:
    """Return all that is known of one launch on one architecture, as text."""
    code = parsed(compiled.sass)
    moved, flops = bytes_of(kernel, launch), flops_of(kernel, launch)
    blocks, warps, why = occupancy(
        compiled.arch, compiled.registers, compiled.shared, compiled.warps
    )
    kinds = Counter(kind_of(line.name.split(".")[0]) for line in code)
    out = tensors_of(launch).get("out")
    lines = [
        f"{kernel} | {case} | sm_{compiled.arch}",
        f"  grid {' x '.join(map(str, launch.grid))}, {compiled.warps} warps, "
        f"stages {launch.stages}, "
        + ", ".join(f"{name} {value}" for name, value in launch.constants.items()),
        f"  moves at least {moved / 1e6:.2f} MB"
        + (f", {flops / 1e9:.1f} GFLOP in products" if flops else "")
        + f": {floor_us(moved, flops):.1f} us at the least on an H200 (computed)",
        f"  registers {compiled.registers}, stack {compiled.stack} B, shared {compiled.shared} B: "
        f"{blocks} blocks, {warps} of {PROCESSORS[compiled.arch].warps} warps, held by {why}",
        f"  widest load {widest(code, 'LDG')} B, store {widest(code, 'STG')} B a thread; "
        f"matrix instructions: {matrix_lines(compiled.ptx)}",
        f"  {len(code)} instructions: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
    ]
    for loop in loops(code):
        line = f"  loop at 0x{loop.first:x}: {loop.instructions} instructions"
        if loop.stored:
            line += f", stores {loop.stored} B"
            if out is not None:
                elements = loop.stored / out.element_size()
                line += f", {loop.instructions / elements:.1f} a stored element"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Compile one kernel's launches and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=sorted(SHIPPED))
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--sass", type=Path, help="write the machine code here, too")
    options = parser.parse_args()
    listing = []
    for case, launch in SHIPPED[options.kernel]().items():
        if options.case in case:
            for arch in options.arch or (90,):
                compiled = compile_launch(launch, arch)
                print(describe(options.kernel, case, launch, compiled), flush=True)
                listing += [f"# {case} | sm_{arch}", *compiled.sass]
    if not listing:
        print(f"no case of {options.kernel} holds {options.case!r}", file=sys.stderr)
        return 1
    if options.sass:
        options.sass.write_text("\n".join(listing) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
