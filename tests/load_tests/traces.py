"""Traces in our form, as text and as random rows."""

import hypothesis.strategies as st

from load_tests.trace import TraceRow, num_blocks

HEADER = "arrival_s,prompt_tokens,output_tokens,prefix_ids\n"


@st.composite
def traces(draw):
    """Any trace that our form can hold, in order of arrival."""
    arrivals_s = sorted(draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=8)))
    rows = []
    for arrival_s in arrivals_s:
        prompt_tokens = draw(st.integers(1, 4000))
        ids = draw(st.lists(st.integers(0, 3), max_size=num_blocks(prompt_tokens)))
        rows.append(TraceRow(arrival_s, prompt_tokens, draw(st.integers(1, 4000)), tuple(ids)))
    return rows
