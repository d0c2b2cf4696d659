"""Sphinx, over the tree that stage.py writes.

Nothing is executed, and no page asks for anything from outside.
"""

import importlib
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

sys.path.insert(0, str(Path(__file__).parent))
from stage import ROOT, cfg, public, repo_url

sys.path.insert(0, str(ROOT))
for module in public():
    importlib.import_module(f"{cfg['lib_name']}.{module}")  # once, before Sphinx forks

project, author, version = cfg["lib_name"], cfg["author"], cfg["version"]
copyright = cfg["copyright"]  # noqa: A001 - the name that Sphinx reads
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.githubpages",
]
default_role = "py:obj"  # `name` in a docstring leads to the name, where there is one

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {"widgets.js": {}, "vendor/require.js": {}, "vendor/embed-amd.js": {}}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
mathjax_path = "vendor/mathjax/tex-mml-chtml.js"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # else the text of nn.Module.forward stands under every network
autodoc_typehints = "none"  # the docstrings say shapes and units
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = napoleon_use_ivar = False
suppress_warnings = [
    "misc.highlighting_failure"
]  # a line of shell in a block of Python, as in Colab
python_maximum_signature_line_length = 100

html_theme = "sphinx_book_theme"
html_title = project
html_logo, html_favicon = "static/logo.svg", "static/logo.svg"
html_static_path, html_css_files = ["static", "node_modules/site"], ["site.css"]
html_context = dict(default_mode="auto")
html_baseurl = cfg["doc_host"] + cfg["doc_baseurl"] + "/"
html_copy_source = False
html_show_sphinx = False
html_theme_options = dict(
    repository_url=cfg["git_url"],
    repository_branch=cfg["branch"],
    use_repository_button=True,
    use_download_button=False,
    use_issues_button=False,
    use_edit_page_button=False,
    show_navbar_depth=1,
    show_toc_level=2,
    home_page_in_toc=False,
    navbar_persistent=[],
    logo=dict(text=project),
)


def name_figures(doctree, docname):
    "Every cell gets an anchor, and under what it draws stands which notebook and cell drew it."
    for cell in doctree.findall(
        lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "cell_code"
    ):
        anchor = cell["cell_metadata"].get("anchor")
        cell["ids"].append(f"cell-{anchor}")
        kinds = [n["mime_type"] for n in cell.findall(nodes.container) if "mime_type" in n]
        if not any(k.startswith("image/") or "widget-view" in k for k in kinds):
            continue
        page = f"{docname}.ipynb"
        by = nodes.paragraph("", "made by ", classes=["made-by"])
        by += nodes.reference("", page.rsplit("/")[-1], refuri=repo_url(page), internal=False)
        by += nodes.Text(", ")
        by += nodes.reference("", f"cell {anchor}", refuri=f"#cell-{anchor}", internal=True)
        cell.children[-1].append(by)


def narrow(doctree, docname):
    """For narrow screens: printed text is parted at empty lines.

    Aligned paragraphs, which must not wrap, are marked; so are tables of sentences.
    """
    for block in [n for n in doctree.findall(nodes.literal_block) if "output" in n["classes"]]:
        parts = []
        printed = block.astext().strip("\n")
        printed = re.sub(r"^(\$ \S+ .*)\n", r"\1\n\n", printed)  # $ begins a command
        for text in re.split(r"\n{2,}", printed):
            parts.append(nodes.literal_block(text, text, **block.attributes))
            short = max(map(len, text.split("\n"))) <= 120
            if short and re.search(r"\S {2,}\S.*\n.*\S {2,}\S", text):
                parts[-1]["classes"].append("aligned")
        block.replace_self(parts)
    for table in doctree.findall(nodes.table):
        if max(len(row.astext()) for row in table.findall(nodes.row)) > 100:
            table["classes"].append("sentences")


def open_images(app, page, template, context, doctree):
    "A link to an image shows it; Sphinx would offer to save it."
    context["body"] = re.sub(
        r' download internal" download=""(?= href="[^"]*\.png")',
        ' internal"',
        context.get("body", ""),
    )


MODULE = {
    name: module
    for module, names in public().items()
    for name in names
    if re.search(r"[_A-Z]", name)
}


def link_names(doctree, docname):
    "`split_heads` in a text leads to its page of the reference; plain words do not."
    for node in list(doctree.findall(nodes.literal)):
        name = node.astext().removesuffix("()")
        inside = isinstance(node.parent, (nodes.title, nodes.reference, pending_xref))
        if inside or node["classes"] or name not in MODULE:
            continue
        ref = pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=f"{project}.{MODULE[name]}.{name}",
            refexplicit=True,
            refdoc=docname,
            refwarn=True,
        )
        node.replace_self(ref)
        ref += node


def escape(app, what, name, obj, options, lines):
    "Bars and stars of a docstring are bars and stars."
    code_apart = [re.split(r"(`[^`]*`)", s) for s in lines]
    lines[:] = [
        "".join(p if i % 2 else re.sub(r"(?<=.)([|*])", r"\\\1", p) for i, p in enumerate(s))
        for s in code_apart
    ]


def fields(app, what, name, obj, skip, options):
    "Fields are named in the text of their class."
    return skip or not (callable(obj) or isinstance(obj, property))


def setup(app):
    app.connect("autodoc-skip-member", fields)
    app.connect("html-page-context", open_images)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    for f in (name_figures, narrow, link_names):
        app.connect("doctree-read", lambda app, doctree, f=f: f(doctree, app.env.docname))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
