"""OpenVINO GenAI's VLMPipeline; load: ``model``, ``precision`` (its own choice, or f32); ask: ``pruned`` percent."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]
import wire


def load(request: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": wire.THREADS}
    if request.get("precision"):
        settings |= {"INFERENCE_PRECISION_HINT": request["precision"], "KV_CACHE_PRECISION": request["precision"]}
    pipeline = genai.VLMPipeline(request["model"], "CPU", **settings)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        turn = request["turn"]
        (width, height), data = wire.picture(request)
        picture = ov.Tensor(np.frombuffer(data, np.uint8).reshape(1, height, width, 3).copy())
        config = pipeline.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = request["new_tokens"], True, False
        config.apply_chat_template = False
        config.pruning_ratio = request.get("pruned", 0)
        times: list[float] = []

        def arrived(_: str) -> Any:
            times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        start = time.perf_counter()
        done = pipeline.generate(
            wire.prompt(turn, "<ov_genai_image_0>"), images=[picture], generation_config=config, streamer=arrived
        )
        metrics = done.perf_metrics
        made = metrics.get_num_generated_tokens()
        # The streamer holds texts back until they are whole; the pipeline's own clock does not.
        return {
            "ttft": metrics.get_ttft().mean / 1000,
            "rate": 1000 / metrics.get_tpot().mean,
            "new": made,
            "text": done.texts[0],
            "first_text": times[0] - start,
            "whole": time.perf_counter() - start,
            "tokens": metrics.get_num_input_tokens(),
            "vision": metrics.get_prepare_embeddings_duration().mean / 1000,
        }

    return ask


if __name__ == "__main__":
    wire.serve(load)
