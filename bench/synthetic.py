"""ImageNet's size without ImageNet: a few images repeated 1,281,167 times under 1,000 labels.

    PYTHONPATH=src:. nice python -m bench.synthetic [--results FOLDER] [--data FILE.beton]
        [--part NAME ...] [--samples N] [--work FOLDER] [--tiny]

The set is a real .beton, whose samples share the bytes of a few (`Writer.repeat`): everything that
grows with the number of samples is there, only the disk and the page cache are not asked for 138
GB. Without `--data` the images are made: photographs of 500 x 375 pixels, converted to 160. Every
part runs in processes of its own:

- `reading`: opening, choosing classes, holding out, the order of an epoch, draws, the border
  between two epochs in the loader;
- `start`: a fresh process until its first batch;
- `train`: the real `backmix train`, BackMix on views of 224 pixels: until its first step, its
  memory, how it stops and goes on, and the border of an epoch (the checkpoint is moved there);
- `state`: bank, optimizer, running mean, checkpoint of a ResNet-50; what it keeps for backward;
- `outputs`: scores and metrics of 50,000 images, 1,000 classes, 2,048 features;
- `evaluate`: the real `backmix evaluate` on 50,000 images at 224 pixels, its loader alone, its
  network alone.

The network in `train` and `evaluate` costs next to nothing (`small_net.py`): it is not what is
measured. Memory is RssAnon + RssShmem of the main process, what it has beside the pages of mapped
files, which the system may drop.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backmix.kernels.update_cam_bank import update_cam_bank
from backmix.pipeline import draws, order
from backmix.pipeline.batch import Place
from backmix.pipeline.beton import open_beton, open_set
from backmix.pipeline.convert import convert
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import ConvertOptions, LoaderOptions
from backmix.pipeline.plan import Plan
from backmix.pipeline.subset import Subset, hold_out, select
from backmix.pipeline.writer import Record, Writer
from bench import bench_convert, rows

STAGE = "scale"
ROOT = Path(__file__).resolve().parents[1]
SIDE = 160
"""Longer side of the made images as they are stored [pixels]."""
SMALL_NET = "bench.small_net:patches"
MOST_SECONDS = 10
"""Target: a fresh process has its first batch, and the command its first step, by then."""
MOST_MIB = 4096
"""Target: memory of the main process."""
PATIENCE = 1800
"""Seconds after which a process that is waited for has failed."""

Publish = Callable[..., None]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    samples: int = 1_281_167
    classes: int = 1_000
    stored: int = 256
    """Different images."""
    test: int = 50_000
    batch: int = 256
    view: int = 224
    """Side of the views [pixels]."""
    channels: int = 2_048
    steps: int = 20
    """Steps before and behind the border of an epoch."""
    repeats: int = 5
    network: str = "resnet50"
    """Whose state is saved."""


TINY = Size(600, 10, 4, 60, 64, 64, 32, 2, 2, "classifier32-quarter")
"""For tests: no figure."""


# --- the sets -------------------------------------------------------------------------------------


def repeated(source: Path, out: Path, samples: int, classes: int, stored: int) -> Path:
    """Write a .beton of so many samples that shows the first `stored` images of `source` in turn.

    Sample k has label k modulo `classes`, and a name of its own, as ImageNet's have.
    """
    with open_beton(source) as data:
        stored = min(stored, data.n, samples)
        names = [f"n{number:08}" for number in range(classes)]
        with Writer(
            out, samples=samples, page_size=data.page_size, classes=names, options=made_by(data)
        ) as writer:
            for k in range(samples):
                label = k % classes
                name = f"{names[label]}/{names[label]}_{k}.JPEG"
                if k >= stored:
                    writer.repeat(k % stored, label, name)
                    continue
                height, width = data.sizes[k].tolist()
                flags = 0 if data.flags is None else int(data.flags[k])
                mode = int(data.modes[k])
                writer.append(Record(data.region(k), mode, height, width, label, flags, name))
    return out


def made_by(data: Any) -> dict[str, Any]:
    """Return the converter's options that a file notes: loaders ask whether it checked images."""
    options = data.info.get("options", {})
    return options if isinstance(options, dict) else {}


def made_images(folder: Path, count: int) -> Path:
    """Make and convert so many photographs; returns the .beton."""
    bench_convert.photographs(folder / "images" / "any", count)
    out = folder / "stored.beton"
    convert(
        f"folder:{folder / 'images'}", out, ConvertOptions(max_side=SIDE, mode="jpg", workers=1)
    )
    return out


