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
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect, sync_playwright
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

HERE = Path(__file__).resolve().parent
CHAT = [sys.executable, "chat.py"]
UVICORN = [sys.executable, "-m", "uvicorn", "--port", "PORT", "chat:application"]
DAPHNE = [sys.executable, "-m", "daphne", "-p", "PORT", "chat:application"]

################ The stage: servers, windows, and lines that can be cut


def eventually(is_so, seconds=10):
    """Wait until the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not (result := is_so()):
        assert time.monotonic() < end, f"not within {seconds} s: {is_so}"
        time.sleep(0.02)
    return result


def together(do, things):
    """Do it to all things at the same time."""
    threads = [threading.Thread(target=do, args=[thing]) for thing in things]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
        self.process.wait(10)

    def kill(self):
        self.stop(signal.SIGKILL)

    def log(self):
        return self.log_file.read_text()

    def run(self, *command, **environment):
        """`python chat.py` with a command, on this server's port and database."""
        env, command = {**self.environment, **environment}, [*CHAT, *command]
        return subprocess.run(
            command, check=False, cwd=HERE, env=env, capture_output=True, text=True
        )

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

    def newest(self, part="p"):
        return self.page.locator(f"#content article:last-child {part}")

    def unsent(self):
        return self.texts("#unsent li")

    def status(self):
        return self.page.inner_text("#status")

    def box(self):
        return self.page.input_value("input[name=chat_message]")

    def shows(self, *texts):
        eventually(lambda: self.texts() == list(texts) and not self.unsent())

    def shows_the_end_of(self, log, seconds=10):
        """An unbroken run of the log up to its newest message, at least the history of 50."""
        eventually(
            lambda: (texts := self.texts()) == log[-len(texts) :] and len(texts) >= 50, seconds
        )
        assert not self.unsent()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that do not harm it."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path):
    """Starts servers that end with the test."""
    with ExitStack() as ends:

        def start(*arguments):
            server = Server(tmp_path, *arguments)
            ends.callback(server.stop)
            return server

        yield start


@pytest.fixture
def own_server(start):
    """A server to be killed."""
    return start()


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
        window.shows_the_end_of(said)


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
        window.shows_the_end_of(log, 2)


def test_twenty_people_typing_at_full_speed_all_see_the_whole_log(server, room, open_window):
    line = Line(server)
    ann = open_window(line, room).open()
    with ExitStack() as clients:
        people = [clients.enter_context(Client(server, room)) for _ in range(20)]
        away = clients.enter_context(Client(line, room))
        line.hold()
        together(lambda client: [client.say(str(count)) for count in range(25)], people)
        eventually(lambda: len(server.stored(room)) == 500, 30)
        line.mend()
        people[0].say("the end")
        for client in *people, away:
            client.hear("the end")
            assert client.texts() == server.stored(room)
        ann.shows(*server.stored(room))


UNTRUSTED = """
import chat, uvicorn
layer = chat.layers.get_channel_layer()
group_send = layer.group_send
async def untrusted(group, event):
    if group == "room.fails":
        raise ConnectionError("the layer is down")
    for _ in range({"room.drops": 0, "room.repeats": 150}[group]):
        await group_send(group, event)
layer.group_send = untrusted
uvicorn.run(chat.application, port=PORT, log_level="warning")
"""


def test_a_layer_that_fails_drops_or_repeats_events_costs_two_seconds_at_most(start):
    server = start([sys.executable, "-c", UNTRUSTED])
    for room in "fails", "drops", "repeats":
        with Client(server, room) as ann, Client(server, room) as bob:
            for text in "one", "two", "three":
                key = str(uuid.uuid4())
                ann.say(text, key=key)
                ann.hear(f"unsent-{key}", 2)
            for client in ann, bob:
                client.hear("three", 4)
                assert client.texts() == ["one", "two", "three"]
    assert "Traceback" not in server.log()


def test_the_same_key_is_one_message_and_tells_nothing_of_whose_it_is(server, room):
    keys = [str(uuid.uuid4()) for _ in range(20)]
    with Client(server, room) as ann, Client(server, room) as bob, Client(server) as carl:
        for _ in range(2):
            ann.say("typed twice")
            for key in keys:
                ann.say(key, key=key)
                bob.say(key, key=key)
        answers = {c.hear(f"unsent-{k}").replace(k, "") for c in (ann, bob) for k in keys * 2}
        carl.say("not yours", key=keys[0])
        answers.add(carl.hear(f"unsent-{keys[0]}").replace(keys[0], ""))
    assert len(answers) == 1
    assert sorted(server.stored(room)) == sorted([*keys, "typed twice", "typed twice"])
    assert "not yours" not in server.stored("lobby")


