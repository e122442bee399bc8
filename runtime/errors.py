"""What the runtime says when it cannot do as asked."""

from __future__ import annotations


class RuntimeRefusal(Exception):
    """One sentence for the user: what is wrong, what was given, what is allowed, what to do."""
