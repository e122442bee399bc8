"""The other side of parity: unpatched models, and every selection written a second time, in PyTorch."""
