"""The rendered pages made self-contained: formulas as MathML, pictures as files, links to sources, the search."""
import base64
import hashlib
import html
import json
import re
import shutil
import struct
from pathlib import Path

from latex2mathml.converter import convert

FORMULA = re.compile(r'<span class="math (inline|display)">\\[(\[](.+?)\\[)\]]</span>', re.S)
PICTURE = re.compile(r'<img (?:alt="([^"]*)" )?src="data:image/(\w+);base64,([^"]+)"([^>]*)>')
HEAD = re.compile(r"<th\b[^>]*>[^<]*_[^<]*</th>")   # a long name may break at a `_`
CELL = re.compile(r"<td([^>]*)>([^<]{0,36})</td>")
NUMBER = re.compile(r"[-+±]?[\d.,]+(?:e[-+]?\d+)?%?(?: ?± ?[\d.]+)?|NaN|—|-")
LONG = 70   # characters of TeX that may not fit into a line on a phone
TABLES = {"Argument": "arguments", "Name": "names"}   # the first heading of a table of the API -> its class
OUTSIDE = re.compile(r"<(?:script|link)[^>]*cdn\.jsdelivr\.net[^>]*>(?:</script>)?")


def formula(found: re.Match) -> str:
    "TeX as MathML, which browsers draw without a script; a long one gets a line of its own, in which it can scroll."
    tex = html.unescape(found.group(2)).replace(r"\setminus", r"\smallsetminus")
    if found.group(1) == "inline" and len(tex) < LONG:
        return convert(tex)
    return f'<span class="formula" tabindex="0">{convert(tex, display="block")}</span>'


def size_of(data: bytes) -> str:
    "Width and height of a PNG as attributes, so that text does not jump while it loads."
    if data[:4] != b"\x89PNG":
        return ""
    width, height = struct.unpack(">II", data[16:24])
    return f' width="{width}" height="{height}"'


class Pictures:
    "Files of the pictures, each once; the Markdown copies of the pages have written most of them already."

    def __init__(self, folder: Path):
        self.folder = folder
        files = [p for p in folder.glob("*_files/*") if p.is_file()]
        self.known = {hashlib.sha1(p.read_bytes()).hexdigest(): p.relative_to(folder).as_posix() for p in files}

    def place(self, found: re.Match) -> str:
        "An embedded picture as a file that is loaded when the reader comes near it."
        alt, kind, text, rest = found.groups()
        data = base64.b64decode(text)
        key = hashlib.sha1(data).hexdigest()
        if key not in self.known:
            self.known[key] = f"pictures/{key[:12]}.{kind}"
            (self.folder / "pictures").mkdir(exist_ok=True)
            (self.folder / self.known[key]).write_bytes(data)
        label = "" if alt is None else f' alt="{alt}"'
        shown = f'<img{label} src="{self.known[key]}" loading="lazy"{size_of(data)}{rest}>'
        return f'<a class="picture" href="{self.known[key]}">{shown}</a>'   # a phone opens it large


def source_links(text: str, page: str, sources: dict[str, str]) -> str:
    "Edit, view and report: the file that the page is made from, by its name in the repository."
    def mend(found: re.Match) -> str:
        file = sources[page]
        kind = "notebook" if file.endswith(".ipynb") else "source"
        return f'{found.group(1)}{file}"{found.group(3)}{"Edit" if "edit" in found.group(1) else "View"} {kind}</a>'

    return re.sub(r'(href="[^"]*/(?:edit|blob)/\w+/)([^"]*)"(.*?</i> )[^<]*</a>', mend, text)


def sections(text: str) -> dict[str, str]:
    "The words under each heading of a page, without code that is folded; those above the first under an empty name."
    main = text.partition("<main")[2].partition("</main>")[0].partition("</header>")[2]
    main = re.sub(r"<details.*?</details>|<nav.*?</nav>|<h[1-6].*?</h[1-6]>", " ", main, flags=re.S)
    main = re.sub(r"</?(?:span|a|code|em|strong|b|i)\b[^>]*>", "", main)
    parts = re.split(r'<section id="([^"]+)"', main)
    words = [html.unescape(" ".join(re.sub(r"<[^>]*>|^[^<]*>", " ", part).split())) for part in parts[::2]]
    return dict(zip(["", *parts[1::2]], words))


def break_names(found: re.Match) -> str:
    "A heading of a table whose text, not its attributes, may break."
    tag, _, text = found.group().partition(">")
    return f"{tag}>{text.replace('_', '_<wbr>')}"


def table_cell(found: re.Match) -> str:
    "A short cell of a table stays in one line; a number stands to the right."
    rest, text = found.groups()
    names = "short number" if NUMBER.fullmatch(text.strip()) else "short"
    rest = rest.replace('class="', f'class="{names} ') if "class=" in rest else f'{rest} class="{names}"'
    return f"<td{rest}>{text}</td>"


def finish(folder: Path, sources: dict[str, str], words: dict[str, dict], assets: Path):
    "What smalldocs leaves to the site. `sources`: page -> file; `words`: page or anchor -> what the search knows."
    pictures, texts = Pictures(folder), {}
    for path in folder.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        text = OUTSIDE.sub("", FORMULA.sub(formula, text))
        text = CELL.sub(table_cell, PICTURE.sub(pictures.place, text))
        text = HEAD.sub(break_names, text)
        text = re.sub(r"<table class=\"dataframe\">", '<table class="dataframe" tabindex="0">', text)
        for head, kind in TABLES.items():
            first = rf'<div class="sd-table">(?=\s*<table[^>]*>\s*<thead>\s*<tr>\s*<th>{head}</th>)'
            text = re.sub(first, f'<div class="sd-table {kind}">', text)
        texts[path.name] = sections(text)
        text = text.replace('class="code-copy-button"', 'class="code-copy-button" aria-label="Copy"')
        path.write_text(source_links(text, path.stem, sources), encoding="utf-8")
    for theme in folder.glob("site_libs/themes/*.css"):
        theme.write_text(re.sub(r"@import url\([^)]*\);?", "", theme.read_text(encoding="utf-8")), encoding="utf-8")
    index = folder / "search.json"
    entries = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        page, _, anchor = entry["href"].partition("#")
        known = dict(href=entry["href"], title=entry["title"], section=entry["section"])
        entries.append(known | words.get(entry["href"], {}) | dict(text=texts[page].get(anchor, "")))
    index.write_text(json.dumps(entries, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    shutil.copy(assets / "search.js", folder / "site_libs/fuse/fuse.min.js")
    listing = folder / "llms.txt"
    listing.write_text(re.sub(r"\(https?://[^)]*/([\w.]+)\)", r"(\1)", listing.read_text(encoding="utf-8")))
