# /// script
# requires-python = ">=3.11"
# dependencies = ["django", "channels", "daphne", "uvicorn[standard]", "django-htmx",
#   "dj-database-url", "hypothesis", "playwright", "pytest", "websockets"]
# ///
"""What chat.py promises, tried on real servers and in a real browser; arguments go to pytest."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect, sync_playwright
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

HERE = Path(__file__).resolve().parent
expect.set_options(timeout=10_000)  # milliseconds


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
    with ThreadPoolExecutor(len(things)) as hands:
        list(hands.map(do, things))


class Server(ExitStack):
    """A copy of the chat in a process of its own, on a free port, with a database of its own."""

    def __init__(self, folder, *command):
        super().__init__()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url, self.command = f"http://127.0.0.1:{self.port}", command or ["chat.py"]
        self.folder, self.database = folder, folder / "chat.sqlite3"
        shutil.copytree(HERE / "templates", folder / "templates")
        shutil.copy(HERE / "chat.py", folder)
        own = {"PORT": str(self.port), "SECRET_KEY": "for the tests " * 5}
        strange = "DEBUG", "ALLOWED_HOSTS", "HOST", "DATABASE_URL"
        self.environment = {k: v for k, v in os.environ.items() if k not in strange} | own

    def start(self):
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        with (self.folder / "log").open("a") as log:
            how = {"cwd": self.folder, "env": self.environment, "stdout": log, "stderr": log}
            self.process = subprocess.Popen([sys.executable, *command], **how)
        self.callback(self.stop)  # at the end, also when it does not come up
        eventually(self.answers, 20)
        return self

    def answers(self):
        assert self.process.poll() is None, self.log()
        with suppress(OSError):
            return self.get("/")

    def stop(self, how=SIGTERM):
        self.process.send_signal(how)
        try:
            self.process.wait(10)
        finally:
            self.process.kill()

    def get(self, path):
        return urlopen(self.url + path, timeout=10).read()

    def log(self):
        return (self.folder / "log").read_text()

    def run(self, *command, **environment):
        """`python chat.py` with a command, on this server's port and database."""
        how = {"cwd": self.folder, "env": self.environment | environment, "capture_output": True}
        command = [sys.executable, "chat.py", *command]
        return subprocess.run(command, check=False, text=True, **how)

    def stored(self, room):
        """The texts in the room's log, as the database has them."""
        log = "SELECT text FROM chat_message WHERE room=? ORDER BY id"
        return [text for (text,) in sqlite3.connect(self.database).execute(log, [room])]


class Client(ExitStack):
    """A plain WebSocket client: no browser, no cookie."""

    def __init__(self, server, room=None, **options):
        super().__init__()
        url = f"{server.url}/ws/chat/{room}" if room else f"{server.url}/ws/chat"
        options = {"origin": "http://localhost", "max_size": None, **options}
        self.socket = self.enter_context(connect(url.replace("http", "ws"), **options))
        self.frames = []

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
    """A TCP proxy in front of a server: it can be cut, hold bytes, or swallow them in silence."""

    def __init__(self, server):
        self.server, self.ends, self.free = server, [], threading.Event()
        self.mend()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, far = self.listener.accept()[0], socket.socket()
            if self.is_cut or far.connect_ex(("127.0.0.1", self.server.port)):
                near.close()
            else:
                self.ends += near, far
                for carry in (near, far, "up"), (far, near, "down"):
                    threading.Thread(target=self.carry, args=carry, daemon=True).start()

    def carry(self, source, target, direction):
        with suppress(OSError):
            while data := source.recv(65536):
                self.free.wait()
                if direction not in self.swallows:
                    target.sendall(data)
        for end in source, target:
            end.close()

    def cut(self):
        """End every connection, and refuse new ones."""
        self.is_cut = True
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self):
        """Let everything pass. A connection that lost bytes stays broken, as it does outside."""
        self.is_cut, self.swallows = False, ""
        self.free.set()


