# /// script
# requires-python = ">=3.11"
# dependencies = ["django", "channels", "daphne", "uvicorn[standard]", "django-htmx",
#   "dj-database-url", "channels-redis", "psycopg[binary]", "axe-playwright-python", "hypothesis",
#   "pytest", "pytest-playwright", "websockets"]
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGQUIT, SIGSTOP, SIGTERM
from tempfile import TemporaryDirectory
from urllib.request import urlopen
from uuid import uuid4

import psycopg
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
expect.set_options(timeout=10_000)  # milliseconds


################ The stage: servers, windows, and lines that can be cut
def eventually(is_so, seconds=10):
    """Wait until the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} s: {is_so}"
        time.sleep(0.02)


def together(do, things):
    with ThreadPoolExecutor(len(things)) as hands:
        list(hands.map(do, things))


class Program(ExitStack):
    """A program in a process of its own, on a free port, in a folder that keeps its log."""

    def __init__(self, folder, *command, user=None, **environment):
        super().__init__()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.user = folder, user
        self.command = [str(part).replace("PORT", str(self.port)) for part in command]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "PORT": str(self.port), **environment}

    def start(self):
        with (self.folder / "log").open("a") as log:
            how = {"cwd": self.folder, "env": self.environment, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(self.command, user=self.user, **how)
        self.callback(self.stop)  # at the end, also when it does not come up
        eventually(self.answers, 20)
        return self

    def answers(self):
        assert self.process.poll() is None, self.log()
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", self.port)).close() or True

    def stop(self, how=SIGINT, seconds=10):
        self.process.send_signal(how)
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()

    def log(self):
        return (self.folder / "log").read_text()


class Server(Program):
    """The chat in the folder, or else a copy of ours; by default on a database of its own."""

    def __init__(self, folder, *command, **environment):
        own = {"SECRET_KEY": "for the tests " * 5, **environment}
        super().__init__(folder, sys.executable, *(command or ["chat.py"]), **own)
        self.url, self.database = f"http://127.0.0.1:{self.port}", folder / "chat.sqlite3"
        if not (folder / "chat.py").exists():
            shutil.copytree(HERE / "templates", folder / "templates")
            shutil.copy(HERE / "chat.py", folder)

    def get(self, path):
        return urlopen(self.url + path, timeout=10).read()

    def run(self, *command, **environment):
        """`python chat.py` with a command, on this server's port and database."""
        how = {"cwd": self.folder, "env": self.environment | environment, "capture_output": True}
        command = [sys.executable, "chat.py", *command]
        return subprocess.run(command, check=False, text=True, **how)

    def stored(self, room):
        """The texts in the room's log, as the database has them."""
        url = self.environment.get("DATABASE_URL")
        with psycopg.connect(url) if url else sqlite3.connect(self.database) as database:
            log = f"SELECT text FROM chat_message WHERE room='{room}' ORDER BY id"
            return [text for (text,) in database.execute(log)]


class Client(ExitStack):
    """A plain WebSocket client: no browser, no cookie."""

    def __init__(self, server, room="lobby", **options):
        super().__init__()
        options = {"origin": "http://localhost", "max_size": None, "close_timeout": 0, **options}
        url = f"{server.url}/ws/chat/{room}".replace("http", "ws")
        self.socket, self.frames = self.enter_context(connect(url, **options)), []

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
        self.is_cut = True
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self):
        """Let everything pass. A connection that lost bytes stays broken, as it does outside."""
        self.is_cut, self.swallows = False, ""
        self.free.set()


class Window:
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


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")).start() as server:
        yield server


@pytest.fixture
def start(tmp_path):
    with ExitStack() as ends:
        yield lambda *how, **more: ends.enter_context(Server(tmp_path, *how, **more)).start()


