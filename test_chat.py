# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "django", "channels", "daphne", "uvicorn[standard]", "django-htmx", "dj-database-url",
#   "hypothesis", "playwright", "pytest", "websockets",
# ]
# ///
"""What chat.py promises, tried on real servers, over real sockets and in a real browser.

`uv run test_chat.py` runs all of it; what follows goes to pytest: `uv run test_chat.py -k kill`.
"""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

HERE = Path(__file__).resolve().parent
CHAT = [sys.executable, "chat.py"]

################ The stage: servers, windows, and lines that can be cut


def eventually(is_so, seconds=10):
    """Wait until the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not (result := is_so()):
        assert time.monotonic() < end, f"not within {seconds} s: {is_so}"
        time.sleep(0.02)
    return result


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A chat server in its own process, on a free port, with a database of its own."""

    def __init__(self, folder, command=CHAT, **environment):
        self.port, self.command, self.log_file = free_port(), command, folder / "log"
        self.url, self.database = f"http://127.0.0.1:{self.port}", folder / "test.sqlite3"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("DEBUG", "ALLOWED_HOSTS", "HOST")},
            "PORT": str(self.port),
            "DATABASE_URL": f"sqlite:///{self.database}",
            "SECRET_KEY": "for the tests " * 5,
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        self.start()

    def start(self):
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=HERE, env=self.environment, stdout=log, stderr=log
            )
        eventually(self.answers, 20)

    def answers(self):
        assert self.process.poll() is None, self.log()
        with suppress(OSError):
            return self.get("/").status == 200

    def get(self, path, **headers):
        return urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers))

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(10)

    def kill(self):
        self.stop(signal.SIGKILL)

    def log(self):
        return self.log_file.read_text()

    def manage(self, *command):
        """What a management command prints, run on this server's database."""
        run = [*CHAT, *command]
        return subprocess.check_output(run, cwd=HERE, env=self.environment, text=True)

    def stored(self, room):
        """The texts in the room's log, as the database has them."""
        with sqlite3.connect(self.database) as database:
            log = database.execute("SELECT text FROM chat_message WHERE room=? ORDER BY id", [room])
            return [text for (text,) in log]


class Client:
    """A plain WebSocket client: no browser, no cookie."""

    def __init__(self, server, room=None, **options):
        path = f"/ws/chat/{room}" if room else "/ws/chat"
        options = {"origin": "http://localhost", "max_size": None, **options}
        self.connecting = connect(server.url.replace("http", "ws") + path, **options)
        self.socket, self.frames = self.connecting.__enter__(), []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.connecting.__exit__(*error)

    def say(self, text, **more):
        self.socket.send(json.dumps({"chat_message": text, **more}))

    def hear(self, text, seconds=10):
        """The first frame that holds the text."""
        end = time.monotonic() + seconds
        while True:
            self.frames.append(self.socket.recv(timeout=end - time.monotonic()))
            if text in self.frames[-1]:
                return self.frames[-1]

    def texts(self):
        """All texts that it was shown, in order."""
        return re.findall(r'<p dir="auto">(.*?)</p>', "".join(self.frames), re.DOTALL)


class Line:
    """A TCP proxy in front of a server: it can be cut, hold bytes, or swallow them without a word."""

    def __init__(self, server):
        self.server, self.ends, self.free = server, [], threading.Event()
        self.mend()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            far = socket.socket()
            if self.is_cut or far.connect_ex(("127.0.0.1", self.server.port)):
                near.close()
                continue
            self.ends += near, far
            for carry in (near, far, "up"), (far, near, "down"):
                threading.Thread(target=self.carry, args=carry, daemon=True).start()

    def carry(self, source, target, direction):
        with suppress(OSError):
            while data := source.recv(65536):
                self.free.wait()
                if direction not in self.swallowed:
                    target.sendall(data)
        for end in source, target:
            end.close()

    def cut(self):
        """End every connection, and refuse new ones."""
        self.is_cut = True
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def swallow(self, *directions):
        """Take bytes that go up to the server or down to the browser, and lose them."""
        self.swallowed = directions

    def hold(self):
        """Keep all bytes until the line is mended."""
        self.free.clear()

    def mend(self):
        """Let everything pass. A connection that lost bytes stays broken, as it does outside."""
        self.is_cut, self.swallowed = False, ()
        self.free.set()


class Window:
    """A browser window in a room."""

    def __init__(self, context, server, room=None):
        self.page = context.new_page()
        self.page.goto(f"{server.url}/chat/{room}/" if room else server.url)

    def open(self):
        eventually(lambda: self.status() == "Connected")
        return self

    def say(self, text):
        self.page.fill("input[name=chat_message]", text)
        self.page.keyboard.press("Enter")

    def texts(self, where="#content p"):
        return self.page.locator(where).all_inner_texts()

    def unsent(self):
        return self.texts("#unsent li")

    def status(self):
        return self.page.inner_text("#status")

    def box(self):
        return self.page.input_value("input[name=chat_message]")

    def shows(self, *texts):
        return eventually(lambda: self.texts() == list(texts) and not self.unsent())


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that do not harm it."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path):
    """A server to be killed."""
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def room():
    return f"room-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def browser():
    path = shutil.which("google-chrome") or shutil.which("chromium") or shutil.which("chrome")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Exception as error:
            if os.getenv("CI"):
                raise
            pytest.skip(f"no Chrome or Chromium to be found: {error}")
        yield browser
        browser.close()


