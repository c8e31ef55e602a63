"""The site's builder: what becomes of a notebook, of the package's source and of a rendered page. No browser."""
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
api, notebooks = pytest.importorskip("api"), pytest.importorskip("notebooks")


@pytest.fixture(scope="module")
def package():
    return api.Package(ROOT / "dli")


def notebook(folder: Path, *cells: tuple[str, str], outputs=()) -> notebooks.Notebook:
    "A notebook of a title and some cells, read back; the last cell has the outputs."
    made = [dict(cell_type="markdown", metadata={}, source="# example\n\n> What it is")]
    made += [dict(cell_type=kind, metadata={}, source=source, outputs=[]) for kind, source in cells]
    made[-1]["outputs"] = list(outputs)
    path = folder / "12_example.ipynb"
    path.write_text(json.dumps(dict(cells=made)))
    return notebooks.Notebook(path)


def shown(page: notebooks.Notebook, fold=False) -> list[dict]:
    links = {"public": "/api_x.html#public"}
    return page.page("Example", {"public": "Does it."}, links, "https://host/dli", fold)["cells"]


PICTURE = dict(output_type="display_data", data={"image/png": "iVBORw0KGgo="})


def test_the_name_of_a_page_has_no_number_and_its_links_stay_on_the_site(tmp_path):
    text = "See [folds](12_splits.ipynb), [a](../nbs/10_samples.ipynb#a) and [x](https://host/dli/plan.html#plan)."
    page = notebook(tmp_path, ("markdown", text))
    assert page.name == "example" and page.description == "What it is"
    assert shown(page)[1]["source"] == "See [folds](splits.ipynb), [a](samples.ipynb#a) and [x](plan.html#plan)."


def test_exported_code_is_folded_under_its_names_and_a_public_name_has_its_anchor(tmp_path):
    page = notebook(tmp_path, ("code", "#| exporti\ndef one():\n    return 1"), ("code", "#| exporti\nTWO = 2"),
                    ("code", "#| export\ndef public():\n    return 3"), ("code", "#| hide\nassert True"))
    front, private, heading, public = shown(page)
    assert 'code-summary: "Code: one, TWO"' in private["source"] and "code-fold: true" in private["source"]
    assert heading["source"].startswith("### `public`{.nolink} {#public}")
    assert "[Arguments](api_x.html#public)" in heading["source"] and "exporti" not in private["source"]
    assert 'code-summary: "Code: public"' in public["source"]


def test_examples_stay_open_and_long_definitions_are_folded(tmp_path):
    long = "def helper(x):\n" + "    x += 1\n" * 12 + "    return x"
    page = notebook(tmp_path, ("code", "short = 1"), ("code", long))
    assert ["code-fold" in cell["source"] for cell in shown(page)[1:]] == [False, True]
    assert ["code-fold" in cell["source"] for cell in shown(page, fold=True)[1:]] == [True]


def test_a_cell_may_ask_to_be_folded(tmp_path):
    page = notebook(tmp_path, ("code", "#| code-fold: true\nprint(1)"), ("markdown", "Text."), ("code", "print(2)"))
    sources = [cell["source"] for cell in shown(page)[1:]]
    assert [source.count("code-fold") for source in sources] == [1, 0, 0]


@pytest.mark.parametrize("source,lead,alt", [
    ("#| fig-alt: A hole\nshow()", "Some text.", "A hole"),
    ('#| fig-cap: "Two holes"\nshow()', "Some text.", "Two holes"),
    ("show()", "First.\n\nEvery injection, `before` and [after](x.ipynb):", "Every injection, before and after"),
])
def test_a_picture_has_alt_text(tmp_path, source, lead, alt):
    page = notebook(tmp_path, ("markdown", lead), ("code", source), outputs=[PICTURE])
    line = next(n for n in shown(page)[-1]["source"].splitlines() if n.startswith("#| fig-alt"))
    assert line.split(":", 1)[1].strip(' "') == alt


