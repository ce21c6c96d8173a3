"""An HTTP service around one exported file: images in, decisions out.

pip install 'backmix[onnx]' fastapi uvicorn python-multipart
BACKMIX_MODEL=model.onnx uvicorn --factory serve_app:create_app --port 8000
curl -F images=@a.jpg -F images=@b.jpg http://localhost:8000/decide
"""

import os
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import backmix

MOST_IMAGES = 64
"""In a request."""
MOST_BYTES = 32 * 2**20
"""Of a request: what the process holds of one upload."""
MOST_PIXELS = 50_000_000
"""Of an image; its header says how many it has, and a larger one is not decoded."""


class UploadLimit:
    """Ends a request that sends more than it may, whatever its header promised."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what comes in while the service reads it."""
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise HTTPException(413, f"a request has at most {self.most:,} bytes")
            return message

        await self.app(scope, counted, send)


def create_app() -> FastAPI:
    """Open the file that BACKMIX_MODEL names and return the service; a wrong file ends it here."""
    path = os.environ.get("BACKMIX_MODEL", "")
    if not path:
        raise SystemExit("error: set BACKMIX_MODEL to an exported file, such as model.onnx")
    try:
        model = backmix.load(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error  # not a traceback: the reason is enough
    app = FastAPI(title="backmix")
    app.add_middleware(UploadLimit, most=MOST_BYTES)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Say what decides: a load balancer reads the status, a person the rest."""
        record = model.record
        return {
            "status": "ok",
            "score": record.score,
            "thresholds": dict(zip(model.classes, record.rule.thresholds.tolist(), strict=True)),
            "reject_rate": record.rate,
            "weights": record.weights,
        }

    @app.post("/decide")
    async def decide(request: Request) -> list[dict[str, Any]]:
        """Decide about the images of a form, in their order; all of them, or none."""
        async with request.form(max_files=MOST_IMAGES, max_fields=0) as form:
            parts = form.multi_items()
            uploads = [x for name, x in parts if name == "images" and isinstance(x, UploadFile)]
            if not uploads or len(uploads) != len(parts):
                raise HTTPException(422, "send files, at least one, each under the name images")
            names = [upload.filename or "" for upload in uploads]
            images = [await upload.read() for upload in uploads]
        # The network runs in a thread: the service answers others meanwhile.
        decided = await run_in_threadpool(model.predict, images, limit_pixels=MOST_PIXELS)
        pairs = list(zip(names, decided, strict=True))
        bad = [{"file": name, "reason": d.reason} for name, d in pairs if d.decision == "error"]
        if bad:
            raise HTTPException(422, bad)
        return [decision.row(name) for name, decision in pairs]

    return app
