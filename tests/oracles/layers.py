"""A text model of transformers, layer by layer, one unpadded row, tokens really removed. Imports nothing of ours."""

import torch


def forward(text, head, x, positions, k, choose):
    """x [S, D], positions [S] or [3, S] -> (logits [T, V], kept). Layers from ``k`` on see the tokens that
    ``choose(scores [S] or None)`` names; k None: all of them."""
    kept, seen = torch.arange(len(x)), {}
    hook = None
    if k:
        attention = text.layers[k - 1].self_attn
        hook = attention.register_forward_hook(lambda module, inputs, outputs: seen.update(p=outputs[1]))
    x = x[None]
    with torch.no_grad():
        for index, layer in enumerate(text.layers):
            if index == k:
                kept = torch.tensor(choose(seen["p"].float().mean(1)[0, -1].numpy() if k else None))
                x = x[:, kept]
            order, window = torch.arange(len(kept)), vars(layer.self_attn).get("sliding_window") or len(kept)
            behind = order[:, None] - order  # a window counts survivors
            seen_by = (behind >= 0) & (behind < window)
            causal = torch.where(seen_by, 0.0, torch.finfo(x.dtype).min)[None, None]
            at = positions[..., kept][:, None] if positions.dim() == 2 else positions[kept][None]
            kinds = [layer.self_attn.layer_type] if text.config.model_type == "gemma3_text" else []
            tables = text.rotary_emb(x, at, *kinds)
            x = layer(x, attention_mask=causal, position_ids=at, position_embeddings=tables)
            x = x[0] if isinstance(x, tuple) else x
        logits = head(text.norm(x))[0]
    if hook is not None:
        hook.remove()
    return logits.numpy(), kept.numpy()
