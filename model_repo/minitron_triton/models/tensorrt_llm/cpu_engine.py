"""Continuous batching on a CPU: what TensorRT-LLM's executor is to the C++ backend, around OpenVINO GenAI's pipeline.

One thread steps the pipeline and hands on what each step gave. A request is let in when its prompt and its longest
output have room in the KV cache ("guaranteed no evict"); until then it waits, first come, first served. A fault inside
a step is answered to every request that was let in, and the pipeline is opened anew. A request for the logits of its
prompt has them computed first (``context_logits``), and then takes its place among those that wait. With prompt lookup
(``speculation``) a step may give a sequence several tokens.

``step()`` holds the interpreter's lock to its end; other threads get their turn between steps. Python gives it only to
a thread that has waited for a while (``sys.setswitchinterval``), by default 5 ms: a request that came in the last 5 ms
of a step was taken in behind the next one, which with steps of 20 ms is one in four.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron.machine.cpu_execution import processor_flags, step_times
from minitron.model.runtime_limits import TOKENS_PER_BLOCK

from . import pipeline
from .context_logits import ContextLogits, Logits
from .engine_config import EngineConfig
from .generation import CANCELLED, Generation, StepOutput, Times
from .generation_request import Refused, Request, check
from .speculation import LEAST, Drafts, first_count

log = logging.getLogger(__name__)

#: How long before the end of a step a request may come, to be in the next one.
_TURN_S = 0.001


@dataclass(frozen=True)
class Stats:
    """Counts at one moment. ``context``: let in and without a token yet; ``generating``: the other ones let in.

    ``waiting`` counts those whose context logits are being computed, too.
    """

    waiting: int
    context: int
    generating: int
    max_requests: int
    context_tokens: int
    used_blocks: int
    max_blocks: int
    steps: int
    draft_tokens: int
    accepted_draft_tokens: int

    @property
    def active(self) -> int:
        """All requests that are in the engine."""
        return self.waiting + self.context + self.generating


class Engine:
    """A loaded engine. ``submit``, ``cancel`` and ``stats`` may be called from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        open_pipeline: Callable[[], Any],
        *,
        blocks: int,
        max_queue: int = 0,
        reuse_kv_cache: bool = True,
        step_times: Mapping[int, float] | None = None,
    ) -> None:
        """``step_times``: of a pipeline with prompt lookup, how long steps are (``minitron.machine.cpu_execution``)."""
        self.config, self._reuses_cache, self._step_times = config, reuse_kv_cache, step_times
        if step_times is not None and config.max_num_tokens < 1 + LEAST:
            raise ValueError(f"prompt lookup needs an engine with max_num_tokens of at least {1 + LEAST}")
        self._open, self._blocks, self._max_queue = open_pipeline, blocks, max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._before: list[Generation] = []  # those that wait for the logits of their prompts
        self._active: dict[int, Generation] = {}
        self._ids, self._keys = itertools.count(1), itertools.count(1)
        self._steps = 0
        self._drafts = np.zeros(2, int)  # drafted, and right
        self._closing = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _TURN_S))
        self._pipeline: Any = open_pipeline()
        self._warm_up()
        pipeline.release_file(config)
        self._context_logits = ContextLogits(lambda: pipeline.PlainModel(config), config.vocab_size)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        kv_cache_tokens: int | None = None,
        reuse_kv_cache: bool = True,
        max_queue: int = 0,
        prompt_lookup: bool = False,
    ) -> Engine:
        """Load the engine in ``folder``, ready for its first request.

        ``kv_cache_tokens``: size of the KV cache, by default what the limits can need and the memory allows.
        ``max_queue``: requests that may wait, 0 = any number. Raises ValueError for a folder or a size that cannot be.
        """
        config = EngineConfig.read(Path(folder))
        blocks = pipeline.kv_blocks(config, kv_cache_tokens)
        return cls(
            config,
            lambda: pipeline.open_pipeline(
                config, kv_blocks=blocks, reuse_kv_cache=reuse_kv_cache, prompt_lookup=prompt_lookup
            ),
            blocks=blocks,
            max_queue=max_queue,
            reuse_kv_cache=reuse_kv_cache,
            step_times=step_times(config.execution, processor_flags()) if prompt_lookup else None,
        )

    def submit(self, request: Request, deliver: Callable[[StepOutput], None]) -> Generation:
        """Take a request; ``deliver`` gets its chunks, the last one always.

        Raises Refused, and then ``deliver`` is not called.
        """
        check(request, self.config)
        generation = Generation(next(self._ids), request, deliver, Times(time.monotonic_ns()))
        if generation.blocks > self._blocks:
            raise Refused(
                f"Prompt and output need {generation.blocks} blocks of the KV cache, and it has {self._blocks}: the "
                "request exceeds what can ever be scheduled"
            )
        with self._changed:
            if self._closing:
                raise Refused("The engine is stopping")
            line = self._before if request.context_logits else self._waiting
            line.append(generation)
            self._admit()
            if 0 < self._max_queue < len(self._waiting) + len(self._before):
                line.pop()
                raise Refused(f"Maximum queue size of {self._max_queue} has been reached, please try again later")
            if request.context_logits:
                self._context_logits.submit(
                    request.prompt, lambda: not generation.cancelled, lambda result: self._go_on(generation, result)
                )
            self._changed.notify()
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation before its next token; its last chunk says so. Nothing happens where it is over."""
        with self._changed:
            generation.cancelled = True
            waited = self._leaves_line(generation)
        if waited:
            generation.answer(StepOutput(finish=CANCELLED))

    def _leaves_line(self, generation: Generation) -> bool:
        """Take a generation out of the line that it waits in; whether there is one."""
        for line in (self._waiting, self._before):
            if generation in line:
                line.remove(generation)
                return True
        return False

    def _go_on(self, generation: Generation, logits: Logits | Exception | None) -> None:
        """Take in the logits of a generation's prompt; where one token was asked for, they are the answer."""
        with self._changed:
            if not self._leaves_line(generation):
                return  # cancelled, and answered
            if isinstance(logits, np.ndarray):
                generation.context_logits = logits
                if not generation.request.is_the_likeliest_alone:
                    self._waiting.append(generation)
                    self._admit()
                    self._changed.notify()
                    return
        if isinstance(logits, np.ndarray):
            generation.answer(generation.likeliest(logits[-1]))
        else:
            log.error("the logits of a prompt could not be computed (%s)", pipeline.one_line(logits))
            generation.answer(
                StepOutput(error=f"The logits of the prompt could not be computed: {pipeline.one_line(logits)}")
            )

    def stats(self) -> Stats:
        """Counts at this moment."""
        with self._changed:
            active = list(self._active.values())
            context = [generation for generation in active if not generation.token_ids]
            return Stats(
                waiting=len(self._waiting) + len(self._before),
                context=len(context),
                generating=len(active) - len(context),
                max_requests=self.config.max_batch_size,
                context_tokens=sum(len(generation.request.prompt) for generation in context),
                used_blocks=self._used_blocks(),
                max_blocks=self._blocks,
                steps=self._steps,
                draft_tokens=int(self._drafts[0]),
                accepted_draft_tokens=int(self._drafts[1]),
            )

    def close(self) -> None:
        """Take no more requests, cancel those that are there, end the thread, let go of the library."""
        with self._changed:
            self._closing = True
            there = [*self._before, *self._waiting, *self._active.values()]
            self._changed.notify()
        for generation in there:
            self.cancel(generation)
        self._thread.join()
        self._context_logits.close()
        self._pipeline = None

    def _used_blocks(self) -> int:
        return sum(generation.blocks for generation in self._active.values())

    def _admit(self) -> None:
        """Let in those at the head of the queue that have room."""
        while self._waiting and len(self._active) < self.config.max_batch_size:
            has_no_rows = self._step_times is not None and self._free_rows() < 1 + LEAST
            if has_no_rows or self._used_blocks() + self._waiting[0].blocks > self._blocks:
                return
            generation = self._waiting.popleft()
            generation.times.first_scheduled_ns = time.monotonic_ns()
            if self._step_times is not None:
                generation.drafts = Drafts(generation.request.prompt, first_count(self._step_times, self.config))
            self._active[generation.id] = generation

    def _free_rows(self) -> int:
        """Rows of a step beside those of who is let in; a sequence's with its drafts must not be parted."""
        return self.config.max_num_tokens - sum(one.rows for one in self._active.values())

    def _warm_up(self) -> None:
        """Two tokens for nobody: the first inference arranges the weights in memory, which takes seconds."""
        request = Request([0, 0], min(2, self.config.max_seq_len - 2))
        if request.max_new_tokens > 0 and self._blocks > 0:
            config = pipeline.generation_config(request, 0 if self._step_times is None else LEAST)
            _handle = self._pipeline.add_request(0, pipeline.input_ids(request), config)
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._closing):
                    self._changed.wait()
                if self._closing and not (self._active or self._waiting):
                    return
                batch = dict(self._active)
            leaving = {key for key, one in batch.items() if one.answered and not one.lingers}
            try:
                self._advance({key: generation for key, generation in batch.items() if key not in leaving})
            except Exception as error:
                self._fail(batch, error)
            leaving |= {key for key, generation in batch.items() if generation.answered and generation.handle is None}
            with self._changed:
                for key in leaving:
                    self._active.pop(key).handle = None  # whoever keeps the generation keeps nothing of the library's
                self._admit()

    def _advance(self, batch: dict[int, Generation]) -> None:
        """One step for everybody in ``batch``: start the new, end the cancelled, hand on what the others got."""
        if self._pipeline is None:
            self._pipeline = self._open()
        is_reading = any(not generation.read for generation in batch.values())
        for generation in batch.values():
            if generation.lingers:
                continue
            if generation.cancelled:
                self._end(generation, StepOutput(finish=CANCELLED))
            elif generation.handle is None:
                self._start(generation)
            elif not is_reading and generation.drafts and generation.drafts.is_due:
                self._decide(generation, generation.drafts)
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            self._steps += 1
        for generation in batch.values():
            if generation.lingers:
                _let_go_after_prompt(generation)
            elif not generation.answered:
                self._collect(generation)

    def _start(self, generation: Generation) -> None:
        """Give the pipeline a sequence, or what is left of one."""
        request = generation.next_part()
        try:
            config = pipeline.generation_config(request, generation.rows - 1)
            generation.handle = self._pipeline.add_request(next(self._keys), pipeline.input_ids(request), config)
        except Exception as error:  # the library refuses it and stays whole
            generation.answer(StepOutput(error=pipeline.one_line(error)))

    def _decide(self, generation: Generation, drafts: Drafts) -> None:
        """Go on with another number of drafts where that is faster by what came so far.

        The pipeline then gets the rest as a new request, whose prompt is in the cache up to a part of a block. For a
        step there are both, in blocks that the sequence did not come to yet. Random numbers would begin anew.
        """
        left = generation.request.max_new_tokens - len(generation.token_ids)
        may_change = self._reuses_cache and generation.request.is_greedy and left >= 2 * TOKENS_PER_BLOCK
        with self._changed:
            others = [one.rows for one in self._active.values() if one is not generation]
            best = drafts.best_count(others, self._step_times or {}, self._free_rows()) if may_change else drafts.count
            changes = drafts.decide(best)
        if changes:
            generation.handle.cancel()
            self._start(generation)

    def _fail(self, batch: dict[int, Generation], error: Exception) -> None:
        """Answer everybody with the fault, and drop the pipeline: it stays broken after one."""
        log.error(
            "the engine failed in a step (%s); %d requests are answered with it", pipeline.one_line(error), len(batch)
        )
        for generation in batch.values():
            generation.handle, generation.lingers = None, False
            if not generation.answered:
                generation.answer(StepOutput(error=f"The engine failed: {pipeline.one_line(error)}"))
        self._pipeline = None

    def _collect(self, generation: Generation) -> None:
        """Hand on what the last step gave to a sequence, up to where it ends."""
        handle = generation.handle
        ids: list[int] = []
        log_probs: list[float] = []
        finish: str | None = None
        while finish is None and handle.can_read():
            for output in handle.read().values():
                self._drafts += generation.count(output.generated_ids)
                new = generation.take(output.generated_ids, output.generated_log_probs)
                ids += new.token_ids
                log_probs += new.log_probs
                finish = new.finish
        if ids:
            now = time.monotonic_ns()
            generation.times.first_token_ns = generation.times.first_token_ns or now
            generation.times.last_token_ns = now
        given_up = not finish and pipeline.was_ignored(handle)
        error = "The engine gave the request up for want of KV cache" if given_up else None
        if not (finish or error) and pipeline.has_ended(handle):
            generation.handle = None
        if finish or error:
            self._end(generation, StepOutput(tuple(ids), tuple(log_probs), finish, error))
        elif ids:
            generation.answer(StepOutput(tuple(ids), tuple(log_probs)))

    def _end(self, generation: Generation, last: StepOutput) -> None:
        """Answer for the last time, and make the pipeline forget the sequence where it would go on.

        That takes until the end of the next step; so long the sequence keeps its handle, and its blocks stay counted.

        A sequence whose prompt is not read yet is let come to its first token before it is cancelled: OpenVINO GenAI
        2026.4.1 otherwise keeps the block that it was in the middle of among those that equal prompts share, although
        part of it was never computed, and whoever shares it gets wrong tokens.
        """
        handle = generation.handle
        if handle is None or pipeline.has_ended(handle):
            generation.handle = None
        elif generation.read or not self._reuses_cache:
            handle.cancel()
        else:
            generation.lingers = True
        generation.answer(last)


def _let_go_after_prompt(generation: Generation) -> None:
    """Cancel a lingering sequence as soon as it has a token, which is for nobody."""
    if pipeline.has_ended(generation.handle):
        generation.handle, generation.lingers = None, False
    elif generation.handle.can_read():
        generation.handle.read()
        generation.handle.cancel()
        generation.lingers = False