@pytest.fixture(params=["one SQLite file", "Redis and PostgreSQL"])
def pair(request, start):
    """Two servers that share a database, and the services that they share."""
    if "Redis" not in request.param:
        yield start(), start()
        return
    postgres = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None)
    if not (shutil.which("redis-server") and postgres or os.getenv("CI")):
        pytest.skip("no redis-server, or no PostgreSQL, to be found")
    user = None if os.getuid() else "postgres"  # which refuses to run as root
    with TemporaryDirectory() as folder, ExitStack() as ends:
        shutil.chown(folder, user or os.getuid())
        initdb = [postgres.with_name("initdb"), "-A", "trust", "-U", "chat", "-D", folder]
        subprocess.run(initdb, user=user, check=True, stdout=subprocess.DEVNULL)
        redis = "redis-server", "--bind", "127.0.0.1", "--port", "PORT", "--save", ""
        commands = redis, (postgres, "-p", "PORT", "-D", folder, "-k", folder)
        programs = [Program(Path(folder), *command, user=user) for command in commands]
        redis, postgres = (ends.enter_context(program).start() for program in programs)
        database = f"postgres://chat@127.0.0.1:{postgres.port}/postgres"
        urls = {"REDIS_URL": f"redis://127.0.0.1:{redis.port}", "DATABASE_URL": database}
        yield start(**urls), start(**urls), redis, postgres


@pytest.fixture
def room():
    return f"room-{uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def browser_type_launch_args(playwright):
    path = shutil.which("google-chrome") or shutil.which("chromium") or shutil.which("chrome")
    if not (Path(path := path or playwright.chromium.executable_path).exists() or os.getenv("CI")):
        pytest.skip("no Chrome or Chromium to be found")
    return {"executable_path": path, "args": ["--no-sandbox"]}


@pytest.fixture
def open_window(new_context):
    """Opens windows, each of a person of its own."""
    return lambda *where, **options: Window(new_context(**options), *where)


################ Sending: stored exactly once, or still on the screen
def test_what_a_dead_line_does_not_carry_waits_on_the_screen(server, room, open_window):
    lines = {death: Line(server) for death in ("cut", "up", "down", "up-and-down")}
    windows = {death: open_window(line, f"{room}-{death}").open() for death, line in lines.items()}
    lines["cut"].cut()
    for death, window in windows.items():
        lines[death].swallows = death
        for text in "one", "two", "two":
            window.say(text)
        window.page.keyboard.type("half a sen")
    eventually(lambda: server.stored(f"{room}-down") == ["one", "two", "two"])
    for window in windows.values():
        expect(window.unsent).to_have_text(["one", "two", "two"])
        expect(window.status).to_have_text(re.compile("No connection|Connecting"))
    for death, window in windows.items():
        lines[death].mend()
        window.shows("one", "two", "two")
        window.page.keyboard.type("tence")
        window.page.keyboard.press("Enter")
        window.shows("one", "two", "two", "half a sentence")
        assert server.stored(f"{room}-{death}") == ["one", "two", "two", "half a sentence"]


