"""Tiny random text models of transformers, and decoders that others' exporters make of them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

LAYERS, HIDDEN, HEADS, KV, DH, VOCABULARY = 4, 64, 4, 2, 16, 50
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# A window that prompts and answers of the tests outgrow, caps that bend, layers of both kinds.
GEMMA = {
    "head_dim": DH,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}


class Capped(torch.nn.Module):
    """A head whose logits are bent to stay below a cap."""

    def __init__(self, head, cap):
        super().__init__()
        self.head, self.cap, self.weight = head, cap, head.weight

    def forward(self, states):
        """See the class."""
        return torch.tanh(self.head(states) / self.cap) * self.cap


def text_model(family: str, implementation: str = "eager"):
    """(text model, its head) with random weights."""
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if family == "qwen2_vl":
        sections = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = transformers.Qwen2VLConfig(
            text_config={**COMMON, "rope_parameters": sections}, vision_config={"depth": 1}
        )
        config._attn_implementation = implementation
        model = transformers.Qwen2VLForConditionalGeneration(config).eval()
        return model.model.language_model, model.lm_head, model
    more = GEMMA if family.startswith("Gemma") else {}
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**COMMON, **more}, attn_implementation=implementation)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("norm.weight") and more:  # zeros by default, of which 1 + w tells nothing
            torch.nn.init.normal_(value, std=0.2)
    return model.model, Capped(model.lm_head, config.final_logit_softcapping) if more else model.lm_head, model


class Stepping(torch.nn.Module):
    """What optimum traces: embeddings, mask, positions and caches in; logits and caches out."""

    def __init__(self, text, head):
        super().__init__()
        self.text, self.head = text, head

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        """See the class."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        caches = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return self.head(out.last_hidden_state), *caches


