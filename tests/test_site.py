"""The site builds without a warning or a network, its links lead somewhere, and every block of its tutorials runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.browser import load_browser
from tests.pages import DOCS, script_of

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {notebook.stem for notebook in (DOCS / "notebooks").glob("*.ipynb")}
# The first page is run by tests/test_packaging.py, and a tutorial that is a notebook by tests/test_notebooks.py.
PAGES = [page for page in sorted((DOCS / "tutorials").glob("*.md")) if page.stem not in NOTEBOOKS]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_in_an_empty_folder(page: Path, tmp_path: Path) -> None:
    if page.stem == "add-a-learner":
        pytest.skip("its learner is run by tests/test_contributing.py")

    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (commands / "vlprompt").write_text(f'#!/bin/sh\nexec {sys.executable} -m vlprompt "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)

    folder = tmp_path / "work"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script_of(page)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


class _Links(HTMLParser):
    """Collects what a page links to and loads, and the places that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "iframe") and "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, _Links]:
    """Every page of the site, which was built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-d",
            folder / "doctrees",
            DOCS,
            folder / "site",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    shutil.rmtree(folder / "doctrees")
    pages = {}
    for path in (folder / "site").rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere_and_every_link_leads_somewhere(site: dict[Path, _Links]) -> None:
    wrong = []
    for page, parsed in site.items():
        wrong += [f"{page.name} loads {source}" for source in parsed.loaded if urlparse(source).netloc]
        for link in parsed.links:
            target = urlparse(link)
            if (
                target.scheme
                or target.netloc
                or (target.path.startswith("../") and target.path.endswith(".py"))
            ):
                continue
            path = (page.parent / unquote(target.path)).resolve() if target.path else page
            if not path.exists():
                wrong.append(f"{page.name} links to {link}")
            elif target.fragment and path in site and target.fragment not in site[path].places:
                wrong.append(f"{page.name} links to {link}: no such heading")
    assert wrong == []


@pytest.mark.slow
def test_every_public_name_is_on_the_site(site: dict[Path, _Links]) -> None:
    import vlprompt

    places = {place.rpartition(".")[2] for parsed in site.values() for place in parsed.places}
    assert [name for name in vlprompt.__all__ if name not in places] == []


def test_pictures_of_the_demo_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / "images").glob("*.png")}
    assert len(sizes) >= 5
    assert max(sizes.values()) < 150_000, sizes


@pytest.mark.slow
def test_pages_fit_wide_and_narrow_and_are_readable_in_light_and_dark(site: dict[Path, _Links]) -> None:
    pytest.importorskip("axe_core_python", reason="axe measures contrast and looks for names")
    tools = load_browser()
    root = next(path.parent for path in site if path.name == "index.html" and path.parent.name == "site")
    wrong = []
    with tools.browser() as page:
        for name in ("index.html", "few-shot.html", "demo.html"):
            page.open((root / name).as_uri())
            page.stop_motion()
            for width, theme in ((390, "light"), (1280, "dark")):
                page.resize(width)
                page.run("document.body.dataset.theme = arguments[0]", theme)
                problems = [*page.overflowing(), *page.problems_of_access()]
                wrong += [f"{name}, {width} px, {theme}: {problem}" for problem in problems]
        assert page.requested_elsewhere() == []
    assert wrong == [], "\n".join(wrong)
