"""The notebooks as smalldocs reads them, in _proc: `make docs` renders the site from there."""
import json
import re
from pathlib import Path

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

NUMBER = re.compile(r"\d\d_(?=\w+\.ipynb)")


def texts(cell: dict) -> list[tuple[dict, str]]:
    "Where a cell holds Markdown: its source, or what `show_doc` has printed below it."
    outputs = [(output["data"], "text/markdown") for output in cell.get("outputs", []) if "data" in output]
    places = [(cell, "source")] if cell["cell_type"] == "markdown" else outputs
    return [(holder, key) for holder, key in places if key in holder]


def documented(notebook: dict) -> set[str]:
    "The anchors of the names that a page shows: nbdev makes links to all names, and shows those that are public."
    shown = ["".join(holder[key]) for cell in notebook["cells"] if cell.get("has_sd") for holder, key in texts(cell)]
    return {name.lower() for text in shown for name in re.findall(r"^#+ ([\w.]+)$", text, flags=re.M)}


def mend_links(text: str, host: str, anchors: dict[str, set[str]]) -> str:
    "Markdown with links that stay on the site, wherever that is; a name in code, or that no page shows, is no link."
    fenced, lines = False, []

    def mend(match: re.Match) -> str:
        label, page, anchor = match.groups()
        shown = anchor in anchors.get(page, ())
        return label.strip("`") if fenced else f"[{label}]({page}.html#{anchor})" if shown else label

    for line in text.splitlines(True):
        fenced ^= line.startswith("```")
        lines.append(re.sub(rf"\[(`[^`\]]+`)\]\({re.escape(host)}/(\w+)\.html#([\w.]+)\)", mend, line))
    return "".join(lines)


def prepare(folder: Path, host: str):
    "Names without numbers, as nbdev's links have them, and links that are relative."
    notebooks = {path: json.loads(path.read_text()) for path in folder.glob("*.ipynb")}
    anchors = {NUMBER.sub("", path.name).removesuffix(".ipynb"): documented(nb) for path, nb in notebooks.items()}
    for path, notebook in notebooks.items():
        for cell in notebook["cells"]:
            for holder, key in texts(cell):
                holder[key] = mend_links("".join(holder[key]), host, anchors).splitlines(True)
            if cell["cell_type"] == "raw":
                cell["source"] = [line for line in cell["source"] if not line.startswith("output-file: ")]
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False))
        path.rename(path.with_name(NUMBER.sub("", path.name)))
    sidebar = folder / "sidebar.yml"
    sidebar.write_text(NUMBER.sub("", sidebar.read_text()))


if __name__ == "__main__":
    config = get_config()
    refresh_quarto_yml()
    proc_nbs(force=True)
    prepare(config.config_path / "_proc", f"{config.doc_host}{config.doc_baseurl}")
