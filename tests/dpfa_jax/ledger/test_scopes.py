"""Nested scopes, disjoint partitions, adaptive budgets, new budgets, policies, export."""

import csv
import dataclasses
import datetime
import io
import json
import math

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_jax import (
    Accountant,
    AttentionPrivacy,
    Ledger,
    PoissonSampler,
    SecureKey,
    attention_event,
)
from dpfa_jax.accounting.renyi import Orders, nothing, renyi_cost
from dpfa_jax.ledger import (
    Budget,
    BudgetExceededError,
    Head,
    LedgerError,
    PolicyError,
    to_csv,
    to_json,
)
from dpfa_jax.ledger.state import Tree
from dpfa_jax.policy import Policy, load_policy, policies, regions
from dpfa_jax.policy.policy import _folder

Gaussian = dp_accounting.GaussianDpEvent
DELTA = 1e-6
WORDS = {"delta": DELTA, "adjacency": "add_remove", "unit": "user"}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "l.sqlite")


def house(ledger, *, disjoint=False, epsilon=4.0):
    """An organisation with one tenant, two data sets, a run in each."""
    ledger.open_budget("org", epsilon=epsilon, level="organisation", **WORDS)
    ledger.open_budget("tenant", epsilon=epsilon, level="tenant", parent="org", **WORDS)
    for name in ("a", "b"):
        ledger.open_budget(
            name, epsilon=epsilon, level="data_set", parent="tenant", disjoint=disjoint, **WORDS
        )
        ledger.open_budget(f"run {name}", epsilon=epsilon, parent=name, **WORDS)


def filtered(epsilon, events, delta=DELTA):
    """ε of the Rényi filter for a budget, recomputed from its definition."""
    orders = Orders.for_budget(epsilon, delta)
    cost = nothing(orders.alphas)
    for event in events:
        cost = cost.plus(renyi_cost(event, "add_remove", orders.alphas))
    return orders.epsilon(cost, delta)


def test_a_charge_counts_in_every_scope_around_it(ledger):
    house(ledger)
    ledger.charge("run a", "x", Gaussian(8.0))
    ledger.charge("run b", "x", Gaussian(5.0))
    both, a = [Gaussian(8.0), Gaussian(5.0)], [Gaussian(8.0)]
    assert ledger.spent("run a") == Accountant("add_remove").compose(a[0]).epsilon(DELTA)
    assert ledger.spent("a") == pytest.approx(filtered(4.0, a))
    for name in ("tenant", "org"):
        assert ledger.spent(name) == pytest.approx(filtered(4.0, both))


def test_a_charge_must_fit_every_scope(ledger):
    house(ledger)
    ledger.new_budget("tenant", epsilon=1.0, reason="less is wanted")
    ledger.charge("run a", "x", Gaussian(20.0))
    before = ledger.head()
    with pytest.raises(BudgetExceededError, match=r"^tenant: 'y' would bring .* budget is ε = 1 "):
        ledger.charge("run b", "y", Gaussian(3.0))
    assert ledger.head() == before
    assert ledger.spent("run b") == ledger.spent("b") == 0.0


def test_disjoint_partitions_pay_for_the_dearest_only(ledger):
    house(ledger, disjoint=True)
    ledger.charge("run a", "x", Gaussian(8.0))
    ledger.charge("run b", "x", Gaussian(5.0))
    for name in ("tenant", "org"):
        assert ledger.spent(name) == pytest.approx(filtered(4.0, [Gaussian(5.0)]))
    ledger.charge("run a", "y", Gaussian(5.0))  # Now a is dearer.
    for name in ("tenant", "org"):
        assert ledger.spent(name) == pytest.approx(filtered(4.0, [Gaussian(8.0), Gaussian(5.0)]))
    assert ledger.what_if("run b", Gaussian(9.0))["org"] == ledger.spent("org")
    ledger.verify()


