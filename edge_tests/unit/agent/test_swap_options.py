from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent import swap_options
from agent.config import AgentConfig
from agent.judging import Gates, ShadowTerms
from agent.swap import Terms

CONFIG = AgentConfig(control_address="c:1")
PAGE = (Path(__file__).parents[3] / "docs" / "agent-serving.md").read_text("utf-8")
MANUAL = PAGE.split("## Options of a variant")[1].split("\n## ")[0]


def test_defaults_have_the_gates_on_and_the_shadow_off() -> None:
    terms, faults = swap_options.read({}, CONFIG)
    assert terms == Terms(ShadowTerms(), Gates(), reserve_bytes=32 << 20)
    assert terms.shadow.share == 0
    assert (terms.gates.error_share, terms.gates.latency_ratio) == (0.05, 2.0)
    assert faults == []


def test_a_variant_says_otherwise() -> None:
    options = {
        "shadow_percent": "2.5",
        "shadow_s": "90",
        "shadow_requests": "500",
        "shadow_cosine": "0.8",
        "shadow_max_error": "0.25",
        "shadow_mismatch_percent": "1",
        "soak_s": "600",
        "soak_requests": "200",
        "soak_error_percent": "100",
        "soak_latency_ratio": "0",
        "keep_previous": "disk",
        "memory_short": "stop-then-start",
        "threads": "3",  # of options.py
    }
    terms, faults = swap_options.read(options, CONFIG)
    assert terms == Terms(
        ShadowTerms(0.025, 90, 500, 0.8, 0.25, 0.01),
        Gates(200, 1.0, 0.0),
        soak_s=600,
        keep_warm=False,
        stop_first=True,
        reserve_bytes=32 << 20,
    )
    assert faults == []
    documented = set(re.findall(r"^\| `(\w+)` \|", MANUAL, re.MULTILINE))
    assert set(options) <= documented


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shadow_percent", "101"),
        ("shadow_percent", "-1"),
        ("shadow_percent", "1e1"),
        ("shadow_percent", "nan"),
        ("shadow_cosine", "1.5"),
        ("soak_requests", "1025"),
        ("soak_requests", "٣"),
        ("keep_previous", "hot"),
        ("memory_short", ""),
    ],
)
def test_what_is_not_understood_is_left_and_reported(name: str, text: str) -> None:
    terms, faults = swap_options.read({name: text}, CONFIG)
    assert terms == swap_options.read({}, CONFIG)[0]
    assert len(faults) == 1
    assert faults[0].startswith(f"option {name} is ")
