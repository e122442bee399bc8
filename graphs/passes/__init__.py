"""Passes over traced graphs that no method asks for: they say the same with fewer, fusable operators."""
