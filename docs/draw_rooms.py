"""Draws the rooms of the package with their imports: ``python docs/draw_rooms.py > docs/rooms.svg``.

Reads the sources as text and runs nothing. Rooms stand in rows, as the contract in pyproject.toml lists them:
a room imports from rows below its own. Dashed lines show imports that wait until a function runs.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import Counter
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
WIDTH, ROW, BOX, HIGH = 980, 92, 132, 44


def rows() -> list[list[str]]:
    """The rooms row by row, from the layers that import-linter holds."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [
        [room.strip(" ()").removeprefix("stitchcache.") for room in layer.replace(":", "|").split("|")]
        for layer in layers
    ]


def room_of(module: str, rooms: set[str]) -> str | None:
    """The room of a dotted name inside the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "stitchcache" and parts[1] in rooms else None


def imports(rooms: set[str]) -> Counter[tuple[str, str, bool]]:
    """How often one room imports another: at import time, or later."""
    found: Counter[tuple[str, str, bool]] = Counter()
    for path in sorted((TOP / "stitchcache").rglob("*.py")):
        own = path.relative_to(TOP / "stitchcache").parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        late = {id(inner) for node in ast.walk(tree) for inner in _later(node)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for other in {room_of(name, rooms) for name in names} - {None, own}:
                if own in rooms and other is not None:
                    found[own, other, id(node) in late] += 1
    return found


def _later(node: ast.AST) -> list[ast.AST]:
    checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or checking:
        return list(ast.walk(node))
    return []


def sizes(room: str) -> tuple[int, int]:
    """Files and lines of a room."""
    place = TOP / "stitchcache" / room
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return len(files), sum(len(file.read_text().splitlines()) for file in files if file.exists())


def draw() -> str:
    """The picture as SVG; it follows the viewer's light or dark scheme."""
    listed = rows()
    rooms = {room for row in listed for room in row}
    place = {
        room: ((WIDTH - len(row) * (BOX + 24)) / 2 + i * (BOX + 24) + 12, y * ROW + 16)
        for y, row in enumerate(listed)
        for i, room in enumerate(row)
    }
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {len(listed) * ROW}" '
        'font-family="sans-serif">',
        "<style>rect{fill:#f4f4f0;stroke:#666}text{fill:#222;text-anchor:middle}path{fill:none;stroke:#8aa}"
        ".late{stroke-dasharray:2 4}@media(prefers-color-scheme:dark){rect{fill:#23272b;stroke:#999}"
        "text{fill:#eee}path{stroke:#577}}</style>",
    ]
    arrows: dict[tuple[str, str], tuple[int, bool]] = {}
    for (own, other, late), count in imports(rooms).items():
        many, all_late = arrows.get((own, other), (0, True))
        arrows[own, other] = (many + count, all_late and late)
    for (own, other), (count, late) in sorted(arrows.items()):
        (x1, y1), (x2, y2) = place[own], place[other]
        start, end = (x1 + BOX / 2, y1 + HIGH), (x2 + BOX / 2, y2)
        bend = (end[1] - start[1]) / 2
        dashes = ' class="late"' if late else ""
        out.append(
            f'<path{dashes} stroke-width="{min(0.6 + count / 12, 3):.1f}" '
            f'd="M{start[0]:.0f} {start[1]:.0f}C{start[0]:.0f} {start[1] + bend:.0f} {end[0]:.0f} '
            f'{end[1] - bend:.0f} {end[0]:.0f} {end[1]:.0f}"><title>{own} imports {other}</title></path>'
        )
    for room, (x, y) in place.items():
        files, lines = sizes(room)
        out.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>'
            f'<text x="{x + BOX / 2:.0f}" y="{y + 19:.0f}" font-size="14">{room}</text>'
            f'<text x="{x + BOX / 2:.0f}" y="{y + 35:.0f}" font-size="10">{files} files, {lines} lines</text>'
        )
    return "\n".join([*out, "</svg>"])


if __name__ == "__main__":
    sys.stdout.write(draw() + "\n")
