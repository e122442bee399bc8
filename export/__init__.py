"""PyTorch -> ONNX. The only folder that imports torch and transformers."""
