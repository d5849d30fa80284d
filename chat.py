# /// script
# requires-python = ">=3.11"
# dependencies = ["django","channels","daphne","uvicorn[standard]","django-htmx","dj-database-url"]
# ///
"""A whole real-time chat: `python chat.py`, then http://127.0.0.1:8000 in two windows."""

import asyncio
import gc
import logging
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize
from uuid import uuid4

import dj_database_url
import django
import uvicorn
from asgiref.sync import async_to_sync, sync_to_async
from django.core import asgi, exceptions, management
from django.db import Error, IntegrityError, connection, connections, models, transaction

################ Settings
FOLDER = Path(__file__).resolve().parent
DEBUG = os.getenv("DEBUG", str("runserver" in sys.argv)).lower() in ("1", "true", "yes", "on")
ALLOWED_HOSTS = os.getenv("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").replace(" ", "").split(",")
INSTALLED_APPS = ["daphne"] if "runserver" in sys.argv else []  # slow to import
INSTALLED_APPS += ["chat", "channels", "django_htmx", "django.contrib.staticfiles"]
INSTALLED_APPS += [f"django.contrib.{app}" for app in ("auth", "contenttypes", "sessions")]
MIDDLEWARE = ["chat.strict", "django.middleware.security.SecurityMiddleware"]
MIDDLEWARE += ["django.contrib.sessions.middleware.SessionMiddleware"]
MIDDLEWARE += ["django.middleware.common.CommonMiddleware"]  # adds the last slash to an address
MIDDLEWARE += ["django.middleware.csrf.CsrfViewMiddleware"]
DJANGO_TEMPLATES = "django.template.backends.django.DjangoTemplates"
CONTEXT = {"context_processors": ["django.template.context_processors.request"]}
TEMPLATES = [{"BACKEND": DJANGO_TEMPLATES, "APP_DIRS": True, "OPTIONS": CONTEXT}]
VALIDATION = "django.contrib.auth.password_validation"
AUTH_PASSWORD_VALIDATORS = [{"NAME": f"{VALIDATION}.MinimumLengthValidator"}]
AUTH_PASSWORD_VALIDATORS += [{"NAME": f"{VALIDATION}.CommonPasswordValidator"}]
ROOT_URLCONF = "chat"
ASGI_APPLICATION = "chat.application"
STATIC_URL = "static/"
TIME_ZONE = "UTC"
MIGRATION_MODULES = dict.fromkeys(["auth", "contenttypes", "sessions"])  # made at once, like ours
USE_I18N = False  # or each time in a message looks up the formats of a language
SESSION_COOKIE_AGE = 400 * 24 * 3600  # seconds, since it last changed; no browser keeps it longer
SECURE_CROSS_ORIGIN_OPENER_POLICY = None  # browsers complain of it where there is no https
LOGGING_CONFIG = None  # Django would mail errors to nobody; Python prints them
logging.raiseExceptions = False  # what can't be logged stops nobody
gc.set_threshold(50_000)  # or the collector looks at every window all the time

