"""A CPU engine as lm-eval's model: log probs of endings and whole texts, and text up to a stop text, greedily.

What it does with texts is what lm-eval's own ``hf`` model does (``lm_eval/models/huggingface.py``, 0.4.13): which
tokens stand before an empty context, what is cut off where a text is too long, where an answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from minitron.errors import EngineError, UsageError
from minitron.model import tokenizer_files
from minitron.text import end_ids
from minitron.text.end_ids import token_text
from minitron_build.evaluate.measures import log_probabilities
from minitron_build.evaluate.tasks.grouping import Scored, groups, several
from minitron_build.evaluate.tasks.prefixes import Ids, PrefixEngine, common_length

#: Tokens of an answer where a task says nothing; lm-eval's own figure.
_ANSWER_TOKENS = 256


class EngineModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not always installed
    """The engine in ``folder``, which takes ``max_tokens`` at once. Raises InputError without a tokenizer."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        super().__init__()
        place = folder / "tokenizer"
        self._tokens, config = tokenizer_files.opened(place)
        try:
            self._ends = end_ids.of_model(place)
        except ValueError as error:
            raise EngineError(str(error)) from error
        named = [token_text(config.get(name)) for name in ("bos_token", "eos_token")]
        begin, end = (None if text is None else self._tokens.token_to_id(text) for text in named)
        if end is None and not self._ends:
            raise EngineError(f"{place} names no token that ends a text, and tasks need one")
        self._end = int(self._ends[0] if end is None else end)
        self._begin = self._end if begin is None else int(begin)
        self._begin_text, self._end_text = (
            self._tokens.decode([token], skip_special_tokens=False) for token in (self._begin, self._end)
        )
        self._engine, self.max_length = PrefixEngine(folder), max_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; special tokens around it unless it begins with the first one itself."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._begin_text)
        return list(self._tokens.encode(string, add_special_tokens=add_special_tokens).ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log prob of each ending behind its context, and whether each of its tokens is the likeliest."""
        texts: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_request, context, ending) in enumerate(requests):
            text = (context + ending)[-(self.max_length + 1) :][:-1]
            texts.setdefault(tuple(text), []).append((number, ending))
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        for prefix, some in groups([Scored(text, max(len(e) for _, e in ends)) for text, ends in texts.items()]):
            for batch in several(some, len(prefix)):
                self._engine.start(prefix)
                rests = [one.text[len(prefix) :] for one in batch]
                for before, logits in self._engine.go_on(rests, max(one.wanted for one in batch)):
                    for one, rows in zip(batch, logits, strict=True):
                        for number, ending in texts[one.text]:
                            some_sum, all_best = _score(rows, ending, before)
                            sums[number] += some_sum
                            greedy[number] &= all_best
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log prob of each whole text, in windows of what the engine takes at once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self._begin, max_seq_len=self.max_length, context_len=1
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context, up to a stop text, an end token or the task's most tokens."""
        answers = [""] * len(requests)
        wishes: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            wishes.setdefault(repr(request.args[1]), []).append(number)
        for numbers in wishes.values():
            wish = normalize_gen_kwargs(requests[numbers[0]].args[1], _ANSWER_TOKENS)
            most, stops = self._most_tokens(wish), [*wish["until"]]
            if self._end_text not in stops:
                stops.append(self._end_text)
            contexts = {n: tuple(self.tok_encode(requests[n].args[0])[-(self.max_length - most) :]) for n in numbers}
            order = sorted(numbers, key=lambda n: (len(contexts[n]), contexts[n]))
            for batch in several([Scored(contexts[n], 1, n) for n in order], most):
                for one, answer in zip(batch, self._generate([one.text for one in batch], stops, most), strict=True):
                    answers[one.number] = answer
        return answers

    def _most_tokens(self, wish: dict[str, Any]) -> int:
        if wish.get("do_sample") or wish.get("temperature"):
            raise UsageError(
                "a task asks for sampled answers, and a CPU engine is evaluated greedily; name a server (--url)"
            )
        most = int(wish["max_gen_toks"])
        if most >= self.max_length:
            raise UsageError(f"a task asks for {most} tokens, and the engine takes {self.max_length} with the question")
        return most

    def _generate(self, contexts: Sequence[Ids], stops: list[str], most: int) -> list[str]:
        """The answers to contexts side by side; each leaves the batch as it ends."""
        shared = min(common_length(contexts), min(map(len, contexts)) - 1)
        self._engine.start(contexts[0][:shared])
        ids: list[list[int]] = [[] for _ in contexts]
        ((_, rows),) = self._engine.go_on([context[shared:] for context in contexts], 1)
        running, best = list(range(len(contexts))), rows[:, -1].argmax(axis=-1)
        for _ in range(most):
            goes_on = []
            for place, number in enumerate(running):
                ids[number].append(int(best[place]))
                if not self._ends_with(ids[number], stops):
                    goes_on.append(place)
            if not goes_on or len(ids[running[0]]) == most:
                break
            best = self._engine.step([int(best[place]) for place in goes_on], goes_on).argmax(axis=-1)
            running = [running[place] for place in goes_on]
        return [postprocess_generated_text(self._text(one), stops, None) for one in ids]

    def _ends_with(self, ids: list[int], stops: list[str]) -> bool:
        if ids[-1] == self._end or ids[-1] in self._ends:
            return True
        text = self._text(ids)
        return any(stop and stop in text for stop in stops)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokens.decode(ids, skip_special_tokens=True))


def _score(rows: Any, ending: list[int], before: int) -> tuple[float, bool]:
    """The log prob of an ending's tokens in ``rows`` [row, vocabulary], and whether they are the likeliest ones.

    The first row stands ``before`` tokens from the end.
    """
    first = len(ending) - before  # the token of the ending that the first row predicts
    begin, stop = max(first, 0), min(first + len(rows), len(ending))
    if begin >= stop:
        return 0.0, True
    own = log_probabilities(rows[begin - first : stop - first])
    picked = own[np.arange(stop - begin), ending[begin:stop]]
    return float(picked.sum(dtype=np.float64)), bool((own.argmax(axis=-1) == ending[begin:stop]).all())