def test_neither_cut_lines_nor_killed_programs_lose_or_repeat_anything(pair, room, open_window):
    here, there, *services = pair
    mortal, line, away = [here, *services] * 3, Line(there), Line(there)
    ann, bob, carl = (open_window(by, room).open() for by in (here, line, away))
    away.cut()
    for number in range(60):
        ann.say(f"Ann {number}")
        bob.say(f"Bob {number}")
        if number % 20 == 5:
            mortal[number // 20].stop(SIGQUIT)
        if number % 20 == 15:
            mortal[number // 20].start()
        if 16 <= number < 24:
            time.sleep(0.002 * (number % 5))  # before, amid and after storing and acknowledging
            line.cut()
            line.mend()
            if number % 3:
                bob.open()
    away.mend()
    eventually(lambda: len(here.stored(room)) == 120, 20)
    log = here.stored(room)
    for name in "Ann", "Bob":
        assert [text for text in log if name in text] == [f"{name} {n}" for n in range(60)]
    for window in ann, bob, carl:
        window.open()
        eventually(lambda w=window: w.said.all_inner_texts()[-50:] == log[-50:], 3)
        assert (texts := window.said.all_inner_texts()) == log[-len(texts) :]
        expect(window.unsent).to_have_count(0)


################ Seeing: every window comes to show the room's log
def test_twenty_people_typing_at_full_speed_all_see_the_whole_log(pair, room):
    here, there, *services = pair
    line = Line(here)
    with ExitStack() as ends:
        people = [ends.enter_context(Client(server, room)) for server in [here, there] * 10]
        away = ends.enter_context(Client(line, room))
        line.free.clear()  # it holds all bytes until it is mended
        if services:
            with psycopg.connect(here.environment["DATABASE_URL"]) as database:  # ids overlap
                slow = "ADD CHECK (pg_sleep(random() / 99)::text = '')"
                database.execute(f"ALTER TABLE chat_message {slow}")
        together(lambda client: [client.say(str(count)) for count in range(25)], people)
        eventually(lambda: len(here.stored(room)) == 500, 30)
        line.mend()
        people[0].say("at once")
        people[1].hear("at once", 1 if services else 3)
        signal = services[0].process.send_signal if services else print
        signal(SIGSTOP)
        together(lambda client: [client.say("still here") for _ in range(5)], people)
        eventually(lambda: here.stored(room).count("still here") == 100, 3)
        for client in *people, away:
            while client.texts() != here.stored(room):
                client.hear("still here", 4)
        signal(SIGCONT)


def test_the_same_key_is_one_message_and_tells_nothing_of_whose_it_is(server, room):
    keys = [str(uuid4()) for _ in range(20)]
    with ExitStack() as ends:
        clients = [ends.enter_context(Client(server, room)) for _ in range(3)]
        together(lambda client: [client.say("hello", key=key) for key in keys * 2], clients)
        answers = {c.hear(f"unsent-{k}").replace(k, "") for c in clients for k in keys * 2}
    assert len(answers) == 1
    assert server.stored(room) == ["hello"] * 20


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
SERVERS = ["chat.py", "-m daphne --port PORT chat:application"]
SERVERS += ["-m uvicorn --workers 2 --port PORT chat:application"]


@pytest.mark.parametrize("command", SERVERS)
def test_all_servers_answer_malformed_frames_and_nobody_else_notices(start, command):
    server = start(*command.split())
    with Client(server) as bystander:
        for frame in MALFORMED:
            with Client(server, uuid4().hex) as client:
                try:
                    client.socket.send(frame)
                    client.hear("</p>", 5)
                except ConnectionClosed as closed:
                    assert len(frame) > 10**6, frame[:50]
                    assert not closed.rcvd or closed.rcvd.code == 1009  # a reset may overtake it
        for text in *UNUSUAL, "\ud800":
            bystander.say(text, **{"\ud800": "1", "a": "\ud800", "errors": "x", "HEADERS": {}})
            bystander.hear("</article>", 3)
        assert server.stored("lobby") == [*UNUSUAL, "?"]
        assert "<script" not in str(bystander.frames) and "<img" not in str(bystander.frames)
    assert b"{{ me }}" in server.get("/") and server.get("/static/django_htmx/htmx-2.min.js")
    assert "Traceback" not in server.log()


JSON = st.recursive(st.none() | st.floats() | st.text(), st.lists)
OURS = st.dictionaries(st.sampled_from(["chat_message", "key", "other"]), JSON)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text() | st.binary() | JSON.map(json.dumps) | OURS.map(json.dumps))
def test_no_frame_whatsoever_ends_a_connection(server, room, frame):
    with Client(server, room) as client:
        client.socket.send(frame)
        client.say("", key="mine")
        client.hear('data-key="mine"')
    assert "Traceback" not in server.log()


def test_readers_that_stop_and_a_flooder_hold_up_nobody_nor_the_end(start, room):
    server = start()

    def memory():
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096 / 10**6

    def delivery():
        """The median of the seconds that a message takes from Ann to Bob."""
        times = []
        for _ in range(40):
            time.sleep(0.02)  # the server's pause after each frame
            ann.say(start := str(time.monotonic()))
            bob.hear(start)
            times.append(time.monotonic() - float(start))
        return sorted(times)[20]

    def stuck_reader():
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end.connect(("127.0.0.1", server.port))
        return Client(server, room, sock=end, max_queue=1, ping_interval=None)

    with ExitStack() as ends:
        enter = ends.enter_context
        ann, bob, *writers = (enter(Client(server, room)) for _ in range(6))
        undisturbed, before = delivery(), memory()
        stuck = [enter(stuck_reader()) for _ in range(10)]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(150)], writers)
        eventually(lambda: len(server.stored(room)) == 640, 30)
        assert memory() - before < 40  # MB
        assert delivery() < 2 * undisturbed + 0.005
        enter(ThreadPoolExecutor()).submit(lambda: [writers[0].say("flood") for _ in range(3000)])
        assert delivery() < 2 * undisturbed + 0.005
        writers[0].socket.socket.shutdown(socket.SHUT_RDWR)
        ann.say("the end")
        for client in stuck[1:]:
            client.hear("the end", 20)
            assert client.texts() == server.stored(room)[: len(client.texts())]
        together(lambda writer: [writer.say("💬" * 2000) for _ in range(100)], writers[1:])
        assert "Traceback" not in server.log()  # uvicorn ends consumers that still work with one
        server.stop(SIGTERM, 5)


