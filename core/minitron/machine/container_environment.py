"""What the containers that build and that serve get as environment: a user that has a name, and what the recipe gives.

They run under the caller's user id, which the image's passwd does not have. Without HOME programs write to /; without
USER ``getpass.getuser`` ends in KeyError, and with it ``import torch`` (torch._inductor asks for the name of its cache
folder; vllm-project/vllm#44548).
"""

from __future__ import annotations

from collections.abc import Mapping

_UNKNOWN_USER = {"HOME": "/tmp", "USER": "minitron"}


def environment(of_recipe: Mapping[str, str]) -> dict[str, str]:
    """All variables; the recipe's ``container.environment`` may say HOME and USER otherwise."""
    return _UNKNOWN_USER | dict(of_recipe)
