# /// script
# requires-python = ">=3.11"
# dependencies = ["django","channels","daphne","uvicorn[standard]","django-htmx","dj-database-url"]
# ///
"""A whole real-time chat: `python chat.py`, then http://127.0.0.1:8000 in two windows."""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote
from uuid import uuid4

import dj_database_url
import django
import uvicorn
from asgiref.sync import async_to_sync
from django.core import asgi, exceptions, management, signals
from django.db import Error, connection, connections, models, transaction

################ Settings
LOBBY, HISTORY, KEPT = "lobby", 50, 1000  # messages: shown on arrival, held for who lags behind
rooms = {}  # those with open windows, by slug
DEBUG = os.getenv("DEBUG", str("runserver" in sys.argv)).lower() in ("1", "true", "yes", "on")
SECRET_KEY = os.environ.setdefault("SECRET_KEY", uuid4().hex + uuid4().hex)
ALLOWED_HOSTS = os.getenv("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")
INSTALLED_APPS = ["daphne"] if "runserver" in sys.argv else []  # it is slow to import
INSTALLED_APPS += ["chat", "django_htmx", "django.contrib.auth", "django.contrib.contenttypes"]
INSTALLED_APPS += ["django.contrib.sessions", "django.contrib.staticfiles"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
STATIC_URL, ROOT_URLCONF, ASGI_APPLICATION = "static/", "chat", "chat.application"
LOGGING_CONFIG = None  # Django would mail errors to nobody; Python prints them
LAYER = {"BACKEND": "channels.layers.InMemoryChannelLayer"}
if url := os.getenv("REDIS_URL"):
    LAYER = {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer", "CONFIG": {"hosts": [url]}}
CHANNEL_LAYERS = {"default": LAYER}
sys.modules["chat"] = sys.modules[__name__]  # the app "chat" is this file, however it was started
os.environ["DJANGO_SETTINGS_MODULE"] = "chat"  # and so are its settings
try:
    DATABASE = dj_database_url.config(default=f"sqlite:///{quote(__file__[:-3])}.sqlite3")
    DATABASE |= {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True}  # to open one takes long
    if "sqlite" in DATABASE["ENGINE"]:
        wal = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
        DATABASE["OPTIONS"] = {"init_command": wal, "transaction_mode": "IMMEDIATE", "timeout": 20}
    DATABASES = {"default": DATABASE}
    django.setup()
except (ValueError, exceptions.ImproperlyConfigured) as error:
    sys.exit(f"DATABASE_URL: {' '.join(str(error).split())} (PostgreSQL needs psycopg[binary])")
django.apps.apps.get_app_config("chat").models_module = sys.modules["chat"]  # migrate looks there
signals.request_finished.connect(lambda **_: connections.close_all(), weak=False)  # its thread ends

from channels import auth, db, layers, routing
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.security.websocket import AllowedHostsOriginValidator, WebsocketDenier
from django.contrib.auth import get_user, get_user_model, views
from django.contrib.auth.forms import UserCreationForm
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import path, re_path
from django.views.generic import CreateView


################ Messages: the database is the truth
class Message(models.Model):
    __module__ = "chat"  # the app it belongs to, also when this file is run as a script
    id = models.BigAutoField(primary_key=True)  # in the order of the room's log
    key = models.UUIDField(default=uuid4, unique=True)
    room = models.CharField(max_length=50, db_index=True)
    author = models.CharField(max_length=50)  # whose it is, even when names are the same
    name = models.CharField(max_length=150)
    text = models.CharField(max_length=2000, error_messages={"blank": "Please type something."})
    said_at = models.DateTimeField(auto_now_add=True)


def say(room, request, content):
    """Store a message, once for each key. Return what is wrong with it, if anything."""
    text = content.get("chat_message", "").replace("\0", " ").strip()  # PostgreSQL takes no NUL
    message = Message(room=room, text=text, key=content.get("key") or uuid4(), **speaker(request))
    try:
        message.clean_fields()
    except exceptions.ValidationError as error:
        return error.messages
    with transaction.atomic():
        if connection.vendor == "postgresql":  # writers in line: or id 8 is seen before 7
            connection.cursor().execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [room])
        Message.objects.bulk_create([message], ignore_conflicts=True)


async def announce(room):
    """Tell every process to look at the room. Where this gets lost, they look by themselves."""
    with suppress(Exception):  # and gives up after a second
        await asyncio.wait_for(layers.get_channel_layer().group_send(room, {"type": "said"}), 1)


################ Speakers: accounts and guests
def speaker(request):
    """Who speaks in this session, an account or a guest, as fields of a message."""
    if request.session.session_key:  # another tab may have changed the name, or logged out
        request.session = request.session.__class__(request.session.session_key)
    if (user := get_user(request)).is_authenticated:
        return {"author": f"account-{user.pk}", "name": user.username}
    guest = {"author": f"guest-{uuid4()}", "name": f"Otter {uuid4().int % 10000}"}
    return request.session.setdefault("guest", guest)


def rename(request):
    """Give a guest a name that can't be taken for an account's. Return what is wrong, if anything."""
    name, guest = " ".join(request.POST["name"].split()), {"author": f"guest-{uuid4()}"}
    accounts = get_user_model().objects.values_list("username", flat=True)
    blank = set("✓\u115f\u1160\u2800\u3164\uffa0") & set(name) or not name.isprintable()
    if blank or not 0 < len(name) <= 30 or name.casefold() in map(str.casefold, accounts):
        return ["Please choose another name: up to 30 visible characters, and not an account's."]
    request.session["guest"] = guest | request.session.get("guest", {}) | {"name": name}


################ Rooms: each message rendered once, for all windows
class Room:
    def __init__(self, slug):
        self.windows, self.log, self.count = set(), [], -1
        self.changed, self.task = asyncio.Event(), asyncio.create_task(self.run(slug))

    async def run(self, slug):
        """Look for new messages and wake the windows; an event says only: look again."""
        layer, channel, event = layers.get_channel_layer(), f"room!{uuid4().hex}", None
        while self.windows:
            while event is None or event.done():  # one look serves all events that are there
                event = asyncio.create_task(layer.receive(channel))
                await asyncio.sleep(0)
            try:
                new = Message.objects.filter(room=slug, id__gt=self.log[-1].id if self.log else 0)
                found = await db.database_sync_to_async(list)(new.order_by("-id")[: KEPT + 1])
                for message in found:
                    message.html = render_to_string("message.html", {"message": message})
                self.log = (self.log + found[::-1])[-KEPT:]
                self.count = max(self.count, 0) + len(found)
                self.changed.set()
                self.changed = asyncio.Event()
                await asyncio.wait_for(layer.group_add(slug, channel), 0.5)  # a membership expires
            except Exception as error:  # noqa: BLE001 (the database or the layer is away, say)
                print(f"Room {slug} will look again: {error!r}", file=sys.stderr)
            await asyncio.wait([event], timeout=2)  # then look all the same: events get lost
        del rooms[slug]
        event.cancel()
        await layer.group_discard(slug, channel)


################ The consumer: one for each open window
class ChatConsumer(AsyncJsonWebsocketConsumer):
    channel_layer_alias = None  # the room listens for all its windows

    async def connect(self):
        self.session, self.base_send = self.scope["session"], self.scope["send"]
        self.slug = self.scope["url_route"]["kwargs"].get("slug", LOBBY)
        await self.accept()
        room = rooms[self.slug] = rooms.get(self.slug) or Room(self.slug)
        window = asyncio.create_task(self.show(room))
        room.windows.add(window)
        window.add_done_callback(room.windows.discard)
        asyncio.current_task().add_done_callback(lambda _: window.cancel())  # on every way out

    async def show(self, room):
        """Send all that is new in one frame, then again: as fast as this window reads."""
        seen = -1
        with suppress(OSError):  # the client has gone
            while True:
                while seen == room.count:
                    await room.changed.wait()
                new, seen = room.count - seen, room.count
                swap, size = ("beforeend", new) if new <= len(room.log) else ("innerHTML", HISTORY)
                html = "".join(message.html for message in room.log[-size:])
                await self.send(f'<div hx-swap-oob="{swap}:#content">{html}</div>')

    async def receive(self, text_data=None, bytes_data=None):
        content = {}
        with suppress(AttributeError, TypeError, ValueError, RecursionError):
            fields = (await self.decode_json(text_data[: 64 * 1024])).items()
            content = {k: v.encode(errors="replace").decode() for k, v in fields if type(v) is str}
        errors = await db.database_sync_to_async(say)(self.slug, self, content)
        if errors or "key" in content:
            await self.send(render_to_string("answer.html", {**content, "errors": errors}))
        self.announcing = asyncio.create_task(announce(self.slug))  # Redis may be slow
        await asyncio.sleep(0.01)  # seconds: nobody notices but a flooder


################ Pages: a POST is the way to speak without JavaScript
def page(request, slug=LOBBY):
    post = request.POST
    errors = post and (rename(request) if "name" in post else say(slug, request, post))
    if post and not errors:
        async_to_sync(announce)(slug)
        return redirect(request.path)
    nonce, messages = uuid4(), Message.objects.filter(room=slug).order_by("-id")[:HISTORY]
    context = {"slug": slug, "messages": messages, "me": speaker(request), "post": post}
    context |= {"host": request.get_host(), "key": uuid4(), "csp_nonce": nonce, "errors": errors}
    response = render(request, "page.html", context, status=422 if errors else 200)
    response["Content-Security-Policy"] = f"default-src 'self' 'nonce-{nonce}'; img-src data:"
    response["Cache-Control"] = "no-store"  # the key is good for one message
    return response


################ Routes
SLUG = "(?P<slug>[-a-zA-Z0-9_]{1,50})"  # left out, it is the lobby
form = {"template_name": "account.html"}
urlpatterns = [
    re_path(f"^(?:chat/{SLUG}/|name/)?$", page),
    path("chat/", lambda request: redirect(f"/chat/{request.GET.get('room', LOBBY)}/")),
    path("signup/", CreateView.as_view(form_class=UserCreationForm, success_url="/login/", **form)),
    path("login/", views.LoginView.as_view(next_page="/", **form)),
    path("logout/", views.LogoutView.as_view(next_page="/")),
]
chat, nowhere = ChatConsumer.as_asgi(), WebsocketDenier.as_asgi()
routes = [re_path(f"^ws/chat(?:/{SLUG})?$", chat), re_path("", nowhere)]
stack = AllowedHostsOriginValidator(auth.AuthMiddlewareStack(routing.URLRouter(routes)))


async def websocket(scope, receive, send):
    async def refuse(close):  # accept it first: a browser that can't open a socket tries for ever
        print(f"Refused a WebSocket to {scope['path']!r}", file=sys.stderr)
        await send({"type": "websocket.accept"})
        await send({**close, "code": 4403})

    await stack({**scope, "send": send}, receive, refuse)  # the session's send is a fifth slower


http = ASGIStaticFilesHandler(asgi.get_asgi_application())
application = routing.ProtocolTypeRouter({"http": http, "websocket": websocket})

################ Run
try:
    with ThreadPoolExecutor() as thread:  # uvicorn's workers read this file in a running event loop
        thread.submit(management.call_command, "migrate", run_syncdb=True, verbosity=0).result()
        thread.submit(async_to_sync(layers.get_channel_layer().group_send), "room", {}).result()
except Exception as error:  # noqa: BLE001
    variable = "DATABASE_URL" if isinstance(error, Error) else "REDIS_URL (needs channels-redis)"
    sys.exit(f"{variable}: {' '.join(str(error).split())}")
if __name__ == "__main__" and len(sys.argv) == 1:
    host, port = os.getenv("HOST", "127.0.0.1"), int(os.getenv("PORT", "8000"))
    print(f"Starting the chat at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    how = {"log_level": "warning", "ws_per_message_deflate": False, "timeout_graceful_shutdown": 3}
    uvicorn.run(application, host=host, port=port, **how)
elif __name__ == "__main__":
    management.execute_from_command_line(sys.argv)
