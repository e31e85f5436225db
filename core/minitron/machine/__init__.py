"""The machine at hand and those that are planned for: processor, memory, GPUs, docker, versions."""
