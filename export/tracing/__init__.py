"""What families share: tracing, and the traced modules around a Hugging Face model."""
