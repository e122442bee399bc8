"""Small random checkpoints made on the spot: nothing is downloaded, every file a real checkpoint has is there."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vlmtrim.export.tracing.text_models import in_language_model

SPECIALS = ("<s>", "</s>", "<pad>", "<image>")
SPECIAL_IDS = {token: 256 + index for index, token in enumerate(SPECIALS)}  # behind the bytes
CLIP_COLOURS = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF_COLOURS = {**CLIP_COLOURS, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # SigLIP's
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

VIDEO_TEMPLATE = (  # leaves pictures and videos in their places
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'video') %}{{ '<' + content['type'] + '>\\n' }}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_checkpoint(family: Any, folder: Path, seed: int = 0, **variant: Any) -> Path:
    """Write a random float32 checkpoint of a family with tokenizer, image-processor settings and chat template."""
    config = family.tiny_config(**variant)
    torch.manual_seed(seed)
    model = family.MODEL_CLASS(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default initialisation makes attention nearly uniform; wider weights make scores differ.
            if parameter.ndim >= 2 and in_language_model(name):
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            elif parameter.numel() == 1:  # gates start closed, which would hide everything behind them
                parameter.uniform_(0.3, 1.0)
            elif parameter.ndim >= 2 and not parameter.any():  # learned positions that start equal
                parameter.normal_()
            elif name.endswith("norm.weight") and not parameter.any():  # of norms that scale by 1 + weight
                parameter.uniform_(-0.5, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_processor(family, folder, config, SPECIAL_IDS)
    return folder


def write_processor(family: Any, folder: Path, config: Any, specials: dict[str, int]) -> None:
    """Tokenizer, image-processor settings and chat template for a config; ``specials`` are the ids of SPECIALS."""
    write_tokenizer(folder, specials)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    family.write_tiny_processor(folder, config)  # may replace them


def write_words_with_videos(folder: Path, config: Any) -> None:
    """Tokenizer with a config's marks of pictures and of videos, and a template that writes both."""
    text = config.text_config
    marks = {"<s>": text.bos_token_id, "</s>": text.eos_token_id, "<pad>": text.pad_token_id}
    write_tokenizer(folder, {**marks, "<image>": config.image_token_id, "<video>": config.video_token_id})
    (folder / "chat_template.jinja").write_text(VIDEO_TEMPLATE)


def write_settings(folder: Path, image_processor: dict[str, Any], processor: dict[str, Any]) -> None:
    """The two files of settings that a family's processor consists of."""
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


def write_tokenizer(folder: Path, specials: dict[str, int], image_token: str = "<image>") -> None:
    """Byte-level tokenizer without merges: a token for every byte, at the lowest ids that are free."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    free = (index for index in count() if index not in specials.values())
    vocabulary = {**dict(zip(alphabet, free, strict=False)), **specials}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": image_token,
        "extra_special_tokens": {"image_token": image_token},
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
