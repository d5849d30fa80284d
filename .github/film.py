# /// script
# requires-python = ">=3.11"
# dependencies = ["django", "channels", "daphne", "uvicorn[standard]", "django-htmx",
#   "dj-database-url", "pillow", "playwright"]
# ///
"""Makes the pictures of README.md, from the real program in a real browser.

`uv run .github/film.py` makes film.gif from chat.py, and step-*.webp, two windows of some steps of
the tutorial, from README.md.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WIDTH, HEIGHT, GAP, TITLE = 396, 330, 8, 34  # pixels: a window, what is between two, the caption
FAST, SLOW, READ = 50, 80, 1200  # milliseconds: a key, a moment of waiting, a caption to read
expect.set_options(timeout=10_000)  # milliseconds


class Server:
    def __init__(self, folder):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self):
        environment = {"PATH": os.environ["PATH"], "PORT": str(self.port)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "chat.py"]
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, **quiet)
        return self

    def wait(self):
        end = monotonic() + 20  # seconds
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert monotonic() < end and self.process.poll() is None, "the server does not start"
            sleep(0.1)

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def stage(folder, browser):
    """A running server, and what opens windows to it, each of a person of its own."""
    server = Server(folder).start()

    def window(name=None, width=WIDTH, height=HEIGHT):
        size = {"width": width, "height": height}
        page = browser.new_context(viewport=size, locale="en-GB", color_scheme="light").new_page()
        page.goto(server.url)
        if name:
            page.locator("header details").last.click()
            page.fill("[name=name]", name)
            page.click("text=Rename")
            page.wait_for_load_state()
        return page

    try:
        server.wait()
        yield server, window
    finally:
        server.kill()


class Film:
    """Two windows side by side, with a caption above them."""

    def __init__(self, *pages):
        self.pages = list(pages)
        self.frames, self.durations = [], []
        self.caption = ""

    def shoot(self, milliseconds):
        picture = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT + TITLE), "#3a4252")
        words = {"font": ImageFont.load_default(17), "fill": "white", "anchor": "mm"}
        ImageDraw.Draw(picture).text((picture.width // 2, TITLE // 2), self.caption, **words)
        for number, page in enumerate(self.pages):
            window = Image.open(BytesIO(page.screenshot()))
            picture.paste(window, (number * (WIDTH + GAP), TITLE))
        if self.frames and picture.tobytes() == self.frames[-1].tobytes():
            self.durations[-1] += milliseconds
        else:
            self.frames.append(picture)
            self.durations.append(milliseconds)

    def tell(self, caption):
        self.caption = caption
        self.shoot(READ)

    def type(self, page, text):
        page.focus("[name=chat_message]")
        for letter in text:
            page.keyboard.type(letter)
            self.shoot(FAST)
        page.keyboard.press("Enter")
        self.shoot(SLOW)

    def until(self, page, selector, text):
        """Film on until the page says so."""
        end = monotonic() + 15  # seconds
        while text not in page.inner_text(selector):
            assert monotonic() < end, f"{selector} does not come to say {text!r}"
            self.shoot(SLOW)
        self.shoot(SLOW)

    def save(self, path):
        width, height = self.frames[0].size
        samples = self.frames[:: len(self.frames) // 8]
        sheet = Image.new("RGB", (width, height * len(samples)))
        for number, frame in enumerate(samples):
            sheet.paste(frame, (0, number * height))
        palette = sheet.quantize(method=Image.Quantize.MAXCOVERAGE)  # the same for all frames
        frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in self.frames]
        how = {"duration": self.durations, "loop": 0, "optimize": True, "disposal": 1}
        frames[0].save(path, save_all=True, append_images=frames[1:], **how)
        size = path.stat().st_size // 1024
        print(f"{path.name}: {sum(self.durations) / 1000:.1f} s, {size} KiB")


def make_film(browser):
    with TemporaryDirectory() as folder:
        shutil.copy(ROOT / "chat.py", folder)
        shutil.copytree(ROOT / "templates", f"{folder}/templates")
        with stage(folder, browser) as (server, window):
            ann, bob = window("Ann"), window("Bob")
            bob.goto("about:blank")
            expect(ann.locator("#people")).to_contain_text("1 here", timeout=30_000)
            film = Film(ann, bob)
            film.shoot(800)
            bob.goto(server.url)
            film.until(ann, "#people", "2 here")
            film.type(ann, "Lunch at the bridge?")
            film.until(bob, "#content", "bridge")
            film.shoot(600)
            server.kill()
            film.until(bob, "#status", "No connection")
            film.tell("The server has been killed")
            film.type(bob, "Yes, at noon.")
            film.shoot(1400)
            server.start()
            film.caption = "The server starts again"
            film.until(ann, "#content", "at noon")
            film.until(bob, "#content", "at noon")
            expect(bob.locator("#unsent li")).to_have_count(0)
            film.tell("The message goes out once")
            window("Eve")
            film.caption = "Eve comes in"
            film.until(ann, "#people", "Eve")
            film.until(bob, "#people", "Eve")
            film.shoot(1400)
            film.save(HERE / "film.gif")


@contextmanager
def step_folder(number):
    """A folder with the files as they are at the end of a step of the tutorial."""
    (catch_up,) = re.findall(
        r"^    (step=\d+; .*(?:\n    .+)*)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    with TemporaryDirectory() as copy:
        shutil.copytree(ROOT / "templates", f"{copy}/templates")
        shutil.copy(ROOT / "README.md", copy)
        command = re.sub(r"step=\d+", f"step={number}", catch_up, count=1)
        subprocess.run(["bash", "-c", command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        yield f"{copy}/step-{number}"


def still(browser, number, play):
    """A picture of two windows of a step, side by side."""
    with step_folder(number) as folder, stage(folder, browser) as (server, window):
        pages = [window(height=240), window(height=240)]
        for page in pages:
            page.wait_for_timeout(800)
        play(server, *pages)
        picture = Image.new("RGB", (2 * WIDTH + GAP, 240), "#3a4252")
        for place, page in enumerate(pages):
            picture.paste(Image.open(BytesIO(page.screenshot())), (place * (WIDTH + GAP), 0))
        path = HERE / f"step-{number}.webp"
        picture.save(path, lossless=True, quality=100, method=6)
        print(f"{path.name}: {path.stat().st_size // 1024} KiB")


def say(page, *texts):
    for text in texts:
        page.fill("[name=chat_message]", text)
        page.keyboard.press("Enter")
        expect(page.locator(".text, #unsent li").last).to_have_text(text)


def one_hears_it(server, ann, bob):
    say(ann, "Is anybody here?", "Hello?")


def unsent(server, ann, bob):
    say(ann, "Lunch at the bridge?")
    expect(bob.locator(".text")).to_have_count(1)
    server.kill()
    expect(bob.locator("#status")).to_contain_text("No connection")
    say(bob, "Yes, at noon.")


def who_is_here(server, ann, bob):
    expect(ann.locator("#people")).to_contain_text("2 here")
    expect(bob.locator("#people")).to_contain_text("2 here")
    say(ann, "Lunch at the bridge?")
    expect(bob.locator(".text")).to_have_count(1)


if __name__ == "__main__":
    with sync_playwright() as playwright:
        path = shutil.which("google-chrome") or shutil.which("chromium") or shutil.which("chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        make_film(browser)
        still(browser, 2, one_hears_it)
        still(browser, 7, unsent)
        still(browser, 11, who_is_here)
