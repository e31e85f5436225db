"""Headers of W3C's Trace Context: which are handed on.

Cases: the Recommendation's own examples and rules (www.w3.org/TR/trace-context-1), and those of W3C's test suite of
implementations (github.com/w3c/trace-context, test/test.py), by the name that they have there.
"""

from __future__ import annotations

import pytest

from minitron.text import trace_context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
EXAMPLE = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("name", "header", "handed_on"),
    [
        ("example", EXAMPLE, EXAMPLE),
        ("not_sampled", f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        ("random_flag_of_level_2", f"00-{TRACE}-{SPAN}-03", f"00-{TRACE}-{SPAN}-03"),
        ("unknown_flags_are_0_in_a_new_header", f"00-{TRACE}-{SPAN}-ff", f"00-{TRACE}-{SPAN}-03"),
        ("ows_handling_space", f" {EXAMPLE} ", EXAMPLE),
        ("ows_handling_tab", f"\t{EXAMPLE}\t", EXAMPLE),
        ("version_0xcc", f"cc-{TRACE}-{SPAN}-01", EXAMPLE),
        ("version_0xcc_and_more", f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", EXAMPLE),
        ("version_0xcc_and_no_dash", f"cc-{TRACE}-{SPAN}-01.what-the-future-will-be-like", None),
        ("version_0xff", f"ff-{TRACE}-{SPAN}-01", None),
        ("version_00_and_more", f"{EXAMPLE}-what-the-future-will-be-like", None),
        ("version_00_and_a_dash", f"{EXAMPLE}-", None),
        ("version_illegal_characters", f".0-{TRACE}-{SPAN}-01", None),
        ("version_too_long", f"000-{TRACE}-{SPAN}-01", None),
        ("version_too_short", f"0-{TRACE}-{SPAN}-01", None),
        ("trace_id_all_zero", f"00-{'0' * 32}-{SPAN}-01", None),
        ("trace_id_illegal_characters", f"00-.{TRACE[1:]}-{SPAN}-01", None),
        ("trace_id_too_long", f"00-{TRACE}0-{SPAN}-01", None),
        ("trace_id_too_short", f"00-{TRACE[1:]}-{SPAN}-01", None),
        ("trace_id_upper_case", f"00-{TRACE.upper()}-{SPAN}-01", None),
        ("parent_id_all_zero", f"00-{TRACE}-{'0' * 16}-01", None),
        ("parent_id_illegal_characters", f"00-{TRACE}-.{SPAN[1:]}-01", None),
        ("parent_id_too_long", f"00-{TRACE}-{SPAN}0-01", None),
        ("trace_flags_illegal_characters", f"00-{TRACE}-{SPAN}-.0", None),
        ("trace_flags_too_long", f"00-{TRACE}-{SPAN}-001", None),
        ("trace_flags_too_short", f"00-{TRACE}-{SPAN}-1", None),
        ("other_digits", f"00-{TRACE[:-1]}٣-{SPAN}-01", None),
        ("a_line_more", f"{EXAMPLE}\n", None),
        ("empty", "", None),
    ],
)
def test_a_traceparent(name: str, header: str, handed_on: str | None) -> None:
    expected = (("traceparent", handed_on),) if handed_on else ()
    assert trace_context.received([header]) == expected, name


def test_two_traceparents_are_none() -> None:  # traceparent_duplicated
    assert trace_context.received([EXAMPLE, EXAMPLE.replace("4bf9", "4bf8")]) == ()


@pytest.mark.parametrize(
    ("headers", "handed_on"),
    [
        (["congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"], "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"),
        (["rojo=1", "congo=2"], "rojo=1,congo=2"),  # multiple header fields are one list, in their order
        (["", " "], None),
        (["rojo=" + "x" * 507], "rojo=" + "x" * 507),  # 512 characters must be handed on
        (["rojo=" + "x" * 508], None),
        (["rojo=ä"], None),  # gRPC would refuse the whole request
    ],
)
def test_a_tracestate_goes_with_it(headers: list[str], handed_on: str | None) -> None:
    expected = (("traceparent", EXAMPLE), *([("tracestate", handed_on)] if handed_on else []))
    assert trace_context.received([EXAMPLE], headers) == expected
    assert trace_context.received(["broken"], headers) == ()  # it is not even looked at


def test_what_triton_says_of_a_request() -> None:
    """As the Python backend of Triton 2.51 was seen to say it: JSON, or nothing where the request is not traced."""
    assert trace_context.of_triton(f'{{"traceparent":"{EXAMPLE}"}}') == (("traceparent", EXAMPLE),)
    for nothing in (None, "", "{}", "[]", "null", "{", '{"traceparent": 3}', '{"traceparent":"00-0-0-0"}'):
        assert trace_context.of_triton(nothing) == ()


def test_triton_is_told_of_sampled_traces_alone() -> None:
    for flags, told in (("00", False), ("01", True), ("02", False), ("03", True)):
        headers = trace_context.received([f"00-{TRACE}-{SPAN}-{flags}"], ["rojo=1"])
        assert trace_context.for_triton(headers) == (headers if told else ())
