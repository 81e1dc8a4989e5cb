"""A second opinion: step time and held activations from nothing but a plan's ordered passes."""

from typing import Any

Key = tuple[str, int, int, int]
_CHANNELS = {"F": "forward", "D": "branches", "W": "backward", "token": "token"}


def replay(plan: dict[str, Any]) -> tuple[float, list[int]]:
    """Replay the JSON form of a plan with sends that wait for their receiver.

    Repeats over the stages, running on each what can run, until nothing moves. The dependencies
    are written down once more here, from the description of the step.

    Returns:
        The step time, and per stage the most micro-batches held.
    """
    stages = [
        [(p["op"], p["microbatch"], p["slice"], p["step"]) for p in s] for s in plan["stages"]
    ]
    last, n, phase = len(stages) - 1, plan["shape"]["slices"], plan["shape"]["phase"]
    rolling = {(s, key[1]) for s, order in enumerate(stages) for key in order if key[0] == "S"}
    ends: dict[tuple[int, Key], float] = {}  # when the output of a pass is handed over
    reached = [[0.0] for _ in stages]  # when a stage is free for its i-th pass

    def producers(stage: int, key: Key) -> list[tuple[int, Key]]:
        op, m, i, j = key
        steps = plan["shape"]["decode_passes"]
        text_done: tuple[int, Key] = (last, ("F", m, n - 1, 0))
        if op == "F":
            return [(stage - 1, key)] * (stage > 0) + [(stage, ("F", m, i - 1, 0))] * (i > 0)
        if op == "S" and phase == "train":
            return [(stage, ("F", m, n - 1, 0))] + [(stage - 1, key)] * (stage > 0)
        if op in "DS" and stage > 0:
            return [(stage - 1, key)]
        if op == "D":
            return [(last, ("D", m, n - 1, j - 1)) if j else text_done]
        if op == "S":
            return [(last, ("D", m, n - 1, steps - 1)) if steps else text_done]
        if i < n - 1:
            return [(stage, ("W", m, i + 1, 0))] + [(stage + 1, key)] * (stage < last)
        if stage < last:
            return [(stage + 1, key)]
        return [(last, ("S", m, n - 1, 0)) if (last, m) in rolling else text_done]

    # Per channel into a stage, the indices of the passes there that consume its messages, in order.
    consumers: dict[tuple[str, int], list[int]] = {}
    where: dict[tuple[int, Key], tuple[str, int, int]] = {}
    targets: dict[tuple[int, Key], tuple[int, Key]] = {}
    for s, order in enumerate(stages):
        for index, key in enumerate(order):
            for source in producers(s, key):
                if source[0] != s:
                    kind = "token" if s == 0 and key[0] in "DS" else key[0].replace("S", "D")
                    channel = consumers.setdefault((kind, s), [])
                    where[s, key] = (kind, s, len(channel))
                    channel.append(index)
                    targets[source] = (s, key)

    def send(stage: int, key: Key, end: float) -> float | None:
        """When the output is received; None: the receiver is not there yet."""
        if (stage, key) not in targets:
            return end
        kind, receiver, place = where[targets[stage, key]]
        ahead = plan["receives_ahead"][_CHANNELS[kind]]
        if place < ahead:
            return end
        index = consumers[kind, receiver][place - ahead]
        return max(end, reached[receiver][index]) if len(reached[receiver]) > index else None

    costs = plan["costs"]
    cost = {
        "F": costs["forward"] / n + costs["overhead"],
        "D": costs["decode"],
        "S": costs["scoring"],
        "W": costs["backward"] / n + costs["overhead"],
    }
    moved = True
    while moved:
        moved = False
        for s, order in enumerate(stages):
            while len(reached[s]) <= len(order):
                key = order[len(reached[s]) - 1]
                inputs = producers(s, key)
                if any(source not in ends for source in inputs):
                    break
                start = max([reached[s][-1], *(ends[source] for source in inputs)])
                branches = key[0] == "W" and key[2] == n - 1 and (s, key[1]) in rolling
                handed = send(s, key, start + cost[key[0]] + branches * costs["scoring_backward"])
                if handed is None:
                    break
                ends[s, key] = handed
                reached[s].append(handed)
                moved = True
    assert all(len(r) == len(o) + 1 for r, o in zip(reached, stages, strict=True)), "stuck"
    return max(r[-1] for r in reached), [_held(order, phase) for order in stages]


def _held(order: list[Key], phase: str) -> int:
    alive, most = set(), 0
    for op, m, i, _ in order:
        if op == "F":
            alive.add(m)
        most = max(most, len(alive))
        if (op == "S") if phase == "rollout" else (op == "W" and i == 0):
            alive.remove(m)
    return most