INSTRUMENTED = """
import asyncio, chat, os, uvicorn
from django import http
layer = chat.layers.get_channel_layer()
async def counts(request):
    now = os.listdir("/proc/self/fd"), asyncio.all_tasks(), chat.rooms, layer.groups, layer.channels
    return http.JsonResponse([len(collection) for collection in now], safe=False)
chat.urlpatterns.append(chat.path("counts", counts))
uvicorn.run(chat.application, port=PORT, log_level="warning")
"""


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
        client.close()

    together(visit, range(10))
    together(lambda _: server.get("/"), range(40))  # SQLite keeps a file for each at a time
    time.sleep(3)
    before = json.loads(server.get("/counts"))
    for first in range(10, 1010, 20):
        together(visit, range(first, first + 20))
    together(lambda number: server.get("/"), range(40))
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
    assert ann.page.title() != "run" and any(refused)
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
    eve.say("alone")
    eve.shows("alone")


def test_a_new_name_counts_in_all_tabs_and_nobody_takes_an_account_s(server, room, open_window):
    tab = open_window(server, room).open()
    page = Window(tab.page.context, server, room).page

    def fill_in(then, **fields):
        for name, text in fields.items():
            page.fill(f"[name={name}]", text)
        page.keyboard.press("Enter")
        page.wait_for_url(f"{server.url}{then}")

    page.click("text=Sign up")
    fill_in("/login/", username="AdaLovelace", password1="compiler", password2="compiler")
    page.goto(tab.page.url)
    lookalikes = [f"AdaLovelace{space}" for space in "\u00a0\u3164\u200b\u00ad"]
    good = """Zoë <b hx-on:click='x'>"&amp;"""
    for name in " ", "\u2003", "\u2800", "x" * 99, "adalovelace", "✓", *lookalikes, good:
        page.fill("[name=name]", name)
        page.click("text=Rename")
        assert (len(page.inner_text("#error").split()) > 3) == (name != good), ascii(name)
        assert page.input_value("[name=name]") == name
    tab.say("as a guest")
    expect(tab.newest("bdi")).to_have_text(good)
    page.click("text=Log in")
    fill_in("/", username="AdaLovelace", password="compiler")
    tab.page.reload()
    tab.open().say("with account")
    expect(tab.newest("small")).to_contain_text("AdaLovelace ✓ account")
    page.click("text=Log out")
    tab.say("without")
    tab.shows("as a guest", "with account", "without")
    assert not re.search("AdaLovelace|account", tab.newest("small").inner_text())


def test_the_page_works_without_javascript_and_without_more_than_a_form(server, room, open_window):
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
    assert "DEBUG" not in bob.page.goto(f"{server.url}/nowhere").text()
    bob.page.set_content(f"""<script src="/static/django_htmx/htmx-2.min.js"></script>
        <script src="/static/django_htmx/ext/hx-ws-2.min.js"></script><div id="content"></div>
        <div hx-ext="ws" ws-connect="/ws/chat/{room}">
        <form id="form" ws-send><input name="chat_message"></form></div>""")
    bob.say("five")
    expect(bob.newest()).to_have_text("five")


def test_the_keyboard_is_enough_and_nothing_leaves_for_other_hosts(server, room, open_window):
    ann, requests, console = open_window(server), [], []
    key, focus = ann.page.keyboard, "document.activeElement"
    ann.page.on("request", lambda request: requests.append(request.url))
    ann.page.on("console", lambda message: console.append(message.text))
    ann.page.on("pageerror", lambda error: console.append(error.message))
    headers = ann.page.goto(f"{server.url}/chat/{room}/").all_headers()
    assert "default-src 'self' 'nonce-" in headers["content-security-policy"]
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