def test_a_picture_without_any_text_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="12_example.ipynb, cell 0: a picture without alt text"):
        shown(notebook(tmp_path, ("code", "show()"), outputs=[PICTURE]))


def test_code_in_a_markdown_cell_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="cell 0: code in a Markdown cell"):
        shown(notebook(tmp_path, ("markdown", "#| export\ndef f(): ...")))


def test_tables_of_pandas_lose_style_border_and_count():
    table = ('<style scoped>x</style><table border="1" class="dataframe"><thead><tr style="x"><th></th>'
             "<th>a</th></tr></thead><tbody><tr><th>0</th><td>5</td></tr><tr><th>1</th><td>6</td></tr></tbody></table>")
    clean = notebooks.clean_output(dict(data={"text/html": table, "text/plain": "a"}))["data"]
    assert list(clean) == ["text/html"] and "style scoped" not in clean["text/html"]
    assert "<th>0</th>" not in clean["text/html"] and "<th>a</th>" in clean["text/html"]
    named = table.replace("<th>0</th>", "<th>dli</th>")
    assert "<th>dli</th>" in notebooks.clean_output(dict(data={"text/html": named}))["data"]["text/html"]


def test_every_public_name_has_an_entry(package, tmp_path):
    pages, links, words = api.write_pages(package, tmp_path, "dli")
    names = {n for wing in package.public for rooms in package.public[wing].values() for n in rooms}
    assert names <= set(links) and {"DonorPool", "poisson_blend", "RunConfig"} <= names
    for link in links.values():
        page, _, anchor = link.lstrip("/").partition("#")
        assert f"{{#{anchor}}}" in (tmp_path / page.replace(".html", ".md")).read_text()
    assert words["api_method.html#donorpool"]["names"][0] == "samples"
    assert "wce" in words["api_network.html#losses"]["keys"]


def test_arguments_have_their_types_defaults_and_comments(package):
    entries = {e.name: e for e in package.entries("method")}
    pool = {a.name: a for a in entries["DonorPool"].arguments}
    assert pool["margin"].default == "None" and "pixels" in pool["margin"].comment
    fields = {a.name: a for a in entries["DonorTransform"].arguments}
    assert fields["rotate"].kind == "float" and fields["rotate"].comment.startswith("0..180")
    blend = entries["poisson_blend"]
    assert blend.returns.kind == "torch.Tensor" and "bit-equal" in blend.returns.comment


def test_every_public_name_says_what_it_is(package):
    assert [gap for gap in api.gaps(package) if gap.endswith("no docstring")] == []


def test_every_notebook_has_an_entry_in_the_sidebar_and_a_title_of_its_own():
    text = (ROOT / "nbs/sidebar.yml").read_text()
    listed = re.findall(r'text: "([^"]+)", href: ([\w.]+)', text)
    names = [name for _, name in listed]
    assert len(set(names)) == len(names) and len({title for title, _ in listed}) == len(names)
    there = {re.sub(r"^\d\d_", "", path.name) for path in (ROOT / "nbs").glob("*.ipynb")}
    assert sorted(there - set(names)) == [], "add a line with text and href to nbs/sidebar.yml"
    assert yaml.safe_load(text)["website"]["sidebar"]["contents"]


def test_formulas_pictures_and_cells_of_a_rendered_page():
    finish = pytest.importorskip("finish")
    text = r'<span class="math inline">\(\frac{a}{b} \setminus \mathbf{c}\)</span>'
    drawn = finish.FORMULA.sub(finish.formula, text)
    assert drawn.startswith("<math") and "\\" not in drawn
    assert finish.CELL.sub(finish.table_cell, "<td>0.25 ± 0.10</td>") == '<td class="short number">0.25 ± 0.10</td>'
    assert finish.CELL.sub(finish.table_cell, '<td class="x">a word</td>') == '<td class="short x">a word</td>'
    page = ('<main><header>t</header><p>Above.</p><section id="a" class="level2"><h2>A</h2><details>code</details>'
            "below</section></main>")
    assert finish.sections(page) == {"": "Above.", "a": "below"}