# --- the machine's answers ------------------------------------------------------------------------


def memory(pid: int | str = "self") -> dict[str, float]:
    """Return the MiB that a process has in RAM: its own, and pages of files.

    Its own are RssAnon and RssShmem (shared memory counts, as nobody else may have it).
    """
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssShmem", "RssFile"):
            found[key] = int(value.split()[0]) / 1024
    own = found["RssAnon"] + found["RssShmem"]
    return {"own_mib": round(own, 1), "file_mib": round(found["RssFile"], 1)}


@contextmanager
def watched(pid: int | str = "self") -> Iterator[dict[str, float]]:
    """Yield the most of `memory` there is until the end, looked at every 20 ms and at the end."""
    most = memory(pid)
    over = threading.Event()

    def look() -> None:
        ended = False
        while not ended:
            ended = over.wait(0.02)
            try:
                now = memory(pid)
            except (OSError, KeyError):  # it has ended
                return
            for key, value in now.items():
                most[key] = max(most[key], value)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def cpu_seconds(pid: int) -> float:
    """Return the CPU-seconds that a process has used: what a busy machine does not stretch."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, list[float]]:
    """Return what a call returns at last, and the milliseconds of each time."""
    times, found = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        found = call()
        times.append(1e3 * (time.perf_counter() - began))
    return found, times


def environment() -> dict[str, str]:
    """Return the environment of the processes that are started."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }


def started(*words: object) -> "subprocess.Popen[str]":
    """Start Python."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: "subprocess.Popen[str]", there: Callable[[], bool], what: str) -> float:
    """Wait until something is there; returns the seconds."""
    began = time.perf_counter()
    while not there():
        if process.poll() is not None:
            raise RuntimeError(f"{what}: the process ended: {process.communicate()[1][-2000:]}")
        if time.perf_counter() - began > PATIENCE:
            process.kill()
            raise RuntimeError(f"{what}: not there after {PATIENCE} seconds")
        time.sleep(0.01)
    return time.perf_counter() - began


def ended(process: "subprocess.Popen[str]", code: int) -> str:
    """Wait for a process's end, which must have this exit code; returns what it printed."""
    try:
        out, errors = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.kill()
        raise
    if process.returncode != code:
        raise RuntimeError(f"exit code {process.returncode}, not {code}: {errors[-2000:]}")
    return out


# --- the parts ------------------------------------------------------------------------------------