def test_a_partition_that_did_not_say_so_is_added(ledger):
    house(ledger, disjoint=True)
    ledger.open_budget("c", epsilon=4.0, level="data_set", parent="tenant", **WORDS)
    ledger.charge("run a", "x", Gaussian(8.0))
    ledger.charge("run b", "x", Gaussian(5.0))
    ledger.charge("c", "x", Gaussian(6.0))
    assert ledger.spent("org") == pytest.approx(filtered(4.0, [Gaussian(5.0), Gaussian(6.0)]))


@settings(max_examples=60, deadline=None)
@given(
    disjoint=st.lists(st.booleans(), min_size=6, max_size=6),
    charges=st.lists(st.tuples(st.integers(0, 6), st.floats(3.0, 40.0)), max_size=25),
)
def test_the_running_totals_are_the_definition(disjoint, charges):
    """Against the recursion over the whole tree: own + Σ ordinary + max disjoint, per order."""
    parents = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}
    says = {0: False, **dict(zip(range(1, 7), disjoint, strict=True))}
    budget = _budget()
    tree = Tree(budget)
    for scope, z in charges:
        path, name = [], scope
        while True:
            path.append((str(name), says[name]))
            if name == 0:
                break
            name = parents[name]
        tree.keep(tree.raised(path, [(Gaussian(z), 1)]))

    def total(scope):
        own = nothing(tree.orders.alphas)
        for name, z in charges:
            if name == scope:
                own = own.plus(renyi_cost(Gaussian(z), "add_remove", tree.orders.alphas))
        worst = nothing(tree.orders.alphas)
        for child, parent in parents.items():
            if parent == scope:
                if says[child]:
                    worst = worst.largest(total(child))
                else:
                    own = own.plus(total(child))
        return own.plus(worst)

    assert tree.total("0").rho == pytest.approx(total(0).rho, rel=1e-9, abs=1e-12)


