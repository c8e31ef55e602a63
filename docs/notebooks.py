"""A notebook as the site shows it, never run: directives read, exported code folded, every picture with alt text."""
import ast
import json
import re
from pathlib import Path

NUMBER = re.compile(r"\b\d\d_(?=\w+\.ipynb)")
PAGE = re.compile(r"\]\((?:\.\./)?(?:nbs/)?(?:\d\d_)?(\w+)(\.(?:ipynb|html))(?=[)#])")
OPTION = re.compile(r"#\| *[\w-]+: .")
DIRECTIVE = re.compile(r"#\| *(\w+)")
SHOWN = ("text/html", "image/png", "image/jpeg", "image/svg+xml", "text/markdown")   # the first that there is
DROPPED = {"hide", "default_exp"}
LONG = 10   # lines: a longer cell that only defines functions is folded
FOLD = "#| code-fold: true"   # a cell that asks for it is folded on a page whose code is open
MANY = 5   # imports: a cell with more of them and nothing else is folded


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def directives(source: str) -> set[str]:
    "nbdev's words at the top of a cell, such as `export`; Quarto's options have a colon and a value."
    heads = [line for line in source.splitlines() if line.startswith("#|") and not OPTION.match(line)]
    return {DIRECTIVE.match(line).group(1) for line in heads if DIRECTIVE.match(line)}


def without_directives(source: str) -> str:
    return "\n".join(n for n in source.splitlines() if not n.startswith("#|") or OPTION.match(n)).strip("\n")


def defined(source: str) -> list[str]:
    "The names that a cell defines; none where it only imports."
    tree, names = ast.parse(source), []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names += [t.id for t in targets if isinstance(t, ast.Name)]
    return list(dict.fromkeys(names))


def only_defines(source: str) -> list[str]:
    "The names of a long cell that holds definitions and nothing else; \"imports\" of one with many imports."
    try:
        nodes = ast.parse(source).body
    except SyntaxError:   # it speaks to IPython
        return []
    imports, definitions = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.ClassDef)
    if all(isinstance(node, imports) for node in nodes):
        return ["imports"] if len(nodes) > MANY else []
    whole = all(isinstance(node, imports + definitions) for node in nodes) and source.count("\n") > LONG
    return [node.name for node in nodes if hasattr(node, "name")] if whole else []


def title_of(source: str) -> tuple[str, str]:
    "Title and description of the first cell of a notebook."
    title, description = re.fullmatch(r"# (.+)\n\n> ((?:.|\n)+)", source.strip()).groups()
    return title, " ".join(description.split())


def plain(text: str) -> str:
    "Markdown as words."
    text = re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", ":::"))]
    return " ".join(re.sub(r"[*`#>$]|\{[.#][^}]*\}", "", "\n".join(lines)).split())


def first_sentences(text: str, most: int = 200) -> str:
    "The last paragraph's sentences up to a length: what leads to the picture below."
    paragraphs = [p for p in map(plain, text.strip().split("\n\n")) if p]
    words = paragraphs[-1] if paragraphs else ""
    kept = ""
    for sentence in re.split(r"(?<=[.!?:])\s", words):
        if kept and len(kept) + len(sentence) > most:
            break
        kept = f"{kept} {sentence}".strip()
    return kept.rstrip(":") if len(kept) <= 2 * most else kept[:2 * most].rsplit(" ", 1)[0] + " ..."


def has_picture(cell: dict) -> bool:
    return any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {}))


def with_alt(source: str, lead: str, where: str) -> str:
    "A cell with `fig-alt`: its own, else its caption, else what the text above it says."
    if re.search(r"^#\| *fig-alt: .", source, re.M):
        return source
    caption = re.search(r"^#\| *fig-cap: *(.+)", source, re.M)
    alt = caption.group(1).strip("\"' ") if caption else first_sentences(lead)
    if not alt:
        raise SystemExit(f"{where}: a picture without alt text: write `#| fig-alt: ...` or a sentence above the cell")
    return f"#| fig-alt: {json.dumps(alt, ensure_ascii=False)}\n{source}"


def without_count(table: str) -> str:
    "A table of pandas without the column that only counts its rows."
    heads = re.findall(r"<tr>\s*<th>(\d+)</th>", table)
    if not heads or heads != [str(n) for n in range(len(heads))] or table.count("<th></th>") != 1:
        return table
    return re.sub(r"(<tr>\s*)<th>\d+</th>\s*", r"\1", table).replace("<th></th>", "", 1)


