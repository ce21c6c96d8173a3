"""Views arriving on the device: images per second, alone and beside a training step.

    python -m bench.stage_loaders --out FOLDER [--data FILE.beton ...] [--form NAME ...]
        [--skip-done] [--repeat N] [--dry-run] [--tiny]

Run from the repository's root with PYTHONPATH=src:. there; `gpu.py` runs it as a stage. Without
`--data` it makes photographs, and keeps them as they are and as `backmix convert --preset s256`
does. What is not installed (DALI, nvImageCodec) is left out, and said. No new measurement begins
after `--seconds`: what is left, another call with `--skip-done` measures.

`beside`: another thread trains a ResNet-50 on a stream of its own, on images that lie on the
device, so that the loader goes as fast as it can and is not held up by the network.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backmix.pipeline.batch import Place
from backmix.pipeline.convert import convert
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import ConvertOptions, LoaderOptions, usable_cores
from backmix.pipeline.subset import Subset
from bench import bench_loaders, bench_step, cases, codec, parity, rows

STAGE = "loaders"
THREADS = (16, 4, 1, 8, 2)
SHARES = (0.65, 0.0, 1.0)
"""Of the JPEGs, for the GPU's JPEG engine."""
FORMS = {
    "plain_dali": "nvidia.dali",
    "dali": "nvidia.dali",
    "turbo_region": "nvidia.nvimgcodec",
    "turbo": None,
    "nvimgcodec": "nvidia.nvimgcodec",
    "nvimgcodec_whole": "nvidia.nvimgcodec",
}
"""What delivers, and the package that it needs. nvImageCodec without DALI decodes the boxes, or
whole images; torch resizes them one after the other."""
PATIENCE = 3
"""Failures after which a form is left out: it does not work here."""

Stream = Generator[int]
"""Delivers for ever; yields the images of each batch."""


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    images: int
    """Different ones, made here."""
    height_width: tuple[int, int]
    """Of those [pixels]."""
    repeat: int
    """Images of an epoch, at least: at its end a loader runs dry."""
    sides: tuple[int, ...]
    """Of the views [pixels]."""
    threads: tuple[int, ...]
    batch: int
    seconds: float
    """Of one measurement; half as long before it."""
    least: int
    """Batches of one measurement, unless it takes sixteen times as long as it should."""
    step: bench_step.Setting


FULL = Setting(
    images=256,
    height_width=(375, 500),
    repeat=200_000,
    sides=(224, 160),
    threads=THREADS,
    batch=256,
    seconds=1.2,
    least=20,
    step=dataclasses.replace(bench_step.FULL, samples=4096, compile=False),
)
TINY = Setting(
    images=12,
    height_width=(72, 96),
    repeat=24,
    sides=(32,),
    threads=(2, 1),
    batch=4,
    seconds=0.02,
    least=2,
    step=bench_step.TINY,
)


@dataclass(frozen=True)
class Point:
    """One thing to measure."""

    data: str
    side: int
    threads: int
    beside: bool
    form: str
    share: float | None
    """Of the engine; None where there is none in it."""

    @property
    def case(self) -> str:
        """Return the row's case."""
        beside = ", beside training" if self.beside else ""
        return f"{self.data}, {self.side} px, {self.threads} threads{beside}"

    @property
    def name(self) -> str:
        """Return the row's form."""
        return self.form if self.share is None else f"{self.form}, engine {self.share:g}"


def points(setting: Setting, data: list[str], forms: list[str], cores: int) -> list[Point]:
    """Return all points, the most wanted first: all cores, alone and beside; then the curve.

    Whole images and, with fewer threads, other shares and files are sampled, not crossed.
    """
    able = [n for n in setting.threads if n <= cores] or [cores]
    groups = [(able[0], False), (able[0], True), *((n, False) for n in able[1:])]
    found = []
    for threads, beside in groups:
        for name in data:
            for side in setting.sides:
                first = name == data[0] and side == setting.sides[0]
                shares = SHARES if first or threads == able[0] else SHARES[:1]
                for form in forms:
                    if form != "nvimgcodec_whole" or (first and not beside):
                        some = [None] if form.startswith("turbo") else shares
                        found += [Point(name, side, threads, beside, form, one) for one in some]
    return found


