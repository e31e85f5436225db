"""A request on its way: prompts in ids, a Sampling for each sequence, and the answer as events or whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from minitron.text.completion import Piece, Sampling
from minitron.text.prompts import PromptMaker
from minitron.text.service import TextService
from minitron.text.tokenizer import TextTokenizer
from minitron_gateway.bodies import ChatBody, CompletionBody
from minitron_gateway.problems import Problem
from minitron_gateway.settings import Interval
from minitron_gateway.shapes import DONE, Answer, ChatAnswer

#: Characters from which on a text is tokenized in a thread, so that it holds up no other stream.
_LONG = 10_000
_SEEDS = 2**64


@dataclass
class Generation:
    """What is to be generated: ``sequences`` for each prompt, of which the best ``choices`` are answered.

    ``counts_on``: every event of a stream has counts. ``tokens`` counts what was made, ``finishes`` says why sequences
    ended, ``on_first`` is called with the first token of any of them.
    """

    prompts: list[list[int]]
    sampling: Sampling
    answer: Answer
    choices: int
    sequences: int
    streams: bool
    includes_usage: bool
    shows_log_probs: bool
    counts_on: bool = False
    tokens: int = 0
    finishes: list[str] = field(default_factory=list)
    on_first: Callable[[], None] = lambda: None

    @property
    def count(self) -> int:
        """Sequences in all."""
        return len(self.prompts) * self.sequences

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(map(len, self.prompts))

    async def events(self, text: TextService, interval: Interval, pace: Callable[[], float]) -> AsyncGenerator[bytes]:
        """The events of a stream, to the one that says that it is whole. Raises EngineCallError."""
        held: dict[int, list[Piece]] = {}
        begun: set[int] = set()
        made = [0] * self.count
        async with contextlib.aclosing(self._pieces(text, interval, pace)) as pieces:
            async for index, piece in pieces:
                waiting = held.setdefault(index, [])
                waiting.append(piece)
                if not piece.finish and index in begun and sum(one.tokens for one in waiting) < interval.tokens:
                    continue
                joined = Piece.join(waiting)
                if not (joined.text or joined.log_probs or joined.finish):
                    continue
                begun.add(index)
                waiting.clear()
                made[index] += joined.tokens
                prompt = len(self.prompts[index // self.sequences])
                yield self.answer.part(index, joined, _usage(prompt, made[index]) if self.counts_on else None)
        if self.includes_usage:
            yield self.answer.usage_part(_usage(self.prompt_tokens, self.tokens))
        yield DONE

    async def whole(self, text: TextService) -> bytes:
        """The whole answer. Raises EngineCallError."""
        found: list[list[Piece]] = [[] for _ in range(self.count)]
        async with contextlib.aclosing(self._pieces(text, Interval(), lambda: 0.0)) as pieces:
            async for index, piece in pieces:
                found[index].append(piece)
        made = [Piece.join(parts) for parts in found]
        chosen = [one for row in range(len(self.prompts)) for one in self._best(row, made)]
        return self.answer.whole(chosen, _usage(self.prompt_tokens, self.tokens))

    def _best(self, row: int, made: Sequence[Piece]) -> list[Piece]:
        """The choices of a prompt: by the mean log prob of their tokens where there are more sequences."""
        own = list(made[row * self.sequences : (row + 1) * self.sequences])
        if self.sequences > self.choices:
            own = sorted(own, key=_mean_log_prob, reverse=True)[: self.choices]
        return own if self.shows_log_probs else [replace(piece, log_probs=()) for piece in own]

    async def _pieces(
        self, text: TextService, interval: Interval, pace: Callable[[], float]
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all sequences, each with the sequence's number."""

        def sequence(index: int) -> AsyncGenerator[Piece]:
            row, number = divmod(index, self.sequences)
            own = replace(self.sampling, seed=(self.sampling.seed + number) % _SEEDS)
            return self._sequence(text, self.prompts[row], own, interval, pace)

        streams = [sequence(index) for index in range(self.count)]
        async with contextlib.aclosing(_merged(streams)) as merged:
            async for index, piece in merged:
                if piece.tokens and not self.tokens:
                    self.on_first()
                self.tokens += piece.tokens
                if piece.finish:
                    self.finishes.append(piece.finish)
                yield index, piece

    async def _sequence(
        self, text: TextService, ids: list[int], sampling: Sampling, interval: Interval, pace: Callable[[], float]
    ) -> AsyncGenerator[Piece]:
        """The pieces of one sequence, no closer together than the interval, or the process's own pace, says."""
        async with contextlib.aclosing(text.complete(ids, sampling)) as pieces:
            async for piece in pieces:
                yield piece
                if self.streams and not piece.finish and (wait_s := interval.seconds or pace()):
                    await asyncio.sleep(wait_s)


