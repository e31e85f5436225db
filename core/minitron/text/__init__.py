"""Text over token models: the one place where prompts become ids and ids become text.

Nothing here knows Triton's Python API or HTTP, or imports more of the toolkit: a rendered model repository holds a copy
of this package beside each model that uses it, and needs nothing else. ``service`` is the whole of it: a
text request in, text as it comes out, over one gRPC stream to ``tensorrt_llm``.
"""
