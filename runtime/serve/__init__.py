"""An OpenAI-compatible server of one bundle, and a page to try it with.

Layers, each knowing only the one before: settings -> bundle -> :mod:`client` (who is let in, what happens off the
engine's thread) -> :mod:`app` (routes). HTTP code owns no engine, weights or caches. Needs the extra ``serve``.
Around them stands :mod:`server`, or for several engines on one machine or many :mod:`ray` (extra ``ray``).
"""