@dataclass
class Stage:
    """What the stage works with."""

    setting: Setting
    data: dict[str, Path]
    device: torch.device
    out: rows.Rows
    end: float
    """When no new measurement begins any more, on the clock of `time.perf_counter`."""
    forms: list[str]
    failed: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    left: int = 0
    """Measurements that there was no time for."""

    def wants(self, case: str, form: str, source: str) -> bool:
        """Return whether a form's row is to be made: it is not there, and there is time.

        Args:
            source: the one of FORMS that it is about; one that does not work is left out.
        """
        if self.out.done(case=case, form=form) or self.failed[source] >= PATIENCE:
            return False
        late = time.perf_counter() > self.end
        self.left += late
        return not late

    @contextlib.contextmanager
    def failures(self, source: str, what: str) -> Iterator[None]:
        """Note what failed and why, and go on."""
        try:
            yield
        except Exception as error:
            self.failed[source] += 1
            reason = f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300]
            self.reasons.append(reason)
            traceback.print_exc()
            print(f"no row for {reason}", flush=True)


# --- the images -----------------------------------------------------------------------------------


def photograph(height_width: tuple[int, int], seed: int) -> Image.Image:
    """Return a picture with blotches of all sizes and grain: as many bytes as ImageNet's have."""
    height, width = height_width
    random = np.random.default_rng(seed)
    pixels = random.normal(128, 14, (height, width, 1)).astype(np.float32)
    for cells in (3, 8, 20, 60, 200):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
        pixels = pixels + (np.asarray(smooth, np.float32) - 128) / cells**0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def made(setting: Setting, folder: Path) -> dict[str, Path]:
    """Write photographs, as they are and at most 256 pixels high; returns the files by name."""
    images = folder / "images" / "made"
    images.mkdir(parents=True)

    def save(seed: int) -> None:
        photograph(setting.height_width, seed).save(images / f"{seed}.jpg", quality=92)

    with ThreadPoolExecutor(usable_cores()) as threads:
        list(threads.map(save, range(setting.images)))
    ways = {"original": ConvertOptions(mode="jpg"), "s256": ConvertOptions(preset="s256")}
    for name, options in ways.items():
        convert(f"folder:{images.parent}", folder / f"{name}.beton", options)
    return {name: folder / f"{name}.beton" for name in ways}


# --- the forms ------------------------------------------------------------------------------------


