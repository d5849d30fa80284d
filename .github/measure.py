# /// script
# requires-python = ">=3.11"
# dependencies = ["django","channels","daphne","uvicorn[standard]","django-htmx","dj-database-url","picows>=2"]
# ///
"""Measure what many rooms, or many windows, cost a copy of chat.py, on Linux.

    uv run .github/measure.py rooms      # one room, and then 2,000 more
    uv run .github/measure.py windows    # 10,000 windows in one room
    uv run .github/measure.py rooms --rooms 50 --json FILE

100 % of CPU are one core. A delivery lasts until the window of another person has the message.
"""

import argparse
import asyncio
import json
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import picows

PROJECT = Path(__file__).resolve().parent.parent
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
sent, closed = [], []  # when messages were sent; windows that the server closed


class Window(picows.WSListener):
    """An open window, which remembers when it first had each message; picows answers pings."""

    def on_ws_connected(self, transport):
        self.transport, self.heard, self.open = transport, {}, False

    def on_ws_frame(self, transport, frame):
        self.open = True
        for number in re.findall(rb"measured-(\d+)-", frame.get_payload_as_bytes()):
            self.heard.setdefault(int(number), time.perf_counter())

    def on_ws_disconnected(self, transport):
        closed.append(self)

    async def talk(self, times, pause):
        """Say something a few times, and return the numbers of these messages."""
        numbers = []
        for _ in range(times):
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            text = json.dumps({"chat_message": f"measured-{len(sent)}- lorem ipsum dolor sit amet"})
            numbers.append(len(sent))
            sent.append(time.perf_counter())
            self.transport.send(picows.WSMsgType.TEXT, text.encode())
        return numbers


async def every(windows, done):
    """Wait until something is so in every window."""
    while not closed and not all(map(done, windows)):
        await asyncio.sleep(0.01)
    if closed:
        sys.exit(f"The server closed {len(closed)} windows, so the figures would be wrong.")


async def open_windows(slugs):
    """Open a window in each of these rooms, one by one, until each has its first frame."""
    windows, host = [], f"127.0.0.1:{PORT}"
    options = {"extra_headers": {"Origin": f"http://{host}"}, "websocket_handshake_timeout": 60}
    for slug in slugs:
        url = f"ws://{host}/ws/chat/{slug}"
        windows.append((await picows.ws_connect(Window, url, **options))[1])
    await every(windows, lambda window: window.open)
    return windows


async def cpu(pid, rest):
    """Per cent of a core, once everybody has heard who is here."""
    await asyncio.sleep(5)
    clock = ~pid << 3 | 2  # that of the process, as clock_getcpuclockid(3) makes it
    used, began = time.clock_gettime(clock), time.perf_counter()
    await asyncio.sleep(rest)
    return round(100 * (time.clock_gettime(clock) - used) / (time.perf_counter() - began), 1)


async def rooms(pid, count, rest):
    """Measure one room, then many, then many in ten of which somebody talks once a second."""
    speaker, hearer = await open_windows(["lobby"] * 2)
    rows, others = [], []
    for name in "one room, two people", f"{count:,} more, a person in each", "ten of them talk":
        row = {"": name, "CPU, %": await cpu(pid, rest)}
        numbers = await speaker.talk(50, 0.2)
        await every([hearer], lambda window, numbers=numbers: window.heard.keys() >= set(numbers))
        ms = sorted(round(1000 * (hearer.heard[n] - sent[n]), 1) for n in numbers)
        rows.append(row | {"delivery, median, ms": ms[25], "p99, ms": ms[49]})
        for window in others[:10]:  # before the third row
            asyncio.create_task(window.talk(10**9, 1))
        others = others or await open_windows(f"room-{number}" for number in range(count))
    return rows


async def windows(pid, count, rest):
    """Measure one room with many windows."""
    status = Path(f"/proc/{pid}/status")
    [speaker] = await open_windows(["lobby"])
    await asyncio.sleep(2)
    before, began = status.read_text(), time.perf_counter()
    everyone = [speaker, *await open_windows(["lobby"] * (count - 1))]
    row = {"windows": count, "opened in, s": round(time.perf_counter() - began, 1)}
    row["CPU at rest, %"] = await cpu(pid, rest)
    kib = [int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in (before, status.read_text())]
    row["memory of each, KiB"] = round((kib[1] - kib[0]) / (count - 1), 1)
    took = []
    for _ in range(5):
        [number] = await speaker.talk(1, 1)
        await every(everyone, lambda window, number=number: number in window.heard)
        took.append(max(window.heard[number] for window in everyone) - sent[number])
    return [row | {"the last has a message after, s": round(sorted(took)[2], 3)}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["rooms", "windows"])
    parser.add_argument("--rooms", type=int, default=2_000)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--rest", type=int, default=40, help="s: 5 pings, and 4 signs of life")
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args()
    measure, count = globals()[options.what], getattr(options, options.what)
    limit = max(count + 200, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(PROJECT / "chat.py", folder)
        shutil.copytree(PROJECT / "templates", f"{folder}/templates")
        command, env = [sys.executable, "chat.py"], {"PORT": str(PORT)}
        with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL) as chat:
            try:
                while chat.poll() is None and socket.socket().connect_ex(("127.0.0.1", PORT)):
                    time.sleep(0.1)
                table = asyncio.run(measure(chat.pid, count, options.rest))
            finally:
                chat.terminate()
    for cells in table[0], ["---"] * len(table[0]), *(row.values() for row in table):
        print("|", " | ".join(map(str, cells)), "|")
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1))