@pytest.fixture
def open_window(browser):
    """Opens windows, each of a person of its own."""
    contexts = []

    def open_window(server, room=None, **options):
        contexts.append(browser.new_context(**options))
        return Window(contexts[-1], server, room)

    yield open_window
    for context in contexts:
        context.close()


################ Sending: stored exactly once, or still on the screen


def test_what_is_typed_in_one_window_is_seen_in_the_other(server, room, open_window):
    ann, bob = open_window(server, room).open(), open_window(server, room).open()
    ann.say("hello")
    bob.shows("hello")
    bob.say("hi Ann")
    ann.shows("hello", "hi Ann")
    assert server.stored(room) == ["hello", "hi Ann"]


def test_a_cut_line_keeps_what_is_typed_and_sends_it_later(server, room, open_window):
    line = Line(server)
    ann, bob = open_window(line, room).open(), open_window(server, room).open()
    ann.say("one")
    line.cut()
    for text in ("two", "three", "three"):
        ann.say(text)
    assert ann.unsent()[-3:] == ["two", "three", "three"]
    eventually(lambda: "No connection" in ann.status())
    bob.shows("one")
    bob.say("meanwhile")
    line.mend()
    for window in ann, bob:
        window.shows("one", "meanwhile", "two", "three", "three")
    assert server.stored(room) == ["one", "meanwhile", "two", "three", "three"]


def test_a_line_that_swallows_bytes_is_noticed_within_ten_seconds(server, room, open_window):
    """What goes up is never heard; what goes down was stored, but is never acknowledged."""
    swallowed = {"up": ["up"], "down": ["down"], "both": ["up", "down"]}
    lines = {name: Line(server) for name in swallowed}
    windows = {name: open_window(line, f"{room}-{name}").open() for name, line in lines.items()}
    for name, window in windows.items():
        lines[name].swallow(*swallowed[name])
        window.say("one")
        window.page.keyboard.type("half a sen")
    eventually(lambda: server.stored(f"{room}-down") == ["one"])
    for name, window in windows.items():
        assert window.unsent() == ["one"]
        eventually(lambda window=window: window.status() != "Connected", 10)
        lines[name].mend()
    for name, window in windows.items():
        window.shows("one")
        window.page.keyboard.type("tence")
        assert window.box() == "half a sentence"
        window.page.keyboard.press("Enter")
        window.shows("one", "half a sentence")
        assert server.stored(f"{room}-{name}") == ["one", "half a sentence"]


def test_a_server_killed_at_the_press_of_enter_loses_and_repeats_nothing(
    own_server, room, open_window
):
    ann, bob = open_window(own_server, room).open(), open_window(own_server, room).open()
    said = [f"message {number}" for number in range(100)]
    for number, text in enumerate(said):
        ann.say(text)
        if number in (10, 50, 90):
            own_server.kill()
        if number in (30, 51, 99):
            own_server.start()
    eventually(lambda: own_server.stored(room) == said)
    for window in ann, bob:
        window.shows(*said[-len(window.texts()) :])


def test_a_line_cut_at_every_press_of_enter_loses_and_repeats_nothing(server, room, open_window):
    line = Line(server)
    ann, said = open_window(line, room).open(), [f"message {number}" for number in range(20)]
    for number, text in enumerate(said):
        ann.say(text)
        time.sleep(0.002 * (number % 5))  # before, amid and after storing and acknowledging
        line.cut()
        if number % 3:
            line.mend()
            ann.open()
    line.mend()
    ann.shows(*said)
    assert server.stored(room) == said


################ Seeing: every window comes to show the room's log


def test_windows_that_were_away_come_to_show_the_same_log(own_server, room, open_window):
    line = Line(own_server)
    windows = [open_window(by, room).open() for by in (own_server, line, own_server)]

    def write(name):
        """Say 150 things as a client does that wants all of them stored."""
        for number in range(150):
            key, acknowledged = str(uuid.uuid4()), False
            while not acknowledged:
                with suppress(OSError, WebSocketException), Client(own_server, room) as client:
                    client.say(f"{name} {number}", key=key)
                    acknowledged = client.hear(f'id="unsent-{key}"', 2)

    writers = [threading.Thread(target=write, args=[name]) for name in ("Cleo", "Dan")]
    for writer in writers:
        writer.start()
    for _ in range(2):
        line.cut()
        before = len(own_server.stored(room))
        eventually(lambda before=before: len(own_server.stored(room)) > before + 30)
        line.mend()
        own_server.kill()
        own_server.start()
    for writer in writers:
        writer.join()
    log = own_server.stored(room)
    assert sorted(log) == sorted(f"{name} {n}" for name in ("Cleo", "Dan") for n in range(150))
    for window in windows:
        window.open()
        eventually(lambda window=window: window.texts()[-1:] == log[-1:], 2)
        assert window.texts() == log[-len(window.texts()) :]
        assert len(window.texts()) >= 50


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", __file__, *sys.argv[1:]]))