################ Standing: nobody notices what one client does, or leaves undone

MALFORMED = [
    *("no JSON", "[]", "7", '"text"', "null", "{}", "", "[" * 200_000, b"", b"\xff", "1" * 5000),
    *('{"chat_message": %s}' % value for value in ("7", "[]", "{}", "true", '" "', '"\\u0000"')),
    *(json.dumps({"chat_message": "x", "key": key}) for key in ("7", "\0", "\ud800", "<b>")),
    *(json.dumps({"chat_message": "a" + "\u0301" * length}) for length in (9000, 17_000_000)),
]
UNUSUAL = ["\u202eright to left", "a" + "\u0301" * 1999, "{{ 7 }}", "<script>alert(1)</script>"]
UNUSUAL += ["<b hx-get='/' hx-trigger='load' hx-swap-oob='true' id='content'>", "\ud800", "end"]


@pytest.mark.parametrize("command", [CHAT, DAPHNE], ids=["uvicorn", "daphne"])
def test_malformed_frames_are_answered_and_nobody_else_notices(start, command):
    server = start(command)
    with Client(server) as bystander, Client(server, close_timeout=0) as flooder:
        for frame in MALFORMED:
            with Client(server, uuid.uuid4().hex) as client:
                try:
                    client.socket.send(frame)
                    client.hear("</p>", 5)
                except ConnectionClosed as closed:
                    assert len(frame) > 10**6, frame[:50]
                    assert not closed.rcvd or closed.rcvd.code == 1009  # a reset may overtake it
        for _ in range(1000):
            flooder.socket.send("[]")
        for text in UNUSUAL:
            bystander.say(text, **{"\ud800": "1", "a": "\ud800", "errors": "x", "HEADERS": {}})
            bystander.hear("</article>", 3)
        assert server.stored("lobby") == [text.replace("\ud800", "?") for text in UNUSUAL]
        assert "<script" not in str(bystander.frames) and "<b hx" not in str(bystander.frames)
    assert "Traceback" not in server.log()


def test_no_frame_whatsoever_ends_a_connection(server, room):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
    ours = st.fixed_dictionaries({}, optional={"chat_message": anything, "key": anything})
    text = st.text(st.characters(codec="utf-8"))
    with Client(server, room) as client:

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(text | st.binary() | anything.map(json.dumps) | ours.map(json.dumps))
        def is_survived(frame):
            key = str(uuid.uuid4())
            client.socket.send(frame)
            client.say("", key=key)
            client.hear(f'data-key="{key}"')

        is_survived()
    assert "Traceback" not in server.log()


def test_a_refused_socket_gets_a_code_that_ends_retries_and_one_line_of_log(own_server):
    before = own_server.log().count("\n")
    strangers = ("no/such/path", "http://localhost"), (None, "http://evil.example"), (None, None)
    for number, (path, origin) in enumerate(strangers, 1):
        with Client(own_server, path, origin=origin) as client:
            with pytest.raises(ConnectionClosed) as closed:
                client.hear("anything")
        assert 4000 <= closed.value.rcvd.code < 5000
        eventually(lambda lines=before + number: own_server.log().count("\n") == lines)
    assert "Traceback" not in own_server.log()


def delivery(ann, bob):
    """The median of the seconds that a message takes from one to the other."""
    times = []
    for _ in range(40):
        time.sleep(0.02)  # the server's pause after each frame
        text, start = uuid.uuid4().hex, time.monotonic()
        ann.say(text)
        bob.hear(text)
        times.append(time.monotonic() - start)
    return statistics.median(times)


