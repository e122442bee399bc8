"""PyTorch through transformers, float32, SDPA; load: ``checkpoint``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import wire
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration


def load(request: dict[str, Any]) -> Any:
    torch.set_num_threads(wire.THREADS)
    torch.set_grad_enabled(False)
    folder = request["checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(folder)  # the whole processor wants torchvision, for videos
    processor = AutoImageProcessor.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tower: list[float] = []
    model.model.visual.register_forward_pre_hook(lambda *_: tower.append(-time.perf_counter()))
    model.model.visual.register_forward_hook(lambda *_: tower.append(tower.pop() + time.perf_counter()))

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        turn = request["turn"]
        picture = Image.frombytes("RGB", *wire.picture(request))
        seen: dict[str, int] = {}
        said: list[Any] = []

        def tokens() -> Iterator[Any]:
            inputs = processor(images=[picture], return_tensors="pt")
            visual = int(inputs["image_grid_thw"].prod()) // processor.merge_size**2
            text = wire.prompt(turn, "<|vision_start|>" + "<|image_pad|>" * visual + "<|vision_end|>")
            inputs["input_ids"] = tokenizer(text, return_tensors="pt")["input_ids"]
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
            seen.update(tokens=inputs["input_ids"].shape[1], visual=visual, kept=visual)
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            said.append(token := out.logits[:, -1:].argmax(-1))
            yield
            for _ in range(request["new_tokens"] - 1):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                said.append(token := out.logits[:, -1:].argmax(-1))
                yield

        found = wire.timed(time.perf_counter(), tokens())
        return {**found, **seen, "text": tokenizer.decode([int(token) for token in said]), "vision": tower.pop()}

    return ask


if __name__ == "__main__":
    wire.serve(load)
