"""All cases by the line of an acceptance that they judge, and running them."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable, Iterator

from minitron.acceptance import FAIL, PASS, SKIPPED, Line
from minitron_client.conformance import answers, ends, leaving, requests
from minitron_client.conformance.subject import Disagreement, NotApplicable, RefusedByServer, Subject

Case = Callable[[Subject], str]

CASES: dict[str, Case] = {
    f"behaviour.{case.__name__}": case
    for case in (
        answers.streaming, answers.whole_answer, answers.counts, answers.log_probs, answers.long_prompt,
        answers.logits, answers.batch, answers.several_sequences, ends.length, ends.end_id, ends.end_first,
        ends.end_own, ends.stop_ids, ends.stop_words, answers.text, answers.seeds, answers.min_tokens, ends.refusal,
        requests.stop_without_id, requests.duplicate_id, requests.prompt_limit, requests.sequence_limit,
        requests.output_length_zero, requests.empty_prompt, requests.top_p_range, requests.malformed_words,
        requests.foreign_token, requests.beam_width, requests.bad_words, requests.embedding_bias, requests.queue_full,
        leaving.cancel, leaving.deadline, leaving.stop,
    )
}  # fmt: skip


def run(subject: Subject, names: Iterable[str] = CASES) -> Iterator[Line]:
    """Judge case after case."""
    for name in names:
        try:
            yield Line(name, PASS, CASES[name](subject))
        except NotApplicable as reason:
            yield Line(name, SKIPPED, str(reason))
        except (Disagreement, RefusedByServer) as error:
            yield Line(name, FAIL, str(error))
        except (OSError, http.client.HTTPException) as error:
            yield Line(name, FAIL, f"HTTP: {error or type(error).__name__}")
        except StopIteration:
            yield Line(name, FAIL, "the answer ended before it began")