def test_readers_that_stop_and_a_flooder_hold_up_nobody_nor_the_end(own_server, room):
    def memory():
        status = Path(f"/proc/{own_server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # MB

    def stuck_reader():
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.connect(("127.0.0.1", own_server.port))
        return Client(own_server, room, sock=end, max_queue=1, ping_interval=None, close_timeout=0)

    with ExitStack() as clients:
        enter = clients.enter_context
        ann, bob, *writers = (enter(Client(own_server, room, close_timeout=0)) for _ in range(6))
        undisturbed, before = delivery(ann, bob), memory()
        stuck = [enter(stuck_reader()) for _ in range(10)]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(150)], writers)
        eventually(lambda: len(own_server.stored(room)) == 640, 30)
        assert memory() - before < 40
        assert delivery(ann, bob) < 2 * undisturbed + 0.005
        flood = threading.Thread(target=lambda: [writers[0].say("flood") for _ in range(3000)])
        flood.start()
        assert delivery(ann, bob) < 2 * undisturbed + 0.005
        writers[0].socket.socket.shutdown(socket.SHUT_RDWR)
        ann.say("the end")
        for client in stuck[1:]:
            client.hear("the end", 20)
            assert client.texts() == own_server.stored(room)[: len(client.texts())]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(100)], writers[1:])
        started = time.monotonic()
        own_server.stop(signal.SIGINT)
        assert time.monotonic() - started < 5
    assert "Traceback" not in own_server.log()


COUNTING = """
import asyncio, os, chat, uvicorn
async def counting(scope, receive, send):
    if scope["path"] != "/counts":
        return await chat.application(scope, receive, send)
    layer, files = chat.layers.get_channel_layer(), os.listdir("/proc/self/fd")
    counts = [len(c) for c in (files, asyncio.all_tasks(), chat.rooms, layer.groups, layer.channels)]
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": str(counts).encode()})
uvicorn.run(counting, port=PORT, log_level="warning")
"""


def test_a_thousand_visits_that_end_in_every_way_leave_nothing_behind(start, room):
    server = start([sys.executable, "-c", COUNTING])

    def counts():
        return json.loads(server.get("/counts").read())

    def visit(number):
        client = Client(server, "no/such" if number % 5 == 4 else f"{room}-{number % 7}")
        if number % 5 == 1:
            client.say("cut off while the server stores this")
            linger = struct.pack("ii", 1, 0)
            client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.socket.socket.close()
        elif number % 5 == 2:
            client.socket.socket.sendall(b"no frame at all" * 9)
        elif number % 5 == 3:
            server.get("/").read()
        client.socket.close()

    together(visit, range(10))
    time.sleep(3)
    before = counts()
    for start in range(10, 1010, 20):
        together(visit, range(start, start + 20))
    eventually(lambda: all(now <= then + 2 for now, then in zip(counts(), before)))
    assert "Traceback" not in server.log()


def test_markup_that_got_past_escaping_does_not_run(start, tmp_path, open_window):
    program = shutil.copy(HERE / "chat.py", tmp_path)
    shutil.copytree(HERE / "templates", tmp_path / "templates")
    template = tmp_path / "templates/message.html"
    template.write_text(template.read_text().replace("message.text", "message.text|safe"))
    server, refused = start([sys.executable, program]), []
    ann = open_window(server).open()
    ann.page.on("console", lambda line: refused.append("Content Security Policy" in line.text))
    for _ in range(2):
        ann.say("""<i onclick="document.title='run'">x</i><img src=x onerror="document.title='run'">
            <script>document.title='run'</script><a href="javascript:document.title='run'">y</a>""")
        ann.page.locator("#content i").first.click()
        ann.page.locator("#content a").first.click()
        ann.page.reload()
        ann.open()
    assert ann.page.title() == "#lobby · Chat" and any(refused)
    with Client(server) as bob:
        frame = bob.hear("#content")
        assert not any(cookie["value"] in frame for cookie in ann.page.context.cookies())
        assert "csrf" not in frame and "nonce" not in frame


################ The page


def test_rooms_keep_to_themselves_and_show_texts_as_typed(server, room, open_window):
    tag, script = "<img src=x onerror='document.title = 1'>", "<script>document.title = 1</script>"
    swap = """'"><p id="status" hx-swap-oob="true" hx-on:click="x">&lt;{{ me }}</p>"""
    said = [*(f"message {number}" for number in range(57)), tag, script, swap]
    ann, eve = open_window(server, room).open(), open_window(server, f"{room}-2").open()
    with Client(server, room) as client:
        for text in said:
            client.say(text)
        client.hear("me }}")
    open_window(server, room, java_script_enabled=False).shows(*said[-50:])
    bob = open_window(server, room).open()
    bob.say("for Ann")
    bob.shows(*said[-50:], "for Ann")
    ann.shows(*said, "for Ann")
    color = "p => getComputedStyle(p.parentNode).backgroundColor"
    assert ann.newest().evaluate(color) != bob.newest().evaluate(color)
    assert re.search(r"\d:\d\d", ann.newest("time").inner_text())
    for window in ann, bob:
        expect(window.newest()).to_be_in_viewport()
        assert not window.texts("#content :is(img, script, p p)")
    empty = "getComputedStyle(document.querySelector('#content'), '::before').content"
    assert ann.page.evaluate(empty) == "none" and "Nobody" in eve.page.evaluate(empty)
    eve.say("alone")
    eve.shows("alone")