def _budget():
    return Budget(
        epsilon=4.0, level="tenant", parent=None, composition="adaptive", disjoint=False,
        policy=None, region=None, reason="test", orders_epsilon=4.0, **WORDS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adjacency": "replace_one"}, "adjacency='replace_one': allowed is that of 'org'"),
        ({"unit": "message"}, "unit='message': allowed is that of 'org', 'user'"),
        (
            {"level": "organisation"},
            "level='organisation': allowed is a level below 'organisation'",
        ),
        ({"level": "floor"}, "level='floor': allowed is 'organisation', "),
        ({"composition": "best"}, "composition='best': allowed is 'fixed', 'adaptive'"),
        ({"parent": "nobody"}, "scope='nobody': no budget was opened"),
        ({"region": "moon-1", "policy": "gdpr"}, "policy gdpr, rule regions: moon-1 was asked"),
        ({"policy": "gdpr", "region": None}, "policy gdpr, rule regions: none was asked"),
        ({"policy": "nobody"}, "policy='nobody': allowed is app, baseline"),
        ({"disjoint": 1}, "disjoint=1: allowed is True, False"),
        ({"reason": ""}, "reason=''"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(ledger, change, message):
    ledger.open_budget("org", epsilon=1.0, level="organisation", **WORDS)
    asked = WORDS | {"epsilon": 1.0, "parent": "org"} | change
    before = ledger.head()
    with pytest.raises(ValueError, match=message):
        ledger.open_budget("s", **asked)
    assert ledger.head() == before


def test_disjoint_is_refused_where_it_is_not_proved(ledger):
    words = WORDS | {"adjacency": "replace_one"}
    ledger.open_budget("r", epsilon=1.0, level="tenant", **words)
    with pytest.raises(LedgerError, match="disjoint=True: allowed is adjacency='add_remove'"):
        ledger.open_budget("s", epsilon=1.0, parent="r", disjoint=True, **words)
    with pytest.raises(LedgerError, match="disjoint=True: allowed is False without a parent"):
        ledger.open_budget("s", epsilon=1.0, disjoint=True, **WORDS)
    ledger.open_budget("f", epsilon=1.0, level="tenant", composition="fixed", **WORDS)
    ledger.open_budget("g", epsilon=1.0, level="data_set", parent="f", **WORDS)
    with pytest.raises(LedgerError, match="composition='adaptive' in all scopes around"):
        ledger.open_budget("s", epsilon=1.0, parent="g", disjoint=True, **WORDS)


@pytest.mark.parametrize("name", ["", "a\nb", "\ud800", "x" * 501, None, 3])
def test_names_that_no_database_keeps(ledger, name):
    with pytest.raises(LedgerError, match="scope="):
        ledger.open_budget(name, epsilon=1.0, **WORDS)
    ledger.open_budget("s", epsilon=1.0, **WORDS)
    with pytest.raises(LedgerError, match="label="):
        ledger.charge("s", name, Gaussian(50.0))
    if name is not None:
        with pytest.raises(LedgerError, match="key_fingerprint="):
            ledger.charge("s", "a", Gaussian(50.0), key_fingerprint=name)
    assert ledger.charges("s") == []


# --- adaptive and fixed ----------------------------------------------------------------


def test_an_adaptive_budget_stops_before_its_filter_passes(ledger):
    ledger.open_budget("s", epsilon=2.0, composition="adaptive", **WORDS)
    events, refused = [], 0
    for i in range(60):
        event = Gaussian(6.0 + i % 7)  # Whoever chose these may have looked at everything.
        try:
            ledger.charge("s", str(i), event)
        except BudgetExceededError:
            assert filtered(2.0, [*events, event]) > 2.0
            refused += 1
        else:
            events.append(event)
    assert refused
    assert ledger.spent("s") == pytest.approx(filtered(2.0, events))
    assert ledger.spent("s") <= 2.0
    # Sound, and so never below what the same events cost when fixed beforehand.
    fixed = Accountant("add_remove")
    for event in events:
        fixed.compose(event)
    assert fixed.epsilon(DELTA) < ledger.spent("s") < 1.5 * fixed.epsilon(DELTA)


def test_the_filter_takes_events_that_only_one_accountant_has(ledger):
    truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 200, 4.0)
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, Gaussian(4.0))
    ledger.open_budget("s", epsilon=2.0, composition="adaptive", **WORDS)
    ledger.charge("s", "a", dp_accounting.SelfComposedDpEvent(sampled, 20))
    plain = ledger.spent("s")
    ledger.open_budget("t", epsilon=2.0, composition="adaptive", **WORDS)
    ledger.charge("t", "a", dp_accounting.SelfComposedDpEvent(truncated, 20))
    assert plain <= ledger.spent("t") <= 1.05 * plain  # truncation is rare here
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "b", dp_accounting.NonPrivateDpEvent())


def test_the_odometer_is_never_below_the_fixed_answer(ledger):
    ledger.open_budget("s", epsilon=4.0, **WORDS)
    assert ledger.odometer("s") == 0.0
    for i in range(5):
        ledger.charge("s", str(i), Gaussian(7.0 + i))
        assert ledger.spent("s") < ledger.odometer("s") < 2 * ledger.spent("s") + 0.5


def test_defaults_of_composition(ledger):
    house(ledger)
    found = {name: budget.composition for name, budget in ledger.scopes().items()}
    assert found == {"org": "adaptive", "tenant": "adaptive", "a": "adaptive", "b": "adaptive",
                     "run a": "fixed", "run b": "fixed"}  # fmt: skip


def test_many_charges_near_the_limit_are_exact(tmp_path):
    """Certificates and bounds decide as the tight accountant would, charge by charge."""
    event = dp_accounting.PoissonSampledDpEvent(0.05, Gaussian(1.0))
    fits = 120
    low, high = (
        Accountant("add_remove").compose(event, n).epsilon(DELTA) for n in (fits, fits + 1)
    )
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_budget("s", epsilon=(low + high) / 2, **WORDS)
    for i in range(fits):
        assert ledger.charge("s", str(i), event)
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "one more", event)