class Window:
    """A browser window in a room."""

    def __init__(self, context, server, room=None):
        self.page = context.new_page()
        self.page.goto(f"{server.url}/chat/{room}/" if room else server.url)
        self.box, self.error = self.page.locator("[name=chat_message]"), self.page.locator("#error")
        self.status, self.unsent = self.page.locator("#status"), self.page.locator("#unsent li")
        self.said = self.page.locator("#content p")

    def open(self):
        expect(self.status).to_have_text("Connected")
        return self

    def say(self, text):
        self.box.fill(text)
        self.page.keyboard.press("Enter")

    def newest(self, part="p"):
        return self.page.locator(f"#content article:last-child {part}")

    def shows(self, *texts):
        expect(self.said).to_have_text(list(texts))
        expect(self.unsent).to_have_count(0)

    def shows_the_end_of(self, log):
        """An unbroken run of the log up to its newest message, at least the history of 50."""
        eventually(lambda: self.said.all_inner_texts()[-50:] == log[-50:], 2)
        assert (texts := self.said.all_inner_texts()) == log[-len(texts) :]
        expect(self.unsent).to_have_count(0)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that do not harm it."""
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server.start()


@pytest.fixture
def start(tmp_path):
    """Starts servers that end with the test."""
    with ExitStack() as ends:
        yield lambda *command: ends.enter_context(Server(tmp_path, *command)).start()


@pytest.fixture
def room():
    return f"room-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def browser():
    path = shutil.which("google-chrome") or shutil.which("chromium") or shutil.which("chrome")
    with sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not (Path(path).exists() or os.getenv("CI")):
            pytest.skip("no Chrome or Chromium to be found")
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def open_window(browser):
    """Opens windows, each of a person of its own."""
    yield lambda *where, **options: Window(browser.new_context(**options), *where)
    for context in browser.contexts:
        context.close()


################ Sending: stored exactly once, or still on the screen
def test_what_a_dead_line_does_not_carry_waits_on_the_screen(server, room, open_window):
    """A line that swallows bytes, up, down or both, is noticed within ten seconds, like a cut."""
    lines = {death: Line(server) for death in ("cut", "up", "down", "up-and-down")}
    windows = {death: open_window(line, f"{room}-{death}").open() for death, line in lines.items()}
    lines["cut"].cut()
    for death, window in windows.items():
        lines[death].swallows = death
        for text in "one", "two", "two":
            window.say(text)
        window.page.keyboard.type("half a sen")
    eventually(lambda: server.stored(f"{room}-down") == ["one", "two", "two"])
    for death, window in windows.items():
        expect(window.unsent).to_have_text(["one", "two", "two"])
        expect(window.status).to_have_text(re.compile("No connection|Connecting"))
    for death, window in windows.items():
        lines[death].mend()
        window.shows("one", "two", "two")
        window.page.keyboard.type("tence")
        window.page.keyboard.press("Enter")
        window.shows("one", "two", "two", "half a sentence")
        assert server.stored(f"{room}-{death}") == ["one", "two", "two", "half a sentence"]


def test_neither_cut_lines_nor_killed_servers_lose_or_repeat_anything(start, room, open_window):
    server = start()
    line, away = Line(server), Line(server)
    ann, bob, carl = (open_window(by, room).open() for by in (server, line, away))
    away.cut()
    for number in range(100):
        ann.say(f"Ann {number}")
        bob.say(f"Bob {number}")
        if number in (10, 50, 90):
            server.stop(SIGKILL)
        if number in (30, 51, 99):
            server.start()
        if 60 <= number < 80:
            time.sleep(0.002 * (number % 5))  # before, amid and after storing and acknowledging
            line.cut()
            if number % 3:
                line.mend()
                bob.open()
    away.mend()
    eventually(lambda: len(server.stored(room)) == 200)
    log = server.stored(room)
    for name in "Ann", "Bob":
        assert [text for text in log if name in text] == [f"{name} {n}" for n in range(100)]
    for window in ann, bob, carl:
        window.open().shows_the_end_of(log)


################ Seeing: every window comes to show the room's log
def test_twenty_people_typing_at_full_speed_all_see_the_whole_log(server, room, open_window):
    line = Line(server)
    ann = open_window(line, room).open()
    with ExitStack() as clients:
        people = [clients.enter_context(Client(server, room)) for _ in range(20)]
        away = clients.enter_context(Client(line, room))
        line.free.clear()  # it holds all bytes until it is mended
        together(lambda client: [client.say(str(count)) for count in range(25)], people)
        eventually(lambda: len(server.stored(room)) == 500, 30)
        line.mend()
        people[0].say("the end")
        for client in *people, away:
            client.hear("the end")
            assert client.texts() == server.stored(room)
        ann.shows(*server.stored(room))


INSTRUMENTED = """
import asyncio, os, chat, uvicorn
from django import http
layer = chat.layers.get_channel_layer()
group_send = layer.group_send
async def untrusted(group, event):
    if group == "fails":
        raise ConnectionError("the layer is down")
    for _ in range({"drops": 0, "repeats": 150}.get(group, 1)):
        await group_send(group, event)
async def counts(request):
    now = os.listdir("/proc/self/fd"), asyncio.all_tasks(), chat.rooms, layer.groups, layer.channels
    return http.JsonResponse([len(collection) for collection in now], safe=False)
