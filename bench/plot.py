"""Figures and tables out of bench rows. Reads rows, measures nothing.

    python bench/plot.py [--rows bench/results] [--out FOLDER] [--write]

`--out` draws: bars for every kernel, from GPU rows and from CPU rows, and a roofline from GPU rows
alone. `--write` rewrites the tables of README.md and docs/ that stand between the comments
`<!-- table: NAME -->` and `<!-- end table -->`. What no row says is *not measured*. A table NAME
for which there is a NAME.table.json among the rows is the page of that grid of runs.

Of each device and stage the newest file counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backmix.train.table_page import table_page

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script it finds only what lies beside it

from bench import on_paper  # noqa: E402
from bench.questions import page as of_question  # noqa: E402

Row = dict[str, Any]

RESULTS = ROOT / "bench" / "results"
"""Beside the rows, NAME.table.json is what `backmix table` left of a grid of runs."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.S)
NOT_MEASURED = "*not measured*"
COPY_GB_PER_S, BF16_TFLOPS = 4300.0, 769.0
"""Of an H200: a device copy (read plus written), and a large bf16 matrix product."""


# --- rows --------------------------------------------------------------------------------------


def on_gpu(row: Row) -> bool:
    """Return whether a row comes from a GPU."""
    return not row["device"].startswith("CPU")


