"""A small page over HTTP: what the toolkit itself asks of servers (metrics, a model's config)."""

from __future__ import annotations

import http.client
import urllib.request

from minitron.errors import NotReady
from minitron.text import proxy


def read(url: str, path: str, what: str, remedy: str, timeout_s: float) -> bytes:
    """The body of ``http://HOST:PORT/path``: of a loopback address directly, else as the environment's proxies have it.

    Raises NotReady: ``what`` cannot be read, and the ``remedy``.
    """
    variable = proxy.of_http(url)
    direct = () if variable else (urllib.request.ProxyHandler({}),)
    try:
        with urllib.request.build_opener(*direct).open(f"http://{url}{path}", timeout=timeout_s) as answer:
            body: bytes = answer.read()
            return body
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
        raise NotReady(f"{url}: {what} cannot be read ({why}); {remedy}{proxy.advice(variable, url)}") from error