chat.urlpatterns.append(chat.path("counts", counts))
layer.group_send = untrusted
uvicorn.run(chat.application, port=PORT, log_level="warning")
"""


def test_a_layer_that_fails_drops_or_repeats_events_costs_two_seconds_at_most(start):
    server = start("-c", INSTRUMENTED)
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
    *(f'{{"chat_message": {text}}}' for text in ("7", "[]", "{}", "true", '" "', '"\\u0000"')),
    *(json.dumps({"chat_message": "x", "key": key}) for key in ("7", "\0", "\ud800", "<b>")),
    *(json.dumps({"chat_message": "a" + "\u0301" * length}) for length in (9000, 17_000_000)),
]
UNUSUAL = ["\u202eright to left", "a" + "\u0301" * 1999, "<script>document.title = 1</script>"]
UNUSUAL += ["<img src=x onerror='document.title = 1' hx-get='/' hx-trigger='load'>"]
UNUSUAL += ["""'"><p id="status" hx-swap-oob="true" hx-on:click="x">&lt;{{ me }}</p>"""]
SERVERS = ["chat.py", *(f"-m {it} --port PORT chat:application" for it in ("uvicorn", "daphne"))]


@pytest.mark.parametrize("command", SERVERS)
def test_all_servers_answer_malformed_frames_and_nobody_else_notices(start, command):
    server = start(*command.split())
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
        for text in *UNUSUAL, "\ud800":
            bystander.say(text, **{"\ud800": "1", "a": "\ud800", "errors": "x", "HEADERS": {}})
            bystander.hear("</article>", 3)
        assert server.stored("lobby") == [*UNUSUAL, "?"]
        assert "<script" not in str(bystander.frames) and "<img" not in str(bystander.frames)
    assert b"{{ me }}" in server.get("/") and server.get("/static/django_htmx/htmx-2.min.js")
    assert "Traceback" not in server.log()


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
OURS = st.fixed_dictionaries({}, optional={"chat_message": ANYTHING, "key": ANYTHING})


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text() | st.binary() | ANYTHING.map(json.dumps) | OURS.map(json.dumps))
def test_no_frame_whatsoever_ends_a_connection(server, room, frame):
    with Client(server, room) as client:
        client.socket.send(frame)
        client.say("", key="mine")
        client.hear('data-key="mine"')
    assert "Traceback" not in server.log()


def test_a_refused_socket_gets_a_code_that_ends_retries_and_one_line_of_log(start):
    server = start()
    strangers = ("no/such/path", "http://localhost"), (None, "http://evil.example"), (None, None)
    for lines, (path, origin) in enumerate(strangers, server.log().count("\n") + 1):
        with Client(server, path, origin=origin) as client, pytest.raises(ConnectionClosed) as end:
            client.hear("anything")
        assert 4000 <= end.value.rcvd.code < 5000
        eventually(lambda lines=lines: server.log().count("\n") == lines)


def delivery(ann, bob):
    """The median of the seconds that a message takes from one to the other."""
    times = []
    for _ in range(40):
        time.sleep(0.02)  # the server's pause after each frame
        ann.say(start := str(time.monotonic()))
        bob.hear(start)
        times.append(time.monotonic() - float(start))
    return sorted(times)[20]


def test_readers_that_stop_and_a_flooder_hold_up_nobody_nor_the_end(start, room):
    server = start()

    def memory():
        pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 10**6  # MB

    def stuck_reader():
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.connect(("127.0.0.1", server.port))
        return Client(server, room, sock=end, max_queue=1, ping_interval=None, close_timeout=0)

    with ExitStack() as ends:
        enter = ends.enter_context
        ann, bob, *writers = (enter(Client(server, room, close_timeout=0)) for _ in range(6))
        undisturbed, before = delivery(ann, bob), memory()
        stuck = [enter(stuck_reader()) for _ in range(10)]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(150)], writers)
        eventually(lambda: len(server.stored(room)) == 640, 30)
        assert memory() - before < 40
        assert delivery(ann, bob) < 2 * undisturbed + 0.005
        enter(ThreadPoolExecutor()).submit(lambda: [writers[0].say("flood") for _ in range(3000)])
        assert delivery(ann, bob) < 2 * undisturbed + 0.005
        writers[0].socket.socket.shutdown(socket.SHUT_RDWR)
        ann.say("the end")
        for client in stuck[1:]:
            client.hear("the end", 20)
            assert client.texts() == server.stored(room)[: len(client.texts())]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(100)], writers[1:])
        assert "Traceback" not in server.log()  # uvicorn ends consumers that still work with one
        started = time.monotonic()
        server.stop(SIGINT)
        assert time.monotonic() - started < 5