def reading(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """What grows with the number of samples in the pipeline."""
    before = memory()["own_mib"]
    stored = open_set(data)
    held = round(memory()["own_mib"] - before, 1)
    times = timed(lambda: open_set(data).close(), size.repeats)[1]
    publish("open", times, own_mib=held, bytes=data.stat().st_size)

    known = list(range(size.classes))
    subset, times = timed(lambda: select(stored.labels, known), size.repeats)
    publish("choose classes", times)
    publish("hold out 2 %", timed(lambda: hold_out(subset, 0.02, 0), size.repeats)[1])
    epochs = iter(range(10**6))
    count = len(subset)
    publish("order", timed(lambda: order.order(0, next(epochs), count), size.repeats)[1])
    pages = np.arange(count) // 20  # ImageNet's pages of 2 MiB hold about so many
    windowed = lambda: order.windowed_order(0, next(epochs), pages, 16)  # noqa: E731
    publish("order, windowed", timed(windowed, size.repeats)[1])

    options = LoaderOptions(
        loader="turbo", batch=size.batch, size=size.view, crop="random", threads=1
    )
    plan = Plan(stored, subset, options, True)
    parts = plan.parts(Place(0))

    def planned() -> None:
        part = next(parts)
        index = subset.index[part.positions]
        plan.boxes(part.place, index)
        draws.mix_draws(
            0,
            part.place.epoch,
            index,
            rows=np.arange(len(index)),
            pool_rows=len(index),
            group=plan.options.mix_group,
            size=(size.view, size.view),
            patch=size.view // 2,
        )

    planned()  # the order of the epoch
    steps = min(200, count // size.batch - 1)
    times = timed(planned, steps)[1]
    rate = round(1e3 * size.batch / statistics.median(times))
    publish("plan and draws of a step", times, images_per_s=rate)
    stored.close()
    _border(size, data, subset, options, publish)


def _border(
    size: Size, data: Path, subset: Subset, options: LoaderOptions, publish: Publish
) -> None:
    """Read over the end of an epoch, as a run does, a tenth of a second of network a batch."""
    with open_loader(data, options, subset=subset) as loader, watched() as most:
        per_epoch = -(-len(subset) // size.batch)
        last = max(per_epoch - size.steps, 0) * size.batch
        held, gaps = [], []
        for place in (Place(0, 0, last), Place(0, 1)):
            asked = time.perf_counter()
            for batch in islice(loader.batches(place), size.steps):
                gaps.append(1e3 * (time.perf_counter() - asked))
                assert len(batch)
                held.append(memory()["own_mib"])
                time.sleep(0.1)
                asked = time.perf_counter()
    behind = len(gaps) - size.steps
    publish(
        "first batch of the next epoch",
        [gaps[behind]],
        other_batches_ms=round(statistics.median(gaps[1:behind] + gaps[behind + 1 :]), 1),
        own_mib_before=held[behind - 1],
        own_mib_behind=held[-1],
        own_mib=most["own_mib"],
    )


FIRST_BATCH = """
import sys
from backmix.pipeline.batch import Place
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions

batch, size = int(sys.argv[2]), int(sys.argv[3])
options = LoaderOptions(loader="turbo", batch=batch, size=size, crop="random", threads=1)
with open_loader(sys.argv[1], options) as loader:
    first = next(loader.batches(Place(0)))
    print(len(first), flush=True)
"""


def start(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """A fresh process until its first batch, Python's and torch's own start included."""
    times = []
    for _ in range(min(size.repeats, 3)):
        began = time.perf_counter()
        process = started("-c", FIRST_BATCH, data, size.batch, size.view)
        assert process.stdout is not None
        line = process.stdout.readline()
        times.append(1e3 * (time.perf_counter() - began))
        ended(process, 0)
        assert int(line) == min(size.batch, size.samples)
    publish("process until its first batch", times, target=MOST_SECONDS * 1e3)


def train(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """The real command: first step, memory, stop, going on, the border of an epoch."""
    from backmix.train.checkpoint import checkpoint_path, load_tensors, newest_step, save_tensors

    run = folder / "run"
    words = _train_words(size, data, run, "imagenet-rn50-16-backmix", epochs=2)
    log, times = run / "log.jsonl", run / "time.jsonl"

    def step() -> int:
        text = log.read_text() if log.exists() else ""
        done = text[: text.rfind("\n") + 1].splitlines()
        return json.loads(done[-1])["step"] if done else 0

    began = time.perf_counter()
    process = started(*words)
    with watched(process.pid) as most:
        wait_for(process, lambda: step() >= 1, "the first step")
        first = 1e3 * (time.perf_counter() - began)
        cpu = cpu_seconds(process.pid)
        publish("command until its first step", [first], target=MOST_SECONDS * 1e3, cpu_seconds=cpu)
        wait_for(process, lambda: step() >= size.steps, f"step {size.steps}")
        files = _files(process.pid)
        asked = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        ended(process, 75)
    stopped = 1e3 * (time.perf_counter() - asked)
    path = checkpoint_path(run, newest_step(run))
    publish("SIGTERM until the end, checkpoint written", [stopped], bytes=path.stat().st_size)
    publish("memory while training", [], **most, target_mib=MOST_MIB, **files)

    # The place is three integers: put the run to the end of its first epoch.
    per_epoch = -(-size.samples // size.batch)
    moved = max(per_epoch - size.steps, newest_step(run))
    tensors, meta = load_tensors(path)
    meta["step"], meta["place"]["consumed"] = moved, moved * size.batch
    path.unlink()
    save_tensors(checkpoint_path(run, moved), tensors, meta)
    rows_before = len(times.read_text().splitlines())
    began = time.perf_counter()
    process = started(*words)
    with watched(process.pid) as most:
        wait_for(process, lambda: step() > moved, "the first step after going on")
        publish("command until it goes on", [1e3 * (time.perf_counter() - began)])
        wait_for(process, lambda: step() >= per_epoch + size.steps // 2, "the next epoch")
        process.send_signal(signal.SIGTERM)
        ended(process, 75)
    seconds = {
        row["step"]: row["seconds"]
        for row in map(json.loads, times.read_text().splitlines()[rows_before:])
        if "images_per_s" in row
    }
    took = {k: seconds[k] - seconds[k - 1] for k in seconds if k - 1 in seconds}
    border = took.pop(per_epoch + 1)
    publish(
        "memory over the border of an epoch",
        [],
        **most,
        target_mib=MOST_MIB,
        first_step_ms=round(1e3 * border, 1),
        other_steps_ms=round(1e3 * statistics.median(took.values()), 1),
    )
    shutil.rmtree(run)


def _train_words(size: Size, data: Path, run: Path, recipe: str, epochs: int) -> list[object]:
    words = ["-m", "backmix", "train", recipe, "--data", data, "--out", run]
    words += ["--model", SMALL_NET, "--epochs", epochs, "--loader.size", size.view]
    words += ["--loader.batch", size.batch, "--loader.threads", 1, "--threads", 1]
    words += ["--device", "cpu", "--precision", "fp32", "--log-every", 1, "--save-minutes", 1000]
    words += ["--loader.grow-from", 0, "--loader.grow", 0, 0, "--no-blurpool", "--optim.lr", 0.1]
    words += ["--quiet"]
    if recipe.endswith("backmix"):
        words += ["--method.patch", size.view // 2]
    return words


def _files(pid: int) -> dict[str, int]:
    """Return how many files a process has open, and how many sets it has mapped."""
    opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        "open_files": sum(name.startswith("/") and not name.startswith("/dev") for name in opened),
        "mapped_sets": len({line.split()[-1] for line in maps if line.endswith(".beton")}),
    }


def state(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """Bank and checkpoint of a real network at this size."""
    from backmix.train.checkpoint import (
        HostCopies,
        checkpoint_path,
        load_tensors,
        save_checkpoint,
    )
    from backmix.train.methods.backmix import BackMixMethod
    from backmix.train.prepare import prepare_run
    from backmix.train.recipes import RECIPES

    recipe = "imagenet-rn50-16-backmix"
    base = RECIPES[recipe]()
    run = replace(
        base,
        data=(data,),
        out=folder / "state",
        model=size.network,
        device="cpu",
        precision="fp32",
        threads=1,
        ema=0.9999,
        quiet=True,
        loader=replace(
            base.loader, batch=size.batch, size=size.view, grow_from=0, grow=(0, 0), threads=1
        ),
        method=replace(base.method, patch=size.view // 2),  # type: ignore[arg-type]
    )
    before = memory()["own_mib"]
    (_, held, loader), times = timed(lambda: prepare_run(run, recipe, []))
    loader.close()
    for parameter in held.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held.optimizer.step()  # now it has its momentum
    publish("network, optimizer, bank", times, own_mib=round(memory()["own_mib"] - before, 1))

    method = held.method
    assert isinstance(method, BackMixMethod)
    random = np.random.default_rng(0)
    grid = held.model.grid(size.view)
    maps = torch.from_numpy(random.random((size.batch, size.channels, *grid), np.float32))
    maps = maps.contiguous(memory_format=torch.channels_last)
    weights = torch.from_numpy(random.random((size.classes, size.channels), np.float32) - 0.5)
    index = random.choice(size.samples, (size.repeats, size.batch), replace=False)
    labels = torch.from_numpy(index % size.classes)
    turns = iter(range(size.repeats))

    def update() -> None:
        turn = next(turns)
        update_cam_bank(
            method.bank,
            maps,
            weights,
            labels[turn],
            torch.from_numpy(index[turn]),
            box=torch.tensor([[0, 0, 1 << 16, 1 << 16]], dtype=torch.int32).repeat(size.batch, 1),
            rate=torch.tensor(0.1),
        )

    bank = method.bank.nbytes
    publish("bank update of a step", timed(update, size.repeats)[1], bytes=bank)

    tensors = held.tensors()
    named = {
        kind: sum(t.nbytes for name, t in tensors.items() if name.startswith(kind))
        for kind in ("model.", "optimizer.", "ema.", "method.")
    }
    copies = HostCopies()
    copies.take(tensors)
    copied, times = timed(lambda: copies.take(tensors), size.repeats)
    publish("checkpoint: copy within memory", times, **named)
    run.out.mkdir()
    _, times = timed(lambda: save_checkpoint(run.out, 1, copied, held.meta()), size.repeats)
    path = checkpoint_path(run.out, 1)
    publish("checkpoint: write and sync", times, bytes=path.stat().st_size)
    publish("checkpoint: read and verify", timed(lambda: load_tensors(path), size.repeats)[1])
    shutil.rmtree(run.out)
    publish("kept for backward", [], **kept_for_backward(size.network, size.classes, size.view))


def kept_for_backward(name: str, classes: int, side: int) -> dict[str, int]:
    """Return the bytes that autograd keeps of an image in bf16 autocast, counted on a CPU.

    The difference between batches of three and of two, so that what does not grow with the batch
    (the weights) is left out; memory that two operations keep counts once.
    """
    from backmix.train.models.build import build

    model = build(name, classes, side).train()

    def kept(count: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.zeros(count, 3, side, side).contiguous(memory_format=torch.channels_last)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            out = model(images)  # held, so that no memory is used a second time
        total = sum(storages.values())
        del out
        return total

    return {"bytes_per_image": kept(3) - kept(2)}


def outputs(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """Scores and metrics of a large test set, from stored outputs."""
    from torch import nn

    from backmix.train.judge import judge, scored
    from backmix.train.outputs import Spool, load_outputs, outputs_of, store
    from bench.bench_scores import made

    head = nn.Linear(size.channels, size.classes)
    random = np.random.default_rng(0)
    some = {
        "logits": random.standard_normal((size.batch, size.classes), np.float32),
        "features": random.standard_normal((size.batch, size.channels), np.float32),
        "labels": random.integers(0, size.classes, size.batch),
        "index": np.arange(size.batch),
    }

    def published(form: str, call: Callable[[], Any], **more: Any) -> Any:
        with watched() as most:
            found, times = timed(call)
        publish(form, times, **most, **more)
        return found

    path = folder / "spooled.safetensors"
    with Spool(folder) as spool:

        def fill() -> dict[str, np.ndarray]:
            for _ in range(-(-size.test // size.batch)):
                spool.add(some)
            return spool.arrays()

        arrays = published("outputs: spool", fill)
    spooled = outputs_of(arrays, name="spooled", kind="known", files=(), digest="", bad=())
    published("outputs: store", lambda: store(path, spooled))
    published("outputs: map", lambda: load_outputs(path), bytes=path.stat().st_size)
    path.unlink()
    known = made(folder, "known", size.test, head, 1)
    # As unknown images, other ones with weaker features.
    unknown = made(folder, "unknown", size.test, head, 2)
    unknown = replace(unknown, labels=np.full(len(unknown), -1), logits=0.8 * unknown.logits)
    sets = [
        published(f"outputs: scores of the {name} set", lambda one=one: scored(one, "", head))
        for name, one in (("known", known), ("unknown", unknown))
    ]
    published("outputs: metrics, all scores", lambda: judge(sets[0], sets[1:]))


def evaluate(size: Size, data: Path, folder: Path, publish: Publish) -> None:
    """The real command on a large test set; its loader and its network alone."""
    small = repeated(data, folder / "train.beton", size.classes, size.classes, size.stored)
    run = folder / "evaluated"
    words = _train_words(size, small, run, "imagenet-rn50-16-softmax", epochs=1)
    ended(started(*words), 0)
    test = repeated(data, folder / "test.beton", size.test, size.classes, size.stored)
    began = time.perf_counter()
    process = started(
        *("-m", "backmix", "evaluate", run, "--test", test, "--unknown", f"again={small}"),
        *("--device", "cpu", "--batch", size.batch, "--threads", 1, "--model", SMALL_NET),
    )
    with watched(process.pid) as most:
        ended(process, 0)
    whole = 1e3 * (time.perf_counter() - began)
    passes = [json.loads(line) for line in (run / "time.jsonl").read_text().splitlines()]
    known = next(row for row in passes if row.get("set") == "known")
    alone = loader_alone(test, size), network_alone(run, size)
    publish(
        "backmix evaluate, the whole command",
        [whole],
        **most,
        target_mib=MOST_MIB,
        bytes=(run / "scores" / "known.safetensors").stat().st_size,
    )
    publish(
        "backmix evaluate, its pass",
        [1e3 * known["seconds"]],
        **{key: value for key, value in known.items() if key not in ("event", "set")},
        loader_alone_images_per_s=round(alone[0], 1),
        network_alone_images_per_s=round(alone[1], 1),
    )
    shutil.rmtree(run)


def loader_alone(data: Path, size: Size) -> float:
    """Return the images a second of the loader of an evaluation, with nobody beside it."""
    options = LoaderOptions(
        loader="turbo", batch=size.batch, size=size.view, crop="random", threads=1
    )
    with open_loader(data, options, split="eval") as loader:
        batches = loader.batches(Place(0))
        next(batches)
        began, images = time.perf_counter(), 0
        for batch in islice(batches, size.steps):
            images += len(batch)
        return images / max(time.perf_counter() - began, 1e-9) if images else 0.0


def network_alone(run: Path, size: Size) -> float:
    """Return the images a second of a run's network on views that are there, one thread."""
    from backmix.train.trained import load_model

    torch.set_num_threads(1)
    model = load_model(run, SMALL_NET)
    views = torch.zeros(size.batch, 3, size.view, size.view)
    views = views.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(views)
        times = timed(lambda: model(views), size.repeats)[1]
    return 1e3 * size.batch / statistics.median(times)


PARTS: Mapping[str, Callable[[Size, Path, Path, Publish], None]] = {
    "reading": reading,
    "start": start,
    "train": train,
    "state": state,
    "outputs": outputs,
    "evaluate": evaluate,
}


# --- rows -----------------------------------------------------------------------------------------


def publisher(file: rows.Rows | None, case: str) -> Publish:
    """Return what prints a figure, with its target, and writes its row."""

    def publish(form: str, ms: Sequence[float], **figures: Any) -> None:
        load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        said = [f"{statistics.median(ms):12,.1f} ms"] if ms else [" " * 15]
        said += [f"{key} {value:,}" for key, value in figures.items()]
        reached = ms and figures.get("target") and statistics.median(ms) < figures["target"]
        reached = reached or figures.get("own_mib", 1e9) < figures.get("target_mib", 0)
        if "target" in figures or "target_mib" in figures:
            said.append("target reached" if reached else "TARGET MISSED")
        print(f"{form:42} {'  '.join(said)}", flush=True)
        if file is not None:
            times = rows.Times(list(ms)).row if ms else {}
            file.write(
                form=form,
                case=case,
                config=figures,
                note=f"{NOTE}; {load}",
                **times,
            )

    return publish


NOTE = (
    f"repeated images of at most {SIDE} px; the network of `train` and `evaluate` is small_net.py; "
    "one decoding thread and one of arithmetic"
)


def main() -> int:
    """Make the set, run the parts one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, help="folder for a new file of rows")
    parser.add_argument("--data", type=Path, help="take the images of this .beton [made]")
    parser.add_argument("--part", action="append", choices=PARTS, help="several times; [all]")
    parser.add_argument("--samples", type=int, help=f"[{Size.samples:,}]")
    parser.add_argument("--work", type=Path, help="where the files lie meanwhile [a tempdir]")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    size = replace(size, samples=options.samples or size.samples)
    torch.set_num_threads(1)
    case = f"{size.samples:,} samples, {size.classes:,} classes"
    facts = {"bench": STAGE, "stage": STAGE} | rows.machine("cpu")
    if options.one:
        part, data, folder, out = options.one
        file = rows.Rows(Path(out), facts) if out else None
        PARTS[part](size, Path(data), Path(folder), publisher(file, case))
        return 0

    out = ""
    if options.results is not None:
        out = str(options.results / f"cpu-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{STAGE}.jsonl")
    with tempfile.TemporaryDirectory(prefix="backmix-bench-", dir=options.work) as name:
        folder = Path(name)
        source = options.data or made_images(folder, size.stored)
        publish = publisher(rows.Rows(Path(out), facts) if out else None, case)
        data, times = timed(
            lambda: repeated(source, folder / "set.beton", size.samples, size.classes, size.stored)
        )
        publish("write the set", times, bytes=data.stat().st_size)
        command = [sys.executable, "-m", "bench.synthetic", "--samples", str(size.samples)]
        command += ["--tiny"] * options.tiny
        for part in options.part or PARTS:
            inside = folder / part
            inside.mkdir()
            done = subprocess.run(
                [*command, "--one", part, str(data), str(inside), out],
                env=environment(),
                cwd=ROOT,
                check=False,
            )
            if done.returncode:
                print(f"{part}: failed", file=sys.stderr)
                return 1
            shutil.rmtree(inside)
    if out:
        print(f"rows: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
