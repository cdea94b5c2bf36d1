"""What the site has beside the pages of docs/: README as its first page, the API, and the sources that pages link to.

MkDocs calls these functions. Nothing is copied: a file outside of docs/ becomes a page while the site is built, and
links to it, which are right where the repository is read, lead to that page.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Link, Navigation

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages at the top of the repository, by their names on the site."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?(\))")
HOME = "docs"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Gives headings the anchors that they have where the repository is read."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def anchor(heading: str, separator: str) -> str:
    """Returns the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is not in docs/."""
    sources = set()
    for name, page in PAGES.items():
        if (ROOT / name).exists():
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for module in api_modules():
        files.append(File.generated(config, f"reference/{module}.md", content=_reference(module)))
    for name, text in _texts():
        sources |= {target for target in _targets(name, text) if _is_source(target)}
    for source in sorted(sources):
        files.append(File.generated(config, _page_of_source(source), content=_source(source)))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Adds Megatron-Bridge, which has a part of a page: the table in mkdocs.yml has places for whole pages alone."""
    (places,) = [item for item in nav.items if item.title == "Where runs happen"]
    link = Link("Megatron-Bridge", "doors/#megatron-bridge")
    link.parent = places
    places.children.insert(1, link)
    return nav


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Has links out of docs/ lead to pages of the site, and the table of the API to the docstrings."""
    site = page.file.src_uri
    name = next((each for each, renamed in PAGES.items() if renamed == site), f"{HOME}/{site}")
    if site.startswith(("reference/", "source/")):
        return markdown

    def lead(match: re.Match[str]) -> str:
        before, link, place, after = match.groups()
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
        there = _on_site(target)
        return f"{before}{posixpath.relpath(there, posixpath.dirname(site) or '.')}{place or ''}{after}"

    linked = LINK.sub(lead, markdown)
    if site == "api.md":
        linked = re.sub(r"^\| `(mup_megatron[\w.]*)` \|", r"| [`\1`](reference/\1.md) |", linked, flags=re.MULTILINE)
    return linked


def api_modules() -> list[str]:
    """Lists the modules of docs/api.md."""
    rows = (ROOT / HOME / "api.md").read_text(encoding="utf-8").splitlines()
    return [match[1] for row in rows if (match := re.match(r"\| `(mup_megatron[\w.]*)` \|", row))]


def _reference(module: str) -> str:
    names = _exported(module)
    # A name that is a module's too would be taken for that one: it is described where it is from.
    hidden = {name: origin for name, origin in _imported(module).items() if (_folder(module) / f"{name}.py").exists()}
    members = "".join(f"\n        - {name}" for name in names if name not in hidden) or " []"
    further = "".join(f"\n::: {origin}.{name}\n" for name, origin in hidden.items() if name in names)
    options = f"    options:\n      show_root_heading: false\n      members:{members}\n"
    return f"# {module}\n\n::: {module}\n{options}{further}"


def _imported(module: str) -> dict[str, str]:
    """Returns name → the module that a package has it from."""
    body = ast.parse(_file(module).read_text(encoding="utf-8")).body
    return {alias.name: node.module or "" for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}


def _folder(module: str) -> Path:
    return ROOT / module.replace(".", "/")


def _file(module: str) -> Path:
    file = _folder(module).with_suffix(".py")
    return file if file.exists() else _folder(module) / "__init__.py"


def _exported(module: str) -> list[str]:
    for node in ast.parse(_file(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _texts() -> Iterator[tuple[str, str]]:
    for name in PAGES:
        if (ROOT / name).exists():
            yield name, (ROOT / name).read_text(encoding="utf-8")
    for path in sorted((ROOT / HOME).rglob("*.md")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _targets(name: str, text: str) -> Iterator[str]:
    """Yields what a page links to, from the root of the repository."""
    for match in LINK.finditer(text):
        if not re.match(r"[a-z]+:", match[2]):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2]))


def _is_source(target: str) -> bool:
    return target not in PAGES and not target.startswith(f"{HOME}/") and target != HOME


def _on_site(target: str) -> str:
    """Returns the page of the site for a file or folder of the repository."""
    if target in PAGES:
        return PAGES[target]
    if (ROOT / target).is_dir() and not _is_source(target):
        return f"{target.removeprefix(f'{HOME}/')}/README.md"
    return target.removeprefix(f"{HOME}/") if not _is_source(target) else _page_of_source(target)


def _page_of_source(target: str) -> str:
    return f"source/{target}.md"


def _source(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        return f"# {target}/\n\n" + "\n".join(
            f"- `{each.name}{'/' if each.is_dir() else ''}`" for each in sorted(path.iterdir()) if each.name[0] != "_"
        )
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}.get(path.suffix, "")
    return f"# {target}\n\n~~~~~{language}\n{path.read_text(encoding='utf-8')}\n~~~~~\n"