def by_torch(text, head, path: Path, dynamo: bool, opset: int, axes: int = 0) -> Path:
    """``torch.onnx.export``, by tracing as optimum does or by torch.export; in the dtype of the weights."""
    like, dtype = text.config, head.weight.dtype
    width = getattr(like, "head_dim", None) or like.hidden_size // like.num_attention_heads
    past = [torch.randn(2, like.num_key_value_heads, 3, width, dtype=dtype) for _ in range(2 * like.num_hidden_layers)]
    at = torch.arange(3, 8).expand(*([axes] if axes else []), 2, 5).contiguous()
    arguments = (torch.randn(2, 5, like.hidden_size, dtype=dtype), torch.ones(2, 8, dtype=torch.int64), at, *past)
    kinds = [f"{layer}.{kind}" for layer in range(like.num_hidden_layers) for kind in ("key", "value")]
    given = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)]
    returned = ["logits", *(f"present.{kind}" for kind in kinds)]
    common = {"input_names": given, "output_names": returned, "opset_version": opset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            auto = torch.export.Dim.DYNAMIC
            shapes = (
                {0: auto, 1: auto},
                {0: auto, 1: auto},
                {0: auto, 1: auto},
                tuple({0: auto, 2: auto} for _ in past),
            )
            torch.onnx.export(
                Stepping(text, head), arguments, path, dynamic_shapes=shapes, dynamo=True, verbose=False, **common
            )
        else:
            two = {0: "batch_size", 1: "sequence_length"}
            dims = {"inputs_embeds": two, "attention_mask": {0: "batch_size", 1: "total"}, "logits": two}
            dims["position_ids"] = {axis + bool(axes): name for axis, name in two.items()}
            dims |= {name: {0: "batch_size", 2: "past"} for name in given[3:]}
            dims |= {name: {0: "batch_size", 2: "past + sequence"} for name in returned[1:]}
            torch.onnx.export(Stepping(text, head), arguments, path, dynamic_axes=dims, dynamo=False, **common)
    return path


def by_mobius(text, head, path: Path, provider: str, family: str = "llava") -> Path:
    """mobius-onnx: built without weights, and filled with the model's."""
    mobius = pytest.importorskip("mobius", reason="mobius-onnx is not installed (extra peers)")
    from mobius.models import llava, qwen_vl

    vision = mobius.VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision.image_size, vision.patch_size = 28, 14
    like, names = text.config, [name for name in COMMON if name not in ("bos_token_id", "initializer_range")]
    sizes = {name: getattr(like, name) for name in names} | {"pad_token_id": 0, "rms_norm_eps": like.rms_norm_eps}
    extra = {"mrope_section": [2, 3, 3], "attn_qkv_bias": True} if family == "qwen-vl" else {}
    head_dim = like.hidden_size // like.num_attention_heads
    config = mobius.ArchitectureConfig(
        **sizes, head_dim=head_dim, hidden_act="silu", image_token_id=40, rope_type="default", vision=vision, **extra
    )
    module = (qwen_vl.Qwen25VLCausalLMModel if family == "qwen-vl" else llava.LLaVAModel)(config)
    task = "qwen-vl" if family == "qwen-vl" else "vision-language"
    decoder = mobius.build_from_module(module, config, task=task, execution_provider=provider)["decoder"]
    weights = {f"model.{name}": value for name, value in text.state_dict().items()} | {"lm_head.weight": head.weight}
    for name, value in decoder.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(weights[name.removeprefix("decoder.")].detach().numpy(), name=name)
    ir.save(decoder, path)
    return path


def parts_by_mobius(full, folder: Path, family: str) -> dict[str, Path]:
    """The three graphs of mobius-onnx, of "llava" or "gemma3", with the weights of a whole model."""
    mobius = pytest.importorskip("mobius", reason="mobius-onnx is not installed (extra peers)")
    from mobius.models import gemma3, llava

    config = _mobius_config(mobius, full, family)
    module = (gemma3.Gemma3MultiModalModel if family == "gemma3" else llava.LLaVAModel)(config)
    package = mobius.build_from_module(module, config, task="vision-language", execution_provider="default")
    theirs = {"vision_encoder.vision_tower.vision_model.": "vision_tower.", "vision_encoder.": ""}
    theirs |= {"embedding.embed_tokens": "language_model.embed_tokens", "decoder.model.": "language_model."}
    fully = {"up_proj": "fc1", "down_proj": "fc2"}  # of the tower
    weights = {**full.model.state_dict(), "decoder.lm_head.weight": full.lm_head.weight}
    paths = {"vision_encoder": folder / "vision.onnx"}
    paths |= {name: folder / f"{name}.onnx" for name in ("embedding", "decoder")}
    for part, path in paths.items():
        names = {**theirs, **fully} if part == "vision_encoder" else theirs
        for name, value in package[part].graph.initializers.items():
            if value.const_value is None:
                key = functools.reduce(lambda key, pair: key.replace(*pair), names.items(), name)
                value.const_value = ir.tensor(weights[key].detach().numpy(), name=name)
        ir.save(package[part], path)
    return {"vision": paths["vision_encoder"], "embedding": paths["embedding"], "decoder": paths["decoder"]}


def _mobius_config(mobius, full, family: str):
    """What it builds the model from."""
    text, tower = full.config.text_config, full.config.vision_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    vision = mobius.VisionConfig(**{name: getattr(tower, name) for name in sizes}, norm_eps=tower.layer_norm_eps)
    vision.patch_size = tower.patch_size
    vision.mm_tokens_per_image = getattr(full.config, "mm_tokens_per_image", None)
    names = [name for name in COMMON if name not in ("bos_token_id", "initializer_range", "eos_token_id")]
    given = {name: getattr(text, name) for name in names} | {"rms_norm_eps": text.rms_norm_eps, "pad_token_id": 0}
    given |= {"head_dim": text.head_dim, "hidden_act": "silu", "rope_type": "default", "vision": vision}
    given["dtype"] = ir.DataType.FLOAT16 if full.dtype == torch.float16 else ir.DataType.FLOAT
    if family == "gemma3":
        rope = text.rope_parameters
        given |= {"layer_types": text.layer_types, "sliding_window": text.sliding_window, "attn_qk_norm": True}
        given |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        given |= {"rope_theta": rope["full_attention"]["rope_theta"], "hidden_act": text.hidden_activation}
        given |= {"rope_type": "linear", "rope_scaling": rope["full_attention"]}
    return mobius.ArchitectureConfig(**given, image_token_id=full.config.image_token_id)


class Features(torch.nn.Module):
    """What transformers.js's conversion takes of a LLaVA: the tower and the projector."""

    def __init__(self, full, flat: bool):
        super().__init__()
        self.full, self.flat = full, flat

    def forward(self, pixel_values):
        """[I, P, D], or [I * P, D]."""
        model, config = self.full.model, self.full.config
        states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        states = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
        features = model.multi_modal_projector(states)
        return features.flatten(0, 1) if self.flat else features


class Looked(torch.nn.Module):
    """Token embedding, alone or with features put into it."""

    def __init__(self, full):
        super().__init__()
        self.table, self.mark = full.get_input_embeddings(), full.config.image_token_id

    def forward(self, input_ids, image_features=None):
        """See the class."""
        embeds = self.table(input_ids)
        if image_features is None:
            return embeds
        return embeds.masked_scatter((input_ids == self.mark)[:, :, None].expand_as(embeds), image_features)


def parts_by_torch(full, folder: Path, flat: bool, merging: bool, opset: int = 17) -> dict[str, Path]:
    """Vision and embedding graph by ``torch.onnx.export``, traced."""
    size, paths = full.config.vision_config.image_size, (folder / "vision.onnx", folder / "embedding.onnx")
    dtype, width = full.dtype, full.config.text_config.hidden_size
    ids = torch.tensor([[1, full.config.image_token_id, 2]])
    plain = {"input_ids": {0: "batch", 1: "tokens"}, "inputs_embeds": {0: "batch", 1: "tokens"}}
    features = torch.randn(1, width, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, given, taken, returned, axes, path in (
            (
                Features(full, flat),
                (torch.randn(2, 3, size, size, dtype=dtype),),
                ["pixel_values"],
                "image_features",
                {"pixel_values": {0: "pictures"}, "image_features": {0: "features"}},
                paths[0],
            ),
            (
                Looked(full),
                (ids, features) if merging else (ids,),
                ["input_ids", "image_features"][: 1 + merging],
                "inputs_embeds",
                {**plain, **({"image_features": {0: "features"}} if merging else {})},
                paths[1],
            ),
        ):
            torch.onnx.export(
                module,
                given,
                path,
                input_names=taken,
                output_names=[returned],
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
    return dict(zip(("vision", "embedding"), paths, strict=True))


def by_genai(model, folder: Path, provider: str = "cpu", precision: str = "fp32") -> Path:
    """onnxruntime-genai's model builder, from a checkpoint folder."""
    builder = pytest.importorskip(
        "onnxruntime_genai.models.builder", reason="onnxruntime-genai is not installed (extra peers)"
    )
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source, target = folder / "checkpoint", folder / "genai"
    model.save_pretrained(source)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(source)
    options = {"exclude_embeds": True, "windowed_kv_cache": False}  # caches of a window are of fixed length
    given = (None, str(source), str(target), precision, provider, str(folder / "cache"))
    builder.check_extra_options(*given, options)
    builder.create_model(*given, **options)
    return target / "model.onnx"


def unpack(path: Path, text, head) -> None:
    """Give a Llama the weights that a decoder of 4 bits computes with: 0 to 15, less 8, times their scale. In float32:
    ONNX Runtime would round states to 8 bits."""
    weights, model = {}, ir.load(path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
            packed, scales = (value.const_value.numpy() for value in node.inputs[1:3])
            rows, columns = (node.attributes[name].as_int() for name in ("N", "K"))
            whole = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, scales.size // rows, -1) - 8.0
            matrix = (whole * scales.reshape(rows, -1, 1)).reshape(rows, -1)[:, :columns]
            weights[node.inputs[1].name.partition(".MatMul")[0]] = torch.from_numpy(matrix.astype(np.float32))
    ir.save(model, path)
    head.weight.data = weights["lm_head"]
    for number, layer in enumerate(text.layers):
        own, mlp = layer.self_attn, layer.mlp
        parts = weights[f"model.layers.{number}.attn.qkv_proj"].split([HEADS * DH, KV * DH, KV * DH])
        for linear, matrix in zip((own.q_proj, own.k_proj, own.v_proj), parts, strict=True):
            linear.weight.data = matrix.contiguous()
        own.o_proj.weight.data = weights[f"model.layers.{number}.attn.o_proj"]
        for name, linear in (("gate_proj", mlp.gate_proj), ("up_proj", mlp.up_proj), ("down_proj", mlp.down_proj)):
            linear.weight.data = weights[f"model.layers.{number}.mlp.{name}"]


def embeddings(seed: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Rows of random embeddings."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(n, HIDDEN)).astype(np.float32) for n in lengths]
