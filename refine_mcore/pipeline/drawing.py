"""A plan drawn as SVG: a row per stage, time to the right, one box per pass."""

from refine_mcore.pipeline.passes import Shape
from refine_mcore.pipeline.simulator import Timeline

_COLOURS = {  # of even and odd micro-batches
    "F": ("#7fb0dd", "#4f8cc4"),
    "D": ("#e0a100", "#e0a100"),
    "S": ("#8e5bb5", "#8e5bb5"),
    "W": ("#93cfa0", "#5aa96c"),
}
_NAMES = {"F": "forward", "D": "decode", "S": "branch scoring", "W": "backward"}
_LEFT, _TOP, _ROW, _HEIGHT, _WIDTH = 80, 60, 26, 22, 1400
_NARROWEST_LABEL = 12  # pixels that a micro-batch's number needs


def draw(shape: Shape, timeline: Timeline, title: str) -> str:
    """The timeline as the text of an SVG file; micro-batches of even and odd number differ in
    shade, and wide boxes carry the number."""
    height = _TOP + _ROW * shape.stages + 40
    scale = _WIDTH / timeline.step_time
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{_LEFT + _WIDTH + 20}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-weight="bold">{title}</text>',
    ]
    for i, (op, name) in enumerate(_NAMES.items()):
        x = _LEFT + 150 * i
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{_COLOURS[op][1]}"/>')
        parts.append(f'<text x="{x + 18}" y="45">{op} {name}</text>')
    for stage in range(shape.stages):
        y = _TOP + _ROW * stage
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 16}" text-anchor="end">stage {stage}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" fill="#f1f1f1"/>'
        )
        parts += _row(timeline, stage, scale, y)
    parts.append(
        f'<text x="{_LEFT}" y="{height - 14}">time 0</text>'
        f'<text x="{_LEFT + _WIDTH}" y="{height - 14}" text-anchor="end">'
        f"{timeline.step_time:.4g}</text></svg>\n"
    )
    return "\n".join(parts)


def _row(timeline: Timeline, stage: int, scale: float, y: int) -> list[str]:
    """One path per colour: a plan may have a million boxes. D and S lie on top and stay visible."""
    paths: dict[str, list[str]] = {c: [] for op in "FWDS" for c in _COLOURS[op]}
    labels = []
    for start, end, item in timeline.passes[stage]:
        x, width = _LEFT + scale * start, scale * (end - start)
        gap = min(0.5, width / 4)  # a hairline between passes of one colour
        drawn = max(width - gap, 1.0 if item.op in "DS" else 0.0)
        box = f"M{x:.2f} {y}h{drawn:.2f}v{_HEIGHT}H{x:.2f}z"
        paths[_COLOURS[item.op][item.microbatch % 2]].append(box)
        if width >= _NARROWEST_LABEL:
            labels.append(
                f'<text x="{x + width / 2:.1f}" y="{y + 15}" font-size="10" '
                f'text-anchor="middle">{item.microbatch}</text>'
            )
    filled = [(colour, boxes) for colour, boxes in paths.items() if boxes]
    return [f'<path fill="{colour}" d="{"".join(boxes)}"/>' for colour, boxes in filled] + labels
