"""A random Qwen2-VL: text model of Qwen2-0.5B, tower of Qwen2-VL, tokens of its vocabulary; 4.6 GB of float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

VOCABULARY = 151936
SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def config_of(layers: int, depth: int) -> dict[str, Any]:
    """``config.json`` as the published one is written, with ``layers`` decoder layers and a tower of ``depth``."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "bos_token_id": SPECIALS["<|endoftext|>"],
        "eos_token_id": SPECIALS["<|im_end|>"],
        "vision_start_token_id": SPECIALS["<|vision_start|>"],
        "vision_end_token_id": SPECIALS["<|vision_end|>"],
        "vision_token_id": SPECIALS["<|vision_pad|>"],
        "image_token_id": SPECIALS["<|image_pad|>"],
        "video_token_id": SPECIALS["<|video_pad|>"],
        "vision_config": {
            "depth": depth,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 896,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def write(folder: Path, layers: int, depth: int) -> None:
    """Checkpoint with tokenizer, processor settings and chat template, as float32, seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(config_of(layers, depth), indent=2))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # wider than the default, so that attention is not uniform
            if parameter.ndim >= 2 and "language_model" in name and "embed" not in name:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = SPECIALS["<|im_end|>"]
    model.save_pretrained(folder, max_shard_size="20GB")
    config.write_text(json.dumps(config_of(layers, depth), indent=2))  # not today's form, which peers cannot all read
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def write_tokenizer(folder: Path) -> None:
    """A token for every byte, one merge (converters want some), and words nobody writes up to the vocabulary's end, so
    that every id that a random model says has a text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    tokens += [f"Ġw{index}" for index in range(len(tokens), SPECIALS["<|endoftext|>"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inverse = {index: token for token, index in SPECIALS.items()}
    names = [inverse.get(index, f"<|reserved_{index}|>") for index in range(len(tokens), VOCABULARY)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
