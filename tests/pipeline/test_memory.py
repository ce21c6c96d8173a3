"""Memory does not grow with the data: ten gigabytes are converted and read back in `make soak`."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backmix.pipeline.beton import open_beton
from tests.images import encoded, jpeg, write_files

ROOT = Path(__file__).resolve().parents[2]
SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
GIB = 1 << 30

CONVERT = """
import sys
from pathlib import Path
from backmix.pipeline.convert import convert
from backmix.pipeline.options import ConvertOptions

print(convert(f"folder:{sys.argv[1]}", Path(sys.argv[2]), ConvertOptions(workers=4)))
"""

READ = """
import sys
from backmix.pipeline.batch import Place
from backmix.pipeline.loader import open_loader
from backmix.pipeline.options import LoaderOptions

options = LoaderOptions(loader="turbo", batch=64, size=224, crop="random", threads=4)
with open_loader(sys.argv[2], options) as loader:
    print(sum(len(batch) for batch in loader.batches(Place(0))))
"""

VERIFY = """
import sys
from backmix.pipeline.inspect import verify

print(verify([sys.argv[2]]))
"""


def processes(pid: int) -> Iterator[int]:
    """Yield a process and all that it started, and so on."""
    yield pid
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            yield from processes(int(child))


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children that are no pages of files."""
    total = 0
    for one in processes(pid):
        for line in Path(f"/proc/{one}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
    return total


def peak_of(code: str, *arguments: Path) -> tuple[int, str]:
    """Run a program; return its greatest resident memory [bytes], and what it printed."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    ) as process:
        peak = 0
        try:
            while process.poll() is None:
                try:
                    peak = max(peak, resident(process.pid))
                except OSError:  # one of them has just ended
                    pass
                time.sleep(0.05)
        except BaseException:
            process.kill()
            raise
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said
    return peak, said.strip()


def many_images(folder: Path, size: int) -> int:
    """Fill a folder with links to images that take so many bytes as stored; return how many.

    Half of the bytes come from JPEGs of noise, which are copied, half from PNGs, stored as pixels.
    """
    random = np.random.default_rng(0)
    streams = {}
    for k in range(8):
        noise = random.integers(0, 256, (600, 600 + k, 3), np.uint8)
        streams[f"{k}.jpg"] = jpeg(noise, quality=92)
        flat = np.full((1000, 1000 + k, 3), 30 * k, np.uint8)
        streams[f"{k}.png"] = encoded(Image.fromarray(flat), "PNG")
    write_files(folder / "few", streams)
    stored = {"jpg": len(streams["0.jpg"]), "png": 3_000_000}
    count = 0
    for kind, each in stored.items():
        (folder / "set" / kind).mkdir(parents=True)
        for i in range(size // 2 // each):
            (folder / "set" / kind / f"{i:06}.{kind}").symlink_to(
                folder / "few" / f"{i % 8}.{kind}"
            )
            count += 1
    return count


@pytest.mark.slow  # converts and reads 10 GB
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not SOAK, reason="10 GB on disk: part of make soak only, not run")
def test_ten_gigabytes_take_less_than_one_of_memory(tmp_path: Path) -> None:
    size = int(float(os.environ.get("BACKMIX_SOAK_GB", "10")) * 1e9)
    if shutil.disk_usage(tmp_path).free < 2 * size:
        pytest.skip(f"less than {2 * size:,} bytes are free in {tmp_path}: not run")
    out = tmp_path / "large.beton"
    try:
        count = many_images(tmp_path, size)
        for what, code in {"convert": CONVERT, "read": READ, "verify": VERIFY}.items():
            peak, said = peak_of(code, tmp_path / "set", out)
            print(f"{what}: {peak / 2**20:.0f} MiB resident; {said}")
            assert peak < GIB, f"{what} took {peak:,} bytes"
            if what == "read":
                assert said == str(count)
        assert out.stat().st_size > 0.95 * size
        with open_beton(out) as data:
            assert data.n == count
    finally:
        shutil.rmtree(tmp_path)


def test_the_meter_counts_children_and_no_mapped_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    code = f"""
import mmap, subprocess, sys
held = open({str(tmp_path / "file")!r}, "rb")
mapped = mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[::4096])
inner = "import time; held = b'x' * (100 << 20); time.sleep(1.5)"
subprocess.run([sys.executable, "-c", inner])
"""
    peak, _ = peak_of(code)
    assert 100 << 20 < peak < 150 << 20
