"""The demo model before training: its configuration, its tokenizer and its processor, all of transformers' classes."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmtrim.export.demo import task
from vlmtrim.export.demo.scene import PATCH, SIZE

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] != 'system' %}{{ message['role'] | upper }}{{ ': ' }}{% endif %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{{ ' ' }}{% endfor %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt(question: str) -> str:
    """What the chat template makes of one picture and one question."""
    return f"USER: <image>\n{question} ASSISTANT:"


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template of the demo model."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int = 8) -> LlavaForConditionalGeneration:
    """An untrained model with so many decoder layers.

    The last layer of its vision tower is never used, as in LLaVA (features of layer -2).
    """
    special = tokenizer.get_vocab()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=special["<s>"],
        eos_token_id=special["</s>"],
        pad_token_id=special["<pad>"],
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=special["<image>"],
            image_seq_length=(SIZE // PATCH) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE of Llama's kind, in which every word of the task is one token."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = _splitter()
    corpus = [
        prompt(question.text).replace("<image>", "") + " " + question.answer
        for seed in range(1000)
        for question in task.questions(task.scene_of(seed, "train"), task.generator(seed, "train", 1))
    ]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=4096, show_progress=False, initial_alphabet=alphabet)  # type: ignore[call-arg]
    trained.train_from_iterator([*corpus, *task.ANSWERS], trainer)
    bpe = json.loads(trained.to_str())["model"]
    pieces = [piece for piece in sorted(bpe["vocab"], key=bpe["vocab"].get) if piece != "\n"]
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in bpe["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    """Words keep the space before them as ▁; marks and line ends stand alone."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"[?,.!\n]"), "isolated"),
        ]
    )