def open_stream(stage: Stage, point: Point) -> Stream:
    """Return what delivers a point's views."""
    data, setting, device = stage.data[point.data], stage.setting, str(stage.device)
    share = point.share or 0.0
    if point.form.startswith("nvimgcodec"):
        whole = point.form == "nvimgcodec_whole"
        decode = codec.decoder(point.threads, stage.device, share, whole)
        return codec.views(decode, data, point.side, setting.batch, stage.device)
    repeat = -(-setting.repeat // max(1, len(bench_loaders.jpegs(data))))
    return bench_loaders.open_stream(
        point.form,
        data,
        point.side,
        setting.batch,
        point.threads,
        device,
        hw_share=share,
        repeat=repeat,
    )


# --- the clock ------------------------------------------------------------------------------------


def mark(device: torch.device) -> Callable[[], None]:
    """Return what waits until the current stream has done all that it has now, without spinning."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize


@dataclass(frozen=True)
class Delivered:
    """What arrived while the clock ran."""

    ms: list[float]
    """Of each batch, per image, from the batch before on."""
    images: int
    wall: float
    cpu: float
    """CPU-seconds of the process."""
    main: float
    """Of those, the thread's that asks for the batches."""
    start: float


def deliver(stream: Stream, setting: Setting, device: torch.device) -> Delivered:
    """Take batches as a loop does, never more than two ahead of the device; time them.

    The first ones are not counted: when the clock starts as much is under way as when it ends.
    """
    began = time.perf_counter()
    waits: deque[Callable[[], None]] = deque()
    for taken, _ in enumerate(stream):
        waits.append(mark(device))
        if len(waits) > 2:
            waits.popleft()()
        warm = time.perf_counter() - began > setting.seconds / 2
        if taken > bench_loaders.PREFETCH + 2 and warm:
            break
    start = last = time.perf_counter()
    cpu, main = time.process_time(), time.thread_time()
    ms: list[float] = []
    images = 0
    for n in stream:
        waits.append(mark(device))
        waits.popleft()()
        now = time.perf_counter()
        ms.append(1e3 * (now - last) / n)
        images, last = images + n, now
        enough = setting.seconds if len(ms) >= setting.least else 16 * setting.seconds
        if now - start >= enough:
            break
    used = time.process_time() - cpu
    return Delivered(ms, images, last - start, used, time.thread_time() - main, start)


@dataclass
class Beside:
    """A training that goes on in a thread of its own."""

    training: bench_step.Training
    device: torch.device
    stream: Any
    """Its own CUDA stream; None on a CPU."""
    ms: float = 0.0
    """Of a step alone, and its CPU-seconds."""
    cpu: float = 0.0
    thread: Future[None] | None = None
    """The training that goes on, or the last one."""

    @contextlib.contextmanager
    def trains(self) -> Iterator[list[float]]:
        """Train until the block ends; yields a list of the times at which steps ended."""
        ends: list[float] = []
        stop = threading.Event()

        def train() -> None:
            waits: deque[Callable[[], None]] = deque()
            with torch.cuda.stream(self.stream):
                while not stop.is_set():
                    self.training.take(1)
                    waits.append(mark(self.device))
                    if len(waits) > 1:
                        waits.popleft()()
                        ends.append(time.perf_counter())

        with ThreadPoolExecutor(1) as thread:
            self.thread = running = thread.submit(train)
            try:
                while len(ends) < 2 and not running.done():
                    time.sleep(0.001)
                yield ends
            finally:
                stop.set()
            running.result()
        rows.clock(self.device).synchronize()

    def alone(self, seconds: float) -> rows.Times:
        """Measure a step alone, and keep that; returns the times."""
        with self.trains() as ends:
            first, cpu, start = len(ends), time.process_time(), time.perf_counter()
            while len(ends) < first + 2 or time.perf_counter() - start < seconds:
                time.sleep(0.01)
                if self.thread and self.thread.done():
                    self.thread.result()  # raises what ended it: there will be no more steps
            times = ends[first - 1 :]
            self.cpu = (time.process_time() - cpu) / (len(times) - 1)
        found = rows.Times((1e3 * np.diff(times)).tolist())
        self.ms = found.median
        return found


def beside(setting: Setting, device: torch.device) -> Beside:
    """Return a training of ResNet-50, not compiled: that would take a minute of the stage."""
    gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=gpu)
    views = torch.bfloat16 if gpu else torch.float32
    training = bench_step.trainings(setting.step, device, autocast, views)["softmax"]
    training.take(1)
    rows.clock(device).synchronize()
    return Beside(training, device, torch.cuda.Stream(device) if gpu else None)


def engine_percent(device: torch.device) -> int | None:
    """Return how busy the GPU's JPEG engine was just now; None where nobody says."""
    if device.type != "cuda":
        return None
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return int(nvml.nvmlDeviceGetJpgUtilization(handle)[0])
    except Exception:  # of many kinds; the figure is beside the point
        return None


# --- what is measured -----------------------------------------------------------------------------