# --- new budgets -----------------------------------------------------------------------


def test_a_new_budget_resets_nothing(ledger):
    ledger.open_budget("s", epsilon=1.0, **WORDS)
    ledger.charge("s", "a", Gaussian(5.0))
    spent = ledger.spent("s")
    with pytest.raises(BudgetExceededError):
        ledger.charge("s", "b", Gaussian(5.0))
    for reason in ("", "  ", None):
        with pytest.raises(LedgerError, match="reason="):
            ledger.new_budget("s", epsilon=2.0, reason=reason)
    ledger.new_budget("s", epsilon=2.0, reason="the board decided on 3 May")
    assert ledger.spent("s") == spent
    assert ledger.charge("s", "b", Gaussian(5.0))
    ledger.new_budget("s", epsilon=0.5, reason="and took it back")  # below what is spent
    with pytest.raises(BudgetExceededError, match="0 of it is left"):
        ledger.charge("s", "c", Gaussian(1e6))
    assert ledger.verify() == ledger.head()
    reasons = [json.loads(e.body)["reason"] for e in ledger.entries() if e.kind == "budget"]
    assert reasons == ["opened", "the board decided on 3 May", "and took it back"]


def test_delta_of_an_adaptive_budget_stays(ledger):
    ledger.open_budget("s", epsilon=1.0, composition="adaptive", **WORDS)
    with pytest.raises(LedgerError, match=r"delta=1e-05: allowed is 1e-06"):
        ledger.new_budget("s", delta=1e-5, reason="why not")
    ledger.open_budget("t", epsilon=1.0, **WORDS)
    ledger.charge("t", "a", Gaussian(7.0))
    ledger.new_budget("t", delta=1e-5, reason="a larger delta")
    expected = Accountant("add_remove").compose(Gaussian(7.0)).epsilon(1e-5)
    assert ledger.spent("t") == expected
    assert Ledger(ledger.path).spent("t") == expected


def test_an_overspent_chain_does_not_verify(ledger, monkeypatch):
    """A chain written by a program without the check: whole, and yet wrong."""
    ledger.open_budget("s", epsilon=1.0, **WORDS)
    monkeypatch.setattr("dpfa_jax.ledger.state.State.check_charge", lambda *_: None)
    ledger.charge("s", "a", Gaussian(1.0))
    with pytest.raises(LedgerError, match="'s' spends more than its budgets allowed"):
        Ledger(ledger.path).verify()


# --- policies --------------------------------------------------------------------------

REGIONS = ("us-east-1 us-west-2 eu-west-1 eu-central-1 ap-southeast-1 ap-northeast-1 ca-central-1 "
           "sa-east-1 ap-south-1 me-south-1 af-south-1")  # fmt: skip


def test_presets():
    assert set(policies()) >= {"gdpr", "ccpa", "pdpa", "lgpd", "pipeda", "app", "uk_dpa"}
    ceilings = {n: (load_policy(n).epsilon, load_policy(n).delta) for n in policies()}
    for name, numbers in {
        "gdpr": (1.0, 1e-6), "ccpa": (2.0, 1e-5), "pdpa": (1.5, 1e-5), "lgpd": (1.0, 1e-6),
    }.items():  # fmt: skip
        assert ceilings[name] == numbers
    assert set(regions()) == set(REGIONS.split())
    for region, name in regions().items():
        assert region in load_policy(name).regions


def test_each_preset_says_what_it_is():
    for path in _folder().iterdir():
        text = " ".join(path.read_text().replace("#", " ").split())
        assert "No law sets epsilon or delta" in text, path
        assert "editable starting point" in text, path
        assert "no legal advice" in text, path
        assert path.name == "regions.toml" or "Why these" in text