def test_axe_finds_nothing_and_nothing_is_cut_off(server, room, open_window):
    line = Line(server)
    ann, bob = open_window(line, room).open(), open_window(server, room).open()
    bob.say("x" * 200)
    ann.say("x" * 2001)
    expect(ann.error).not_to_be_empty()
    line.cut()
    ann.say("unsent")
    bob.page.goto(f"{server.url}/login/")
    for page in ann.page, bob.page:
        for width, scheme in (360, "light"), (360, "dark"), (1280, "light"), (1280, "dark"):
            page.set_viewport_size({"width": width, "height": 640})
            page.emulate_media(color_scheme=scheme)
            found = [rule["id"] for rule in Axe().run(page).response["violations"]]
            assert found == [], f"{page.url} at {width} pixels, {scheme}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width


################ Starting, in all the ways that there are, and what README says
def test_runserver_brings_the_open_page_back_after_every_edit(start, room, open_window):
    server = start("chat.py", "runserver", "PORT")
    ann = open_window(server, room).open()
    ann.say("before")
    (server.folder / "chat.py").touch()
    expect(ann.status).not_to_have_text("Connected")
    ann.say("after")
    ann.shows("before", "after")
    assert "DEBUG = True" in ann.page.goto(f"{server.url}/nowhere").text()


def test_commands_work_or_say_in_a_line_why_not(server, room, open_window):
    ann = open_window(server, room).open()
    new = f"Message(room='{room}', author='shell', name='Shell', text=n) for n in range(120)"
    create = f"from chat import Message; Message.objects.bulk_create([{new}])"
    assert server.run("shell", "-c", create).returncode == 0
    expect(ann.said).to_have_text([str(n) for n in range(120)], timeout=3000)  # more than history
    faults = {
        "sqlite:///chat.sqlite3": "in use",
        "sqlite:////nonexistent/x": "DATABASE_URL.*unable to open",
        "postgres://127.0.0.1:1/x": "DATABASE_URL.*refused",
        "postgres://[x": "DATABASE_URL.*valid url",
        "mysql://x": "DATABASE_URL.*install",
        "redis://127.0.0.1:1": "REDIS_URL.*channels-redis.*connect",
    }

    def is_told(url):
        ended = server.run(**{"REDIS_URL" if "redis" in url else "DATABASE_URL": url})
        assert ended.returncode and re.fullmatch(f".*{faults[url]}.*\n", ended.stderr), url

    together(is_told, faults)


def test_the_readme_names_what_is_to_be_installed_and_run():
    both = ((HERE / name).read_text().split("# ///")[1] for name in ("chat.py", "test_chat.py"))
    chat, tests = (set(re.findall('"(.+?)"', inline.split("dependencies")[1])) for inline in both)
    (install,) = re.findall(r"^    pip install (django .*)", README, re.MULTILINE)
    assert set(install.replace('"', "").split()) == chat <= tests


STEPS = README.split("\n## Step ")[1:]


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_each_step_of_the_tutorial_does_what_it_says(step, tmp_path, open_window):
    (catch_up,) = re.findall(r"^    (mkdir .* README.md .*)", README, re.MULTILINE)
    there = catch_up.replace("Step 5", f"Step {step + 1}").replace("step-4", f"{tmp_path}/chat")
    subprocess.run(["bash", "-c", there], cwd=HERE, check=True)
    with Server(tmp_path / "chat").start() as server:
        ann = open_window(server)
        ann.say("hello")
        ann.shows("hello")
        if step > 5:
            server.stop(SIGQUIT)
            ann.say("still here")
            expect(ann.unsent).to_have_text("still here")
            server.start()
            ann.shows("hello", "still here")
        how = {"cwd": server.folder, "env": server.environment, "stdout": subprocess.PIPE}
        text = "".join(STEPS[5 if step == len(STEPS) else step - 1 : step])
        for block in re.findall(r"```sh\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL):
            command, output = (part.replace("8000", str(server.port)) for part in block)
            run = subprocess.run(["bash", "-c", command], check=False, text=True, **how)
            assert run.stdout == output
    if step == len(STEPS):
        assert server.log().count("Refused a WebSocket") == 3
        for ours in HERE / "chat.py", HERE / "templates":
            subprocess.run(["diff", "-r", ours, server.folder / ours.name], check=True)


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", __file__, *sys.argv[1:]]))
