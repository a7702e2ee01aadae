"""Calls of KServe's own client, for an environment that has it; prints what it got as JSON.

Run by test_kserve_client.py: ``python kserve_calls.py URL FILE.npz`` with pixels ``(N, 3, H, W)`` uint8 in the file.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(values: np.ndarray, binary: bool, outputs: list[RequestedOutput] | None = None) -> InferRequest:
    """One tensor, in JSON or as bytes."""
    datatype = {"uint8": "UINT8", "float32": "FP32"}[values.dtype.name]
    tensor = InferInput("images", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return InferRequest("palisade", [tensor], request_id="r1", request_outputs=outputs)


async def calls(url: str, pixels: np.ndarray) -> dict[str, Any]:
    """Everything that the client can ask."""
    floats = pixels.astype(np.float32) / np.float32(255)
    binary = [RequestedOutput(name, {"binary_data": True}) for name in ("probabilities", "class_id")]
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": await client.is_model_ready(url, "palisade"),
            "other_ready": await client.is_model_ready(url, "other"),
            "answers": [],
        }
        for values in (pixels, floats):
            for one in (request(values, False), request(values, True), request(values, True, binary)):
                reply = await client.infer(url, one, model_name="palisade")
                outputs = {output.name: output.as_numpy().tolist() for output in reply.outputs}
                found["answers"].append({"id": reply.id, "model": reply.model_name, **outputs})
        try:
            await client.infer(url, request(pixels[:, :, :-1], True), model_name="palisade")
        except httpx.HTTPStatusError as error:
            found["error"] = str(error)
    return found


if __name__ == "__main__":
    with np.load(sys.argv[2], allow_pickle=False) as arrays:
        print(json.dumps(asyncio.run(calls(sys.argv[1], arrays["pixels"]))))
