"""Every public name has an entry in the API pages."""

from pathlib import Path

from docs_hooks.public_names import public_names, undocumented

ROOT = Path(__file__).parent.parent


def test_every_public_name_has_an_entry_in_the_api_pages():
    assert undocumented(ROOT) == set()


def test_public_names_are_read_from_every_package():
    packages = {init.parent.name for init in ROOT.glob("cruxy_*/__init__.py")}
    assert {name.split(".")[0] for name in public_names(ROOT)} == packages


def test_a_name_without_an_entry_is_found(tmp_path):
    package, pages = tmp_path / "cruxy_example", tmp_path / "docs" / "api"
    package.mkdir()
    pages.mkdir(parents=True)
    (package / "__init__.py").write_text('__all__ = ["shown", "show", "hidden"]\n')
    (pages / "cruxy_example.md").write_text("# cruxy_example\n\n::: cruxy_example.shown\n")
    assert undocumented(tmp_path) == {"cruxy_example.show", "cruxy_example.hidden"}
