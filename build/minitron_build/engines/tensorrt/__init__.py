"""The GPU engine: trtllm-build, its flags, where it runs, and what it made."""
