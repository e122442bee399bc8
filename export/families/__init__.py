"""One file a family of models; the file name is the registry (``model_type`` of the Hugging Face config)."""
