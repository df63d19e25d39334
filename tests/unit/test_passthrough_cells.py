"""The passthrough proofs by name, and as cells of a matrix, without L1."""

from __future__ import annotations

import pytest

from dmaproof.errors import UsageError
from qmp_tools.matrix import axes
from qmp_tools.matrix.avocado_recipe import runnables
from qmp_tools.matrix.axes import make_matrix
from qmp_tools.passthrough.catalog import GROUPS, Request, names, own_proofs, select

RULES = [name for name in names() if name.startswith("rules: ")]


@pytest.fixture(autouse=True)
def no_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no QEMU be asked for its version."""
    monkeypatch.setattr(axes, "known_qemus", lambda _: [])


def test_names_are_unique_and_in_the_order_of_the_groups() -> None:
    assert len(set(names())) == len(names())
    assert list(dict.fromkeys(name.partition(": ")[0] for name in names())) == list(GROUPS)


def test_proofs_are_selected_by_group_name_and_pattern() -> None:
    assert select([]) == ()
    assert list(select(["rules"])) == RULES
    assert select(["rules", RULES[3]]) == tuple(RULES)
    assert select([RULES[3], RULES[0]]) == (RULES[0], RULES[3])
    assert set(select(["states: *", "vhost"])) == {
        name for name in names() if name.startswith(("states: ", "vhost: "))
    }
    with pytest.raises(UsageError, match="no passthrough proof is named 'rule'; expected a group"):
        select(["rule"])


def test_a_request_survives_json() -> None:
    request = Request(seed=7, only=(RULES[0],), quick=True, controls=3, timeout_s=9.0)
    assert Request.of(request.to_json()) == request


def test_wrong_names_and_recipes_for_avocado_are_refused() -> None:
    assert make_matrix({"passthrough": ["rules"]}).axes["passthrough"] == RULES
    assert make_matrix({"passthrough": ["all"]}).axes["passthrough"] == list(own_proofs())
    with pytest.raises(UsageError, match="no passthrough proof is named 'rule'"):
        make_matrix({"passthrough": ["rule"]})
    with pytest.raises(UsageError, match="can have only proofs"):
        runnables(make_matrix({"passthrough": RULES[:1]}))
