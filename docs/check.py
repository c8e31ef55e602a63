"""Every page in headless Chromium, wide and narrow, light and dark: `make site-test` runs it on the built site.

Chromium comes from apt where that is allowed (root, a network); elsewhere the check is skipped with a clear word.
Screenshots are left in a folder that git ignores; `--report` prints the numbers without judging them."""
import argparse
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import yaml
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
MODES = [(1440, "light"), (390, "light"), (390, "dark"), (1440, "dark")]
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
HEIGHTS = {1440: 900, 390: 844}
TEX = re.compile(r"\\[a-zA-Z]{2,}\{|\\[()\[\]]|\\(?:sum|frac|nabla|mathbf|cdot|setminus|in)\b|\$[^$\s][^$\n]*\$")

LOOK = """() => {
  const words = document.body.cloneNode(true);
  words.querySelectorAll("pre, code, script, style, details").forEach((e) => e.remove());
  const attr = (sel, name) => [...document.querySelectorAll(sel)].map((e) => e.getAttribute(name));
  const describe = document.querySelector('meta[name="description"]');
  return {
    title: document.title, h1: document.querySelectorAll("h1").length, text: words.textContent,
    description: describe ? describe.content : "",
    ids: attr("[id]", "id"), links: attr("a[href]", "href"), toc: document.querySelectorAll("#TOC a").length,
    silent: [...document.querySelectorAll("img")].filter((e) => !(e.alt || "").trim()).map((e) => e.src.slice(0, 80)),
    nameless: [...document.querySelectorAll("a[href], button")].filter((e) => !(e.textContent.trim()
      || e.getAttribute("aria-label") || e.title || e.querySelector("img[alt]"))).map((e) => e.outerHTML.slice(0, 100)),
  };
}"""
MEASURE = """() => {
  const width = document.documentElement.clientWidth;
  const inside = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (p.scrollWidth > p.clientWidth && getComputedStyle(p).overflowX !== "visible") return true;
    return false; };
  const shown = (e) => e.getClientRects().length > 0;
  const name = (e) => `${e.tagName.toLowerCase()}.${e.className} ${e.textContent.trim().slice(0, 60)}`;
  const blocks = [...document.querySelectorAll("main pre")].filter(shown);
  const cut = blocks.filter((e) => e.scrollWidth > e.clientWidth + 1);
  const beyond = [...document.querySelectorAll("main *:not(pre *)")].filter((e) => shown(e) && !inside(e)
    && e.getBoundingClientRect().right > width + 1);
  return {height: document.documentElement.scrollHeight, sideways: document.documentElement.scrollWidth - width,
          blocks: blocks.length, cut: cut.map(name), beyond: beyond.map(name)};
}"""
PAINTED = """(dark) => document.documentElement.classList.contains("quarto-dark") === dark"""
CONTRAST = """(selector) => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = parse(c).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (e) => { for (let p = e; p; p = p.parentElement) { const c = getComputedStyle(p).backgroundColor;
    const v = parse(c); if (v.length < 4 || v[3] > 0.5) return c; } return "rgb(255, 255, 255)"; };
  return Math.min(...[...document.querySelectorAll(selector)].map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); }));
}"""