def test_a_new_name_counts_in_all_tabs_and_nobody_takes_an_account_s(server, room, open_window):
    create = ("createsuperuser", "--noinput", "--username=AdaLovelace", "--email=ada@example.org")
    assert server.run(*create, DJANGO_SUPERUSER_PASSWORD="engine").returncode == 0
    tab = open_window(server, room).open()
    page = Window(tab.page.context, server, room).page
    lookalikes = [f"AdaLovelace{space}" for space in "\u00a0\u3164\u200b\u00ad"]
    bad = [" ", "\u2003", "\u2800", "x" * 99, "adalovelace", "✓", *lookalikes]
    good = """Zoë <b hx-on:click='x'>"&amp;"""
    for name in *bad, good:
        page.fill("[name=name]", name)
        page.click("text=Rename")
        assert (len(page.inner_text("#error").split()) > 3) == (name != good), ascii(name)
        assert page.input_value("[name=name]") == name
    tab.say("as a guest")
    expect(tab.newest("bdi")).to_have_text(good)
    page.click("text=Log in")
    for field, text in ("username", "AdaLovelace"), ("password", "engine"):
        page.fill(f"[name={field}]", text)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{server.url}/")
    tab.page.reload()
    tab.open().say("with account")
    expect(tab.newest("small")).to_contain_text("AdaLovelace ✓ account")
    page.click("text=Log out")
    tab.say("without")
    tab.shows("as a guest", "with account", "without")
    assert not re.search("AdaLovelace|account", tab.newest("small").inner_text())


def test_the_page_works_without_javascript(server, room, open_window):
    bob = open_window(server, room).open()
    ann = open_window(server, room, java_script_enabled=False)
    post, secret = ann.page.context.request.post, "csrfmiddlewaretoken"
    for text in "one", "two", "three":
        fields = {name: ann.page.input_value(f"#form [name={name}]") for name in ("key", secret)}
        ann.say(text)
        expect(bob.newest()).to_have_text(text, timeout=1000)  # before the room looks by itself
        expect(ann.newest()).to_have_text(text)
    assert post(ann.page.url, form={**fields, "chat_message": "three"}).status == 200
    assert post(ann.page.url, form={"chat_message": "forged"}).status == 403
    ann.page.reload()
    assert ann.texts() == bob.texts() == server.stored(room) == ["one", "two", "three"]
    for window, text in (ann, " "), (bob, " "), (ann, "x" * 2001), (bob, "x" * 2001):
        window.say(text)
        expect(window.page.locator("#error")).to_have_text(re.compile("Please|2000"))
        expect(window.page.locator("[name=chat_message]")).to_have_value(text)
    bob.say("four")
    bob.shows("one", "two", "three", "four")
    assert bob.page.inner_text("#error") == ""


def test_a_plain_client_and_a_bare_page_take_part(server, open_window):
    bare, hello = open_window(server), f"hello {uuid.uuid4()}"
    assert "DEBUG" not in bare.page.goto(f"{server.url}/nowhere").text()
    bare.page.set_content("""<script src="/static/django_htmx/htmx-2.min.js"></script>
        <script src="/static/django_htmx/ext/hx-ws-2.min.js"></script><div id="content"></div>
        <div hx-ext="ws" ws-connect="/ws/chat">
        <form id="form" ws-send><input name="chat_message"></form></div>""")
    with Client(server) as client:
        for say in client.say, bare.say:
            say(hello)
            assert 'hx-swap-oob="beforeend:#content"' in client.hear(hello)
            expect(bare.newest()).to_have_text(hello)


