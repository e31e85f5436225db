"""Whether a tokenizer's chat template can write a conversation, told before it is served.

A template is text in Jinja, in chat_template.jinja or, where that is not there, in tokenizer_config.json. It is read
here as transformers reads it (``utils/chat_template_utils.py`` of transformers 4.57 and 5): sandboxed, with its own
ways of trimming, its functions, its tag ``generation``, and the special tokens by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_SIMPLEST = [{"role": "user", "content": "Hello"}]


class _Refused(Exception):
    """The template's own refusal of a conversation."""


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says; it writes nothing of its own."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def problem(content: Mapping[str, bytes]) -> tuple[str, str] | None:
    """The file whose template is broken, and how; None where it is fine, or there is none.

    ``content``: a tokenizer's files by name. Each template is compiled, and the one that is used writes the simplest
    conversation, a user's one word; one that refuses it by ``raise_exception`` is fine.
    """
    where = FILE if FILE in content else CONFIG
    try:
        config = json.loads(content.get(CONFIG, b"{}"))
        texts = [content[FILE].decode()] if FILE in content else _configured(config.get("chat_template"))
    except UnicodeDecodeError as error:
        return where, f"is no UTF-8 (at byte {error.start})"
    except (ValueError, AttributeError, LookupError, TypeError):
        return None  # whoever reads the configuration says what is wrong with it
    found = (_trial(text, config, is_used=number == 0) for number, text in enumerate(texts))
    return next(((where, said) for said in found if said), None)


def _configured(given: Any) -> list[str]:
    """The templates of a configuration, first the one that is used: of several that is "default"."""
    if isinstance(given, list):
        named = {one["name"]: one["template"] for one in given}
        return [named[name] for name in sorted(named, key=lambda name: name != "default")]
    return [] if given is None else [given]


def _trial(text: str, config: Mapping[str, Any], *, is_used: bool) -> str | None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    named = {key: one for key, one in config.items() if key.endswith("_token")}
    special = {key: one.get("content") if isinstance(one, dict) else one for key, one in named.items()}
    try:
        template = environment.from_string(text)
        if is_used:
            template.render(messages=_SIMPLEST, tools=None, documents=None, add_generation_prompt=True, **special)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except _Refused:
        return None
    except Exception as error:  # whatever a template stumbles over
        return f"cannot write a conversation of one user's word: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def _refuse(message: str) -> None:
    raise _Refused(message)
