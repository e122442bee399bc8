"""One module an inference library."""
