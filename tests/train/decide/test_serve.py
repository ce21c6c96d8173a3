"""The service of docs/serve.md: in its own process' words, and as a real server."""

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import backmix
from tests.train.decide.calibrated import CLASSES, pictures

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "docs" / "examples"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def model(exported: dict[str, Path]) -> Path:
    return exported[".onnx"]


@pytest.fixture(scope="module")
def service() -> Any:
    spec = importlib.util.spec_from_file_location("serve_app", EXAMPLES / "serve_app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(model: Path, service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from starlette.testclient import TestClient

    monkeypatch.setenv("BACKMIX_MODEL", str(model))
    return TestClient(service.create_app())


def form(*images: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", image) for image in images]


def test_a_batch_of_images_is_decided_about(client: Any, model: Path) -> None:
    images = [png(image) for image in pictures(20, seed=4)]
    files = form(*((f"{number}.png", image) for number, image in enumerate(images)))
    answer = client.post("/decide", files=files)
    assert answer.status_code == 200
    expected = backmix.load(model).predict(images)
    assert answer.json() == [
        decision.row(f"{number}.png") for number, decision in enumerate(expected)
    ]
    assert {row["decision"] for row in answer.json()} == {"accept", "reject"}


def test_a_bad_image_is_named_with_the_reason(client: Any, service: Any) -> None:
    good = png(pictures(1)[0])
    bad = {"torn.png": good[:60], "text.jpg": b"no image", "empty.png": b""}
    files = form(("good.png", good), *bad.items())
    answer = client.post("/decide", files=files)
    assert answer.status_code == 422
    assert [problem["file"] for problem in answer.json()["detail"]] == list(bad)
    assert all(problem["reason"] for problem in answer.json()["detail"])
    assert client.post("/decide", files=form(("good.png", good))).status_code == 200


def test_requests_have_limits(
    client: Any, service: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = png(pictures(1)[0])
    many = form(*[("a.png", good)] * (service.MOST_IMAGES + 1))
    answer = client.post("/decide", files=many)
    assert answer.status_code == 400 and "Maximum number of files is 64" in answer.text
    large = form(("a.png", b"\0" * service.MOST_BYTES))
    answer = client.post("/decide", files=large)
    assert answer.status_code == 413 and "at most 33,554,432 bytes" in answer.text

    def unsaid() -> Iterator[bytes]:  # without a length in the header
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(33):
            yield b"\0" * 2**20

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/decide", content=unsaid(), headers=headers).status_code == 413
    monkeypatch.setattr(service, "MOST_PIXELS", 255)
    answer = client.post("/decide", files=form(("a.png", good)))
    assert answer.status_code == 422 and "255" in answer.text
    for files in ([("images", (None, "text"))], [("others", ("a.png", good))], []):
        answer = client.post("/decide", files=files)
        assert 400 <= answer.status_code < 500, answer.text


def test_health_says_what_decides(client: Any, model: Path) -> None:
    record = backmix.load(model).record
    assert client.get("/health").json() == {
        "status": "ok",
        "score": "max_logit",
        "thresholds": dict.fromkeys(CLASSES, record.rule.categories[0].threshold),
        "reject_rate": "0.3",
        "weights": record.weights,
    }


def test_a_service_without_its_file_does_not_start(
    service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no network")
    monkeypatch.setenv("BACKMIX_MODEL", str(tmp_path / "model.onnx"))
    with pytest.raises(SystemExit, match=r"is damaged, or no \.onnx file"):
        service.create_app()
    monkeypatch.delenv("BACKMIX_MODEL")
    with pytest.raises(SystemExit, match="set BACKMIX_MODEL"):
        service.create_app()


def test_the_command_of_the_page_ends_with_the_reason_alone(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), str(EXAMPLES)])
    gone = tmp_path / "gone.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "--factory", "serve_app:create_app", "--port", "0"],
        env=os.environ | {"BACKMIX_MODEL": str(gone), "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(gone) in line


def test_the_command_of_the_page_serves(model: Path) -> None:
    """A real server process, as docs/serve.md starts it, asked over a socket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["uvicorn", "--factory", "serve_app:create_app", "--port", str(port)]
    assert "uvicorn --factory serve_app:create_app --port" in (ROOT / "docs/serve.md").read_text()
    paths = os.pathsep.join([str(ROOT / "src"), str(EXAMPLES)])
    environment = os.environ | {"BACKMIX_MODEL": str(model), "PYTHONPATH": paths}
    server = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        where = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, server.stderr and server.stderr.read()
            try:
                with urllib.request.urlopen(f"{where}/health") as answer:
                    assert json.load(answer)["status"] == "ok"
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        image = png(pictures(1)[0])

        def ask(data: bytes) -> Any:
            head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            body = head + data + b"\r\n--x--\r\n"
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            request = urllib.request.Request(f"{where}/decide", body, headers)
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)

        assert ask(image) == [backmix.load(model).predict(image)[0].row("a")]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(b"no image")
        assert refused.value.code == 422 and "a" in json.load(refused.value)["detail"][0]["file"]
        refused.value.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_a_file_is_used_without_backmix(model: Path, tmp_path: Path) -> None:
    """The program of docs/decide.md, in a process that cannot import backmix."""
    images = pictures(6, seed=9)
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png(image))
    program = (EXAMPLES / "onnx_alone.py").read_text()
    shown = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/decide.md").read_text(), re.M | re.S)
    assert any(program.endswith(f"\n{block}") for block in shown)
    code = f"import sys; sys.modules['backmix'] = sys.modules['torch'] = None\n{program}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(model), *map(str, paths)],
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    expected = backmix.load(model).predict(list(images))
    lines = [
        f"{path} {decision.class_name} {decision.p_value:.4f} {decision.accepted}"
        for path, decision in zip(paths, expected, strict=True)
    ]
    assert done.stdout.splitlines() == lines
