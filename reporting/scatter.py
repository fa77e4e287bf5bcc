"""Probe against distance as inline SVG, in the page's own style."""

import html

from metrics.published import Published
from reporting.correlation import View, labelled_points, published_points
from reporting.curves import Axis, axes

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
MOST_LABELS = 16


def scatter(view: View, published: Published) -> str:
    """The view's points filled, published ones hollow; the pointer tells each point's figures."""
    points, others = labelled_points(view), published_points(view, published)
    xs, ys = [x for _, x, _ in points + others], [y for *_, y in points + others]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, room=0.08)
    y = Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, room=0.1)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(view.title)}">']
    parts += axes(x, y, ("attribute probe, F1", html.escape(view.metric)))
    for kind, colour, these in (("hollow", 7, others), ("dot", 0, points)):
        for label, across, up in these:
            title = html.escape(f"{label}: F1 {across:.4f}, {view.metric} {up:.4g}")
            place = f'cx="{x.place(across):.1f}" cy="{y.place(up):.1f}"'
            parts.append(f'<circle class="{kind} c{colour}" {place} r="5"><title>{title}</title></circle>')
    parts += _labels(points + others, x, y)
    return "".join([*parts, "</svg>"])


def _labels(points: list[tuple[str, float, float]], x: Axis, y: Axis) -> list[str]:
    """Names beside their points, on the side with room, moved down where they would lie on one another."""
    if sum(bool(label) for label, *_ in points) > MOST_LABELS:
        return []
    parts, taken = [], []
    for label, across, up in sorted((point for point in points if point[0]), key=lambda point: y.place(point[2])):
        left, top = x.place(across), y.place(up) + 3.5
        goes_left = left > WIDTH * 0.6
        while any(abs(top - other) < 12 and abs(left - place) < 7 * len(label) for place, other in taken):
            top += 12
        taken.append((left, top))
        anchor, shift = ("end", -9) if goes_left else ("start", 9)
        place = f'x="{left + shift:.1f}" y="{top:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {place}>{html.escape(label)}</text>')
    return parts
