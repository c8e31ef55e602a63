"""The site, from the notebooks, the package and a few files: `make docs` writes it into _docs. No cell is run.

    _proc    what smalldocs reads: notebooks without numbers, API pages, the changelog, how to cite
    _docs    the site; every file that a page asks for is in it"""
import ast
import json
import shutil
import subprocess
import sys
import unicodedata
from configparser import ConfigParser
from pathlib import Path

import api
import finish
import notebooks
import yaml

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(__file__).resolve().parent
PROC, OUT = ROOT / "_proc", ROOT / "_docs"
IGNORED = {"_quarto.yml", "sidebar.yml", "nbdev.yml"}


def settings() -> dict[str, str]:
    "settings.ini: names, version, addresses."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def listed(contents: list, found: dict[str, dict], there: set[str]) -> list:
    "The entries of a sidebar whose pages exist; notes the entry of each page in `found`."
    kept = []
    for entry in contents:
        if "section" in entry:
            inside = listed(entry["contents"], found, there)
            kept += [entry | dict(contents=inside)] if inside else []
            continue
        found[entry["href"].rsplit(".", 1)[0]] = entry
        kept += [dict(text=entry["text"], href=entry["href"])] if entry["href"] in there else []
    return kept


def site_config(cfg: dict[str, str], contents: list, there: set[str]) -> dict:
    "nbs/_quarto.yml with what settings.ini knows, the sidebar, and a bar without pages that do not exist."
    config = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))
    config.pop("metadata-files", None)
    web = config["website"]
    web |= {"title": cfg["title"], "description": cfg["description"], "repo-branch": cfg["branch"]}
    web |= {"repo-url": cfg["git_url"], "site-url": f"{cfg['doc_host']}{cfg['doc_baseurl']}/"}
    web["sidebar"]["contents"] = contents
    web["navbar"]["left"] = listed(web["navbar"]["left"], {}, there)
    for place, text in web["page-footer"].items():
        web["page-footer"][place] = text.format(**cfg)
    config["project"]["output-dir"] = "_docs"
    return config


def bibtex() -> str:
    "CITATION.cff as BibTeX: the software, the paper, the data."
    spec = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

    def entry(kind: str, key: str, fields: dict) -> str:
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{key},", *lines, "}"])

    def people(authors: list[dict]) -> str:
        return " and ".join(f"{a['family-names']}, {a['given-names']}" if "given-names" in a else f"{{{a['name']}}}"
                            for a in authors)

    software = dict(title=spec["title"], author=people(spec["authors"]), year=str(spec["date-released"])[:4],
                    version=spec["version"], license=spec["license"], url=settings()["git_url"])
    found = [entry("software", "dli", software)]
    for one in [spec["preferred-citation"], *spec["references"]]:
        kind = "inproceedings" if one["type"] == "conference-paper" else "article"
        place = dict(journal=one.get("journal"), booktitle=one.get("collection-title"), volume=one.get("volume"))
        fields = dict(title=one["title"], author=people(one["authors"]), year=one["year"]) | place
        fields["doi"] = one.get("doi")
        name = unicodedata.normalize("NFKD", one["authors"][0]["family-names"]).encode("ascii", "ignore").decode()
        found.append(entry(kind, f"{name.lower()}{one['year']}", fields))
    return "\n\n".join(found)


def front(title: str, description: str) -> str:
    return f"---\n{json.dumps(dict(title=title, description=description), ensure_ascii=False)}\n---\n\n"


def write_extra(sources: dict[str, str]):
    "Pages that no notebook holds: the changelog and how to cite."
    if "changelog" not in sources:
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2]
        (PROC / "changelog.md").write_text(front("Changelog", "What each version changed") + text, encoding="utf-8")
        sources["changelog"] = "CHANGELOG.md"
    if "cite" not in sources:
        lead = "Please cite the software, the paper whose method it implements, and the data set you used."
        page = f"{lead}\n\n```bibtex\n{bibtex()}\n```\n"
        (PROC / "cite.md").write_text(front("How to cite", "BibTeX of the software, the paper and the data") + page)
        sources["cite"] = "CITATION.cff"


def write_notebooks(pages: list[notebooks.Notebook], listing: dict, package: api.Package, links: dict, host: str):
    "Each notebook under its name without a number, titled as the sidebar has it; `fold: true` there folds its code."
    entries = {e.name: e for wing in package.public for e in package.entries(wing)}
    docs = {name: api.words(api.first_line(entry.doc)) for name, entry in entries.items()}
    for notebook in pages:
        spec = listing[notebook.name]
        notebooks.write(notebook, PROC, spec["text"], docs, links, host, spec.get("fold", False))


def prepare() -> tuple[dict[str, str], dict[str, dict]]:
    "Write _proc; returns the file each page is made from, and what the search knows beside the text."
    cfg = settings()
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    pages = [notebooks.Notebook(path) for path in sorted((ROOT / "nbs").glob("*.ipynb"))]
    package = api.Package(ROOT / cfg["lib_path"])
    made, links, words = api.write_pages(package, PROC, cfg["lib_name"])
    sources = {page.name: f"nbs/{page.path.name}" for page in pages}
    sources |= {name.removesuffix(".md"): api.source_of(name, cfg["lib_path"]) for name in made}
    write_extra(sources)
    spec = yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    spec = spec["website"]["sidebar"]["contents"]
    api_titles = [dict(text=text, href=name) for name, text in zip(made, ["All names", *api.titles(made[1:])])]
    for section in spec:
        section["contents"] += api_titles if section["section"] == "API" else []
    listing: dict[str, dict] = {}
    there = {f"{page.name}.ipynb" for page in pages} | {path.name for path in PROC.glob("*.md")}
    contents = listed(spec, listing, there)
    lost = sorted(set(sources) - set(listing))
    if lost:
        raise SystemExit(f"nbs/sidebar.yml: no entry for {', '.join(lost)}: add a line with text and href")
    missing = sorted(set(listing) - set(sources))
    print(*[f"nbs/sidebar.yml names {name}, which does not exist (yet)" for name in missing], sep="\n")
    write_notebooks(pages, listing, package, links, f"{cfg['doc_host']}{cfg['doc_baseurl']}")
    (PROC / "_symbols.json").write_text(json.dumps(links))
    config = yaml.safe_dump(site_config(cfg, contents, there), allow_unicode=True, sort_keys=False)
    (PROC / "_quarto.yml").write_text(config, encoding="utf-8")
    shutil.copy(ROOT / "nbs/styles.css", PROC)
    shutil.copy(ASSETS / "favicon.svg", PROC)
    for name in ("paper_figures", "nbs"):
        copy_pictures(ROOT / name, PROC)
    more = yaml.safe_load((ASSETS / "words.yml").read_text(encoding="utf-8"))
    for page, found in more.items():
        words.setdefault(page, {}).setdefault("words", []).extend(found)
    return sources, words


def copy_pictures(folder: Path, out: Path):
    "Pictures that a page shows by their path: those of nbs beside the pages, others as ../paper_figures has them."
    for path in [p for p in folder.rglob("*") if p.suffix in (".png", ".jpg", ".jpeg", ".svg", ".webp")]:
        target = out / (path.relative_to(folder) if folder.name == "nbs" else path.relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def render():
    "smalldocs, with every warning an error."
    done = subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", "--strict", str(PROC)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    page_sources, search_words = prepare()
    render()
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(PROC / "_docs", OUT)
    finish.finish(OUT, page_sources, search_words, ASSETS)