async def of_completion(
    body: CompletionBody, tokenizer: TextTokenizer, prompts: PromptMaker, most_sequences: int
) -> Generation:
    """What ``/v1/completions`` is asked; raises Problem, RequestError."""
    asked = body.prompts()
    _check_count(body, len(asked), most_sequences)
    rows = [await _encode(one, tokenizer, prompts) for one in asked]
    sampling = body.sampling(
        body.most_tokens,
        log_probs=body.logprobs is not None or body.sequences > body.choices,
    )
    return Generation(
        rows,
        replace(sampling, echo=bool(body.echo), prompt_log_probs=body.logprobs if body.echo else None),
        Answer(body.model, includes_usage=body.includes_usage, alternatives=body.logprobs or 0),
        choices=body.choices, sequences=body.sequences, streams=body.streams, includes_usage=body.includes_usage,
        shows_log_probs=body.logprobs is not None, counts_on=body.counts_on,
    )  # fmt: skip


async def of_chat(body: ChatBody, tokenizer: TextTokenizer, prompts: PromptMaker, most_sequences: int) -> Generation:
    """What ``/v1/chat/completions`` is asked; raises Problem, RequestError."""
    if not tokenizer.has_chat_template:
        raise Problem(
            400, "this model's tokenizer has no chat template, as that of a base model; ask /v1/completions",
            code="no_chat_template",
        )  # fmt: skip
    _check_count(body, 1, most_sequences)
    ids = await asyncio.to_thread(tokenizer.encode_chat, [message.plain() for message in body.messages])
    max_tokens = body.most_tokens or max(prompts.room_for(len(ids)), 1)
    return Generation(
        [ids],
        body.sampling(max_tokens, log_probs=bool(body.logprobs)),
        ChatAnswer(body.model, includes_usage=body.includes_usage, alternatives=body.top_logprobs or 0),
        choices=body.choices, sequences=body.sequences, streams=body.streams, includes_usage=body.includes_usage,
        shows_log_probs=bool(body.logprobs), counts_on=body.counts_on,
    )  # fmt: skip


def _check_count(body: ChatBody | CompletionBody, prompts: int, most: int) -> None:
    sequences = prompts * body.sequences
    if sequences > most:
        raise Problem(
            400, f"{sequences} sequences (prompts times n or best_of) in one request: at most {most} may be",
            param="prompt" if prompts > 1 else "n" if body.sequences == body.choices else "best_of",
        )  # fmt: skip


async def _encode(prompt: str | list[int], tokenizer: TextTokenizer, prompts: PromptMaker) -> list[int]:
    if not isinstance(prompt, str):
        prompts.check_ids(prompt, "prompt")
        return prompt
    if len(prompt) < _LONG:
        return tokenizer.encode(prompt)
    return await asyncio.to_thread(tokenizer.encode, prompt)


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _mean_log_prob(piece: Piece) -> float:
    return sum(token.log_prob or 0.0 for token in piece.log_probs) / max(len(piece.log_probs), 1)


async def _merged(streams: list[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several sequences as they come, each with its number; the first error ends all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int) -> None:
        try:
            async with contextlib.aclosing(streams[index]) as stream:
                async for piece in stream:
                    await arrived.put((index, piece))
        except Exception as error:
            await arrived.put((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    unfinished = len(streams)
    try:
        while unfinished:
            index, came = await arrived.get()
            if isinstance(came, Exception):
                raise came
            unfinished -= bool(came.finish)
            yield index, came
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
