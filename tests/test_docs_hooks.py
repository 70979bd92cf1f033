"""The repository's address is said once; a page's links to files become absolute with it."""

import pytest

from docs_hooks.in_browser import addresses
from docs_hooks.repository import absolute, repository, set_repository
from docs_hooks.whole_words import whole

ADDRESS = "https://github.com/someone/something"

README = """# Name
![picture](docs/images/a.png) [page](docs/law.md#phase) [here](#use) [paper](https://arxiv.org/abs/1)
pip install "name[jax] @ git+https://github.com/OWNER/name"
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "index.md").write_text("git+https://github.com/OWNER/name\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "name"\n\n[project.optional-dependencies]\njax = []\n'
    )
    return tmp_path


def test_an_address_reaches_every_file_that_names_it(checkout):
    set_repository(checkout, ADDRESS)
    assert repository(checkout) == ADDRESS
    for page in ("README.md", "docs/index.md"):
        assert f"git+{ADDRESS}" in (checkout / page).read_text()


def test_a_second_address_takes_the_place_of_the_first(checkout):
    set_repository(checkout, ADDRESS)
    moved = ADDRESS.replace("someone", "another")
    set_repository(checkout, moved)
    assert repository(checkout) == moved
    assert not [p for p in checkout.rglob("*.*") if p.is_file() and ADDRESS in p.read_text()]


def test_links_to_files_become_absolute_and_others_stay():
    line = absolute(README, ADDRESS).splitlines()[1]
    assert line == (
        f"![picture]({ADDRESS}/raw/main/docs/images/a.png) "
        f"[page]({ADDRESS}/blob/main/docs/law.md#phase) [here](#use) "
        "[paper](https://arxiv.org/abs/1)"
    )


@pytest.mark.parametrize("address", ["github.com/a/b", "https://github.com/a/b.git", "x"])
def test_what_is_no_address_is_refused(checkout, address):
    with pytest.raises(ValueError, match="must be https://HOST/OWNER/NAME"):
        set_repository(checkout, address)


def test_every_built_page_is_looked_at(tmp_path):
    for page in ("", "law", "api/parts"):
        (tmp_path / page).mkdir(parents=True, exist_ok=True)
        (tmp_path / page / "index.html").touch()
    assert addresses(tmp_path) == {
        "home": "index.html",
        "api/parts": "api/parts/index.html",
        "law": "law/index.html",
    }


def test_an_option_stays_whole_and_the_code_is_the_same():
    marked = whole("python -m benchmarks step-time --repeats 60")
    words = ("-m", "step-time", "--repeats")
    assert all(f'<span class="whole">{word}</span>' in marked for word in words)
    plain = marked.replace('<span class="whole">', "").replace("</span>", "")
    assert plain == "python -m benchmarks step-time --repeats 60"