def test_a_policy_refuses_with_its_name_and_rule(ledger):
    for change, rule in (
        ({"epsilon": 1.5}, r"rule epsilon: 1\.5 was asked, allowed is 1\."),
        ({"delta": 1e-5}, r"rule delta: 1E-5 was asked, allowed is 1E-6"),
        ({"unit": "message"}, "rule unit: message was asked, allowed is user"),
        ({"region": "us-east-1", "policy": "gdpr"}, "rule regions: us-east-1 was asked"),
    ):
        asked = WORDS | {"epsilon": 1.0, "region": "eu-west-1"} | change
        with pytest.raises(PolicyError, match=f"policy gdpr, {rule}"):
            ledger.open_budget("s", **asked)
    ledger.open_budget("s", epsilon=1.0, region="eu-west-1", **WORDS)
    assert ledger.budget("s").policy.name == "gdpr"  # the region's


def test_a_policy_holds_for_everything_below(ledger):
    ledger.open_budget("t", epsilon=1.0, level="tenant", region="sa-east-1", **WORDS)
    with pytest.raises(PolicyError, match="r: policy lgpd, rule epsilon: 8 was asked"):
        ledger.open_budget("r", epsilon=8.0, parent="t", **WORDS)
    ledger.open_budget("r", epsilon=1.0, parent="t", **WORDS)
    assert (ledger.budget("r").region, ledger.budget("r").policy) == ("sa-east-1", None)


def test_a_policy_that_comes_later_holds_from_then_on(ledger):
    """Also for scopes below that were opened before it."""
    strict = Policy(
        name="house", epsilon=1.0, delta=1e-7, adjacency=("add_remove",), unit=("user",),
        audit_log_retention_days=10, regions=("here",), breach_notice_hours=1,
    )  # fmt: skip
    words = WORDS | {"delta": 1e-7, "region": "here"}
    ledger.open_budget("t", epsilon=8.0, level="tenant", composition="fixed", **words)
    ledger.open_budget("r", epsilon=8.0, parent="t", **(words | {"delta": 1e-6}))
    ledger.charge("r", "a", Gaussian(20.0))
    with pytest.raises(PolicyError, match="policy house, rule epsilon: 8 was asked"):
        ledger.new_budget("t", policy=strict, reason="audit")
    ledger.new_budget("t", policy=strict, epsilon=1.0, reason="audit")
    with pytest.raises(PolicyError, match="r: policy house, rule delta: 1E-6 was asked"):
        ledger.charge("r", "b", Gaussian(20.0))
    ledger.new_budget("r", delta=1e-7, epsilon=1.0, reason="as the policy asks")
    assert ledger.charge("r", "b", Gaussian(20.0))


