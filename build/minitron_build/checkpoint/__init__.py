"""TensorRT-LLM checkpoints of Nemotron models: what is in them, how they are written, how they are read."""
