"""What brings a Python module that is not here: the one place that says how this package is installed.

It is on no public index, so the words are those of its checkout.
"""

from __future__ import annotations

#: Modules of each extra of pyproject.toml that a user may want; what is in none of them comes with the package itself.
MODULES = {
    "cpu": ("openvino", "openvino_genai", "pytriton"),
    "eval": ("lm_eval", "pyarrow"),
    "gateway": ("aiohttp", "httptools", "prometheus_client", "starlette", "transformers", "uvicorn", "uvloop"),
    "gguf": ("gguf",),
    "otel": ("opentelemetry",),
    "tensorrt-llm": ("tensorrt_llm",),
}


def advice(module: str) -> str:
    """What to do where ``module``, or one inside it, cannot be imported."""
    top = module.partition(".")[0]
    return install(next((extra for extra, modules in MODULES.items() if top in modules), None))


def install(extra: str | None = None) -> str:
    """How the package is installed, with one of its extras."""
    what = f"'.[{extra}]'" if extra else "."
    if extra == "tensorrt-llm":
        what += " --extra-index-url https://pypi.nvidia.com"
    return f"pip install {what} in the checkout of minitron-trtllm"
