"""A text request answered over ``tensorrt_llm``, from the prompt's text to the last piece of the answer's."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from minitron.text.answers import TextResponses
from minitron.text.completion import Completion, Piece, Sampling
from minitron.text.prompts import PromptMaker
from minitron.text.request import TextRequest
from minitron.text.tensors import Arrays, Tensors
from minitron.text.tokenizer import TextTokenizer

_TOKENS = ("output_ids", "sequence_length")


class Engine(Protocol):
    """What answers requests for tokens: one EngineClient, or whoever chooses among several."""

    def batches(self, inputs: Arrays, outputs: Sequence[str], request_id: str) -> AsyncGenerator[list[Tensors], None]:
        """See EngineClient."""


class TextService:
    """Any number of requests at the same time, in one event loop."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompts: PromptMaker,
        engine: Engine,
        outputs: Sequence[str],
        *,
        excludes_input: bool,
        pace: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``outputs``: tensors of the engine that are passed on where they are there, beside the text.

        ``excludes_input``: whether a whole answer comes without its prompt where the request does not say. ``pace``:
        for how many seconds a stream should gather tokens at this moment, see ``pace.Pace``.
        """
        self._tokenizer, self._prompts, self._engine = tokenizer, prompts, engine
        self._outputs = [*_TOKENS, *outputs]
        self._excludes_input, self._pace = excludes_input, pace

    async def answer(self, arrays: Arrays) -> AsyncGenerator[Tensors, None]:
        """The responses to a request whose tensors, by the names of the text model's inputs, are ``arrays``.

        Leaving the loop ends the request in the engine, as the last stop string does. Raises RequestError for a wrong
        request and EngineCallError, at any moment.
        """
        request = TextRequest.read(arrays, excludes_input=self._excludes_input)
        prompt = self._prompts.of_request(arrays)
        if tokens := request.tokens_with_logits(prompt):
            self._prompts.check_logits(tokens)
        answers = TextResponses(self._tokenizer, prompt, request)
        # An id of its own: clients may use one twice, and the engine may not be asked for two requests of one id.
        batches = self._engine.batches(request.engine_inputs(prompt), self._outputs, uuid.uuid4().hex)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for response in answers.feed_all(batch):
                    yield response
                if answers.all_stopped:
                    break
                if request.streams and (wait_s := self._pace()):
                    await asyncio.sleep(wait_s)
        for response in answers.finish():
            yield response

    async def complete(self, ids: list[int], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The pieces of one sequence behind a prompt of ``ids``, the last one with its finish reason.

        A piece is whatever came since the last one was taken. Leaving the loop ends the request in the engine, as a
        stop string does. Raises RequestError before anything is sent, and EngineCallError, at any moment.
        """
        prompt = sampling.prompt(self._prompts, ids)
        completion = Completion(self._tokenizer, prompt, sampling)
        outputs = [*_TOKENS, *(["output_log_probs"] if sampling.log_probs else [])]
        outputs += ["context_logits"] if sampling.prompt_log_probs is not None else []
        batches = self._engine.batches(sampling.request().engine_inputs(prompt), outputs, uuid.uuid4().hex)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                if completion.wants_context:
                    await asyncio.to_thread(completion.read_context, batch)
                yield completion.feed(batch)
                if completion.stopped:
                    break
        yield completion.finish()
