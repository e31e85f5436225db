"""The Triton model repository as a typed model: planned from an engine, rendered through templates, checked afterwards.

``tensors`` and ``parameters`` hold what the TensorRT-LLM backend 1.2 declares and reads, ``layout`` plans the five
models of a repository, ``render`` writes them, ``check`` reads a finished folder back without knowing the templates.
"""
