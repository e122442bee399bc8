"""Decoders that others exported: the boundary of the ecosystem, its forms of attention, and the selection in them.

optimum, transformers.js, mobius-onnx and onnxruntime-genai share a boundary (:mod:`.boundary`) that is not our
contract's: caches grow by Concat, masks are an input, logits are of all tokens.
"""
