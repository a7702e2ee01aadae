"""Peer: plain FastAPI without batching, as a first version of a service is written.

The model runs on the event loop with all cores. A thread pool costs more than it gains; two worker processes with a thread each
need less processor time per image but answer a single caller more slowly.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI

from benchmarks.peers.classifier import Classifier

app = FastAPI()
classifier = Classifier(largest=1)


@app.post("/classify")
async def classify(body: Annotated[bytes, Body(media_type="image/png")]) -> dict[str, Any]:
    """Answer one PNG file."""
    return classifier.answers([body])[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PEER_PORT"]), access_log=False)
