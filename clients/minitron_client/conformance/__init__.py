"""Whether a running server behaves as TensorRT-LLM's Triton backend is documented to: one suite for either engine.

``minitron conformance`` runs it against any server, ``minitron accept`` against both engines, and the toolkit's own
tests run it against the CPU engine.
"""