def measure(stage: Stage) -> None:
    """Measure all points, and write a row for each."""
    training: Beside | None = None
    for point in points(stage.setting, [*stage.data], stage.forms, usable_cores()):
        if not stage.wants(point.case, point.name, point.form):
            continue
        if point.beside and training is None and not stage.failed["training"]:
            with stage.failures("training", "training"):
                training = trained(stage)
        if point.beside and training is None:
            continue
        with stage.failures(point.form, f"{point.case}, {point.name}"):
            measure_point(stage, point, training if point.beside else None)


def trained(stage: Stage) -> Beside:
    """Return a training whose step alone has been measured; writes that row."""
    training = beside(stage.setting, stage.device)
    times = training.alone(4 * stage.setting.seconds)
    case = f"{bench_step.case_name(stage.setting.step)}, not compiled"
    config = {"cpu_ms_per_step": 1e3 * training.cpu}
    stage.out.write(case=case, form="training alone", config=config, **times.row)
    return training


def measure_point(stage: Stage, point: Point, training: Beside | None) -> None:
    """Measure a point, write its row and print it."""
    with contextlib.closing(open_stream(stage, point)) as stream:
        next(stream)  # opens
        with training.trains() if training else contextlib.nullcontext([]) as ends:
            found = deliver(stream, stage.setting, stage.device)
            engine = engine_percent(stage.device)
            steps = [end for end in ends if found.start <= end <= found.start + found.wall]
    cpu, step, more = found.cpu, None, ""
    if training and len(steps) > 1:
        step = (steps[-1] - steps[0]) / (len(steps) - 1)
        cpu -= found.wall / step * training.cpu
        more += f"  step x {1e3 * step / training.ms:.2f}"
    rate = found.images / found.wall
    config = {
        "images_per_s": rate,
        "cpu_ms_per_image": 1e3 * cpu / found.images,
        "cores": cpu / found.wall,
        "main_thread_ms_per_batch": 1e3 * found.main / len(found.ms),
        "engine_percent": engine,
        "step_ms": 1e3 * step if step else None,
        "step_slower": 1e3 * step / training.ms if training and step else None,
        "threads": point.threads,
        "hw_share": point.share,
        "batch": stage.setting.batch,
    }
    times = rows.Times(found.ms).row
    stage.out.write(
        case=point.case,
        form=point.name,
        shape={"images": found.images, "side": point.side},
        config=config,
        note=f"load average {os.getloadavg()[0]:.1f} on {usable_cores()} cores",
        unsteady=True if times["ms_p80"] > 1.25 * times["ms_p20"] else None,
        **times,
    )
    plain = [
        row["config"]["images_per_s"]
        for row in stage.out.all()
        if row["case"] == point.case and row["form"].startswith("plain_dali")
    ]
    more += f"  {rate / max(plain):.2f} x plain_dali" if plain else ""
    print(
        f"{point.case:44} {point.name:28} {rate:8.0f} img/s {config['cpu_ms_per_image']:7.3f} "
        f"CPU-ms/img {config['cores']:5.1f} cores{more}",
        flush=True,
    )


def measure_pixels(stage: Stage) -> None:
    """Write how far decoded pixels are from the stated ones, and whether they repeat."""
    data = next(iter(stage.data.values()))
    for form in ("dali", "nvimgcodec"):
        for share in SHARES if form in stage.forms else ():
            about = {"case": f"pixels of {data.name}", "form": f"{form}, engine {share:g}"}
            if not stage.wants(**about, source=form):
                continue
            with stage.failures(form, f"{about['case']}, {about['form']}"):
                away, again = (distances(stage, data, form, share) for _ in range(2))
                figures = parity.figures(away) | {"repeats": bool(np.array_equal(away, again))}
                stage.out.write(**about, config=figures)
                print(f"{about['case']:44} {about['form']:28} {figures}", flush=True)


