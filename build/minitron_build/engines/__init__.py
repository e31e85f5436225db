"""From a TensorRT-LLM checkpoint to an engine folder: OpenVINO for a CPU, TensorRT for a GPU."""