def test_a_charge_that_breaks_a_policys_ceiling(ledger):
    """The run's own budget is larger than what a policy around it allows by now."""
    ledger.open_budget("t", epsilon=8.0, level="tenant", region="moon", **WORDS)
    ledger.open_budget("r", epsilon=8.0, parent="t", **WORDS)
    loose = Policy(
        name="loose", epsilon=3.0, delta=1e-6, adjacency=("add_remove",), unit=("user",),
        audit_log_retention_days=10, regions=("moon",), breach_notice_hours=1,
    )  # fmt: skip
    ledger.new_budget("t", policy=loose, epsilon=3.0, reason="audit")
    ledger.new_budget("r", epsilon=3.0, reason="audit")
    ledger.open_budget("x", epsilon=1.0, parent="t", **WORDS)
    with pytest.raises(PolicyError, match="r: policy loose, rule epsilon: 5 was asked"):
        ledger.new_budget("r", epsilon=5.0, reason="more")
    monkey = ledger._state.scopes["r"]
    monkey.budget = dataclasses.replace(monkey.budget, epsilon=8.0)  # as if it had been before
    with pytest.raises(PolicyError, match=r"r: policy loose, rule epsilon: 4\.\d+ was asked"):
        ledger.charge("r", "a", Gaussian(1.15))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0}, "epsilon=0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"delta": 1.0}, r"delta=1\.0"),
        ({"unit": []}, "unit="),
        ({"adjacency": ["swap"]}, "adjacency="),
        ({"breach_notice_hours": -1}, "breach_notice_hours=-1"),
        ({"audit_log_retention_days": 1.5}, "audit_log_retention_days="),
        ({"colour": "red"}, "policy: the keys"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_policies_that_are_none(change, message):
    with pytest.raises(ValueError, match=message):
        Policy.from_json(load_policy("gdpr").to_json() | change)


# --- export ----------------------------------------------------------------------------


def test_exports_hold_every_entry(ledger):
    ledger.open_budget("t", epsilon=1.0, level="tenant", region="eu-west-1", **WORDS)
    ledger.open_budget("=cmd()", epsilon=1.0, parent="t", **WORDS)
    ledger.charge("=cmd()", 'quote " , ü', Gaussian(20.0), key_fingerprint="ab")
    ledger.mark_released("=cmd()", 'quote " , ü')
    out = json.loads(to_json(ledger))
    assert Head(**out["head"]) == ledger.head()
    assert [e["kind"] for e in out["entries"]] == [
        "ledger",
        "budget",
        "budget",
        "charge",
        "release",
    ]
    charge = out["entries"][3]
    assert charge["body"]["event"] == {"kind": "GaussianDpEvent", "noise_multiplier": 20.0}
    assert charge["body"]["key_fingerprint"] == "ab"
    assert charge["body"]["software"].startswith("dpfa_jax ")
    days = load_policy("gdpr").audit_log_retention_days
    written = datetime.datetime.fromisoformat(charge["time"])
    kept = datetime.date.fromisoformat(charge["keep_until"])
    assert kept == (written + datetime.timedelta(days=days)).date()
    rows = list(csv.DictReader(io.StringIO(to_csv(ledger))))
    assert rows[3]["label"] == 'quote " , ü'
    assert rows[3]["scope"] == "'=cmd()"  # no formula for a spreadsheet
    assert [r["hash"] for r in rows] == [e["hash"] for e in out["entries"]]


# --- everything under one budget ------------------------------------------------------------


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_one_budget_takes_every_kind_of_release(ledger, composition):
    """Steps with Poisson and truncated batches, adaptive clipping (a step's event: its count is
    released under the same noise), attention with a multiplier a head, two layers of it, and an
    evaluation.
    """
    ledger.open_budget("r", epsilon=1.0, composition=composition, **WORDS)
    sampler = PoissonSampler(500, 0.02, 40, SecureKey.generate())
    attention = AttentionPrivacy(
        unit="record", noise_multiplier=(30.0, 60.0), value_clip=1.0, adjacency="add_remove",
        logit_bound=1.0,
    )  # fmt: skip
    plain = dataclasses.replace(attention, noise_multiplier=80.0)
    events = {
        "Poisson": dp_accounting.PoissonSampledDpEvent(0.02, Gaussian(2.0)),
        "truncated": sampler.event(2.0),
        "attention": attention_event([attention, plain], (1, 5, 2, 8)),
        "evaluation": Gaussian(20.0),
    }
    accountant = Accountant("add_remove")
    for label, event in events.items():
        assert ledger.charge("r", label, event)
        accountant.compose(event)
    assert type(sampler.event(2.0)) is dp_accounting.TruncatedSubsampledGaussianDpEvent
    tight = accountant.epsilon(DELTA)
    if composition == "fixed":
        assert ledger.spent("r") == pytest.approx(tight, rel=1e-6)
    assert tight * (1 - 1e-9) <= ledger.spent("r") <= 1.6 * tight
    ledger.verify()
