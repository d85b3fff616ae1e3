"""Which layers of an expert block route tokens, by their names and sizes."""

import re

_GATE = re.compile(r"(.*_)?(gate|router)s?|wg")
"""Matches names of routers: mlp.gate, mlp.gate.wg, router.layer, shared_expert_gate."""
_OF_MLP = re.compile(r"(gate|up|down|gate_up|fc|in|out|input|output)_?(proj|linear)|w[123]|fc[12]|c_fc|dense(_h_to_4h|_4h_to_h)?")
"""Matches names of the layers of an MLP."""


def is_gate(part: str) -> bool:
    """Whether a part of a path is the name of a router."""
    return _GATE.fullmatch(part) is not None


def routes(path: str, outputs: int, experts: int) -> bool:
    """Whether the layer at `path` within its block has the name of a router, or one output per expert and not the name of a part of an MLP.

    Shared experts may be as wide as there are experts: Qwen3-Next has 512 of both.
    """
    parts = path.split(".")
    return any(map(is_gate, parts)) or (outputs == experts and _OF_MLP.fullmatch(parts[-1]) is None)
