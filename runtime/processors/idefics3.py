"""Idefics3 and the first SmolVLM: pictures and words as SmolVLM2 has them."""

from vlmtrim.runtime.processors.smolvlm import Processor as Processor
