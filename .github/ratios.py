# /// script
# requires-python = ">=3.11"
# ///
"""Draw how chat.py compares with other chats, from the figures that bench.py has written.

    uv run .github/ratios.py FILE    # made by: bench.py --json FILE

It prints a Markdown table, and writes ratios.svg next to this file.
"""

import json
import sys
from math import log10
from pathlib import Path
from statistics import median

PEERS = {
    "tutorial": "end of Channels' tutorial",
    "tornado": "Tornado's demo",
    "fastapi": "FastAPI's chapter",
    "raw": "bare ASGI",
}
SCENARIOS = {  # name: figure, what it says
    "fanout": ("deliveries_per_s", "deliveries: 200 windows, 1 message in flight"),
    "crowd": ("deliveries_per_s", "deliveries: 1000 windows, 1 in flight"),
    "busy": ("deliveries_per_s", "deliveries: 200 windows, 20 in flight"),
    "storm": ("deliveries_per_s", "deliveries: 1000 windows, 100 in flight"),
    "idle": ("kib_per_window", "memory of an idle window (less is better)"),
    "start": ("start_s", "time from start to the first page (less is better)"),
}
STYLE = """
  svg { --ink: #1b2230; --quiet: #566072; --more: #2452c9; --less: #b4690e; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e9ecf3; --quiet: #a4aec0; --more: #9db8ff; --less: #f0b35e; }
  }
  text { font: 12px system-ui, sans-serif; fill: var(--ink); }
  .quiet { fill: var(--quiet); } .end { text-anchor: end; } .middle { text-anchor: middle; }
  .title { font-size: 15px; font-weight: 600; } .more { fill: var(--more); }
  .less { fill: var(--less); } .line { stroke: var(--quiet); }
"""
TITLE = "How many messages chat.py delivers, for each that another chat delivers"
TOP, BOTTOM, LEFT, RIGHT, BAR, GAP = 46, 342, 342, 708, 17, 8  # of bars, in a picture of 760 x 366


def ratio(rounds, peer, figure):
    """The median of the rounds' ratios, or None."""
    pairs = zip(rounds.get("chat", []), rounds.get(peer, []))
    ratios = [ours[figure] / theirs[figure] for ours, theirs in pairs if theirs[figure]]
    return median(ratios) if ratios else None


def written(value):
    """A ratio as text."""
    if value is None:
        return "–"
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f} x"


def picture(ratios):
    """The scenarios about deliveries, as SVG."""
    drawn = {name: ratios[name] for name in ratios if name not in ("idle", "start")}
    values = [value for peers in drawn.values() for value in peers.values() if value] + [1]
    low, high = log10(min(values)), log10(max(values))

    def x(value):
        return round(LEFT + (RIGHT - LEFT) * (log10(value) - low) / (high - low or 1), 1)

    body, said, y = [], [], TOP
    for tick in (10**power for power in range(-3, 6) if low <= power <= high):
        top, name = (TOP - 6, "1 x: as many") if tick == 1 else (BOTTOM, f"{tick:g} x")
        body += [f'<path class="line" d="M{x(tick)} {top}V{BOTTOM + 5}"/>']
        body += [f'<text class="quiet middle" x="{x(tick)}" y="{BOTTOM + 18}">{name}</text>']
    for scenario, peers in drawn.items():
        what = SCENARIOS[scenario][1].removeprefix("deliveries: ")
        for line, text in enumerate(what.split(", ")):
            body += [f'<text x="8" y="{y + 30 + 16 * line}">{text}</text>']
        for peer, value in peers.items():
            body += [f'<text class="quiet end" x="280" y="{y + 13}">{PEERS[peer]}</text>']
            end, kind = x(value or 1), "more" if (value or 1) >= 1 else "less"
            left, width = min(end, x(1)), max(abs(end - x(1)), 1)
            size = f'width="{width:.1f}" height="{BAR - 5}"'
            body += [f'<rect class="{kind}" x="{left}" y="{y + 3}" {size} rx="2"/>']
            place = f'x="{end + 5}"' if kind == "more" else f'class="end" x="{end - 5}"'
            body += [f'<text {place} y="{y + 13}">{written(value)}</text>']
            y += BAR
        said += [f"{what}: " + ", ".join(f"{PEERS[p]} {written(v)}" for p, v in peers.items())]
        y += GAP
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="760" height="366"
 viewBox="0 0 760 366" role="img" aria-labelledby="title desc">
<title id="title">{TITLE}</title>
<desc id="desc">{"; ".join(said)}.</desc>
<style>{STYLE}</style>
<text class="title" x="8" y="22">{TITLE}</text>
{chr(10).join(body)}
</svg>
"""


if __name__ == "__main__":
    figures = json.loads(Path(sys.argv[1]).read_text())
    ratios = {
        name: {peer: ratio(figures[name], peer, figure) for peer in PEERS}
        for name, (figure, _) in SCENARIOS.items()
        if name in figures
    }
    Path(__file__).with_name("ratios.svg").write_text(picture(ratios), encoding="utf-8")
    print("| chat.py against |", " | ".join(PEERS.values()), "|")
    print("|---" * (1 + len(PEERS)) + "|")
    for name, peers in ratios.items():
        print("|", SCENARIOS[name][1], "|", " | ".join(map(written, peers.values())), "|")
