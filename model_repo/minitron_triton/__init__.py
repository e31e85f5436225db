"""From an engine to a model repository and a running Triton."""