def distances(stage: Stage, data: Path, form: str, share: float) -> np.ndarray:
    """Return how far dali's views, or nvImageCodec's regions, are from the stated pixels, uint8."""
    batch, most = stage.setting.batch, 8 * stage.setting.batch
    if form == "nvimgcodec":
        decode = codec.decoder(usable_cores(), stage.device, share, whole=False)
        return codec.distances(decode, data, batch, most)
    options = LoaderOptions(
        loader="turbo",  # its views are the stated ones
        batch=batch,
        group=1,
        size=stage.setting.sides[0],
        crop="random",
        hw_share=share,
    )
    index = bench_loaders.jpegs(data)[:most]
    subset = Subset(index, np.zeros(len(index), np.int64))
    other = dataclasses.replace(options, loader="dali")
    away = []
    with (
        open_loader(data, options, subset=subset) as turbo,
        open_loader(data, other, subset=subset, device=stage.device) as dali,
    ):
        for wanted, got in zip(turbo.batches(Place(0)), dali.batches(Place(0)), strict=True):
            a, b = wanted.pool.numpy(), got.pool.cpu().numpy()
            away.append(np.maximum(a, b) - np.minimum(a, b))
    return np.concatenate(away)


def measure_seam(stage: Stage) -> None:
    """Time what lies between the decoder's last kernel and the network, each part alone.

    `copy` moves what one kernel in place of resize and mix would save: a batch of bytes, written
    and read again.
    """
    clock, effort = rows.clock(stage.device), rows.Effort(seconds=stage.setting.seconds / 2)
    for side in stage.setting.sides:
        shape = cases.Mix(stage.setting.batch, side, side // 32, side // 2)
        inputs = cases.mix_inputs(shape, stage.device, 0, None)
        backend = "triton" if stage.device.type == "cuda" else "torch"
        calls: dict[str, tuple[rows.Call, int]] = {
            "copy": (inputs.pool.clone, 2 * inputs.pool.nbytes),
            "mix_background": (partial(inputs.door, shape, backend), shape.bytes),
        }
        for form, (call, size) in calls.items():
            if not stage.wants(seam(stage, side), form, form):
                continue
            with stage.failures(form, f"{seam(stage, side)}, {form}"):
                times = rows.cold(clock, call, effort)
                stage.out.write(case=seam(stage, side), form=form, bytes=size, **times.row)
                print(f"{seam(stage, side):44} {form:28} {1e3 * times.median:8.1f} us", flush=True)


def measure_kernels(stage: Stage) -> None:
    """Write the device's time by kernel while views arrive, per batch."""
    for side in stage.setting.sides:
        for form in (form for form in stage.forms if not form.startswith("turbo")):
            for share in (0.0, 1.0):
                point = Point(next(iter(stage.data)), side, usable_cores(), False, form, share)
                case, name = seam(stage, side), f"{point.name}, kernels"
                if not stage.wants(case, name, form):
                    continue
                with stage.failures(form, f"{case}, {name}"):
                    found = kernels(stage, point)
                    stage.out.write(case=case, form=name, config=found)
                    print(f"{case:44} {name:28} {found['all']:8.1f} us", flush=True)


def seam(stage: Stage, side: int) -> str:
    """Return the case's name."""
    return f"seam, {stage.setting.batch} x {side} px"


def kernels(stage: Stage, point: Point, batches: int = 10) -> dict[str, float]:
    """Return the device's time per batch by kernel, the longest twelve and their sum [us]."""
    gpu = stage.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity
    with contextlib.closing(open_stream(stage, point)) as stream:
        for _ in range(bench_loaders.PREFETCH + 2):
            next(stream)
        rows.clock(stage.device).synchronize()
        with torch.profiler.profile(activities=[kind.CUDA if gpu else kind.CPU]) as profiled:
            for _ in range(batches):
                next(stream)
            rows.clock(stage.device).synchronize()
    return longest(
        (event.key, (event.self_device_time_total if gpu else event.self_cpu_time_total) / batches)
        for event in profiled.key_averages()
    )


def longest(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the longest twelve times by name, and the sum of all under "all".

    Names are cut at 60 characters, in which templates often agree: such times are added up.
    """
    found: dict[str, float] = {}
    for name, time_ in times:
        found[name[:60]] = found.get(name[:60], 0.0) + time_
    first = dict(sorted(found.items(), key=lambda each: -each[1])[:12])
    return {"all": sum(found.values())} | first


# --- the program ----------------------------------------------------------------------------------


def dry_run() -> None:
    """Print what would be timed, and let every form that is installed deliver on the CPU."""
    forms = [form for form, package in FORMS.items() if installed(package)]
    wanted = points(FULL, ["original", "s256"], list(FORMS), max(THREADS))
    for case in dict.fromkeys(point.case for point in wanted):
        names = [point.name for point in wanted if point.case == case]
        print(f"  {case}: {'; '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="backmix-bench-") as folder:
        data = made(TINY, Path(folder))
        for form in forms:
            out = rows.Rows(Path(folder) / "none.jsonl", {})
            stage = Stage(TINY, data, torch.device("cpu"), out, 0.0, forms)
            point = Point("original", TINY.sides[0], 1, False, form, 0.0)
            with contextlib.closing(open_stream(stage, point)) as stream:
                print(f"  {form}: {next(stream) + next(stream)} images on the CPU", flush=True)
    for form in FORMS.keys() - set(forms):
        print(f"  {form}: {FORMS[form]} is not installed here")


def installed(package: str | None) -> bool:
    """Return whether a package is there; None always is."""
    return package is None or bool(find_spec("nvidia") and find_spec(package))


def main() -> int:
    """Measure and write rows; 1 if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"a folder; the rows go into {STAGE}.jsonl")
    parser.add_argument("--data", type=Path, action="append", help=".beton; else some are made")
    parser.add_argument("--form", choices=FORMS, action="append", help="only this; may repeat")
    parser.add_argument("--skip-done", action="store_true")
    parser.add_argument("--repeat", type=int, default=1, help="passes over the stage")
    parser.add_argument("--seconds", type=float, default=255, help="nothing new after these")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny images on the CPU, for tests")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    if options.dry_run:
        dry_run()
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if not (options.tiny or torch.cuda.is_available()):
        print("no CUDA device here: try --dry-run, or --tiny")
        return 1
    codes = []
    with tempfile.TemporaryDirectory(prefix="backmix-bench-") as folder:
        setting = TINY if options.tiny else FULL
        data = {path.stem: path for path in options.data or ()} or made(setting, Path(folder))
        for repeat in range(options.repeat):
            codes.append(run_stage(options, setting, data, end, repeat))
    return max(codes)


def run_stage(
    options: argparse.Namespace, setting: Setting, data: dict[str, Path], end: float, repeat: int
) -> int:
    """Run the stage once; return 1 if something failed."""
    started = time.perf_counter()
    device = torch.device("cpu" if options.tiny else "cuda")
    wanted = options.form or list(FORMS)
    forms = [form for form in wanted if installed(FORMS[form])]
    common = {"bench": "loaders", "stage": STAGE, **rows.machine(device)}
    path = options.out / f"{STAGE}.jsonl"
    out = rows.Rows(path, common, skip_done=options.skip_done, repeat=repeat)
    stage = Stage(setting, data, device, out, end, forms)
    measure_pixels(stage)
    measure_seam(stage)
    measure(stage)
    measure_kernels(stage)  # last: a profiler may not work everywhere
    absent = [form for form in wanted if form not in forms]
    note = f"{time.perf_counter() - started:.1f} s; failed: {'; '.join(stage.reasons) or 'nothing'}"
    note += f"; not here: {', '.join(absent) or 'nothing'}; no time for: {stage.left}"
    out.write(case="stage", form="stage", note=note)
    out.finish(unsteady=False)
    print(f"{STAGE}: {note}; rows: {path}", flush=True)
    return int(bool(stage.reasons))


if __name__ == "__main__":
    sys.exit(main())
