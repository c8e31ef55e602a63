"""The API pages, read from the exported modules without importing them: one page per wing, every public name on it.

A name's entry has its signature, its docstring, a table of its arguments or fields (name, type, default, the comment
beside it), its methods, and its source, folded. `check` lists what has no docstring or no comment."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

NUMBER = re.compile(r"^\d\d_")
TITLES = dict(data="Data", method="Method", network="Networks and losses", scoring="Scores", experiment="Runs",
              study="The study", deploy="Use a trained model", base="Used by all")


@dataclass
class Argument:
    "One argument of a function, or one field of a class."
    name: str            # with its stars
    kind: str = ""       # its annotation, as it is written
    default: str = ""    # as it is written; "": it has none
    comment: str = ""    # what stands beside it


@dataclass
class Entry:
    "One public name."
    name: str                                # "DonorPool", or "DonorPool.draw" for a method
    kind: str                                # "class", "function", "property" or "constant"
    room: str                                # "method.donors"
    source: str                              # of its definition
    doc: str = ""                            # its docstring
    arguments: list[Argument] = field(default_factory=list)
    returns: Argument | None = None
    methods: list["Entry"] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)   # of a table such as LOSSES
    line: int = 1                            # where the definition begins
    notebook: str = ""                       # "26_injection.ipynb"


def notes(text: str) -> dict[int, str]:
    "Line -> its comment; a line that holds nothing else continues the comment above it."
    found, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("# ").strip()
            where = alone if not token.line[:token.start[1]].strip() else found
            where[token.start[0]] = words
    for line in sorted(alone):
        start = line - 1
        while start in alone:
            start -= 1
        if start in found:
            found[start] += " " + alone[line]
    return found


class Room:
    "One exported module: its syntax, its comments, its notebook."

    def __init__(self, path: Path, name: str):
        self.text, self.name = path.read_text(encoding="utf-8"), name
        self.lines, self.comments = self.text.splitlines(), notes(self.text)
        tree = ast.parse(self.text)
        self.defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            self.defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        found = re.search(r"File to edit: \S*?([\w.]+\.ipynb)", self.text)
        self.notebook = found.group(1) if found else ""

    def source(self, node: ast.AST) -> str:
        "The text of a definition, with its decorators and the comment on its last line."
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.lines[first - 1:node.end_lineno])

    def argument(self, node: ast.arg, default: ast.expr | None, stars: str = "") -> Argument:
        "One argument with the comment at the end of its line."
        last = max(node.end_lineno, default.end_lineno if default else 0)
        kind = written(node.annotation).strip("'")
        return Argument(stars + node.arg, kind, written(default), self.comments.get(last, ""))

    def signature(self, node: ast.FunctionDef) -> tuple[list[Argument], Argument | None]:
        "The arguments of a function, and what it returns."
        spec, found = node.args, []
        plain = [*spec.posonlyargs, *spec.args]
        defaults = [None] * (len(plain) - len(spec.defaults)) + spec.defaults
        found += [self.argument(*pair) for pair in zip(plain, defaults)]
        found += [self.argument(spec.vararg, None, "*")] if spec.vararg else []
        found += [self.argument(*pair) for pair in zip(spec.kwonlyargs, spec.kw_defaults)]
        found += [self.argument(spec.kwarg, None, "**")] if spec.kwarg else []
        found = [one for one in found if one.name not in ("self", "cls")]
        if node.returns is None or written(node.returns) == "None":
            return found, None
        beside = self.comments.get(node.returns.end_lineno, "")
        same = any(a.end_lineno == node.returns.end_lineno for a in plain)
        return found, Argument("returns", written(node.returns), "", "" if same and len(plain) > 1 else beside)

    def fields(self, node: ast.ClassDef) -> list[Argument]:
        "The annotated names of a class, those of `ClassVar` left out."
        inside = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return [Argument(n.target.id, written(n.annotation), default_of(n.value), self.comments.get(n.end_lineno, ""))
                for n in inside if "ClassVar" not in written(n.annotation) and not n.target.id.startswith("_")]


def written(node: ast.expr | None) -> str:
    "An expression as Python."
    return "" if node is None else ast.unparse(node)


def default_of(node: ast.expr | None) -> str:
    "A field's default; of `field(default_factory=list)` it is `list()`."
    if isinstance(node, ast.Call) and written(node.func).endswith("field"):
        given = {word.arg: word.value for word in node.keywords}
        if "default_factory" in given:
            factory = given["default_factory"]
            return written(factory.body) if isinstance(factory, ast.Lambda) else f"{written(factory)}()"
        return written(given.get("default"))
    return written(node)


class Package:
    "What the doors of a package hand out, wing by wing."

    def __init__(self, root: Path):
        self.root = root
        paths = {p for p in root.rglob("*.py") if not p.name.startswith("_")}
        names = {p: ".".join(p.relative_to(root).with_suffix("").parts) for p in paths}
        self.rooms = {name: Room(path, name) for path, name in names.items()}
        self.wings = {p.parent.name: p for p in sorted(root.glob("*/__init__.py"))}
        self.public = {wing: self.door(path) for wing, path in self.wings.items()}
        alone = {name: room for name, room in self.rooms.items() if "." not in name and room.notebook}
        self.public["base"] = {name: listed(room.text) for name, room in alone.items() if listed(room.text)}
        self.public = {wing: rooms for wing, rooms in self.public.items() if rooms}
        self.top = {n for names in self.door(root / "__init__.py").values() for n in names}

    def door(self, path: Path) -> dict[str, list[str]]:
        "Room -> its public names, from the table that a door is made of."
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and written(node.func) == "door":
                return {room: names.split() for room, names in ast.literal_eval(node.args[1]).items()}
        return {}

    def summary(self, wing: str) -> str:
        "The docstring of a wing."
        path = self.wings.get(wing)
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else "Used by all other parts."

    def entries(self, wing: str) -> list[Entry]:
        "The public names of a wing, in the order of its door."
        prefix = "" if wing == "base" else f"{wing}."
        return [self.entry(self.rooms[prefix + room], name) for room, names in self.public[wing].items()
                for name in names]

    def entry(self, room: Room, name: str) -> Entry:
        "One public name, looked up in its room."
        node = room.defined.get(name)
        if node is None:
            raise SystemExit(f"dli/{room.name.replace('.', '/')}.py defines no {name}: a door names it")
        made = dict(room=room.name, source=room.source(node), line=node.lineno, notebook=room.notebook)
        if isinstance(node, ast.FunctionDef):
            arguments, returns = room.signature(node)
            return Entry(name, "function", doc=doc_of(node), arguments=arguments, returns=returns, **made)
        if isinstance(node, ast.ClassDef):
            return Entry(name, "class", doc=doc_of(node), arguments=self.made_from(room, node),
                         methods=[self.method(room, name, n) for n in node.body if is_public(n)], **made)
        keys = node.value.keys if isinstance(node.value, ast.Dict) else []
        named = [word.arg for word in node.value.keywords if word.arg] if isinstance(node.value, ast.Call) else []
        keys = [k.value for k in keys if isinstance(k, ast.Constant)] + named
        value = written(node.value)
        doc = room.comments.get(node.lineno, "") or (f"`{value}`" if len(value) < 90 else "")
        return Entry(name, "constant", doc=doc, keys=[str(k) for k in keys], **made)

    def method(self, room: Room, owner: str, node: ast.FunctionDef) -> Entry:
        "One public method or property of a class."
        arguments, returns = room.signature(node)
        marks = {written(d) for d in node.decorator_list}
        kind = "property" if marks & {"property", "cached_property", "functools.cached_property"} else "method"
        name = owner if node.name == "__call__" else f"{owner}.{node.name}"
        return Entry(f"{owner}.__call__" if name == owner else name, kind, room.name, room.source(node), doc_of(node),
                     arguments, returns)

    def made_from(self, room: Room, node: ast.ClassDef) -> list[Argument]:
        "What a class is made from: the arguments of `__init__`, or its fields, those of its parents first."
        own = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if own is not None:
            return room.signature(own)[0]
        found: dict[str, Argument] = {}
        for base in node.bases:
            home, parent = self.find_class(room, written(base).split("[")[0])
            if parent is not None:
                found |= {one.name: one for one in self.made_from(home, parent)}
        fields = {one.name: one for one in room.fields(node)}
        return list((found | fields).values())

    def find_class(self, room: Room, name: str) -> tuple[Room, ast.ClassDef | None]:
        "A class of the package by its name: in the same room, or in the first that has it."
        for home in [room, *self.rooms.values()]:
            if isinstance(home.defined.get(name), ast.ClassDef):
                return home, home.defined[name]
        return room, None


def listed(text: str) -> list[str]:
    "A module's `__all__`."
    found = re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S)
    return ast.literal_eval(found.group(1)) if found else []


def doc_of(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""


def is_public(node: ast.AST) -> bool:
    "Whether a reader may call this method."
    return isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__")


# ---- as Markdown -----------------------------------------------------------------------------------------------------

def anchor(name: str) -> str:
    "The anchor of a name, on the API page and in the notebook."
    return name.lower()


def page_of(notebook: str) -> str:
    "26_injection.ipynb -> injection"
    return NUMBER.sub("", notebook).removesuffix(".ipynb")


def code(text: str, fold: str = "") -> str:
    "A block of Python, folded where a summary is given."
    mark = f'{{.python .cell-code code-fold="true" code-summary="{fold}"}}' if fold else "python"
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{mark}\n{text}\n{ticks}"


def call(entry: Entry) -> str:
    "A name with its arguments and defaults, broken where it grows too long."
    if entry.kind == "property":
        return entry.name
    words = [a.name + (f"={a.default}" if a.default else "") for a in entry.arguments]
    short = f"{entry.name}({', '.join(words)})"
    if len(short) <= 88:
        return short
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) > 86:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([f"{entry.name}(", *lines, line, ")"])


def words(text: str) -> str:
    "Text in which only backticks and emphasis are Markdown: a `<` outside code begins no tag."
    parts = re.split(r"(``.*?``|`[^`]*`)", text)
    return "".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))


def in_table(text: str) -> str:
    return words(text).replace("|", "\\|").replace("\n", " ")


def as_code(text: str) -> str:
    "Code in a table; a bar in it would end the column."
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{text.replace('|', chr(92) + '|')}{ticks}" if text else ""


def table(entry: Entry) -> str:
    "The arguments of a function or the fields of a class."
    meanings = [in_table(a.comment) or f"a `{a.kind}`" for a in entry.arguments]
    rows = [[as_code(a.name), as_code(a.kind), as_code(a.default) or "required", meaning]
            for a, meaning in zip(entry.arguments, meanings)]
    for row, argument in zip(rows, entry.arguments):
        row[2] = "" if argument.name.startswith("*") else row[2]
    if entry.returns:
        rows.append(["returns", as_code(entry.returns.kind), "", in_table(entry.returns.comment)])
    if not rows:
        return ""
    head = ["Argument", "Type", "Default", "Meaning"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 4, *rows])


def describe(entry: Entry, level: int, package: str, top: set[str], wing: str) -> list[str]:
    "One entry, with its methods, as blocks of Markdown."
    blocks = [f"{'#' * level} `{entry.name}`{{.nolink}} {{#{anchor(entry.name)}}}"]
    if entry.kind != "constant":
        blocks.append(code(call(entry)))
    blocks += [words(entry.doc)] * bool(entry.doc) + [table(entry)]
    if entry.keys:
        blocks.append("Keys: " + ", ".join(f"`{key}`" for key in entry.keys) + ".")
    if level > 2:   # the source of a method is in that of its class
        return blocks
    home = "" if entry.name in top else ("" if wing == "base" else f".{wing}")
    home = f"{package}.{entry.room}" if wing == "base" else f"{package}{home}"
    story = page_of(entry.notebook)
    linked = f" Examples: [{story}]({story}.html#{anchor(entry.name)})." if story else ""
    blocks.append(f"`from {home} import {entry.name}`{{.nolink}}.{linked}")
    blocks.append(code(entry.source, "Source"))
    for method in entry.methods:
        blocks += describe(method, level + 1, package, top, wing)
    return blocks


def title_of(wing: str) -> str:
    return TITLES.get(wing, wing.title())


def first_line(doc: str) -> str:
    "The first sentence of a docstring."
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])(?<!Sec\.)(?<!Eq\.)(?<!Fig\.)(?<!al\.)\s", paragraph, maxsplit=1)[0]


def front(title: str, description: str) -> str:
    return f"---\ntitle: {title!r}\ndescription: {description!r}\n---\n"


def write_pages(package: Package, folder: Path, name: str) -> tuple[list[str], dict[str, str], dict[str, dict]]:
    "Write the pages and the index of names for links; returns the names of the pages, the overview first."
    symbols, known, pages, overview = {}, {}, ["api.md"], []
    for wing in sorted(package.public, key=[*TITLES, *package.public].index):
        entries, page = package.entries(wing), f"api_{wing}"
        rows = [f"| [`{e.name}`]({page}.html#{anchor(e.name)}) | {in_table(first_line(e.doc))} |" for e in entries]
        rows = ["| Name | What it is |", "| --- | --- |", *rows]
        intro = package.summary(wing)
        blocks = [front(f"API: {title_of(wing)}", f"Arguments of every public name. {intro}"), "\n".join(rows)]
        overview += [f"## [{title_of(wing)}]({page}.html)", intro, "\n".join(rows)]
        for entry in entries:
            blocks += describe(entry, 2, name, package.top, wing)
            symbols[entry.name] = f"/{page}.html#{anchor(entry.name)}"
            symbols |= {m.name: f"/{page}.html#{anchor(m.name)}" for m in entry.methods}
            known |= search_words(entry, page, entry.name in package.top)
        (folder / f"{page}.md").write_text("\n\n".join(b for b in blocks if b) + "\n", encoding="utf-8")
        pages.append(f"{page}.md")
    lead = ("Every public name, wing by wing. Import from the wing (`from dli.method import DonorPool`{.nolink}); the "
            "most used names are also in `dli` itself.")
    blocks = [front("API", "Every public class, function and table, with all arguments"), lead, *overview]
    (folder / "api.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return pages, symbols, known


def source_of(page: str, package: str) -> str:
    "The file behind an API page, in the repository."
    wing = page.removesuffix(".md").removeprefix("api").strip("_")
    return f"{package}/__init__.py" if wing in ("", "base") else f"{package}/{wing}/__init__.py"


def titles(pages: list[str]) -> list[str]:
    return [title_of(page.removesuffix(".md").removeprefix("api_")) for page in pages]


def search_words(entry: Entry, page: str, top: bool) -> dict[str, dict]:
    "What the search knows of a name beside its text: its kind, its arguments, the keys of a table."
    found = {}
    for one in [entry, *entry.methods]:
        arguments = [a.name.strip("*").lower() for a in one.arguments]
        found[f"{page}.html#{anchor(one.name)}"] = dict(kind=one.kind, names=arguments, keys=one.keys, top=top)
    return found


def gaps(package: Package) -> list[str]:
    "Public names without a docstring, and arguments without a comment."
    found = []
    for wing in package.public:
        for entry in package.entries(wing):
            found += [f"{entry.name}: no docstring"] * (not entry.doc and entry.kind != "constant")
            found += [f"{entry.name}: {a.name} has no comment" for a in entry.arguments if not a.comment]
    return found