def browser() -> str | None:
    "The path of Chromium, installed by apt where it is missing and that is allowed."
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("Chromium is missing: installing it by apt-get")
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(["apt-get", "update"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "chromium"], **quiet)
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        "Say nothing."


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    "The site on a free port of this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Visit:
    "All pages of a site, what they hold, and what is wrong with them."

    def __init__(self, page: Page, folder: Path, host: str, shots: Path | None):
        self.page, self.folder, self.host, self.shots = page, folder, host, shots
        self.faults: list[str] = []
        self.pages: dict[str, dict] = {}
        self.sizes: dict[str, dict[tuple, dict]] = {}
        self.outside, self.errors, self.at = 0, 0, ""
        page.on("request", self.asked)
        page.on("response", self.answered)
        page.on("requestfailed", lambda request: self.fault(f"request failed: {request.url}"))
        page.on("console", self.said)
        page.on("pageerror", lambda error: self.wrong(f"error: {error}"))

    def fault(self, text: str):
        self.faults.append(f"{self.at}: {text}")

    def wrong(self, text: str):
        self.errors += 1
        self.fault(text)

    def asked(self, request):
        if not request.url.startswith((self.host, "data:", "blob:")):
            self.outside += 1
            self.fault(f"asks another host: {request.url}")

    def answered(self, response):
        if response.status >= 400:
            self.fault(f"{response.status} for {response.url}")

    def said(self, message):
        if message.type == "error":
            self.wrong(f"console: {message.text}")

    def look(self, name: str):
        "One page in all modes; it is loaded once."
        self.at = name
        self.page.set_viewport_size(dict(width=1440, height=900))
        self.page.emulate_media(color_scheme="light")
        self.page.goto(f"{self.host}{name}", wait_until="load")
        self.pages[name] = self.page.evaluate(LOOK)
        self.sizes[name] = {}
        self.page.add_style_tag(content=STILL)
        for width, scheme in MODES:
            self.page.set_viewport_size(dict(width=width, height=HEIGHTS[width]))
            self.page.emulate_media(color_scheme=scheme)
            self.page.wait_for_function(PAINTED, arg=scheme == "dark")
            self.sizes[name][width, scheme] = self.page.evaluate(MEASURE)
            if self.shots:
                path = self.shots / f"{name.removesuffix('.html')}-{width}-{scheme}.jpg"
                self.page.screenshot(path=path, type="jpeg", quality=60)

    def judge_page(self, name: str):
        "Titles, texts, pictures and widths of one page."
        self.at, seen = name, self.pages[name]
        if seen["h1"] != 1:
            self.fault(f"{seen['h1']} headings of the first level; expected one")
        if not seen["description"]:
            self.fault("no description")
        tex = TEX.search(seen["text"])
        if tex:
            self.fault(f"raw TeX: {seen['text'][max(0, tex.start() - 30):tex.end() + 30]!r}")
        for source in seen["silent"]:
            self.fault(f"a picture without alt text: {source}")
        for element in seen["nameless"]:
            self.fault(f"a link or button without a name: {element}")
        for mode, size in self.sizes[name].items():
            if size["sideways"] > 1:
                self.fault(f"{mode}: scrolls sideways by {size['sideways']} px")
            for kind in ("cut", "beyond"):
                if size[kind]:
                    self.fault(f"{mode}: {len(size[kind])} {kind}, first {size[kind][0]!r}")

    def judge_links(self):
        "Every link and anchor within the site; every title once."
        for name, seen in self.pages.items():
            self.at = name
            for link in dict.fromkeys(seen["links"]):
                url = urlparse(urljoin(f"{self.host}{name}", link))
                if f"{url.scheme}://{url.netloc}/" != self.host:
                    continue
                target = unquote(url.path).lstrip("/") or "index.html"
                if not (self.folder / target).is_file():
                    self.fault(f"broken link {link}")
                elif url.fragment and target in self.pages and unquote(url.fragment) not in self.pages[target]["ids"]:
                    self.fault(f"no anchor {link}")
        titles = [seen["title"] for seen in self.pages.values()]
        for name, seen in self.pages.items():
            self.at = name
            if titles.count(seen["title"]) > 1:
                self.fault(f"another page has the title {seen['title']!r}, too")
            if seen["title"].lower().split(" – ")[0] == name.removesuffix(".html").lower() != "index":
                self.plain_title(seen["title"])

    def plain_title(self, title: str):
        "A file's name says what the page is only for the few that every reader knows."
        if title.lower().split(" – ")[0] not in ("results", "glossary", "changelog", "api", "gallery"):
            self.fault(f"the title {title!r} is the file's name only")

    def search(self, query: str) -> list[str]:
        "What the search shows for some words, typed by a reader who presses / first; the best first."
        self.page.set_viewport_size(dict(width=1440, height=900))
        self.page.goto(f"{self.host}index.html", wait_until="load")
        self.page.keyboard.press("/")
        self.page.keyboard.type(query)
        self.page.wait_for_selector(".smalldocs-search-results.show > *")
        links = self.page.eval_on_selector_all("a.search-result", "es => es.map(e => e.getAttribute('href'))")
        return [link.removeprefix("./") for link in links]

    def judge_search(self, cases: list[dict]):
        "What must come first for what a reader types; its text must be readable in the dark."
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            for case in cases:
                found = self.search(case["query"])
                self.at = f"search {case['query']!r} ({scheme})"
                if not found or not re.match(case["first"], found[0]):
                    self.fault(f"expected {case['first']} first, found {found[:3]}")
            parts = ".search-result-title, .search-result-text, .search-result-section"
            contrast = self.page.evaluate(CONTRAST, parts)
            if not contrast >= 4.5:
                self.fault(f"results are hard to read: contrast {contrast:.1f}, expected 4.5 or more")
            if self.shots:
                self.page.screenshot(path=self.shots / f"search-{scheme}.png")
        self.at = "search, Enter"
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(lambda url: "index.html" not in url, wait_until="load")

    def report(self) -> dict[str, object]:
        "The numbers of the site."
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        heights = {w: {name: s[w, "light"]["height"] for name, s in self.sizes.items()} for w in (1440, 390)}
        longest = {w: max((height, name) for name, height in of.items()) for w, of in heights.items()}
        cut = {w: sum(len(s[w, "light"]["cut"]) for s in self.sizes.values()) for w in (1440, 390)}
        blocks = sum(s[1440, "light"]["blocks"] for s in self.sizes.values())
        return {
            "pages": len(self.pages), "weight, MB": round(sum(p.stat().st_size for p in files) / 1e6, 1),
            "longest page, px (1440)": "{} ({})".format(*longest[1440]),
            "longest page, px (390)": "{} ({})".format(*longest[390]),
            "median page, px (1440)": sorted(heights[1440].values())[len(self.sizes) // 2],
            "code blocks cut off (1440, 390)": f"{cut[1440]}, {cut[390]} of {blocks}",
            "entries of the longest contents": max(seen["toc"] for seen in self.pages.values()),
            "requests to other hosts": self.outside, "console errors": self.errors,
            "pages with raw TeX": sum(bool(TEX.search(seen["text"])) for seen in self.pages.values()),
            "pictures without alt text": sum(len(seen["silent"]) for seen in self.pages.values()),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("_docs"))
    parser.add_argument("--shots", type=Path, help="where screenshots go")
    parser.add_argument("--report", action="store_true", help="print the numbers only")
    parser.add_argument("--pages", nargs="*", help="only these, such as index.html")
    parser.add_argument("--list", type=int, default=60, help="faults printed at most")
    args = parser.parse_args()
    path, began = browser(), time.monotonic()
    if path is None:
        print("site-test skipped: there is no Chromium here, and installing it needs root and apt-get with a network")
        return 0
    if args.shots:
        shutil.rmtree(args.shots, ignore_errors=True)
        args.shots.mkdir(parents=True)
    server = serve(args.folder)
    host = f"http://127.0.0.1:{server.server_port}/"
    names = args.pages or sorted(p.relative_to(args.folder).as_posix() for p in args.folder.rglob("*.html"))
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        visit = Visit(chromium.new_page(), args.folder, host, args.shots)
        for name in names:
            visit.look(name)
        for name in names:
            visit.judge_page(name)
        visit.judge_links()
        if not args.report and not args.pages:
            cases = yaml.safe_load((Path(__file__).parent / "search_cases.yml").read_text(encoding="utf-8"))
            visit.judge_search(cases)
        chromium.close()
    server.shutdown()
    print(*[f"{name:36} {value}" for name, value in visit.report().items()], sep="\n")
    print(f"{len(visit.faults)} faults on {len(names)} pages in {time.monotonic() - began:.0f} s")
    print(*visit.faults[:args.list], sep="\n")
    return 0 if args.report else int(bool(visit.faults))


if __name__ == "__main__":
    sys.exit(main())