def test_a_thousand_visits_that_end_in_every_way_leave_nothing_behind(start, room):
    server = start("-c", INSTRUMENTED)

    def visit(number):
        client = Client(server, "no/such" if number % 5 == 4 else f"{room}-{number % 7}")
        if number % 5 == 1:
            client.say("cut off while the server stores this")
            client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
            client.socket.socket.close()
        elif number % 5 == 2:
            client.socket.socket.sendall(b"no frame at all" * 9)
        elif number % 5 == 3:
            server.get("/")
        client.close()

    together(visit, range(10))
    together(lambda _: server.get("/"), range(40))  # SQLite keeps a file for each at a time
    time.sleep(3)
    before = json.loads(server.get("/counts"))
    for first in range(10, 1010, 20):
        together(visit, range(first, first + 20))
    for _ in range(4):
        together(lambda _: server.get("/"), range(40))
    eventually(lambda: json.loads(server.get("/counts"))[1:] == before[1:])
    assert json.loads(server.get("/counts"))[0] <= before[0] + 20
    assert "Traceback" not in server.log()


def test_markup_that_got_past_escaping_does_not_run(start, open_window):
    server, refused = start(), []
    template = server.folder / "templates/message.html"
    template.write_text(template.read_text().replace("message.text", "message.text|safe"))
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
    said = [*(f"message {number}" for number in range(57)), *UNUSUAL]
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
        expect(window.page.locator("#content :is(img, script, p p)")).to_have_count(0)
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
    page.click("text=Sign up")
    for field, text in ("username", "Grace"), ("password1", "compiler"), ("password2", "compiler"):
        page.fill(f"[name={field}]", text)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{server.url}/login/")
    with sqlite3.connect(server.database) as database:
        assert database.execute("SELECT 1 FROM auth_user WHERE username='Grace'").fetchall()
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
    ann.shows("one", "two", "three")
    for window, text in (ann, " "), (bob, " "), (ann, "x" * 2001), (bob, "x" * 2001):
        window.say(text)
        expect(window.error).to_have_text(re.compile("Please|2000"))
        expect(window.box).to_have_value(text)
    bob.say("four")
    bob.shows("one", "two", "three", "four")
    expect(bob.error).to_be_empty()


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
    expect(ann.error).not_to_be_empty()
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
def test_runserver_brings_the_open_page_back_after_every_edit(start, room, open_window):
    server = start("chat.py", "runserver", "PORT")
    ann = open_window(server, room).open()
    ann.say("before")
    (server.folder / "chat.py").touch()
    expect(ann.status).not_to_have_text("Connected")
    ann.say("after")
    ann.shows("before", "after")
    template = server.folder / "templates/message.html"
    template.write_text(template.read_text().replace("{{ message.text }}", "EDITED"))
    eventually(lambda: ann.say("again") or ann.newest().inner_text() == "EDITED")
    assert "DEBUG = True" in ann.page.goto(f"{server.url}/nowhere").text()


def test_commands_work_or_say_in_a_line_why_not(server, room, open_window):
    ann = open_window(server, room).open()
    new = f"Message(room='{room}', author='shell', name='Shell', text=n) for n in range(120)"
    create = f"from chat import Message; Message.objects.bulk_create([{new}])"
    assert server.run("shell", "-c", create).returncode == 0
    expect(ann.said).to_have_text([str(n) for n in range(120)], timeout=3000)  # more than history
    assert server.run("migrate").returncode == 0
    warned = re.findall(r"\((\w+\.[WE]\d+)\)", server.run("check", "--deploy").stderr)
    assert warned == ["security.W004", "security.W008", "security.W012", "security.W016"]
    for why, url in ("already in use", server.database), ("unable to open", "/nonexistent/x"):
        ended = server.run(DATABASE_URL=f"sqlite:///{url}")
        assert ended.returncode != 0 and re.fullmatch(f".*{why}.*\n", ended.stderr)


def test_the_readme_names_what_is_to_be_installed_and_run():
    readme, *programs = ((HERE / n).read_text() for n in ("README.md", "chat.py", "test_chat.py"))
    inline = [text.split("# dependencies = ")[1].split("# ///")[0] for text in programs]
    chat, tests = (set(re.findall('"(.+?)"', packages)) for packages in inline)
    (install,) = re.findall(r"^    pip install (django .*)", readme, re.MULTILINE)
    assert set(install.replace('"', "").split()) == chat <= tests
    assert "uv run chat.py" in readme and "uv run test_chat.py" in readme


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", __file__, *sys.argv[1:]]))
