"""Continuous batching as a discrete-event simulation: when each request of a schedule gets its tokens.

The rules are those of both engines. A request waits in line until the batch has a place and the KV cache has room for
its prompt and its longest answer (TensorRT-LLM's GUARANTEED_NO_EVICT, and the CPU engine's admission), first come,
first served. A step gives each sequence that generates one token and reads prompts with what is left of
``max_num_tokens``, in pieces (chunked context; OpenVINO's dynamic split fuse). A prompt's last piece brings the first
token. How long a step takes is the only thing that is not a rule, and comes in as a function.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minitron.model.runtime_limits import whole_blocks
from minitron.model.shape import ModelShape
from minitron_build.plan.limits import Limits
from minitron_build.plan.roofline import Machine, time_at_roofline
from minitron_build.plan.weights import layer_weights


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, and its tokens of prompt and answer (1 or more each)."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class EngineStep:
    """What a step does: sequences that get a token, tokens of prompts that are read, and the tokens that lie in the
    cache of all of them (those read in this step included). ``begins_s``: when, by the schedule's clock."""

    sequences: int
    prompt_tokens: int
    context_tokens: int
    begins_s: float = 0.0


@dataclass
class Outcome:
    """A request's end. ``server``: which one had it; times in seconds of the schedule's clock."""

    arrival: Arrival
    server: int
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_token_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of the tokens behind the first; None where there is none."""
        behind = self.arrival.output - 1
        return (self.last_token_s - self.first_token_s) / behind if behind else None


StepTime = Callable[[EngineStep], float]


def roofline_steps(shape: ModelShape, machine: Machine, *, matrix_bytes: int, kv_bytes: int) -> StepTime:
    """Least seconds of a step, by what it reads and calculates (see ``roofline``): a bound that no engine beats.

    Matrices once, and the cache of every sequence in the step; 2 operations for each weight of the layers and token,
    for each of the head and sequence, and 4 x layers x hidden for each pair of a token and one that it looks at. The
    tokens of a prompt look at half of it on the average.
    """
    layers, head = shape.num_layers * layer_weights(shape), shape.vocab_size * shape.hidden_size

    def seconds(step: EngineStep) -> float:
        tokens = step.sequences + step.prompt_tokens
        read = matrix_bytes + step.context_tokens * kv_bytes
        pairs = step.context_tokens + step.prompt_tokens**2 / 2
        attention = 4 * shape.num_layers * shape.hidden_size * pairs
        operations = 2 * layers * tokens + 2 * head * max(step.sequences, 1) + attention
        return time_at_roofline(read, operations, machine).seconds

    return seconds


@dataclass
class _SimulatedSequence:
    outcome: Outcome
    read: int = 0  # tokens of the prompt that are read
    made: int = 0

    @property
    def blocks(self) -> int:
        return whole_blocks(self.outcome.arrival.prompt + self.outcome.arrival.output)


@dataclass
class _Server:
    """One engine; ``clock_s`` is when its last step ended."""

    limits: Limits
    kv_tokens: int
    step_s: StepTime
    clock_s: float = 0.0
    waiting: deque[_SimulatedSequence] = field(default_factory=deque)
    active: list[_SimulatedSequence] = field(default_factory=list)
    held: int = 0
    outstanding: int = 0  # tokens still to be read and made

    def take(self, sequence: _SimulatedSequence) -> None:
        if not self.active and not self.waiting:
            self.clock_s = max(self.clock_s, sequence.outcome.arrival.at_s)
        self.waiting.append(sequence)
        self.outstanding += sequence.outcome.arrival.prompt + sequence.outcome.arrival.output

    def run_until(self, until_s: float) -> None:
        """Make all steps that begin before that moment."""
        while self.clock_s < until_s and (self.active or self.waiting):
            self._admit()
            self._step()

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.limits.max_batch_size:
            if self.active and self.held + self.waiting[0].blocks > self.kv_tokens:
                return
            self.held += self.waiting[0].blocks
            self.active.append(self.waiting.popleft())

    def _step(self) -> None:
        generating = [one for one in self.active if one.made]
        room, pieces = self.limits.max_num_tokens - len(generating), list[tuple[_SimulatedSequence, int]]()
        for one in self.active:
            if not one.made and room > 0:
                piece = min(room, one.outcome.arrival.prompt - one.read)
                pieces.append((one, piece))
                room -= piece
        for one, piece in pieces:
            one.read += piece
        read = sum(piece for _, piece in pieces)
        first = [one for one, _ in pieces if one.read == one.outcome.arrival.prompt]
        context = sum(one.read + one.made for one in (*generating, *(one for one, _ in pieces)))
        self.outstanding -= read + len(generating) + len(first)
        self.clock_s += self.step_s(EngineStep(len(generating) + len(first), read, context, self.clock_s))
        for one in (*generating, *first):
            one.made += 1
            if one.made == 1:
                one.outcome.first_token_s = self.clock_s
            if one.made == one.outcome.arrival.output:
                one.outcome.last_token_s = self.clock_s
                self.active.remove(one)
                self.held -= one.blocks


def simulate(
    arrivals: Sequence[Arrival], limits: Limits, kv_tokens: int, step_s: StepTime, *, servers: int = 1
) -> list[Outcome]:
    """What becomes of a schedule (in the order of time) on so many equal servers.

    A request goes to the server with the fewest outstanding tokens, as the gateway sends it, and stays there. The same
    arguments give the same outcome.
    """
    engines = [_Server(limits, kv_tokens, step_s) for _ in range(servers)]
    outcomes = []
    for arrival in arrivals:
        for engine in engines:
            engine.run_until(arrival.at_s)
        chosen = min(range(servers), key=lambda place: (engines[place].outstanding, place))
        outcomes.append(Outcome(arrival, chosen))
        engines[chosen].take(_SimulatedSequence(outcomes[-1]))
    for engine in engines:
        engine.run_until(float("inf"))
    return outcomes
