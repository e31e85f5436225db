"""What TensorRT-LLM itself says of the toolkit's data, its checkpoints and its engines."""