def newest(folder: Path) -> list[Row]:
    """Return the rows of a folder: of each device and stage those of the newest file."""
    kept: dict[tuple[str, str], tuple[str, list[Row]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
        by_stage: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            by_stage.setdefault((row["device"], row["stage"]), []).append(row)
        for key, some in by_stage.items():
            utc = max(row["utc"] for row in some)
            if key not in kept or utc >= kept[key][0]:
                kept[key] = (utc, some)
    return [row for _, rows in kept.values() for row in rows]


def of_one_device(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the device that was measured last."""
    if not rows:
        return []
    device = max(rows, key=lambda row: row["utc"])["device"]
    return [row for row in rows if row["device"] == device]


def timed(rows: Sequence[Row], kernel: str) -> list[Row]:
    """Return a kernel's rows that hold a time, the last of each case, form and way of timing.

    What the stage `tune` tries is no form of anything.
    """
    last = {
        (row["stage"], row["case"], row["form"], row["l2"]): row
        for row in rows
        if row["kernel"] == kernel and row["ms_p50"] is not None and row["stage"] != "tune"
    }
    return list(last.values())


def kernels_of(rows: Sequence[Row]) -> list[str]:
    """Return the kernels that rows time, in the order of their first rows."""
    names = (row["kernel"] for row in rows if row["ms_p50"] is not None)
    return list(dict.fromkeys(name for name in names if name and name != "step"))


def origin(rows: Sequence[Row]) -> str:
    """Return where rows come from: device, versions, commits, day."""

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row[key]))

    commits = dict.fromkeys(
        str(row["commit"])[:12] + ("+" if row["dirty"] else "") for row in rows if row["commit"]
    )
    facts = [each("device"), f"torch {each('torch')}", f"triton {each('triton')}"]
    facts += [f"driver {each('driver')}"] if each("driver") else []
    facts += [f"commit {', '.join(commits) or 'unknown'}", max(row["utc"] for row in rows)[:10]]
    return ", ".join(facts)


# --- tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """A shape that training meets, with what it must move and multiply."""

    kernel: str
    name: str
    case: str
    """As `cases.py` names it in rows."""
    bytes: int
    flops: int = 0

    def about(self, row: Row) -> bool:
        """Return whether a row times this."""
        timed = row["ms_p50"] is not None and row["stage"] != "tune"
        return timed and (row["kernel"], row["case"]) == (self.kernel, self.case)


def _mix(n: int, side: int, share: float, more: str = "") -> Headline:
    percent = f"patch {share:.0%}".replace("%", " %")
    name = f"{n:,} x {side} px, bf16, {percent}{more}"
    case = f"{n} x {side} px, {percent}{more}"
    return Headline("mix_background", name, case, n * side * side * 3 * (1 + 2))


def _bank(n: int, grid: int, channels: int) -> Headline:
    case = f"{n} x {grid} x {grid} x {channels}, channels last"
    size = n * grid * grid * (2 * channels + 2 * 2)
    return Headline("update_cam_bank", f"{n:,} x {grid} x {grid} x {channels:,}, bf16", case, size)


def _confidence(n: int, channels: int, classes: int) -> Headline:
    return Headline(
        "location_confidence",
        f"{n:,} x {channels:,}, {classes:,} classes, bf16",
        f"{n:,} x {channels} x {classes:,}",
        2 * (channels * (n + classes) + classes) + 8 * n,
        2 * n * channels * classes,
    )


def _reconstruction(n: int, channels: int, classes: int, latent: int) -> Headline:
    return Headline(
        "class_reconstruction",
        f"{n:,} x {channels:,}, {classes:,} classes, latent {latent}, bf16, forward",
        f"{n:,} x {classes:,} classes, C {channels}, L {latent}, forward",
        2 * n * channels + 2 * 2 * classes * latent * channels + 4 * n * classes,
        4 * n * channels * classes * latent,
    )


HEADLINES = (
    _mix(1024, 224, 0.25),
    _mix(256, 224, 0.25),
    _mix(4096, 32, 0.0625, ", shifted, pool of 50,000"),
    _mix(512, 32, 0.0625, ", shifted, pool of 50,000"),
    _bank(1024, 7, 2048),
    _bank(512, 4, 128),
    _confidence(12_544, 2048, 1000),
    _confidence(12_544, 2048, 21_841),
    _reconstruction(12_544, 512, 1000, 16),
)
FORMS = ("triton", "eager", "compile")


def number(value: float) -> str:
    """Return a number with three digits that count."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"


def in_time(ms: float) -> str:
    """Return a time in the unit that suits it."""
    if ms >= 9999.5:
        return f"{number(ms / 1e3)} s"
    return f"{number(1e3 * ms)} µs" if ms < 1 else f"{number(ms)} ms"


def in_bytes(count: float) -> str:
    """Return an amount in MB."""
    return f"{number(count / 1e6)} MB"


def floor_ms(bytes_moved: float, flops: float, row: Row | None = None) -> float:
    """Return the least time for so many bytes and operations, ms.

    By the ceilings that the row was measured beside; without a row, by those of an H200.
    """
    measured = row or {}
    copy = measured.get("copy_gb_per_s") or COPY_GB_PER_S
    matmul = measured.get("bf16_tflops") or BF16_TFLOPS
    return max(bytes_moved / copy / 1e6, flops / matmul / 1e9)


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _best(rows: Sequence[Row], headline: Headline, form: str) -> Row | None:
    """Return the row about a headline and form, timed the way that is nearest to training."""
    found = [row for row in rows if row["form"] == form and headline.about(row)]
    return min(found, key=lambda row: _preference(row["l2"]), default=None)


def _preference(l2: str | None) -> int:
    """Return the rank of a way of timing: in training one batch follows another."""
    order = ("rotate", "cold", "warm")
    return order.index(l2) if l2 in order else len(order)


def one_way(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one way of timing for each case: that which is nearest to training."""
    ways: dict[str, str | None] = {}
    for row in rows:
        ways[row["case"]] = min(ways.get(row["case"], row["l2"]), row["l2"], key=_preference)
    return [row for row in rows if row["l2"] == ways[row["case"]]]


def speed(rows: Sequence[Row], kernel: str | None = None) -> str:
    """Return the table of the headlines: what must be moved, floor, time, against other forms."""
    measured = of_one_device([row for row in rows if on_gpu(row)])
    lines, used = [], []
    for headline in HEADLINES:
        if kernel not in (None, headline.kernel):
            continue
        ours, eager, compiled = (_best(measured, headline, form) for form in FORMS)
        used += [row for row in (ours, eager, compiled) if row]
        beside = ours or next((row for row in measured if row["copy_gb_per_s"]), None)
        least = floor_ms(headline.bytes, headline.flops, beside)

        def against(other: Row | None, ours: Row | None = ours) -> str:
            if ours is None or other is None:
                return NOT_MEASURED
            return f"{number(other['ms_p50'] / ours['ms_p50'])}x"

        lines.append(
            [
                *([f"`{headline.kernel}`"] if kernel is None else []),
                headline.name,
                in_bytes(headline.bytes),
                in_time(least),
                in_time(ours["ms_p50"]) if ours else NOT_MEASURED,
                NOT_MEASURED
                if ours is None
                else "in cache"
                if ours["l2_resident"]
                else f"{least / ours['ms_p50']:.0%}",
                against(eager),
                against(compiled),
            ]
        )
    head = ["shape", "bytes", "floor", "time", "of ceiling", "to eager", "to compiled"]
    said = (
        f"Measured on {origin(used)}. The floor follows from the copy and matrix rates of the same "
        "run, *of ceiling* is floor / time."
        if used
        else f"No GPU has been timed yet. The floor is computed for an H200 that copies "
        f"{COPY_GB_PER_S / 1e3:.1f} TB/s and multiplies {BF16_TFLOPS:.0f} TFLOP/s in bf16."
    )
    return _grid([*(["kernel"] if kernel is None else []), *head], lines) + f"\n{said}\n"


def _every_form(rows: Sequence[Row], kernel: str) -> str:
    """Return the table of all of a kernel's GPU rows; without any, that of its headlines."""
    measured = timed(of_one_device([row for row in rows if on_gpu(row)]), kernel)
    if not measured:
        return speed([], kernel)
    lines = []
    for row in measured:
        share = row["share_of_copy"] if not row["flops"] else row["share_of_matmul"]
        rate = (
            f"{number(row['tflops'])} TFLOP/s"
            if row["tflops"]
            else f"{row['gb_per_s']:,.0f} GB/s"
            if row["gb_per_s"]
            else ""
        )
        lines.append(
            [
                row["case"],
                f"`{row['form']}`",
                row["l2"] or "",
                time_of(row),
                rate,
                f"{share:.0%}" if share else "",
                f"{row['host_us']:.0f} µs" if row["host_us"] is not None else "",
                f"{row['peak_mib']:,.0f} MiB" if row["peak_mib"] is not None else "",
            ]
        )
    head = ["case", "form", "L2", "median (20 % to 80 %)", "rate", "of ceiling", "host", "memory"]
    return _grid(head, lines) + f"\n{origin(measured)}.\n"


def time_of(row: Row) -> str:
    """Return the median and, in its unit, the 20th and 80th percentile."""
    scale = 1e3 if row["ms_p50"] < 1 else 1
    spread = f"{number(scale * row['ms_p20'])} to {number(scale * row['ms_p80'])}"
    return f"{in_time(row['ms_p50'])} ({spread})" + (" *unsteady*" if row["unsteady"] else "")


def cpu(rows: Sequence[Row]) -> str:
    """Return the table of the newest CPU rows: a line for each case, a column for each form."""
    of_kernels = [row for row in rows if row["kernel"] not in (None, "step")]
    measured = of_one_device([row for row in of_kernels if not on_gpu(row)])
    if not measured:
        return f"{NOT_MEASURED}\n"
    parts = []
    for kernel in kernels_of(measured):
        mine = timed(measured, kernel)
        forms = list(dict.fromkeys(row["form"] for row in mine))
        lines = []
        for case in dict.fromkeys(row["case"] for row in mine):
            of_form = {row["form"]: row for row in mine if row["case"] == case}
            cells = [
                f"{number(of_form[form]['ms_p50'])} ({number(of_form[form]['ms_p20'])} to "
                f"{number(of_form[form]['ms_p80'])})"
                if form in of_form
                else ""
                for form in forms
            ]
            lines.append([case, *cells])
        parts.append(_grid([f"`{kernel}`", *(f"`{form}`" for form in forms)], lines))
    threads = {row["config"].get("threads") for row in measured if row["config"]} - {None}
    with_threads = f", {', '.join(map(str, sorted(threads)))} threads" if threads else ""
    said = f"Milliseconds a call, median (20 % to 80 %). {origin(measured)}{with_threads}."
    return "\n".join(parts) + f"\n{said}\n"


def step(rows: Sequence[Row]) -> str:
    """Return the table of the training step: what the methods add to softmax."""
    stages = [row for row in rows if row["stage"] == "step_resnet50"]
    measured = of_one_device([row for row in stages if on_gpu(row) and row["kernel"] == "step"])
    if not measured:
        return f"What BackMix adds to a training step on a GPU: {NOT_MEASURED}.\n"
    lines = [
        [
            row["case"],
            f"`{row['form']}`",
            time_of(row),
            f"{row['config']['images_per_s']:,.0f}",
            f"{row['config']['added_ms_p50']:+.2f} ms",
            f"{row['config']['added_percent']:+.1f} %",
        ]
        for row in measured
    ]
    head = ["step", "method", "median (20 % to 80 %)", "images/s", "added", "added"]
    return _grid(head, lines) + f"\n{origin(measured)}.\n"


def small_runs(rows: Sequence[Row]) -> str:
    """Return the table of small networks' steps: from the loop, recorded, and several at once."""
    measured = of_one_device([row for row in rows if on_gpu(row) and row["stage"] == "osr"])
    if not measured:
        return f"Steps of small networks on a GPU: {NOT_MEASURED}.\n"
    lines = [
        [
            row["case"],
            f"`{row['form']}`",
            time_of(row),
            f"{row['config']['images_per_s']:,.0f}",
            f"{row['config']['seconds_per_100_epochs']:,.1f}",
        ]
        for row in measured
    ]
    head = ["network, method", "form", "median (20 % to 80 %)", "images/s", "s for 100 epochs"]
    return _grid(head, lines) + f"\n{origin(measured)}.\n"


def budget() -> str:
    """Return the table of what the compiler made of the shipped launches, from the budget."""
    path = ROOT / "kernels" / "budget.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if not stored:
        return f"{NOT_MEASURED}\n"
    version = max(stored, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for key, made in stored[version].items():
        kernel, case, arch = key.split(" | ")
        cell = f"{made['registers']} / {made['stack']} / {made['shared']:,} / "
        lines.setdefault((kernel, case), {})[arch] = cell + f"{made['instructions']:,}"
    archs = sorted({arch for line in lines.values() for arch in line}, key=lambda a: int(a[3:]))
    body = [
        [f"`{kernel}`", case, *(made.get(arch, "") for arch in archs)]
        for (kernel, case), made in lines.items()
    ]
    said = (
        "Registers of a thread / bytes of its stack / bytes of shared memory of a block / machine "
        f"instructions, by triton {version}."
    )
    return _grid(["kernel", "launch", *archs], body) + f"\n{said}\n"


# --- ImageNet's size: measured with `synthetic.py`, and on paper ---------------------------------

SCALE = {
    "write the set": "",
    "open": "opening the file: {own_mib:,.0f} MiB of tables",
    "choose classes": "choosing the images of 1,000 classes",
    "hold out 2 %": "`--val 0.02`",
    "order": "the order of an epoch",
    "order, windowed": "the same, `--loader.order windowed`",
    "plan and draws of a step": "crops, flips, donors, patches of 256 images, one thread: "
    "{images_per_s:,} images/s",
    "first batch of the next epoch": "the loader at the border of an epoch; other batches "
    "{other_batches_ms:,.0f} ms",
    "process until its first batch": "a fresh process until its first batch (target 10 s)",
    "command until its first step": "`backmix train` until its first step (target 10 s); "
    "{cpu_seconds} CPU-seconds",
    "command until it goes on": "the same command from a checkpoint until its next step",
    "SIGTERM until the end, checkpoint written": "SIGTERM until the process has ended; "
    "checkpoint of {bytes:,} bytes",
    "memory while training": "memory while training: {own_mib:,.0f} MiB (target 4,096)",
    "memory over the border of an epoch": "memory over the border of an epoch: {own_mib:,.0f} MiB; "
    "its first step takes {first_step_ms:,.0f} ms, others {other_steps_ms:,.0f} ms",
    "network, optimizer, bank": "ResNet-50 with data, optimizer and bank made: {own_mib:,.0f} MiB",
    "bank update of a step": "the bank's update with 256 maps of 2,048 channels; it takes "
    "{bytes:,} bytes",
    "checkpoint: copy within memory": "ResNet-50's checkpoint: copy in which a step waits",
    "checkpoint: write and sync": "its writing, in a thread: {bytes:,} bytes",
    "checkpoint: read and verify": "its reading, checksums included",
    "kept for backward": "ResNet-50 keeps {bytes_per_image:,} bytes an image for backward, bf16, "
    "not compiled",
    "outputs: spool": "50,000 images' outputs to disk, as they come",
    "outputs: store": "their file",
    "outputs: map": "opening that file: {bytes:,} bytes, mapped",
    "outputs: scores of the known set": "scores of the known set: {own_mib:,.0f} MiB",
    "outputs: scores of the unknown set": "scores of the unknown set: {own_mib:,.0f} MiB",
    "outputs: metrics, all scores": "metrics of all scores: {own_mib:,.0f} MiB",
    "backmix evaluate, the whole command": "`backmix evaluate`, start and metrics included: "
    "{own_mib:,.0f} MiB; scores of {bytes:,} bytes",
    "backmix evaluate, its pass": "its pass: {images_per_s:,.0f} images/s, {waiting:.0%} of it "
    "waiting; it says loader {loader_images_per_s:,.0f}, network {network_images_per_s:,.0f}; "
    "alone they do {loader_alone_images_per_s:,.0f} and {network_alone_images_per_s:,.0f}",
}
"""What the table says of each form, filled in from its row's config; nothing = left out."""


def scale_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the last row of each form of the stage `scale` at ImageNet's size."""
    size = f"{on_paper.SAMPLES:,} samples"
    return {
        row["form"]: row for row in rows if row["stage"] == "scale" and row["case"].startswith(size)
    }


def synthetic(rows: Sequence[Row]) -> str:
    """Return the table of what was measured at ImageNet's size."""
    measured = scale_rows(rows)
    if not measured:
        return f"{NOT_MEASURED}\n"
    body = [
        [text.format(**measured[form]["config"]), in_time(row["ms_p50"]) if row["ms_p50"] else ""]
        for form, text in SCALE.items()
        if text and (row := measured.get(form))
    ]
    loads = [
        float(row["note"].rsplit("load average ", 1)[1].split()[0]) for row in measured.values()
    ]
    said = f"{origin(list(measured.values()))}; load average {min(loads)} to {max(loads)}, "
    said += next(iter(measured.values()))["note"].rsplit(" on ", 1)[1] + "."
    return _grid(["what", "median"], body) + f"\n{said}\n"


def scale(rows: Sequence[Row]) -> str:
    """Return the table of what many GPUs exchange, on paper."""
    lines = []
    for network in (on_paper.RESNET18, on_paper.RESNET50):
        for gpus in on_paper.GPUS:
            each = on_paper.gradients(network, gpus), on_paper.statistics(network, gpus)
            steps, bank = on_paper.steps(gpus), on_paper.rows(network, gpus)
            lines.append(
                [
                    network.name,
                    f"{gpus}",
                    f"{gpus * on_paper.PER_GPU:,}",
                    f"{steps:,}",
                    in_bytes(each[0]),
                    in_bytes(each[1]),
                    in_time(1e3 * sum(each) / on_paper.LINK),
                    in_bytes(bank),
                    in_time(1e3 * bank / on_paper.LINK),
                    in_bytes(steps * sum(each) + bank),
                ]
            )
    head = ["network", "GPUs", "images a step", "steps an epoch", "gradients a step"]
    head += ["statistics a step", "time of both", "bank an epoch", "its time", "all an epoch"]
    return _grid(head, lines)


def scale_node(rows: Sequence[Row]) -> str:
    """Return the table of what many GPUs open and write, on paper and from measured rows."""
    measured = scale_rows(rows)
    write = measured.get("checkpoint: write and sync")
    training = measured.get("memory while training")
    first = measured.get("command until its first step")
    rate = write["config"]["bytes"] / write["ms_p50"] if write else 0.0  # bytes a millisecond
    lines = []
    for gpus in on_paper.GPUS:
        size = on_paper.checkpoint(on_paper.RESNET50, gpus, running_mean=True)
        files = training and training["config"]
        mapped = files and on_paper.PER_NODE * files["mapped_sets"]
        lines.append(
            [
                f"{gpus}",
                f"{gpus // on_paper.PER_NODE}",
                f"{mapped}, and {files['open_files']} of the run on the first node"
                if files
                else NOT_MEASURED,
                in_bytes(on_paper.RESNET50.weights),
                in_time(first["ms_p50"]) if first else NOT_MEASURED,
                in_bytes(size),
                in_time(size / rate) if rate else NOT_MEASURED,
            ]
        )
    head = ["GPUs", "nodes", "files open on a node", "weights sent once", "first step of a process"]
    head += ["checkpoint", "its writing"]
    return _grid(head, lines)


def memory(rows: Sequence[Row]) -> str:
    """Return the table of a GPU's memory in a step of ResNet-50, on paper."""
    kept = scale_rows(rows).get("kept for backward")
    if kept is None:
        return f"{NOT_MEASURED}\n"
    batches = (256, 512, 1024)
    found = [
        on_paper.memory(on_paper.RESNET50, kept["config"]["bytes_per_image"], images)
        for images in batches
    ]
    lines = [[what, *(in_bytes(each[what]) for each in found)] for what in found[0]]
    lines.append(["sum", *(in_bytes(sum(each.values())) for each in found)])
    return _grid(["what", *(f"{images:,} images" for images in batches)], lines)


def question(name: str) -> str:
    """Return the table of a question that the demo's images answer (bench/questions.py)."""
    stored = RESULTS / f"{name}.json"
    return of_question(json.loads(stored.read_text())) + "\n" if stored.exists() else ""


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "speed": speed,
    "mix_background": lambda rows: _every_form(rows, "mix_background"),
    "update_cam_bank": lambda rows: _every_form(rows, "update_cam_bank"),
    "location_confidence": lambda rows: _every_form(rows, "location_confidence"),
    "class_reconstruction": lambda rows: _every_form(rows, "class_reconstruction"),
    "step": step,
    "small_runs": small_runs,
    "cpu": cpu,
    "budget": lambda rows: budget(),
    "synthetic": synthetic,
    "scale": scale,
    "scale_node": scale_node,
    "memory": memory,
    "correlation": lambda rows: question("correlation"),
    "length": lambda rows: question("length"),
    "options": lambda rows: question("options"),
}
"""What a page may ask for by name."""


def with_tables(text: str, rows: Sequence[Row]) -> str:
    """Return a page with all its tables as the rows give them.

    Raises:
        ValueError: a page asks for a table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        stored = RESULTS / f"{found[2]}.table.json"
        if stored.exists():
            page = table_page(json.loads(stored.read_text()), level=3, folded=True)
            return f"{found[1]}\n{page}\n{found[3]}"
        if found[2] not in TABLES:
            raise ValueError(f"there is no table {found[2]!r}, only {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]](rows) + found[3]

    return MARKED.sub(table, text)


# --- figures -----------------------------------------------------------------------------------

COLOURS = {"triton": "#c2410c", "eager": "#475569", "compile": "#0e7490"}
OTHER_COLOURS = ("#94a3b8", "#a3a380", "#b08968", "#8d99ae", "#9d8189")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot there is no window to open

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots


def _caption(figure: Any, text: str) -> None:
    import textwrap

    width = int(figure.get_figwidth() * 16)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=7, color="#475569", x=0.5)


def draw_bars(rows: Sequence[Row], kernel: str, path: Path) -> None:
    """Draw a kernel's times: a panel for each case, a bar for each form, whiskers p20 to p80."""
    mine = one_way(timed(rows, kernel))
    forms = list(dict.fromkeys(row["form"] for row in mine))
    spare = iter(OTHER_COLOURS * len(forms))
    colours = {form: COLOURS.get(form) or next(spare) for form in forms}
    panels = {
        case: [row for row in mine if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in mine)
    }
    bars = sum(len(some) for some in panels.values())
    figure, subplots = _figure(8, 0.34 * bars + 0.62 * len(panels) + 0.9)
    ratios = [len(some) + 1.4 for some in panels.values()]
    axes = subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for ax, (case, some) in zip(axes, panels.items(), strict=True):
        scale, unit = (1e3, "µs") if max(row["ms_p50"] for row in some) < 1 else (1, "ms")
        base = next((row["ms_p50"] for row in some if row["form"] == "eager"), None)
        longest = scale * max(row["ms_p80"] for row in some)
        for place, row in enumerate(some):
            low, middle, high = (scale * row[key] for key in ("ms_p20", "ms_p50", "ms_p80"))
            ax.barh(place, middle, color=colours[row["form"]], height=0.72)
            ax.errorbar(
                middle,
                place,
                xerr=[[middle - low], [high - middle]],
                color="black",
                lw=1,
                capsize=2,
            )
            label = f"{number(middle)} {unit}"
            if base and on_gpu(row) and row["form"] != "eager":
                faster = base >= row["ms_p50"]
                ratio = base / row["ms_p50"] if faster else row["ms_p50"] / base
                label += f"   {number(ratio)}x as {'fast' if faster else 'slow'} as eager"
            ax.text(high + 0.012 * longest, place, label, va="center", fontsize=7)
        ax.set_yticks(range(len(some)), [row["form"] for row in some], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.4 * longest)
        ax.tick_params(axis="x", labelsize=7)
        l2 = f", L2 {some[0]['l2']}" if some[0]["l2"] else ""
        ax.set_title(f"{case}{l2} [{unit}]", fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{kernel}: time of a call [{'GPU' if on_gpu(mine[0]) else 'CPU'}]", fontsize=10
    )
    notes = "; ".join(dict.fromkeys(row["note"] for row in mine if row["note"]))
    _caption(
        figure,
        f"Bars: median; whiskers: 20th to 80th percentile. {origin(mine)}"
        + (f". {notes}" if notes else ""),
    )
    figure.savefig(path)


def draw_roofline(rows: Sequence[Row], path: Path) -> bool:
    """Draw achieved rate against intensity under the measured ceilings; False without such rows."""
    import statistics

    points = [
        row
        for kernel in kernels_of(rows)
        for row in one_way(timed(rows, kernel))
        if row["flops"] and row["bytes"] and row["copy_gb_per_s"] and row["bf16_tflops"]
    ]
    if not points:
        return False
    copy = statistics.median(row["copy_gb_per_s"] for row in points)
    matmul = statistics.median(row["bf16_tflops"] for row in points)
    figure, subplots = _figure(8, 5)
    ax = subplots()
    intensities = [row["flops"] / row["bytes"] for row in points]
    ridge = 1e3 * matmul / copy
    left, right = min([*intensities, ridge]) / 4, max([*intensities, ridge]) * 4
    ax.plot([left, ridge, right], [copy * left / 1e3, matmul, matmul], color="black", lw=1.2)
    middle = (left * ridge) ** 0.5
    beside = {"fontsize": 8, "textcoords": "offset points"}
    ax.annotate(
        f"copy {copy / 1e3:.2f} TB/s", (middle, copy * middle / 1e3), xytext=(8, -10), **beside
    )
    ax.annotate(f"bf16 product {matmul:.0f} TFLOP/s", (ridge, matmul), xytext=(0, 4), **beside)
    markers = dict(zip(kernels_of(points), "osD^vP*X", strict=False))
    forms = list(dict.fromkeys(row["form"] for row in points))
    spare = iter(OTHER_COLOURS * len(forms))
    colours = {form: COLOURS.get(form) or next(spare) for form in forms}
    for row, intensity in zip(points, intensities, strict=True):
        rate = row["flops"] / row["ms_p50"] / 1e9
        ax.plot(
            intensity, rate, markers[row["kernel"]], color=colours[row["form"]], ms=6, alpha=0.9
        )
        if row["form"] == "triton":
            ax.annotate(row["case"], (intensity, rate), fontsize=6, xytext=(6, -3),
                        textcoords="offset points")  # fmt: skip
    for form in forms:
        ax.plot([], [], "o", color=colours[form], label=form)
    for kernel, marker in markers.items():
        ax.plot([], [], marker, color="white", markeredgecolor="black", label=kernel)
    ax.legend(fontsize=7, loc="lower right")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations per byte moved at least", fontsize=8)
    ax.set_ylabel("TFLOP/s", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(which="both", lw=0.3, alpha=0.5)
    ax.set_title("Roofline: ceilings measured in the same run", fontsize=10)
    _caption(figure, f"{origin(points)}. Kernels without matrix products are not shown.")
    figure.savefig(path)
    return True


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw all that the rows allow; returns what was drawn, and what was not for want of rows."""
    said = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (
        ("gpu", of_one_device([row for row in rows if on_gpu(row)])),
        ("cpu", of_one_device([row for row in rows if row["kernel"] and not on_gpu(row)])),
    ):
        if not kernels_of(some):
            said.append(f"there are no {name.upper()} rows: nothing drawn of them")
        for kernel in kernels_of(some):
            path = folder / f"{name}-{kernel}.png"
            draw_bars(some, kernel, path)
            said.append(f"drew {path}")
        if name == "gpu" and kernels_of(some):
            path = folder / "roofline.png"
            drawn = draw_roofline(some, path)
            said.append(f"drew {path}" if drawn else "no row counts operations: no roofline")
    return said


def main() -> int:
    """Draw, and write tables, as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of the pages")
    options = parser.parse_args()
    rows = newest(options.rows)
    if options.out:
        print("\n".join(draw(rows, options.out)))
    if options.write:
        for page in PAGES:
            before = page.read_text()
            after = with_tables(before, rows)
            if after != before:
                page.write_text(after)
                print(f"wrote {page}")
    if not (options.out or options.write):
        print("\n".join(f"## {name}\n\n{table(rows)}" for name, table in TABLES.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
