"""Text over token models: the one place where prompts become ids and ids become text.

Nothing here knows Triton's Python API or HTTP, and all imports are relative: a rendered model repository holds a copy
of this package beside the models that use it, and needs nothing else of the toolkit. ``service`` is the whole of it: a
text request in, text as it comes out, over one gRPC stream to ``tensorrt_llm``.
"""