def clean_output(output: dict) -> dict:
    "Tables of pandas without their style block and border; one form of each output."
    data = output.get("data")
    if not data:
        return output
    data = {kind: "".join(value) for kind, value in data.items()}
    if "text/html" in data:
        table = re.sub(r"<style scoped>.*?</style>\s*", "", data["text/html"], flags=re.S)
        data["text/html"] = without_count(table.replace('<table border="1" class', "<table class"))
    best = next((kind for kind in SHOWN if kind in data), "")
    return output | dict(data={best: data[best]} if best else data)


def markdown(source: str) -> dict:
    return dict(cell_type="markdown", metadata={}, source=source)


class Notebook:
    "One notebook on its way to a page."

    def __init__(self, path: Path):
        self.path, self.name = path, NUMBER.sub("", path.name).removesuffix(".ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        start = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "markdown")
        self.title, self.description = title_of(text_of(cells[start]))
        self.cells = cells[start + 1:]
        self.lead = ""   # the text last read

    def page(self, title: str, docs: dict[str, str], links: dict[str, str], host: str, fold: bool) -> dict:
        "The notebook of the page; `docs` has the first sentence, `links` the API entry of each public name."
        front = json.dumps(dict(title=title, description=self.description), ensure_ascii=False)
        shown = [dict(cell_type="raw", metadata={}, source=f"---\n{front}\n---\n")]
        for place, cell in enumerate(self.cells):
            if cell["cell_type"] == "markdown":
                text = PAGE.sub(r"](\1\2", text_of(cell)).replace("](../paper_figures/", "](paper_figures/")
                if text.startswith("#|"):
                    raise SystemExit(f"{self.path.name}, cell {place}: code in a Markdown cell")
                self.lead = text if plain(text) else self.lead
                shown.append(markdown(re.sub(rf"\({re.escape(host)}/([\w.#-]+)\)", r"(\1)", text)))
            elif cell["cell_type"] == "code":
                for one in self.code(cell, docs, links, fold, f"{self.path.name}, cell {place}"):
                    join(shown, one)
        for one in shown:
            names = one.pop("folded", None)
            if names is not None:
                summary = json.dumps(": ".join(["Code", *[", ".join(names)] * bool(names)]))
                one["source"] = f"#| code-fold: true\n#| code-summary: {summary}\n{one['source']}"
        spec = dict(name="python3", language="python", display_name="Python 3")
        return dict(cells=shown, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)

    def code(self, cell: dict, docs: dict[str, str], links: dict[str, str], fold: bool, where: str) -> list[dict]:
        "A code cell with its outputs; folded where it is exported, only defines at length, or `fold` says so."
        source = text_of(cell)
        words, fold = directives(source), fold or FOLD in source.splitlines()
        if words & DROPPED or not source.strip():
            return []
        bare = without_directives(source).replace(f"{FOLD}\n", "")
        outputs = [clean_output(output) for output in cell.get("outputs", [])]
        shown = dict(cell_type="code", metadata={}, execution_count=None, outputs=outputs, source=bare)
        if not words & {"export", "exporti"}:
            shown["source"] = with_alt(bare, self.lead, where) if has_picture(cell) else bare
            names = only_defines(bare) if not outputs else []
            return [shown | dict(folded=names) if fold or names else shown]
        names = defined(bare)
        if not names:
            return []
        public = [name for name in names if name in links] if "export" in words else []
        heads = [f"### `{name}`{{.nolink}} {{#{name.lower()}}}\n\n{docs[name]} [Arguments]({links[name].lstrip('/')})"
                 for name in public]
        return [*map(markdown, heads), shown | dict(folded=names)]


def join(shown: list[dict], cell: dict):
    "Add a cell; one that is folded goes into the fold above it, where nothing stands between them."
    above = shown[-1]
    if "folded" in cell and "folded" in above and not above["outputs"] and not cell["outputs"]:
        above["source"] += f"\n\n\n{cell['source']}"
        above["folded"] += cell["folded"]
    else:
        shown.append(cell)


def write(notebook: Notebook, folder: Path, title: str, docs: dict, links: dict, host: str, fold: bool):
    "Write the notebook of a page."
    page = notebook.page(title, docs, links, host, fold)
    (folder / f"{notebook.name}.ipynb").write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
