"""What every parameter of many families is: by hand for some, as judged once for the others."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from cruxy_torch import label_roles, param_groups  # noqa: E402
from cruxy_torch._roles.parameters import find  # noqa: E402
from role_families import FAMILIES  # noqa: E402
from role_models import MODELS, built, expected  # noqa: E402


def described(label) -> str:
    """A label in the form of the tables."""
    return f"bias:{label.of}" if label.role == "bias" else label.role


def mistakes(model: nn.Module, table: dict[str, str]) -> list[str]:
    """Where a model's labels differ from a table, or a line of the table from no parameter."""
    numbered = {name: re.sub(r"(?<=\.)N(?=\\)", r"\\d+", re.escape(name)) for name in table}
    patterns = {re.compile(pattern): name for name, pattern in numbered.items()}
    left, wrong = set(table), []
    for found in find(model):
        name = found.names[0]
        lines = [patterns[p] for p in patterns if p.fullmatch(name)]
        role = described(found.label)
        if [table[line] for line in lines] != [role]:
            wrong.append(f"{name}: {role}, by hand {[table[line] for line in lines]}")
        left -= set(lines)
    return wrong + [f"{name}: no parameter" for name in left]


@pytest.mark.parametrize("family", MODELS)
def test_labels_are_those_of_the_table_written_by_hand(family):
    assert mistakes(MODELS[family](), expected(family)) == []


def judged() -> dict[str, dict[str, str]]:
    """By family and name, with N for a number, the roles that were looked at one by one."""
    families: dict[str, dict[str, str]] = {}
    for line in (Path(__file__).parent / "golden" / "roles.txt").read_text("utf-8").splitlines():
        if line.startswith("== "):
            roles = families.setdefault(line.removeprefix("== "), {})
            continue
        role, names = line.split(": ")
        for name in names.split():
            roles[name] = f"{roles[name]} {role}" if name in roles else role
    return families


JUDGED = judged()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_further_family_has_the_roles_that_were_judged(family):
    model, config, options = FAMILIES[family]
    roles: dict[str, dict[str, None]] = {}
    for name, role in label_roles(built(model, config, **options)).items():
        if role not in ("norm", "norm.bias", "bias"):
            plain = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name).removesuffix(".weight")
            roles.setdefault(plain, {})[role] = None
    # Layers that differ by a number alone may have several, sorted in the file.
    assert {name: " ".join(sorted(found)) for name, found in roles.items()} == JUDGED[family]


def test_every_family_was_judged():
    assert JUDGED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_classes_of_other_names_change_nothing(family):
    model = MODELS[family]()
    before = {found.names[0]: described(found.label) for found in find(model)}
    for module in model.modules():
        module.__class__ = type("Thing", (type(module),), {})
    assert {found.names[0]: described(found.label) for found in find(model)} == before


def test_mamba_decays_neither_its_matrix_nor_its_skip():
    groups = param_groups(MODELS["mamba"](), lr=1e-3, weight_decay=0.1)
    decays = {group["role"]: group["weight_decay"] for group in groups}
    assert (decays["ssm.a"], decays["ssm.d"], decays["ssm.in"]) == (0.0, 0.0, 0.1)