DATABASE = {"ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "chat.sqlite3"}
if url := os.getenv("DATABASE_URL"):
    DATABASE = dj_database_url.parse(url, conn_health_checks=True)
DATABASES = {"default": DATABASE}
options = DATABASE.setdefault("OPTIONS", {})
if "sqlite" in DATABASE["ENGINE"]:
    options["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
if "postgresql" in DATABASE["ENGINE"]:
    options["pool"] = {"min_size": 1, "max_size": 4, "timeout": 10}  # seconds that requests wait

LAYER = {"BACKEND": "channels.layers.InMemoryChannelLayer", "CONFIG": {"group_expiry": 10**9}}
if url := os.getenv("REDIS_URL"):
    LAYER = {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer", "CONFIG": {"hosts": [url]}}
CHANNEL_LAYERS = {"default": LAYER}

SECRET = FOLDER / "chat.secret"  # made once, and readable by its owner only
if not (SECRET.exists() or os.getenv("SECRET_KEY")):
    draft = FOLDER / f"chat.secret-{uuid4().hex}"
    draft.touch(mode=0o600)
    draft.write_text(uuid4().hex + uuid4().hex)
    with suppress(FileExistsError):  # another process that starts now may be faster
        os.link(draft, SECRET)
    draft.unlink()
SECRET_KEY = os.getenv("SECRET_KEY") or SECRET.read_text()

sys.modules["chat"] = sys.modules[__name__]  # the app "chat" is this file, however it was started
os.environ["DJANGO_SETTINGS_MODULE"] = "chat"  # and so are its settings
django.setup()
django.apps.apps.get_app_config("chat").models_module = sys.modules["chat"]  # migrate looks there

from channels import auth, db, layers, routing
from channels.exceptions import StopConsumer
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.contrib.auth import forms, get_user, get_user_model, login, views
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.http.request import split_domain_port, validate_host
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import path, re_path
from django.utils.safestring import mark_safe
from django.views.generic import FormView

################ Messages: the database is the truth
LOBBY = "lobby"
HISTORY = 50  # messages shown on arrival
KEPT = 1000  # messages that a window may lack; beyond that, it is drawn afresh
NEW = "SELECT * FROM chat_message WHERE id > %s ORDER BY id LIMIT %s"  # the ORM takes longer
CLEAR = '<div hx-swap-oob="innerHTML:#content"></div>'
OUTDATED = mark_safe('You logged in or out meanwhile. <a href="">Reload</a>, and send it again.')


class Message(models.Model):
    __module__ = "chat"  # the app it belongs to, even when this file is run as a script
    id = models.BigAutoField(primary_key=True)  # in the order of the log
    key = models.UUIDField(default=uuid4, unique=True)
    room = models.CharField(max_length=50, db_index=True)
    author = models.CharField(max_length=50)  # whose it is, even when names are the same
    name = models.CharField(max_length=150)
    text = models.CharField(max_length=2000, error_messages={"blank": "Please type something."})
    said_at = models.DateTimeField(auto_now_add=True)

    @cached_property
    def fragment(self):
        html = render_to_string("message.html", {"message": self})
        return f'<div hx-swap-oob="beforeend:#content">{html}</div>'


def say(slug, session, content):
    """Store a message, once for each key. Return what is wrong with it, if anything."""
    me = speaker(session)
    if content.get("author", me["author"]) != me["author"]:
        return [OUTDATED]
    text = content.get("chat_message", "").replace("\0", " ").replace("\r\n", "\n").rstrip()
    message = Message(room=slug, text=text, key=content.get("key") or uuid4(), **me)
    try:
        message.clean_fields()
    except exceptions.ValidationError as error:
        return error.messages
    with suppress(IntegrityError), transaction.atomic():  # the key may be there already
        if connection.vendor == "postgresql":  # writers in line: or id 8 could be seen before 7
            connection.cursor().execute("SELECT pg_advisory_xact_lock(1)")
        message.save(force_insert=True)
        return None
    if not Message.objects.filter(key=message.key, room=slug, text=text).exists():
        return ["This page is outdated. Please send it again."]


################ Speakers: accounts and guests
ANIMALS = ("Badger", "Beaver", "Gecko", "Heron", "Ibex", "Lynx", "Otter", "Puffin", "Tapir", "Wren")
INVISIBLE = set("\u034f\u115f\u1160\u17b4\u17b5\u2800")  # Python takes them for printable

# A session's key comes out of a cookie, and PostgreSQL takes no NUL.
SessionStore._validate_session_key = lambda self, key: key and key.isalnum()


def speaker(session):
    """Who speaks in this session, an account or a guest, as fields of a message."""
    user = get_user(SimpleNamespace(session=session))
    if user.is_authenticated:
        return {"author": f"account-{user.pk}", "name": user.username}
    if "guest" not in session:
        name = f"{random.choice(ANIMALS)} {random.randrange(100, 1000)}"
        session["guest"] = {"author": f"guest-{uuid4()}", "name": name}
    return session["guest"]


def rename(slug, session, content):
    """Give the guest of this session a name. Return what is wrong with it, if anything."""
    me = speaker(session)
    if "account" in me["author"]:  # the page is from before the login
        return [OUTDATED]
    name = " ".join(normalize("NFKC", content["name"][:200]).split())  # many accents take minutes
    if not (name.isprintable() and set(name) - INVISIBLE and len(name) <= 30):
        return ["A name has 1 to 30 visible characters."]
    if get_user_model().objects.filter(username__iexact=name).exists():
        return ["That is the name of an account. Please choose another one."]
    session["guest"] = me | {"name": name}


################ What each process does for ever
SIGN_OF_LIFE = 10  # seconds from beat to beat; a page that hears none for 15 connects again
GONE = 25  # seconds until a process that tells nothing, or a window that takes nothing, is dead
PROCESS = uuid4().hex
running = {}  # tasks, by what they do
said = asyncio.Event()
newest = 0  # the id up to which the windows were told everything
rooms = {}  # the windows of this process, by slug
told = {}  # by process: when it told who is here, and whom: names by author by slug


async def for_ever(step):
    """Take a step again and again, whatever happens in it."""
    while True:
        try:
            await step()
        except Exception:
            logging.getLogger("chat").exception("%s() goes on in a second", step.__name__)
            await asyncio.sleep(1)
            await db.aclose_old_connections()  # a new one may work


async def announce(event):
    """Tell all processes. Where this fails or gets lost, they look by themselves."""
    with suppress(Exception):
        await asyncio.wait_for(layers.get_channel_layer().group_send("processes", event), 1)


async def listen():
    """Take in what the processes announce."""
    layer = layers.get_channel_layer()
    channel = await layer.new_channel()
    await layer.group_add("processes", channel)
    while True:
        match await layer.receive(channel):
            case {"type": "said"}:
                said.set()
            case {"type": "here", "process": str(process), "rooms": dict(there)}:
                told[process] = time.monotonic(), there


async def look():
    """Tell the windows what is new in the database, whenever `said` is set."""
    global newest
    await said.wait()
    said.clear()
    new = Message.objects.raw(NEW, [newest, KEPT])
    for message in await sync_to_async(list)(new):
        newest = message.id
        for window in rooms.get(message.room, ()):
            if message.id > window.start:
                window.add(message.fragment)


async def tick():
    """Once a second, let look() look, and tell the windows and the other processes who is here."""
    await asyncio.sleep(1)
    said.set()
    now = time.monotonic()
    here = {}
    for slug, windows in rooms.items():
        reading = [window for window in windows if window.shown_at > now - GONE]
        here[slug] = {window.me["author"]: window.me["name"] for window in reading}
    told[PROCESS] = now, here
    for process, (when, _) in list(told.items()):
        if when < now - GONE:
            del told[process]
    for slug, windows in rooms.items():
        beat = (int(now) + hash(slug)) // SIGN_OF_LIFE  # not in all rooms at once
        people = f'<div data-beat="{beat}" hx-swap-oob="innerHTML:#people">{people_in(slug)}</div>'
        for window in windows:
            if people != window.people:
                window.people = people
                window.add(people)
    await announce({"type": "here", "process": PROCESS, "rooms": here})


def people_in(slug):
    """Who has the room open, in this process or another: each person once, as HTML."""
    people = {}
    for _, there in list(told.values()):
        people |= there.get(slug, {})
    by_name = sorted(people.items(), key=lambda person: person[1].casefold())
    return render_people(tuple(by_name[:20]), len(by_name[20:]))


@lru_cache(maxsize=10_000)
def render_people(people, more):
    return render_to_string("people.html", {"people": people, "more": more})


################ The consumer: one for each open window
class ChatConsumer(AsyncJsonWebsocketConsumer):
    channel_layer_alias = None  # the process listens for all its windows
    showing = None

    async def dispatch(self, message):  # Channels' own closes the database's connection, too
        await getattr(self, message["type"].replace(".", "_"))(message)

    async def connect(self):
        await self.accept()
        self.slug = self.scope["url_route"]["kwargs"]["slug"]
        origin = dict(self.scope["headers"]).get(b"origin", b"").decode("latin1")
        host, _ = split_domain_port(origin.partition("://")[2])
        if not (self.slug and validate_host(host, ALLOWED_HOSTS)):  # a foreign page, say
            await self.close(4403)  # before accept(), htmx would try again for ever
            raise StopConsumer
        self.base_send = self.base_send.__self__.real_send  # past the session: saves a fifth
        self.session = self.scope["session"]
        self.me = await sync_to_async(speaker)(self.session)
        await self.catch_up()
        self.showing = asyncio.create_task(self.show())
        for step in listen, look, tick:
            if step not in running or running[step].done():
                running[step] = asyncio.create_task(for_ever(step))

    async def catch_up(self):
        """Queue what was said since the message that the page ends with, or the newest afresh."""
        query = re.search(rb"after=(\d{1,18})", self.scope["query_string"])
        after = query and int(query[1])
        if after and not await Message.objects.filter(id=after).aexists():
            after = None  # the page has outlived its database
        self.start = max(after or 0, newest)  # look() tells what is newer
        log = Message.objects.filter(room=self.slug, id__lte=newest).order_by("-id")
        self.queue = []
        self.people = None
        self.shown_at = time.monotonic()
        rooms.setdefault(self.slug, set()).add(self)
        asyncio.current_task().add_done_callback(self.leave)  # disconnect() is not always called
        missed = log.filter(id__gt=after or 0)
        clear = []
        if after is None or await missed.acount() > KEPT:
            missed = log[:HISTORY]
            clear = [CLEAR]
        fragments = [message.fragment async for message in missed]
        self.queue = clear + fragments[::-1] + self.queue  # look() may have added some meanwhile

    def leave(self, _):
        rooms[self.slug].remove(self)
        if not rooms[self.slug]:
            del rooms[self.slug]

    def add(self, fragment):
        """Send a fragment, in one frame with others if the window is still busy with the last."""
        self.queue.append(fragment)
        if len(self.queue) > KEPT:
            self.queue = [CLEAR, *self.queue[-HISTORY:]]
        if self.showing and self.showing.done():
            self.showing = asyncio.create_task(self.show())

    async def show(self):
        with suppress(OSError, RuntimeError):  # the client has gone
            while self.queue:
                frame = "".join(self.queue)
                self.queue = []
                await self.base_send({"type": "websocket.send", "text": frame})
                self.shown_at = time.monotonic()

    async def receive(self, text_data=None, bytes_data=None):
        content = {"author": self.me["author"]}
        with suppress(AttributeError, TypeError, ValueError, RecursionError):  # not an object
            for name, value in (await self.decode_json(text_data)).items():
                if isinstance(value, str):
                    content[name] = value.encode(errors="replace").decode()  # no half characters
        if self.session.session_key:  # read it anew: a new name counts at once, as does a logout
            self.session = SessionStore(self.session.session_key)
        errors = await sync_to_async(say)(self.slug, self.session, content)
        self.announcing = asyncio.create_task(announce({"type": "said"}))  # Redis may hang
        if errors or "key" in content:
            answer = {"errors": errors, "key": content.get("key", "")}
            self.add(render_to_string("answer.html", answer))
        await asyncio.sleep(0.01)  # seconds: nobody notices but a flooder


################ Pages: a POST is the way to speak without JavaScript
def strict(get_response):
    """Middleware: our pages run no script but ours, and the browser keeps no copy of them."""

    def respond(request):
        request.encoding = "utf-8"  # whatever it says: Django stumbles over others
        request.csp_nonce = uuid4().hex
        response = get_response(request)
        if response.status_code not in (404, 500):  # those may be Django's pages for developers
            ours = f"default-src 'self' 'nonce-{request.csp_nonce}'; img-src data:"
            theirs = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
            response["Content-Security-Policy"] = f"{ours}; {theirs}"
            response["Cache-Control"] = "no-store"  # its key is good for one message
        return response

    return respond


def page(request, slug=LOBBY):
    errors = None
    if request.method == "POST":
        act = rename if "name" in request.POST else say
        errors = act(slug, request.session, request.POST)
        async_to_sync(announce)({"type": "said"})
        if not errors:
            return redirect(request.path)
    newest_first = Message.objects.order_by("-id")
    context = {"slug": slug, "me": speaker(request.session), "key": uuid4(), "errors": errors}
    context["messages"] = newest_first.filter(room=slug)[:HISTORY]
    context["people"] = people_in(slug)
    context["rooms"] = dict.fromkeys([LOBBY, *newest_first.values_list("room", flat=True)[:200]])
    return render(request, "page.html", context)


class SignUp(views.RedirectURLMixin, FormView):
    form_class = forms.UserCreationForm

    def form_valid(self, form):
        with suppress(IntegrityError):  # a double click: the name is taken by now
            login(self.request, form.save())
            return redirect(self.get_success_url())
        return self.form_invalid(self.get_form())


################ Routes
urlpatterns = [
    path("", page),
    path("chat/<slug:slug>/", page),
    path("chat/", lambda request: redirect(f"/chat/{request.GET.get('room', LOBBY)}/")),
    path("login/", views.LoginView.as_view(template_name="account.html", next_page="/")),
    path("signup/", SignUp.as_view(template_name="account.html", next_page="/")),
    path("logout/", views.LogoutView.as_view(next_page="/")),
]

consumer = ChatConsumer.as_asgi()
routes = [path("ws/chat", consumer, {"slug": LOBBY}), path("ws/chat/<slug:slug>", consumer)]
routes += [re_path("", consumer, {"slug": None})]
pages = asgi.get_asgi_application()
files = ASGIStaticFilesHandler(pages)  # fails on a path that leads out of its folder
http = routing.URLRouter([re_path(r"[.][.]", pages), re_path("", files)])
websocket = auth.AuthMiddlewareStack(routing.URLRouter(routes))
application = routing.ProtocolTypeRouter({"http": http, "websocket": websocket})


################ Run
def prepare():
    """Make the tables, clear out old sessions, and find the newest message."""
    global newest
    try:
        management.call_command("migrate", run_syncdb=True, verbosity=0)
    except Error:  # processes that start together on an empty database get in each other's way
        time.sleep(2 + random.random())
        management.call_command("migrate", run_syncdb=True, verbosity=0)
    SessionStore.clear_expired()
    newest = Message.objects.aggregate(id=models.Max("id"))["id"] or 0
    connections.close_all()


with ThreadPoolExecutor() as thread:  # uvicorn's workers read this file in a running event loop
    thread.submit(prepare).result()

if __name__ == "__main__" and len(sys.argv) > 1:
    management.execute_from_command_line(sys.argv)
elif __name__ == "__main__":
    host = os.getenv("HOST", "127.0.0.1")
    port = os.getenv("PORT", "8000")
    if not port.isdecimal():
        sys.exit(f"PORT is {port!r}, which is not a number")
    limits = {"ws_max_size": 128 * 1024, "ws_per_message_deflate": False}  # bytes
    limits |= {"ws_ping_interval": 8, "ws_ping_timeout": 8, "timeout_graceful_shutdown": 3}
    print(f"Starting the chat at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(application, host=host, port=int(port), log_level="warning", **limits)
