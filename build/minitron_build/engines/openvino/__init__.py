"""The CPU engine: a checkpoint as an OpenVINO model."""
