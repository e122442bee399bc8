"""A small trained LLaVA, the task it was trained on, and the code that trained it."""