def test_the_keyboard_is_enough_and_nothing_leaves_for_other_hosts(server, room, open_window):
    ann, requests, console = open_window(server), [], []
    key, focus = ann.page.keyboard, "document.activeElement"
    ann.page.on("request", lambda request: requests.append(request.url))
    ann.page.on("console", lambda message: console.append(message.text))
    ann.page.on("pageerror", lambda error: console.append(error.message))
    headers = ann.page.goto(f"{server.url}/chat/{room}/").all_headers()
    policy = "default-src 'self' 'nonce-[^ ]+'; img-src data:"
    assert re.fullmatch(policy, headers["content-security-policy"])
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"
    (cookie,) = (c for c in ann.page.context.cookies() if c["name"] == "sessionid")
    assert cookie["httpOnly"] and cookie["sameSite"] == "Lax"
    for name, text in ("chat_message", "hello"), ("name", "Ann"), ("room", f"{room}-2"):
        ann.open()
        while ann.page.evaluate(f"{focus}.name") != name:
            key.press("Tab")
            outline = ann.page.evaluate(f"getComputedStyle({focus}).outlineStyle")
            assert outline != "none" or ann.page.evaluate(f"{focus} == document.body")
        key.type(text)
        key.press("Enter")
        ann.page.wait_for_selector(f"p:text('{text}'), h1:text('{text}'), [value='{text}']")
    assert [u for u in requests if not u.startswith((server.url, "data:"))] == console == []


@pytest.mark.skipif(not (shutil.which("npm") or os.getenv("CI")), reason="npm brings axe-core")
def test_axe_finds_nothing_and_nothing_is_cut_off(server, tmp_path, room, open_window):
    subprocess.run(["npm", "install", "--prefix", tmp_path, "axe-core@4"], check=True)
    axe, line = (tmp_path / "node_modules/axe-core/axe.min.js").read_text(), Line(server)
    ann, bob = open_window(line, room).open(), open_window(server, room).open()
    bob.say("x" * 200)
    ann.say("x" * 2001)
    expect(ann.page.locator("#error")).not_to_be_empty()
    line.cut()
    ann.say("unsent")
    bob.page.goto(f"{server.url}/login/")
    for page in ann.page, bob.page:
        page.evaluate(axe)
        for width, scheme in (360, "light"), (360, "dark"), (1280, "light"), (1280, "dark"):
            page.set_viewport_size({"width": width, "height": 640})
            page.emulate_media(color_scheme=scheme)
            found = [rule["id"] for rule in page.evaluate("axe.run()")["violations"]]
            assert found == [], f"{page.url} at {width} pixels, {scheme}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width


################ Starting, in all the ways that there are


def test_runserver_brings_the_open_page_back_after_every_edit(start, tmp_path, room, open_window):
    program = shutil.copy(HERE / "chat.py", tmp_path)
    shutil.copytree(HERE / "templates", tmp_path / "templates")
    server = start([sys.executable, program, "runserver", "PORT"])
    ann = open_window(server, room).open()
    ann.say("before")
    ann.shows("before")
    Path(program).touch()
    expect(ann.page.locator("#status")).not_to_have_text("Connected")
    ann.say("after")
    ann.shows("before", "after")
    template = tmp_path / "templates/message.html"
    template.write_text(template.read_text().replace("{{ message.text }}", "EDITED"))
    eventually(lambda: ann.say("again") or ann.texts()[-1] == "EDITED")
    assert "DEBUG = True" in ann.page.goto(f"{server.url}/nowhere").text()


@pytest.mark.parametrize("command", [DAPHNE, UVICORN], ids=["daphne", "uvicorn"])
def test_other_servers_serve_the_same_on_a_fresh_database(start, command):
    server = start(command)
    with Client(server) as ann:
        ann.say("hello")
        assert 'hx-swap-oob="beforeend:#content"' in ann.hear("hello")
    assert b"hello" in server.get("/").read() and server.get("/static/django_htmx/htmx-2.min.js")


def test_commands_work_or_say_in_a_line_why_not(server, room, open_window):
    ann = open_window(server, room).open()
    create = f"Message.objects.create(room='{room}', author='shell', name='Shell', text='hello')"
    assert server.run("shell", "-c", f"from chat import Message; {create}").returncode == 0
    eventually(lambda: ann.texts() == ["hello"], 3)
    assert server.run("migrate").returncode == 0
    warned = re.findall(r"\((\w+\.[WE]\d+)\)", server.run("check", "--deploy").stderr)
    assert warned == ["security.W004", "security.W008", "security.W012", "security.W016"]
    nowhere = {"DATABASE_URL": "sqlite:////nonexistent/x.sqlite3"}
    for why, environment in ("already in use", {}), ("unable to open", nowhere):
        ended = server.run(**environment)
        assert ended.returncode != 0 and re.fullmatch(f".*{why}.*\n", ended.stderr)


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", __file__, *sys.argv[1:]]))
